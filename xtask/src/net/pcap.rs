//! Reads a recording (pcapng): checks that it is whole, block by block, and says what its TCP segments were like.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Block types (section 4 of draft-ietf-opsawg-pcapng).
const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1A2B_3C4D;
/// No block of ours is longer.
const LONGEST: usize = 1 << 20;
const ETHERNET: usize = 14;

/// Reads the file and prints one line for each direction.
pub fn run(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let summary = read(&mut BufReader::new(file)).with_context(|| format!("reading {}", path.display()))?;
    println!("{summary}");
    Ok(())
}

/// What went one way.
#[derive(Debug, Default)]
struct Way {
    frames: u64,
    /// TCP segments with data, and the bytes of it.
    segments: u64,
    bytes: u64,
    longest: usize,
    /// TCP segments without data.
    empty: u64,
    /// The smallest and the largest window that was announced, after the handshakes.
    window: Option<(u32, u32)>,
}

/// What the file holds.
#[derive(Debug, Default)]
struct Summary {
    received: Way,
    sent: Way,
    /// Of each connection's end: how its windows are scaled.
    scales: HashMap<(Vec<u8>, bool), u32>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (word, way)) in [("received", &self.received), ("sent", &self.sent)].iter().enumerate() {
            let mean = way.bytes.checked_div(way.segments).unwrap_or(0);
            let (low, high) = way.window.unwrap_or_default();
            let end = if number == 0 { "\n" } else { "" };
            write!(
                f,
                "{word} {} frames; tcp {} segments of {mean} bytes, longest {}, {} empty; window {low} to {high}{end}",
                way.frames, way.segments, way.longest, way.empty
            )?;
        }
        Ok(())
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A number as the network has it.
fn be16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read(from: &mut impl Read) -> Result<Summary> {
    let mut summary = Summary::default();
    for number in 0u64.. {
        let mut head = [0; 8];
        match from.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                ensure!(number > 1, "there are {number} blocks: not even a section and an interface");
                break;
            }
            result => result.context("reading the head of a block")?,
        }
        let (kind, length) = (u32_at(&head, 0).unwrap_or(0), u32_at(&head, 4).unwrap_or(0));
        let length_in_bytes = usize::try_from(length)?;
        if !(12..=LONGEST).contains(&length_in_bytes) || !length.is_multiple_of(4) {
            bail!("block {number} is {length} bytes long");
        }
        let mut body = vec![0; length_in_bytes - 8];
        from.read_exact(&mut body).with_context(|| format!("block {number} of {length} bytes is cut"))?;
        ensure!(
            u32_at(&body, body.len() - 4) == Some(length),
            "block {number} has another length at its end"
        );
        match (number, kind) {
            (0, SECTION_HEADER) => {
                ensure!(u32_at(&body, 0) == Some(BYTE_ORDER), "the byte order is not ours")
            }
            (1, INTERFACE_DESCRIPTION) => {
                ensure!(body.first_chunk() == Some(&[1, 0]), "the link is no Ethernet");
            }
            (2.., ENHANCED_PACKET) => {
                packet(&mut summary, &body).with_context(|| format!("in block {number}"))?;
            }
            _ => bail!("block {number} is of kind {kind:#x}, which does not belong there"),
        }
    }
    Ok(summary)
}

/// Takes a packet: interface, time in two halves, captured and original length, the frame, options, and the block's length.
fn packet(summary: &mut Summary, body: &[u8]) -> Result<()> {
    ensure!(u32_at(body, 0) == Some(0), "there is no such interface");
    let captured = usize::try_from(u32_at(body, 12).context("it is too short")?)?;
    let end = captured.checked_add(20).context("its length is impossible")?;
    let frame = body.get(20..end).context("the frame is longer than the block")?;
    let options = body.get(end.next_multiple_of(4)..).context("there are no options")?;
    // The option epb_flags, with the direction in its lowest bits.
    ensure!(options.first_chunk() == Some(&[2, 0, 4, 0]), "it does not begin with its flags");
    let sent = match u32_at(options, 4) {
        Some(1) => false,
        Some(2) => true,
        _ => bail!("it has no direction"),
    };
    frame_of(summary, frame, sent);
    Ok(())
}

fn frame_of(summary: &mut Summary, frame: &[u8], sent: bool) {
    let way = if sent { &mut summary.sent } else { &mut summary.received };
    way.frames += 1;
    let Some(tcp) = tcp(frame) else { return };
    if tcp.syn {
        summary.scales.insert((tcp.addresses, sent), tcp.scale);
        return;
    }
    if tcp.reset {
        return;
    }
    let scale = summary.scales.get(&(tcp.addresses, sent)).copied().unwrap_or(0);
    let window = u32::from(tcp.window) << scale.min(14);
    let (low, high) = way.window.unwrap_or((window, window));
    way.window = Some((low.min(window), high.max(window)));
    if tcp.data == 0 {
        way.empty += 1;
    } else {
        way.segments += 1;
        way.bytes += u64::try_from(tcp.data).unwrap_or(0);
        way.longest = way.longest.max(tcp.data);
    }
}

struct Tcp {
    /// Addresses and ports, as they are in the frame.
    addresses: Vec<u8>,
    syn: bool,
    reset: bool,
    window: u16,
    scale: u32,
    data: usize,
}

/// The TCP segment of an IPv4 frame that is no fragment.
fn tcp(frame: &[u8]) -> Option<Tcp> {
    let ip = frame.get(ETHERNET..)?;
    if be16_at(frame, 12)? != 0x0800 || *ip.get(9)? != 6 || be16_at(ip, 6)? & 0x3fff != 0 {
        return None;
    }
    let header = usize::from(*ip.first()? & 0xf) * 4;
    let segment = ip.get(header..usize::from(be16_at(ip, 2)?))?;
    let flags = *segment.get(13)?;
    let offset = usize::from(*segment.get(12)? >> 4) * 4;
    let mut options = segment.get(20..offset)?;
    let mut scale = 0;
    while let [kind, rest @ ..] = options {
        let length = match (kind, rest.first()) {
            (0, _) | (2.., None) => break,
            (1, _) => 1,
            (_, Some(&length)) => usize::from(length).max(2),
        };
        if let (3, Some(&shift)) = (kind, rest.get(1)) {
            scale = u32::from(shift);
        }
        options = options.get(length..).unwrap_or_default();
    }
    let mut addresses = ip.get(12..20)?.to_vec();
    addresses.extend(segment.get(..4)?);
    Some(Tcp {
        addresses,
        syn: flags & 2 != 0,
        reset: flags & 4 != 0,
        window: be16_at(segment, 14)?,
        scale,
        data: segment.len() - offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(kind: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 12).unwrap().to_le_bytes();
        [&kind.to_le_bytes(), &length, body, &length].concat()
    }

    fn start() -> Vec<u8> {
        [
            block(SECTION_HEADER, &[BYTE_ORDER.to_le_bytes(), [1, 0, 0, 0], [0xff; 4], [0xff; 4]].concat()),
            block(INTERFACE_DESCRIPTION, &[1, 0, 0, 0, 0, 0, 4, 0]),
        ]
        .concat()
    }

    fn packet_block(frame: &[u8], direction: u8) -> Vec<u8> {
        let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
        let mut body = [&[0; 12], length.as_slice(), &length, frame].concat();
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend([2, 0, 4, 0, direction, 0, 0, 0, 0, 0, 0, 0]);
        block(ENHANCED_PACKET, &body)
    }

    /// A segment with a window of 1000.
    fn segment(flags: u8, options: &[u8], data: usize) -> Vec<u8> {
        let offset = u8::try_from((20 + options.len()) * 4).unwrap();
        let tcp =
            [[0; 12].as_slice(), &[offset, flags, 3, 0xe8, 0, 0, 0, 0], options, &vec![0; data]].concat();
        let length = u16::try_from(20 + tcp.len()).unwrap().to_be_bytes();
        let ip = [[0x45, 0].as_slice(), &length, &[0, 0, 0x40, 0, 64, 6], &[0; 10]].concat();
        [[0; 12].as_slice(), &[8, 0], &ip, &tcp].concat()
    }

    #[test]
    fn segments_are_counted_by_their_direction_and_windows_are_scaled() {
        let scale = [1, 3, 3, 7];
        let file = [
            start(),
            packet_block(&segment(2, &scale, 0), 2),
            packet_block(&segment(0x10, &[], 100), 2),
            packet_block(&segment(0x10, &[], 300), 2),
            packet_block(&segment(0x10, &[], 0), 1),
            packet_block(&[0; 60], 1),
        ]
        .concat();
        assert_eq!(
            read(&mut file.as_slice()).unwrap().to_string(),
            "received 2 frames; tcp 0 segments of 0 bytes, longest 0, 1 empty; window 1000 to 1000\n\
             sent 3 frames; tcp 2 segments of 200 bytes, longest 300, 0 empty; window 128000 to 128000"
        );
    }

    #[test]
    fn a_file_that_is_cut_or_is_something_else_is_refused() {
        let whole = [start(), packet_block(&[0; 61], 1)].concat();
        assert!(read(&mut whole.as_slice()).is_ok());
        assert!(read(&mut &whole[..whole.len() - 1]).is_err());
        assert!(read(&mut &whole[4..]).is_err());
        assert!(read(&mut [start(), packet_block(&[0; 61], 0)].concat().as_slice()).is_err());
        assert!(read(&mut [start(), block(ENHANCED_PACKET, &[0; 8])].concat().as_slice()).is_err());
    }
}
