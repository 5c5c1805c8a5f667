//! The part beside the guest: starts it, takes it through random moments, and checks every line that it tells.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use freestone_testkit::life::{Checker, EchoServer};

use crate::process::{Process, spawn};

/// The longest that the guest may tell nothing.
const SILENCE: Duration = Duration::from_secs(120);

/// How the guest is led.
#[derive(Debug, Args)]
pub struct Options {
    /// Shell script that starts the guest, with its console on standard input and output.
    #[arg(long, value_name = "SCRIPT")]
    start: String,
    /// Shell script of a moment. In it, $N is the moment's number, from 1 on, and $SNAPSHOT a path for what belongs to it.
    #[arg(long, value_name = "SCRIPT")]
    moment: String,
    /// Shell script that goes on with the guest in a new process after each moment; the one before has to end then. Without it the
    /// same process goes on.
    #[arg(long, value_name = "SCRIPT")]
    restore: Option<String>,
    /// How many moments.
    #[arg(long, default_value_t = 5)]
    moments: u64,
    /// The shortest and the longest time from one moment to the next, in milliseconds.
    #[arg(long, num_args = 2, default_values_t = [50, 2000])]
    between: Vec<u64>,
    /// What the times are made of.
    #[arg(long)]
    seed: Option<u64>,
    /// The vsock device's socket: an echo server is the host's port 5000 of it.
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// A port of the host's loopback with a TCP echo server.
    #[arg(long, value_name = "PORT")]
    tcp: Option<u16>,
    /// Do not tell the guest to end, but kill it.
    #[arg(long)]
    kill: bool,
}

/// Leads the guest through its life; fails if anything of it is wrong.
pub fn run(options: &Options) -> Result<()> {
    let _server = options.vsock.as_deref().map(|path| EchoServer::vsock(path, 5000)).transpose();
    let _server = _server.context("listening for the guest's vsock")?;
    if let Some(port) = options.tcp {
        serve(port)?;
    }
    let seed = options.seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("life: {} moments, seed {seed}", options.moments);
    let mut life = Life::start(&options.start)?;
    life.until_told(1)?;
    let mut random = seed;
    for number in 1..=options.moments {
        life.live(between(&options.between, &mut random))?;
        life.moment(&options.moment, number)?;
        if let Some(restore) = &options.restore {
            life.end_of_process().with_context(|| format!("after moment {number}"))?;
            life.process = shell(restore, number)?;
        }
        life.until_told(life.checker.lines() + 1).with_context(|| format!("after moment {number}"))?;
    }
    life.end(options.kill)?;
    let last = life.checker.last().context("no line")?;
    println!(
        "life: {} moments, {} lines are right, the last of round {}, {} connections lost",
        options.moments,
        life.checker.lines(),
        last.round,
        last.number("lost").unwrap_or(0)
    );
    Ok(())
}

/// A time of the range, by a generator that is good enough for that.
fn between(range: &[u64], random: &mut u64) -> Duration {
    *random = freestone_guest::life::mix(random.wrapping_add(0x9E37_79B9_7F4A_7C15));
    let (least, most) = (range.first().copied().unwrap_or(0), range.get(1).copied().unwrap_or(0));
    Duration::from_millis(least + *random % (most.saturating_sub(least) + 1))
}

fn shell(script: &str, number: u64) -> Result<Process> {
    let script = format!("N={number} SNAPSHOT=\"$PWD/snapshot.{number}\"\n{script}");
    spawn(&["sh".into(), "-ec".into(), script])
}

/// A guest, in whatever process it runs.
struct Life {
    process: Process,
    /// The beginning of a line whose end is yet to come, perhaps from another process.
    rest: Vec<u8>,
    checker: Checker,
    heard: Instant,
}

impl Life {
    fn start(script: &str) -> Result<Self> {
        Ok(Self {
            process: shell(script, 0)?,
            rest: Vec::new(),
            checker: Checker::new(),
            heard: Instant::now(),
        })
    }

    /// Takes what the guest says until `deadline`; false if its process has ended.
    fn listen(&mut self, deadline: Instant) -> Result<bool> {
        while Instant::now() < deadline {
            // A deadline that passes is an error of `next`, and none here.
            let left = deadline.min(Instant::now() + Duration::from_millis(20));
            match self.process.next(left) {
                Ok(Some(bytes)) => self.take(&bytes)?,
                Ok(None) => return Ok(false),
                Err(_) => ensure!(
                    self.heard.elapsed() < SILENCE,
                    "the guest tells nothing after {:?}",
                    self.checker.last()
                ),
            }
        }
        Ok(true)
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        std::io::stdout().write_all(bytes).context("showing the console")?;
        self.rest.extend_from_slice(bytes);
        let lines = self.checker.lines();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.checker.line(&String::from_utf8_lossy(&line)).map_err(anyhow::Error::msg)?;
        }
        if self.checker.lines() > lines || lines == 0 {
            self.heard = Instant::now();
        }
        Ok(())
    }

    fn live(&mut self, time: Duration) -> Result<()> {
        ensure!(self.listen(Instant::now() + time)?, "the VMM ended with {:?}", self.process.status());
        Ok(())
    }

    fn until_told(&mut self, lines: u64) -> Result<()> {
        while self.checker.lines() < lines {
            self.live(Duration::from_millis(20))?;
        }
        Ok(())
    }

    fn moment(&mut self, script: &str, number: u64) -> Result<()> {
        let (status, output) = shell(script, number)?.finish(SILENCE)?;
        if status != 0 {
            bail!("moment {number} ended with {status}: {}", String::from_utf8_lossy(&output).trim());
        }
        self.heard = Instant::now();
        Ok(())
    }

    /// Takes what the process still says.
    fn end_of_process(&mut self) -> Result<()> {
        if self.listen(Instant::now() + SILENCE)? {
            bail!("the process that was snapshotted goes on");
        }
        Ok(())
    }

    fn end(&mut self, kill: bool) -> Result<()> {
        if kill {
            self.process.kill();
            return self.end_of_process();
        }
        self.process.send(b"end\n");
        self.end_of_process().context("telling the guest to end")?;
        ensure!(self.process.status() == Some(0), "the VMM ended with {:?}", self.process.status());
        ensure!(self.checker.done().is_some(), "the guest did not say that it is done");
        Ok(())
    }
}

/// Sends back what comes to a port of the loopback, for as long as this process lives.
fn serve(port: u16) -> Result<()> {
    let listener =
        TcpListener::bind(("127.0.0.1", port)).with_context(|| format!("listening on port {port}"))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                drop(stream.set_nodelay(true));
                while let Ok(len @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(buffer.get(..len).unwrap_or_default()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(())
}
