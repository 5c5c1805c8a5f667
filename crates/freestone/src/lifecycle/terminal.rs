//! `freestone console`: this terminal as that of a detached machine.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use freestone_vmm::devices::{EscapeAction, EscapeFilter, Escaped};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::args::ConsoleArgs;
use crate::failure::Failure;
use crate::names::Runtime;
use crate::terminal::{self, RawTerminal};

const HELP: &[u8] =
    b"\r\nCtrl-A x  leave the console; the machine runs on\r\nCtrl-A a  send Ctrl-A (also Ctrl-A Ctrl-A)\r\n\
                      Ctrl-A h  this help\r\n";
/// Bytes that are moved in one step.
const CHUNK: usize = 4096;

/// Why the console is left.
enum Left {
    /// The person has left.
    Keys,
    /// The machine has ended.
    Machine,
}

/// Connects standard input and output with a machine's console.
pub(crate) fn console(args: &ConsoleArgs) -> Result<ExitCode, Failure> {
    let entry = Runtime::find().entry(&args.name)?;
    entry.pid()?;
    if entry.note().is_some_and(|note| !note.detached) {
        return Err(Failure::new(format!("{} has its console on a terminal already", entry.name)));
    }
    let path = entry.file("console");
    let socket = UnixStream::connect(&path)
        .map_err(|e| Failure::new(format!("cannot connect to {}: {e}", path.display())))?;
    let person = terminal::is_terminal();
    if person {
        eprintln!("freestone: console of {}; Ctrl-A x leaves it", entry.name);
    }
    let terminal = RawTerminal::enter()
        .map_err(|e| Failure::new(format!("cannot put the terminal into raw mode: {e}")))?;
    let left = relay(&socket, person.then(EscapeFilter::new));
    drop(terminal);
    match left {
        Ok(Left::Machine) if person => eprintln!("\r\nfreestone: {} has ended", entry.name),
        Ok(Left::Keys) => eprintln!("\r\nfreestone: {} runs on", entry.name),
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            return Err(Failure::new(format!("the console of {} is lost: {e}", entry.name)));
        }
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn relay(mut socket: &UnixStream, mut filter: Option<EscapeFilter>) -> io::Result<Left> {
    let (stdin, mut stdout) = (rustix::stdio::stdin(), io::stdout());
    let mut bytes = [0; CHUNK];
    let mut typing = true;
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        let watched = if typing { fds.as_mut_slice() } else { fds.get_mut(..1).unwrap_or_default() };
        match poll(watched, None) {
            Err(Errno::INTR) => continue,
            ready => ready?,
        };
        let [from_guest, typed] = [0, 1].map(|at| fds.get(at).is_some_and(|fd| !fd.revents().is_empty()));
        if from_guest {
            match socket.read(&mut bytes) {
                Ok(0) => return Ok(Left::Machine),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(Left::Machine),
                read => stdout.write_all(bytes.get(..read?).unwrap_or_default())?,
            }
            stdout.flush()?;
        }
        if typed && typing {
            let read = rustix::io::read(stdin, &mut bytes)?;
            typing = read > 0;
            let typed = bytes.get(..read).unwrap_or_default();
            let (input, leave) = match &mut filter {
                Some(filter) => filtered(filter, typed),
                None => (typed.to_vec(), false),
            };
            match socket.write_all(&input) {
                // What it said last is read still.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => typing = false,
                written => written?,
            }
            if leave {
                return Ok(Left::Keys);
            }
        }
    }
}

/// Takes the keys out that are for this program; whether the person leaves.
fn filtered(filter: &mut EscapeFilter, typed: &[u8]) -> (Vec<u8>, bool) {
    let mut input = Vec::with_capacity(typed.len());
    for byte in typed {
        match filter.feed(*byte) {
            Escaped::Byte(byte) => input.push(byte),
            Escaped::Action(EscapeAction::Quit) => return (input, true),
            Escaped::Action(_) => drop(io::stderr().write_all(HELP)),
            _ => {}
        }
    }
    (input, false)
}
