//! The CMOS real-time clock: an MC146818 with battery-backed RAM.
//!
//! The time is the host's, in UTC, shifted by what the guest sets. There is no interrupt line: alarms never go off, and the
//! flags of register C are for guests that poll them. Power-off keeps nothing.

use std::fmt;
use std::time::{Duration, SystemTime};

use freestone_bus::{Description, Device, FixedHardware, Plug, Resource, Result, Wiring};

use crate::date::{DateTime, MAX_UNIX, MIN_UNIX, weekday};
use crate::isa::{self, BytePorts, Saved, byte_device};
use crate::state::{RtcState, bad, check};

/// First port of the clock: index at +0, data at +1.
pub const RTC_PORT: u16 = 0x70;
/// Index of the century register (FADT `CENTURY`).
pub const CENTURY_INDEX: u8 = 0x32;

const INDEX_PORT: u8 = 0;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;

/// The registers that make up the time.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY_INDEX];

/// Register A: an update is in progress, or will be within 244 us.
const A_UIP: u8 = 1 << 7;
/// Register A after power-on: 32.768 kHz time base, periodic rate 1024 Hz.
const A_DEFAULT: u8 = 0x26;
/// Register B: the time registers are being set and stand still.
const B_SET: u8 = 1 << 7;
/// Register B: update-ended interrupt enable, which SET clears.
const B_UIE: u8 = 1 << 4;
/// Register B: registers are binary, not BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: hours count to 24, not to 12 with [`PM`].
const B_24H: u8 = 1 << 1;
/// Register C: one of the flags below is set and enabled.
const C_IRQF: u8 = 1 << 7;
/// Register C: the periodic interval passed.
const C_PF: u8 = 1 << 6;
/// Register C: the time was updated.
const C_UF: u8 = 1 << 4;
/// Register D: RAM and time are valid.
const D_VRT: u8 = 1 << 7;
/// In the hours register of a 12-hour clock: after noon.
const PM: u8 = 1 << 7;

const NANOS_PER_SECOND: i128 = 1_000_000_000;
/// The last part of each second, in which UIP is set: 244 us of warning and 1984 us of update. The real chip updates after the
/// second's end; here the new time is there when UIP falls, all the same.
const UPDATE_NANOS: i128 = 2_228_000;

/// An MC146818 real-time clock.
pub struct Rtc {
    clock: Box<dyn Fn() -> SystemTime + Send>,
    index: u8,
    /// RAM, and while SET is on the time registers as they stand.
    ram: [u8; 128],
    reg_a: u8,
    reg_b: u8,
    /// What the guest's time is ahead of the host's, in seconds.
    ahead: i64,
    /// When register C was last read, in host nanoseconds since 1970.
    flags_read: i128,
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(SystemTime::now)
    }

    /// A clock that shows what `clock` says, for tests and for machines whose time is not the host's.
    pub fn with_clock(clock: impl Fn() -> SystemTime + Send + 'static) -> Self {
        let mut rtc = Self {
            clock: Box::new(clock),
            index: 0,
            ram: [0; 128],
            reg_a: A_DEFAULT,
            reg_b: B_24H,
            ahead: 0,
            flags_read: 0,
        };
        rtc.flags_read = rtc.host_nanos();
        rtc
    }

    /// Host nanoseconds since 1970, which may be negative.
    fn host_nanos(&self) -> i128 {
        let nanos = |d: Duration| i128::try_from(d.as_nanos()).unwrap_or(i128::MAX);
        match (self.clock)().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => nanos(after),
            Err(before) => -nanos(before.duration()),
        }
    }

    /// The guest's time in seconds since 1970.
    fn now(&self) -> i64 {
        let host = self.host_nanos().div_euclid(NANOS_PER_SECOND);
        let host = i64::try_from(host).unwrap_or(if host < 0 { i64::MIN } else { i64::MAX });
        host.saturating_add(self.ahead).clamp(MIN_UNIX, MAX_UNIX)
    }

    fn ram(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_ram(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.ram.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    /// A number as the registers show it.
    fn encode(&self, value: u8) -> u8 {
        if self.reg_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    /// A number from a register; BCD digits above 9 give a number that no date accepts, or some valid one.
    fn decode(&self, value: u8) -> u8 {
        if self.reg_b & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg_b & B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    /// The hour in a register, or 0xff if a 12-hour clock has no such hour.
    fn decode_hour(&self, value: u8) -> u8 {
        if self.reg_b & B_24H != 0 {
            return self.decode(value);
        }
        match self.decode(value & !PM) {
            hour @ 1..=12 => hour % 12 + if value & PM != 0 { 12 } else { 0 },
            _ => 0xff,
        }
    }

    /// A time register at the moment `now`.
    fn time_register(&self, index: u8, now: i64) -> u8 {
        let date = DateTime::from_unix(now);
        let part = |n: u16| u8::try_from(n).unwrap_or(0);
        match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(weekday(now)),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(part(date.year % 100)),
            _ => self.encode(part(date.year / 100)),
        }
    }

    /// Writes the current time to the registers in RAM.
    fn latch(&mut self) {
        let now = self.now();
        for index in TIME {
            self.set_ram(index, self.time_register(index, now));
        }
    }

    /// Takes the registers in RAM for the current time, if they are a time. If not, the clock goes on as before.
    fn apply(&mut self) {
        let year = u16::from(self.decode(self.ram(YEAR)));
        let century = u16::from(self.decode(self.ram(CENTURY_INDEX)));
        if year > 99 {
            return;
        }
        let date = DateTime {
            year: century * 100 + year,
            month: self.decode(self.ram(MONTH)),
            day: self.decode(self.ram(DAY)),
            hour: self.decode_hour(self.ram(HOURS)),
            minute: self.decode(self.ram(MINUTES)),
            second: self.decode(self.ram(SECONDS)),
        };
        if let Some(unix) = date.to_unix() {
            self.ahead = self.ahead.saturating_add(unix - self.now());
        }
    }

    fn is_set(&self) -> bool {
        self.reg_b & B_SET != 0
    }

    fn read_reg_a(&self) -> u8 {
        let in_second = self.host_nanos().rem_euclid(NANOS_PER_SECOND);
        let updating = !self.is_set() && in_second >= NANOS_PER_SECOND - UPDATE_NANOS;
        self.reg_a | if updating { A_UIP } else { 0 }
    }

    /// Nanoseconds between periodic events, by the rate bits of register A.
    fn period(&self) -> Option<i128> {
        let ticks = match self.reg_a & 0xf {
            0 => return None,
            // The two lowest selections repeat the rates of 8 and 9.
            rate @ 1..=2 => 1_i128 << (rate + 6),
            rate => 1_i128 << (rate - 1),
        };
        Some(ticks * NANOS_PER_SECOND / 32_768)
    }

    fn read_reg_c(&mut self) -> u8 {
        let now = self.host_nanos();
        let last = std::mem::replace(&mut self.flags_read, now);
        let mut flags = 0;
        if self.period().is_some_and(|period| now - last >= period) {
            flags |= C_PF;
        }
        if !self.is_set() && now.div_euclid(NANOS_PER_SECOND) != last.div_euclid(NANOS_PER_SECOND) {
            flags |= C_UF;
        }
        // The enable bits of register B stand where the flags stand.
        if flags & self.reg_b != 0 {
            flags |= C_IRQF;
        }
        flags
    }

    fn read_register(&mut self, index: u8) -> u8 {
        match index {
            REG_A => self.read_reg_a(),
            REG_B => self.reg_b,
            REG_C => self.read_reg_c(),
            REG_D => D_VRT,
            _ if TIME.contains(&index) && !self.is_set() => self.time_register(index, self.now()),
            _ => self.ram(index),
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            REG_A => self.reg_a = value & !A_UIP,
            REG_B => self.write_reg_b(value),
            REG_C | REG_D => {}
            _ if TIME.contains(&index) && !self.is_set() => {
                self.latch();
                self.set_ram(index, value);
                self.apply();
            }
            _ => self.set_ram(index, value),
        }
    }

    fn write_reg_b(&mut self, value: u8) {
        let (was_set, set) = (self.is_set(), value & B_SET != 0);
        if set && !was_set {
            self.latch();
        }
        // The format bits take effect first: the registers are what the guest meant by them when it let the clock go.
        self.reg_b = if set { value & !B_UIE } else { value };
        if was_set && !set {
            self.apply();
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("index", &self.index).field("ahead", &self.ahead).finish_non_exhaustive()
    }
}

impl BytePorts for Rtc {
    const PORTS: u8 = 2;

    fn inb(&mut self, port: u8) -> u8 {
        match port {
            // The index cannot be read back.
            INDEX_PORT => 0xff,
            _ => self.read_register(self.index),
        }
    }

    fn outb(&mut self, port: u8, value: u8) {
        match port {
            // Bit 7 masks NMIs, of which there are none.
            INDEX_PORT => self.index = value & 0x7f,
            _ => self.write_register(self.index, value),
        }
    }
}

byte_device!(Rtc);

impl Saved for Rtc {
    type State = RtcState;

    fn state(&self) -> RtcState {
        RtcState {
            index: self.index,
            ram: self.ram.to_vec(),
            reg_a: self.reg_a,
            reg_b: self.reg_b,
            ahead: self.ahead,
        }
    }

    /// The time goes on with the host's, so that a guest sees that time has passed. The flags of register C begin anew: a
    /// guest that polls them sees the next event.
    fn set_state(&mut self, state: &RtcState) -> crate::Result<()> {
        const NAME: &str = "rtc";
        check(NAME, "index", state.index < 0x80, state.index)?;
        check(NAME, "register A", state.reg_a & A_UIP == 0, state.reg_a)?;
        let ram = <[u8; 128]>::try_from(state.ram.as_slice());
        self.ram = ram.or_else(|_| bad(NAME, "length of the RAM", state.ram.len() as u64))?;
        (self.index, self.reg_a, self.reg_b) = (state.index, state.reg_a, state.reg_b);
        self.ahead = state.ahead;
        self.flags_read = self.host_nanos();
        Ok(())
    }
}

/// Plugs an [`Rtc`] in at [`RTC_PORT`], announced as `PNP0B00`.
#[derive(Debug, Default)]
pub struct RtcPlug {
    rtc: Rtc,
}

impl RtcPlug {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Rtc::with_clock`].
    pub fn with_clock(clock: impl Fn() -> SystemTime + Send + 'static) -> Self {
        Self { rtc: Rtc::with_clock(clock) }
    }

    /// Sets a byte of the clock's RAM, `index` 0x0e to 0x7f, as firmware would have left it. Others have no effect.
    #[must_use]
    pub fn nvram(mut self, index: u8, value: u8) -> Self {
        if index > REG_D {
            self.rtc.set_ram(index, value);
        }
        self
    }
}

impl Plug for RtcPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let device = isa::plug(wiring, "rtc", RTC_PORT, self.rtc)?;
        wiring.describe(Description {
            hid: "PNP0B00",
            resources: vec![Resource::Pio { base: RTC_PORT, len: Rtc::PORTS.into() }],
        });
        wiring.fixed_hardware(FixedHardware::CmosRtc { century: CENTURY_INDEX });
        Ok(device)
    }
}
