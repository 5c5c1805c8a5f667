//! Says what a raw disk image is to a guest: `cargo run -p freestone-block --example disk_info -- PATH`.
//! Without a path it makes a small image of its own.

use std::error::Error;
use std::path::PathBuf;

use freestone_block::{Image, RawOptions, SECTOR_SIZE};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => {
            let path = dir.path().join("disk.raw");
            std::fs::File::create(&path)?.set_len(3 * SECTOR_SIZE + 100)?;
            path
        }
    };
    let disk = RawOptions::new().read_only(true).open(&path)?;
    println!("{}: {} sectors of {SECTOR_SIZE} bytes", disk.path().display(), disk.size() / SECTOR_SIZE);
    if disk.unused_bytes() > 0 {
        println!("its last {} bytes are no whole sector: a guest does not see them", disk.unused_bytes());
    }
    Ok(())
}
