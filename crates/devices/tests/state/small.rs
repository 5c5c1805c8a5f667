//! The devices of a few registers.

use std::time::SystemTime;

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
