//! Adapters by which existing rust-vmm devices (`vm_device::DevicePio` and `DeviceMmio`) go on a [`Bus`](crate::Bus).
//!
//! They keep vm-device's contract: the device sees the base it is registered at and the offset into it.

use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};

use crate::{Access, AccessError, IoDevice};

/// A `vm_device::DeviceMmio` as an [`IoDevice`].
#[derive(Debug)]
pub struct VmDeviceMmio<T> {
    base: u64,
    device: T,
}

impl<T> VmDeviceMmio<T> {
    /// Wraps `device`, which is told that it stands at guest-physical address `base`.
    pub fn new(base: u64, device: T) -> Self {
        Self { base, device }
    }
}

impl<T: DeviceMmio + Send + Sync> IoDevice for VmDeviceMmio<T> {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        self.device.mmio_read(MmioAddress(self.base), offset, data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        self.device.mmio_write(MmioAddress(self.base), offset, data);
        Ok(())
    }
}

/// A `vm_device::DevicePio` as an [`IoDevice`].
#[derive(Debug)]
pub struct VmDevicePio<T> {
    base: u16,
    device: T,
}

impl<T> VmDevicePio<T> {
    /// Wraps `device`, which is told that it stands at I/O port `base`.
    pub fn new(base: u16, device: T) -> Self {
        Self { base, device }
    }
}

impl<T: DevicePio + Send + Sync> IoDevice for VmDevicePio<T> {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let offset = u16::try_from(offset).map_err(|_| AccessError::NoRegister)?;
        self.device.pio_read(PioAddress(self.base), offset, data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let offset = u16::try_from(offset).map_err(|_| AccessError::NoRegister)?;
        self.device.pio_write(PioAddress(self.base), offset, data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64, Vec<u8>)>>);

    impl DeviceMmio for Log {
        fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((base.0, offset, vec![]));
            data.fill(7);
        }
        fn mmio_write(&self, base: MmioAddress, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((base.0, offset, data.to_vec()));
        }
    }

    impl DevicePio for Log {
        fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
            self.0.lock().unwrap().push((base.0.into(), offset.into(), vec![]));
            data.fill(9);
        }
        fn pio_write(&self, base: PioAddress, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((base.0.into(), offset.into(), data.to_vec()));
        }
    }

    #[test]
    fn a_vm_device_mmio_device_sees_its_base_and_the_offset() {
        let dev = VmDeviceMmio::new(0x1000, Log::default());
        let mut data = [0; 4];
        dev.read(0x10, &mut data).unwrap();
        dev.write(0x14, &[1, 2]).unwrap();
        assert_eq!(data, [7; 4]);
        assert_eq!(*dev.device.0.lock().unwrap(), [(0x1000, 0x10, vec![]), (0x1000, 0x14, vec![1, 2])]);
    }

    #[test]
    fn a_vm_device_pio_device_sees_its_base_and_the_offset() {
        let dev = VmDevicePio::new(0x60, Log::default());
        let mut data = [0];
        dev.read(4, &mut data).unwrap();
        assert_eq!(data, [9]);
        assert_eq!(dev.write(0x1_0000, &[1]), Err(AccessError::NoRegister));
        assert_eq!(*dev.device.0.lock().unwrap(), [(0x60, 4, vec![])]);
    }
}
