//! [`ConfigSpace`]: the registers of a function without a bridge behind it (PCI 3.0, section 6.1 and 6.2, header type 0).
//!
//! This is registers and nothing else. What a write means for the device is for the owner, who is told by [`Changes`].

use std::fmt;

use crate::{Error, Result};

/// Length of the configuration space of a function in bytes.
pub const CONFIG_LEN: usize = 4096;

/// Offsets of registers (PCI 3.0, figure 6-1).
pub mod reg {
    /// Vendor ID, 16 bits.
    pub const VENDOR: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE: u16 = 0x02;
    /// Command, 16 bits; see [`command`](super::command).
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision, 8 bits.
    pub const REVISION: u16 = 0x08;
    /// Class code, 24 bits.
    pub const CLASS: u16 = 0x09;
    /// Cache line size, 8 bits.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Latency timer, 8 bits.
    pub const LATENCY: u16 = 0x0d;
    /// Header type, 8 bits.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// The first base address register; there are six of 32 bits.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID, 16 bits.
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    /// Subsystem ID, 16 bits.
    pub const SUBSYSTEM: u16 = 0x2e;
    /// Offset of the first capability, 8 bits.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, 8 bits: for the guest to remember.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin, 8 bits; 0 for none.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the command register (PCI 3.0, section 6.2.2).
pub mod command {
    /// The function answers accesses to its memory.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory itself.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Parity errors are acted on.
    pub const PARITY: u16 = 1 << 6;
    /// System errors are reported.
    pub const SERR: u16 = 1 << 8;
    /// The function does not assert its interrupt line.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Capability IDs (PCI 3.0, appendix H).
pub mod cap {
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// First byte behind the predefined header.
const FIRST_CAPABILITY: u16 = 0x40;
/// Capabilities lie below this offset; beyond is the extended space of PCI Express.
const CAPABILITIES_END: u16 = 0x100;
/// Registers for base addresses.
const BARS: u8 = 6;
/// A base address register of memory has at least this many bytes behind it: the low bits say what it is.
const MIN_BAR: u64 = 16;
/// Bits of the MSI-X message control that a guest may write: enable and function mask.
const MSIX_WRITABLE: u16 = MSIX_ENABLE | MSIX_MASK;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code, 24 bits: base class, subclass, programming interface (PCI 3.0, appendix D).
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A base address register for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Length in bytes: a power of two from 16 on; at most 2 GiB in a 32-bit register.
    pub len: u64,
    /// Two registers, so that the address has 64 bits.
    pub wide: bool,
    /// Reads have no effect.
    pub prefetchable: bool,
}

impl Bar {
    /// `len` bytes of registers, below 4 GiB.
    pub const fn memory32(len: u64) -> Self {
        Self { len, wide: false, prefetchable: false }
    }

    /// `len` bytes of memory, anywhere.
    pub const fn memory64(len: u64) -> Self {
        Self { len, wide: true, prefetchable: true }
    }

    fn is_possible(&self) -> bool {
        let most = if self.wide { 1 << 63 } else { 1 << 31 };
        self.len.is_power_of_two() && (MIN_BAR..=most).contains(&self.len)
    }

    /// The read-only bits.
    fn type_bits(&self) -> u32 {
        u32::from(self.wide) << 2 | u32::from(self.prefetchable) << 3
    }
}

/// What a write to configuration space changed that concerns the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Changes {
    /// The command register has another value.
    pub command: bool,
    /// A base address register has another value.
    pub bars: bool,
    /// The MSI-X message control has another value.
    pub msix: bool,
}

impl Changes {
    /// Whether the place of the function's memory may have changed.
    pub fn decoding(&self) -> bool {
        self.command || self.bars
    }
}

/// The configuration space of one function: values, and which bits of them a guest may write.
///
/// Sizing needs no state of its own: the low bits of a base address register cannot be written, so that after a write of all
/// ones they tell its length (PCI 3.0, section 6.2.5.1).
#[derive(Clone)]
pub struct ConfigSpace {
    values: Box<[u8; CONFIG_LEN]>,
    writable: Box<[u8; CONFIG_LEN]>,
    bars: [Option<Bar>; BARS as usize],
    /// Where the next capability goes.
    free: u16,
    /// Where the offset of the next capability is to be written.
    link: u16,
    /// Offset of the MSI-X message control.
    msix: Option<u16>,
}

impl ConfigSpace {
    /// A function with this identity, without base address registers, capabilities or an interrupt line.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            values: Box::new([0; CONFIG_LEN]),
            writable: Box::new([0; CONFIG_LEN]),
            bars: [None; BARS as usize],
            free: FIRST_CAPABILITY,
            link: reg::CAPABILITIES,
            msix: None,
        };
        let [class0, class1, class2, _] = identity.class.to_le_bytes();
        space.put(reg::VENDOR, &identity.vendor.to_le_bytes());
        space.put(reg::DEVICE, &identity.device.to_le_bytes());
        space.put(reg::REVISION, &[identity.revision]);
        space.put(reg::CLASS, &[class0, class1, class2]);
        space.put(reg::SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(reg::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command =
            command::MEMORY | command::BUS_MASTER | command::PARITY | command::SERR | command::INTX_DISABLE;
        space.make_writable(reg::COMMAND, &command.to_le_bytes());
        space.make_writable(reg::CACHE_LINE, &[0xff]);
        space.make_writable(reg::LATENCY, &[0xff]);
        space.make_writable(reg::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function base address register `index`, 0 to 5; a wide one takes the next as well. It starts out at `address`.
    ///
    /// # Errors
    /// [`Error::PciConfig`] if there is no such register, it is taken, or the length is impossible;
    /// [`Error::BadRange`] if `address` is not aligned or not within the register's reach.
    pub fn add_bar(&mut self, index: u8, bar: Bar, address: u64) -> Result<()> {
        let last = if bar.wide { index.saturating_add(1) } else { index };
        let free =
            |n: u8| self.bars.get(usize::from(n)).is_some_and(Option::is_none) && !self.is_high_half(n);
        if !bar.is_possible() || !free(index) || !free(last) {
            return Err(Error::PciConfig { what: "base address register", value: index.into() });
        }
        let fits = address.checked_add(bar.len - 1).is_some_and(|end| bar.wide || u32::try_from(end).is_ok());
        if !fits || !address.is_multiple_of(bar.len) {
            return Err(Error::BadRange { base: address, len: bar.len });
        }
        let value = address | u64::from(bar.type_bits());
        let mask = !(bar.len - 1);
        let width = if bar.wide { 8 } else { 4 };
        self.put(bar_register(index), value.to_le_bytes().get(..width).unwrap_or_default());
        self.make_writable(bar_register(index), mask.to_le_bytes().get(..width).unwrap_or_default());
        if let Some(slot) = self.bars.get_mut(usize::from(index)) {
            *slot = Some(bar);
        }
        Ok(())
    }

    /// Adds a capability: `body` is what follows the ID and the link, `writable` the bits of it that a guest may write (bytes
    /// that are missing are read-only). Returns the offset of the capability, not of the body.
    ///
    /// # Errors
    /// [`Error::PciConfig`] if it does not fit any more.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16> {
        let full = Error::PciConfig { what: "capability", value: id.into() };
        let at = self.free;
        let len = u16::try_from(body.len()).ok().and_then(|len| len.checked_add(2));
        let end = len.and_then(|len| at.checked_add(len)).filter(|end| *end <= CAPABILITIES_END);
        let (Some(end), Ok(link)) = (end, u8::try_from(at)) else { return Err(full) };
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.make_writable(at + 2, writable.get(..body.len()).unwrap_or(writable));
        self.put(self.link, &[link]);
        self.put(reg::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        // Capabilities are aligned to 32 bits.
        self.free = end.next_multiple_of(4);
        Ok(at)
    }

    /// Adds the MSI-X capability (PCI 3.0, section 6.8.2): `vectors` of them, 1 to 2048; the table and the pending bits each by
    /// the index of their base address register and an offset there that is a multiple of 8.
    ///
    /// # Errors
    /// [`Error::PciConfig`] if a value is out of range, or there is such a capability already.
    pub fn add_msix(&mut self, vectors: u16, table: (u8, u32), pending: (u8, u32)) -> Result<u16> {
        if !(1..=2048).contains(&vectors) || self.msix.is_some() {
            return Err(Error::PciConfig { what: "number of MSI-X vectors", value: vectors.into() });
        }
        let place = |(bar, offset): (u8, u32)| {
            let good = bar < BARS && offset.is_multiple_of(8);
            good.then_some(offset | u32::from(bar))
                .ok_or(Error::PciConfig { what: "place of MSI-X registers", value: offset.into() })
        };
        let [c0, c1] = (vectors - 1).to_le_bytes();
        let [t0, t1, t2, t3] = place(table)?.to_le_bytes();
        let [p0, p1, p2, p3] = place(pending)?.to_le_bytes();
        let body = [c0, c1, t0, t1, t2, t3, p0, p1, p2, p3];
        let at = self.add_capability(cap::MSIX, &body, &MSIX_WRITABLE.to_le_bytes())?;
        self.msix = Some(at + 2);
        Ok(at)
    }

    /// Reads registers. What is beyond the end reads as 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let from = self.values.get(usize::from(offset)..).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Writes registers as a guest does: read-only bits keep their value. Says what the owner has to look at.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Changes {
        let mut changes = Changes::default();
        let registers = self.values.iter_mut().zip(self.writable.iter()).enumerate();
        for ((at, (value, writable)), new) in registers.skip(usize::from(offset)).zip(data) {
            let new = *value & !writable | new & writable;
            if *value == new {
                continue;
            }
            *value = new;
            let at = u16::try_from(at).unwrap_or(u16::MAX);
            changes.command |= at & !1 == reg::COMMAND;
            changes.bars |= (reg::BAR0..bar_register(BARS)).contains(&at);
            changes.msix |= self.msix.is_some_and(|control| at & !1 == control);
        }
        changes
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.get_u16(reg::COMMAND)
    }

    /// The address in base address register `index`, if the function has it.
    pub fn bar(&self, index: u8) -> Option<u64> {
        let bar = self.bars.get(usize::from(index)).copied().flatten()?;
        let mut value = [0; 8];
        let width = if bar.wide { 8 } else { 4 };
        self.read(bar_register(index), value.get_mut(..width)?);
        Some(u64::from_le_bytes(value) & !(bar.len - 1))
    }

    /// As [`bar`](Self::bar), while the function decodes memory accesses.
    pub fn decoded_bar(&self, index: u8) -> Option<u64> {
        self.bar(index).filter(|_| self.command() & command::MEMORY != 0)
    }

    /// Whether MSI-X is enabled, and whether all its vectors are masked.
    pub fn msix_control(&self) -> (bool, bool) {
        let control = self.msix.map_or(0, |at| self.get_u16(at));
        (control & MSIX_ENABLE != 0, control & MSIX_MASK != 0)
    }

    /// Sets registers whatever a guest may write: for the owner. What is beyond the end is dropped.
    pub fn put(&mut self, offset: u16, data: &[u8]) {
        let registers = self.values.iter_mut().skip(usize::from(offset));
        registers.zip(data).for_each(|(to, from)| *to = *from);
    }

    /// Offset of the first register that a guest cannot make what it is in `values`.
    pub(super) fn read_only_difference(&self, values: &[u8]) -> Option<u16> {
        let registers = self.values.iter().zip(self.writable.iter()).zip(values);
        let at =
            registers.map(|((old, writable), new)| (old ^ new) & !writable).position(|bits| bits != 0)?;
        u16::try_from(at).ok()
    }

    /// Lets a guest write the bits of `mask`.
    pub fn make_writable(&mut self, offset: u16, mask: &[u8]) {
        let registers = self.writable.iter_mut().skip(usize::from(offset));
        registers.zip(mask).for_each(|(to, from)| *to = *from);
    }

    fn get_u16(&self, offset: u16) -> u16 {
        let mut value = [0; 2];
        self.read(offset, &mut value);
        u16::from_le_bytes(value)
    }

    /// Whether register `index` is the high half of a wide one.
    fn is_high_half(&self, index: u8) -> bool {
        let before = index.checked_sub(1).and_then(|n| self.bars.get(usize::from(n)).copied().flatten());
        before.is_some_and(|bar| bar.wide)
    }
}

/// Offset of base address register `index`.
fn bar_register(index: u8) -> u16 {
    reg::BAR0 + 4 * u16::from(index)
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("vendor", &format_args!("{:#06x}", self.get_u16(reg::VENDOR)))
            .field("device", &format_args!("{:#06x}", self.get_u16(reg::DEVICE)))
            .field("command", &format_args!("{:#06x}", self.command()))
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&IDENTITY)
    }

    fn u8_at(space: &ConfigSpace, offset: u16) -> u8 {
        let mut data = [0];
        space.read(offset, &mut data);
        data[0]
    }

    fn u32_at(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_who_it_is() {
        let space = space();
        assert_eq!(u32_at(&space, 0x00), 0x1042_1af4);
        assert_eq!(u32_at(&space, 0x08), 0x0180_0001);
        assert_eq!(u32_at(&space, 0x2c), 0x1100_1af4);
        assert_eq!(u8_at(&space, reg::HEADER_TYPE), 0);
        assert_eq!(u8_at(&space, reg::INTERRUPT_PIN), 0);
        assert_eq!(u32_at(&space, 0x04), 0, "nothing is decoded and there is no capability");
    }

    #[test]
    fn what_is_read_only_keeps_its_value() {
        let mut space = space();
        space.add_bar(0, Bar::memory32(0x1000), 0xd800_0000).unwrap();
        let before: Vec<_> = (0..1024).map(|n| u32_at(&space, n * 4)).collect();
        for offset in (0..4096).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        let changed: Vec<_> =
            (0..1024u16).filter(|n| u32_at(&space, n * 4) != before[usize::from(*n)]).collect();
        assert_eq!(changed, [0x04, 0x0c, 0x10, 0x3c].map(|offset| offset / 4));
        assert_eq!(u32_at(&space, 0x04), 0x0546);
        assert_eq!(u32_at(&space, 0x0c), 0xffff);
        assert_eq!(u32_at(&space, 0x3c), 0xff);
    }

    #[test]
    fn all_ones_tell_the_length_of_a_register() {
        let mut space = space();
        space.add_bar(0, Bar::memory32(0x8000), 0xd800_0000).unwrap();
        space.add_bar(2, Bar::memory64(1 << 33), 1 << 40).unwrap();
        assert_eq!(
            (u32_at(&space, 0x10), u32_at(&space, 0x18), u32_at(&space, 0x1c)),
            (0xd800_0000, 12, 256)
        );
        for n in 0..6 {
            space.write(0x10 + 4 * n, &[0xff; 4]);
        }
        let words: Vec<_> = (0..6).map(|n| u32_at(&space, 0x10 + 4 * n)).collect();
        assert_eq!(words, [0xffff_8000, 0, 12, 0xffff_fffe, 0, 0]);
        assert_eq!(space.bar(0), Some(0xffff_8000));
        assert_eq!(space.bar(2), Some(0xffff_fffe_0000_0000));
        assert_eq!((space.bar(1), space.bar(3), space.bar(6)), (None, None, None));
    }

    #[test]
    fn impossible_registers_are_refused() {
        let mut space = space();
        space.add_bar(1, Bar::memory64(0x1000), 0).unwrap();
        let refused = [
            (1, Bar::memory32(0x1000), 0),
            (2, Bar::memory32(0x1000), 0),
            (0, Bar::memory64(0x1000), 0),
            (5, Bar::memory64(0x1000), 0),
            (6, Bar::memory32(0x1000), 0),
            (255, Bar::memory64(0x1000), 0),
            (3, Bar::memory32(8), 0),
            (3, Bar::memory32(0x1001), 0),
            (3, Bar::memory32(1 << 32), 0),
            (3, Bar::memory32(0x1000), 0x800),
            (3, Bar::memory32(0x1000), 1 << 32),
        ];
        for (index, bar, address) in refused {
            assert!(space.add_bar(index, bar, address).is_err(), "{index} {bar:?} {address:#x}");
        }
    }

    #[test]
    fn only_what_changes_is_reported() {
        let mut space = space();
        space.add_bar(0, Bar::memory32(0x1000), 0).unwrap();
        let at = space.add_msix(3, (0, 0x800), (0, 0xc00)).unwrap();
        let quiet = Changes::default();
        assert_eq!(space.write(reg::COMMAND, &[2, 0]), Changes { command: true, ..quiet });
        assert_eq!(space.write(reg::COMMAND, &[2, 0]), quiet);
        assert_eq!(space.write(reg::BAR0 + 3, &[0xd8]), Changes { bars: true, ..quiet });
        assert_eq!(space.write(reg::BAR0, &[0xff, 0x0f]), quiet);
        assert_eq!(space.write(at + 3, &[0xc0]), Changes { msix: true, ..quiet });
        assert_eq!(space.write(reg::INTERRUPT_LINE, &[5]), quiet);
        assert_eq!(space.write(4095, &[1, 2, 3, 4]), quiet);
        assert_eq!(space.msix_control(), (true, true));
        assert_eq!(space.decoded_bar(0), Some(0xd800_0000));
        space.write(reg::COMMAND, &[0]);
        assert_eq!(space.decoded_bar(0), None);
    }

    #[test]
    fn capabilities_are_a_list_that_ends() {
        let mut space = space();
        let first = space.add_capability(cap::VENDOR, &[1, 2, 3], &[0, 0xff]).unwrap();
        let second = space.add_msix(5, (1, 0x1000), (1, 0x2000)).unwrap();
        assert_eq!(u8_at(&space, reg::STATUS), 0x10);
        assert_eq!(u8_at(&space, reg::CAPABILITIES), 0x40);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(u32_at(&space, first), u32::from_le_bytes([cap::VENDOR, 0x48, 1, 2]));
        assert_eq!(u32_at(&space, second), u32::from_le_bytes([cap::MSIX, 0, 4, 0]));
        assert_eq!((u32_at(&space, second + 4), u32_at(&space, second + 8)), (0x1001, 0x2001));
        space.write(first, &[0xff; 6]);
        assert_eq!(u32_at(&space, first), u32::from_le_bytes([cap::VENDOR, 0x48, 1, 0xff]));
        assert!(space.add_msix(1, (0, 0), (0, 0)).is_err(), "one is enough");
    }

    #[test]
    fn capabilities_that_do_not_fit_are_refused() {
        let mut space = space();
        assert!(space.add_capability(cap::VENDOR, &[0; 191], &[]).is_err());
        space.add_capability(cap::VENDOR, &[0; 190], &[]).unwrap();
        assert!(space.add_capability(cap::VENDOR, &[], &[]).is_err());
        for (vectors, offset, bar) in [(0, 0, 0), (2049, 0, 0), (1, 4, 0), (1, 0, 6)] {
            let table = (bar, offset);
            assert!(ConfigSpace::new(&IDENTITY).add_msix(vectors, table, (0, 0)).is_err());
        }
    }
}
