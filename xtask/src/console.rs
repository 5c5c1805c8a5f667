//! A dialogue with a guest on its console: wait for a text, type an answer, keep the transcript.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::Process;

/// The console of a running VMM.
#[derive(Debug)]
pub struct Console {
    process: Process,
    transcript: Vec<u8>,
    /// Everything before this index was matched by an earlier [`Console::expect`].
    matched: usize,
    deadline: Instant,
    echo: bool,
}

impl Console {
    /// Takes over a VMM's standard input and output. The whole dialogue must end within `limit`. With `echo`, the
    /// console is shown on stdout while the guest writes.
    pub fn new(process: Process, limit: Duration, echo: bool) -> Self {
        Self { process, transcript: Vec::new(), matched: 0, deadline: Instant::now() + limit, echo }
    }

    /// Waits until the guest has written `text`, after what was matched before.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        loop {
            if let Some(at) = find(self.transcript.get(self.matched..).unwrap_or_default(), text.as_bytes()) {
                self.matched += at + text.len();
                return Ok(());
            }
            if !self.read().with_context(|| format!("waiting for {text:?} on the console"))? {
                bail!("the VMM ended with {:?} before {text:?} was on the console", self.process.status());
            }
        }
    }

    /// Types a text.
    pub fn send(&self, text: &str) {
        self.process.send(text.as_bytes());
    }

    /// Closes the VMM's standard input.
    pub fn close_input(&self) {
        self.process.close_input();
    }

    /// Waits for the end of the VMM and returns its exit status.
    pub fn finish(&mut self) -> Result<i32> {
        while self.read().context("waiting for the end of the VMM")? {}
        self.process.status().context("the VMM has no exit status")
    }

    /// Everything that was written so far.
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.transcript).into_owned()
    }

    /// Waits for more output; false at the end of the VMM.
    fn read(&mut self) -> Result<bool> {
        let Some(mut bytes) = self.process.next(self.deadline)? else {
            return Ok(false);
        };
        if self.echo {
            let mut stdout = std::io::stdout();
            stdout.write_all(&bytes).and_then(|()| stdout.flush()).context("showing the console")?;
        }
        self.transcript.append(&mut bytes);
        Ok(true)
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len().max(1)).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::spawn;

    fn console(script: &str) -> Console {
        let argv = ["sh", "-c", script].map(str::to_owned);
        Console::new(spawn(&argv).unwrap(), Duration::from_secs(20), false)
    }

    #[test]
    fn a_dialogue_goes_back_and_forth() {
        let mut console = console("echo name?; read -r name; echo \"hello $name\"; exit 3");
        console.expect("name?").unwrap();
        console.send("guest\n");
        console.expect("hello guest").unwrap();
        assert_eq!(console.finish().unwrap(), 3);
        assert_eq!(console.transcript(), "name?\nhello guest\n");
    }

    #[test]
    fn a_text_is_matched_once() {
        let mut console = console("echo once");
        console.expect("once").unwrap();
        assert!(console.expect("once").is_err());
    }
}
