//! Building a machine that was saved.

use freestone_hypervisor::x86::{ClockPolicy, CpuidLeaf, VcpuState, VmState};
use freestone_hypervisor::{CpuState, Hypervisor, Vm};
use freestone_snapshot::{Arch, Sections};
use freestone_vcpu::cpuid;
use freestone_vcpu::state::{VcpuSection, VmSection};

use crate::builder::Assembly;
use crate::machine::Parts;
use crate::saved::MachineSection;
use crate::vcpus::Vcpus;
use crate::{Error, Machine, MachineBuilder, Result};

impl<H: Hypervisor> MachineBuilder<'_, H> {
    /// Makes the machine that `sections` were saved of. In place of a payload it has the saved state, and the
    /// [memory](Self::memory) must hold what it held; devices must be given as they were given to the machine that was saved. It is then paused, and
    /// [`Machine::resume`] lets it go on, with its clock by `clock`. Sections that are not of the machine are left alone:
    /// [`Sections::finish`] tells whether some remain.
    ///
    /// The state is checked and may come from anywhere; nothing of the guest runs before all of it fits.
    ///
    /// # Errors
    /// [`Error::Differs`], [`Error::Snapshot`], [`Error::Device`], or the hypervisor's. Nothing is left of the machine then.
    pub fn restore(self, sections: &mut Sections, clock: ClockPolicy) -> Result<Machine<H>> {
        sections.header().check_arch(Arch::host())?;
        let saved: MachineSection = sections.take()?;
        let (cpus, stats) = self.shape();
        if saved.cpus() != cpus {
            return Err(Error::Differs {
                what: "number of vCPUs",
                saved: saved.cpus().to_string(),
                built: cpus.to_string(),
            });
        }
        let states = (0..cpus).map(|index| {
            Ok(VcpuState::try_from(sections.take_instance::<VcpuSection>(&index.to_string())?)?)
        });
        let states = states.collect::<Result<Vec<_>>>()?;
        let vm_state = VmState::try_from(sections.take::<VmSection>()?)?;

        let assembly = self.assemble(address_bits(&states))?;
        let Assembly { vm, memory, board, mut inventory, event_loop, shared } = assembly;
        let built = MachineSection::new(states.len(), &memory, board.has_irq_chip());
        saved.check(&built)?;
        let mut vcpus = Vec::with_capacity(states.len());
        for (index, state) in (0..).zip(&states) {
            let mut vcpu = vm.create_vcpu(index)?;
            vcpu.restore(state)?;
            vcpus.push(vcpu);
        }
        // The threads come up, paused, while the rest is restored: that takes about as long.
        let mut vcpus = Vcpus::new(vcpus, stats);
        vcpus.start(true, || board.dispatcher(), &memory, &shared)?;
        vm.state().ok_or(Error::NotSaved)?.restore(&vm_state)?;
        inventory.restore(sections)?;
        let parts = Parts { vm, memory, board, inventory, event_loop, shared, vcpus };
        Ok(Machine::assemble(parts).into_restored(vm_state.clock.map(|saved| (saved, clock))))
    }
}

/// How many bits a guest-physical address had, by the CPUID of the first vCPU: that decides where devices put memory.
fn address_bits(states: &[VcpuState]) -> u8 {
    let leaves: &[CpuidLeaf] = states.first().map_or(&[], |state| &state.cpuid);
    cpuid::physical_address_bits(leaves)
}
