//! Building a machine: what it has, in any order, then [`MachineBuilder::build`].

use std::fmt;
use std::sync::Arc;

use freestone_bus::{EventLoop, Plug};
use freestone_hypervisor::x86::CpuidLeaf;
use freestone_hypervisor::{CpuState, Hypervisor, MapFlags, Vm};
use freestone_loader::{Entry, acpi};
use freestone_memory::GuestMem;
use freestone_vcpu::{BootState, CpuTemplate, CpuidConfig, configure_boot, cpuid, lapic, msr};

use crate::board::{Board, Supply};
use crate::exit::Shared;
use crate::firmware;
use crate::inventory::Inventory;
use crate::machine::{Machine, Parts};
use crate::vcpus::Vcpus;
use crate::{Error, Payload, Result};

/// Says what a [`Machine`] is made of.
///
/// Devices are plugged in the order in which they are added: that decides their addresses and interrupt lines, and so the
/// order in which the guest finds them.
#[must_use]
pub struct MachineBuilder<'h, H: Hypervisor> {
    hypervisor: &'h H,
    cpus: u32,
    memory: Option<GuestMem>,
    plugs: Vec<Box<dyn Plug>>,
    payload: Option<Payload>,
    irq_chip: bool,
    stats: bool,
    cpu_changes: CpuChanges,
}

/// What is changed in what CPUID and MSRs tell the guest.
#[derive(Default)]
struct CpuChanges {
    filter: Option<CpuidFilter>,
    template: CpuTemplate,
}

type CpuidFilter = Box<dyn Fn(&CpuidConfig, &mut Vec<CpuidLeaf>) + Send>;

impl<'h, H: Hypervisor> MachineBuilder<'h, H> {
    /// A machine of one vCPU and no devices.
    pub fn new(hypervisor: &'h H) -> Self {
        Self {
            hypervisor,
            cpus: 1,
            memory: None,
            plugs: Vec::new(),
            payload: None,
            irq_chip: true,
            stats: false,
            cpu_changes: CpuChanges::default(),
        }
    }

    /// Number of vCPUs; 1 if not said.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Guest memory; 128 MiB of anonymous memory if not said.
    pub fn memory(mut self, memory: GuestMem) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Adds a device.
    pub fn device(mut self, plug: impl Plug + 'static) -> Self {
        self.plugs.push(Box::new(plug));
        self
    }

    /// What to boot.
    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = Some(payload);
        self
    }

    /// Whether to use the hypervisor's interrupt controller; on if not said. Without one, a guest that halts has ended.
    pub fn irq_chip(mut self, on: bool) -> Self {
        self.irq_chip = on;
        self
    }

    /// Counts exits and their latencies; off if not said, and then it costs nothing.
    pub fn stats(mut self, on: bool) -> Self {
        self.stats = on;
        self
    }

    /// Changes what CPUID says and model-specific registers, after everything else.
    pub fn cpu_template(mut self, template: CpuTemplate) -> Self {
        self.cpu_changes.template = template;
        self
    }

    /// Lets `filter` change what CPUID tells each vCPU, after [`cpuid::filter`] and before the template. Leaves must stay sorted by
    /// function and index.
    pub fn cpuid_filter(
        mut self,
        filter: impl Fn(&CpuidConfig, &mut Vec<CpuidLeaf>) + Send + 'static,
    ) -> Self {
        self.cpu_changes.filter = Some(Box::new(filter));
        self
    }

    /// Makes the machine: memory, interrupt controller, devices, firmware tables, payload, vCPUs. Nothing runs yet.
    ///
    /// # Errors
    /// [`Error`] of the first part that cannot be made.
    pub fn build(mut self) -> Result<Machine<H>> {
        let payload = self.payload.take().ok_or(Error::NoPayload)?;
        let (cpus, stats) = (self.cpus, self.stats);
        let cpu_changes = std::mem::take(&mut self.cpu_changes);
        let host = self.hypervisor.supported_cpuid()?;
        let Assembly { vm, memory, board, inventory, event_loop, shared } =
            self.assemble(cpuid::physical_address_bits(&host))?;

        let rsdp = if payload.wants_firmware() {
            let config = firmware::acpi_config(cpus, &board.descriptions, &board.fixed);
            Some(acpi::write_acpi(&memory, &config)?)
        } else {
            None
        };
        let parameters = firmware::kernel_parameters(&board.descriptions);
        let entry = payload.load(&memory, rsdp, &parameters)?;

        let mut vcpus = create_vcpus(&vm, &host, cpus, board.has_irq_chip(), &cpu_changes)?;
        if let Some(first) = vcpus.first_mut() {
            configure_boot(first, &memory, &boot_state(&entry))?;
        }
        let vcpus = Vcpus::new(vcpus, stats);
        Ok(Machine::assemble(Parts { vm, memory, board, inventory, event_loop, shared, vcpus }))
    }

    /// Everything that does not depend on what the guest is: memory, interrupt controller, devices.
    pub(crate) fn assemble(self, phys_bits: u8) -> Result<Assembly<H>> {
        let max = self.hypervisor.max_vcpus();
        if self.cpus == 0 || self.cpus > max {
            return Err(Error::Cpus { asked: self.cpus, max });
        }
        let memory = match self.memory {
            Some(memory) => memory,
            None => GuestMem::anonymous(128 << 20)?,
        };
        // Memory before the interrupt controller: some hypervisors are much quicker that way round.
        let vm = self.hypervisor.create_vm()?;
        for (slot, region) in (0..).zip(memory.regions()) {
            vm.map(slot, Arc::clone(region), MapFlags::empty())?;
        }
        let event_loop = EventLoop::new()?;
        let shared = Shared::new(event_loop.handle());
        let chip = if self.irq_chip { vm.irq_chip()? } else { None };
        let supply = Supply { chip, doorbells: vm.doorbells(), slots: vm.memory_slots(), phys_bits };
        let mut board = Board::new(memory.clone(), supply, event_loop.handle(), shared.notifier());
        let inventory = plug_in(&mut board, self.plugs)?;
        Ok(Assembly { vm, memory, board, inventory, event_loop, shared })
    }

    pub(crate) fn shape(&self) -> (u32, bool) {
        (self.cpus, self.stats)
    }
}

/// A machine without vCPUs.
pub(crate) struct Assembly<H: Hypervisor> {
    pub(crate) vm: H::Vm,
    pub(crate) memory: GuestMem,
    pub(crate) board: Board,
    pub(crate) inventory: Inventory,
    pub(crate) event_loop: EventLoop,
    pub(crate) shared: Arc<Shared>,
}

fn plug_in(board: &mut Board, plugs: Vec<Box<dyn Plug>>) -> Result<Inventory> {
    let mut inventory = Inventory::default();
    for (number, plug) in plugs.into_iter().enumerate() {
        board.plugging = format!("number {number}");
        let device = plug.plug(board).map_err(|source| Error::Device {
            doing: "plug in",
            device: board.plugging.clone(),
            source,
        })?;
        inventory.add(device)?;
    }
    Ok(inventory)
}

/// The vCPUs with all that does not depend on the payload.
fn create_vcpus<V: Vm>(
    vm: &V,
    host: &[CpuidLeaf],
    cpus: u32,
    irq_chip: bool,
    changes: &CpuChanges,
) -> Result<Vec<V::Vcpu>> {
    changes.template.check()?;
    let mut vcpus = Vec::new();
    for index in 0..cpus {
        let mut vcpu = vm.create_vcpu(index)?;
        let config = CpuidConfig { lapic: irq_chip, ..CpuidConfig::new(cpus, index) };
        let mut leaves = cpuid::filter(host, &config);
        if let Some(filter) = &changes.filter {
            filter(&config, &mut leaves);
        }
        changes.template.apply_cpuid(&mut leaves, host)?;
        vcpu.set_cpuid(&leaves)?;
        let refused = msr::configure_msrs(&mut vcpu)?;
        if !refused.is_empty() {
            tracing::debug!(vcpu = index, ?refused, "the hypervisor does not take these MSRs");
        }
        changes.template.apply_msrs(&mut vcpu)?;
        if irq_chip {
            lapic::configure_lints(&mut vcpu)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// What the loader's entry means for registers.
fn boot_state(entry: &Entry) -> BootState {
    match *entry {
        Entry::Pvh32 { entry, start_info } => BootState::Protected32 { entry, ebx: start_info, esi: 0 },
        Entry::Linux32 { entry, boot_params } => BootState::Protected32 { entry, ebx: 0, esi: boot_params },
        Entry::Linux64 { entry, boot_params } => BootState::Long64 { entry, rsi: boot_params },
        Entry::Real16 { segment, offset } => BootState::Real16 { segment, offset },
        Entry::Flat32 { entry } => BootState::Protected32 { entry, ebx: 0, esi: 0 },
        Entry::Flat64 { entry } => BootState::Long64 { entry, rsi: 0 },
    }
}

impl<H: Hypervisor> fmt::Debug for MachineBuilder<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineBuilder")
            .field("hypervisor", &self.hypervisor.name())
            .field("cpus", &self.cpus)
            .field("devices", &self.plugs.len())
            .field("payload", &self.payload)
            .finish_non_exhaustive()
    }
}
