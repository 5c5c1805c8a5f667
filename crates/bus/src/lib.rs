#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter;
mod device;
mod doorbell;
mod error;
mod event_loop;
mod irq;
pub mod pci;
mod plug;
mod slots;
mod space;
mod thread;
mod work;

pub use adapter::{VmDeviceMmio, VmDevicePio};
pub use device::{Access, AccessError, IoDevice, IoDeviceMut};
pub use doorbell::{DoorbellGuard, Doorbells, IoAddr};
pub use error::{Error, Result};
pub use event_loop::{EventLoop, LoopHandle};
pub use irq::{Irq, IrqChip, IrqTarget, MsiMessage, MsiRoute, MsiSource};
pub use plug::{Description, Device, FixedHardware, GuestEvent, Notifier, Plug, Resource, Wiring};
pub use slots::{MemorySlots, SlotGuard};
pub use space::{Bus, BusView};
pub use thread::ThreadSpawner;
pub use work::{ManualSpawner, Pollable, Progress, Registration, Source, Spawn, Task, Turn, Work, spawn};
// The eventfd of vmm-sys-util is the currency of kicks and interrupts.
pub use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
// What a device waits on that must act at a time; a work's source.
pub use vmm_sys_util::timerfd::TimerFd;
