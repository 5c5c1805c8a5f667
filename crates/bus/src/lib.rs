#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter;
mod device;
mod doorbell;
mod error;
mod event_loop;
mod irq;
mod plug;
mod space;
mod work;

pub use adapter::{VmDeviceMmio, VmDevicePio};
pub use device::{Access, AccessError, IoDevice, IoDeviceMut};
pub use doorbell::{DoorbellGuard, Doorbells, IoAddr};
pub use error::{Error, Result};
pub use event_loop::{EventLoop, LoopHandle};
pub use irq::{Irq, IrqChip, IrqTarget};
pub use plug::{Description, Device, FixedHardware, GuestEvent, Notifier, Plug, Resource, Wiring};
pub use space::{Bus, BusView};
pub use work::{ManualSpawner, Pollable, Progress, Registration, Source, Spawn, Task, Turn, Work, spawn};
// The eventfd of vmm-sys-util is the currency of kicks and interrupts.
pub use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
