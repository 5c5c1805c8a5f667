//! Says what is in a snapshot and whether it is whole: `cargo run --example inspect -- FILE`. Without a file it makes one.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use freestone_snapshot::{Arch, Header, Limits, Section, SnapshotFile};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Clock {
    nanoseconds: u64,
}

impl Section for Clock {
    const NAME: &'static str = "clock";
    const VERSION: u32 = 1;
    const OPTIONAL: bool = true;
}

fn make(path: &Path) -> freestone_snapshot::Result<()> {
    let mut file = SnapshotFile::create(path, &Header::new(Arch::host(), "inspect 0.1")?)?;
    file.writer().write(&Clock { nanoseconds: 1_000_000 })?;
    let mut memory = file.writer().section("memory", 1, false)?;
    let written = (0..=255).try_for_each(|page| memory.write_all(&[page; 4096]));
    written.map_err(|source| freestone_snapshot::Error::File { op: "write", path: path.into(), source })?;
    memory.finish()?;
    file.finish()
}

fn inspect(path: &Path) -> Result<(), Box<dyn Error>> {
    let header = Header::peek(File::open(path)?)?;
    println!("format {}, {}, written by {:?}", header.format(), header.arch(), header.program());
    let info = SnapshotFile::open(path, Limits::default())?.info()?;
    for section in &info.sections {
        let optional = if section.optional { ", optional" } else { "" };
        println!("{:>12} bytes  {} version {}{optional}", section.length, section.name, section.version);
    }
    println!("{:>12} bytes in all", info.length);
    SnapshotFile::open(path, Limits::default())?.verify()?;
    println!("all checksums are right");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args_os().nth(1) {
        Some(path) => inspect(&PathBuf::from(path)),
        None => {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("example.snapshot");
            make(&path)?;
            inspect(&path)
        }
    }
}
