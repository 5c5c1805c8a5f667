//! The console: COM1, a line at a time.
//!
//! Text is gathered until the line ends and goes out by one `rep outsb`, so that a line costs one exit.

use core::cell::UnsafeCell;
use core::fmt;

use crate::port;

/// First port of COM1.
pub const COM1: u16 = 0x3F8;
/// Line status register.
pub const LSR: u16 = COM1 + 5;
/// Scratch register.
pub const SCR: u16 = COM1 + 7;

const LINE: usize = 256;

struct Line {
    bytes: [u8; LINE],
    len: usize,
}

struct Console(UnsafeCell<Line>);

// SAFETY: one processor runs compiled code, and interrupt handlers do not print through this.
unsafe impl Sync for Console {}

static CONSOLE: Console = Console(UnsafeCell::new(Line { bytes: [0; LINE], len: 0 }));

impl Line {
    fn push(&mut self, byte: u8) {
        if self.len == LINE {
            self.flush();
        }
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    fn flush(&mut self) {
        port::out_string(COM1, self.bytes.get(..self.len).unwrap_or_default());
        self.len = 0;
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.push(b'\r');
                self.push(b'\n');
                self.flush();
            } else {
                self.push(byte);
            }
        }
        Ok(())
    }
}

/// Writes formatted text; it is seen when a line ends or [`flush`] is called.
pub fn write(text: fmt::Arguments<'_>) {
    // SAFETY: nothing else holds a reference: `Line` calls no formatting of its own, and only a formatter that prints
    // could come back here, of which there is none.
    let line = unsafe { &mut *CONSOLE.0.get() };
    // Writing to the line cannot fail.
    let _ = fmt::Write::write_fmt(line, text);
}

/// Sends what has been gathered of the current line.
pub fn flush() {
    // SAFETY: as in `write`.
    unsafe { &mut *CONSOLE.0.get() }.flush();
}

/// A byte that has been typed, if any.
pub fn read() -> Option<u8> {
    (port::in8(LSR) & 1 != 0).then(|| port::in8(COM1))
}

/// Writes formatted text to the console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::write(format_args!($($arg)*)) };
}

/// Writes formatted text and a line end to the console.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::console::write(format_args!("{}\n", format_args!($($arg)*))) };
}
