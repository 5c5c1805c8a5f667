//! A network card with no hypervisor: a port that answers every ping of Ethernet (a frame of a type of its own) and a driver that
//! plays the guest, sends one, and reads the answer.
//!
//! `cargo run -p freestone-virtio --features net --example net_without_hypervisor`

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_net::{Endpoint, Frame, Port, PortInfo, PortStats, Received, Sent, Setup, Source, VnetHeader};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, MmioDriver};
use freestone_virtio::{Net, NetConfig, VirtioMmioPlug};

/// Bytes of the header before each frame.
const HEADER: usize = 12;
const RX_BUFFER: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x11_0000;

/// A network of one station, which sends every frame back to where it came from.
#[derive(Debug, Default)]
struct Echo {
    stats: Arc<PortStats>,
}

impl Port for Echo {
    fn info(&self) -> PortInfo {
        PortInfo { mtu: Some(1500), ..PortInfo::default() }
    }

    fn open(&mut self, _setup: &Setup) -> freestone_net::Result<Vec<Box<dyn Endpoint>>> {
        Ok(vec![Box::new(Station { stats: Arc::clone(&self.stats), answers: VecDeque::new() })])
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}

struct Station {
    stats: Arc<PortStats>,
    answers: VecDeque<Vec<u8>>,
}

impl Endpoint for Station {
    /// Answers come at once, so there is nothing to wait for.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn transmit(&mut self, _header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let mut bytes = vec![0; frame.len()];
        frame.read_at(0, &mut bytes);
        // From whom it came, it goes to.
        if let Some(addresses) = bytes.get_mut(..12) {
            addresses.rotate_left(6);
        }
        self.stats.sent(bytes.len());
        self.answers.push_back(bytes);
        Sent::Done
    }

    fn waiting(&mut self) -> Option<usize> {
        self.answers.front().map(Vec::len)
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let Some(answer) = self.answers.front() else { return Received::Nothing };
        let len = answer.len();
        if room.len() < len {
            return Received::NeedsRoom(len);
        }
        room.write_at(0, answer);
        self.answers.pop_front();
        self.stats.received(len);
        Received::Frame(len, VnetHeader::default())
    }

    fn drop_next(&mut self) {
        self.answers.pop_front();
        self.stats.receive_dropped();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let net = Net::new(Echo::default(), NetConfig::new())?;
    let handle = net.handle();
    let memory = GuestMem::anonymous(4 << 20)?;
    let mut machine = TestWiring::new(memory.clone());
    let _device = machine.plug(VirtioMmioPlug::new(net, "net0"))?;

    // The driver's side: negotiate, set the queues up, leave a buffer to receive into.
    let mut driver = MmioDriver::new(machine.mmio_device(0).ok_or("the device has no registers")?);
    driver.negotiate(u64::MAX)?;
    let mut arena = Arena::new(0x1000, RX_BUFFER);
    let mut rx = driver.setup_queue(&memory, &mut arena, 0, 16)?;
    let mut tx = driver.setup_queue(&memory, &mut arena, 1, 16)?;
    driver.setup_queue(&memory, &mut arena, 2, 16)?;
    driver.driver_ok()?;
    rx.add_chain(&[Buffer::writable(RX_BUFFER, 2048)])?;
    rx.publish()?;

    let mut mac = [0; 6];
    driver.read_config(0, &mut mac)?;
    println!("the guest's address is {}", handle.mac());
    let frame = [&[0x02, 0, 0, 0, 0, 1][..], &mac, &[0x88, 0xb5], b"is anybody there?"].concat();
    let packet = [&[0; HEADER][..], &frame].concat();
    memory.view().write_slice(&packet, GuestAddress(TX_BUFFER))?;
    tx.add_chain(&[Buffer::readable(TX_BUFFER, u32::try_from(packet.len())?)])?;
    tx.publish()?;
    driver.kick(1)?;
    machine.run_work(100);

    let used = rx.used()?.ok_or("no answer came")?;
    let mut answer = vec![0; used.len as usize - HEADER];
    memory.view().read_slice(&mut answer, GuestAddress(RX_BUFFER + HEADER as u64))?;
    println!("guest reads: {:?}", String::from_utf8_lossy(answer.get(14..).unwrap_or_default()));
    println!("{}", handle.stats().counts());
    Ok(())
}
