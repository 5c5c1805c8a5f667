//! Devices of byte-wide registers on I/O ports, as on the ISA bus: a wider access is a run of byte accesses to consecutive
//! ports, lowest first.
//!
//! Here is also the [`Device`] of those that have no work of their own. Nothing here knows a particular device.

use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{Access, AccessError, Device, IoDeviceMut, Wiring};
use freestone_snapshot::{Restoring, Saving, Section};

/// Registers of one byte each.
pub(crate) trait BytePorts {
    /// Number of ports, at most 128.
    const PORTS: u8;

    /// Reads the register at `port`, which is below [`PORTS`](Self::PORTS).
    fn inb(&mut self, port: u8) -> u8;

    /// Writes the register at `port`, which is below [`PORTS`](Self::PORTS).
    fn outb(&mut self, port: u8, value: u8);
}

/// The first port of an access of `len` bytes, all of which lie within `ports`.
pub(crate) fn first_port(offset: u64, len: usize, ports: u8) -> Result<u8, AccessError> {
    let first = u8::try_from(offset).ok().filter(|f| *f < ports).ok_or(AccessError::NoRegister)?;
    if len > usize::from(ports - first) {
        return Err(AccessError::Width);
    }
    Ok(first)
}

pub(crate) fn read<D: BytePorts>(device: &mut D, offset: u64, data: &mut [u8]) -> Access {
    let first = first_port(offset, data.len(), D::PORTS)?;
    for (port, byte) in (first..D::PORTS).zip(data) {
        *byte = device.inb(port);
    }
    Ok(())
}

pub(crate) fn write<D: BytePorts>(device: &mut D, offset: u64, data: &[u8]) -> Access {
    let first = first_port(offset, data.len(), D::PORTS)?;
    for (port, byte) in (first..D::PORTS).zip(data) {
        device.outb(port, *byte);
    }
    Ok(())
}

/// Makes a [`BytePorts`] an [`IoDeviceMut`].
macro_rules! byte_device {
    ($device:ty) => {
        impl freestone_bus::IoDeviceMut for $device {
            fn read(&mut self, offset: u64, data: &mut [u8]) -> freestone_bus::Access {
                $crate::isa::read(self, offset, data)
            }

            fn write(&mut self, offset: u64, data: &[u8]) -> freestone_bus::Access {
                $crate::isa::write(self, offset, data)
            }
        }
    };
}
pub(crate) use byte_device;

/// A device of registers with a saved state, for those who put it on a bus by hand. What is plugged in is saved and restored as
/// a [`Device`].
pub trait Saved {
    /// Its saved type: a section of a snapshot.
    type State: Section;

    /// What the device is.
    fn state(&self) -> Self::State;

    /// Becomes what was saved.
    ///
    /// # Errors
    /// [`Error::BadState`](crate::Error::BadState) if a device cannot have this state; it is then unchanged.
    fn set_state(&mut self, state: &Self::State) -> crate::Result<()>;
}

/// Adds the state of a device to a snapshot.
pub(crate) fn save<S: Section>(state: &mut Saving<'_>, saved: &S) -> freestone_bus::Result<()> {
    state.put(saved).map_err(freestone_bus::Error::state("save"))
}

/// Takes the state of a device out of a snapshot.
pub(crate) fn take<S: Section>(state: &mut Restoring<'_>) -> freestone_bus::Result<S> {
    state.take().map_err(freestone_bus::Error::state("restore"))
}

/// A device that only answers accesses and remembers nothing: there is nothing to pause, to flush or to save.
pub(crate) struct Stateless(pub(crate) &'static str);

impl Device for Stateless {
    fn name(&self) -> &str {
        self.0
    }

    fn save(&mut self, _: &mut Saving<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }
}

/// A device that only answers accesses: there is nothing to pause or flush.
pub(crate) struct Passive<D> {
    name: &'static str,
    device: Arc<Mutex<D>>,
}

impl<D: Saved + Send> Device for Passive<D> {
    fn name(&self) -> &str {
        self.name
    }

    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let saved = self.device.lock().unwrap_or_else(PoisonError::into_inner).state();
        save(state, &saved)
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let saved = take(state)?;
        Ok(self.device.lock().unwrap_or_else(PoisonError::into_inner).set_state(&saved)?)
    }
}

/// Claims the ports of a device that only answers accesses.
pub(crate) fn plug<D: BytePorts + IoDeviceMut + Saved + 'static>(
    wiring: &mut dyn Wiring,
    name: &'static str,
    base: u16,
    device: D,
) -> freestone_bus::Result<Box<dyn Device>> {
    let device = Arc::new(Mutex::new(device));
    wiring.pio(base, D::PORTS.into(), Arc::clone(&device) as _)?;
    Ok(Box::new(Passive { name, device }))
}

/// The same for a device that remembers nothing.
pub(crate) fn plug_stateless<D: BytePorts + IoDeviceMut + 'static>(
    wiring: &mut dyn Wiring,
    name: &'static str,
    base: u16,
    device: D,
) -> freestone_bus::Result<Box<dyn Device>> {
    wiring.pio(base, D::PORTS.into(), Arc::new(Mutex::new(device)))?;
    Ok(Box::new(Stateless(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Regs([u8; 4]);

    impl BytePorts for Regs {
        const PORTS: u8 = 4;
        fn inb(&mut self, port: u8) -> u8 {
            self.0[usize::from(port)]
        }
        fn outb(&mut self, port: u8, value: u8) {
            self.0[usize::from(port)] = value;
        }
    }

    #[test]
    fn a_wide_access_is_a_run_of_byte_accesses() {
        let mut regs = Regs::default();
        write(&mut regs, 1, &[7, 8]).unwrap();
        assert_eq!(regs.0, [0, 7, 8, 0]);
        let mut data = [0; 4];
        read(&mut regs, 0, &mut data).unwrap();
        assert_eq!(data, [0, 7, 8, 0]);
    }

    #[test]
    fn an_access_past_the_last_port_does_nothing() {
        let mut regs = Regs::default();
        assert_eq!(write(&mut regs, 3, &[1, 2]), Err(AccessError::Width));
        assert_eq!(write(&mut regs, 4, &[1]), Err(AccessError::NoRegister));
        assert_eq!(write(&mut regs, u64::MAX, &[1]), Err(AccessError::NoRegister));
        assert_eq!(regs.0, [0; 4]);
        let mut data = [0xff; 5];
        assert_eq!(read(&mut regs, 0, &mut data), Err(AccessError::Width));
        assert_eq!(data, [0xff; 5]);
    }
}
