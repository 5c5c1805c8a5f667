//! pvpanic: a port by which the guest's kernel says that it panicked (QEMU's `docs/specs/pvpanic`).

use freestone_bus::{Description, Device, GuestEvent, Notifier, Plug, Resource, Result, Wiring};

use crate::isa::{self, BytePorts, byte_device};

/// Port of the device.
pub const PVPANIC_PORT: u16 = 0x505;

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and handles that itself, in a crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The panic port: a read gives the events it knows, a write reports them.
#[derive(Debug)]
pub struct PvPanic {
    notifier: Notifier,
}

impl PvPanic {
    /// A port that reports to `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Self { notifier }
    }
}

impl BytePorts for PvPanic {
    const PORTS: u8 = 1;

    fn inb(&mut self, _port: u8) -> u8 {
        PANICKED | CRASH_LOADED
    }

    fn outb(&mut self, _port: u8, value: u8) {
        if value & PANICKED != 0 {
            self.notifier.notify(GuestEvent::Panicked);
        }
        if value & CRASH_LOADED != 0 {
            self.notifier.notify(GuestEvent::CrashLoaded);
        }
    }
}

byte_device!(PvPanic);

/// Plugs a [`PvPanic`] in at [`PVPANIC_PORT`], announced as `QEMU0001`.
#[derive(Debug, Default)]
pub struct PvPanicPlug(());

impl PvPanicPlug {
    /// The device at its usual port.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Plug for PvPanicPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let device = PvPanic::new(wiring.notifier());
        let device = isa::plug_stateless(wiring, "pvpanic", PVPANIC_PORT, device)?;
        wiring.describe(Description {
            hid: "QEMU0001",
            resources: vec![Resource::Pio { base: PVPANIC_PORT, len: 1 }],
        });
        Ok(device)
    }
}
