//! A port of one's own, a bridge, and a capture, without privileges: two stations in memory ask for one another by ARP, and the file
//! that is named on the command line gets what they say.
//!
//! ```text
//! cargo run -p freestone-net --features pcap --example bridge_and_capture -- /tmp/arp.pcapng
//! tshark -r /tmp/arp.pcapng
//! ```

use std::collections::VecDeque;
use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::Arc;

use freestone_net::pcap::Pcap;
use freestone_net::{
    Bridge, Endpoint, Frame, MacAddr, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source,
    VnetHeader,
};

/// A network with one station, which asks for an address and answers for its own.
#[derive(Debug, Clone)]
struct Station {
    mac: MacAddr,
    ip: Ipv4Addr,
    asks: Ipv4Addr,
    stats: Arc<PortStats>,
}

impl Station {
    fn new(last: u8, asks: u8) -> Self {
        Self {
            mac: MacAddr([0x52, 0x54, 0, 0, 0, last]),
            ip: Ipv4Addr::new(192, 0, 2, last),
            asks: Ipv4Addr::new(192, 0, 2, asks),
            stats: Arc::default(),
        }
    }

    /// An ARP packet (RFC 826): operation 1 asks, 2 answers.
    fn arp(&self, operation: u8, to: MacAddr, asks: Ipv4Addr) -> Vec<u8> {
        let mut frame = [to.0, self.mac.0].concat();
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(self.mac.0);
        frame.extend(self.ip.octets());
        frame.extend(if to.is_broadcast() { [0; 6] } else { to.0 });
        frame.extend(asks.octets());
        frame
    }
}

impl Port for Station {
    fn info(&self) -> PortInfo {
        PortInfo::default()
    }

    fn open(&mut self, _setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let queue = VecDeque::from([self.arp(1, MacAddr::BROADCAST, self.asks)]);
        Ok(vec![Box::new(StationEnd { station: self.clone(), queue })])
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}

struct StationEnd {
    station: Station,
    queue: VecDeque<Vec<u8>>,
}

impl Endpoint for StationEnd {
    fn sources(&self) -> Vec<Source> {
        // All it has to say is an answer: nothing comes by itself.
        Vec::new()
    }

    fn transmit(&mut self, _header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        self.station.stats.sent(frame.len());
        // Byte 21 is the operation, the sender comes behind it, and at 38 is the address that is asked for.
        if let Some([.., 1, s0, s1, s2, s3, s4, s5, i0, i1, i2, i3]) = frame.first::<32>()
            && frame.after(38).first() == Some(self.station.ip.octets())
        {
            let from = MacAddr([s0, s1, s2, s3, s4, s5]);
            println!("{} is asked for by {from}", self.station.ip);
            self.queue.push_back(self.station.arp(2, from, Ipv4Addr::new(i0, i1, i2, i3)));
        }
        Sent::Done
    }

    fn waiting(&mut self) -> Option<usize> {
        self.queue.front().map(Vec::len)
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        match self.queue.pop_front_if(|frame| frame.len() <= room.len()) {
            Some(frame) => {
                room.write_at(0, &frame);
                self.station.stats.received(frame.len());
                Received::Frame(frame.len(), VnetHeader::default())
            }
            None => self.waiting().map_or(Received::Nothing, Received::NeedsRoom),
        }
    }

    fn drop_next(&mut self) {
        self.queue.pop_front();
        self.station.stats.receive_dropped();
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).ok_or("say where the capture is to be written")?;
    let mut left = Pcap::create(Station::new(1, 2), &file, "left")?;
    let mut right = Station::new(2, 1);
    let mut bridge = Bridge::open(&mut left, &mut right)?;
    while bridge.step() {}
    println!("{:?}", bridge.counts());
    println!("{file}: {:?}", left.capture().counts());
    Ok(())
}
