#![expect(clippy::cast_possible_truncation, reason = "tests")]

use std::fs::{self, File};
use std::io::Read;
use std::process::Command;
use std::thread;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_testkit::skip;

use super::*;
use crate::{Error, Offloads};

/// Gives back each frame that it is sent, once; is busy every third time.
#[derive(Debug, Default)]
struct Echo {
    stats: Arc<PortStats>,
    resets: usize,
}

struct EchoEnd {
    calls: usize,
    frames: Vec<Vec<u8>>,
}

impl Port for Echo {
    fn info(&self) -> PortInfo {
        PortInfo { max_pairs: 3, transmit: Offloads::CSUM, mtu: Some(9000), ..PortInfo::default() }
    }
    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        if setup.pairs > 3 {
            return Err(Error::invalid("pairs", "", "too many"));
        }
        let end = || -> Box<dyn Endpoint> { Box::new(EchoEnd { calls: 0, frames: Vec::new() }) };
        Ok((0..setup.pairs).map(|_| end()).collect())
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}

impl Endpoint for EchoEnd {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn transmit(&mut self, _: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        self.calls += 1;
        if self.calls.is_multiple_of(3) {
            return Sent::Busy;
        }
        let mut bytes = vec![0; frame.len()];
        frame.read_at(0, &mut bytes);
        self.frames.push(bytes);
        Sent::Done
    }
    fn waiting(&mut self) -> Option<usize> {
        self.frames.first().map(Vec::len)
    }
    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        match self.frames.first() {
            None => Received::Nothing,
            Some(bytes) if bytes.len() > room.len() => Received::NeedsRoom(bytes.len()),
            Some(_) => {
                let bytes = self.frames.remove(0);
                room.write_at(0, &bytes);
                Received::Frame(bytes.len(), VnetHeader::default())
            }
        }
    }
    fn drop_next(&mut self) {
        self.frames.remove(0);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Packet {
    time: u64,
    flags: u32,
    original: u32,
    data: Vec<u8>,
}

#[cfg(feature = "switch")]
#[test]
fn a_switch_can_be_mirrored_to_a_capture() {
    use crate::switch::{PortOptions, Switch};
    let mut file = tempfile::tempfile().unwrap();
    let switch = Switch::default();
    let capture = Capture::new(file.try_clone().unwrap(), "lan0").unwrap();
    switch.mirror_to(Some(Box::new(capture.clone())));
    let mut port = switch.port(PortOptions::default()).unwrap();
    let mut end = port.open(&Setup { pairs: 1, receive: Offloads::empty() }).unwrap().remove(0);
    let mut frame = [0x5A; 61];
    frame[..12].copy_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2, 0, 0, 0, 0, 1]);
    let mut bytes = frame;
    let slice = freestone_memory::own_slice(&mut bytes);
    assert_eq!(end.transmit(&VnetHeader::default(), Frame::new(&[slice])), Sent::Done);
    end.flush();
    let mut written = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut written).unwrap();
    let (name, packets) = read(&written);
    assert_eq!((name.as_str(), packets.len()), ("lan0", 1));
    assert_eq!(
        (packets[0].flags, packets[0].original, packets[0].data.as_slice()),
        (0, 61, frame.as_slice())
    );
    assert_eq!(capture.counts().captured, 1);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A plain reader of what is written here: the name of the interface and the packets.
fn read(bytes: &[u8]) -> (String, Vec<Packet>) {
    let (mut at, mut name, mut packets) = (0, String::new(), Vec::new());
    while at < bytes.len() {
        let len = u32_at(bytes, at + 4) as usize;
        assert_eq!(len % 4, 0);
        let block = &bytes[at..at + len];
        assert_eq!(u32_at(block, len - 4) as usize, len);
        match u32_at(block, 0) {
            0x0A0D_0D0A => assert_eq!((at, u32_at(block, 8)), (0, 0x1A2B_3C4D)),
            1 => {
                assert_eq!((block[8], u32_at(block, 12)), (1, 262_144));
                assert_eq!(block[16], 2);
                let len = usize::from(block[18]);
                name = String::from_utf8(block[20..20 + len].to_vec()).unwrap();
                let next = 20 + len.next_multiple_of(4);
                assert_eq!(block[next..next + 5], [9, 0, 1, 0, 9]);
            }
            6 => {
                let captured = u32_at(block, 20) as usize;
                let options = 28 + captured.next_multiple_of(4);
                assert_eq!(block[options..options + 4], [2, 0, 4, 0]);
                packets.push(Packet {
                    time: u64::from(u32_at(block, 12)) << 32 | u64::from(u32_at(block, 16)),
                    flags: u32_at(block, options + 4),
                    original: u32_at(block, 24),
                    data: block[28..28 + captured].to_vec(),
                });
            }
            other => panic!("a block of type {other}"),
        }
        at += len;
    }
    (name, packets)
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(3).wrapping_add(seed)).collect()
}

/// Sends `bytes` and receives what comes back, in two pieces of memory.
fn exchange(mem: &GuestMem, end: &mut dyn Endpoint, bytes: &[u8]) {
    let view = mem.view();
    let half = bytes.len() / 2;
    let slices = [(0, half), (0x8_0000, bytes.len() - half)]
        .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
    let there = Frame::new(&slices);
    there.write_at(0, bytes);
    while end.transmit(&VnetHeader::default(), there) == Sent::Busy {}
    let room = [view.get_slice(GuestAddress(0x10_0000), 0x8_0000).unwrap()];
    assert_eq!(end.receive(Frame::new(&room)), Received::Frame(bytes.len(), VnetHeader::default()));
}

fn open(port: &mut impl Port, pairs: u16) -> Vec<Box<dyn Endpoint>> {
    port.open(&Setup { pairs, receive: Offloads::empty() }).unwrap()
}

fn memory() -> GuestMem {
    GuestMem::anonymous(0x20_0000).unwrap()
}

#[test]
fn frames_of_all_sizes_are_captured_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.pcapng");
    let mut port = Pcap::create(Echo::default(), &path, "net0").unwrap();
    let mut end = open(&mut port, 1).remove(0);
    let before = capture::now();
    let sizes = [0, 1, 60, 61, 62, 63, 4095, 4096, 4097, 65_535, 262_144, 300_000, 60];
    for (i, size) in sizes.into_iter().enumerate() {
        exchange(&memory(), end.as_mut(), &frame(size, i as u8));
    }
    end.flush();
    let (name, packets) = read(&fs::read(&path).unwrap());
    assert_eq!(name, "net0");
    assert_eq!(packets.len(), 2 * sizes.len());
    for (i, pair) in packets.chunks(2).enumerate() {
        let mut data = frame(sizes[i], i as u8);
        data.truncate(262_144);
        for (packet, flags) in pair.iter().zip([2, 1]) {
            assert_eq!((packet.flags, packet.original as usize), (flags, sizes[i]));
            assert!(packet.data == data, "{i}");
        }
    }
    let times: Vec<_> = packets.iter().map(|packet| packet.time).collect();
    assert!(times.is_sorted() && times[0] >= before && times[25] <= capture::now());
    assert_eq!(port.capture().counts(), CaptureCounts { captured: 26, missed: 0 });
}

#[test]
fn nothing_waits_to_be_written_after_a_flush_or_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.pcapng");
    let count = || read(&fs::read(&path).unwrap()).1.len();
    let mut port = Pcap::create(Echo::default(), &path, "net0").unwrap();
    assert_eq!(count(), 0, "a capture without frames is one too");
    let mut end = open(&mut port, 1).remove(0);
    exchange(&memory(), end.as_mut(), &frame(60, 0));
    end.flush();
    assert_eq!(count(), 2);
    exchange(&memory(), end.as_mut(), &frame(60, 0));
    drop((end, port));
    assert_eq!(count(), 4);
}

#[test]
fn pairs_of_queues_on_several_threads_share_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.pcapng");
    let mut port = Pcap::create(Echo::default(), &path, "net0").unwrap();
    let ends = open(&mut port, 3);
    thread::scope(|scope| {
        for (i, mut end) in ends.into_iter().enumerate() {
            scope.spawn(move || {
                let mem = memory();
                for size in 0..100 {
                    exchange(&mem, end.as_mut(), &frame(size * 97, i as u8));
                }
            });
        }
    });
    drop(port);
    let (_, mut packets) = read(&fs::read(&path).unwrap());
    assert_eq!(packets.len(), 600);
    for packet in packets.drain(..) {
        let seed = packet.data.first().copied().unwrap_or(0);
        assert!(packet.data == frame(packet.data.len(), seed));
    }
}

#[test]
fn everything_of_the_port_is_passed_through() {
    let stats = Arc::new(PortStats::default());
    let echo = Echo { stats: Arc::clone(&stats), resets: 0 };
    let mut port = Pcap::new(echo, Capture::new(tempfile::tempfile().unwrap(), "x").unwrap());
    assert_eq!(port.info(), Echo::default().info());
    assert!(Arc::ptr_eq(&port.stats(), &stats));
    port.reset();
    assert!(port.open(&Setup { pairs: 4, receive: Offloads::empty() }).is_err());
    assert_eq!(port.into_inner().resets, 1);
    // A port in a box is one too.
    let boxed: Box<dyn Port> = Box::new(Echo::default());
    let port = Pcap::new(boxed, Capture::new(tempfile::tempfile().unwrap(), "x").unwrap());
    assert_eq!(port.info().max_pairs, 3);
}

#[test]
fn traffic_goes_on_when_the_file_cannot_be_written() {
    let Ok(full) = File::options().write(true).open("/dev/full") else {
        return skip("traffic_goes_on_when_the_file_cannot_be_written", "no /dev/full");
    };
    assert!(Capture::new(full, "net0").is_err(), "not even its beginning");
    let (reader, writer) = std::io::pipe().unwrap();
    let mut port = Pcap::new(Echo::default(), Capture::new(writer, "net0").unwrap());
    drop(reader);
    let mut end = open(&mut port, 1).remove(0);
    exchange(&memory(), end.as_mut(), &frame(60, 0));
    end.flush();
    for size in [60, 60_000] {
        exchange(&memory(), end.as_mut(), &frame(size, 0));
        end.flush();
    }
    // What was to be written in the flush that failed had been counted.
    assert_eq!(port.capture().counts(), CaptureCounts { captured: 2, missed: 4 });
}

#[test]
fn a_reader_that_is_slow_misses_frames_but_gets_whole_ones() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut port = Pcap::new(Echo::default(), Capture::new(writer, "net0").unwrap());
    let mut end = open(&mut port, 1).remove(0);
    let mem = memory();
    for _ in 0..100 {
        exchange(&mem, end.as_mut(), &frame(60_000, 7));
        exchange(&mem, end.as_mut(), &frame(600, 7));
        end.flush();
    }
    let counts = port.capture().counts();
    assert!(counts.missed > 300 && counts.captured >= 16, "{counts:?}");
    let capture = port.capture().clone();
    drop((end, port));
    let mut bytes = Vec::new();
    let mut chunk = [0; 5000];
    while read_packets(&bytes) < counts.captured as usize {
        let n = reader.read(&mut chunk).unwrap();
        bytes.extend(&chunk[..n]);
        capture.flush();
    }
    assert!(read(&bytes).1.iter().all(|packet| packet.data == frame(packet.data.len(), 7)));
}

/// How many whole packets there are.
fn read_packets(bytes: &[u8]) -> usize {
    let (mut at, mut count) = (0, 0);
    while bytes.len() >= at + 8 {
        at += u32_at(bytes, at + 4) as usize;
        count += usize::from(at <= bytes.len());
    }
    count.saturating_sub(2)
}

#[test]
fn a_capture_that_cannot_be_made_is_an_error_with_its_path() {
    let error = Capture::create("/no/such/place.pcapng", "x").unwrap_err().to_string();
    assert!(error.contains("/no/such/place.pcapng"), "{error}");
}

#[test]
fn tshark_reads_it() {
    let test = "tshark_reads_it";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.pcapng");
    let mut port = Pcap::create(Echo::default(), &path, "net0").unwrap();
    let mut end = open(&mut port, 1).remove(0);
    // An ARP request, and a large frame of an experimental type.
    let mut arp = vec![0xFF; 6];
    arp.extend([0x52, 0x54, 0, 1, 2, 3, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 1, 2, 3, 10, 0, 2, 15]);
    arp.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    exchange(&memory(), end.as_mut(), &arp);
    let mut large = vec![2; 12];
    large.extend([0x88, 0xB5]);
    large.resize(60_000, 1);
    exchange(&memory(), end.as_mut(), &large);
    drop((end, port));
    let fields = ["frame.interface_name", "frame.packet_flags_direction", "frame.len", "_ws.col.Info"];
    let mut command = Command::new("tshark");
    command.args(["-n", "-T", "fields", "-r"]).arg(&path);
    for field in fields {
        command.args(["-e", field]);
    }
    match command.output() {
        Err(error) => skip(test, &format!("tshark: {error}")),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let lines: Vec<_> = text.lines().map(|line| line.split('\t').collect::<Vec<_>>()).collect();
            assert_eq!(lines.len(), 4, "{text}");
            assert_eq!(lines[0][..3], ["net0", "0x00000002", "42"], "{text}");
            assert_eq!(lines[1][..3], ["net0", "0x00000001", "42"], "{text}");
            assert!(lines[0][3].contains("Who has 10.0.2.2? Tell 10.0.2.15"), "{text}");
            assert_eq!(lines[2][2], "60000", "{text}");
        }
    }
}
