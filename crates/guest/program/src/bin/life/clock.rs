//! Time: the time stamp counter, KVM's paravirtual clock, and how long the program itself has been running.

use core::sync::atomic::{Ordering, fence};

use freestone_guest_program::cpu;
use freestone_guest_program::ring::{Pages, Place};

/// CPUID leaves of KVM; `KVM_FEATURE_CLOCKSOURCE2` and its register.
const SIGNATURE: u32 = 0x4000_0000;
const CLOCKSOURCE2: u32 = 1 << 3;
const SYSTEM_TIME: u32 = 0x4B56_4D01;
/// A gap in the time stamp counter that is longer than this was no time of this program: it was not running.
const GAP: u64 = 30_000_000;

static PAGE: Pages<1> = Pages::new();

/// KVM's clock (`struct pvclock_vcpu_time_info`).
pub struct Clock {
    page: Option<Place>,
    tsc: u64,
    last: u64,
}

impl Clock {
    /// Switches the paravirtual clock on where KVM has it.
    pub fn new() -> Self {
        let leaf = cpu::cpuid(SIGNATURE);
        let kvm = [leaf.ebx, leaf.ecx, leaf.edx] == [0x4B4D_564B, 0x564B_4D56, 0x4D];
        let has_clock = kvm && cpu::cpuid(SIGNATURE + 1).eax & CLOCKSOURCE2 != 0;
        let page = has_clock.then(|| PAGE.page(0));
        if let Some(page) = page {
            // SAFETY: CPUID says that the register exists, and the page is for this alone.
            unsafe { cpu::write_msr(SYSTEM_TIME, page.address() | 1) };
        }
        Self { page, tsc: 0, last: 0 }
    }

    /// Nanoseconds of the paravirtual clock, 0 where there is none, and the time stamp counter; or which of them went back.
    pub fn read(&mut self) -> Result<(u64, u64), &'static str> {
        let tsc = cpu::tsc();
        if tsc < self.tsc {
            return Err("time stamp counter went back");
        }
        self.tsc = tsc;
        let now = self.page.map_or(0, nanoseconds);
        if now < self.last {
            return Err("paravirtual clock went back");
        }
        self.last = now;
        Ok((now, tsc))
    }
}

fn nanoseconds(page: Place) -> u64 {
    loop {
        let version: u32 = page.get(0);
        fence(Ordering::SeqCst);
        let (at, base): (u64, u64) = (page.get(8), page.get(16));
        let (multiplier, shift) = (page.get::<u32>(24), page.get::<u8>(28) as i8);
        let delta = cpu::tsc().saturating_sub(at);
        fence(Ordering::SeqCst);
        if version & 1 == 0 && page.get::<u32>(0) == version {
            let delta = if shift < 0 { delta >> -shift } else { delta << shift };
            return base + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64;
        }
        core::hint::spin_loop();
    }
}

/// Ticks of the time stamp counter while this program looked at it often: what passes between a snapshot and a restore is not counted.
#[derive(Clone, Copy)]
pub struct Patience {
    last: u64,
    left: u64,
}

/// About ten seconds.
const PATIENCE: u64 = 30_000_000_000;

impl Patience {
    pub fn new() -> Self {
        Self { last: cpu::tsc(), left: PATIENCE }
    }

    /// Whether it has come to its end.
    pub fn is_over(&mut self) -> bool {
        self.spend() == 0
    }

    /// How much of it has been used.
    pub fn used(&mut self) -> u64 {
        PATIENCE - self.spend()
    }

    fn spend(&mut self) -> u64 {
        let now = cpu::tsc();
        self.left = self.left.saturating_sub(now.saturating_sub(self.last).min(GAP));
        self.last = now;
        self.left
    }
}
