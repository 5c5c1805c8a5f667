//! A device of one's own on a bus: its registers, its work on the event loop, and its interrupt.
//!
//! The device adds numbers. A vCPU (here: a thread with a view of the bus) writes numbers to one register, rings a bell at
//! another, waits for the interrupt and reads the sum.
//! Run it with `cargo run -p freestone-bus --example custom_bus`.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{
    Access, AccessError, Bus, EFD_NONBLOCK, EventFd, EventLoop, IoDevice, Irq, Progress, Source, Work, spawn,
};

const BASE: u64 = 0xd000_0000;
const NUMBER: u64 = 0x0;
const BELL: u64 = 0x4;
const SUM: u64 = 0x8;
const LEN: u64 = 0xc;

/// What registers and work share.
#[derive(Default)]
struct State {
    waiting: Vec<u32>,
    sum: u32,
}

/// The registers: what a vCPU touches.
struct Adder {
    state: Arc<Mutex<State>>,
    bell: Arc<EventFd>,
}

impl IoDevice for Adder {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        if offset != SUM {
            return Err(AccessError::NoRegister);
        }
        let sum = self.state.lock().unwrap_or_else(PoisonError::into_inner).sum;
        let data: &mut [u8; 4] = data.try_into().map_err(|_| AccessError::Width)?;
        *data = sum.to_le_bytes();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let value = u32::from_le_bytes(data.try_into().map_err(|_| AccessError::Width)?);
        match offset {
            NUMBER => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                // Memory that a guest can make grow needs a bound.
                if state.waiting.len() < 1024 {
                    state.waiting.push(value);
                }
                Ok(())
            }
            // On hardware, a doorbell would spare the guest this exit.
            BELL => self.bell.write(1).map_err(|_| AccessError::NoRegister),
            _ => Err(AccessError::NoRegister),
        }
    }
}

/// The work: one number per step, on the event loop's thread.
struct Adding {
    state: Arc<Mutex<State>>,
    bell: Arc<EventFd>,
    ringing: bool,
    irq: Irq,
}

impl Work for Adding {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.bell) as Source]
    }

    fn process(&mut self) -> Progress {
        // The eventfd says whether the bell rang since the last batch was done.
        self.ringing |= self.bell.read().is_ok();
        if !self.ringing {
            return Progress::Idle;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = state.waiting.pop() {
            state.sum = state.sum.wrapping_add(number);
            return Progress::More;
        }
        drop(state);
        self.ringing = false;
        if let Err(error) = self.irq.trigger() {
            eprintln!("the interrupt is lost: {error}");
        }
        Progress::Idle
    }
}

/// What a guest's driver would do.
fn vcpu(bus: &Bus, interrupt: &EventFd) -> Result<u32, Box<dyn Error + Send + Sync>> {
    let mut view = bus.view();
    for number in 1..=100_u32 {
        view.write(BASE + NUMBER, &number.to_le_bytes())?;
    }
    view.write(BASE + BELL, &1_u32.to_le_bytes())?;
    interrupt.read()?;
    let mut sum = [0; 4];
    view.read(BASE + SUM, &mut sum)?;
    Ok(u32::from_le_bytes(sum))
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let state = Arc::new(Mutex::new(State::default()));
    let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let interrupt = EventFd::new(0)?;

    let bus = Bus::new();
    bus.insert(BASE, LEN, Arc::new(Adder { state: Arc::clone(&state), bell: Arc::clone(&bell) }))?;
    let mut event_loop = EventLoop::new()?;
    let handle = event_loop.handle();
    let task = spawn(&handle, Adding { state, bell, ringing: false, irq: Irq::new(interrupt.try_clone()?) })?;

    let done = Arc::new(AtomicBool::new(false));
    let guest = std::thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let sum = vcpu(&bus, &interrupt);
            done.store(true, Ordering::Release);
            handle.wake().map(|()| sum)
        }
    });
    event_loop.run_until(|| done.load(Ordering::Acquire))?;
    let sum = guest.join().map_err(|_| "the guest's thread panicked")???;
    println!("1 + 2 + ... + 100 = {sum}");
    assert_eq!(sum, 5050);

    // The work comes back; nothing of it runs any more.
    let adding = task.stop().ok_or("stopped twice")?;
    assert!(adding.state.lock().unwrap_or_else(PoisonError::into_inner).waiting.is_empty());
    Ok(())
}
