//! The guest's side of a vsock device: a driver for its queues, and sockets as a guest's kernel would have them.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use freestone_bus::{IoDevice, Irq, ManualSpawner, Spawn};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver, status};
use freestone_virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op, shutdown};
use freestone_virtio::vsock::{UnixHost, Vsock, VsockConfig, VsockCounts, VsockStats};
use freestone_virtio::{MmioTransport, MmioWiring};

pub const CID: u32 = 52;
const MEMORY: u64 = 16 << 20;
const QUEUE_SIZE: u16 = 128;
/// Largest payload this guest sends in one packet.
pub const MAX_SEND: usize = 4096;
const RX_BUFFER: u32 = 4096;
/// Bytes this guest has room for on a connection.
pub const ROOM: u32 = 32 << 10;

/// Host port and guest port.
pub type Ports = (u32, u32);

/// A socket of the guest.
#[derive(Debug, Default)]
pub struct Socket {
    pub open: bool,
    pub reset: bool,
    pub shutdown: u32,
    pub data: Vec<u8>,
    /// Bytes received, of which the application took `taken`.
    pub received: u32,
    pub taken: u32,
    pub sent: u32,
    pub peer_room: u32,
    pub peer_taken: u32,
    /// The application reads at once.
    pub reads: bool,
}

impl Socket {
    pub fn credit(&self) -> u32 {
        self.peer_room - self.sent.wrapping_sub(self.peer_taken)
    }
}

pub struct Guest {
    pub device: Arc<MmioTransport>,
    /// Drives the device, unless a thread does.
    spawner: Option<ManualSpawner>,
    pub driver: MmioDriver,
    pub mem: GuestMem,
    arena: Arena,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    rx_buffers: HashMap<u16, u64>,
    free_tx: Vec<u64>,
    busy_tx: HashMap<u16, u64>,
    stats: Arc<VsockStats>,
    pub sockets: HashMap<Ports, Socket>,
    pub listening: HashSet<u32>,
    /// Everything that came and belongs to no socket.
    pub strays: Vec<Header>,
    pub path: PathBuf,
    /// Receive buffers are given back at once.
    pub supplies: bool,
    _dir: tempfile::TempDir,
}

impl Guest {
    pub fn new() -> Self {
        Self::with(|config| config, |_| {})
    }

    pub fn with(config: impl FnOnce(VsockConfig) -> VsockConfig, prepare: impl FnOnce(&mut Vsock)) -> Self {
        let manual = ManualSpawner::new();
        Self::on(Arc::new(manual.clone()), Some(manual), config, prepare)
    }

    /// With a device that `spawner` drives; the guest itself turns `manual`.
    pub fn on(
        spawner: Arc<dyn Spawn>,
        manual: Option<ManualSpawner>,
        config: impl FnOnce(VsockConfig) -> VsockConfig,
        prepare: impl FnOnce(&mut Vsock),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let host = UnixHost::bind(&path, UnixHost::DEFAULT_MODE).unwrap();
        let config = config(VsockConfig::new(CID).queue_size(QUEUE_SIZE).poll(Duration::ZERO));
        let mut vsock = Vsock::new(host, config).unwrap();
        prepare(&mut vsock);
        let stats = vsock.stats();
        let mem = GuestMem::anonymous(MEMORY).unwrap();
        let wiring = MmioWiring { base: 0, mem: mem.clone(), irq: Irq::null(), doorbells: None, spawner };
        let device = Arc::new(MmioTransport::new("vsock0", Box::new(vsock), wiring).unwrap());
        let mut driver = MmioDriver::new(device.clone() as Arc<dyn IoDevice>);
        let mut arena = Arena::new(0x1000, MEMORY);
        let [rx, tx, event] = start(&mut driver, &mem, &mut arena);
        let free_tx =
            (0..QUEUE_SIZE / 2).map(|_| arena.alloc((HEADER_LEN + MAX_SEND) as u64, 64).unwrap()).collect();
        let mut guest = Self {
            device,
            spawner: manual,
            driver,
            mem,
            arena,
            rx,
            tx,
            event,
            rx_buffers: HashMap::new(),
            free_tx,
            busy_tx: HashMap::new(),
            stats,
            sockets: HashMap::new(),
            listening: HashSet::new(),
            strays: Vec::new(),
            path,
            supplies: true,
            _dir: dir,
        };
        guest.supply(QUEUE_SIZE);
        guest
    }

    /// Resets the device and starts it again with fresh queues; forgets all sockets.
    pub fn restart(&mut self) {
        self.arena = Arena::new(0x1000, MEMORY);
        let [rx, tx, event] = start(&mut self.driver, &self.mem, &mut self.arena);
        (self.rx, self.tx, self.event) = (rx, tx, event);
        self.free_tx.extend(self.busy_tx.drain().map(|(_, gpa)| gpa));
        self.free_tx.iter_mut().for_each(|gpa| {
            *gpa = self.arena.alloc((HEADER_LEN + MAX_SEND) as u64, 64).unwrap();
        });
        self.rx_buffers.clear();
        self.sockets.clear();
        self.supply(QUEUE_SIZE);
    }

    pub fn counts(&self) -> VsockCounts {
        self.stats.counts()
    }

    pub fn stats(&self) -> Arc<VsockStats> {
        Arc::clone(&self.stats)
    }

    pub fn needs_reset(&self) -> bool {
        self.driver.status().unwrap() & status::NEEDS_RESET != 0
    }

    /// Where a program listens for the guest on `port`.
    pub fn path_of(&self, port: u32) -> PathBuf {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        Path::new(&path).to_owned()
    }

    /// Gives the device `n` more receive buffers.
    pub fn supply(&mut self, n: u16) {
        for _ in 0..n {
            let gpa = self.arena.alloc(RX_BUFFER.into(), 64).unwrap();
            let head = self.rx.add_chain(&[Buffer::writable(gpa, RX_BUFFER)]).unwrap();
            self.rx_buffers.insert(head, gpa);
        }
        self.kick_rx();
    }

    fn kick_rx(&mut self) {
        if self.rx.publish().unwrap() {
            self.driver.kick(0).unwrap();
        }
    }

    pub fn run(&mut self) {
        match &self.spawner {
            Some(spawner) => assert!(spawner.run(100_000) < 100_000, "the device never comes to rest"),
            None => std::thread::sleep(Duration::from_micros(100)),
        }
    }

    fn reap_tx(&mut self) {
        while let Some(used) = self.tx.used().unwrap() {
            assert_eq!(used.len, 0, "the device writes nothing into packets of the guest");
            if let Some(gpa) = self.busy_tx.remove(&used.head) {
                self.free_tx.push(gpa);
            }
        }
    }

    /// Whether a packet can be sent without waiting for the device.
    pub fn can_send(&mut self) -> bool {
        self.reap_tx();
        !self.free_tx.is_empty()
    }

    /// Memory for a packet built by hand.
    pub fn alloc(&mut self, len: u64) -> u64 {
        self.arena.alloc(len, 64).unwrap()
    }

    /// Sends a chain built by hand.
    pub fn send_chain(&mut self, buffers: &[Buffer]) {
        self.tx.add_chain(buffers).unwrap();
        self.tx.publish().unwrap();
        self.driver.kick(1).unwrap();
        self.run();
        self.reap_tx();
    }

    /// Sends a packet as it is.
    pub fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.reap_tx();
        for _ in 0..100 {
            if !self.free_tx.is_empty() {
                break;
            }
            self.pump_once();
        }
        let gpa = self.free_tx.pop().unwrap();
        let view = self.mem.view();
        view.write_slice(&header.to_bytes(), GuestAddress(gpa)).unwrap();
        view.write_slice(data, GuestAddress(gpa + HEADER_LEN as u64)).unwrap();
        let mut chain = vec![Buffer::readable(gpa, u32::try_from(HEADER_LEN).unwrap())];
        if !data.is_empty() {
            chain.push(Buffer::readable(gpa + HEADER_LEN as u64, u32::try_from(data.len()).unwrap()));
        }
        let head = self.tx.add_chain(&chain).unwrap();
        self.busy_tx.insert(head, gpa);
        if self.tx.publish().unwrap() {
            self.driver.kick(1).unwrap();
        }
    }

    /// A packet of the socket with these ports.
    pub fn header(&self, ports: Ports, op: u16) -> Header {
        let taken = self.sockets.get(&ports).map_or(0, |socket| socket.taken);
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.1,
            dst_port: ports.0,
            kind: TYPE_STREAM,
            op,
            buf_alloc: ROOM,
            fwd_cnt: taken,
            ..Header::default()
        }
    }

    pub fn send(&mut self, ports: Ports, op: u16) {
        let header = self.header(ports, op);
        self.send_raw(&header, &[]);
    }

    pub fn send_shutdown(&mut self, ports: Ports, flags: u32) {
        let header = Header { flags, ..self.header(ports, op::SHUTDOWN) };
        self.send_raw(&header, &[]);
    }

    /// Begins to connect.
    pub fn connect(&mut self, ports: Ports) {
        self.sockets.insert(ports, Socket { reads: true, ..Socket::default() });
        self.send(ports, op::REQUEST);
    }

    /// Connects, or says that it was refused.
    pub fn connected(&mut self, ports: Ports) -> bool {
        self.connect(ports);
        self.until(|guest| guest.sockets[&ports].open || guest.sockets[&ports].reset);
        self.sockets[&ports].open
    }

    /// Sends as much of `data` as there is credit for; returns how much that was.
    pub fn write(&mut self, ports: Ports, data: &[u8]) -> usize {
        let mut sent = 0;
        while sent < data.len() {
            let socket = self.sockets.get_mut(&ports).unwrap();
            let n = (data.len() - sent).min(MAX_SEND).min(socket.credit() as usize);
            if n == 0 {
                break;
            }
            socket.sent = socket.sent.wrapping_add(u32::try_from(n).unwrap());
            self.send_data(ports, &data[sent..sent + n]);
            sent += n;
        }
        sent
    }

    /// Sends data whatever the credit.
    pub fn send_data(&mut self, ports: Ports, data: &[u8]) {
        let header = Header { len: u32::try_from(data.len()).unwrap(), ..self.header(ports, op::RW) };
        self.send_raw(&header, data);
    }

    /// The application takes what came.
    pub fn take(&mut self, ports: Ports) -> Vec<u8> {
        let socket = self.sockets.get_mut(&ports).unwrap();
        socket.taken = socket.received;
        std::mem::take(&mut socket.data)
    }

    /// The next packet of the device, if it has one.
    pub fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.rx.used().unwrap()?;
        let gpa = self.rx_buffers.remove(&used.head).unwrap();
        let view = self.mem.view();
        let mut bytes = vec![0; used.len as usize];
        view.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = Header::from_bytes(header);
        assert_eq!(header.len as usize, data.len(), "the length in the header is that of the data");
        assert_eq!(header.dst_cid, u64::from(CID));
        let data = data.to_vec();
        if self.supplies {
            let head = self.rx.add_chain(&[Buffer::writable(gpa, RX_BUFFER)]).unwrap();
            self.rx_buffers.insert(head, gpa);
            self.kick_rx();
        }
        Some((header, data))
    }

    /// Lets the device work, and handles what it sends as a kernel would.
    pub fn pump_once(&mut self) {
        self.run();
        self.reap_tx();
        while let Some((header, data)) = self.receive() {
            self.handle(&header, &data);
        }
    }

    fn handle(&mut self, header: &Header, data: &[u8]) {
        let ports = (header.src_port, header.dst_port);
        if header.op == op::REQUEST {
            let known = self.listening.contains(&header.dst_port);
            if known {
                let socket = Socket {
                    open: true,
                    reads: true,
                    peer_room: header.buf_alloc,
                    peer_taken: header.fwd_cnt,
                    ..Socket::default()
                };
                assert!(self.sockets.insert(ports, socket).is_none(), "ports are used once at a time");
            }
            self.send(ports, if known { op::RESPONSE } else { op::RST });
            return;
        }
        let Some(socket) = self.sockets.get_mut(&ports) else {
            self.strays.push(*header);
            return;
        };
        assert!(!socket.reset, "nothing comes after a RST: {header:?}");
        socket.peer_room = header.buf_alloc;
        socket.peer_taken = header.fwd_cnt;
        match header.op {
            op::RESPONSE => socket.open = true,
            op::RST => (socket.reset, socket.open) = (true, false),
            op::RW => {
                socket.received = socket.received.wrapping_add(header.len);
                socket.data.extend(data);
                assert!(
                    socket.received.wrapping_sub(socket.taken) <= ROOM,
                    "the device sent more than there is room for"
                );
                if socket.reads {
                    let before = socket.taken;
                    socket.taken = socket.received;
                    if socket.received / (ROOM / 4) != before / (ROOM / 4) {
                        self.send(ports, op::CREDIT_UPDATE);
                    }
                }
            }
            op::CREDIT_REQUEST => self.send(ports, op::CREDIT_UPDATE),
            op::SHUTDOWN => {
                assert_eq!(header.flags & !shutdown::BOTH, 0);
                socket.shutdown |= header.flags;
            }
            op::CREDIT_UPDATE => {}
            other => panic!("unexpected operation {other}"),
        }
    }

    /// Goes on until `done`; fails after a long while.
    pub fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        loop {
            self.pump_once();
            if done(self) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it never comes about");
            std::thread::yield_now();
        }
    }
}

fn start(driver: &mut MmioDriver, mem: &GuestMem, arena: &mut Arena) -> [DriverQueue; 3] {
    driver.negotiate(u64::MAX).unwrap();
    let queues = [0, 1, 2].map(|index| driver.setup_queue(mem, arena, index, QUEUE_SIZE).unwrap());
    driver.driver_ok().unwrap();
    queues
}
