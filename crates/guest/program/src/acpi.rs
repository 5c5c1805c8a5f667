//! ACPI tables, as far as these programs need them: a list of tables, processors, and the way to power off.

use crate::phys;
use crate::pvh::StartInfo;

/// A system description table.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Guest-physical address.
    pub at: u64,
    /// Four letters.
    pub signature: [u8; 4],
    /// Length in bytes, at most 1 MiB.
    pub len: u32,
}

impl Table {
    /// The table at `at`; nothing where its length is nonsense.
    pub fn new(at: u64) -> Option<Self> {
        let len = phys::read::<u32>(at + 4)?;
        ((36..=1 << 20).contains(&len)).then_some(Self { at, signature: phys::read(at)?, len })
    }

    /// The signature as text.
    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.signature).unwrap_or("????")
    }

    /// Whether all bytes sum up to 0.
    pub fn checksum_is_right(&self) -> bool {
        sum(self.at, self.len) == 0
    }

    /// A byte of the table, or 0 beyond its end.
    pub fn byte(&self, offset: u32) -> u8 {
        if offset < self.len { phys::read(self.at + u64::from(offset)).unwrap_or(0) } else { 0 }
    }

    /// A 32-bit field, or 0 beyond the table's end.
    pub fn u32(&self, offset: u32) -> u32 {
        if offset + 4 <= self.len { phys::read(self.at + u64::from(offset)).unwrap_or(0) } else { 0 }
    }

    /// A 64-bit field, or 0 beyond the table's end.
    pub fn u64(&self, offset: u32) -> u64 {
        if offset + 8 <= self.len { phys::read(self.at + u64::from(offset)).unwrap_or(0) } else { 0 }
    }
}

fn sum(at: u64, len: u32) -> u8 {
    (0..u64::from(len)).fold(0, |sum: u8, i| sum.wrapping_add(phys::read(at + i).unwrap_or(0)))
}

/// The tables of this machine.
#[derive(Debug, Clone, Copy)]
pub struct Acpi {
    /// Address of the RSDP.
    pub rsdp: u64,
    root: Table,
    entry: u32,
}

impl Acpi {
    /// Finds the RSDP by the start info, or in the BIOS area, and the XSDT or RSDT under it.
    pub fn find(info: Option<StartInfo>) -> Option<Self> {
        let is_rsdp = |at: &u64| phys::read(*at) == Some(*b"RSD ") && phys::read(*at + 4) == Some(*b"PTR ");
        let given = info.map(StartInfo::rsdp).filter(is_rsdp);
        let rsdp = given.or_else(|| (0xE_0000..0x10_0000).step_by(16).find(is_rsdp))?;
        let (root, entry) = if phys::read::<u8>(rsdp + 15)? >= 2 && phys::read::<u64>(rsdp + 24)? != 0 {
            (phys::read(rsdp + 24)?, 8)
        } else {
            (u64::from(phys::read::<u32>(rsdp + 16)?), 4)
        };
        Some(Self { rsdp, root: Table::new(root)?, entry })
    }

    /// Whether the checksums of the RSDP are right.
    pub fn rsdp_is_right(&self) -> bool {
        let old = sum(self.rsdp, 20) == 0;
        old && (self.entry == 4 || sum(self.rsdp, 36) == 0)
    }

    /// XSDT or RSDT.
    pub fn root(&self) -> Table {
        self.root
    }

    /// The tables that the root lists.
    pub fn listed(&self) -> impl Iterator<Item = Table> {
        let (root, entry) = (self.root, self.entry);
        (36..root.len).step_by(entry as usize).filter_map(move |offset| {
            Table::new(if entry == 8 { root.u64(offset) } else { u64::from(root.u32(offset)) })
        })
    }

    /// The first table with this signature.
    pub fn table(&self, signature: &[u8; 4]) -> Option<Table> {
        self.listed().find(|table| table.signature == *signature)
    }

    /// The DSDT, by the FADT.
    pub fn dsdt(&self) -> Option<Table> {
        let fadt = self.table(b"FACP")?;
        let wide = fadt.u64(140);
        Table::new(if wide != 0 { wide } else { u64::from(fadt.u32(40)) })
    }

    /// Local APIC ids of the processors that may be used, from the MADT (ACPI 6.5, 5.2.12).
    pub fn processors(&self) -> impl Iterator<Item = u32> {
        let madt = self.table(b"APIC");
        let mut at = 44;
        core::iter::from_fn(move || {
            let madt = madt?;
            while at + 2 <= madt.len {
                let (entry, kind) = (at, madt.byte(at));
                at += u32::from(madt.byte(at + 1)).max(2);
                let (id, flags) = match kind {
                    0 => (u32::from(madt.byte(entry + 3)), madt.u32(entry + 4)),
                    9 => (madt.u32(entry + 4), madt.u32(entry + 8)),
                    _ => continue,
                };
                if flags & 1 != 0 {
                    return Some(id);
                }
            }
            None
        })
    }

    /// The sleep type for S5: the first element of the package `_S5_` of the DSDT.
    pub fn s5_sleep_type(&self) -> Option<u8> {
        let dsdt = self.dsdt()?;
        // NameOp, "_S5_", PackageOp, PkgLength, NumElements, then the first element.
        let name = (36..dsdt.len.saturating_sub(8))
            .find(|&at| dsdt.u32(at) == u32::from_le_bytes(*b"_S5_") && dsdt.byte(at + 4) == 0x12)?;
        let length = name + 5;
        let element = length + 1 + u32::from(dsdt.byte(length) >> 6) + 1;
        match dsdt.byte(element) {
            value @ (0 | 1) => Some(value),
            0x0A => Some(dsdt.byte(element + 1)),
            _ => None,
        }
    }
}
