//! A vsock device with no hypervisor: a driver plays a guest that connects to a program of the host over a Unix socket, says
//! hello, and reads the answer.
//!
//! `cargo run -p freestone-virtio --features vsock --example vsock_without_hypervisor`

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::VirtioMmioPlug;
use freestone_virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op, shutdown};
use freestone_virtio::vsock::{UnixHost, Vsock, VsockConfig};

const CID: u32 = 3;
const PORT: u32 = 52;
/// Where the guest keeps its packets.
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x20_0000;

struct Guest {
    memory: GuestMem,
    machine: TestWiring,
    driver: MmioDriver,
    rx: DriverQueue,
    tx: DriverQueue,
}

impl Guest {
    /// Sends one packet to the host, and lets the device work.
    fn send(&mut self, op: u16, flags: u32, data: &[u8]) -> Result<(), Box<dyn Error>> {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: 1000,
            dst_port: PORT,
            len: u32::try_from(data.len())?,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        };
        println!("guest: {header:?}");
        let packet = [&header.to_bytes(), data].concat();
        self.memory.view().write_slice(&packet, GuestAddress(TX_BUFFER))?;
        self.tx.add_chain(&[Buffer::readable(TX_BUFFER, u32::try_from(packet.len())?)])?;
        self.tx.publish()?;
        self.driver.kick(1)?;
        self.machine.run_work(100);
        while self.tx.used()?.is_some() {}
        Ok(())
    }

    /// Prints the packets that came, and returns their data.
    fn receive(&mut self) -> Result<Vec<u8>, Box<dyn Error>> {
        self.machine.run_work(100);
        let mut all = Vec::new();
        while let Some(used) = self.rx.used()? {
            let at = RX_BUFFERS + 4096 * u64::from(used.head);
            let mut header = [0; HEADER_LEN];
            self.memory.view().read_slice(&mut header, GuestAddress(at))?;
            println!(" host: {:?}", Header::from_bytes(&header));
            let mut data = vec![0; used.len as usize - HEADER_LEN];
            self.memory.view().read_slice(&mut data, GuestAddress(at + HEADER_LEN as u64))?;
            all.extend(data);
        }
        Ok(all)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("v.sock");
    let vsock = Vsock::new(UnixHost::bind(&path, UnixHost::DEFAULT_MODE)?, VsockConfig::new(CID))?;
    let stats = vsock.stats();
    let memory = GuestMem::anonymous(4 << 20)?;
    let mut machine = TestWiring::new(memory.clone());
    let _device = machine.plug(VirtioMmioPlug::new(vsock, "vsock0"))?;
    let mut driver = MmioDriver::new(machine.mmio_device(0).ok_or("the device has no registers")?);
    driver.negotiate(u64::MAX)?;
    let mut arena = Arena::new(0x1000, RX_BUFFERS);
    let mut rx = driver.setup_queue(&memory, &mut arena, 0, 64)?;
    let tx = driver.setup_queue(&memory, &mut arena, 1, 64)?;
    driver.setup_queue(&memory, &mut arena, 2, 64)?;
    driver.driver_ok()?;
    for n in 0..64 {
        rx.add_chain(&[Buffer::writable(RX_BUFFERS + 4096 * n, 4096)])?;
    }
    rx.publish()?;
    let mut guest = Guest { memory, machine, driver, rx, tx };

    // A program of the host listens for the guest on port 52.
    let listener = UnixListener::bind(dir.path().join(format!("v.sock_{PORT}")))?;
    guest.send(op::REQUEST, 0, &[])?;
    guest.receive()?;
    let (mut program, _) = listener.accept()?;

    guest.send(op::RW, 0, b"hello host")?;
    let mut hello = [0; 10];
    program.read_exact(&mut hello)?;
    println!("program reads: {}", String::from_utf8_lossy(&hello));
    program.write_all(b"hello guest")?;
    println!("guest reads: {}", String::from_utf8_lossy(&guest.receive()?));

    guest.send(op::SHUTDOWN, shutdown::BOTH, &[])?;
    guest.receive()?;
    println!("{}", stats.counts());
    Ok(())
}
