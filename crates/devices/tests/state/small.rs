//! The devices of a few registers.

use std::time::SystemTime;

use freestone_bus::FixedHardware;
use freestone_memory::layout::GENERATION_ID;
use freestone_memory::{Bytes, GuestAddress};

use super::*;

fn clock(seconds: u64) -> impl Fn() -> SystemTime + Send + 'static {
    move || SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)
}

fn rtc(bench: &Bench, register: u8) -> u8 {
    bench.outb(RTC_PORT, register);
    bench.inb(RTC_PORT + 1)
}

fn set_rtc(bench: &Bench, register: u8, value: u8) {
    bench.outb(RTC_PORT, register);
    bench.outb(RTC_PORT + 1, value);
}

#[test]
fn a_restored_clock_shows_the_time_of_its_host_shifted_as_its_guest_set_it() {
    // 2001-09-09 01:46:40 UTC.
    let mut saved = Plugged::new(RtcPlug::with_clock(clock(1_000_000_000)));
    set_rtc(&saved.bench, 0x04, 0x05);
    assert_eq!([0x04, 0x02, 0x00].map(|register| rtc(&saved.bench, register)), [0x05, 0x46, 0x40]);
    let restored = saved.restored(RtcPlug::with_clock(clock(1_000_000_000 + 75)));
    assert_eq!([0x04, 0x02, 0x00].map(|register| rtc(&restored.bench, register)), [0x05, 0x47, 0x55]);
}

#[test]
fn a_clock_that_is_being_set_is_restored_in_the_middle_of_it() {
    let mut saved = Plugged::new(RtcPlug::with_clock(clock(1_000_000_000)));
    set_rtc(&saved.bench, 0x0b, 0x06);
    set_rtc(&saved.bench, 0x0b, 0x86);
    set_rtc(&saved.bench, 0x00, 7);
    set_rtc(&saved.bench, 0x40, 0xa5);
    let restored = saved.restored(RtcPlug::with_clock(clock(2_000_000_000)));
    assert_eq!(restored.bench.inb(RTC_PORT + 1), 0xa5, "the index is the one that was chosen");
    assert_eq!(rtc(&restored.bench, 0x0b), 0x86);
    assert_eq!([0x00, 0x09].map(|register| rtc(&restored.bench, register)), [7, 1]);
    set_rtc(&restored.bench, 0x0b, 0x06);
    assert_eq!(
        [0x00, 0x09].map(|register| rtc(&restored.bench, register)),
        [7, 1],
        "the guest's time counts"
    );
}

#[test]
fn the_sleep_control_register_is_restored_and_does_not_act() {
    let mut saved = Plugged::new(PowerPlug::new());
    saved.bench.outb(SLEEP_CONTROL_PORT, S5_TYPE << 2);
    let restored = saved.restored(PowerPlug::new());
    assert_eq!(restored.bench.inb(SLEEP_CONTROL_PORT), S5_TYPE << 2);
    assert_eq!(restored.bench.events(), []);
}

#[test]
fn the_progress_port_gives_the_last_value_after_a_restore_and_reports_nothing() {
    let mut saved = Plugged::new(ProgressPlug::new());
    saved.bench.outb(PROGRESS_PORT, 0x7b);
    let restored = saved.restored(ProgressPlug::new());
    assert_eq!(restored.bench.inb(PROGRESS_PORT), 0x7b);
    assert_eq!(restored.bench.events(), []);
}

#[test]
fn a_restored_pci_root_has_the_address_that_the_guest_chose() {
    let mut saved = Plugged::new(PciRootPlug::new());
    saved.bench.pio.view().write(PCI_CONFIG_PORT.into(), &0x8000_0008_u32.to_le_bytes()).unwrap();
    let restored = saved.restored(PciRootPlug::new());
    let mut class = [0; 4];
    restored.bench.pio.view().read(u64::from(PCI_CONFIG_PORT) + 4, &mut class).unwrap();
    assert_eq!(class, 0x0600_0000_u32.to_le_bytes());
}

#[test]
fn devices_that_remember_nothing_write_nothing_and_take_nothing() {
    let mut ports = [Plugged::new(PvPanicPlug::new()), Plugged::new(DebugPlug::new(Screen::default()))];
    for port in &mut ports {
        let saved = save(&mut *port.device);
        assert!(saved.is_empty());
        restore(&mut *port.device, saved.into_sections(header())).unwrap();
    }
}

fn generation(bench: &Bench) -> [u8; 16] {
    bench.memory.view().read_obj(GuestAddress(GENERATION_ID)).unwrap()
}

#[test]
fn every_machine_has_a_generation_id_of_its_own_where_it_is_announced() {
    let (first, second) = (VmGenIdPlug::new(), VmGenIdPlug::new());
    let id = first.handle();
    assert_eq!(id.id(), [0; 16]);
    let (first, second) = (Plugged::new(first), Plugged::new(second));
    assert_eq!(generation(&first.bench), id.id());
    assert_ne!(generation(&first.bench), generation(&second.bench));
    assert_eq!(first.bench.fixed, [FixedHardware::GenerationId { address: GENERATION_ID, gsi: 5 }]);
    assert_eq!(first.bench.edges(5), 0);
}

#[test]
fn a_machine_that_is_saved_and_goes_on_keeps_its_generation_id() {
    let mut machine = Plugged::new(VmGenIdPlug::new());
    let before = generation(&machine.bench);
    machine.device.pause().unwrap();
    save(&mut *machine.device);
    machine.device.resume().unwrap();
    assert_eq!((generation(&machine.bench), machine.bench.edges(5)), (before, 0));
}

#[test]
fn a_restored_machine_has_another_generation_id_before_its_guest_runs_and_is_told_once() {
    let mut saved = Plugged::new(VmGenIdPlug::new());
    let plug = VmGenIdPlug::new();
    let id = plug.handle();
    let mut restored = Plugged::new(plug);
    restore(&mut *restored.device, save(&mut *saved.device).into_sections(header())).unwrap();
    // Memory comes from the image, at any time before the machine goes on.
    let old = generation(&saved.bench);
    restored.bench.memory.view().write_slice(&old, GuestAddress(GENERATION_ID)).unwrap();
    restored.device.resume().unwrap();
    let new = generation(&restored.bench);
    assert!(new != old && new == id.id());
    assert_eq!(restored.bench.edges(5), 1);
    restored.device.pause().unwrap();
    restored.device.resume().unwrap();
    assert_eq!((generation(&restored.bench), restored.bench.edges(5)), (new, 1));
}

#[test]
fn a_generation_id_can_be_renewed_at_any_time_and_outlives_no_machine() {
    let plug = VmGenIdPlug::new();
    let id = plug.handle();
    let machine = Plugged::new(plug);
    let before = generation(&machine.bench);
    id.renew().unwrap();
    assert_ne!(generation(&machine.bench), before);
    assert_eq!(machine.bench.edges(5), 1);
    let Plugged { bench, device } = machine;
    drop(device);
    let last = generation(&bench);
    id.renew().unwrap();
    assert_eq!((generation(&bench), bench.edges(5)), (last, 1));
}

#[test]
fn an_event_device_on_another_line_than_the_saved_one_is_refused() {
    let mut saved = Plugged::new(PowerButtonPlug::new());
    let mut bench = Bench::new();
    bench.plug(VmGenIdPlug::new());
    let mut other = bench.plug(PowerButtonPlug::new());
    let error = restore(&mut *other, save(&mut *saved.device).into_sections(header())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved state of device power button does not fit: interrupt line, which the guest knows, 0x5"
    );
}

#[test]
fn a_power_button_interrupts_once_for_each_press() {
    let plug = PowerButtonPlug::new();
    let button = plug.handle();
    button.press().unwrap_err();
    let mut saved = Plugged::new(plug);
    assert_eq!(saved.bench.fixed, [FixedHardware::PowerButton { gsi: 5 }]);
    button.press().unwrap();
    button.press().unwrap();
    assert_eq!(saved.bench.edges(5), 2);
    assert_eq!(saved.restored(PowerButtonPlug::new()).bench.edges(5), 0);
    drop(saved);
    button.press().unwrap_err();
}
