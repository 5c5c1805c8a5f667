//! Damaged and hostile snapshots: an error or the identical value, in bounded memory.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Cursor, Read};

use common::{machine, read, write};
use freestone_snapshot::{Error, Header, Limits, Reader};

/// Small numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below
    }
}

/// `bytes` with the right chain checksum at `at`, of the framing that is `framing`.
fn sign(bytes: &mut [u8], framing: &[u8], at: usize) {
    let checksum = crc32fast::hash(framing).to_le_bytes();
    for (to, from) in bytes.iter_mut().skip(at).zip(checksum) {
        *to = from;
    }
}

/// A frame behind a header, with the right checksum: what somebody writes who means harm.
fn forged(frame: &[u8]) -> Vec<u8> {
    let header = write(&machine()).into_iter().take(31).collect::<Vec<_>>();
    let mut framing: Vec<u8> = header.iter().copied().take(27).collect();
    framing.extend(frame);
    let mut bytes = [header.as_slice(), frame, &[0; 4]].concat();
    let at = bytes.len() - 4;
    sign(&mut bytes, &framing, at);
    bytes
}

fn first_error(bytes: &[u8], limits: Limits) -> Error {
    Reader::new(bytes, limits).and_then(Reader::verify).unwrap_err()
}

#[test]
fn a_snapshot_that_is_cut_off_anywhere_says_so() {
    let bytes = write(&machine());
    for length in 0..bytes.len() {
        let error = read(&bytes[..length]).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{length}: {error:?}");
        let error =
            Reader::new(Cursor::new(&bytes[..length]), Limits::default()).and_then(Reader::info).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{length}: {error:?}");
    }
}

#[test]
fn a_flip_of_any_bit_is_found() {
    let bytes = write(&machine());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let error = read(&damaged).unwrap_err();
        let expected = matches!(error, Error::NotASnapshot | Error::Damaged { .. } | Error::Truncated { .. });
        assert!(expected, "bit {bit}: {error:?}");
    }
}

#[test]
fn a_flip_of_any_bit_of_the_framing_is_found_without_the_bodies() {
    let machine = machine();
    let bytes = write(&machine);
    let mut found = 0;
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let info = Reader::new(Cursor::new(damaged), Limits::default()).and_then(Reader::info);
        found += usize::from(info.is_err());
    }
    let info = Reader::new(Cursor::new(&bytes), Limits::default()).and_then(Reader::info).unwrap();
    let bodies: u64 = info.sections.iter().map(|section| section.length).sum();
    assert_eq!(found, (bytes.len() - usize::try_from(bodies).unwrap()) * 8);
}

#[test]
fn random_corruptions_give_an_error_or_the_same_machine() {
    let machine = machine();
    let bytes = write(&machine);
    let mut random = Random(1);
    let mut refused = 0;
    for round in 0..10_000 {
        let mut damaged = bytes.clone();
        for _ in 0..=random.next(4) {
            let (at, from) = (random.next(damaged.len()), random.next(damaged.len()));
            let length = random.next(64).min(damaged.len() - at.max(from));
            match random.next(5) {
                0 => damaged[at] = u8::try_from(random.next(256)).unwrap(),
                1 => drop(damaged.drain(at..at + length)),
                2 => damaged.copy_within(from..from + length, at),
                3 => {
                    let copy = damaged[from..from + length].to_vec();
                    drop(damaged.splice(at..at, copy));
                }
                _ => damaged[at..at + length].fill(0xff),
            }
            if damaged.is_empty() {
                break;
            }
        }
        match read(&damaged) {
            Ok(found) => assert_eq!(found, machine, "round {round}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 9_000, "only {refused} were refused");
}

#[test]
fn noise_behind_a_right_header_is_refused() {
    let mut random = Random(2);
    for _ in 0..10_000 {
        let frame: Vec<u8> = (0..12).map(|_| u8::try_from(random.next(256)).unwrap()).collect();
        let error = first_error(&forged(&frame), Limits::default());
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    }
}

#[test]
fn pieces_that_are_exchanged_are_found() {
    let bytes = write(&common::Machine { memory: vec![0; 600 << 10], ..machine() });
    let at: Vec<usize> =
        bytes.windows(4).enumerate().filter(|(_, tag)| tag == b"DATA").map(|(at, _)| at).collect();
    let [.., first, second, third] = at.as_slice() else { panic!("three pieces of memory") };
    // Two equal pieces with right checksums of their own; and one of them dropped.
    let exchanged =
        [&bytes[..*first], &bytes[*second..*third], &bytes[*first..*second], &bytes[*third..]].concat();
    let dropped = [&bytes[..*first], &bytes[*second..]].concat();
    for damaged in [exchanged, dropped] {
        assert!(matches!(read(&damaged), Err(Error::Damaged { .. })));
    }
}

#[test]
fn a_piece_that_claims_more_than_a_piece_can_have_is_refused() {
    let section = forged(b"SECT\x01\0\0\0\0\0\x01\0m");
    for length in [0, (1 << 20) + 1, u32::MAX] {
        let mut framing: Vec<u8> = section[..27].to_vec();
        framing.extend(&section[31..44]);
        let frame = [b"DATA".as_slice(), &length.to_le_bytes(), &[0; 4]].concat();
        framing.extend(&frame);
        let mut bytes = [section.as_slice(), &frame, &[0; 4]].concat();
        let at = bytes.len() - 4;
        sign(&mut bytes, &framing, at);
        let error = first_error(&bytes, Limits::default());
        let Error::Damaged { what, .. } = error else { panic!("{error:?}") };
        assert_eq!(what, "the length of a piece makes no sense");
    }
}

#[test]
fn a_body_that_claims_a_vector_of_two_to_the_63_is_refused() {
    // A sequence of bytes with that length, and nothing behind it.
    let mut writer = freestone_snapshot::Writer::new(Vec::new(), &common::header()).unwrap();
    let mut section = writer.section("note", 3, true).unwrap();
    std::io::Write::write_all(&mut section, &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01])
        .unwrap();
    section.finish().unwrap();
    let bytes = writer.finish().unwrap();
    let mut reader = Reader::new(bytes.as_slice(), Limits::default()).unwrap();
    let error = reader.next_section().unwrap().unwrap().decode::<common::Note>().unwrap_err();
    assert!(matches!(error, Error::Decode { version: 3, .. }), "{error:?}");
}

#[test]
fn unknown_flags_and_bad_names_are_refused() {
    for frame in [
        b"SECT\x01\0\0\0\x02\0\x01\0m".as_slice(),
        b"SECT\x01\0\0\0\0\0\0\0",
        b"SECT\x01\0\0\0\0\0\x01\0\x1b",
        b"SECT\x01\0\0\0\0\0\x01\0\xff",
        b"END!\0\0\0\0\x01\0\0\0",
        b"END!\x01\0\0\0\0\0\0\0",
        b"DONE\0\0\0\0\0\0\0\0",
    ] {
        let error = first_error(&forged(frame), Limits::default());
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    }
}

#[test]
fn every_limit_is_kept() {
    let bytes = write(&machine());
    let length = u64::try_from(bytes.len()).unwrap();
    let limits = Limits::default();
    for limits in [
        Limits { sections: 3, ..limits },
        Limits { section: 255, ..limits },
        Limits { total: length - 1, ..limits },
    ] {
        assert!(matches!(first_error(&bytes, limits), Error::Limit { .. }));
    }
    let enough = Limits { sections: 4, section: 256, total: length, in_memory: 0 };
    assert_eq!(Reader::new(bytes.as_slice(), enough).and_then(Reader::verify).unwrap().length, length);
    let reader = Reader::new(bytes.as_slice(), Limits { in_memory: 200, ..limits }).unwrap();
    assert!(matches!(freestone_snapshot::Sections::load(reader), Err(Error::Limit { limit: 200, .. })));
}

#[test]
fn a_limit_stops_an_endless_body_after_one_piece() {
    let bytes = write(&common::Machine { memory: vec![7; 8 << 20], ..machine() });
    let mut stream = Cursor::new(&bytes);
    let mut reader = Reader::new(&mut stream, Limits { in_memory: 1 << 20, ..Limits::default() }).unwrap();
    let error = loop {
        let section = reader.next_section().unwrap().unwrap();
        if let Err(error) = section.read_body() {
            break error;
        }
    };
    assert!(matches!(error, Error::Limit { .. }));
    drop(reader);
    assert!(stream.position() < 3 << 20, "{}", stream.position());
}

#[test]
fn nothing_follows_an_error() {
    let mut bytes = write(&machine());
    bytes[60] ^= 1;
    let mut reader = Reader::new(bytes.as_slice(), Limits::default()).unwrap();
    while reader.next_section().is_ok() {}
    assert!(matches!(reader.next_section(), Err(Error::Broken { .. })));
}

#[test]
fn damage_is_found_by_the_standard_reader_too() {
    let mut bytes = write(&machine());
    let at = bytes.len() - 60;
    bytes[at] ^= 1;
    let mut reader = Reader::new(bytes.as_slice(), Limits::default()).unwrap();
    for _ in 0..3 {
        reader.next_section().unwrap().unwrap();
    }
    let mut section = reader.next_section().unwrap().unwrap();
    let error = section.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}

#[test]
fn the_header_of_a_newer_format_can_be_read_and_is_refused() {
    let mut bytes = write(&machine());
    // A longer header, of format 9, with 3 bytes that nobody knows yet.
    bytes.truncate(27);
    bytes.extend([1, 2, 3, 0, 0, 0, 0]);
    bytes[8] = 9;
    bytes[10] = 34;
    let framing = bytes[..30].to_vec();
    sign(&mut bytes, &framing, 30);
    let header = Header::peek(bytes.as_slice()).unwrap();
    assert_eq!((header.format(), header.program()), (9, "tests 0.1"));
    let error = Reader::new(bytes.as_slice(), Limits::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the snapshot, written by \"tests 0.1\", has format version 9: this build reads up to 1"
    );
}

#[test]
fn unknown_flags_of_the_header_are_refused() {
    let mut bytes = write(&machine());
    bytes[14] = 1;
    let framing = bytes[..27].to_vec();
    sign(&mut bytes, &framing, 27);
    assert!(matches!(Reader::new(bytes.as_slice(), Limits::default()), Err(Error::Flags { flags: 1 })));
}
