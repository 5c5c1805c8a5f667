//! The guest of the bench under raw KVM calls: one `match` on the exit reason, and a device that is a local variable.

use freestone_benches::Fallible;
use freestone_benches::floor::{Order, Vm};
use freestone_benches::image::Image;
use freestone_guest::exits::{Command, DONE};
use freestone_guest::{DONE_PORT, EXITS, PARAMS};
use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO};

use crate::Subject;
use crate::devices::{MMIO, PORT, value};

/// Memory of the VM, in bytes.
const MEMORY: u64 = 16 << 20;

/// The floor.
#[derive(Debug)]
pub(crate) struct Raw {
    vm: Vm,
    register: u32,
}

impl Raw {
    pub(crate) fn new() -> Fallible<Self> {
        let mut vm = Vm::new(MEMORY, Order::MemoryFirst)?;
        vm.boot(&Image::new(EXITS).ok_or("the guest is not an image")?)?;
        let mut raw = Self { vm, register: 0 };
        raw.round()?;
        Ok(raw)
    }

    /// Handles port I/O; whether the guest called the done port.
    #[inline]
    fn port_io(&mut self) -> Fallible<bool> {
        // SAFETY: the exit reason says that this is the member of the union; it is made of integers.
        let io = unsafe { self.vm.page().__bindgen_anon_1.io };
        let size = usize::from(io.size).max(1);
        let data = self.vm.port_data(io.data_offset, size * usize::try_from(io.count)?);
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            if io.port == PORT {
                for access in data.chunks(size) {
                    self.register = value(access);
                }
            } else if io.port == DONE_PORT {
                return if data == [DONE] { Ok(true) } else { Err("the guest refused a command".into()) };
            }
        } else if io.port == PORT {
            for access in data.chunks_mut(size) {
                for (to, from) in access.iter_mut().zip(self.register.to_le_bytes()) {
                    *to = from;
                }
            }
        }
        Ok(false)
    }

    #[inline]
    fn mmio(&mut self) {
        // SAFETY: the exit reason says that this is the member of the union; it is made of integers.
        let mmio = unsafe { &mut self.vm.page().__bindgen_anon_1.mmio };
        if mmio.phys_addr == MMIO {
            if mmio.is_write != 0 {
                self.register = u32::from_le_bytes([mmio.data[0], mmio.data[1], mmio.data[2], mmio.data[3]]);
            } else if let Some(to) = mmio.data.first_chunk_mut() {
                *to = self.register.to_le_bytes();
            }
        }
    }
}

impl Subject for Raw {
    fn command(&mut self, command: Command) -> Fallible<()> {
        Ok(self.vm.write(PARAMS, &command.to_bytes())?)
    }

    fn round(&mut self) -> Fallible<()> {
        loop {
            match self.vm.run()? {
                KVM_EXIT_IO => {
                    if self.port_io()? {
                        return Ok(());
                    }
                }
                KVM_EXIT_MMIO => self.mmio(),
                reason => return Err(format!("the guest ended with exit reason {reason}").into()),
            }
        }
    }
}
