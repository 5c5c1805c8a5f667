//! Sections: round trips, versions, and what is missing, doubled or in another place.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Cursor, Read, Write};

use common::{Cpu, Machine, Note, cpu, header, machine, read, write};
use freestone_snapshot::{Arch, Cause, Error, Header, Limits, Reader, Section, Sections, Writer, step};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

fn load(bytes: &[u8]) -> Sections {
    Sections::load(Reader::new(bytes, Limits::default()).unwrap()).unwrap()
}

fn one(name: &str, version: u32, optional: bool, body: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    let mut section = writer.section(name, version, optional).unwrap();
    section.write_all(body).unwrap();
    section.finish().unwrap();
    writer.finish().unwrap()
}

fn any_cpu() -> impl Strategy<Value = Cpu> {
    let msrs = prop::collection::vec(any::<(u32, u64)>(), 0..20);
    (any::<[u64; 4]>(), msrs, any::<bool>(), ".*", any::<Option<u8>>())
        .prop_map(|(registers, msrs, halted, name, pending)| Cpu { registers, msrs, halted, name, pending })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(
        cpus in prop::collection::vec(any_cpu(), 0..8),
        note in ".*",
        memory in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        let machine = Machine { cpus, note: Note(note), memory };
        prop_assert_eq!(read(&write(&machine)).unwrap(), machine);
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut(cuts in prop::collection::vec(0_usize..300_000, 1..8), piece in 1_usize..300_000) {
        let mut written = Vec::new();
        let mut writer = Writer::new(Vec::new(), &header()).unwrap();
        let mut section = writer.section("memory", 1, false).unwrap();
        for (index, length) in cuts.into_iter().enumerate() {
            let part = vec![u8::try_from(index).unwrap(); length];
            section.write_all(&part).unwrap();
            if index == 3 {
                section.flush().unwrap();
            }
            written.extend(part);
        }
        section.finish().unwrap();
        let bytes = writer.finish().unwrap();
        let mut reader = Reader::new(bytes.as_slice(), Limits::default()).unwrap();
        let mut section = reader.next_section().unwrap().unwrap();
        let (mut found, mut buffer) = (Vec::<u8>::new(), vec![0; piece]);
        loop {
            let count = section.read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            found.extend(&buffer[..count]);
        }
        prop_assert!(found == written);
    }
}

#[test]
fn a_header_says_what_was_written() {
    for arch in [Arch::X86_64, Arch::Aarch64, Arch::Riscv64, Arch::Other(77), Arch::Other(2)] {
        let header = Header::new(arch, "vmm 1.2.3").unwrap();
        let bytes = Writer::new(Vec::new(), &header).unwrap().finish().unwrap();
        assert_eq!(Header::peek(bytes.as_slice()).unwrap(), header);
    }
    let header = Header::peek(write(&machine()).as_slice()).unwrap();
    assert_eq!((header.format(), header.arch(), header.program()), (1, Arch::X86_64, "tests 0.1"));
    assert_eq!(
        header.check_arch(Arch::Aarch64).unwrap_err().to_string(),
        "the snapshot is of architecture x86-64: expected aarch64"
    );
}

#[test]
fn a_program_is_bounded_and_plain() {
    assert!(Header::new(Arch::X86_64, "x".repeat(255)).is_ok());
    for program in ["x".repeat(256), "\x1b[2J".into()] {
        assert!(matches!(Header::new(Arch::X86_64, program), Err(Error::Name { .. })));
    }
}

#[test]
fn info_and_verify_agree_and_list_all_sections() {
    let bytes = write(&machine());
    let info = Reader::new(Cursor::new(&bytes), Limits::default()).and_then(Reader::info).unwrap();
    assert_eq!(info, Reader::new(bytes.as_slice(), Limits::default()).and_then(Reader::verify).unwrap());
    let listed: Vec<_> = info
        .sections
        .iter()
        .map(|section| (section.name.as_str(), section.version, section.optional))
        .collect();
    assert_eq!(listed, [("cpu/0", 1, false), ("cpu/1", 1, false), ("note", 3, true), ("memory", 1, false)]);
    assert_eq!(info.sections[3].length, 256);
    assert_eq!(info.length, u64::try_from(bytes.len()).unwrap());
}

#[test]
fn a_reader_stops_where_the_snapshot_ends() {
    let mut bytes = write(&machine());
    bytes.extend(b"what follows");
    let rest = Reader::new(bytes.as_slice(), Limits::default()).and_then(Reader::finish).unwrap();
    assert_eq!(rest, b"what follows");
}

#[test]
fn order_means_nothing() {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    writer.write(&machine().note).unwrap();
    writer.section("memory", 1, false).unwrap().finish().unwrap();
    writer.write_instance("1", &cpu(2)).unwrap();
    writer.write_instance("0", &cpu(1)).unwrap();
    let expected = Machine { memory: Vec::new(), ..machine() };
    assert_eq!(read(&writer.finish().unwrap()).unwrap(), expected);
}

#[test]
fn a_missing_section_is_named() {
    let mut sections = load(&write(&machine()));
    assert!(matches!(sections.take::<Cpu>(), Err(Error::Missing { name }) if name == "cpu"));
    assert!(matches!(sections.take_instance::<Cpu>("9"), Err(Error::Missing { name }) if name == "cpu/9"));
    assert_eq!(sections.take_if_present::<Cpu>().unwrap(), None);
    sections.take::<Note>().unwrap();
    assert!(matches!(sections.take::<Note>(), Err(Error::Missing { .. })));
}

#[test]
fn the_writer_refuses_a_doubled_section_and_goes_on() {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    writer.write(&cpu(1)).unwrap();
    assert!(matches!(writer.write(&cpu(2)), Err(Error::Doubled { name }) if name == "cpu"));
    writer.write_instance("2", &cpu(2)).unwrap();
    assert_eq!(load(&writer.finish().unwrap()).take::<Cpu>().unwrap(), cpu(1));
}

#[test]
fn the_reader_refuses_a_doubled_section() {
    // As if a writer had not looked: a chain of two equal sections, signed.
    let (mut framing, mut bytes) = (Vec::new(), Vec::new());
    let mut add = |frame: &[u8]| {
        framing.extend(frame);
        bytes.extend(frame);
        bytes.extend(crc32fast::hash(&framing).to_le_bytes());
    };
    add(b"FREESNAP\x01\0\x16\0\x01\0\0\0\0\0");
    for _ in 0..2 {
        add(b"SECT\x01\0\0\0\0\0\x03\0cpu");
        add(b"DONE\0\0\0\0\0\0\0\0");
    }
    add(b"END!\x02\0\0\0\0\0\0\0");
    let error = Reader::new(bytes.as_slice(), Limits::default()).and_then(Reader::verify).unwrap_err();
    assert!(matches!(error, Error::Doubled { name } if name == "cpu"));
}

#[test]
fn what_nobody_takes_is_an_error_unless_it_is_optional() {
    assert_eq!(load(&one("fan", 1, true, b"?")).finish().unwrap(), ["fan"]);
    assert!(
        matches!(load(&one("fan", 1, false, b"?")).finish(), Err(Error::Unclaimed { name }) if name == "fan")
    );
}

#[test]
fn bad_names_are_refused_by_the_writer() {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    for name in [String::new(), "x".repeat(256), "a\nb".into()] {
        assert!(matches!(writer.section(name, 1, false), Err(Error::Name { .. })));
    }
    writer.section("x".repeat(255), 1, false).unwrap().finish().unwrap();
    let bytes = writer.finish().unwrap();
    assert_eq!(load(&bytes).names().count(), 1);
}

#[test]
fn a_section_that_was_not_finished_ends_the_writer() {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    drop(writer.section("memory", 1, false).unwrap());
    assert!(matches!(writer.write(&cpu(1)), Err(Error::Broken { what: "writer" })));
    assert!(matches!(writer.finish(), Err(Error::Broken { what: "writer" })));
}

/// A stream that fails once, after some bytes.
struct FailsOnce(Option<usize>);

impl Write for FailsOnce {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0 = match self.0 {
            Some(left) if left < data.len() => {
                self.0 = None;
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            left => left.map(|left| left - data.len()),
        };
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_body_that_lost_a_piece_is_never_finished() {
    let mut writer = Writer::new(FailsOnce(Some(100_000)), &header()).unwrap();
    let mut section = writer.section("memory", 1, false).unwrap();
    section.write_all(&vec![0; 1 << 20]).unwrap_err();
    section.write_all(&vec![0; 1 << 20]).unwrap();
    assert!(matches!(section.finish(), Err(Error::Broken { .. })));
    assert!(matches!(writer.finish(), Err(Error::Broken { .. })));
}

#[test]
fn bytes_behind_a_state_and_states_of_another_kind_are_refused() {
    let mut sections = load(&one("note", 3, true, b"\x01ab"));
    assert!(matches!(sections.take::<Note>(), Err(Error::Decode { .. })));
    let bytes = one("notes", 3, true, b"\x01a");
    let mut reader = Reader::new(bytes.as_slice(), Limits::default()).unwrap();
    let error = reader.next_section().unwrap().unwrap().decode::<Note>().unwrap_err();
    assert!(matches!(error, Error::Kind { expected: "note", found } if found == "notes"));
}

#[derive(Serialize, Deserialize)]
struct TimerV1 {
    count: u16,
}

#[derive(Serialize, Deserialize)]
struct TimerV2 {
    count: u32,
    periodic: bool,
}

impl From<TimerV1> for TimerV2 {
    fn from(old: TimerV1) -> Self {
        Self { count: old.count.into(), periodic: false }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Timer {
    nanoseconds: u64,
    period: Option<u64>,
}

impl From<TimerV2> for Timer {
    fn from(old: TimerV2) -> Self {
        let nanoseconds = u64::from(old.count) * 1000;
        Self { nanoseconds, period: old.periodic.then_some(nanoseconds) }
    }
}

impl Section for Timer {
    const NAME: &'static str = "timer";
    const VERSION: u32 = 4;
    const OLDEST: u32 = 2;

    fn upgrade(from: u32, body: &[u8]) -> Result<Vec<u8>, Cause> {
        match from {
            2 => step::<TimerV1, TimerV2>(body),
            3 => step::<TimerV2, Self>(body),
            _ => Err("no such version".into()),
        }
    }
}

#[test]
fn an_old_version_is_upgraded_step_by_step() {
    let take = |version, body: &[u8]| load(&one("timer", version, false, body)).take::<Timer>();
    assert_eq!(take(2, &[5]).unwrap(), Timer { nanoseconds: 5000, period: None });
    assert_eq!(take(3, &[5, 1]).unwrap(), Timer { nanoseconds: 5000, period: Some(5000) });
    assert_eq!(take(4, &[5, 0]).unwrap(), Timer { nanoseconds: 5, period: None });
}

#[test]
fn a_body_that_is_not_of_its_version_fails_in_its_step() {
    let error = load(&one("timer", 2, false, &[5, 1])).take::<Timer>().unwrap_err();
    assert_eq!(error.to_string(), "cannot upgrade section \"timer\" from version 2");
    assert!(matches!(error, Error::Upgrade { from: 2, .. }));
}

#[test]
fn versions_that_are_too_new_or_too_old_are_named_with_both_versions() {
    let message = |version| load(&one("timer", version, false, &[])).take::<Timer>().unwrap_err().to_string();
    assert_eq!(message(5), "section \"timer\" has version 5: this build reads up to 4");
    assert_eq!(message(u32::MAX), "section \"timer\" has version 4294967295: this build reads up to 4");
    assert_eq!(message(1), "section \"timer\" has version 1: this build reads from 2 on");
}

/// A new version of the format gets a golden snapshot of its own by `FREESTONE_BLESS=1`; those of older versions stay.
#[test]
fn the_golden_snapshot_of_format_1_reads_as_ever_and_is_what_is_written() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/format-1.snapshot");
    if std::env::var_os("FREESTONE_BLESS").is_some() {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).unwrap();
        file.write_all(&write(&machine())).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    assert_eq!(read(&golden).unwrap(), machine());
    assert!(write(&machine()) == golden, "the format has changed: it needs a new version");
}
