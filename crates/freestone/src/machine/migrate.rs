//! Live migration of a machine of the reference VMM: the side that it leaves, which runs on a thread of its own beside the machine's, and
//! the side at which it arrives.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::Hypervisor;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::{DirtyPages, GuestMem};
use freestone_vmm::migrate::{self, MigrateOptions, MigrateReport, Source};
use freestone_vmm::snapshot::State as Sections;
use freestone_vmm::{Error, Machine, State};
use serde::{Deserialize, Serialize};

use super::command::Commander;
use super::config::{Config, ConfigSection};
use super::restore::Remap;
use super::snapshot::PROGRAM;
use super::vm::{Origin, Vm};
use crate::cli::Run;
use crate::console::Console;
use crate::failure::Failure;

/// How long the machine's thread may take for one step.
const STEP: Duration = Duration::from_secs(60);
/// How long a machine whose migration failed tries to have its disks back: the other side may still be ending.
const TAKE_BACK: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Where a machine goes, or arrives: `unix:PATH` or `tcp:ADDR:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Place {
    /// A Unix socket.
    Unix(PathBuf),
    /// Address or name, and port.
    Tcp(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", addr))
                if addr.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) =>
            {
                Ok(Self::Tcp(addr.to_owned()))
            }
            _ => Err("say unix:PATH or tcp:ADDR:PORT".to_owned()),
        }
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
        }
    }
}

impl Place {
    /// The same where relative paths begin at `folder`.
    pub(crate) fn absolute(self, folder: &Path) -> Self {
        match self {
            Self::Unix(path) => Self::Unix(folder.join(path)),
            tcp @ Self::Tcp(_) => tcp,
        }
    }

    /// Connects; what is sent and received later may take `limit` each time.
    fn connect(&self, limit: Duration) -> io::Result<Link> {
        let link = match self {
            Self::Unix(path) => Link::Unix(UnixStream::connect(path)?),
            Self::Tcp(addr) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                let mut found = None;
                for addr in addr.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&addr, limit) {
                        Ok(stream) => {
                            found = Some(stream);
                            break;
                        }
                        Err(error) => last = error,
                    }
                }
                Link::Tcp(found.ok_or(last)?)
            }
        };
        link.limited(limit)
    }

    /// Listens. A Unix socket has mode 0600; one that nobody listens at any more is replaced.
    pub(crate) fn listen(&self) -> Result<Listener, Failure> {
        let failed = |e| Failure::new(format!("cannot listen at {self}: {e}"));
        match self {
            Self::Unix(path) => {
                let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
                if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
                    && UnixStream::connect(path).is_err_and(refused)
                {
                    fs::remove_file(path).map_err(failed)?;
                }
                let listener = UnixListener::bind(path).map_err(failed)?;
                let listener = Listener::Unix(listener, path.clone());
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
                Ok(listener)
            }
            Self::Tcp(addr) => Ok(Listener::Tcp(TcpListener::bind(addr).map_err(failed)?)),
        }
    }
}

/// Where machines are waited for. A Unix socket goes with it.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    /// Waits for one machine.
    pub(crate) fn accept(self, limit: Duration) -> Result<Link, Failure> {
        let link = match &self {
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Link::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Link::Tcp(stream)),
        };
        let link = link.and_then(|link| link.limited(limit));
        link.map_err(|e| Failure::new(format!("cannot accept a migration: {e}")))
    }

    /// The address, with the port that was chosen if none was given.
    pub(crate) fn place(&self) -> Option<Place> {
        match self {
            Self::Unix(_, path) => Some(Place::Unix(path.clone())),
            Self::Tcp(listener) => Some(Place::Tcp(listener.local_addr().ok()?.to_string())),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self
            && let Err(error) = fs::remove_file(&*path)
        {
            tracing::debug!(%error, ?path, "the socket was gone already");
        }
    }
}

/// A connection between source and target.
#[derive(Debug)]
pub(crate) enum Link {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Link {
    fn limited(self, limit: Duration) -> io::Result<Self> {
        match &self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limit))?;
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limit))?;
                stream.set_nodelay(true)?;
            }
        }
        Ok(self)
    }
}

/// A time limit that passed, as what it is.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "the other side is silent"),
        _ => error,
    }
}

impl Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
        .map_err(timed_out)
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
        .map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A migration that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateRequest {
    /// Where to.
    pub(crate) dest: Place,
    /// How long the guest may stand still.
    pub(crate) max_downtime_ms: u64,
    /// How often what was written meanwhile is copied.
    pub(crate) max_rounds: u32,
    /// Stop a guest that writes too quickly all the same.
    pub(crate) force: bool,
    /// Seconds that the other side may be silent.
    pub(crate) timeout: u64,
}

impl Commander {
    /// Sends the machine away. When this succeeds it runs elsewhere, and is to be stopped here; otherwise it runs on here. Blocks: not
    /// for the machine's own thread.
    pub(crate) fn migrate(
        &self,
        request: &MigrateRequest,
        doing: &Mutex<Option<&'static str>>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<MigrateReport, Failure> {
        let dest = &request.dest;
        let limit = Duration::from_secs(request.timeout.max(1));
        let mut link =
            dest.connect(limit).map_err(|e| Failure::new(format!("cannot connect to {dest}: {e}")))?;
        let (hello, memory) = self.ask(STEP, Vm::leave)??;
        let mut options = MigrateOptions::new(PROGRAM);
        options.max_downtime = Duration::from_millis(request.max_downtime_ms);
        options.max_rounds = request.max_rounds;
        options.force = request.force;
        let mut source = Remote { commander: self, memory, doing };
        let sent = migrate::send(&mut link, &mut source, hello, &options, progress);
        *doing.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let to = sent.is_ok().then(|| dest.to_string());
        self.ask(STEP, move |vm| {
            vm.gone_to = to;
            // A machine that is there no more stays as it is until it is stopped.
            vm.leaving = vm.gone_to.is_some();
        })?;
        Ok(sent?)
    }
}

impl Vm {
    /// Begins to leave: what the target is to know before all else, and the memory.
    fn leave(&mut self) -> Result<(Sections, GuestMem), Failure> {
        if self.leaving {
            return Err(Failure::new("the machine is on its way to another process already"));
        }
        if self.machine.state() != State::Running {
            return Err(Failure::new("the machine does not run: resume it before it migrates"));
        }
        let mut hello = self.own_sections()?;
        hello.put(&self.machine.describe())?;
        hello.put_instance("0", &self.machine.describe_cpu()?)?;
        self.leaving = true;
        Ok((hello, self.machine.memory().clone()))
    }

    fn pause_to_leave(&mut self) -> Result<Sections, Failure> {
        self.pause()?;
        let state = self.machine.paused()?.save()?;
        self.disown()?;
        Ok(state)
    }

    fn come_back(&mut self) -> Result<(), Failure> {
        self.leaving = false;
        self.go()
    }
}

/// A machine that leaves, from its migration's thread. Its devices work meanwhile.
struct Remote<'a> {
    commander: &'a Commander,
    memory: GuestMem,
    doing: &'a Mutex<Option<&'static str>>,
}

impl Remote<'_> {
    fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Vm) -> Result<R, Failure> + Send + 'static,
    ) -> Result<R, Error> {
        self.commander.ask(STEP, job).and_then(|answer| answer).map_err(told)
    }
}

/// A failure of this program as an error of the library.
fn told(failure: Failure) -> Error {
    Error::Migration { reason: failure.to_string() }
}

impl Source for Remote<'_> {
    fn memory(&self) -> GuestMem {
        self.memory.clone()
    }

    fn track(&mut self) -> Result<bool, Error> {
        self.ask(|vm| Ok(Source::track(&mut vm.machine)?))
    }

    fn collect(&mut self) -> Result<Vec<DirtyPages>, Error> {
        self.ask(|vm| Ok(Source::collect(&mut vm.machine)?))
    }

    fn pause_and_save(&mut self) -> Result<Sections, Error> {
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = Some("migrate");
        let saved = self.ask(Vm::pause_to_leave);
        if saved.is_ok() {
            // Devices may have plugged in more since.
            self.memory = self.ask(|vm| Ok(vm.machine.memory().clone()))?;
        }
        saved
    }

    fn resume(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            match self.ask(Vm::come_back) {
                Err(error) if began.elapsed() < TAKE_BACK => {
                    tracing::debug!(%error, "the machine cannot go on yet");
                    std::thread::sleep(PAUSE);
                }
                done => return done,
            }
        }
    }
}

/// What of a machine that arrives is to be another than it was, and what is taken.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    /// Other resources of the host.
    pub(crate) remap: Remap,
    /// The most guest memory, in bytes.
    pub(crate) max_memory: u64,
    /// Whether writes are logged, so that it can migrate on.
    pub(crate) track: bool,
    /// Whether exits are counted.
    pub(crate) count_exits: bool,
}

/// Takes a machine that arrives. It runs when this returns, and its devices wait to be driven.
pub(crate) fn receive(
    kvm: &Kvm,
    link: Link,
    arrival: &Arrival,
    console: &Console,
) -> Result<(Vm, Run), Failure> {
    let mut arriving = migrate::receive(link, arrival.max_memory)?;
    let looked = look(kvm, &mut arriving, arrival);
    let (config, run) = match looked {
        Ok(found) => found,
        Err(failure) => {
            let text = failure.to_string();
            arriving.refuse(&told(failure));
            return Err(Failure::new(text));
        }
    };
    let vm = arriving.accept::<Kvm, Vm>(run.track_dirty, |memory, sections| {
        let origin = Origin::Restore { sections, memory, clock: ClockPolicy::Continue };
        Vm::create(kvm, config, &run, console, origin).map_err(told)
    })?;
    Ok((vm, run))
}

/// Looks at what arrives before anything of it is copied.
fn look(
    kvm: &Kvm,
    arriving: &mut migrate::Arriving<Link>,
    arrival: &Arrival,
) -> Result<(Config, Run), Failure> {
    let mut config = Config::try_from(arriving.hello().take::<ConfigSection>()?)?;
    let mut run = arrival.remap.apply(&mut config)?;
    arriving.check_cpu(&kvm.host_cpu()?)?;
    let files = run.disks.iter().map(|disk| &disk.path).chain(run.pmems.iter().map(|pmem| &pmem.path));
    for path in files {
        fs::metadata(path).map_err(|e| Failure::new(format!("cannot open {}: {e}", path.display())))?;
    }
    run.cpus = arriving.machine().cpus();
    run.track_dirty |= arrival.track;
    run.count_exits = arrival.count_exits;
    Ok((config, run))
}

impl AsMut<Machine<Kvm>> for Vm {
    fn as_mut(&mut self) -> &mut Machine<Kvm> {
        &mut self.machine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        for text in ["unix:/run/a:b", "tcp:127.0.0.1:7000", "tcp:[::1]:7000", "tcp:host:1"] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "tcp:host", "tcp:1.2.3.4:99999", "/a/path", "udp:1.2.3.4:5"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
