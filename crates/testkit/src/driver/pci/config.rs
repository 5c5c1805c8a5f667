//! The configuration space of a function, as a driver reads it.

use std::sync::Arc;

use freestone_bus::pci::PciFunction;

use super::{COMMAND, MAX_CAPABILITIES, PciPart, SECTION};
use crate::{Error, Result};

/// The numbers that a function's configuration space has.
pub(super) struct Config(pub(super) Arc<dyn PciFunction>);

impl Config {
    pub(super) fn read(&self, offset: u16, width: usize) -> u32 {
        let mut data = [0; 4];
        if let Some(data) = data.get_mut(..width) {
            self.0.read_config(offset, data);
        }
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&self, offset: u16, width: usize, value: u32) {
        self.0.write_config(offset, value.to_le_bytes().get(..width).unwrap_or_default());
    }

    /// Offsets and IDs of the capabilities.
    pub(super) fn capabilities(&self) -> Result<Vec<(u16, u32)>> {
        let mut found = Vec::new();
        let mut at = self.read(0x34, 1);
        while at != 0 {
            if found.len() == MAX_CAPABILITIES || at < 0x40 || !at.is_multiple_of(4) {
                return Err(Error::protocol("capability list", SECTION, format!("link to {at:#x}")));
            }
            let offset = u16::try_from(at).unwrap_or(0);
            found.push((offset, self.read(offset, 1)));
            at = self.read(offset + 1, 1);
        }
        Ok(found)
    }

    /// Address and length of a 32- or 64-bit memory BAR, by writing all ones to it with decoding off.
    pub(super) fn bar(&self, index: u8) -> Option<(u64, u64)> {
        let register = 0x10 + 4 * u16::from(index);
        let command = self.read(COMMAND, 2);
        self.write(COMMAND, 2, command & !2);
        let low = self.read(register, 4);
        let wide = low & 0b110 == 0b100;
        let high = if wide { self.read(register + 4, 4) } else { 0 };
        self.write(register, 4, u32::MAX);
        let mut mask = u64::from(self.read(register, 4) & !0xf) | 0xffff_ffff << 32;
        self.write(register, 4, low);
        if wide {
            self.write(register + 4, 4, u32::MAX);
            mask = mask & 0xffff_ffff | u64::from(self.read(register + 4, 4)) << 32;
            self.write(register + 4, 4, high);
        }
        self.write(COMMAND, 2, command);
        let len = (!mask).checked_add(1).filter(|_| mask & 0xffff_ffff != 0 || wide)?;
        Some((u64::from(high) << 32 | u64::from(low & !0xf), len))
    }

    /// `struct virtio_pci_cap`: type and place.
    pub(super) fn virtio(&self, at: u16) -> (u32, PciPart) {
        let part = PciPart {
            bar: u8::try_from(self.read(at + 4, 1)).unwrap_or(u8::MAX),
            offset: self.read(at + 8, 4).into(),
            len: self.read(at + 12, 4).into(),
        };
        (self.read(at + 3, 1), part)
    }

    pub(super) fn msix(&self, at: u16) -> (u16, u16, PciPart, PciPart) {
        let vectors = (self.read(at + 2, 2) & 0x7ff) + 1;
        let place = |register: u16, len: u32| {
            let value = self.read(register, 4);
            PciPart {
                bar: u8::try_from(value & 7).unwrap_or(0),
                offset: (value & !7).into(),
                len: len.into(),
            }
        };
        let table = place(at + 4, vectors * 16);
        (at, u16::try_from(vectors).unwrap_or(0), table, place(at + 8, vectors.div_ceil(64) * 8))
    }
}
