//! States and snapshots that the tests share.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;

use freestone_snapshot::{Arch, Header, Limits, Reader, Result, Section, Sections, Writer};
use serde::{Deserialize, Serialize};

/// A state with something of everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    pub registers: [u64; 4],
    pub msrs: Vec<(u32, u64)>,
    pub halted: bool,
    pub name: String,
    pub pending: Option<u8>,
}

impl Section for Cpu {
    const NAME: &'static str = "cpu";
    const VERSION: u32 = 1;
}

/// A state that need not be understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note(pub String);

impl Section for Note {
    const NAME: &'static str = "note";
    const VERSION: u32 = 3;
    const OPTIONAL: bool = true;
}

/// What a snapshot of the tests contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub cpus: Vec<Cpu>,
    pub note: Note,
    pub memory: Vec<u8>,
}

pub fn header() -> Header {
    Header::new(Arch::X86_64, "tests 0.1").unwrap()
}

pub fn cpu(seed: u64) -> Cpu {
    let registers = [seed, seed << 32, u64::MAX - seed, 0];
    Cpu {
        registers,
        msrs: vec![(0x10, seed), (0xc000_0080, 0xd01)],
        halted: true,
        name: "é".into(),
        pending: Some(7),
    }
}

pub fn machine() -> Machine {
    let note = Note("a guest".into());
    Machine { cpus: vec![cpu(1), cpu(2)], note, memory: (0..=255).collect() }
}

pub fn write(machine: &Machine) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    for (index, cpu) in machine.cpus.iter().enumerate() {
        writer.write_instance(&index.to_string(), cpu).unwrap();
    }
    writer.write(&machine.note).unwrap();
    let mut memory = writer.section("memory", 1, false).unwrap();
    memory.write_all(&machine.memory).unwrap();
    memory.finish().unwrap();
    writer.finish().unwrap()
}

/// Reads a whole machine; the memory is streamed.
pub fn read(bytes: &[u8]) -> Result<Machine> {
    let mut memory = Vec::new();
    let reader = Reader::new(bytes, Limits::default())?;
    reader.header().check_arch(Arch::X86_64)?;
    let mut sections = Sections::load_with(reader, |mut section| {
        if section.name() != "memory" {
            return Ok::<_, freestone_snapshot::Error>(Some(section));
        }
        while let Some(chunk) = section.chunk()? {
            memory.extend_from_slice(chunk);
        }
        Ok(None)
    })?;
    let mut cpus = Vec::new();
    while sections.names().any(|name| name == format!("cpu/{}", cpus.len())) {
        cpus.push(sections.take_instance(&cpus.len().to_string())?);
    }
    let note = sections.take()?;
    sections.finish()?;
    Ok(Machine { cpus, note, memory })
}
