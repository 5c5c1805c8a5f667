//! A running program whose output arrives as events: on this machine, or in the lab.
//!
//! [`spawn`] starts a local one. The lab's agent uses the same function inside the lab, and [`crate::lab`] carries its
//! events over to a [`Process`] here, so that a test does not see where its program runs.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{PidfdFlags, Signal};

/// What a program does.
#[derive(Debug)]
pub enum Event {
    /// It wrote to its standard output or error.
    Output(Vec<u8>),
    /// It ended, with this status; 128 and the number of the signal when it was killed. Nothing comes after it.
    Exit(i32),
}

/// What a program is told.
#[derive(Debug)]
pub enum Order {
    /// Write to its standard input.
    Input(Vec<u8>),
    /// Close its standard input.
    CloseInput,
    /// Kill it.
    Kill,
}

/// A handle on a running program; it is killed when the handle is dropped.
#[derive(Debug)]
pub struct Process {
    orders: Sender<Order>,
    events: Receiver<Event>,
    status: Option<i32>,
}

impl Process {
    /// Joins the two ends of a program that runs elsewhere.
    pub fn new(orders: Sender<Order>, events: Receiver<Event>) -> Self {
        Self { orders, events, status: None }
    }

    /// Writes to the program's standard input. A program that has ended does not read it; that is no error.
    pub fn send(&self, bytes: &[u8]) {
        drop(self.orders.send(Order::Input(bytes.to_vec())));
    }

    /// Closes the program's standard input.
    pub fn close_input(&self) {
        drop(self.orders.send(Order::CloseInput));
    }

    /// Kills the program.
    pub fn kill(&self) {
        drop(self.orders.send(Order::Kill));
    }

    /// The exit status, once [`Process::next`] has seen it.
    pub fn status(&self) -> Option<i32> {
        self.status
    }

    /// Waits for the next output until `deadline`. `None` says that the program has ended.
    pub fn next(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        if self.status.is_some() {
            return Ok(None);
        }
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Output(bytes)) => Ok(Some(bytes)),
            Ok(Event::Exit(status)) => {
                self.status = Some(status);
                Ok(None)
            }
            Err(RecvTimeoutError::Timeout) => bail!("timed out"),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine that runs the program has ended"),
        }
    }

    /// Collects all output until the program ends, and returns it with the exit status.
    pub fn finish(mut self, limit: Duration) -> Result<(i32, Vec<u8>)> {
        let deadline = Instant::now() + limit;
        let mut all = Vec::new();
        while let Some(mut bytes) = self.next(deadline)? {
            all.append(&mut bytes);
        }
        let status = self.status.context("the program has no exit status")?;
        Ok((status, all))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.kill();
        }
    }
}

/// Starts a program on this machine.
pub fn spawn(argv: &[String]) -> Result<Process> {
    let (order_tx, order_rx) = channel();
    let (event_tx, event_rx) = channel();
    spawn_with(argv, order_rx, event_tx)?;
    Ok(Process::new(order_tx, event_rx))
}

/// Starts a program on this machine that takes orders from one channel and tells its events to the other.
pub fn spawn_with(argv: &[String], orders: Receiver<Order>, events: Sender<Event>) -> Result<()> {
    let (program, args) = argv.split_first().context("the command is empty")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut input = child.stdin.take();
    let pumps = [pump(child.stdout.take(), events.clone()), pump(child.stderr.take(), events.clone())];
    // By a pidfd, so that a kill that comes late cannot hit another process.
    let pidfd = rustix::process::pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty())
        .context("opening a pidfd")?;

    thread::spawn(move || {
        for order in orders {
            match order {
                // A program that does not read its input any more is not our failure.
                Order::Input(bytes) => drop(input.as_mut().map(|pipe| pipe.write_all(&bytes))),
                Order::CloseInput => drop(input.take()),
                Order::Kill => drop(rustix::process::pidfd_send_signal(&pidfd, Signal::KILL)),
            }
        }
    });
    thread::spawn(move || {
        let status = child.wait();
        for pump in pumps {
            drop(pump.join());
        }
        drop(events.send(Event::Exit(status.map_or(-1, code))));
    });
    Ok(())
}

/// Turns what a program writes into events until it closes its end.
fn pump(source: Option<impl Read + Send + 'static>, events: Sender<Event>) -> JoinHandle<()> {
    thread::spawn(move || {
        let Some(mut source) = source else { return };
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = source.read(&mut buffer) {
            let bytes = buffer.get(..length).unwrap_or_default().to_vec();
            if events.send(Event::Output(bytes)).is_err() {
                break;
            }
        }
    })
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Process {
        spawn(&["sh".into(), "-c".into(), script.into()]).unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn output_and_status_arrive() {
        let (status, output) = sh("echo one; exit 7").finish(LIMIT).unwrap();
        assert_eq!((status, output.as_slice()), (7, b"one\n".as_slice()));
    }

    #[test]
    fn input_reaches_the_program() {
        let process = sh("read -r line; echo \"<$line>\"");
        process.send(b"hello\n");
        assert_eq!(process.finish(LIMIT).unwrap().1, b"<hello>\n");
    }

    #[test]
    fn a_killed_program_reports_the_signal() {
        let process = sh("exec sleep 100");
        process.kill();
        assert_eq!(process.finish(LIMIT).unwrap().0, 128 + 9);
    }

    #[test]
    fn a_silent_program_times_out() {
        let mut process = sh("exec sleep 100");
        assert!(process.next(Instant::now() + Duration::from_millis(50)).is_err());
    }
}
