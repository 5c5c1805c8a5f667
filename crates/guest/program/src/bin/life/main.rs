//! Lives: counts, hashes memory, writes to its disk, talks over vsock and network, and notices when something of it is not as it left it.
//! What it is told and what it says is in `freestone_guest::life`.
//!
//! It polls its devices. Its interrupts are those of timers and of the other processor.
#![no_std]
#![no_main]

mod card;
mod clock;
mod disk;
mod lanes;
mod memory;
mod second;
mod vsock;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::registers::Device;
use freestone_guest_program::virtio::{BLOCK, NETWORK};
use freestone_guest_program::{
    apic, application_processors, console, cpu, entry, machine, params, port, print, println,
};

use card::{Addresses, Card, parse_ip};
use clock::{Clock, Patience};
use disk::Disk;
use memory::{Memory, mix};
use second::Second;
use vsock::Vsock;

entry!(main);
application_processors!();
params!(0, 0, 0xE9, 1);

/// Virtio device id.
const SOCKET: u32 = 19;
/// Indices of interrupt vectors: the timers of both processors, and what they send one another.
const TIMER: u32 = 0;
const SECOND_TIMER: u32 = 1;
const THERE: u32 = 2;
const HERE: u32 = 3;
/// Ten milliseconds, in ticks of the local APIC's timer under KVM.
const TIMER_TICKS: u32 = 78_125;

/// Words of the parameter block.
mod word {
    pub const MODE: u64 = 0;
    pub const SALT: u64 = 1;
    pub const PORT: u64 = 2;
    pub const EVERY: u64 = 3;
    pub const COUNT: u64 = 8;
    pub const CHECK: u64 = 9;
}

/// What the command line says, and what holds where it says nothing.
struct Options {
    rounds: u64,
    every: u64,
    kib: u64,
    spin: u64,
    sectors: u64,
    disk: bool,
    vsock: Option<u32>,
    net: bool,
    addresses: Addresses,
    timer: bool,
    second: bool,
    count: bool,
}

impl Options {
    fn parse(line: &str) -> Self {
        let mut this = Self {
            rounds: u64::MAX,
            every: 16,
            kib: 2048,
            spin: 20_000,
            sectors: 256,
            disk: true,
            vsock: Some(5000),
            net: true,
            addresses: Addresses { own: [10, 0, 2, 15], peer: [10, 0, 2, 2] },
            timer: true,
            second: true,
            count: false,
        };
        for (key, value) in line.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
            let number = value.parse::<u64>();
            match (key, value, number) {
                ("rounds", _, Ok(n)) => this.rounds = n,
                ("every", _, Ok(n)) => this.every = n.max(1),
                ("memory", _, Ok(n)) => this.kib = n,
                ("spin", _, Ok(n)) => this.spin = n,
                ("sectors", _, Ok(n)) => this.sectors = n,
                ("disk", "off", _) => this.disk = false,
                ("vsock", "off", _) => this.vsock = None,
                ("vsock", _, Ok(n)) => this.vsock = Some(n as u32),
                ("net", "off", _) => this.net = false,
                ("ip", ip, _) => this.addresses.own = parse_ip(ip).unwrap_or(this.addresses.own),
                ("ping", ip, _) => this.addresses.peer = parse_ip(ip).unwrap_or(this.addresses.peer),
                ("timer", "off", _) => this.timer = false,
                ("cpus", "1", _) => this.second = false,
                ("mode", "count", _) => this.count = true,
                _ => {}
            }
        }
        this
    }
}

extern "C" fn main(info: u64) -> ! {
    if params::get(word::MODE) == 1 {
        count();
    }
    let info = StartInfo::new(info);
    let options = Options::parse(info.map_or("", StartInfo::command_line));
    if options.count {
        count();
    }
    let acpi = Acpi::find(info);
    let mut life = Life::new(info, acpi.as_ref(), &options);
    life.announce();
    let end = life.live(&options);
    match end {
        Ok(()) => {
            println!("life done {}", life.round);
            machine::power_off(acpi.as_ref())
        }
        Err(what) => {
            println!("LIFE BAD {what} in round {}", life.round);
            machine::fail()
        }
    }
}

/// The short mode: nothing but a counter in memory, of which the host hears by a port.
fn count() -> ! {
    loop {
        let n = params::get(word::COUNT);
        if n != 0 && params::get(word::CHECK) != mix(n) {
            machine::fail();
        }
        params::set(word::COUNT, n + 1);
        params::set(word::CHECK, mix(n + 1));
        if n.is_multiple_of(params::get(word::EVERY).max(1)) {
            port::out8(params::get(word::PORT) as u16, n as u8);
        }
    }
}

/// Everything that has to survive.
struct Life {
    round: u64,
    hash: u64,
    memory: Memory,
    clock: Clock,
    disk: Option<Disk>,
    vsock: Option<Vsock>,
    card: Option<Card>,
    second: Option<Second>,
    timer: Option<(u64, Patience)>,
}

impl Life {
    fn new(info: Option<StartInfo>, acpi: Option<&Acpi>, options: &Options) -> Self {
        let has_apic = apic::is_there();
        let timer = has_apic && options.timer;
        if has_apic {
            apic::enable();
        }
        let device = |id, wanted: bool| Device::find(id, info, acpi).filter(|_| wanted);
        let disk =
            device(BLOCK, options.disk).and_then(|device| Disk::new(&device, options.sectors, has_apic));
        let vsock = options.vsock.and_then(|port| Vsock::new(device(SOCKET, true)?, port));
        let card = device(NETWORK, options.net).and_then(|device| Card::new(&device, options.addresses));
        let memory = Memory::new(info, options.kib);
        let second = if has_apic && options.second { Second::start(acpi, timer) } else { None };
        if timer {
            apic::periodic(TIMER, TIMER_TICKS);
        }
        let timer = timer.then(|| (0, Patience::new()));
        Self { round: 0, hash: 0, memory, clock: Clock::new(), disk, vsock, card, second, timer }
    }

    fn announce(&self) {
        let yes = |is: bool| if is { "yes" } else { "no" };
        println!(
            "life begins memory={} disk={} vsock={} net={} cpus={} timer={}",
            self.memory.kib(),
            yes(self.disk.is_some()),
            yes(self.vsock.is_some()),
            yes(self.card.is_some()),
            1 + u32::from(self.second.is_some()),
            yes(self.timer.is_some()),
        );
    }

    fn live(&mut self, options: &Options) -> Result<(), &'static str> {
        while self.round < options.rounds {
            self.round += 1;
            self.begin();
            lanes::run(mix(self.round), options.spin)?;
            let read = self.memory.round(self.round).map_err(|wrong| {
                println!("life: {:#x} is {:#x}, not {:#x}", wrong.at, wrong.is, wrong.expected);
                "memory"
            })?;
            self.check_timer()?;
            self.finish()?;
            let time = self.clock.read()?;
            self.hash = mix(self.hash ^ read ^ self.round);
            if self.round.is_multiple_of(options.every) {
                self.report(time);
                // Looking costs an exit.
                if core::iter::from_fn(console::read).take(16).any(|byte| byte == b'e') {
                    break;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self) {
        let (round, hash) = (self.round, self.hash);
        if let Some(disk) = &mut self.disk {
            disk.begin(round, hash);
        }
        if let Some(vsock) = &mut self.vsock {
            vsock.begin(round, hash);
        }
        if let Some(card) = &mut self.card {
            card.begin(round, hash);
        }
        if let Some(second) = &mut self.second {
            second.begin();
        }
    }

    /// Waits until everything of this round is done.
    fn finish(&mut self) -> Result<(), &'static str> {
        let round = self.round;
        let mut done =
            [self.disk.is_none(), self.vsock.is_none(), self.card.is_none(), self.second.is_none()];
        while done.contains(&false) {
            let [disk, vsock, card, second] = &mut done;
            if let Some(device) = self.disk.as_mut().filter(|_| !*disk) {
                *disk = device.poll(round)?;
            }
            if let Some(device) = self.vsock.as_mut().filter(|_| !*vsock) {
                *vsock = device.poll()?;
            }
            if let Some(device) = self.card.as_mut().filter(|_| !*card) {
                *card = device.poll()?;
            }
            if let Some(other) = self.second.as_mut().filter(|_| !*second) {
                *second = other.poll()?;
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// The timer has to go on.
    fn check_timer(&mut self) -> Result<(), &'static str> {
        let Some((seen, patience)) = &mut self.timer else { return Ok(()) };
        let count = cpu::interrupts(TIMER as usize);
        if count < *seen {
            return Err("timer: fewer interrupts than before");
        }
        if count != *seen {
            self.timer = Some((count, Patience::new()));
        } else if patience.is_over() {
            return Err("timer: silent");
        }
        Ok(())
    }

    fn report(&self, (clock, tsc): (u64, u64)) {
        print!("life {} hash={:016x} salt={}", self.round, self.hash, params::get(word::SALT));
        if let Some(disk) = &self.disk {
            print!(" disk={} flushed={}", disk.written, disk.flushed);
            if let Some(msi) = disk.interrupts() {
                print!(" msi={msi}");
            }
        }
        if let Some(vsock) = &self.vsock {
            print!(" vsock={} lost={} resets={}", vsock.echoes, vsock.lost, vsock.resets);
        }
        if let Some(card) = &self.card {
            print!(" net={} repeated={}", card.answers, card.repeated);
        }
        if let Some((irq, _)) = &self.timer {
            print!(" irq={irq}");
        }
        if let Some(second) = &self.second {
            print!(" second={} ipi={}", second.rounds(), cpu::interrupts(HERE as usize));
        }
        if clock != 0 {
            print!(" clock={clock}");
        }
        println!(" tsc={tsc}");
    }
}
