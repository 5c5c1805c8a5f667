//! A PS/2 keyboard with three keys: it answers what drivers ask of a keyboard, and can press Ctrl, Alt and Delete.
//!
//! It speaks scan code sets 1 and 2. Lights and repetition are accepted and do nothing.

use std::collections::VecDeque;

use crate::Result;
use crate::state::{KeyboardState, check};

/// Bytes that wait to be sent, at most: as in a real one.
const BUFFER: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// What a keyboard of 101 keys or more says when it is asked what it is.
const ID: [u8; 2] = [0xab, 0x83];

const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_CODE_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const SET_DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

/// Ctrl, Alt and Delete go down, and up again in reverse order: in set 1.
const CTRL_ALT_DEL_1: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
/// The same in set 2.
const CTRL_ALT_DEL_2: &[u8] = &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

#[derive(Debug)]
pub(crate) struct Keyboard {
    buffer: VecDeque<u8>,
    /// The command whose argument comes next.
    command: Option<u8>,
    /// Keys are reported.
    scanning: bool,
    set: u8,
}

impl Keyboard {
    pub(crate) fn new() -> Self {
        Self { buffer: VecDeque::with_capacity(BUFFER), command: None, scanning: true, set: 2 }
    }

    /// The next byte for the controller.
    pub(crate) fn send(&mut self) -> Option<u8> {
        self.buffer.pop_front()
    }

    /// Presses the three keys. `translated`: the controller would turn set 2 into set 1. Whether they could be pressed: not if the
    /// driver turned the keyboard off, or does not read what it sends.
    pub(crate) fn ctrl_alt_del(&mut self, translated: bool) -> bool {
        let codes = if translated || self.set == 1 { CTRL_ALT_DEL_1 } else { CTRL_ALT_DEL_2 };
        let can = self.scanning && self.buffer.len() + codes.len() <= BUFFER;
        if can {
            self.buffer.extend(codes);
        }
        can
    }

    /// Takes a byte from the driver.
    pub(crate) fn receive(&mut self, byte: u8) {
        match self.command.take() {
            Some(SCAN_CODE_SET) => self.choose_set(byte),
            Some(_) => self.answer(&[ACK]),
            None => self.begin(byte),
        }
    }

    fn begin(&mut self, command: u8) {
        match command {
            SET_LEDS | SCAN_CODE_SET | SET_RATE => {
                self.command = Some(command);
                self.answer(&[ACK]);
            }
            ECHO => self.answer(&[ECHO]),
            IDENTIFY => self.answer(&[ACK, ID[0], ID[1]]),
            ENABLE => {
                self.scanning = true;
                self.answer(&[ACK]);
            }
            DISABLE => {
                (self.scanning, self.set) = (false, 2);
                self.answer(&[ACK]);
            }
            SET_DEFAULTS => {
                self.set = 2;
                self.answer(&[ACK]);
            }
            RESET => {
                *self = Self::new();
                self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn choose_set(&mut self, set: u8) {
        match set {
            0 => self.answer(&[ACK, self.set]),
            1 | 2 => {
                self.set = set;
                self.answer(&[ACK]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    /// What finds no room is lost: its driver reads nothing.
    fn answer(&mut self, bytes: &[u8]) {
        let room = BUFFER.saturating_sub(self.buffer.len());
        self.buffer.extend(bytes.iter().take(room));
    }

    pub(crate) fn state(&self) -> KeyboardState {
        KeyboardState {
            buffer: self.buffer.iter().copied().collect(),
            command: self.command,
            scanning: self.scanning,
            set: self.set,
        }
    }

    pub(crate) fn from_state(state: &KeyboardState) -> Result<Self> {
        const NAME: &str = "i8042";
        let (waiting, command) = (state.buffer.len(), state.command.unwrap_or(SET_LEDS));
        check(NAME, "length of the keyboard's buffer", waiting <= BUFFER, waiting as u64)?;
        check(NAME, "scan code set", matches!(state.set, 1 | 2), state.set)?;
        let has_argument = matches!(command, SET_LEDS | SCAN_CODE_SET | SET_RATE);
        check(NAME, "command of the keyboard", has_argument, command)?;
        let buffer = state.buffer.iter().copied().collect();
        Ok(Self { buffer, command: state.command, scanning: state.scanning, set: state.set })
    }
}
