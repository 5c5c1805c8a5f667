//! What a test sees of a scripted VM, from outside and afterwards.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::MsiMessage;
use freestone_hypervisor::MapFlags;
use freestone_hypervisor::x86::{
    ClockState, CpuidLeaf, DebugRegs, MpState, Regs, SpecialRegs, VcpuEvents, VmState,
};
use freestone_memory::MemoryMap;

use super::doorbells::Bells;
use super::memory::Slots;
use crate::log::Edges;
use crate::msi::Messages;

/// What a scripted vCPU did or saw.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Record {
    /// A load from an I/O port gave this.
    PioRead {
        /// I/O port.
        port: u16,
        /// Bytes.
        data: Vec<u8>,
    },
    /// A load from device memory gave this.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        data: Vec<u8>,
    },
    /// A load from RAM gave this.
    MemRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        data: Vec<u8>,
    },
    /// A hypercall returned this.
    Hypercall {
        /// Number.
        number: u64,
        /// Return value.
        ret: u64,
    },
    /// A write rang a doorbell and caused no exit.
    Doorbell,
    /// An edge was taken.
    Irq {
        /// Global system interrupt.
        gsi: u32,
    },
    /// A kick interrupted the guest.
    Kicked,
    /// A load did not give what the script expected.
    Mismatch(String),
}

/// Registers of a scripted vCPU, as they were last set.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CpuSnapshot {
    /// General registers.
    pub regs: Regs,
    /// Special registers.
    pub special: SpecialRegs,
    /// CPUID leaves.
    pub cpuid: Vec<CpuidLeaf>,
    /// Model-specific registers that were set.
    pub msrs: BTreeMap<u32, u64>,
    /// Runs or waits.
    pub mp_state: MpState,
    /// Local APIC.
    pub lapic: [u8; 1024],
    /// Extended control registers.
    pub xcrs: Vec<(u32, u64)>,
    /// The XSAVE area.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug_regs: DebugRegs,
    /// Events on their way.
    pub events: VcpuEvents,
    /// Frequency of the time-stamp counter in kHz.
    pub tsc_khz: Option<u32>,
}

impl Default for CpuSnapshot {
    fn default() -> Self {
        Self {
            regs: Regs { rip: 0xfff0, rflags: 2, ..Regs::default() },
            // APIC at its usual address, enabled, boot processor.
            special: SpecialRegs { cr0: 0x6000_0010, apic_base: 0xfee0_0900, ..SpecialRegs::default() },
            cpuid: Vec::new(),
            msrs: BTreeMap::new(),
            mp_state: MpState::Runnable,
            lapic: [0; 1024],
            xcrs: vec![(0, 1)],
            xsave: vec![0; 4096],
            debug_regs: DebugRegs { dr6: 0xffff_0ff0, dr7: 0x400, ..DebugRegs::default() },
            events: VcpuEvents::default(),
            tsc_khz: Some(2_000_000),
        }
    }
}

/// A mapped memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slot {
    /// Number.
    pub slot: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// How it is mapped.
    pub flags: MapFlags,
}

/// State that a VM, its vCPUs and its probes share.
pub(crate) struct Shared {
    pub(crate) slots: Arc<Slots>,
    pub(crate) bells: Arc<Bells>,
    pub(crate) edges: Arc<Edges>,
    pub(crate) messages: Arc<Messages>,
    pub(crate) cpus: Mutex<BTreeMap<u32, Cpu>>,
    /// Calls of the VM in their order.
    pub(crate) calls: Mutex<Vec<String>>,
    /// What was last restored of chips and clock.
    pub(crate) vm_state: Mutex<VmState>,
}

impl Default for Shared {
    fn default() -> Self {
        let edges = Arc::<Edges>::default();
        Self {
            slots: Arc::default(),
            bells: Arc::default(),
            messages: Messages::new(Arc::clone(&edges)),
            edges,
            cpus: Mutex::default(),
            calls: Mutex::default(),
            vm_state: Mutex::default(),
        }
    }
}

/// One vCPU's part of it.
#[derive(Default)]
pub(crate) struct Cpu {
    pub(crate) state: CpuSnapshot,
    pub(crate) records: Vec<Record>,
}

impl Shared {
    pub(crate) fn call(&self, what: String) {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    pub(crate) fn cpus(&self) -> MutexGuard<'_, BTreeMap<u32, Cpu>> {
        self.cpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn with_cpu<R>(&self, index: u32, f: impl FnOnce(&mut Cpu) -> R) -> R {
        f(self.cpus().entry(index).or_default())
    }
}

/// Looks into a scripted VM while it runs and after it is gone.
#[derive(Clone)]
pub struct Probe(pub(crate) Arc<Shared>);

impl Probe {
    /// Registers of vCPU `index` as they were last set; `None` if there is none.
    pub fn cpu(&self, index: u32) -> Option<CpuSnapshot> {
        self.0.cpus().get(&index).map(|c| c.state.clone())
    }

    /// What vCPU `index` did and saw.
    pub fn records(&self, index: u32) -> Vec<Record> {
        self.0.cpus().get(&index).map_or_else(Vec::new, |c| c.records.clone())
    }

    /// What any vCPU read and did not expect. Each of them made `run` fail as well.
    pub fn mismatches(&self) -> Vec<String> {
        let cpus = self.0.cpus();
        let records = cpus.values().flat_map(|c| &c.records);
        records
            .filter_map(|r| if let Record::Mismatch(text) = r { Some(text.clone()) } else { None })
            .collect()
    }

    /// The mapped slots, by number.
    pub fn slots(&self) -> Vec<Slot> {
        self.0.slots.list()
    }

    /// Guest memory as it is mapped.
    pub fn memory(&self) -> Option<Arc<MemoryMap>> {
        self.0.slots.map()
    }

    /// Edges raised on line `gsi`.
    pub fn edges(&self, gsi: u32) -> u64 {
        self.0.edges.count(gsi)
    }

    /// Raises an edge on line `gsi`, as a device would.
    pub fn raise(&self, gsi: u32) {
        self.0.edges.raise(gsi);
    }

    /// How often `message` was delivered.
    pub fn msi_count(&self, message: MsiMessage) -> u64 {
        self.0.messages.count(message)
    }

    /// Every message that was delivered, with how often, sorted by address and data.
    pub fn msi_delivered(&self) -> Vec<(MsiMessage, u64)> {
        self.0.messages.delivered()
    }

    /// The message of every route that exists, oldest first.
    pub fn msi_routes(&self) -> Vec<Option<MsiMessage>> {
        self.0.messages.routes()
    }

    /// Triggers that were lost because their route had no message.
    pub fn msi_lost(&self) -> u64 {
        self.0.messages.lost()
    }

    /// Refuses every message that is set from now on, or takes them again.
    pub fn refuse_msi(&self, refuse: bool) {
        self.0.messages.refuse(refuse);
    }

    /// Doorbells bound now.
    pub fn doorbells(&self) -> usize {
        self.0.bells.len()
    }

    /// The clock as it was last set; `None` if nobody did.
    pub fn clock(&self) -> Option<ClockState> {
        self.0.vm_state.lock().unwrap_or_else(PoisonError::into_inner).clock
    }

    /// What was asked of the VM, in order: `map 0`, `irq_chip`, `create_vcpu 0`, ...
    pub fn calls(&self) -> Vec<String> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probe").field("calls", &self.calls()).finish_non_exhaustive()
    }
}
