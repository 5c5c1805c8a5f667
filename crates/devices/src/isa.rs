//! Devices of byte-wide registers on I/O ports, as on the ISA bus: a wider access is a run of byte accesses to consecutive
//! ports, lowest first.
//!
//! Here is also the [`Device`] of those that have no work of their own. Nothing here knows a particular device.

use std::sync::{Arc, Mutex};

use freestone_bus::{Access, AccessError, Device, IoDeviceMut, Wiring};

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

/// A device that only answers accesses: there is nothing to pause or flush.
pub(crate) struct Passive(pub(crate) &'static str);

impl Device for Passive {
    fn name(&self) -> &str {
        self.0
    }
}

/// Claims the ports of a device that only answers accesses.
pub(crate) fn plug<D: BytePorts + IoDeviceMut + 'static>(
    wiring: &mut dyn Wiring,
    name: &'static str,
    base: u16,
    device: D,
) -> freestone_bus::Result<Box<dyn Device>> {
    wiring.pio(base, D::PORTS.into(), Arc::new(Mutex::new(device)))?;
    Ok(Box::new(Passive(name)))
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
