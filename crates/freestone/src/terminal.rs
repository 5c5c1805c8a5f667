//! The terminal in raw mode while a guest has it, and back again on every way out.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The mode to go back to; outside the guard so that the panic hook reaches it as well.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode; dropping it restores the mode it had.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw if it is a terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = stdin();
        if !is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // The guest prints bare newlines; its host side still wants carriage returns.
        raw.output_modes = before.output_modes;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        restore_on_panic();
        tcsetattr(stdin, OptionalActions::Drain, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back, once.
fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved
        && let Err(error) = tcsetattr(stdin(), OptionalActions::Flush, &saved)
    {
        tracing::error!(%error, "cannot restore the terminal");
    }
}

/// A panic prints its message to a terminal that people can read.
fn restore_on_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
}

/// Whether a person sits at standard input.
pub(crate) fn is_terminal() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| isatty(stdin()))
}

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}
