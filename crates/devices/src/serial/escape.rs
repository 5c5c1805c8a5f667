//! Keys that the person at the console keeps for the VMM: Ctrl-A and one more.

/// What the keys do, for people, with line ends for a terminal in raw mode.
pub const ESCAPE_HELP: &str =
    "\r\nCtrl-A x  quit\r\nCtrl-A a  send Ctrl-A (also Ctrl-A Ctrl-A)\r\nCtrl-A h  this help\r\n";

const CTRL_A: u8 = 0x01;

/// What the person asked of the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EscapeAction {
    /// Ctrl-A x: end the virtual machine.
    Quit,
    /// Ctrl-A h or Ctrl-A ?: show [`ESCAPE_HELP`].
    Help,
}

/// What became of a byte of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escaped {
    /// The guest gets this byte.
    Byte(u8),
    /// The guest gets nothing: the byte begins a sequence or ends one that means nothing.
    Swallowed,
    /// The guest gets nothing and the VMM is to act.
    Action(EscapeAction),
}

/// Finds escape sequences in input, one byte at a time; a sequence may be spread over any number of reads.
///
/// ```
/// use freestone_devices::{EscapeAction, EscapeFilter, Escaped};
///
/// let mut filter = EscapeFilter::new();
/// assert_eq!(filter.feed(b'x'), Escaped::Byte(b'x'));
/// assert_eq!(filter.feed(0x01), Escaped::Swallowed);
/// assert_eq!(filter.feed(b'x'), Escaped::Action(EscapeAction::Quit));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EscapeFilter {
    after_escape: bool,
}

impl EscapeFilter {
    /// A filter at the start of input.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next byte.
    pub fn feed(&mut self, byte: u8) -> Escaped {
        if !std::mem::take(&mut self.after_escape) {
            if byte == CTRL_A {
                self.after_escape = true;
                return Escaped::Swallowed;
            }
            return Escaped::Byte(byte);
        }
        match byte {
            CTRL_A | b'a' => Escaped::Byte(CTRL_A),
            b'x' => Escaped::Action(EscapeAction::Quit),
            b'h' | b'?' => Escaped::Action(EscapeAction::Help),
            _ => Escaped::Swallowed,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(input: &[u8]) -> (Vec<u8>, Vec<EscapeAction>) {
        let mut filter = EscapeFilter::new();
        let (mut bytes, mut actions) = (Vec::new(), Vec::new());
        for byte in input {
            match filter.feed(*byte) {
                Escaped::Byte(b) => bytes.push(b),
                Escaped::Swallowed => {}
                Escaped::Action(a) => actions.push(a),
            }
        }
        (bytes, actions)
    }

    #[test]
    fn ordinary_input_passes() {
        assert_eq!(run(b"exit\r"), (b"exit\r".to_vec(), vec![]));
    }

    #[test]
    fn ctrl_a_x_quits() {
        assert_eq!(run(b"ab\x01xcd"), (b"abcd".to_vec(), vec![EscapeAction::Quit]));
    }

    #[test]
    fn ctrl_a_h_and_question_mark_ask_for_help() {
        assert_eq!(run(b"\x01h\x01?"), (vec![], vec![EscapeAction::Help, EscapeAction::Help]));
    }

    #[test]
    fn ctrl_a_twice_or_with_a_sends_one_ctrl_a() {
        assert_eq!(run(b"\x01\x01x\x01ax"), (b"\x01x\x01x".to_vec(), vec![]));
    }

    #[test]
    fn an_unknown_sequence_is_swallowed_whole() {
        assert_eq!(run(b"a\x01zb"), (b"ab".to_vec(), vec![]));
    }

    proptest! {
        #[test]
        fn doubling_each_ctrl_a_gives_the_input_back(input: Vec<u8>) {
            let mut doubled = Vec::new();
            for byte in &input {
                doubled.push(*byte);
                if *byte == CTRL_A {
                    doubled.push(CTRL_A);
                }
            }
            prop_assert_eq!(run(&doubled), (input, vec![]));
        }
    }
}
