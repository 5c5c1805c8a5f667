//! `freestone page-server`: fills the memory of restored machines from a snapshot, in a process of its own.
//!
//! Each machine is served by a thread. What comes over the socket is from whoever may open it, and is believed in nothing: the
//! handshake has a size and a time, its descriptor must be one of userfaultfd(2), and its regions must be within the file.

use std::collections::HashSet;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use freestone_vmm::memory::image::{self, Extent};
use freestone_vmm::memory::layout::PAGE_SIZE;
use freestone_vmm::memory::uffd::{PageServer, ServerStats, UffdRegion, receive_handshake};
use freestone_vmm::store::{StorePaths, Stored, WorkingSet};
use rustix::event::epoll;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::api::Socket;
use crate::failure::Failure;
use crate::{files, say};

/// How long the handshake of a machine may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone page-server web.snap --socket web.pages
      Serve the memory of a snapshot; `freestone restore web.snap --mem uffd=web.pages` uses it.
  freestone page-server web.snap --socket web.pages --record web.set --once
      Serve one machine, and write down which pages it asked for, in their order.
  freestone page-server web.snap --socket web.pages --prefetch web.set
      Fill these in before they are asked for.

A machine must not outlive its page server: it is stopped when this command ends.")]
pub(crate) struct PageServerArgs {
    /// Folder of a snapshot, or a memory file.
    #[arg(value_name = "DIR|FILE")]
    image: PathBuf,

    /// Listen at this socket, which only its owner may open.
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,

    /// Fill in the pages of a working set before they are asked for.
    #[arg(long, value_name = "FILE")]
    prefetch: Option<PathBuf>,

    /// Fill in all pages in the background.
    #[arg(long)]
    all: bool,

    /// Write the pages that machines asked for to a working set, in their order, when a machine has ended.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// Serve one machine and end.
    #[arg(long)]
    once: bool,

    /// The most machines at once. Who comes when there are so many is turned away.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    max: u16,

    /// When a machine has ended: when its end of the socket is closed, or when its process has ended, for VMMs that close the
    /// socket after the handshake.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Watch::Socket)]
    watch: Watch,

    /// Print lines of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Watch {
    /// Its end of the socket.
    Socket,
    /// Its process.
    Process,
}

/// Serves until it is stopped by a signal.
pub(crate) fn page_server(args: &PageServerArgs) -> Result<ExitCode, Failure> {
    files::raise_limit();
    let (image, path) = open(&args.image)?;
    let prefetch = args.prefetch.as_deref().map(WorkingSet::read).transpose()?;
    let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let service = Arc::new(Service {
        image,
        prefetch,
        all: args.all,
        watch: args.watch,
        record: args.record.as_deref().map(std::path::absolute).transpose()?.map(Recording::new),
        stop: bell()?,
        ended: bell()?,
    });
    let socket = Socket::bind(&args.socket)
        .map_err(|e| Failure::new(format!("cannot listen at {}: {e}", args.socket.display())))?;
    let (signalled, signals) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, signals.try_clone()?)?;
    }
    let (at, of) = (args.socket.display(), path.display());
    tell(
        args.json,
        &json!({ "socket": args.socket, "image": path }),
        &format!("{at} has the pages of {of}"),
    )?;
    let mut server =
        Server { service, sessions: Vec::new(), max: args.max.into(), once: args.once, json: args.json };
    let outcome = server.serve(&socket, &signalled);
    // Before the threads are waited for: nobody else is to come.
    drop(socket);
    server.end();
    outcome
}

fn tell(json: bool, value: &serde_json::Value, text: &str) -> Result<(), Failure> {
    if json { say::line(value) } else { say::line(text) }
}

/// The memory of a snapshot, and its name.
fn open(path: &Path) -> Result<(File, PathBuf), Failure> {
    if path.is_dir() {
        let stored = Stored::open(&StorePaths::in_folder(path))?;
        if let Some(base) = stored.memory().base() {
            let path = path.display();
            return Err(Failure::new(format!(
                "{path}: it has only what differs from snapshot {base}: rebase it onto that first"
            )));
        }
        return Ok((stored.memory_file()?.try_clone()?, stored.path().to_owned()));
    }
    let failed = |error| Failure::new(format!("{}: {}", path.display(), Failure::from(error)));
    Ok((image::open(path).map_err(failed)?, path.to_owned()))
}

/// What all threads have.
struct Service {
    image: File,
    prefetch: Option<WorkingSet>,
    all: bool,
    watch: Watch,
    record: Option<Recording>,
    /// Readable when all are to end.
    stop: OwnedFd,
    /// Readable when one has ended.
    ended: OwnedFd,
}

/// A machine that is served.
struct Session {
    socket: UnixStream,
    since: Instant,
    stage: Arc<Stage>,
    thread: JoinHandle<Result<ServerStats, Failure>>,
    pid: i32,
}

/// How far it is.
#[derive(Default)]
struct Stage {
    /// The handshake is over.
    begun: AtomicBool,
    /// The thread has ended, or is about to.
    ended: AtomicBool,
}

impl Session {
    fn has_begun(&self) -> bool {
        self.stage.begun.load(Ordering::Acquire)
    }

    fn has_ended(&self) -> bool {
        self.stage.ended.load(Ordering::Acquire)
    }

    /// Ends a handshake that is under way. One that is gone is gone.
    fn hang_up(&self) {
        if !self.has_begun() {
            drop(self.socket.shutdown(Shutdown::Both));
        }
    }
}

struct Server {
    service: Arc<Service>,
    sessions: Vec<Session>,
    max: usize,
    once: bool,
    json: bool,
}

impl Server {
    fn serve(&mut self, socket: &Socket, signalled: &UnixStream) -> Result<ExitCode, Failure> {
        loop {
            let timeout = self.time_left().and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [
                PollFd::new(socket.listener(), PollFlags::IN),
                PollFd::new(&self.service.ended, PollFlags::IN),
                PollFd::new(signalled, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let [comes, _, stop] = fds.map(|fd| !fd.revents().is_empty());
            if stop {
                return Ok(ExitCode::SUCCESS);
            }
            self.drop_the_slow();
            if let Some(code) = self.reap()? {
                return Ok(code);
            }
            if comes && let Ok((stream, _)) = socket.listener().accept() {
                self.accept(stream)?;
            }
        }
    }

    /// Until the first handshake has to be over.
    fn time_left(&self) -> Option<Duration> {
        let unheard = self.sessions.iter().filter(|session| !session.has_begun() && !session.has_ended());
        unheard.map(|session| HANDSHAKE.saturating_sub(session.since.elapsed())).min()
    }

    fn drop_the_slow(&self) {
        let slow = self.sessions.iter().filter(|session| session.since.elapsed() >= HANDSHAKE);
        slow.for_each(Session::hang_up);
    }

    fn accept(&mut self, stream: UnixStream) -> Result<(), Failure> {
        if self.sessions.len() >= self.max {
            tracing::warn!(max = self.max, "a machine is turned away: there are too many");
            return Ok(());
        }
        stream.set_nonblocking(false)?;
        let pid = rustix::net::sockopt::socket_peercred(&stream).map_or(0, |peer| peer.pid.as_raw_pid());
        let (service, stage) = (Arc::clone(&self.service), Arc::new(Stage::default()));
        let (socket, at) = (stream.try_clone()?, Arc::clone(&stage));
        let work = move || {
            let told = service.serve(&stream, &at.begun);
            // The machine is to know at once: the session has a copy of the socket.
            drop(stream.shutdown(Shutdown::Both));
            at.ended.store(true, Ordering::Release);
            if let Err(error) = rustix::io::write(&service.ended, &1_u64.to_ne_bytes()) {
                tracing::error!(%error, "the end of a session is not told");
            }
            told
        };
        let thread = thread::Builder::new().name("pages".to_owned()).spawn(work)?;
        self.sessions.push(Session { socket, since: Instant::now(), stage, thread, pid });
        Ok(())
    }

    /// Tells of those that have ended; the exit status if that was the only one that was to come.
    fn reap(&mut self) -> Result<Option<ExitCode>, Failure> {
        let _ = rustix::io::read(&self.service.ended, &mut [0; 8]);
        let mut code = None;
        while let Some(at) = self.sessions.iter().position(Session::has_ended) {
            let session = self.sessions.swap_remove(at);
            code = self.report(session)?.or(code);
        }
        Ok(code.filter(|_| self.once))
    }

    /// `None` for one that never began.
    fn report(&self, session: Session) -> Result<Option<ExitCode>, Failure> {
        let (pid, begun) = (session.pid, session.has_begun());
        let outcome = session.thread.join().unwrap_or_else(|_| Err(Failure::new("the thread panicked")));
        match outcome {
            Ok(stats) => {
                let ServerStats { faults, copied, zeroed, removed, strange, .. } = stats;
                let value = json!({ "pid": pid, "faults": faults, "copied": copied, "zeroed": zeroed,
                                    "removed": removed, "strange": strange });
                let text = format!(
                    "process {pid}: {faults} faults, {copied} pages filled in, {zeroed} of zeros, {removed} given back"
                );
                tell(self.json, &value, &text)?;
                Ok(Some(ExitCode::SUCCESS))
            }
            Err(failure) => {
                eprintln!("freestone: process {pid}: {failure}");
                Ok(begun.then(|| failure.exit_code()))
            }
        }
    }

    /// Ends all that are served, and waits for them.
    fn end(&mut self) {
        if let Err(error) = rustix::io::write(&self.service.stop, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot end the threads");
        }
        for session in std::mem::take(&mut self.sessions) {
            session.hang_up();
            if let Err(failure) = self.report(session) {
                eprintln!("freestone: {failure}");
            }
        }
    }
}

impl Service {
    /// Serves a machine until it ends, or until all are to.
    fn serve(&self, stream: &UnixStream, begun: &AtomicBool) -> Result<ServerStats, Failure> {
        stream.set_read_timeout(Some(HANDSHAKE))?;
        let (uffd, regions) = receive_handshake(stream)?;
        expect_uffd(uffd.as_fd().as_raw_fd())?;
        let size = regions.iter().map(end_of).max().unwrap_or(0);
        let mut server = PageServer::new(uffd, regions, self.image.try_clone()?)?;
        begun.store(true, Ordering::Release);
        if let Some(set) = &self.prefetch {
            if set.image_size() == size {
                server.prefetch(set.extents().iter().copied());
            } else {
                let of = set.image_size();
                tracing::warn!(of, size, "the working set is of another image, and is not used");
            }
        }
        if self.all {
            server.prefetch_all();
        }
        let ended = self.ended_by(stream)?;
        let served = server.run(ended.set.as_fd());
        if let Some(record) = &self.record {
            record.add(size, &server.working_set())?;
        }
        served?;
        Ok(server.stats())
    }

    /// What is readable when the machine has ended, or when all are to.
    fn ended_by(&self, stream: &UnixStream) -> Result<Ended, Failure> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let none = epoll::EventData::new_u64(0);
        epoll::add(&set, &self.stop, none, epoll::EventFlags::IN)?;
        let process = match self.watch {
            Watch::Socket => {
                epoll::add(&set, stream, none, epoll::EventFlags::RDHUP)?;
                None
            }
            Watch::Process => {
                let peer = rustix::net::sockopt::socket_peercred(stream)?;
                let process = pidfd_open(peer.pid, PidfdFlags::empty())?;
                epoll::add(&set, &process, none, epoll::EventFlags::IN)?;
                Some(process)
            }
        };
        Ok(Ended { set, _process: process })
    }
}

/// The set of what ends a session. A descriptor that is closed leaves it.
struct Ended {
    set: OwnedFd,
    _process: Option<OwnedFd>,
}

/// Refuses descriptors of other kinds, which could be readable for ever, or wait for ever.
fn expect_uffd(fd: i32) -> Result<(), Failure> {
    match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(kind) if kind.as_os_str() != "anon_inode:[userfaultfd]" => {
            Err(Failure::new(format!("the handshake has a descriptor of {kind:?}, and not of userfaultfd")))
        }
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Failure::new(format!("cannot see what the descriptor of the handshake is: {error}")))
        }
    }
}

/// The pages that machines asked for.
struct Recording {
    path: PathBuf,
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    seen: HashSet<u64>,
    order: Vec<Extent>,
}

impl Recording {
    fn new(path: PathBuf) -> Self {
        Self { path, pages: Mutex::default() }
    }

    /// Adds what the machines before did not ask for, and writes all.
    fn add(&self, size: u64, asked: &[Extent]) -> Result<(), Failure> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let Pages { seen, order } = &mut *pages;
        // These are within the image, whose size is bounded.
        let each = asked
            .iter()
            .flat_map(|extent| (0..extent.len / PAGE_SIZE).map(|page| extent.offset + page * PAGE_SIZE));
        for offset in each.filter(|offset| seen.insert(*offset)) {
            match order.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += PAGE_SIZE,
                _ => order.push(Extent { offset, len: PAGE_SIZE }),
            }
        }
        Ok(WorkingSet::new(size, order.iter().copied()).write(&self.path)?)
    }
}

fn end_of(region: &UffdRegion) -> u64 {
    region.offset.saturating_add(region.size)
}
