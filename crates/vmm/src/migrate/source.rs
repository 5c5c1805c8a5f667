//! The side that the machine leaves.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use freestone_hypervisor::Hypervisor;
use freestone_memory::image::ImageLayout;
use freestone_memory::layout::PAGE_SIZE;
use freestone_memory::{Bytes, DirtyPages, GuestAddress, GuestMem};
use freestone_snapshot::{Arch, Header, State, Writer};

use super::wire::{Frame, MAX_BODY, RUN, Run, expect, put, wrong};
use crate::store::{Id, MemorySection};
use crate::{Error, Machine, Result};

const PAGE: usize = 4096;
/// Pages of a frame.
const BATCH: usize = 256;

/// A machine that is to leave, as [`send`] needs it. It runs meanwhile, so whoever drives it carries this out.
pub trait Source {
    /// Its memory.
    fn memory(&self) -> GuestMem;

    /// Begins to log writes; whether that is possible. If not, the machine stands still while all of its memory is copied.
    ///
    /// # Errors
    /// If the log fails.
    fn track(&mut self) -> Result<bool>;

    /// The pages that were written since the last call.
    ///
    /// # Errors
    /// If the log fails.
    fn collect(&mut self) -> Result<Vec<DirtyPages>>;

    /// Pauses the machine and saves it, with the sections of the caller's own.
    ///
    /// # Errors
    /// If it cannot be paused or saved.
    fn pause_and_save(&mut self) -> Result<State>;

    /// Lets the machine go on here: the migration has failed.
    ///
    /// # Errors
    /// If it cannot.
    fn resume(&mut self) -> Result<()>;
}

/// Bounds of a migration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MigrateOptions {
    /// How long the guest may stand still, by what is left to copy and how quickly that went until then.
    pub max_downtime: Duration,
    /// How often what was written meanwhile is copied while the guest runs.
    pub max_rounds: u32,
    /// If the guest writes so quickly that the downtime would be longer: stop it all the same. Otherwise the migration fails.
    pub force: bool,
    /// Who sends, for people.
    pub program: String,
}

impl MigrateOptions {
    /// At most 300 ms of standing still, 30 rounds.
    pub fn new(program: impl Into<String>) -> Self {
        let max_downtime = Duration::from_millis(300);
        Self { max_downtime, max_rounds: 30, force: false, program: program.into() }
    }
}

/// What a migration was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MigrateReport {
    /// Rounds of copying while the guest ran.
    pub rounds: u32,
    /// Bytes of pages that were sent.
    pub sent: u64,
    /// From the pause of the guest here until the target said that it runs.
    pub downtime: Duration,
    /// From the beginning to the end.
    pub total: Duration,
}

/// Sends a machine away. `hello` says what it is made of, for the target to look at before anything is copied; it must have the
/// section `machine` ([`Machine::describe`]). `progress` is told bytes that were sent and bytes that are left, which is about as many
/// as are known.
///
/// When this returns `Ok`, the machine runs at the target, and the one here is paused and to be stopped.
///
/// # Errors
/// - [`Error::Undecided`]: the target may have the machine, or not: it stays paused here.
/// - any other: the machine runs here as before, unless letting it go on has failed too, which is the error then.
pub fn send<S: Read + Write>(
    stream: &mut S,
    source: &mut dyn Source,
    hello: State,
    options: &MigrateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MigrateReport> {
    let mut sender =
        Sender { stream, copied: false, body: Vec::new(), report: MigrateReport::default(), progress };
    let begin = Instant::now();
    sender.hello(source, hello, options)?;
    sender.precopy(source, options)?;
    let paused = Instant::now();
    if let Err(error) = sender.last(source, options) {
        source.resume()?;
        return Err(error);
    }
    sender.go()?;
    let mut report = sender.report;
    report.downtime = paused.elapsed();
    report.total = begin.elapsed();
    Ok(report)
}

struct Sender<'a, S> {
    stream: &'a mut S,
    /// All of memory was sent once, and what was written since is logged.
    copied: bool,
    body: Vec<u8>,
    report: MigrateReport,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<S: Read + Write> Sender<'_, S> {
    fn hello(&mut self, source: &dyn Source, mut hello: State, options: &MigrateOptions) -> Result<()> {
        let layout = ImageLayout::of_all(&source.memory())?;
        let id = Id::random().map_err(|source| Error::Io { op: "make up a name for a migration", source })?;
        hello.put(&MemorySection::of(id, &layout))?;
        self.state(Frame::Hello, &hello, options)?;
        expect(self.stream, &mut self.body, Frame::Accepted)
    }

    /// Sends sections in as many frames as it takes.
    fn state(&mut self, frame: Frame, state: &State, options: &MigrateOptions) -> Result<()> {
        let mut writer = Writer::new(Vec::new(), &Header::new(Arch::host(), &options.program)?)?;
        state.write_to(&mut writer)?;
        let bytes = writer.finish()?;
        let mut parts = bytes.chunks(MAX_BODY).peekable();
        while let Some(part) = parts.next() {
            put(self.stream, frame, part)?;
            if parts.peek().is_none() && part.len() == MAX_BODY {
                put(self.stream, frame, &[])?;
            }
        }
        Ok(())
    }

    /// Copies while the guest runs.
    fn precopy(&mut self, source: &mut dyn Source, options: &MigrateOptions) -> Result<()> {
        if !source.track()? {
            tracing::warn!("writes cannot be logged: the machine stands still while its memory is copied");
            return Ok(());
        }
        let memory = source.memory();
        let mut began = Instant::now();
        let mut bytes = self.everything(&memory)?;
        self.copied = true;
        for round in 1..=options.max_rounds {
            self.report.rounds = round;
            let dirty = source.collect()?;
            let left = dirty.iter().map(DirtyPages::count).sum::<u64>().saturating_mul(PAGE_SIZE);
            // As quickly as the last round went.
            let nanos = began.elapsed().as_nanos().saturating_mul(left.into()) / u128::from(bytes.max(1));
            began = Instant::now();
            bytes = self.dirty(&memory, &dirty)?.max(PAGE_SIZE);
            // What was written while these were copied is about as much as they are, by their share of the time.
            if nanos <= options.max_downtime.as_nanos() {
                return Ok(());
            }
        }
        if options.force {
            return Ok(());
        }
        Err(wrong(format!(
            "after {} rounds the guest still writes more than can be copied in {:?}",
            options.max_rounds, options.max_downtime
        )))
    }

    /// Copies what is left while the guest stands still, and the state.
    fn last(&mut self, source: &mut dyn Source, options: &MigrateOptions) -> Result<()> {
        let state = source.pause_and_save()?;
        let memory = source.memory();
        if self.copied {
            let dirty = source.collect()?;
            self.dirty(&memory, &dirty)?;
        } else {
            self.everything(&memory)?;
        }
        self.state(Frame::State, &state, options)?;
        expect(self.stream, &mut self.body, Frame::Ready)
    }

    fn go(&mut self) -> Result<()> {
        let undecided = |error: Error| Error::Undecided { source: Box::new(error) };
        put(self.stream, Frame::Go, &[]).map_err(undecided)?;
        expect(self.stream, &mut self.body, Frame::Running).map_err(undecided)
    }

    /// Sends all pages that hold something: the target's are zeros.
    fn everything(&mut self, memory: &GuestMem) -> Result<u64> {
        let touched = memory.content(&ImageLayout::of_all(memory)?)?;
        let pages =
            touched.iter().flat_map(|range| (0..range.len / PAGE_SIZE).map(|n| range.start + n * PAGE_SIZE));
        let total = touched.iter().map(|range| range.len).sum();
        self.pages(memory, pages, total, false)
    }

    fn dirty(&mut self, memory: &GuestMem, dirty: &[DirtyPages]) -> Result<u64> {
        let total = dirty.iter().map(DirtyPages::count).sum::<u64>().saturating_mul(PAGE_SIZE);
        self.pages(memory, dirty.iter().flat_map(DirtyPages::pages), total, true)
    }

    /// Sends pages; with `zeros`, also those that are zeros now. Returns the bytes of memory that were looked at.
    fn pages(
        &mut self,
        memory: &GuestMem,
        pages: impl Iterator<Item = u64>,
        total: u64,
        zeros: bool,
    ) -> Result<u64> {
        let view = memory.view();
        let mut done = 0;
        let mut page = [0; PAGE];
        let mut frame = Vec::with_capacity(BATCH * (RUN + PAGE));
        for gpa in pages {
            let missing = |_| Error::Migration { reason: format!("memory at {gpa:#x} is not there") };
            view.read_slice(&mut page, GuestAddress(gpa)).map_err(missing)?;
            done += PAGE_SIZE;
            let data = page != [0; PAGE];
            if data || zeros {
                Run { gpa, pages: 1, data }.encode(&mut frame);
            }
            if data {
                frame.extend_from_slice(&page);
            }
            if frame.len() >= BATCH * PAGE {
                self.flush(&mut frame)?;
                (self.progress)(done, total);
            }
        }
        self.flush(&mut frame)?;
        (self.progress)(done, total);
        Ok(done)
    }

    fn flush(&mut self, frame: &mut Vec<u8>) -> Result<()> {
        if !frame.is_empty() {
            put(self.stream, Frame::Pages, frame)?;
            self.report.sent += frame.len() as u64;
            frame.clear();
        }
        Ok(())
    }
}

/// A machine whose devices nobody drives meanwhile: its vCPUs run, its devices' queues wait. Owners that want more implement [`Source`]
/// themselves.
impl<H: Hypervisor> Source for Machine<H> {
    fn memory(&self) -> GuestMem {
        Machine::memory(self).clone()
    }

    fn track(&mut self) -> Result<bool> {
        self.begin_tracking()
    }

    fn collect(&mut self) -> Result<Vec<DirtyPages>> {
        self.take_written()
    }

    fn pause_and_save(&mut self) -> Result<State> {
        self.pause()?;
        self.paused()?.save()
    }

    fn resume(&mut self) -> Result<()> {
        Machine::resume(self)
    }
}
