//! Where the memory of a restored machine comes from, and what is done for it while the machine lives: a page server that must
//! not end before, pages that are fetched before they are asked for, and the record of those that were used.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use freestone_vmm::MachineHandle;
use freestone_vmm::memory::image::ImageLayout;
use freestone_vmm::memory::layout::RamRange;
use freestone_vmm::memory::{GuestMem, Prefetch};
use freestone_vmm::store::{Served, Stored, Watch, Watcher, WorkingSet};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::command::Commander;
use crate::failure::{FAILURE, Failure};

/// How long a machine may take to stop that has no page server any more. Threads that wait for a page do not stop at all.
const GRACE: Duration = Duration::from_secs(5);
/// Ranges that are fetched between two looks at whether the machine is still there.
const STEP: usize = 64;

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum MemorySource {
    /// The memory file is mapped, copy-on-write.
    #[default]
    File,
    /// A page server fills it.
    Uffd(PageSource),
}

/// A page server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageSource {
    /// Its socket.
    pub(crate) socket: PathBuf,
    /// How its end is noticed.
    pub(crate) watch: Watch,
}

impl FromStr for MemorySource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "file" {
            return Ok(Self::File);
        }
        let Some(spec) = text.strip_prefix("uffd=") else {
            return Err("say file, or uffd=SOCKET".to_owned());
        };
        let (socket, watch) = match spec.rsplit_once(",watch=") {
            None => (spec, Watch::Socket),
            Some((socket, "socket")) => (socket, Watch::Socket),
            Some((socket, "process")) => (socket, Watch::Process),
            Some((_, other)) => return Err(format!("watch={other:?}: say socket or process")),
        };
        if socket.is_empty() {
            return Err("uffd= wants the socket of a page server".to_owned());
        }
        Ok(Self::Uffd(PageSource { socket: socket.into(), watch }))
    }
}

/// Keeps a machine whose pages come from a page server, and ends it when the server does.
pub(crate) struct Lifeline {
    served: Served,
    shared: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

struct Line {
    socket: PathBuf,
    lost: AtomicBool,
    machine: Mutex<Option<MachineHandle>>,
    /// Written to when no thread waits for pages any more.
    released: OwnedFd,
}

impl Lifeline {
    /// Memory for the machine of a snapshot, from a page server.
    pub(crate) fn connect(
        stored: &Stored,
        source: &PageSource,
        log: bool,
    ) -> Result<(GuestMem, Self), Failure> {
        let failed = |what: &str, error: io::Error| {
            Failure::new(format!("cannot {what} the page server at {}: {error}", source.socket.display()))
        };
        let socket = UnixStream::connect(&source.socket).map_err(|e| failed("reach", e))?;
        let (memory, served) = stored.serve(socket, source.watch, log)?;
        let released = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| failed("watch", e.into()))?;
        let shared = Arc::new(Line {
            socket: source.socket.clone(),
            lost: AtomicBool::new(false),
            machine: Mutex::new(None),
            released,
        });
        let (watcher, line) = (served.watcher()?, Arc::clone(&shared));
        let watch = thread::Builder::new().name("page-server".to_owned());
        let thread = watch.spawn(move || line.watch(&watcher)).map_err(|e| failed("watch", e))?;
        Ok((memory, Self { served, shared, thread: Some(thread) }))
    }

    /// What comes from the server.
    pub(crate) fn served(&mut self) -> &mut Served {
        &mut self.served
    }

    /// Has this machine end with the server.
    pub(crate) fn hold(&self, machine: MachineHandle) {
        *self.shared.machine.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine.clone());
        if self.is_lost() {
            machine.stop();
        }
    }

    fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::Acquire)
    }

    /// The machine has stopped. Fails if that was for want of pages.
    pub(crate) fn release(&self) -> Result<(), Failure> {
        self.shared.release();
        if self.is_lost() { Err(Failure::new(self.shared.what_happened())) } else { Ok(()) }
    }
}

impl Line {
    fn release(&self) {
        if let Err(error) = rustix::io::write(&self.released, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot end the watch of a page server");
        }
    }

    fn what_happened(&self) -> String {
        format!(
            "the page server at {} has ended: memory of the guest that it did not use yet is lost",
            self.socket.display()
        )
    }

    fn watch(&self, watcher: &Watcher) {
        match watcher.wait(self.released.as_fd()) {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => {
                tracing::error!(%error, "the page server is not watched");
                return;
            }
        }
        self.lost.store(true, Ordering::Release);
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(machine) = machine {
            machine.stop();
        }
        let limit = Timespec::try_from(GRACE).ok();
        let mut fds = [PollFd::new(&self.released, PollFlags::IN)];
        if matches!(poll(&mut fds, limit.as_ref()), Ok(ready) if ready > 0) {
            return;
        }
        // Threads that wait for a page do so in the kernel, and nothing but the end of the process ends that without giving the
        // guest pages of zeros, which its devices might write to a disk.
        eprintln!("freestone: {}", self.what_happened());
        std::process::exit(FAILURE.into());
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        self.shared.release();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Lifeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifeline").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

/// Makes pages present beside a machine that starts.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Begins to fetch what the file says of an image of this layout.
    pub(crate) fn start(file: &Path, memory: &GuestMem, layout: &ImageLayout) -> Result<Self, Failure> {
        let ranges = read(file, layout.size())?.ranges(layout);
        let (stop, memory) = (Arc::new(AtomicBool::new(false)), memory.clone());
        let stopped = Arc::clone(&stop);
        let work = move || fetch(&memory, &ranges, &stopped);
        let thread = thread::Builder::new().name("prefetch".to_owned()).spawn(work)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Reads a working set of an image of `size` bytes.
pub(crate) fn read(file: &Path, size: u64) -> Result<WorkingSet, Failure> {
    let set = WorkingSet::read(file)?;
    if set.image_size() != size {
        return Err(Failure::new(format!(
            "{}: it is the working set of {} bytes of memory, and the snapshot has {size}",
            file.display(),
            set.image_size()
        )));
    }
    Ok(set)
}

fn fetch(memory: &GuestMem, ranges: &[RamRange], stop: &AtomicBool) {
    let mut bytes = 0;
    for part in ranges.chunks(STEP) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        match memory.prefetch(part, Prefetch::Read) {
            Ok(fetched) => bytes += fetched,
            // The guest's own faults will do.
            Err(error) => return tracing::warn!(%error, "memory is not fetched in advance"),
        }
    }
    tracing::info!(bytes, "memory fetched in advance");
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// What is to be recorded of the use of memory.
#[derive(Debug, Clone)]
pub(crate) struct RecordRequest {
    /// Where to.
    pub(crate) path: PathBuf,
    /// How long after the restore; when the machine ends if it ends before, or if nothing is said.
    pub(crate) after: Option<Duration>,
}

/// Writes down which memory was used.
pub(crate) struct Recorder {
    path: PathBuf,
    layout: ImageLayout,
    done: bool,
    timer: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Recorder {
    pub(crate) fn new(
        request: &RecordRequest,
        layout: &ImageLayout,
        commander: Commander,
    ) -> Result<Self, Failure> {
        let timer = request.after.map(|after| {
            let (keep, gone) = channel();
            let wait = move || {
                if gone.recv_timeout(after) == Err(RecvTimeoutError::Timeout) {
                    commander.send(|vm| vm.record());
                }
            };
            Ok::<_, io::Error>((keep, thread::Builder::new().name("record".to_owned()).spawn(wait)?))
        });
        let path = std::path::absolute(&request.path)?;
        Ok(Self { path, layout: layout.clone(), done: false, timer: timer.transpose()? })
    }

    /// Writes the file, unless that was done.
    pub(crate) fn record(&mut self, memory: &GuestMem) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let written = WorkingSet::of(memory, &self.layout).and_then(|set| {
            set.write(&self.path)?;
            Ok(set.bytes())
        });
        match written {
            Ok(bytes) => tracing::info!(bytes, path = ?self.path, "working set recorded"),
            Err(error) => {
                let failure = Failure::from(error);
                eprintln!("freestone: the working set is not recorded in {}: {failure}", self.path.display());
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some((keep, thread)) = self.timer.take() {
            drop(keep);
            drop(thread.join());
        }
    }
}

/// What a machine has for its memory.
#[derive(Default)]
pub(crate) struct Care {
    pub(crate) recorder: Option<Recorder>,
    pub(crate) prefetcher: Option<Prefetcher>,
    pub(crate) lifeline: Option<Lifeline>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_source_is_the_file_or_a_page_server() {
        let uffd = |socket: &str, watch| MemorySource::Uffd(PageSource { socket: socket.into(), watch });
        assert_eq!("file".parse(), Ok(MemorySource::File));
        assert_eq!("uffd=/run/p".parse(), Ok(uffd("/run/p", Watch::Socket)));
        assert_eq!("uffd=p,watch=process".parse(), Ok(uffd("p", Watch::Process)));
        for text in ["", "files", "uffd", "uffd=", "uffd=,watch=socket", "uffd=p,watch=dog"] {
            assert!(text.parse::<MemorySource>().is_err(), "{text:?}");
        }
    }
}
