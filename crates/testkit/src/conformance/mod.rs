//! Checks that every virtio device must pass, whatever it is, behind virtio-mmio and on PCI: negotiation, configuration space,
//! queue limits, reset, pause and resume, hostile chains; and on PCI what a guest can do to a function.
//!
//! What a device does with a good request is for its own tests. Each check makes a fresh device, so they can run alone:
//! [`virtio_mmio`] and [`virtio_pci`] run all of them, and the macro [`virtio_conformance!`](crate::virtio_conformance) makes a
//! test of each.

mod life;
pub mod pci;
mod saved;
mod setup;
mod traffic;

use std::sync::Arc;

pub use life::{disables_queues, loses_nothing_when_paused, resets_at_every_point, resets_while_paused};
pub use saved::{
    is_not_saved, loses_nothing_when_restored, restores_at_every_point, restores_what_is_broken,
    survives_damaged_states,
};
pub use setup::{
    is_activated_once, keeps_live_queues, reads_config_consistently, survives_addresses_of_registers,
    survives_kick_storms, survives_overlapping_rings, waits_for_driver_ok,
};

use freestone_bus::{Device, IoDevice, Plug};
use freestone_memory::GuestMem;
use freestone_memory::layout::HOLE_START;

use crate::driver::{
    Arena, DriverQueue, DriverTransport, MmioRegisters, PciRegisters, QueuePart, VirtioDriver, features,
    status,
};
use crate::hostile::{Hostile, Source};
use crate::{Error, Result, TestWiring};

/// Memory of the machine under test.
const MEMORY: u64 = 4 << 20;
/// Descriptors of the queues under test, if the device allows that many.
const QUEUE_SIZE: u16 = 16;
/// Turns in which a device must be through with a queue of nonsense.
const MAX_TURNS: usize = 1000;

/// A device that is plugged in, with a driver for it.
#[derive(Debug)]
pub struct Bench<T: DriverTransport = MmioRegisters> {
    /// The machine.
    pub wiring: TestWiring,
    /// The device.
    pub device: Box<dyn Device>,
    /// Its driver.
    pub driver: VirtioDriver<T>,
    /// Memory for queues and buffers.
    pub arena: Arena,
}

impl Bench {
    /// Plugs a device into a fresh machine; it must claim one range of guest-physical addresses for virtio-mmio registers.
    ///
    /// # Errors
    /// [`Error::Plug`] if it refuses, [`Error::Protocol`] if it claims no addresses.
    pub fn new(device: Box<dyn Plug>) -> Result<Self> {
        Self::on(device)
    }
}

impl Bench<PciRegisters> {
    /// Plugs a device into a fresh machine with a PCI segment, which it must join.
    ///
    /// # Errors
    /// [`Error::Plug`] if it refuses, [`Error::Protocol`] if no virtio function is found afterwards.
    pub fn pci(device: Box<dyn Plug>) -> Result<Self> {
        Self::on(device)
    }
}

impl<T: DriverTransport> Bench<T> {
    /// Plugs a device into a fresh machine, behind any transport.
    ///
    /// # Errors
    /// [`Error::Plug`] if it refuses, [`Error::Protocol`] if it is not found afterwards.
    pub fn on(device: Box<dyn Plug>) -> Result<Self> {
        let memory = GuestMem::anonymous(MEMORY).map_err(|e| {
            Error::Plug(freestone_bus::Error::Io {
                op: "make guest memory for the test",
                source: std::io::Error::other(e),
            })
        })?;
        let mut wiring = TestWiring::new(memory);
        T::prepare(&mut wiring)?;
        let device = device.plug(&mut wiring).map_err(Error::Plug)?;
        let driver = VirtioDriver::on(T::find(&wiring)?);
        Ok(Self { wiring, device, driver, arena: Arena::new(0x1_0000, MEMORY) })
    }

    /// Guest memory.
    pub fn memory(&self) -> GuestMem {
        freestone_bus::Wiring::memory(&self.wiring)
    }

    /// Negotiates those of `wanted` that the device has, makes all its queues live and lets it work.
    ///
    /// # Errors
    /// Whatever the device does not do.
    pub fn start(&mut self, wanted: u64) -> Result<Vec<DriverQueue>> {
        self.driver.negotiate(wanted)?;
        let memory = self.memory();
        let count = self.driver.queue_count()?;
        let queues = (0..count)
            .map(|i| self.driver.setup_queue(&memory, &mut self.arena, i, QUEUE_SIZE))
            .collect::<Result<Vec<_>>>()?;
        self.driver.driver_ok()?;
        Ok(queues)
    }

    /// All of the device's features.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn all_features(&self) -> Result<u64> {
        self.driver.device_features()
    }

    /// As many features and as few as possible, with split rings, and with packed ones if the device has them.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn ring_features(&self) -> Result<Vec<u64>> {
        let all = self.all_features()?;
        let mut sets = vec![all & !features::RING_PACKED, 0];
        if all & features::RING_PACKED != 0 {
            sets.extend([all, features::RING_PACKED]);
        }
        Ok(sets)
    }

    /// Lets the device work until it has nothing to do.
    ///
    /// # Errors
    /// [`Error::Protocol`] if that does not come about.
    pub fn settle(&self) -> Result<()> {
        if self.wiring.run_work(MAX_TURNS) >= MAX_TURNS {
            return Err(Error::protocol(
                "bounded work",
                "2.7",
                format!("still busy after {MAX_TURNS} turns"),
            ));
        }
        Ok(())
    }

    /// Resets the device, and sees that it can be started again.
    ///
    /// # Errors
    /// Whatever the device does not do.
    pub fn recovers(&mut self) -> Result<()> {
        self.driver.transport().restore()?;
        self.driver.reset()?;
        self.arena = Arena::new(0x1_0000, MEMORY);
        self.start(u64::MAX)?;
        self.settle()
    }
}

/// Makes a fresh device.
pub type Make<'a> = &'a dyn Fn() -> Box<dyn Plug>;

fn ensure(
    holds: bool,
    what: &'static str,
    section: &'static str,
    detail: impl FnOnce() -> String,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::protocol(what, section, detail())) }
}

/// The device is found: what its transport says of itself, a status of 0, `VIRTIO_F_VERSION_1`.
///
/// # Errors
/// [`Error::Protocol`].
pub fn is_found<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let bench = Bench::<T>::on(make())?;
    bench.driver.probe()?;
    let now = bench.driver.status()?;
    ensure(now == 0, "status before the driver", "2.1", || format!("{now:#x}"))?;
    let bits = bench.driver.device_features()?;
    ensure(bits & features::VERSION_1 != 0, "VIRTIO_F_VERSION_1", "6.2", || {
        format!("features are {bits:#x}")
    })?;
    ensure(bench.driver.queue_count()? > 0, "queues", "2.7", || "the device has none".to_owned())
}

/// The device agrees to all its features, to as few as possible, and not to one that it does not have.
///
/// # Errors
/// [`Error::Protocol`].
pub fn negotiates_features<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for wanted in bench.ring_features()? {
        bench.driver.negotiate(wanted)?;
    }
    for selector in [2, 3, u32::MAX] {
        let bits = bench.driver.transport().device_features(selector)?;
        ensure(bits == 0, "features beyond 64", "2.2", || format!("selector {selector:#x} gives {bits:#x}"))?;
    }
    let offered = bench.driver.device_features()?;
    for bit in (0..64).map(|n| 1u64 << n).filter(|bit| offered & bit == 0) {
        bench.driver.reset()?;
        bench.driver.add_status(status::ACKNOWLEDGE | status::DRIVER)?;
        bench.driver.set_driver_features(features::VERSION_1 | bit)?;
        bench.driver.add_status(status::FEATURES_OK)?;
        let now = bench.driver.status()?;
        ensure(now & status::FEATURES_OK == 0, "unknown feature", "2.2.2", || {
            format!("FEATURES_OK stays with {bit:#x}, which is not offered")
        })?;
    }
    bench.recovers()
}

/// Reads and writes of the configuration space at any offset and width do no harm.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_config_accesses<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    bench.start(u64::MAX)?;
    let (device, range) = bench.driver.transport().config_range();
    storm(&device, range.start, range.end);
    bench.settle()?;
    bench.recovers()
}

/// Reads and writes of the registers at any offset and width, in any order, do no harm.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_register_accesses<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for (device, range) in bench.driver.transport().register_ranges() {
        storm(&device, range.start, range.end);
    }
    bench.settle()?;
    bench.recovers()?;
    // Arbitrary values, in an order that the specification does not foresee.
    let mut source = Source::seed(11);
    for _ in 0..4000 {
        bench.driver.transport().scribble(&mut source);
    }
    bench.settle()?;
    bench.recovers()
}

/// Accesses of all widths over `from..to`, and a few far out.
fn storm(device: &Arc<dyn IoDevice>, from: u64, to: u64) {
    let far = [u64::MAX, u64::MAX - 3, u64::from(u32::MAX), 0x1000, 0xfff];
    for offset in (from..to).chain(far) {
        for width in [0usize, 1, 2, 3, 4, 5, 7, 8, 16] {
            let mut data = vec![0xff; width];
            // Refusing is as good as taking.
            let _refused = (device.read(offset, &mut data), device.write(offset, &data));
        }
    }
}

/// Queue sizes are within the specification; accesses to queues that do not exist, and sizes that are not allowed, do no harm.
///
/// # Errors
/// [`Error::Protocol`].
pub fn keeps_queue_limits<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    let count = bench.driver.queue_count()?;
    for index in 0..count {
        let max = bench.driver.queue_max(index)?;
        let good = max.is_power_of_two() && max <= 0x8000;
        ensure(good, "queue size", "2.7", || format!("queue {index} may have {max} descriptors"))?;
    }
    for index in [count, count + 1, u16::MAX] {
        let max = bench.driver.queue_max(index)?;
        ensure(max == 0, "missing queue", "4.2.2", || format!("queue {index} has {max} descriptors"))?;
        // No queue is selected: these must go nowhere.
        let transport = bench.driver.transport();
        let _refused = transport.set_queue_size(index, 1);
        let _refused = transport.set_queue_address(index, QueuePart::Descriptors, 1);
        let _refused = transport.set_queue_live(index);
        let _refused = bench.driver.kick(index);
    }
    let max = bench.driver.queue_max(0)?;
    for size in [0, 3, max * 2, max + 1, 0x1_0000, u32::MAX] {
        bench.driver.negotiate(0)?;
        let mut arena = bench.arena.clone();
        let queue = DriverQueue::new(&bench.memory(), &mut arena, QUEUE_SIZE)?;
        bench.driver.describe_queue(0, &queue)?;
        bench.driver.transport().set_queue_size(0, size)?;
        bench.driver.transport().set_queue_live(0)?;
        let _status = bench.driver.add_status(status::DRIVER_OK);
        bench.driver.kick(0)?;
        bench.settle()?;
    }
    bench.recovers()
}

/// Queues in no memory, unaligned, wrapping or over one another do no harm.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_bad_queue_addresses<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    let bad = [0, 1, 0xfff, MEMORY - 1, MEMORY, HOLE_START, u64::from(u32::MAX), u64::MAX, u64::MAX - 0xfff];
    for part in [QueuePart::Descriptors, QueuePart::Driver, QueuePart::Device] {
        for gpa in bad {
            bench.arena = Arena::new(0x1_0000, MEMORY);
            bench.driver.negotiate(0)?;
            let queue = DriverQueue::new(&bench.memory(), &mut bench.arena, QUEUE_SIZE)?;
            bench.driver.describe_queue(0, &queue)?;
            bench.driver.transport().set_queue_address(0, part, gpa)?;
            bench.driver.transport().set_queue_live(0)?;
            // The device may refuse here, or say later that it needs a reset.
            let _status = bench.driver.add_status(status::DRIVER_OK);
            bench.driver.kick(0)?;
            bench.settle()?;
        }
    }
    bench.recovers()
}

/// A reset ends everything, at any time: status, queues and interrupt are gone, and the device can be started again.
///
/// # Errors
/// [`Error::Protocol`].
pub fn resets<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    // Before anything was set up.
    bench.driver.reset()?;
    bench.driver.negotiate(0)?;
    bench.driver.reset()?;
    for wanted in bench.ring_features()?.repeat(2) {
        let queues = bench.start(wanted)?;
        for index in 0..queues.len() {
            bench.driver.kick(u16::try_from(index).unwrap_or(0))?;
        }
        bench.driver.reset()?;
        let why = bench.driver.take_interrupt()?;
        ensure(why == 0, "interrupt status after reset", "4.2.2.1", || format!("{why:#x}"))?;
        for index in 0..queues.len() {
            let live = bench.driver.transport().queue_is_live(u16::try_from(index).unwrap_or(0))?;
            ensure(!live, "queue after reset", "4.2.2.1", || format!("queue {index} is still live"))?;
            // A kick of a queue that is not live.
            bench.driver.kick(u16::try_from(index).unwrap_or(0))?;
        }
        bench.settle()?;
    }
    bench.recovers()
}

/// Pause and resume leave the device as the driver knows it; kicks in between do no harm.
///
/// # Errors
/// [`Error::Lifecycle`] or [`Error::Protocol`].
pub fn pauses_and_resumes<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    // A device that no driver has touched.
    lifecycle(&mut bench, "pause", |d| d.pause())?;
    lifecycle(&mut bench, "resume", |d| d.resume())?;
    let queues = bench.start(u64::MAX)?;
    let before = bench.driver.status()?;
    for _ in 0..2 {
        lifecycle(&mut bench, "pause", |d| d.pause())?;
        bench.driver.kick(0)?;
        bench.settle()?;
        lifecycle(&mut bench, "resume", |d| d.resume())?;
        bench.settle()?;
        let now = bench.driver.status()?;
        ensure(now == before, "status after resume", "2.1", || format!("{now:#x} and not {before:#x}"))?;
        for index in 0..queues.len() {
            let live = bench.driver.transport().queue_is_live(u16::try_from(index).unwrap_or(0))?;
            ensure(live, "queue after resume", "2.7", || format!("queue {index} is not live any more"))?;
        }
    }
    bench.recovers()?;
    lifecycle(&mut bench, "shutdown", |d| d.shutdown())
}

fn lifecycle<T: DriverTransport>(
    bench: &mut Bench<T>,
    op: &'static str,
    act: impl FnOnce(&mut dyn Device) -> freestone_bus::Result<()>,
) -> Result<()> {
    let outcome = act(&mut *bench.device);
    outcome.map_err(|source| Error::Lifecycle { device: bench.device.name().to_owned(), op, source })
}

/// Every case of [`Hostile`] on every queue: the device comes to rest, and works again after a reset.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_hostile_chains<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    let count = bench.driver.queue_count()?;
    for wanted in bench.ring_features()? {
        for (seed, case) in (0..).zip(Hostile::ALL) {
            for index in 0..count {
                bench.arena = Arena::new(0x1_0000, MEMORY);
                let mut queues = bench.start(wanted)?;
                if let Some(queue) = queues.get_mut(usize::from(index)) {
                    case.apply(queue, &mut bench.arena, &mut Source::seed(seed))?;
                }
                bench.driver.kick(index)?;
                bench.settle()?;
                bench.driver.take_interrupt()?;
            }
        }
    }
    bench.recovers()
}

/// One check: its name, and what runs it.
pub type Check = (&'static str, fn(Make<'_>) -> Result<()>);

/// The checks of all transports, on one of them, and those of its own.
macro_rules! checks {
    ($transport:ty, $($own:ident)*) => {
        checks!(
            @list $transport,
            is_found negotiates_features survives_config_accesses survives_register_accesses keeps_queue_limits
            survives_bad_queue_addresses resets pauses_and_resumes survives_hostile_chains
            resets_at_every_point loses_nothing_when_paused resets_while_paused disables_queues
            reads_config_consistently waits_for_driver_ok keeps_live_queues is_activated_once survives_kick_storms
            survives_overlapping_rings survives_addresses_of_registers loses_nothing_when_restored
            restores_at_every_point restores_what_is_broken survives_damaged_states;
            $($own)*
        )
    };
    (@list $transport:ty, $($check:ident)*; $($own:ident)*) => {
        &[$((stringify!($check), $check::<$transport>),)* $((stringify!($own), pci::$own),)*]
    };
}

/// All checks of a virtio-mmio device.
pub const CHECKS: &[Check] = checks!(MmioRegisters,);

/// All checks of a virtio device on PCI.
pub const PCI_CHECKS: &[Check] = checks!(
    PciRegisters,
    describes_itself survives_function_accesses follows_its_bar survives_vector_accesses
    maps_events_to_vectors delivers_what_waited_behind_a_mask opens_a_window
);

/// Runs all [`CHECKS`] on devices that `make` makes.
///
/// # Errors
/// That of the first check that fails.
pub fn virtio_mmio(make: impl Fn() -> Box<dyn Plug>) -> Result<()> {
    CHECKS.iter().try_for_each(|(_, check)| check(&make))
}

/// Runs all [`PCI_CHECKS`] on devices that `make` makes.
///
/// # Errors
/// That of the first check that fails.
pub fn virtio_pci(make: impl Fn() -> Box<dyn Plug>) -> Result<()> {
    PCI_CHECKS.iter().try_for_each(|(_, check)| check(&make))
}

/// Makes a test of each of the [`conformance`](crate::conformance) checks of a virtio-mmio device, in a module of the given name.
///
/// ```
/// # use freestone_bus::{Device, Plug, Wiring};
/// # struct MyDevice;
/// # impl Plug for MyDevice {
/// #     fn plug(self: Box<Self>, _: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> { Ok(self) }
/// # }
/// # impl Device for MyDevice {
/// #     fn name(&self) -> &str { "mine" }
/// # }
/// freestone_testkit::virtio_mmio_conformance!(my_device, || Box::new(super::MyDevice));
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! virtio_mmio_conformance {
    ($name:ident, $make:expr $(, $not_saved:ident)?) => {
        #[cfg(test)]
        mod $name {
            $crate::virtio_conformance!(@common $make, MmioRegisters);
            $crate::virtio_conformance!(@saved $make, MmioRegisters $(, $not_saved)?);
        }
    };
}

/// As [`virtio_mmio_conformance!`](crate::virtio_mmio_conformance), for a virtio device on PCI.
#[macro_export]
macro_rules! virtio_pci_conformance {
    ($name:ident, $make:expr $(, $not_saved:ident)?) => {
        #[cfg(test)]
        mod $name {
            $crate::virtio_conformance!(@common $make, PciRegisters);
            $crate::virtio_conformance!(@saved $make, PciRegisters $(, $not_saved)?);
            $crate::virtio_conformance!(
                @pci $make,
                describes_itself survives_function_accesses follows_its_bar survives_vector_accesses
                maps_events_to_vectors delivers_what_waited_behind_a_mask opens_a_window
            );
        }
    };
}

/// Makes a test of each of the [`conformance`](crate::conformance) checks on both transports, in the modules `mmio` and `pci` of a
/// module of the given name. The two expressions make the same device for each transport.
///
/// A device that has no way to be saved says so by `not_saved` after the two expressions; the checks of save and restore are then
/// left out, and it is checked that the device refuses.
///
/// ```
/// # use freestone_bus::{Device, Plug, Wiring};
/// # struct MyDevice(bool);
/// # impl Plug for MyDevice {
/// #     fn plug(self: Box<Self>, _: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> { Ok(self) }
/// # }
/// # impl Device for MyDevice {
/// #     fn name(&self) -> &str { "mine" }
/// # }
/// use freestone_bus as bus;
///
/// fn make(on_pci: bool) -> Box<dyn bus::Plug> {
///     Box::new(MyDevice(on_pci))
/// }
///
/// freestone_testkit::virtio_conformance!(my_device, mmio: || crate::make(false), pci: || crate::make(true));
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! virtio_conformance {
    ($name:ident, mmio: $mmio:expr, pci: $pci:expr $(,)?) => {
        #[cfg(test)]
        mod $name {
            $crate::virtio_mmio_conformance!(mmio, $mmio);
            $crate::virtio_pci_conformance!(pci, $pci);
        }
    };
    ($name:ident, mmio: $mmio:expr, pci: $pci:expr, not_saved $(,)?) => {
        #[cfg(test)]
        mod $name {
            $crate::virtio_mmio_conformance!(mmio, $mmio, not_saved);
            $crate::virtio_pci_conformance!(pci, $pci, not_saved);
        }
    };
    (@saved $make:expr, $transport:ident) => {
        $crate::virtio_conformance!(
            @each $make, $transport,
            loses_nothing_when_restored restores_at_every_point restores_what_is_broken survives_damaged_states
        );
    };
    (@saved $make:expr, $transport:ident, not_saved) => {
        $crate::virtio_conformance!(@each $make, $transport, is_not_saved);
    };
    (@common $make:expr, $transport:ident) => {
        $crate::virtio_conformance!(
            @each $make, $transport,
            is_found negotiates_features survives_config_accesses survives_register_accesses keeps_queue_limits
            survives_bad_queue_addresses resets pauses_and_resumes survives_hostile_chains
            resets_at_every_point loses_nothing_when_paused resets_while_paused disables_queues
            reads_config_consistently waits_for_driver_ok keeps_live_queues is_activated_once survives_kick_storms
            survives_overlapping_rings survives_addresses_of_registers
        );
    };
    (@each $make:expr, $transport:ident, $($check:ident)*) => {
        $(
            #[test]
            fn $check() {
                if let Err(error) = $crate::conformance::$check::<$crate::driver::$transport>(&$make) {
                    panic!("{error} ({error:?})");
                }
            }
        )*
    };
    (@pci $make:expr, $($check:ident)*) => {
        $(
            #[test]
            fn $check() {
                if let Err(error) = $crate::conformance::pci::$check(&$make) {
                    panic!("{error} ({error:?})");
                }
            }
        )*
    };
}
