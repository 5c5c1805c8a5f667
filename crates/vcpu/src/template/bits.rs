//! [`Bits`]: which bits of a register are set, cleared and kept; and numbers as templates write them.

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

use super::refused;
use crate::Result;

/// Bits that are set or cleared in a value; the others are kept.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Bits<T> {
    /// Bits that are changed.
    pub mask: T,
    /// What they become; 0 where `mask` is.
    pub value: T,
}

impl<T: Copy + BitAnd<Output = T> + BitOr<Output = T> + Not<Output = T>> Bits<T> {
    /// The changed value.
    pub fn apply(self, value: T) -> T {
        value & !self.mask | self.value & self.mask
    }
}

macro_rules! parse {
    ($type:ty) => {
        impl Bits<$type> {
            /// Reads `0b` and then a digit for each bit, the highest first: `0` clears, `1` sets, `x` keeps it. Bits that are not
            /// written are kept. Underscores mean nothing.
            ///
            /// # Errors
            /// [`Error::Template`](crate::Error::Template) for anything else.
            pub fn parse(text: &str) -> Result<Self> {
                let digits = text.strip_prefix("0b").unwrap_or_default().chars().filter(|c| *c != '_');
                let (mut bits, mut count) = (Self::default(), 0);
                for digit in digits {
                    let (mask, value) = match digit {
                        '0' => (1, 0),
                        '1' => (1, 1),
                        'x' => (0, 0),
                        _ => return Err(refused("bitmap", text, "digits are 0, 1 and x")),
                    };
                    count += 1;
                    if count > <$type>::BITS {
                        return Err(refused("bitmap", text, "it has more digits than the register has bits"));
                    }
                    bits = Self { mask: bits.mask << 1 | mask, value: bits.value << 1 | value };
                }
                if count == 0 {
                    return Err(refused("bitmap", text, "it is `0b` and digits"));
                }
                Ok(bits)
            }
        }

        impl fmt::Debug for Bits<$type> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("0b")?;
                (0..<$type>::BITS).rev().try_for_each(|bit| {
                    let digit = match (self.mask >> bit & 1, self.value >> bit & 1) {
                        (0, _) => "x",
                        (_, 0) => "0",
                        _ => "1",
                    };
                    f.write_str(digit)
                })
            }
        }
    };
}

parse!(u32);
parse!(u64);

/// Reads `0x..`, `0b..` or decimal digits.
pub(super) fn number(what: &'static str, text: &str) -> Result<u32> {
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => (digits, 16),
        (_, Some(digits)) => (digits, 2),
        _ => (text, 10),
    };
    // A sign would be taken, too.
    let plain = digits.bytes().all(|c| c.is_ascii_hexdigit());
    let number = u32::from_str_radix(digits, radix).ok().filter(|_| plain);
    number.ok_or_else(|| refused(what, text, "it is no number of 32 bits: 0x.., 0b.. or decimal"))
}
