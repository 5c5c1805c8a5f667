//! Lists the embedded programs with their sizes, or writes them to a folder: `images DIR`.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).map(PathBuf::from);
    for (name, image) in freestone_guest::ALL {
        println!("{name:8} {:7} bytes", image.len());
        if let Some(folder) = &folder {
            fs::write(folder.join(name), image)?;
        }
    }
    Ok(())
}
