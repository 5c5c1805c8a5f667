//! Register state of an x86-64 processor, in plain types that belong to no hypervisor.

use std::fmt;

/// General registers, instruction pointer and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the registers are named as in the Intel SDM, volume 1, section 3.4")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl fmt::Display for Regs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rip {:016x}  rflags {:08x}", self.rip, self.rflags)?;
        let named = [
            ("rax", self.rax),
            ("rbx", self.rbx),
            ("rcx", self.rcx),
            ("rdx", self.rdx),
            ("rsi", self.rsi),
            ("rdi", self.rdi),
            ("rsp", self.rsp),
            ("rbp", self.rbp),
            ("r8 ", self.r8),
            ("r9 ", self.r9),
            ("r10", self.r10),
            ("r11", self.r11),
            ("r12", self.r12),
            ("r13", self.r13),
            ("r14", self.r14),
            ("r15", self.r15),
        ];
        for (i, (name, value)) in named.iter().enumerate() {
            write!(f, "{name} {value:016x}{}", if i % 4 == 3 { "\n" } else { "  " })?;
        }
        Ok(())
    }
}

/// A segment register with its hidden part (Intel SDM, volume 3, section 3.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (already scaled by the granularity).
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Type field, 4 bits.
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// D/B: default operand size is 32 bits.
    pub db: bool,
    /// S: code or data (not a system segment).
    pub s: bool,
    /// L: 64-bit code.
    pub l: bool,
    /// G: the limit counts 4 KiB units.
    pub g: bool,
    /// Available to software.
    pub avl: bool,
    /// Not usable (a null selector was loaded).
    pub unusable: bool,
}

/// Base and limit of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Size in bytes, minus one.
    pub limit: u16,
}

/// Segments, control registers and descriptor tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the registers are named as in the Intel SDM, volume 3, chapter 2")]
pub struct SpecialRegs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

impl fmt::Display for SpecialRegs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:08x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.efer
        )?;
        for (name, s) in [("cs", &self.cs), ("ss", &self.ss), ("ds", &self.ds), ("tr", &self.tr)] {
            write!(f, "{name} {:04x} base {:x} limit {:x} dpl {}  ", s.selector, s.base, s.limit, s.dpl)?;
        }
        write!(
            f,
            "\ngdt {:x}+{:x}  idt {:x}+{:x}",
            self.gdt.base, self.gdt.limit, self.idt.base, self.idt.limit
        )
    }
}

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, if `indexed`.
    pub index: u32,
    /// Whether the answer depends on ECX.
    pub indexed: bool,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msr {
    /// Number of the register.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// Whether a vCPU runs or waits, with an interrupt controller in the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MpState {
    /// Runs.
    Runnable,
    /// Waits for INIT (an application processor after reset).
    Uninitialized,
    /// Got INIT, waits for SIPI.
    InitReceived,
    /// Waits in `hlt` for an interrupt.
    Halted,
    /// Got SIPI, starts next.
    SipiReceived,
}

/// Debug registers (Intel SDM, volume 3, section 18.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DebugRegs {
    /// DR0 to DR3: addresses.
    pub db: [u64; 4],
    /// DR6: status.
    pub dr6: u64,
    /// DR7: control.
    pub dr7: u64,
}

/// What a processor has accepted and not yet delivered, and what holds it back (KVM API, `KVM_GET_VCPU_EVENTS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields are named as in the KVM API")]
pub struct VcpuEvents {
    pub exception_injected: bool,
    pub exception_nr: u8,
    pub exception_has_error_code: bool,
    pub exception_pending: bool,
    pub exception_error_code: u32,
    pub exception_has_payload: bool,
    pub exception_payload: u64,
    pub interrupt_injected: bool,
    pub interrupt_nr: u8,
    pub interrupt_soft: bool,
    pub interrupt_shadow: u8,
    pub nmi_injected: bool,
    pub nmi_pending: bool,
    pub nmi_masked: bool,
    pub sipi_vector: u32,
    pub smi_smm: bool,
    pub smi_pending: bool,
    pub smi_inside_nmi: bool,
    pub smi_latched_init: bool,
    pub triple_fault_pending: bool,
}

/// Everything of a vCPU that its guest can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuState {
    /// What CPUID tells the guest, as it was set ([`set_cpuid`](crate::CpuState::set_cpuid)).
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of the time-stamp counter in kHz, where the hypervisor knows it.
    pub tsc_khz: Option<u32>,
    /// Whether it runs or waits.
    pub mp_state: MpState,
    /// General registers.
    pub regs: Regs,
    /// Segments, control registers, descriptor tables.
    pub special_regs: SpecialRegs,
    /// Extended control registers: number and value.
    pub xcrs: Vec<(u32, u64)>,
    /// The XSAVE area in standard format (Intel SDM, volume 1, section 13.4), 4096 bytes or as long as the features need.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug_regs: DebugRegs,
    /// The local APIC's registers, if there is one.
    pub lapic: Option<Box<[u8; 1024]>>,
    /// Model-specific registers, in the order in which they are to be set.
    pub msrs: Vec<Msr>,
    /// Events on their way.
    pub events: VcpuEvents,
}

/// Which of the hypervisor's chips a [`ChipState`] is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChipKind {
    /// The first 8259A.
    PicMaster,
    /// The second 8259A.
    PicSlave,
    /// The I/O APIC.
    IoApic,
    /// The 8254 timer.
    Pit,
}

/// The registers of a chip inside the hypervisor, in the layout of the KVM API: `struct kvm_pic_state`,
/// `struct kvm_ioapic_state`, `struct kvm_pit_state2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChipState {
    /// Which chip.
    pub kind: ChipKind,
    /// Its registers.
    pub registers: Vec<u8>,
}

/// The paravirtual clock of a VM when it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClockState {
    /// What the guest's clock said, in nanoseconds.
    pub guest_ns: u64,
    /// The host's `CLOCK_REALTIME` at that moment in nanoseconds since 1970, if known.
    pub host_realtime_ns: Option<u64>,
    /// The host's time-stamp counter at that moment, if known.
    pub host_tsc: Option<u64>,
}

/// What a hypervisor keeps of a VM beside its memory and its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmState {
    /// Chips, where they are in the hypervisor.
    pub chips: Vec<ChipState>,
    /// The clock, where there is one.
    pub clock: Option<ClockState>,
}

/// What a guest's clock shows when a VM goes on that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ClockPolicy {
    /// It goes on where it stopped: the time between did not pass.
    #[default]
    Continue,
    /// It goes forward by the time that passed in the world.
    Advance,
}

/// What a host's processor and hypervisor can give a vCPU, to tell whether a saved one fits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostCpu {
    /// The leaves of [`Hypervisor::supported_cpuid`](crate::Hypervisor::supported_cpuid).
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of the time-stamp counter in kHz that a vCPU has if nobody sets another, where it is known.
    pub tsc_khz: Option<u32>,
    /// Whether a vCPU's time-stamp counter may run at another frequency than the host's.
    pub tsc_scaling: bool,
    /// Bytes of the largest [`VcpuState::xsave`] that it takes, where it is known.
    pub xsave_len: Option<usize>,
    /// The model-specific registers that it can save and restore, sorted, where they are known.
    pub msrs: Option<Vec<u32>>,
}
