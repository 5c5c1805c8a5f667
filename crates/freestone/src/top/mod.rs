//! `freestone top`: what all machines cost, as it happens.

mod frame;
mod view;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use self::frame::{Frame, Sampler};
use self::view::View;
use crate::failure::Failure;
use crate::names::Runtime;

/// How long a key waits at most until it is looked at.
const KEYS: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[command(after_help = "\
Keys: q quits; s and S change by what machines are sorted, r turns the order; up and down choose the machine whose exits and
queues are shown; space stops and starts the display; + and - change the interval.

If standard output is not a terminal, a table is printed each time, or a line of JSON with --json.")]
pub(crate) struct Top {
    /// Names of machines [default: all that run].
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    /// Seconds between two looks.
    #[arg(long, short = 'i', value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,

    /// Sort by this at first.
    #[arg(long, value_enum, value_name = "COLUMN", default_value_t = Sort::Exits)]
    sort: Sort,

    /// Look this many times, and end. 0: until it is told to.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 0)]
    count: u64,

    /// Print a line of JSON each time, on a terminal too.
    #[arg(long)]
    json: bool,
}

/// By what machines are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// Their names.
    Name,
    /// Exits in a second.
    Exits,
    /// Processor time.
    Cpu,
    /// Memory.
    Memory,
    /// Requests of devices in a second.
    Requests,
}

impl Sort {
    const ALL: [Self; 5] = [Self::Name, Self::Exits, Self::Cpu, Self::Memory, Self::Requests];

    /// The one `steps` further.
    fn step(self, steps: usize) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Self::ALL.into_iter().cycle().nth(at + steps).unwrap_or(self)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Exits => "exits",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Requests => "requests",
        }
    }
}

/// Shows machines until it is told to end.
pub(crate) fn top(args: &Top) -> Result<ExitCode, Failure> {
    let runtime = Runtime::find();
    for name in &args.names {
        runtime.entry(name)?;
    }
    let sampler = Sampler::new(runtime, args.names.clone());
    if args.json || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return print(args, sampler);
    }
    show(args, sampler)
}

/// Prints a frame each time.
fn print(args: &Top, mut sampler: Sampler) -> Result<ExitCode, Failure> {
    // Of what was before the first look nobody knows how long it took.
    drop(sampler.frame()?);
    let mut printed = 0;
    let mut out = io::stdout();
    while args.count == 0 || printed < args.count {
        thread::sleep(Duration::from_secs(args.interval));
        let mut frame = sampler.frame()?;
        frame.sort(args.sort, false);
        let text = if args.json { serde_json::to_string(&frame)? + "\n" } else { frame.table() + "\n" };
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // Whoever reads has read enough.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => break,
            written => written?,
        }
        printed += 1;
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes frames at its own pace: a machine that does not answer must not hold the keys up.
fn sample(
    mut sampler: Sampler,
    intervals: &Receiver<u64>,
    frames: &dyn Fn(Result<Frame, Failure>) -> bool,
    mut interval: u64,
) {
    loop {
        if !frames(sampler.frame()) {
            return;
        }
        match intervals.recv_timeout(Duration::from_secs(interval)) {
            Ok(other) => interval = other,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The display on a terminal.
fn show(args: &Top, sampler: Sampler) -> Result<ExitCode, Failure> {
    let (frames, arrived) = sync_channel(1);
    let (intervals, changes): (Sender<u64>, _) = channel();
    let interval = args.interval;
    let send = move |frame| frames.send(frame).is_ok();
    let thread = thread::Builder::new().name("sampler".into());
    // It ends with the process, or when the channel does.
    let _sampler = thread.spawn(move || sample(sampler, &changes, &send, interval))?;
    let mut terminal = ratatui::try_init()?;
    let mut view = View::new(args.sort, interval);
    let shown = run(args, &mut terminal, &mut view, &arrived, &intervals);
    ratatui::restore();
    shown.map(|()| ExitCode::SUCCESS)
}

fn run(
    args: &Top,
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    frames: &Receiver<Result<Frame, Failure>>,
    intervals: &Sender<u64>,
) -> Result<(), Failure> {
    let mut looks = 0;
    loop {
        while let Ok(frame) = frames.try_recv() {
            view.take(frame?);
            looks += 1;
        }
        terminal.draw(|frame| view.draw(frame))?;
        if args.count > 0 && looks > args.count {
            return Ok(());
        }
        if event::poll(KEYS)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
        {
            let before = view.interval();
            let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if control_c || !view.key(key.code) {
                return Ok(());
            }
            if view.interval() != before {
                // Fails when the thread has ended, which shows by its last frame.
                let _ = intervals.send(view.interval());
            }
        }
    }
}

/// Machines of a frame, by name.
type Machines<T> = BTreeMap<String, T>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_to_sort_by_come_one_after_the_other() {
        assert_eq!(Sort::Name.step(1), Sort::Exits);
        assert_eq!(Sort::Requests.step(1), Sort::Name);
        assert_eq!(Sort::Name.step(Sort::ALL.len() - 1), Sort::Requests);
    }
}
