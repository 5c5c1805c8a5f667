//! Asks for an address (RFC 2131).

use freestone_guest_program::cpu;

use crate::stack::{AGAIN, Address, BROADCAST, Failure, Stack};
use crate::wire::{IPV4, Ip, UDP, Writer, long};

const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// Before a message: the header of UDP.
const UDP_HEADER: usize = 8;
/// In a message: transaction, our address, cookie, options.
const TRANSACTION: usize = 4;
const YOURS: usize = 16;
const COOKIE: u32 = 0x6382_5363;
const OPTIONS: usize = 240;
/// Options.
const MASK: u8 = 1;
const ROUTER: u8 = 3;
const REQUESTED: u8 = 50;
const TYPE: u8 = 53;
const SERVER_ID: u8 = 54;
/// Types of messages.
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACKNOWLEDGED: u8 = 5;

/// A message that came.
#[derive(Clone, Copy)]
struct Message {
    ip: Ip,
    bytes: [u8; 600],
    len: usize,
}

impl Message {
    fn option(&self, wanted: u8) -> Option<&[u8]> {
        let mut rest = self.bytes.get(UDP_HEADER + OPTIONS..self.len)?;
        loop {
            match *rest {
                [0, ref next @ ..] => rest = next,
                [code, len, ref next @ ..] if code != 255 => {
                    let value = next.get(..usize::from(len))?;
                    if code == wanted {
                        return Some(value);
                    }
                    rest = next.get(usize::from(len)..)?;
                }
                _ => return None,
            }
        }
    }

    fn ip(&self, wanted: u8) -> Option<Ip> {
        self.option(wanted)?.first_chunk().copied().map(Ip)
    }
}

/// Gets an address and takes it.
pub fn configure(stack: &mut Stack) -> Result<Address, Failure> {
    stack.address = None;
    let transaction = (cpu::tsc() as u32).to_be_bytes();
    let offer = exchange(stack, transaction, DISCOVER, None, OFFER)?;
    let server = offer.ip(SERVER_ID).ok_or(Failure::NoAddress)?;
    let lease = exchange(stack, transaction, REQUEST, Some((offer.ip, server)), ACKNOWLEDGED)?;
    let prefix = lease.ip(MASK).map_or(24, |mask| u32::from_be_bytes(mask.0).leading_ones());
    let address = Address { ip: lease.ip, prefix, gateway: lease.ip(ROUTER) };
    stack.address = Some(address);
    Ok(address)
}

/// Sends a message, again and again, until the wanted answer comes.
fn exchange(
    stack: &mut Stack,
    transaction: [u8; 4],
    kind: u8,
    request: Option<(Ip, Ip)>,
    wanted: u8,
) -> Result<Message, Failure> {
    stack.inbox.wanted = Some((UDP, CLIENT));
    stack.inbox.len = 0;
    let mut asked = 0;
    let answer = stack.until(|stack| {
        if stack.inbox.len > 0 {
            let len = core::mem::take(&mut stack.inbox.len);
            let bytes = stack.inbox.bytes;
            let body = bytes.get(UDP_HEADER..len).unwrap_or_default();
            let ours =
                body.get(TRANSACTION..TRANSACTION + 4) == Some(&transaction) && long(body, 236) == COOKIE;
            let message = Message { ip: Ip(long(body, YOURS).to_be_bytes()), bytes, len };
            if ours && message.option(TYPE) == Some(&[wanted]) {
                return Some(Ok(message));
            }
        }
        if cpu::tsc().wrapping_sub(asked) > AGAIN {
            asked = cpu::tsc();
            send(stack, transaction, kind, request);
        }
        None
    });
    stack.inbox.wanted = None;
    answer
}

fn send(stack: &mut Stack, transaction: [u8; 4], kind: u8, request: Option<(Ip, Ip)>) {
    let mac = stack.card.mac;
    let mut options = Options { bytes: [0; 32], len: 0 };
    options.put(&[TYPE, 1, kind, 55, 2, MASK, ROUTER]);
    if let Some((ip, server)) = request {
        options.put(&[REQUESTED, 4]);
        options.put(&ip.0);
        options.put(&[SERVER_ID, 4]);
        options.put(&server.0);
    }
    options.put(&[255]);
    // At least the 300 bytes of a BOOTP message.
    let len = UDP_HEADER + OPTIONS + 60;
    let mut frame = Writer::new(BROADCAST, mac, IPV4);
    frame.ip(UDP, Ip([0; 4]), Ip([255; 4]), len);
    frame.put(&CLIENT.to_be_bytes()).put(&SERVER.to_be_bytes()).put(&(len as u16).to_be_bytes());
    // No checksum, which IPv4 allows.
    frame.put(&[0, 0]);
    frame.put(&[1, 1, 6, 0]).put(&transaction).put(&[0, 0, 0x80, 0]).put(&[0; 16]);
    frame.put(&mac).put(&[0; 10 + 64 + 128]).put(&COOKIE.to_be_bytes());
    frame.put(&options.bytes).put(&[0; 28]);
    stack.send(&frame);
}

struct Options {
    bytes: [u8; 32],
    len: usize,
}

impl Options {
    fn put(&mut self, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            to.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }
}
