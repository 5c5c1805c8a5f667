//! virtio-console: bytes both ways, control messages, sizes, and drivers that misbehave.
#![cfg(feature = "console")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use freestone_bus::Device;
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_snapshot::{Arch, Header, State};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, DriverTransport, MmioDriver};
use freestone_virtio::VirtioMmioPlug;
use freestone_virtio::console::{
    Console, ConsoleHandle, Port, PortInput, PortOutput, ReadInput, Size, feature,
};

const MEMORY: u64 = 4 << 20;

/// An output that takes `room` bytes and then none.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

impl Sink {
    fn with_room(room: usize) -> Self {
        let sink = Self::default();
        sink.0.lock().unwrap().1 = room;
        sink
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
    }

    fn make_room(&self, room: usize) {
        self.0.lock().unwrap().1 = room;
    }
}

impl PortOutput for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap();
        let count = data.len().min(inner.1);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        inner.1 -= count;
        inner.0.extend_from_slice(&data[..count]);
        Ok(count)
    }
}

struct Machine {
    wiring: TestWiring,
    device: Box<dyn Device>,
    driver: MmioDriver,
    mem: GuestMem,
    arena: Arena,
    queues: Vec<DriverQueue>,
    handle: ConsoleHandle,
}

impl Machine {
    fn new(ports: Vec<Port>) -> Self {
        let mem = GuestMem::anonymous(MEMORY).unwrap();
        let mut wiring = TestWiring::new(mem.clone());
        let console = Console::new(ports).unwrap();
        let handle = console.handle();
        let device = wiring.plug(VirtioMmioPlug::new(console, "console")).unwrap();
        let driver = MmioDriver::new(wiring.mmio_device(0).unwrap());
        let arena = Arena::new(0x1_0000, MEMORY);
        Self { wiring, device, driver, mem, arena, queues: Vec::new(), handle }
    }

    fn started(ports: Vec<Port>, features: u64) -> Self {
        let mut machine = Self::new(ports);
        machine.start(features);
        machine
    }

    fn start(&mut self, features: u64) {
        self.driver.negotiate(features).unwrap();
        let count = self.driver.queue_count().unwrap();
        self.queues = (0..count)
            .map(|index| self.driver.setup_queue(&self.mem, &mut self.arena, index, 16).unwrap())
            .collect();
        self.driver.driver_ok().unwrap();
    }

    /// The console saves itself and goes on as another one, made of these ports, in another machine with the same memory. Before
    /// it does, `change` is done to it.
    fn move_on(&mut self, ports: Vec<Port>, change: impl FnOnce(&ConsoleHandle)) {
        self.device.pause().unwrap();
        let mut state = State::new();
        self.device.save(&mut state.of("console")).unwrap();
        let console = Console::new(ports).unwrap();
        self.handle = console.handle();
        change(&self.handle);
        self.wiring = TestWiring::new(self.mem.clone());
        self.device = self.wiring.plug(VirtioMmioPlug::new(console, "console")).unwrap();
        self.driver = self.driver.follow(&self.wiring).unwrap();
        let header = Header::new(Arch::host(), "tests").unwrap();
        self.device.restore(&mut state.into_sections(header).of("console")).unwrap();
        self.device.resume().unwrap();
        self.wiring.run_work(100);
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let gpa = self.arena.alloc(bytes.len() as u64, 8).unwrap();
        self.mem.view().write_slice(bytes, GuestAddress(gpa)).unwrap();
        self.queues[queue].add_chain(&[Buffer::readable(gpa, u32::try_from(bytes.len()).unwrap())]).unwrap();
        self.kick(queue);
    }

    fn kick(&mut self, queue: usize) {
        self.queues[queue].publish().unwrap();
        self.driver.kick(u16::try_from(queue).unwrap()).unwrap();
        self.wiring.run_work(100);
    }

    /// Gives the device `count` buffers of `len` bytes; returns where they are.
    fn offer(&mut self, queue: usize, count: usize, len: u32) -> Vec<(u16, u64)> {
        let buffers = (0..count)
            .map(|_| {
                let gpa = self.arena.alloc(len.into(), 8).unwrap();
                (self.queues[queue].add_chain(&[Buffer::writable(gpa, len)]).unwrap(), gpa)
            })
            .collect();
        self.kick(queue);
        buffers
    }

    /// What came back in `buffers`, in order.
    fn received(&mut self, queue: usize, buffers: &[(u16, u64)]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(used) = self.queues[queue].used().unwrap() {
            let (_, gpa) = buffers.iter().find(|(head, _)| *head == used.head).unwrap();
            let mut bytes = vec![0; used.len as usize];
            self.mem.view().read_slice(&mut bytes, GuestAddress(*gpa)).unwrap();
            all.push(bytes);
        }
        all
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        self.send(3, &message);
    }
}

fn message(bytes: &[u8]) -> (u32, u16, u16, Vec<u8>) {
    let id = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let event = u16::from_le_bytes(bytes[4..6].try_into().unwrap());
    let value = u16::from_le_bytes(bytes[6..8].try_into().unwrap());
    (id, event, value, bytes[8..].to_vec())
}

fn pair() -> (UnixStream, ReadInput<UnixStream>) {
    let (host, end) = UnixStream::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    (host, ReadInput::new(end))
}

#[test]
fn what_the_guest_writes_comes_out_in_order() {
    let sink = Sink::with_room(usize::MAX);
    let mut machine = Machine::started(vec![Port::console().output(sink.clone())], 0);
    machine.send(1, b"hello ");
    machine.send(1, &[b'x'; 10_000]);
    machine.send(1, b" world");
    assert_eq!(sink.text(), format!("hello {} world", "x".repeat(10_000)));
    assert_eq!(machine.handle.counts(0).unwrap().from_guest, 10_012);
    assert_eq!(machine.queues[1].used().unwrap().unwrap().len, 0);
}

/// An input that is interrupted before each read, and says nothing of it by an edge.
struct Interrupted(u8);

impl PortInput for Interrupted {
    fn source(&self) -> Option<freestone_bus::Source> {
        None
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0 += 1;
        match self.0 {
            1 | 3 => Err(ErrorKind::Interrupted.into()),
            2 => {
                data[0] = b'x';
                Ok(1)
            }
            _ => Err(ErrorKind::WouldBlock.into()),
        }
    }
}

#[test]
fn input_that_was_interrupted_is_read_again_at_once() {
    let mut machine = Machine::started(vec![Port::console().input(Interrupted(0))], 0);
    let buffers = machine.offer(0, 1, 10);
    assert_eq!(machine.received(0, &buffers), [b"x"]);
}

#[test]
fn what_the_host_writes_fills_the_guests_buffers_and_waits_for_more() {
    let (mut host, input) = pair();
    let mut machine = Machine::started(vec![Port::console().input(input)], 0);
    io::Write::write_all(&mut host, &[7; 5000]).unwrap();
    let first = machine.offer(0, 1, 1000);
    assert_eq!(machine.received(0, &first), [vec![7; 1000]]);
    let more = machine.offer(0, 6, 1000);
    assert_eq!(machine.received(0, &more).concat(), [7; 4000]);
    assert_eq!(machine.handle.counts(0).unwrap().to_guest, 5000);
}

#[test]
fn an_output_that_is_full_holds_the_guests_request_and_loses_nothing() {
    let sink = Sink::with_room(3);
    let mut machine = Machine::started(vec![Port::console().output(sink.clone())], 0);
    machine.send(1, b"abcdef");
    machine.send(1, b"ghi");
    assert_eq!((sink.text(), machine.queues[1].used().unwrap()), ("abc".to_owned(), None));
    sink.make_room(100);
    machine.wiring.run_work(10);
    assert_eq!(sink.text(), "abcdefghi");
    assert!(machine.queues[1].used().unwrap().is_some());
}

#[test]
fn a_pause_gives_a_half_written_request_back_and_keeps_the_rest() {
    let sink = Sink::with_room(3);
    let mut machine = Machine::started(vec![Port::console().output(sink.clone())], 0);
    machine.send(1, b"abcdef");
    machine.device.pause().unwrap();
    assert!(machine.queues[1].used().unwrap().is_some());
    machine.device.resume().unwrap();
    sink.make_room(100);
    machine.send(1, b"ghi");
    assert_eq!(sink.text(), "abcdefghi");
    assert_eq!(machine.handle.counts(0).unwrap().dropped, 0);
}

#[test]
fn ports_are_announced_when_the_driver_is_ready_and_described_when_it_knows_them() {
    let mut machine =
        Machine::started(vec![Port::console(), Port::named("org.test.agent")], feature::MULTIPORT);
    let buffers = machine.offer(2, 16, 64);
    machine.control(0, 0, 1);
    let added: Vec<_> = machine.received(2, &buffers).iter().map(|b| message(b)).collect();
    assert_eq!(added, [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
    machine.control(0, 3, 1);
    machine.control(1, 3, 1);
    let told: Vec<_> = machine.received(2, &buffers).iter().map(|b| message(b)).collect();
    let size = [80, 0, 25, 0].to_vec();
    let name = b"org.test.agent".to_vec();
    let wanted = [(0, 4, 1, vec![]), (0, 5, 0, size), (0, 6, 1, vec![]), (1, 7, 1, name), (1, 6, 1, vec![])];
    assert_eq!(told, wanted);
}

#[test]
fn a_port_gets_bytes_only_while_the_guest_has_it_open() {
    let (mut host, input) = pair();
    let ports = vec![Port::console(), Port::named("agent").input(input)];
    let mut machine = Machine::started(ports, feature::MULTIPORT);
    io::Write::write_all(&mut host, b"early").unwrap();
    let buffers = machine.offer(4, 2, 64);
    assert!(machine.received(4, &buffers).is_empty());
    machine.control(1, 6, 1);
    assert!(machine.handle.guest_open(1));
    assert_eq!(machine.received(4, &buffers), [b"early".to_vec()]);
}

#[test]
fn a_new_size_reaches_the_driver_by_config_or_by_message() {
    let plain = Machine::started(vec![Port::console()], feature::SIZE);
    plain.handle.resize(Size { cols: 132, rows: 50 }).unwrap();
    assert_eq!(plain.driver.take_interrupt().unwrap(), 2);
    let mut config = [0; 4];
    plain.driver.read_config(0, &mut config).unwrap();
    assert_eq!(config, [132, 0, 50, 0]);

    let mut several = Machine::started(vec![Port::console(), Port::named("x")], feature::MULTIPORT);
    let buffers = several.offer(2, 4, 64);
    several.handle.resize(Size { cols: 132, rows: 50 }).unwrap();
    several.wiring.run_work(10);
    let told: Vec<_> = several.received(2, &buffers).iter().map(|b| message(b)).collect();
    assert_eq!(told, [(0, 5, 0, vec![132, 0, 50, 0])]);
}

#[test]
fn the_emergency_register_writes_a_character_before_there_is_a_driver() {
    let sink = Sink::with_room(10);
    let machine = Machine::new(vec![Port::console().output(sink.clone())]);
    machine.driver.device().write(0x108, &[b'!', 0, 0, 0]).unwrap();
    machine.driver.device().write(0x100, &[1, 2, 3, 4]).unwrap();
    assert_eq!(sink.text(), "!");
}

#[test]
fn a_reset_closes_the_ports_and_keeps_the_hosts_bytes_for_the_next_driver() {
    let (mut host, input) = pair();
    let ports = vec![Port::console(), Port::named("agent").input(input)];
    let mut machine = Machine::started(ports, feature::MULTIPORT);
    machine.control(1, 6, 1);
    machine.driver.reset().unwrap();
    assert!(!machine.handle.guest_open(1));
    io::Write::write_all(&mut host, b"later").unwrap();
    machine.start(feature::MULTIPORT);
    let buffers = machine.offer(4, 1, 64);
    machine.control(1, 6, 1);
    assert_eq!(machine.received(4, &buffers), [b"later".to_vec()]);
}

#[test]
fn nonsense_in_control_messages_does_no_harm() {
    let mut machine = Machine::started(vec![Port::console(), Port::named("x")], feature::MULTIPORT);
    for (port, event, value) in [(7, 3, 1), (u32::MAX, 6, 1), (0, 99, 9), (1, 3, 77), (0, 0, 9)] {
        machine.control(port, event, value);
    }
    machine.send(3, b"abc");
    // A driver that asks again and again and gives no buffers does not make the device collect for ever.
    for _ in 0..500 {
        machine.control(0, 3, 1);
        while machine.queues[3].used().unwrap().is_some() {}
    }
    let buffers = machine.offer(2, 16, 64);
    assert_eq!(machine.received(2, &buffers).len(), 16);
    // A buffer too small for its message.
    let small = machine.offer(2, 1, 4);
    assert_eq!(machine.received(2, &small), [Vec::<u8>::new()]);
    assert_eq!(machine.driver.status().unwrap() & 64, 0);
}

#[test]
fn a_console_needs_a_port_and_takes_31_at_most() {
    assert!(Console::new(Vec::new()).is_err());
    let many = |n| (0..n).map(|i| Port::named(format!("p{i}"))).collect();
    assert!(Console::new(many(31)).is_ok());
    assert!(Console::new(many(32)).is_err());
}

#[test]
fn bytes_that_the_host_has_not_taken_are_saved() {
    let (before, after) = (Sink::with_room(3), Sink::with_room(2));
    let mut machine = Machine::started(vec![Port::console().output(before.clone())], 0);
    machine.send(1, b"abcdef");
    machine.move_on(vec![Port::console().output(after.clone())], |_| {});
    assert_eq!((before.text(), after.text()), ("abc".to_owned(), "de".to_owned()));
    after.make_room(100);
    machine.send(1, b"ghi");
    assert_eq!(after.text(), "defghi");
}

#[test]
fn bytes_that_the_guest_has_not_taken_are_saved() {
    let (mut host, input) = pair();
    let mut machine = Machine::started(vec![Port::console().input(input)], 0);
    let first = machine.offer(0, 1, 3);
    io::Write::write_all(&mut host, b"abcdef").unwrap();
    machine.kick(0);
    assert_eq!(machine.received(0, &first).concat(), b"abc");
    machine.move_on(vec![Port::console()], |_| {});
    let next = machine.offer(0, 1, 64);
    assert_eq!(machine.received(0, &next).concat(), b"def");
}

#[test]
fn messages_that_wait_and_what_is_known_of_the_ports_are_saved() {
    let ports = || vec![Port::console(), Port::named("agent")];
    let mut machine = Machine::started(ports(), feature::MULTIPORT);
    machine.control(0, 0, 1);
    machine.control(1, 3, 1);
    machine.control(1, 6, 1);
    machine.move_on(ports(), |_| {});
    assert!(machine.handle.guest_open(1) && !machine.handle.guest_open(0));
    let buffers = machine.offer(2, 16, 64);
    let messages: Vec<_> = machine.received(2, &buffers).iter().map(|bytes| message(bytes)).collect();
    let events: Vec<_> = messages.iter().map(|(id, event, ..)| (*id, *event)).collect();
    assert_eq!(events, [(0, 1), (1, 1), (1, 7), (1, 6)]);
}

#[test]
fn the_driver_is_told_that_an_end_is_closed_and_a_size_is_another_in_the_new_machine() {
    let ports = || vec![Port::console(), Port::named("agent")];
    let mut machine = Machine::started(ports(), feature::MULTIPORT);
    machine.control(1, 3, 1);
    let first = machine.offer(2, 8, 64);
    assert!(!machine.received(2, &first).is_empty());
    machine.move_on(ports(), |handle| {
        handle.set_open(1, false).unwrap();
        handle.resize(Size { cols: 132, rows: 43 }).unwrap();
    });
    let next = machine.offer(2, 4, 64);
    let buffers = [first, next].concat();
    let messages: Vec<_> = machine.received(2, &buffers).iter().map(|bytes| message(bytes)).collect();
    assert_eq!(messages, [(1, 6, 0, vec![]), (0, 5, 0, vec![132, 0, 43, 0])]);
}

#[test]
fn a_size_that_nobody_set_is_that_of_before_and_another_is_told_of() {
    let mut machine = Machine::started(vec![Port::console()], feature::SIZE);
    machine.handle.resize(Size { cols: 100, rows: 30 }).unwrap();
    machine.move_on(vec![Port::console()], |_| {});
    let mut size = [0; 4];
    machine.driver.read_config(0, &mut size).unwrap();
    assert_eq!(size, [100, 0, 30, 0]);
    let before = machine.driver.transport().config_generation().unwrap();
    machine.move_on(vec![Port::console()], |handle| handle.resize(Size { cols: 90, rows: 20 }).unwrap());
    machine.driver.read_config(0, &mut size).unwrap();
    assert_eq!(size, [90, 0, 20, 0]);
    assert_ne!(machine.driver.transport().config_generation().unwrap(), before);
}

#[test]
fn ports_of_another_name_are_refused() {
    let mut machine = Machine::new(vec![Port::console(), Port::named("agent")]);
    let mut state = State::new();
    machine.device.save(&mut state.of("console")).unwrap();
    let mut other = Machine::new(vec![Port::console(), Port::named("other")]);
    let header = Header::new(Arch::host(), "tests").unwrap();
    let error = other.device.restore(&mut state.into_sections(header).of("console")).unwrap_err();
    assert!(error.to_string().contains("name or kind of port 0x1"), "{error}");
}
