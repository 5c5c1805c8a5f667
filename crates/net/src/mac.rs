//! [`MacAddr`].

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xFF; 6]);

    /// A random address that is administered locally (IEEE 802, the second bit of the first byte) and in the range that QEMU and
    /// KVM use: 52:54:00.
    ///
    /// # Errors
    /// If the host gives no random bytes.
    pub fn random() -> Result<Self> {
        let mut bytes = [0x52, 0x54, 0, 0, 0, 0];
        let [.., a, b, c] = &mut bytes;
        let mut random = [0; 3];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("choose an Ethernet address")(e.into()))?;
        [*a, *b, *c] = random;
        Ok(Self(bytes))
    }

    /// Whether this is a group of stations, or all: the lowest bit of the first byte.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether this is everybody.
    pub fn is_broadcast(self) -> bool {
        self == Self::BROADCAST
    }

    /// Whether a station may have this address: not a group, not all zeros.
    pub fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    /// Six bytes in hexadecimal with colons or dashes between: `52:54:00:12:34:56`.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::invalid("Ethernet address", text, "say six bytes, as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_as_it_is_read() {
        let mac: MacAddr = "52:54:00:12:34:aB".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:ab");
        assert_eq!("52-54-00-12-34-ab".parse::<MacAddr>().unwrap(), mac);
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "52:54:00:12:34:+6",
            "zz:54:00:12:34:56",
        ] {
            let error = text.parse::<MacAddr>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_random_address_is_one_of_a_station_and_administered_locally() {
        let mac = MacAddr::random().unwrap();
        assert!(mac.is_station() && mac.0[0] & 2 != 0, "{mac}");
    }
}
