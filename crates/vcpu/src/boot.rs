//! The processor state in which a guest's first instruction runs: 16-bit, 32-bit (PVH, Linux boot protocol) or 64-bit (Linux boot
//! protocol).
//!
//! The boot processor alone is set up. Application processors wait for INIT and SIPI, as on hardware. Loading the kernel and
//! writing what it is told (start info, boot parameters) is the loader's work.

use freestone_hypervisor::CpuState;
use freestone_hypervisor::x86::{DescriptorTable, Regs, Segment, SpecialRegs};
use freestone_memory::layout::{BOOT_GDT, BOOT_IDT, BOOT_PAGE_TABLES, BOOT_PAGE_TABLES_END, BOOT_STACK};
use freestone_memory::{Bytes, GuestAddress, GuestMem, paging};

use crate::{Error, Result};

/// Selector of the flat code segment, `__BOOT_CS` of the Linux boot protocol.
pub const BOOT_CS: u16 = 0x10;
/// Selector of the flat data segments, `__BOOT_DS` of the Linux boot protocol.
pub const BOOT_DS: u16 = 0x18;
/// How much of the guest-physical address space a 64-bit start finds identity-mapped, in bytes.
pub const IDENTITY_MAPPED: u64 = 1 << 32;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set. Interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// How a guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootState {
    /// Real mode at `segment:offset`, with every segment register equal to `segment` and the stack at its top.
    Real16 {
        /// Value of CS and of the data segments.
        segment: u16,
        /// Initial IP.
        offset: u16,
    },
    /// Protected mode with flat 4 GiB segments, paging and interrupts off: the state in which the PVH boot ABI (Xen,
    /// `docs/misc/pvh.pandoc`) and the 32-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`, section "32-bit Boot
    /// Protocol") enter a kernel. The general registers not named here are zero, but for the stack pointer.
    Protected32 {
        /// Guest-physical address of the first instruction, below 4 GiB.
        entry: u64,
        /// EBX: guest-physical address of the PVH start info, below 4 GiB; 0 for the Linux protocol.
        ebx: u64,
        /// ESI: guest-physical address of `struct boot_params`, below 4 GiB; 0 for PVH.
        esi: u64,
    },
    /// Long mode, paging on, the first [`IDENTITY_MAPPED`] bytes mapped to themselves: the 64-bit Linux boot protocol
    /// (`Documentation/arch/x86/boot.rst`, section "64-bit Boot Protocol").
    Long64 {
        /// Address of the first instruction, within the identity map.
        entry: u64,
        /// RSI: guest-physical address of `struct boot_params`.
        rsi: u64,
    },
}

/// Puts the boot processor into `state`, and the tables that go with it (GDT, IDT, page tables) into guest memory at the
/// addresses of [`freestone_memory::layout`].
///
/// # Errors
/// [`Error::Address`] if an address does not fit the mode, [`Error::Memory`] or [`Error::PageTables`] if guest memory is too
/// small for the tables, [`Error::Hypervisor`] if the registers are refused.
pub fn configure_boot(vcpu: &mut dyn CpuState, mem: &GuestMem, state: &BootState) -> Result<()> {
    // What is not part of the boot state, such as the APIC base, stays as the reset left it.
    let mut special = vcpu.special_regs().map_err(Error::hv("read the special registers"))?;
    let regs = match *state {
        BootState::Real16 { segment, offset } => real16(&mut special, segment, offset),
        BootState::Protected32 { entry, ebx, esi } => protected32(&mut special, mem, entry, ebx, esi)?,
        BootState::Long64 { entry, rsi } => long64(&mut special, mem, entry, rsi)?,
    };
    vcpu.set_special_regs(&special).map_err(Error::hv("set the special registers"))?;
    vcpu.set_regs(&regs).map_err(Error::hv("set the general registers"))
}

fn real16(special: &mut SpecialRegs, segment: u16, offset: u16) -> Regs {
    let base = Segment {
        base: u64::from(segment) << 4,
        limit: 0xffff,
        selector: segment,
        present: true,
        s: true,
        ..Segment::default()
    };
    let data = Segment { kind: DATA, ..base };
    set_data(special, data);
    special.cs = Segment { kind: CODE, ..base };
    special.idt = DescriptorTable { base: 0, limit: 0x3ff };
    special.cr0 = CR0_ET;
    special.cr4 = 0;
    special.efer = 0;
    Regs { rip: offset.into(), rflags: RFLAGS_RESERVED, ..Regs::default() }
}

fn protected32(special: &mut SpecialRegs, mem: &GuestMem, entry: u64, ebx: u64, esi: u64) -> Result<Regs> {
    check("entry point", entry, "32-bit", u32::MAX.into())?;
    check("address of the start info", ebx, "32-bit", u32::MAX.into())?;
    check("address of the boot parameters", esi, "32-bit", u32::MAX.into())?;
    flat_segments(special, mem, Segment { db: true, ..FLAT_CODE })?;
    special.cr0 = CR0_PE | CR0_ET;
    special.cr4 = 0;
    special.efer = 0;
    Ok(Regs { rip: entry, rbx: ebx, rsi: esi, rsp: BOOT_STACK, rflags: RFLAGS_RESERVED, ..Regs::default() })
}

fn long64(special: &mut SpecialRegs, mem: &GuestMem, entry: u64, rsi: u64) -> Result<Regs> {
    check("entry point", entry, "64-bit", IDENTITY_MAPPED - 1)?;
    check("address of the boot parameters", rsi, "64-bit", IDENTITY_MAPPED - 1)?;
    flat_segments(special, mem, Segment { l: true, ..FLAT_CODE })?;
    special.cr3 = identity_map(mem)?;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME | EFER_LMA;
    special.cr0 = CR0_PE | CR0_ET | CR0_PG;
    Ok(Regs { rip: entry, rsi, rsp: BOOT_STACK, rbp: BOOT_STACK, rflags: RFLAGS_RESERVED, ..Regs::default() })
}

fn check(what: &'static str, value: u64, mode: &'static str, limit: u64) -> Result<()> {
    if value > limit { Err(Error::Address { what, value, mode, limit }) } else { Ok(()) }
}

/// Segment types (Intel SDM, volume 3, table 3-1), with the accessed bit that a loaded segment always has.
const CODE: u8 = 0b1011;
const DATA: u8 = 0b0011;
/// A busy 32-bit TSS, which is also a busy 64-bit TSS in long mode (table 3-2).
const BUSY_TSS: u8 = 0b1011;

const FLAT_CODE: Segment = Segment {
    base: 0,
    limit: u32::MAX,
    selector: BOOT_CS,
    kind: CODE,
    present: true,
    dpl: 0,
    db: false,
    s: true,
    l: false,
    g: true,
    avl: false,
    unusable: false,
};
const FLAT_DATA: Segment = Segment { selector: BOOT_DS, kind: DATA, db: true, ..FLAT_CODE };
/// The selector is null, as after reset: the processor wants a task register that can be used, but nobody loads it from the GDT.
const TASK: Segment = Segment { limit: 0x67, selector: 0, kind: BUSY_TSS, s: false, g: false, ..FLAT_CODE };

/// Loads flat segments and writes the GDT and IDT behind them.
///
/// The IDT has one null entry: an exception before the guest sets up its own is a triple fault, not a jump into nowhere.
fn flat_segments(special: &mut SpecialRegs, mem: &GuestMem, code: Segment) -> Result<()> {
    let gdt = [0, 0, descriptor(&code), descriptor(&FLAT_DATA)];
    write_table(mem, "boot GDT", BOOT_GDT, &gdt)?;
    write_table(mem, "boot IDT", BOOT_IDT, &[0, 0])?;
    special.gdt = DescriptorTable { base: BOOT_GDT, limit: 4 * 8 - 1 };
    special.idt = DescriptorTable { base: BOOT_IDT, limit: 2 * 8 - 1 };
    set_data(special, FLAT_DATA);
    special.cs = code;
    special.tr = TASK;
    special.ldt = Segment { unusable: true, ..Segment::default() };
    Ok(())
}

fn set_data(special: &mut SpecialRegs, data: Segment) {
    for segment in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *segment = data;
    }
}

fn write_table(mem: &GuestMem, what: &'static str, gpa: u64, entries: &[u64]) -> Result<()> {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    mem.view().write_slice(&bytes, GuestAddress(gpa)).map_err(|source| Error::Memory { what, gpa, source })
}

/// The 8-byte descriptor from which `segment` would be loaded (Intel SDM, volume 3, section 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.g { segment.limit >> 12 } else { segment.limit });
    let bit = |set: bool, at: u32| u64::from(set) << at;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(segment.kind & 0xf) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

/// Maps the low [`IDENTITY_MAPPED`] bytes to themselves, whatever the amount of RAM: the kernel, its parameters and the device
/// registers are all there, and the kernel builds its own tables for the rest. Returns the value for CR3.
fn identity_map(mem: &GuestMem) -> Result<u64> {
    paging::identity_map(&*mem.view(), GuestAddress(BOOT_PAGE_TABLES), IDENTITY_MAPPED)
        .map_err(|source| Error::PageTables { gpa: BOOT_PAGE_TABLES, source })
}

const _: () = assert!(
    BOOT_PAGE_TABLES + paging::identity_map_size(IDENTITY_MAPPED, paging::PageSize::Size2M)
        <= BOOT_PAGE_TABLES_END
);
