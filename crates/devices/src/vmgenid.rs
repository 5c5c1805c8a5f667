//! The generation ID of a virtual machine (Microsoft's "Virtual Machine Generation ID" of 2012): 16 random bytes in the guest's
//! memory that change when the machine is another than it was, because it was restored from a snapshot, perhaps not for the first
//! time. A guest that sees it change makes new keys, tokens and random seeds.
//!
//! Linux has a driver for it (`CONFIG_VMGENID`, since 5.18), which feeds the kernel's random number generator.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{Device, FixedHardware, Irq, Plug, Wiring};
use freestone_memory::layout::GENERATION_ID;
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_snapshot::{Restoring, Saving};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::isa::{save, take};
use crate::state::{VmGenIdState, check};
use crate::{Error, Result};

const NAME: &str = "vmgenid";

/// A machine that has the device.
#[derive(Debug)]
struct Wires {
    mem: GuestMem,
    irq: Irq,
}

impl Wires {
    fn write(&self, id: u128) -> Result<()> {
        let bytes = id.to_le_bytes();
        let written = self.mem.view().write_slice(&bytes, GuestAddress(GENERATION_ID));
        written.map_err(|error| Error::Io {
            op: "write the generation ID to the guest's memory",
            source: std::io::Error::other(error),
        })
    }
}

#[derive(Debug, Default)]
struct Inner {
    id: u128,
    wires: Option<Wires>,
}

/// The generation ID of a machine, to be read and changed from any thread.
#[derive(Debug, Clone, Default)]
pub struct VmGenId(Arc<Mutex<Inner>>);

/// A number that nobody had before, with all probability.
fn random() -> Result<u128> {
    let mut bytes = [0; 16];
    let mut have = 0;
    while let Some(rest @ [_, ..]) = bytes.get_mut(have..) {
        match getrandom(rest, GetRandomFlags::empty()) {
            Ok(n) => have += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::io("choose a generation ID")(errno)),
        }
    }
    Ok(u128::from_le_bytes(bytes))
}

impl VmGenId {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ID, in the order of bytes in which the guest has it; 0 before the device is plugged in.
    pub fn id(&self) -> [u8; 16] {
        self.lock().id.to_le_bytes()
    }

    /// Chooses another ID and tells the guest. A machine that is restored does so by itself, when it goes on.
    ///
    /// # Errors
    /// [`Error::Io`] if the host has no random bytes, the guest's memory cannot be written, or the guest cannot be told.
    pub fn renew(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.id = random()?;
        let Some(wires) = &inner.wires else { return Ok(()) };
        wires.write(inner.id)?;
        wires.irq.trigger().map_err(Error::io("tell the guest of its generation ID"))
    }
}

/// Plugs a generation ID in, at [`GENERATION_ID`] with an interrupt line of its own, announced as
/// [`FixedHardware::GenerationId`]. The first ID is random.
#[derive(Debug, Default)]
pub struct VmGenIdPlug {
    handle: VmGenId,
}

impl VmGenIdPlug {
    /// A generation ID.
    pub fn new() -> Self {
        Self::default()
    }

    /// The ID, also after the device is plugged in.
    pub fn handle(&self) -> VmGenId {
        self.handle.clone()
    }
}

impl Plug for VmGenIdPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let (gsi, irq) = wiring.irq(None)?;
        let wires = Wires { mem: wiring.memory(), irq };
        let id = random()?;
        wires.write(id)?;
        *self.handle.lock() = Inner { id, wires: Some(wires) };
        wiring.fixed_hardware(FixedHardware::GenerationId { address: GENERATION_ID, gsi });
        Ok(Box::new(VmGenIdDevice { handle: self.handle, gsi, restored: false }))
    }
}

struct VmGenIdDevice {
    handle: VmGenId,
    gsi: u32,
    /// It was restored and not yet resumed.
    restored: bool,
}

impl Device for VmGenIdDevice {
    fn name(&self) -> &str {
        NAME
    }

    /// Memory holds what it held by now, and the guest does not run yet: it never sees the old ID in a new machine.
    fn resume(&mut self) -> freestone_bus::Result<()> {
        if self.restored {
            self.handle.renew()?;
            self.restored = false;
        }
        Ok(())
    }

    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        save(state, &VmGenIdState { address: GENERATION_ID, gsi: self.gsi })
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let VmGenIdState { address, gsi } = take(state)?;
        check(NAME, "address, which the guest knows,", address == GENERATION_ID, address)?;
        check(NAME, "interrupt line, which the guest knows,", gsi == self.gsi, gsi)?;
        self.restored = true;
        Ok(())
    }
}

impl Drop for VmGenIdDevice {
    /// Handles may outlive the machine, whose memory they are not to hold.
    fn drop(&mut self) {
        self.handle.lock().wires = None;
    }
}
