//! The guest's console on this process' standard input and output: its first serial port, or a virtio console.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use freestone_vmm::MachineHandle;
use freestone_vmm::bus::{Progress, Source, Work};
use freestone_vmm::devices::{ESCAPE_HELP, EscapeAction, EscapeFilter, Escaped, SerialInput, SerialPlug};
use freestone_vmm::virtio::console::{self, ConsoleHandle, Port, PortInput, Size};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::SIGWINCH;

use crate::failure::Failure;
use crate::specs::SerialSpec;
use crate::terminal::{self, RawTerminal};

/// The console on its way into a machine.
///
/// It is plugged in before there is a machine to stop, so the handle is filled in later.
pub(crate) struct Console {
    machine: Arc<OnceLock<MachineHandle>>,
    /// Where it leads, if not to standard input and output.
    end: Option<UnixStream>,
}

impl Console {
    /// A console that nothing is connected to yet. Escape keys (Ctrl-A x) work only on a terminal: piped input is all the
    /// guest's.
    pub(crate) fn new() -> Self {
        Self { machine: Arc::default(), end: None }
    }

    /// A console at one end of a pair of sockets, which does not block.
    pub(crate) fn on(end: UnixStream) -> Self {
        Self { machine: Arc::default(), end: Some(end) }
    }

    /// The first serial port; its output goes to `file`, if one is said.
    pub(crate) fn serial(&self, file: Option<&SerialSpec>) -> Result<SerialPlug, Failure> {
        let file = file.map(SerialSpec::open).transpose()?;
        if let Some(end) = &self.end {
            let input = SerialInput::new(end.try_clone()?);
            return Ok(match file {
                Some(file) => SerialPlug::com1(file, Some(input)),
                None => SerialPlug::com1(end.try_clone()?, Some(input)),
            });
        }
        let mut input = SerialInput::stdin()?;
        if terminal::is_terminal() {
            input = input.escapes(self.keys());
        }
        Ok(match file {
            Some(file) => SerialPlug::com1(file, Some(input)),
            None => SerialPlug::com1(io::stdout(), Some(input)),
        })
    }

    /// A virtio console of the size of the terminal.
    pub(crate) fn virtio(&self) -> Result<console::Console, Failure> {
        if let Some(end) = &self.end {
            let port = Port::console().input(Line(Arc::new(end.try_clone()?))).output(end.try_clone()?);
            return Ok(console::Console::new(vec![port])?);
        }
        let filter = terminal::is_terminal().then(EscapeFilter::new);
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        let input = Keyboard { stdin: Arc::new(stdin), filter, act: Box::new(self.keys()) };
        let console = console::Console::new(vec![Port::console().input(input).output(Screen)])?;
        if let Some(size) = terminal_size() {
            console.handle().resize(size)?;
        }
        Ok(console)
    }

    /// What the escape keys do.
    fn keys(&self) -> impl FnMut(EscapeAction) + Send + 'static {
        let machine = Arc::clone(&self.machine);
        move |action| match action {
            EscapeAction::Quit => {
                if let Some(machine) = machine.get() {
                    machine.stop();
                }
            }
            // The help goes where the person looks; the guest's output is not touched.
            _ => drop(io::stderr().write_all(ESCAPE_HELP.as_bytes())),
        }
    }

    /// Connects the keys to `machine` and takes the terminal until the guard is dropped.
    pub(crate) fn attach(&self, machine: MachineHandle) -> Result<Option<RawTerminal>, Failure> {
        let _ = self.machine.set(machine);
        if self.end.is_some() {
            return Ok(None);
        }
        RawTerminal::enter().map_err(|e| Failure::new(format!("cannot put the terminal into raw mode: {e}")))
    }
}

/// A socket as input of a virtio console.
struct Line(Arc<UnixStream>);

impl PortInput for Line {
    fn source(&self) -> Option<Source> {
        Some(Arc::clone(&self.0) as Source)
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(data)
    }
}

/// Standard input for a virtio console, with the escape keys taken out.
struct Keyboard {
    stdin: Arc<OwnedFd>,
    filter: Option<EscapeFilter>,
    act: Box<dyn FnMut(EscapeAction) + Send>,
}

impl PortInput for Keyboard {
    fn source(&self) -> Option<Source> {
        Some(Arc::clone(&self.stdin) as Source)
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        // Standard input may block, and is shared with whoever started us: its mode is left alone.
        let mut fds = [PollFd::new(&*self.stdin, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => return Err(io::ErrorKind::WouldBlock.into()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let read = rustix::io::read(&*self.stdin, &mut *data)?;
        let Some(filter) = &mut self.filter else { return Ok(read) };
        let mut kept = 0;
        for at in 0..read {
            let Some(&byte) = data.get(at) else { break };
            match filter.feed(byte) {
                Escaped::Byte(byte) => {
                    if let Some(place) = data.get_mut(kept) {
                        *place = byte;
                        kept += 1;
                    }
                }
                Escaped::Action(action) => (self.act)(action),
                _ => {}
            }
        }
        // 0 would mean the end of input.
        if read > 0 && kept == 0 { Err(io::ErrorKind::Interrupted.into()) } else { Ok(kept) }
    }
}

/// Standard output for a virtio console. It is written only when it has room: the event loop must not wait for whoever reads.
struct Screen;

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        /// Bytes that a terminal or a pipe takes at once when it says that it has room.
        const ROOM: usize = 256;
        let stdout = rustix::stdio::stdout();
        let mut fds = [PollFd::new(&stdout, PollFlags::OUT)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => return Err(io::ErrorKind::WouldBlock.into()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(rustix::io::write(stdout, data.get(..ROOM).unwrap_or(data))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn terminal_size() -> Option<Size> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(Size { cols: size.ws_col, rows: size.ws_row })
}

/// Tells the guest when the terminal's size changes.
pub(crate) struct FollowSize {
    pipe: Arc<UnixStream>,
    console: ConsoleHandle,
}

impl FollowSize {
    /// Watches from now on.
    pub(crate) fn install(console: ConsoleHandle) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGWINCH, write)?;
        Ok(Self { pipe: Arc::new(read), console })
    }
}

impl Work for FollowSize {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.pipe) as Source]
    }

    fn process(&mut self) -> Progress {
        let mut signals = [0; 64];
        if matches!((&*self.pipe).read(&mut signals), Ok(n) if n > 0)
            && let Some(size) = terminal_size()
            && let Err(error) = self.console.resize(size)
        {
            tracing::warn!(%error, "the guest does not learn the terminal's size");
        }
        Progress::Idle
    }
}
