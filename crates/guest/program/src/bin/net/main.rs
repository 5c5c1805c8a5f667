//! Uses a network: the guest of the network's bench and tests. What it is told to do, and how it answers, is in `freestone_guest::net`.
//!
//! It polls, and takes no interrupts.
#![no_std]
#![no_main]

mod card;
mod dhcp;
mod memory;
mod stack;
mod tcp;
mod wire;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::registers::Device;
use freestone_guest_program::virtio::NETWORK;
use freestone_guest_program::{console, cpu, entry, machine, println};

use card::Card;
use memory::Pattern;
use stack::{AGAIN, Address, Failure, Stack};
use tcp::Connection;
use wire::{ICMP, IPV4, Ip, Writer};

entry!(main);

/// Most requests of a command: the time of each is kept.
const SAMPLES: usize = 4096;
/// What an echo request carries.
const ECHO: &[u8] = b"freestone freestone freestone freestone freestone freestone";

extern "C" fn main(info: u64) -> ! {
    let info = StartInfo::new(info);
    let acpi = Acpi::find(info);
    let Some(card) = Device::find(NETWORK, info, acpi.as_ref()).and_then(|device| Card::new(&device)) else {
        println!("net: no network card");
        machine::fail();
    };
    let [a, b, c, d, e, f] = card.mac;
    let features = card.features;
    let mut stack = Stack::new(card, Pattern::make());
    println!("net: ready, {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, features {features:#x}");
    for command in info.map_or("", StartInfo::command_line).split_ascii_whitespace() {
        if let Some(command) = command.strip_prefix("run=") {
            run(&mut stack, command, acpi.as_ref());
        }
    }
    let mut line = [0u8; 128];
    let mut len = 0;
    let mut looked = 0;
    loop {
        stack.poll();
        // Looking costs an exit.
        if cpu::tsc().wrapping_sub(looked) < AGAIN / 4096 {
            continue;
        }
        let Some(byte) = console::read() else {
            looked = cpu::tsc();
            continue;
        };
        if byte != b'\r' && byte != b'\n' {
            if let Some(slot) = line.get_mut(len) {
                *slot = byte;
                len += 1;
            }
            continue;
        }
        let text = core::str::from_utf8(line.get(..len).unwrap_or_default()).unwrap_or_default();
        run(&mut stack, text, acpi.as_ref());
        len = 0;
    }
}

/// Does a command, and says what came of it.
fn run(stack: &mut Stack, command: &str, acpi: Option<&Acpi>) {
    let mut words = command.split([' ', ',']).filter(|word| !word.is_empty());
    let Some(name) = words.next() else { return };
    if name == "off" {
        println!("net: bye");
        machine::power_off(acpi);
    }
    let arguments = [words.next().unwrap_or_default(), words.next().unwrap_or_default()];
    let (kicks, bad, [sent, received]) = (stack.card.kicks(), stack.bad, stack.card.frames);
    let report = match (name, arguments) {
        ("dhcp", _) => dhcp::configure(stack).map(Report::Address),
        ("address", [address, gateway]) => configure(stack, address, gateway).map(Report::Address),
        ("send", [to, n]) => begin(to, n).and_then(|(to, n)| transfer(stack, Peer::Connect(to), [n, 0])),
        ("receive", [to, n]) => begin(to, n).and_then(|(to, n)| transfer(stack, Peer::Connect(to), [0, n])),
        ("give", [port, n]) => {
            numbers(port, n).and_then(|(port, n)| transfer(stack, Peer::Listen(port), [n, 0]))
        }
        ("take", [port, n]) => {
            numbers(port, n).and_then(|(port, n)| transfer(stack, Peer::Listen(port), [0, n]))
        }
        ("ping", [to, n]) => begin(to, n).and_then(|(to, n)| ping(stack, to, n)),
        ("connect", [to, n]) => begin(to, n).and_then(|(to, n)| connections(stack, to, n)),
        ("echo", [to, n]) => echo(stack, to, n),
        _ => Err(Failure::Usage),
    };
    if let Some(mut connection) = stack.connection.take() {
        connection.abort(&mut stack.card);
        stack.card.publish();
    }
    stack.listening = None;
    let (kicks, bad) = (stack.card.kicks() - kicks, stack.bad - bad);
    let (sent, received) = (stack.card.frames[0] - sent, stack.card.frames[1] - received);
    let counts = format_args!("sent={sent} received={received} kicks={kicks} bad={bad}");
    match report {
        Ok(Report::Address(Address { ip, prefix, gateway })) => {
            let gateway = gateway.unwrap_or_default();
            println!("ok {name} address={ip}/{prefix} gateway={gateway} {counts}");
        }
        Ok(Report::Work { count, ticks, repeated }) => {
            println!("ok {name} count={count} ticks={ticks} repeated={repeated} {counts}");
        }
        Ok(Report::Times { count, median, tail }) => {
            println!("ok {name} count={count} median={median} p99={tail} {counts}");
        }
        Err(failure) => println!("failed {name}: {} ({counts})", failure.reason()),
    }
}

/// What came of a command.
enum Report {
    Address(Address),
    /// So much in so many ticks of the time stamp counter, with so many repetitions.
    Work {
        count: u64,
        ticks: u64,
        repeated: u64,
    },
    /// Ticks of a request.
    Times {
        count: u64,
        median: u32,
        tail: u32,
    },
}

fn number(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| Failure::Usage)
}

fn numbers(port: &str, n: &str) -> Result<(u16, u64), Failure> {
    Ok((port.parse().map_err(|_| Failure::Usage)?, number(n)?))
}

/// `ADDRESS:PORT` and a number.
fn begin(to: &str, n: &str) -> Result<((Ip, u16), u64), Failure> {
    let (ip, port) = to.split_once(':').ok_or(Failure::Usage)?;
    let (port, n) = numbers(port, n)?;
    Ok(((Ip::parse(ip).ok_or(Failure::Usage)?, port), n))
}

fn configure(stack: &mut Stack, address: &str, gateway: &str) -> Result<Address, Failure> {
    let (ip, prefix) = address.split_once('/').ok_or(Failure::Usage)?;
    let ip = Ip::parse(ip).ok_or(Failure::Usage)?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or(Failure::Usage)?;
    let address = Address { ip, prefix, gateway: Ip::parse(gateway) };
    stack.address = Some(address);
    Ok(address)
}

/// Who the other side is.
enum Peer {
    Connect((Ip, u16)),
    Listen(u16),
}

/// Has a connection come up.
fn open(stack: &mut Stack, peer: &Peer) -> Result<(), Failure> {
    match *peer {
        Peer::Connect((ip, port)) => {
            let mac = stack.resolve(ip)?;
            let own = (stack.address.unwrap_or_default().ip, stack.card.mac);
            let ports = [stack.next_port(), port];
            stack.connection = Some(Connection::connect(own, (ip, mac), ports));
        }
        Peer::Listen(port) => stack.listening = Some(port),
    }
    let listens = matches!(peer, Peer::Listen(_));
    wait(stack, |connection| connection.established.then_some(()), listens)
}

/// Polls until `done` says something of the connection.
fn wait<T>(
    stack: &mut Stack,
    mut done: impl FnMut(&mut Connection) -> Option<T>,
    may_be_none: bool,
) -> Result<T, Failure> {
    stack.until(|stack| {
        let Some(connection) = &mut stack.connection else {
            return if may_be_none { None } else { Some(Err(Failure::Ended)) };
        };
        if connection.wrong {
            return Some(Err(Failure::WrongData));
        }
        if connection.reset {
            return Some(Err(Failure::Reset));
        }
        done(connection).map(Ok)
    })
}

/// Sends and receives so many bytes, and ends with the other side's end.
fn transfer(stack: &mut Stack, peer: Peer, [send, receive]: [u64; 2]) -> Result<Report, Failure> {
    open(stack, &peer)?;
    stack.listening = None;
    let start = cpu::tsc();
    wait(
        stack,
        |connection| {
            connection.to_send = send;
            // Whoever only receives ends when all is there.
            connection.close = connection.received >= receive;
            (connection.is_over() || connection.ended && !connection.close).then_some(())
        },
        false,
    )?;
    let ticks = cpu::tsc().wrapping_sub(start);
    let Some(connection) = stack.connection.take() else { return Err(Failure::Ended) };
    if connection.received != receive {
        stack.connection = Some(connection);
        return Err(Failure::Ended);
    }
    Ok(Report::Work { count: send + receive, ticks, repeated: connection.repeated })
}

/// One byte there and one back, again and again.
fn ping(stack: &mut Stack, to: (Ip, u16), n: u64) -> Result<Report, Failure> {
    let mut samples = [0u32; SAMPLES];
    let samples =
        samples.get_mut(..n as usize).filter(|samples| !samples.is_empty()).ok_or(Failure::Usage)?;
    open(stack, &Peer::Connect(to))?;
    for (sample, sent) in samples.iter_mut().zip(1..) {
        let start = cpu::tsc();
        wait(
            stack,
            |connection| {
                connection.to_send = sent;
                match connection.received >= sent {
                    true => Some(Ok(())),
                    false => connection.ended.then_some(Err(Failure::Ended)),
                }
            },
            false,
        )??;
        *sample = cpu::tsc().wrapping_sub(start).min(u64::from(u32::MAX)) as u32;
    }
    wait(
        stack,
        |connection| {
            connection.close = true;
            connection.is_over().then_some(())
        },
        false,
    )?;
    stack.connection = None;
    samples.sort_unstable();
    let at = |percent: usize| samples.get((samples.len() - 1) * percent / 100).copied().unwrap_or(0);
    Ok(Report::Times { count: n, median: at(50), tail: at(99) })
}

/// Connections, one after the other: a byte there, a byte and the end back.
fn connections(stack: &mut Stack, to: (Ip, u16), n: u64) -> Result<Report, Failure> {
    let (start, mut repeated) = (cpu::tsc(), 0);
    for _ in 0..n {
        let Report::Work { repeated: more, .. } = answered(stack, to)? else { return Err(Failure::Ended) };
        repeated += more;
    }
    Ok(Report::Work { count: n, ticks: cpu::tsc().wrapping_sub(start), repeated })
}

fn answered(stack: &mut Stack, to: (Ip, u16)) -> Result<Report, Failure> {
    open(stack, &Peer::Connect(to))?;
    wait(
        stack,
        |connection| {
            connection.to_send = 1;
            connection.close = connection.ended;
            connection.is_over().then_some(())
        },
        false,
    )?;
    let Some(connection) = stack.connection.take().filter(|connection| connection.received == 1) else {
        return Err(Failure::Ended);
    };
    Ok(Report::Work { count: 1, ticks: 0, repeated: connection.repeated })
}

/// Echo requests, one after the other.
fn echo(stack: &mut Stack, to: &str, n: &str) -> Result<Report, Failure> {
    let (ip, n) = (Ip::parse(to).ok_or(Failure::Usage)?, number(n)?);
    let mac = stack.resolve(ip)?;
    let own = stack.address.unwrap_or_default().ip;
    let mut samples = [0u32; SAMPLES];
    let samples =
        samples.get_mut(..n as usize).filter(|samples| !samples.is_empty()).ok_or(Failure::Usage)?;
    let identifier = stack.next_port();
    for (sample, sequence) in samples.iter_mut().zip(0u16..) {
        let mut rest = Writer::new([0; 6], [0; 6], 0);
        rest.put(&identifier.to_be_bytes()).put(&sequence.to_be_bytes()).put(ECHO);
        let rest = rest.bytes().get(wire::ETHERNET..).unwrap_or_default();
        let check = !wire::fold(wire::sum(rest, 8 << 24));
        let mut frame = Writer::new(mac, stack.card.mac, IPV4);
        frame.ip(ICMP, own, ip, rest.len() + 4).put(&[8, 0]).put(&check.to_be_bytes()).put(rest);
        (stack.inbox.wanted, stack.inbox.len) = (Some((ICMP, identifier)), 0);
        let start = cpu::tsc();
        stack.send(&frame);
        stack.card.publish();
        let answer = stack.until(|stack| {
            let bytes = stack.inbox.bytes.get(..stack.inbox.len).filter(|bytes| !bytes.is_empty())?;
            let right = bytes.get(4..) == Some(rest);
            Some(if right { Ok(()) } else { Err(Failure::WrongData) })
        });
        stack.inbox.wanted = None;
        answer?;
        *sample = cpu::tsc().wrapping_sub(start).min(u64::from(u32::MAX)) as u32;
    }
    samples.sort_unstable();
    let at = |percent: usize| samples.get((samples.len() - 1) * percent / 100).copied().unwrap_or(0);
    Ok(Report::Times { count: n, median: at(50), tail: at(99) })
}
