//! The guest's console: its first serial port on this process' standard input and output.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use freestone_vmm::MachineHandle;
use freestone_vmm::devices::{ESCAPE_HELP, EscapeAction, SerialInput, SerialPlug};

use crate::failure::Failure;
use crate::terminal::{self, RawTerminal};

/// The console on its way into a machine.
///
/// The serial port is plugged in before there is a machine to stop, so the handle is filled in later.
pub(crate) struct Console {
    machine: Arc<OnceLock<MachineHandle>>,
}

impl Console {
    /// A console and the plug of its serial port. Escape keys (Ctrl-A x) work only on a terminal: piped input is all the
    /// guest's.
    pub(crate) fn new() -> Result<(Self, SerialPlug), Failure> {
        let machine = Arc::new(OnceLock::<MachineHandle>::new());
        let mut input = SerialInput::stdin()?;
        if terminal::is_terminal() {
            let machine = Arc::clone(&machine);
            input = input.escapes(move |action| match action {
                EscapeAction::Quit => {
                    if let Some(machine) = machine.get() {
                        machine.stop();
                    }
                }
                // The help goes where the person looks; the guest's output is not touched.
                _ => drop(std::io::stderr().write_all(ESCAPE_HELP.as_bytes())),
            });
        }
        Ok((Self { machine }, SerialPlug::com1(std::io::stdout(), Some(input))))
    }

    /// Connects the keys to `machine` and takes the terminal until the guard is dropped.
    pub(crate) fn attach(&self, machine: MachineHandle) -> Result<Option<RawTerminal>, Failure> {
        let _ = self.machine.set(machine);
        RawTerminal::enter().map_err(|e| Failure::new(format!("cannot put the terminal into raw mode: {e}")))
    }
}
