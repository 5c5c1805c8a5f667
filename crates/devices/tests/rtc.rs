//! What a guest sees of the real-time clock.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
#![expect(dead_code, reason = "the bench serves several tests")]

mod bench;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bench::Bench;
use freestone_bus::Device;
use freestone_devices::{RTC_PORT, RtcPlug};
use proptest::prelude::*;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REG_A: u8 = 0xa;
const REG_B: u8 = 0xb;
const REG_C: u8 = 0xc;
const REG_D: u8 = 0xd;
const CENTURY: u8 = 0x32;

const SET: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;

/// 29 February 2024, 13:45:59 UTC, a Thursday.
const LEAP_DAY: u64 = 1_709_214_359;

/// A machine with a clock whose host time the test sets.
struct Machine {
    bench: Bench,
    host: Arc<Mutex<Duration>>,
    _rtc: Box<dyn Device>,
}

impl Machine {
    fn at(unix: u64) -> Self {
        let host = Arc::new(Mutex::new(Duration::from_secs(unix)));
        let mut bench = Bench::new();
        let clock = Arc::clone(&host);
        let plug = RtcPlug::with_clock(move || SystemTime::UNIX_EPOCH + *clock.lock().unwrap());
        let rtc = bench.plug(plug.nvram(0x40, 0x99).nvram(REG_D, 0));
        Self { bench, host, _rtc: rtc }
    }

    fn pass(&self, time: Duration) {
        *self.host.lock().unwrap() += time;
    }

    fn get(&self, index: u8) -> u8 {
        self.bench.outb(RTC_PORT, index);
        self.bench.inb(RTC_PORT + 1)
    }

    fn set(&self, index: u8, value: u8) {
        self.bench.outb(RTC_PORT, index);
        self.bench.outb(RTC_PORT + 1, value);
    }

    /// Century, year, month, day, hours, minutes, seconds, as the registers have them.
    fn time(&self) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| self.get(index))
    }

    /// Sets the time as drivers do: with the clock stopped.
    fn set_time(&self, format: u8, time: [u8; 7]) {
        self.set(REG_B, format | SET);
        for (index, value) in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].into_iter().zip(time) {
            self.set(index, value);
        }
        self.set(REG_B, format);
    }
}

#[test]
fn the_clock_starts_in_bcd_with_24_hours_at_the_hosts_time_in_utc() {
    let m = Machine::at(LEAP_DAY);
    assert_eq!(m.get(REG_B), HOURS_24);
    assert_eq!(m.time(), [0x20, 0x24, 0x02, 0x29, 0x13, 0x45, 0x59]);
    assert_eq!(m.get(WEEKDAY), 5);
    m.pass(Duration::from_secs(1));
    assert_eq!(m.time(), [0x20, 0x24, 0x02, 0x29, 0x13, 0x46, 0x00]);
}

#[test]
fn binary_format_is_honoured() {
    let m = Machine::at(LEAP_DAY);
    m.set(REG_B, BINARY | HOURS_24);
    assert_eq!(m.time(), [20, 24, 2, 29, 13, 45, 59]);
}

#[test]
fn a_12_hour_clock_has_12_hours_and_an_afternoon_bit() {
    let midnight = LEAP_DAY - LEAP_DAY % 86_400;
    for (hour, bcd) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
        let m = Machine::at(midnight + hour * 3600);
        m.set(REG_B, 0);
        assert_eq!(m.get(HOURS), bcd, "hour {hour}");
        m.set(REG_B, BINARY);
        let binary = (bcd & 0x80) | (((bcd & 0x70) >> 4) * 10 + (bcd & 0xf));
        assert_eq!(m.get(HOURS), binary, "hour {hour}");
    }
}

#[test]
fn the_nmi_bit_of_the_index_is_ignored_and_the_index_cannot_be_read() {
    let m = Machine::at(LEAP_DAY);
    assert_eq!(m.get(0x80 | SECONDS), 0x59);
    assert_eq!(m.bench.inb(RTC_PORT), 0xff);
}

#[test]
fn a_time_that_the_guest_sets_goes_on_from_there() {
    let m = Machine::at(LEAP_DAY);
    m.set_time(HOURS_24, [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    assert_eq!(m.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    assert_eq!(m.get(WEEKDAY), 6);
    m.pass(Duration::from_secs(2));
    assert_eq!(m.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn the_clock_stands_still_while_it_is_being_set() {
    let m = Machine::at(LEAP_DAY);
    m.set(REG_B, SET | HOURS_24);
    m.pass(Duration::from_secs(100));
    assert_eq!(m.get(SECONDS), 0x59);
    assert_eq!(m.get(MINUTES), 0x45);
}

#[test]
fn a_single_register_can_be_set_while_the_clock_runs() {
    let m = Machine::at(LEAP_DAY);
    m.set(MINUTES, 0x10);
    assert_eq!(m.time(), [0x20, 0x24, 0x02, 0x29, 0x13, 0x10, 0x59]);
}

#[test]
fn nonsense_does_not_set_the_clock() {
    let m = Machine::at(LEAP_DAY);
    m.set(MONTH, 0x13);
    m.set(HOURS, 0xff);
    m.set_time(HOURS_24, [0xff; 7]);
    m.set_time(HOURS_24, [0x20, 0x23, 0x02, 0x29, 0x00, 0x00, 0x00]);
    assert_eq!(m.time(), [0x20, 0x24, 0x02, 0x29, 0x13, 0x45, 0x59]);
}

#[test]
fn ram_keeps_what_is_written_and_what_the_embedder_put_there() {
    let m = Machine::at(LEAP_DAY);
    assert_eq!(m.get(0x40), 0x99);
    for index in (0x0e..=0x7f).filter(|index| *index != CENTURY) {
        m.set(index, index ^ 0x5a);
    }
    for index in (0x0e..=0x7f).filter(|index| *index != CENTURY) {
        assert_eq!(m.get(index), index ^ 0x5a);
    }
}

#[test]
fn alarm_registers_are_kept() {
    let m = Machine::at(LEAP_DAY);
    for (index, value) in [(1, 0x30), (3, 0x15), (5, 0xc0)] {
        m.set(index, value);
        assert_eq!(m.get(index), value);
    }
}

#[test]
fn the_time_and_ram_are_always_valid() {
    let m = Machine::at(LEAP_DAY);
    m.set(REG_D, 0);
    assert_eq!(m.get(REG_D), 0x80);
}

#[test]
fn an_update_is_in_progress_just_before_each_second_and_at_no_other_time() {
    let m = Machine::at(LEAP_DAY);
    assert_eq!(m.get(REG_A), 0x26);
    m.pass(Duration::from_micros(997_771));
    assert_eq!(m.get(REG_A), 0x26);
    m.pass(Duration::from_micros(1));
    assert_eq!(m.get(REG_A), 0xa6);
    m.pass(Duration::from_micros(2228));
    assert_eq!(m.get(REG_A), 0x26);
    assert_eq!(m.get(SECONDS), 0x00, "the new time is there when the update ends");
}

#[test]
fn no_update_is_in_progress_while_the_clock_is_being_set() {
    let m = Machine::at(LEAP_DAY);
    m.pass(Duration::from_millis(999));
    m.set(REG_B, SET | HOURS_24 | 0x10);
    assert_eq!(m.get(REG_A) & 0x80, 0);
    assert_eq!(m.get(REG_B), SET | HOURS_24, "setting clears the update-ended interrupt enable");
}

#[test]
fn update_in_progress_cannot_be_written() {
    let m = Machine::at(LEAP_DAY);
    m.set(REG_A, 0xff);
    assert_eq!(m.get(REG_A), 0x7f);
}

#[test]
fn a_poller_of_register_c_sees_updates_and_periods_once_each() {
    let m = Machine::at(LEAP_DAY);
    assert_eq!(m.get(REG_C), 0);
    m.pass(Duration::from_micros(976));
    assert_eq!(m.get(REG_C), 0, "1024 Hz is a period of 976.6 us");
    m.pass(Duration::from_micros(977));
    assert_eq!(m.get(REG_C), 0x40);
    assert_eq!(m.get(REG_C), 0);
    m.set(REG_A, 0x20);
    m.pass(Duration::from_secs(1));
    assert_eq!(m.get(REG_C), 0x10, "the time was updated; rate 0 has no periods");
    m.set(REG_B, HOURS_24 | 0x10);
    m.pass(Duration::from_secs(1));
    assert_eq!(m.get(REG_C), 0x90, "an enabled flag is an interrupt request");
}

#[test]
fn a_host_clock_before_1970_or_far_ahead_is_shown_as_well_as_can_be() {
    let m = Machine::at(253_402_300_799);
    m.pass(Duration::from_secs(10_000));
    assert_eq!(m.time(), [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    let mut bench = Bench::new();
    let _rtc = bench.plug(RtcPlug::with_clock(|| SystemTime::UNIX_EPOCH - Duration::from_secs(1)));
    bench.outb(RTC_PORT, YEAR);
    assert_eq!(bench.inb(RTC_PORT + 1), 0x69);
}

#[test]
fn a_host_clock_that_is_set_back_upsets_nothing() {
    let m = Machine::at(LEAP_DAY);
    m.get(REG_C);
    *m.host.lock().unwrap() = Duration::ZERO;
    assert_eq!(m.time(), [0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(m.get(REG_C), 0x10);
}

proptest! {
    #[test]
    fn every_time_comes_back_as_it_was_set_in_every_format(
        century in 0_u8..100, year in 0_u8..100, month in 1_u8..13, day in 1_u8..29,
        hour in 0_u8..24, minute in 0_u8..60, second in 0_u8..60,
        format in prop::sample::select(vec![0, HOURS_24, BINARY, BINARY | HOURS_24])
    ) {
        let number = |n: u8| if format & BINARY != 0 { n } else { n / 10 * 16 + n % 10 };
        let hours = match (format & HOURS_24 != 0, hour) {
            (true, _) => number(hour),
            (false, 0) => number(12),
            (false, 1..=12) => number(hour) | if hour == 12 { 0x80 } else { 0 },
            (false, _) => number(hour - 12) | 0x80,
        };
        let time =
            [number(century), number(year), number(month), number(day), hours, number(minute), number(second)];
        let m = Machine::at(LEAP_DAY);
        m.set_time(format, time);
        prop_assert_eq!(m.time(), time);
    }
}
