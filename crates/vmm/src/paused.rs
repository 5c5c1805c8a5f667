//! A machine that stands still: only such a machine can be saved, and only here.

use std::fmt;

use freestone_hypervisor::{Hypervisor, Vm};
use freestone_memory::GuestMem;
use freestone_snapshot::State;
use freestone_vcpu::state::{VcpuSection, VmSection};

use crate::saved::MachineSection;
use crate::{Error, Machine, Result};

/// A paused [`Machine`]. Neither its guest nor its devices touch memory while this is there.
pub struct Paused<'m, H: Hypervisor>(&'m mut Machine<H>);

impl<'m, H: Hypervisor> Paused<'m, H> {
    pub(crate) fn new(machine: &'m mut Machine<H>) -> Self {
        Self(machine)
    }

    /// The state of everything but guest memory: what the machine is, vCPUs, the hypervisor's chips and clock, devices. The
    /// machine can go on afterwards. Memory is to be saved before it does.
    ///
    /// # Errors
    /// [`Error::State`] if the guest has ended, [`Error::NotSaved`] if the hypervisor cannot, [`Error::Device`] if a device cannot, or as the hypervisor fails.
    pub fn save(&mut self) -> Result<State> {
        if self.0.has_ended() {
            // Restored, it would be one that goes on.
            return Err(Error::State { doing: "save", state: "at its guest's end" });
        }
        let clock = self.0.clock();
        let machine = &mut *self.0;
        let mut state = State::new();
        // Before the interrupt controllers: if a device is told something by another thread meanwhile, the guest gets an interrupt too
        // many, and none too few.
        machine.inventory.save(&mut state)?;
        let vcpus = machine.vcpus.save()?;
        state.put(&MachineSection::new(vcpus.len(), machine.memory(), machine.board.has_irq_chip()))?;
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            state.put_instance(&index.to_string(), &VcpuSection::try_from(vcpu)?)?;
        }
        let mut saved = machine.vm.state().ok_or(Error::NotSaved)?.save()?;
        // Of a restored machine that did not go on yet, the clock was not set yet.
        saved.clock = clock.or(saved.clock);
        state.put(&VmSection::try_from(saved)?)?;
        Ok(state)
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMem {
        self.0.memory()
    }

    pub(crate) fn machine(&mut self) -> &mut Machine<H> {
        self.0
    }

    pub(crate) fn machine_ref(&self) -> &Machine<H> {
        self.0
    }

    /// The machine, to let it go on.
    pub fn into_machine(self) -> &'m mut Machine<H> {
        self.0
    }
}

impl<H: Hypervisor> fmt::Debug for Paused<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Paused").field(&self.0).finish()
    }
}
