//! `cargo xtask demo`: Debian's kernel boots in the reference VMM to a user space on a virtio disk, live.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::console::Console;
use crate::e2e;
use crate::lab;
use crate::machine::{Asset, Start};
use crate::repo::progress;

/// How long the demonstration may take, dilated as time is in the lab.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the demonstration: the guest's console on stdout, everything else on stderr.
pub fn run(contents: &lab::Contents) -> Result<()> {
    let machine = Start::prepare(contents)?.machine()?;
    let dir = machine.work_dir("demo")?;
    let disk = format!("{dir}/root.img");
    machine.sh(&format!("cp {} {disk}", machine.asset(Asset::RootDisk)))?;
    let linux = e2e::Linux { cpus: 2, memory: "512M", ..e2e::Linux::new(Asset::BzImage, "") };
    let mut argv = e2e::command(&machine, &linux, "demo");
    argv.extend(["--disk".to_owned(), disk.clone()]);
    progress(argv.join(" "));

    let started = Instant::now();
    let mut console = Console::new(machine.spawn(&argv)?, LIMIT, true);
    console.close_input();
    let status = console.finish()?;
    let seconds = started.elapsed().as_secs_f64();
    println!();
    if status != 0 {
        bail!("the VMM ended with status {status}");
    }
    machine.sh(&format!("e2fsck -fn {disk}"))?;
    let written = machine.sh(&format!("debugfs -R 'cat /data/hello' {disk} 2>/dev/null"))?;
    println!("Summary: Debian's kernel, unchanged, with 2 vCPUs and 512 MiB on the {}:", machine.name());
    println!("  booted from /dev/vda (virtio-blk), wrote files and powered off, in {seconds:.1} s;");
    println!("  the file system is clean, and /data/hello on it says: {}", written.trim_end());
    if machine.name() == "lab" {
        println!("  (The lab is an emulated machine: this time says nothing of real hardware.)");
    }
    Ok(())
}
