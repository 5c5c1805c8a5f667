//! The scripted hypervisor and its VM.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use freestone_bus::{Doorbells, Irq, IrqChip, MemorySlots, MsiSource};
use freestone_hypervisor::x86::{CpuidLeaf, HostCpu, MpState};
use freestone_hypervisor::{DirtyLog, Error, Hypervisor, MapFlags, Result, SaveVm, Vm};
use freestone_memory::{Address, GuestMemoryRegion, Region};

use super::doorbells::BellHandle;
use super::memory::DeviceSlots;
use super::probe::{Probe, Shared};
use super::script::Script;
use super::vcpu::{ScriptedVcpu, Wait};
use crate::log::Edges;
use crate::msi::MessageSource;

/// Interrupt lines of the scripted interrupt controller.
const PINS: u32 = 24;
/// How long a script stays in the guest by default before the test is taken for hung.
const WAIT: Duration = Duration::from_secs(10);

/// What the scripted hypervisor has.
#[derive(Debug, Clone)]
struct Features {
    irq_chip: bool,
    msi: bool,
    doorbells: bool,
    memory_slots: bool,
    max_vcpus: u32,
    cpuid: Vec<CpuidLeaf>,
    refused_msrs: Vec<u32>,
    wait: Wait,
}

/// Makes VMs that run scripts.
///
/// The first VM takes the scripts; VMs made after it halt at once.
pub struct ScriptedHypervisor {
    scripts: Mutex<Vec<Script>>,
    latest: Mutex<Arc<Shared>>,
    features: Features,
}

impl ScriptedHypervisor {
    /// A hypervisor whose VM has one vCPU with something to do.
    pub fn new(script: Script) -> Self {
        Self::with_scripts(vec![script])
    }

    /// A hypervisor with a script for each vCPU; others halt at once.
    pub fn with_scripts(scripts: Vec<Script>) -> Self {
        let features = Features {
            irq_chip: true,
            msi: true,
            doorbells: true,
            memory_slots: true,
            max_vcpus: 64,
            cpuid: made_up_cpuid(),
            refused_msrs: Vec::new(),
            wait: Wait::Block(WAIT),
        };
        Self { scripts: Mutex::new(scripts), latest: Mutex::default(), features }
    }

    /// Takes the interrupt controller away.
    #[must_use]
    pub fn without_irq_chip(mut self) -> Self {
        self.features.irq_chip = false;
        self
    }

    /// Leaves the interrupt controller its lines only: no message-signalled interrupts.
    #[must_use]
    pub fn without_msi(mut self) -> Self {
        self.features.msi = false;
        self
    }

    /// Takes the memory slots of devices away.
    #[must_use]
    pub fn without_memory_slots(mut self) -> Self {
        self.features.memory_slots = false;
        self
    }

    /// Takes the doorbells away: every write is an exit.
    #[must_use]
    pub fn without_doorbells(mut self) -> Self {
        self.features.doorbells = false;
        self
    }

    /// Sets what [`Hypervisor::max_vcpus`] says; 64 otherwise.
    #[must_use]
    pub fn max_vcpus(mut self, n: u32) -> Self {
        self.features.max_vcpus = n;
        self
    }

    /// Sets the host's CPUID leaves; [`made_up_cpuid`] otherwise.
    #[must_use]
    pub fn cpuid(mut self, leaves: Vec<CpuidLeaf>) -> Self {
        self.features.cpuid = leaves;
        self
    }

    /// Refuses reads and writes of these model-specific registers.
    #[must_use]
    pub fn refuse_msrs(mut self, indices: &[u32]) -> Self {
        self.features.refused_msrs = indices.to_vec();
        self
    }

    /// Does not block where a script waits for a kick or an interrupt: `run` then returns `Exit::Interrupted` and the step
    /// stays. For tests that drive vCPU and devices by turns on one thread.
    #[must_use]
    pub fn non_blocking(mut self) -> Self {
        self.features.wait = Wait::Poll;
        self
    }

    /// How long a script stays in the guest before `run` fails, instead of 10 s.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.features.wait = Wait::Block(patience);
        self
    }

    /// Looks into the VM that was made last.
    pub fn probe(&self) -> Probe {
        Probe(Arc::clone(&self.latest.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Hypervisor for ScriptedHypervisor {
    type Vm = ScriptedVm;

    fn name(&self) -> &'static str {
        "scripted"
    }

    fn create_vm(&self) -> Result<ScriptedVm> {
        let scripts = std::mem::take(&mut *self.scripts.lock().unwrap_or_else(PoisonError::into_inner));
        let shared = Arc::new(Shared::default());
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&shared);
        Ok(ScriptedVm {
            scripts: Mutex::new((0..).zip(scripts).collect()),
            shared,
            features: self.features.clone(),
        })
    }

    fn max_vcpus(&self) -> u32 {
        self.features.max_vcpus
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidLeaf>> {
        Ok(self.features.cpuid.clone())
    }

    fn host_cpu(&self) -> Result<HostCpu> {
        Ok(HostCpu {
            cpuid: self.features.cpuid.clone(),
            tsc_khz: Some(2_000_000),
            tsc_scaling: false,
            xsave_len: Some(4096),
            // Whatever is set is taken.
            msrs: None,
        })
    }
}

impl fmt::Debug for ScriptedHypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedHypervisor").field("features", &self.features).finish_non_exhaustive()
    }
}

/// A VM whose vCPUs run scripts.
pub struct ScriptedVm {
    scripts: Mutex<BTreeMap<u32, Script>>,
    pub(super) shared: Arc<Shared>,
    features: Features,
}

impl ScriptedVm {
    /// Looks into this VM.
    pub fn probe(&self) -> Probe {
        Probe(Arc::clone(&self.shared))
    }

    fn msi(&self) -> Option<Arc<MessageSource>> {
        self.features.msi.then(|| Arc::new(MessageSource(Arc::clone(&self.shared.messages))))
    }
}

impl Vm for ScriptedVm {
    type Vcpu = ScriptedVcpu;

    fn map(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()> {
        let (gpa, len) = (region.start_addr().raw_value(), region.len());
        self.shared.slots.insert(slot, region, flags)?;
        self.shared.call(format!("map {slot} {gpa:#x}+{len:#x}"));
        Ok(())
    }

    fn unmap(&self, slot: u32) -> Result<Arc<Region>> {
        let region = self.shared.slots.remove(slot)?;
        self.shared.call(format!("unmap {slot}"));
        Ok(region)
    }

    fn create_vcpu(&self, index: u32) -> Result<ScriptedVcpu> {
        if index >= self.features.max_vcpus {
            let reason = "the scripted hypervisor has fewer vCPUs";
            return Err(Error::OutOfRange { what: "vCPU", value: index.into(), reason });
        }
        if self.shared.cpus().contains_key(&index) {
            return Err(Error::OutOfRange { what: "vCPU", value: index.into(), reason: "it exists already" });
        }
        self.shared.call(format!("create_vcpu {index}"));
        let has_chip = self.shared.has_irq_chip();
        self.shared.with_cpu(index, |cpu| {
            if index > 0 && has_chip {
                cpu.state.mp_state = MpState::Uninitialized;
            }
        });
        let script =
            self.scripts.lock().unwrap_or_else(PoisonError::into_inner).remove(&index).unwrap_or_default();
        let refused = self.features.refused_msrs.clone();
        Ok(ScriptedVcpu::new(index, script, Arc::clone(&self.shared), self.features.wait, refused))
    }

    fn irq_chip(&self) -> Result<Option<Arc<dyn IrqChip>>> {
        if !self.features.irq_chip {
            return Ok(None);
        }
        if !self.shared.has_irq_chip() {
            if !self.shared.cpus().is_empty() {
                return Err(Error::Call {
                    op: "create the interrupt controller",
                    source: io::ErrorKind::InvalidInput.into(),
                });
            }
            self.shared.call(Shared::IRQ_CHIP.to_owned());
        }
        Ok(Some(Arc::new(Chip { edges: Arc::clone(&self.shared.edges), msi: self.msi() })))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.features
            .doorbells
            .then(|| Arc::new(BellHandle(Arc::clone(&self.shared.bells))) as Arc<dyn Doorbells>)
    }

    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        if !self.features.memory_slots {
            return None;
        }
        // The handle outlives the VM where a device does; it must not keep what the VM was told alive by itself.
        let shared = Arc::downgrade(&self.shared);
        let log = move |what| {
            if let Some(shared) = shared.upgrade() {
                shared.call(what);
            }
        };
        Some(Arc::new(DeviceSlots::new(Arc::clone(&self.shared.slots), log)))
    }

    fn state(&self) -> Option<&dyn SaveVm> {
        Some(self)
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self)
    }
}

impl DirtyLog for ScriptedVm {
    fn take(&self, slot: u32) -> Result<Vec<u64>> {
        self.shared.slots.take_dirty(slot)
    }

    fn slots(&self) -> Vec<(u32, u64, u64)> {
        let slots = self.shared.slots.list();
        let writable = slots.iter().filter(|slot| !slot.flags.contains(MapFlags::READ_ONLY));
        writable.map(|slot| (slot.slot, slot.gpa, slot.len)).collect()
    }

    fn set_logging(&self, slot: u32, on: bool) -> Result<()> {
        self.shared.slots.set_logging(slot, on)
    }
}

impl fmt::Debug for ScriptedVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedVm").field("probe", &self.probe()).finish_non_exhaustive()
    }
}

impl Shared {
    const IRQ_CHIP: &str = "irq_chip";

    pub(crate) fn has_irq_chip(&self) -> bool {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|c| c == Self::IRQ_CHIP)
    }
}

struct Chip {
    edges: Arc<Edges>,
    msi: Option<Arc<MessageSource>>,
}

impl IrqChip for Chip {
    fn pins(&self) -> u32 {
        PINS
    }

    fn edge(&self, gsi: u32) -> io::Result<Irq> {
        if gsi >= PINS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.edges.irq(gsi))
    }

    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        let msi = self.msi.as_ref()?;
        Some(Arc::clone(msi) as Arc<dyn MsiSource>)
    }
}

/// CPUID leaves of a processor that does not exist: enough for code that edits them.
pub fn made_up_cpuid() -> Vec<CpuidLeaf> {
    let leaf =
        |function, eax, ebx, ecx, edx| CpuidLeaf { function, index: 0, indexed: false, eax, ebx, ecx, edx };
    let text = |s: &[u8; 4]| u32::from_le_bytes(*s);
    vec![
        leaf(0, 0xd, text(b"Genu"), text(b"ntel"), text(b"ineI")),
        leaf(1, 0x000a_0652, 0x0004_0800, 0xfffa_3203, 0x1fab_fbff),
        CpuidLeaf { indexed: true, ..leaf(7, 0, 0x0000_0020, 0, 0) },
        CpuidLeaf { indexed: true, ..leaf(0xb, 0, 1, 0x100, 0) },
        leaf(0x4000_0000, 0x4000_0001, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")),
        leaf(0x4000_0001, 0x0100_7efb, 0, 0, 0),
        leaf(0x8000_0000, 0x8000_0008, 0, 0, 0),
        leaf(0x8000_0001, 0, 0, 0x0000_0121, 0x2c10_0800),
        leaf(0x8000_0008, 0x0000_302e, 0, 0, 0),
    ]
}
