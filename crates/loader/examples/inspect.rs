//! Says what the loader finds in a kernel file and where it puts everything, without a hypervisor.
//!
//! ```text
//! cargo run -p freestone-loader --example inspect -- KERNEL [--memory MIB] [--initrd FILE] [--protocol auto|pvh|linux64|linux32]
//! ```
//!
//! Without a kernel it inspects a small one that it makes itself.

use std::error::Error;
use std::fs::File;
use std::ops::Range;
use std::process::ExitCode;

use freestone_loader::{BootSource, Entry, Loaded, Protocol, load, load_bytes};
use freestone_memory::layout;
use freestone_memory::{Bytes, GuestAddress, GuestMem};

struct Options {
    kernel: Option<String>,
    initrd: Option<String>,
    memory: u64,
    protocol: Protocol,
}

fn main() -> ExitCode {
    match parse().and_then(|options| inspect(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprint!("inspect: {e}");
            let mut source = e.source();
            while let Some(e) = source {
                eprint!(": {e}");
                source = e.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { kernel: None, initrd: None, memory: 256, protocol: Protocol::Auto };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--memory" => options.memory = value()?.parse()?,
            "--initrd" => options.initrd = Some(value()?),
            "--protocol" => {
                options.protocol = match value()?.as_str() {
                    "auto" => Protocol::Auto,
                    "pvh" => Protocol::Pvh,
                    "linux64" => Protocol::Linux64,
                    "linux32" => Protocol::Linux32,
                    other => return Err(format!("{other:?} is not auto, pvh, linux64 or linux32").into()),
                }
            }
            _ if arg.starts_with('-') => return Err(format!("unknown option {arg}").into()),
            _ => options.kernel = Some(arg),
        }
    }
    Ok(options)
}

fn inspect(options: &Options) -> Result<(), Box<dyn Error>> {
    let size = options.memory.checked_mul(1 << 20).ok_or("too much memory")?;
    // Anonymous memory costs only what is written to it.
    let mem = GuestMem::anonymous(size)?;
    let cmdline = "console=ttyS0";
    let open = |path: &String| File::open(path).map_err(|e| format!("cannot open {path:?}: {e}"));
    let loaded = match &options.kernel {
        None => load_bytes(&mem, &tiny_kernel(), cmdline, None)?,
        Some(name) => {
            let mut kernel = open(name)?;
            let mut initrd = match &options.initrd {
                Some(path) => Some((open(path)?, path.as_str())),
                None => None,
            };
            load(
                &mem,
                &mut BootSource {
                    kernel: &mut kernel,
                    kernel_name: name,
                    protocol: options.protocol,
                    initrd: initrd.as_mut().map(|(file, path)| (file, *path)),
                    cmdline,
                    rsdp: None,
                },
            )?
        }
    };
    print(&mem, options.memory, &loaded)
}

fn print(mem: &GuestMem, memory: u64, loaded: &Loaded) -> Result<(), Box<dyn Error>> {
    let line = |what: &str, range: &Range<u64>| {
        println!(
            "{what:<14}{:#011x}..{:#011x}  {} KiB",
            range.start,
            range.end,
            (range.end - range.start).div_ceil(1024)
        );
    };
    println!("format        {:?}", loaded.format);
    match loaded.entry {
        Entry::Pvh32 { entry, start_info } => {
            println!("entry         PVH, 32-bit, {entry:#x}, start info {start_info:#x}")
        }
        Entry::Linux64 { entry, boot_params } => {
            println!("entry         Linux, 64-bit, {entry:#x}, boot parameters {boot_params:#x}");
        }
        Entry::Linux32 { entry, boot_params } => {
            println!("entry         Linux, 32-bit, {entry:#x}, boot parameters {boot_params:#x}");
        }
        other => println!("entry         {other:x?}"),
    }
    let (Entry::Pvh32 { entry, .. }
    | Entry::Linux64 { entry, .. }
    | Entry::Linux32 { entry, .. }
    | Entry::Flat32 { entry }
    | Entry::Flat64 { entry }) = loaded.entry
    else {
        return Ok(());
    };
    let mut code = [0_u8; 16];
    mem.view().read_slice(&mut code, GuestAddress(entry))?;
    println!("first bytes   {code:02x?}");
    line("kernel", &loaded.kernel);
    for segment in &loaded.segments {
        line("  segment", segment);
    }
    if let Some(range) = &loaded.initrd {
        line("initrd", range);
    }
    if let Some(range) = &loaded.cmdline {
        line("command line", range);
    }
    println!("memory map of {memory} MiB");
    for entry in layout::e820(&layout::ram_ranges(mem.size())) {
        line(&format!("  {:?}", entry.kind), &(entry.start..entry.start + entry.len));
    }
    Ok(())
}

/// An ELF file with one segment, whose only instruction is HLT, entered by the 64-bit protocol.
fn tiny_kernel() -> Vec<u8> {
    let entry = 0x10_0000_u64.to_le_bytes();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend_from_slice(&entry);
    elf.extend_from_slice(&64_u64.to_le_bytes());
    elf.resize(52, 0);
    elf.extend_from_slice(&[64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, read and execute; offset, virtual and physical address, length in file and memory, alignment
    elf.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend_from_slice(&120_u64.to_le_bytes());
    elf.extend_from_slice(&entry);
    elf.extend_from_slice(&entry);
    for value in [1_u64, 0x1000, 1] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    elf.push(0xf4);
    elf
}
