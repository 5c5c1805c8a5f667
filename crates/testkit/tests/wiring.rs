//! A machine for one device, and what a test sees of it.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use freestone_bus::{
    Access, Device, EFD_NONBLOCK, Error, EventFd, GuestEvent, IoAddr, IoDevice, Plug, Progress, Source,
    Wiring, Work, spawn,
};
use freestone_memory::GuestMem;
use freestone_testkit::TestWiring;

struct Silent;

impl IoDevice for Silent {
    fn read(&self, _: u64, data: &mut [u8]) -> Access {
        data.fill(7);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Access {
        Ok(())
    }
}

struct Named(&'static str);

impl Device for Named {
    fn name(&self) -> &str {
        self.0
    }
}

/// Claims one of everything.
struct Greedy;

impl Plug for Greedy {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let base = wiring.alloc_mmio(0x200)?;
        wiring.mmio(base, 0x200, Arc::new(Silent))?;
        wiring.pio(0x60, 5, Arc::new(Silent))?;
        let (_, irq) = wiring.irq(None)?;
        irq.trigger().unwrap();
        wiring.notifier().notify(GuestEvent::PowerOff);
        Ok(Box::new(Named("greedy")))
    }
}

fn wiring() -> TestWiring {
    TestWiring::new(GuestMem::anonymous(1 << 20).unwrap())
}

#[test]
fn a_device_gets_what_it_asks_for_and_the_test_sees_it() {
    let mut wiring = wiring();
    let device = wiring.plug(Greedy).unwrap();
    assert_eq!(device.name(), "greedy");
    let (base, len) = wiring.mmio_range(0).unwrap();
    assert_eq!((base % 0x1000, len), (0, 0x200));
    let mut data = [0];
    wiring.mmio_bus().view().read(base, &mut data).unwrap();
    wiring.pio_bus().view().read(0x64, &mut data).unwrap();
    wiring.mmio_device(0).unwrap().read(0, &mut data).unwrap();
    assert_eq!(data, [7]);
    assert!(wiring.mmio_device(1).is_none() && wiring.pio_device(0).is_some());
    assert_eq!(wiring.edges(wiring.lines()[0]), 1);
    assert_eq!(wiring.events(), [GuestEvent::PowerOff]);
}

#[test]
fn two_devices_get_different_addresses_and_lines_and_may_not_share_ports() {
    let mut wiring = wiring();
    wiring.plug(Greedy).unwrap();
    wiring.plug(Greedy).unwrap_err();
    assert_ne!(wiring.mmio_range(0), wiring.mmio_range(1));
    let (line, _) = wiring.irq(Some(4)).unwrap();
    assert_eq!(line, 4);
    assert!(matches!(wiring.irq(Some(4)), Err(Error::Exhausted { .. })));
}

#[test]
fn device_address_space_and_lines_run_out() {
    let mut wiring = wiring();
    assert!(wiring.alloc_mmio(1 << 40).is_err() && wiring.alloc_mmio(u64::MAX).is_err());
    let taken = (0..100).take_while(|_| wiring.irq(None).is_ok()).count();
    assert_eq!(taken, 19);
}

#[test]
fn a_guest_write_goes_to_the_doorbell_if_there_is_one_and_to_the_bus_otherwise() {
    let mut wiring = wiring().with_doorbells();
    wiring.plug(Greedy).unwrap();
    let (base, _) = wiring.mmio_range(0).unwrap();
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let guard = wiring.doorbells().unwrap().bind(IoAddr::Mmio(base), None, &fd).unwrap();
    assert_eq!(wiring.doorbells_bound(), 1);
    wiring.guest_mmio_write(base, &[0; 4]).unwrap();
    assert_eq!(fd.read().unwrap(), 1);
    drop(guard);
    wiring.guest_mmio_write(base, &[0; 4]).unwrap();
    assert!(fd.read().is_err());
    wiring.guest_mmio_write(base + 0x10_0000, &[0; 4]).unwrap_err();
}

struct Countdown(u32);

impl Work for Countdown {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn process(&mut self) -> Progress {
        self.0 = self.0.saturating_sub(1);
        if self.0 == 0 { Progress::Idle } else { Progress::More }
    }
}

#[test]
fn work_runs_when_the_test_says_so() {
    let wiring = wiring();
    let task = spawn(&*wiring.spawner(), Countdown(3)).unwrap();
    assert_eq!(task.with(|w| w.0), Some(3));
    assert_eq!(wiring.run_work(100), 3);
    assert_eq!(task.with(|w| w.0), Some(0));
}
