//! Two ports of one switch: a frame goes from the memory of one machine to that of the other.

use std::error::Error;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::switch::{PortOptions, Switch};
use freestone_net::{Frame, MacAddr, Port, Received, Setup, VnetHeader};

fn main() -> Result<(), Box<dyn Error>> {
    let switch = Switch::default();
    let mut ports = [
        switch.port(PortOptions { name: "left".into(), ..PortOptions::default() })?,
        switch.port(PortOptions { name: "right".into(), ..PortOptions::default() })?,
    ];
    // A card asks for as much as its driver takes; here all that the switch offers.
    let mut ends = Vec::new();
    for port in &mut ports {
        let setup = Setup { pairs: 1, receive: port.info().receive };
        ends.extend(port.open(&setup)?);
    }
    let [left, right] = ends.as_mut_slice() else {
        return Err("a port gave no endpoint".into());
    };

    let memory = GuestMem::anonymous(0x1_0000)?;
    let view = memory.view();
    let sender = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    let bytes = [&MacAddr::BROADCAST.0[..], &sender.0, &[0x88, 0xB5], b"hello, everybody"].concat();
    let slices = [view.get_slice(GuestAddress(0x1000), bytes.len())?];
    let frame = Frame::new(&slices);
    frame.write_at(0, &bytes);
    left.transmit(&VnetHeader::default(), frame);
    left.flush();

    let room = right.waiting().ok_or("nothing came")?;
    let slices = [view.get_slice(GuestAddress(0x8000), room)?];
    let Received::Frame(len, _) = right.receive(Frame::new(&slices)) else {
        return Err("nothing came".into());
    };
    let mut text = vec![0; len - 14];
    Frame::new(&slices).read_at(14, &mut text);
    println!("{}", String::from_utf8_lossy(&text));
    for address in switch.info().table {
        println!("{} is at port {} in VLAN {}", address.mac, address.port, address.vlan);
    }
    Ok(())
}
