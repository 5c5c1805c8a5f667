//! The second processor: counts in its own registers and memory, and answers an interrupt with an interrupt.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::{apic, cpu, smp};

use crate::clock::Patience;
use crate::lanes;
use crate::memory::mix;
use crate::{HERE, SECOND_TIMER, THERE, TIMER_TICKS};

/// Rounds of the second processor.
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static TIMER: AtomicBool = AtomicBool::new(false);
static FIRST: AtomicU32 = AtomicU32::new(0);
/// What is wrong: address and length of a text.
static WRONG: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

struct Words(UnsafeCell<[u64; 2048]>);

// SAFETY: only the second processor touches them.
unsafe impl Sync for Words {}

static WORDS: Words = Words(UnsafeCell::new([0; 2048]));

/// The second processor, as the first one sees it.
pub struct Second {
    id: u32,
    sent: u64,
    rounds: u64,
    patience: Patience,
}

impl Second {
    /// Starts it, if there is one.
    pub fn start(acpi: Option<&Acpi>, timer: bool) -> Option<Self> {
        let own = apic::id();
        let id = acpi?.processors().find(|&id| id != own && id < 255)?;
        FIRST.store(own, Ordering::SeqCst);
        TIMER.store(timer, Ordering::SeqCst);
        smp::place_trampoline();
        // SAFETY: called once; what both processors use is atomic.
        unsafe { smp::give_work(work) };
        smp::start(id).then_some(Self { id, sent: 0, rounds: 0, patience: Patience::new() })
    }

    /// Rounds that it did.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Sends it an interrupt.
    pub fn begin(&mut self) {
        self.sent += 1;
        self.patience = Patience::new();
        apic::send(self.id, THERE);
    }

    /// Whether the interrupt was answered and it is at work; what is wrong.
    pub fn poll(&mut self) -> Result<bool, &'static str> {
        let [at, len] =
            [0, 1].map(|i| WRONG.get(i).map_or(0, |word: &AtomicU64| word.load(Ordering::SeqCst)));
        if len != 0 {
            let text = core::ptr::with_exposed_provenance::<u8>(at as usize);
            // SAFETY: the second processor took them from a static text.
            let bytes = unsafe { core::slice::from_raw_parts(text, len as usize) };
            return Err(core::str::from_utf8(bytes).unwrap_or("second processor"));
        }
        let (came, answered) = (cpu::interrupts(THERE as usize), cpu::interrupts(HERE as usize));
        if came > self.sent || answered > self.sent {
            return Err("second processor: more interrupts than were sent");
        }
        let rounds = ROUNDS.load(Ordering::SeqCst);
        if answered == self.sent && rounds > self.rounds {
            self.rounds = rounds;
            return Ok(true);
        }
        if self.patience.is_over() { Err("second processor: silent") } else { Ok(false) }
    }
}

extern "C" fn work() -> ! {
    apic::enable();
    if TIMER.load(Ordering::SeqCst) {
        apic::periodic(SECOND_TIMER, TIMER_TICKS);
    }
    match count() {
        Ok(never) => match never {},
        Err(what) => {
            let [at, len] = &WRONG;
            at.store(what.as_ptr().expose_provenance() as u64, Ordering::SeqCst);
            len.store(what.len() as u64, Ordering::SeqCst);
        }
    }
    loop {
        core::hint::spin_loop();
    }
}

fn count() -> Result<core::convert::Infallible, &'static str> {
    // SAFETY: the only reference, made once.
    let words = unsafe { &mut *WORDS.0.get() };
    let (mut answered, mut last, mut ticks) = (0, 0, (0, Patience::new()));
    for round in 1u64.. {
        lanes::run(mix(round), 2000).map_err(|_| "second processor: registers")?;
        for (word, i) in words.iter_mut().zip(0u64..) {
            let expected = if round == 1 { 0 } else { mix((round - 1) ^ (i << 40)) };
            if *word != expected {
                return Err("second processor: memory");
            }
            *word = mix(round ^ (i << 40));
        }
        let now = cpu::tsc();
        if now < last {
            return Err("second processor: time stamp counter went back");
        }
        last = now;
        while answered < cpu::interrupts(THERE as usize) {
            answered += 1;
            apic::send(FIRST.load(Ordering::SeqCst), HERE);
            // The local APIC holds one of a vector: wait until it has arrived.
            let mut patience = Patience::new();
            while cpu::interrupts(HERE as usize) < answered {
                if patience.is_over() {
                    return Err("second processor: interrupt lost");
                }
                core::hint::spin_loop();
            }
        }
        if TIMER.load(Ordering::SeqCst) {
            let (count, patience) = &mut ticks;
            let interrupts = cpu::interrupts(SECOND_TIMER as usize);
            if interrupts != *count {
                ticks = (interrupts, Patience::new());
            } else if patience.is_over() {
                return Err("second processor: timer");
            }
        }
        ROUNDS.store(round, Ordering::SeqCst);
    }
    Err("second processor: the end of numbers")
}
