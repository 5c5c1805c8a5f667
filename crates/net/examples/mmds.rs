//! A machine's view of the metadata service, without a machine: frames go in and come out by hand.

use std::sync::Arc;

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::mmds::{MmdsConfig, MmdsPort, MmdsStore};
use freestone_net::{
    Endpoint, Frame, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source, VnetHeader,
};
use serde_json::json;

/// A network without anybody.
#[derive(Debug)]
struct Nobody;

impl Port for Nobody {
    fn info(&self) -> PortInfo {
        PortInfo::default()
    }
    fn open(&mut self, _setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        Ok(vec![Box::new(Self)])
    }
    fn stats(&self) -> Arc<PortStats> {
        Arc::default()
    }
}

impl Endpoint for Nobody {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn transmit(&mut self, _header: &VnetHeader, _frame: Frame<'_, '_>) -> Sent {
        Sent::Done
    }
    fn waiting(&mut self) -> Option<usize> {
        None
    }
    fn receive(&mut self, _room: Frame<'_, '_>) -> Received {
        Received::Nothing
    }
    fn drop_next(&mut self) {}
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let store = MmdsStore::default();
    store.put(json!({"latest": {"meta-data": {"ami-id": "ami-1"}}}))?;
    let mut port = MmdsPort::new(Box::new(Nobody), MmdsConfig::new(), store)?;
    let mut end = port.open(&Setup { pairs: 1, receive: port.info().receive })?.remove(0);

    // Who has 169.254.169.254?
    let guest = [0x52, 0x54, 0, 0, 0, 1];
    let mut question = [[0xFF; 6], guest].concat();
    question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend(guest);
    question.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 169, 254, 169, 254]);
    let mem = GuestMem::anonymous(1 << 16)?;
    let view = mem.view();
    view.write_slice(&question, GuestAddress(0x1000))?;
    end.transmit(
        &VnetHeader::default(),
        Frame::new(&[view.get_slice(GuestAddress(0x1000), question.len())?]),
    );

    let room = [view.get_slice(GuestAddress(0x2000), 2000)?];
    if let Received::Frame(_, _) = end.receive(Frame::new(&room)) {
        let mut mac = [0; 6];
        Frame::new(&room).read_at(22, &mut mac);
        println!("169.254.169.254 is at {mac:02x?}");
    }
    Ok(())
}
