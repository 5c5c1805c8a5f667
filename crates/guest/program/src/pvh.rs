//! What a PVH loader hands over: `hvm_start_info`, the memory map and the command line.

use crate::phys;

/// `XEN_HVM_START_MAGIC_VALUE`.
pub const MAGIC: u32 = 0x336E_C578;

/// A range of the memory map.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Type, as in E820: 1 is RAM.
    pub kind: u32,
}

/// The start info at its guest-physical address.
#[derive(Debug, Clone, Copy)]
pub struct StartInfo(u64);

impl StartInfo {
    /// Takes the address the loader left in EBX; nothing when there is no start info.
    pub fn new(at: u64) -> Option<Self> {
        (phys::read::<u32>(at)? == MAGIC).then_some(Self(at))
    }

    fn field(self, offset: u64) -> u64 {
        phys::read(self.0 + offset).unwrap_or(0)
    }

    /// Version of the structure.
    pub fn version(self) -> u32 {
        phys::read(self.0 + 4).unwrap_or(0)
    }

    /// Address of the ACPI RSDP, or 0.
    pub fn rsdp(self) -> u64 {
        self.field(32)
    }

    /// The memory map; empty before version 1.
    pub fn memory(self) -> impl Iterator<Item = Range> {
        let (at, count) = match self.version() {
            0 => (0, 0),
            _ => (self.field(40), phys::read::<u32>(self.0 + 48).unwrap_or(0)),
        };
        (0..u64::from(count.min(128))).filter_map(move |i| {
            let at = at + 24 * i;
            Some(Range { start: phys::read(at)?, len: phys::read(at + 8)?, kind: phys::read(at + 16)? })
        })
    }

    /// The command line, up to 2 KiB of it; empty when there is none.
    pub fn command_line(self) -> &'static str {
        let at = self.field(24);
        let mut len = 0;
        while len < 2048 && phys::read::<u8>(at + len).is_some_and(|byte| byte != 0) {
            len += 1;
        }
        if len == 0 {
            return "";
        }
        let start = core::ptr::with_exposed_provenance::<u8>(at as usize);
        // SAFETY: the bytes were just read one by one; the loader left them for this program alone.
        let bytes = unsafe { core::slice::from_raw_parts(start, len as usize) };
        core::str::from_utf8(bytes).unwrap_or("")
    }
}
