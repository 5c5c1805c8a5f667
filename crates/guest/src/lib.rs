#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod blk;
pub mod demo;
pub mod exits;
pub mod life;
pub mod net;
pub mod paging;
pub mod probe;
pub mod start;
pub mod writer;

pub use demo::{DISK_ID as DEMO_DISK_ID, DISK_SECTORS as DEMO_DISK_SECTORS, disk as demo_disk};

macro_rules! program {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".elf"))
    };
}

/// The built-in guest: says what it found, does real work on each part, powers off with a summary. See [`demo`].
pub const DEMO: &[u8] = program!("demo");

/// The guest of the start-up bench: one byte on COM1, then the end. See [`start`].
pub const START: &[u8] = program!("start");

/// The guest of the exit benches: as many exits of a kind as the host asks for. See [`exits`].
pub const EXITS: &[u8] = program!("exits");

/// The guest of the disk bench: blocks of a virtio disk at random, as fast as the device answers. See [`blk`].
pub const BLK: &[u8] = program!("blk");

/// Starts the application processors and counts them.
///
/// It reads the processors from the ACPI MADT, starts each by INIT and SIPI through the local APIC (xAPIC, memory-mapped at
/// 0xFEE0_0000) with a trampoline at guest-physical 0x1_0000, and prints one line, `smp: 2 of 2 cpus up (apic ids 0 1)`, on
/// COM1. Then it powers off as [`DEMO`] does; when processors are missing it fails as [`DEMO`] does.
pub const SMP: &[u8] = program!("smp");

/// Builds page tables with every page size and waits for the host to walk them. See [`paging`].
pub const PAGING: &[u8] = program!("paging");

/// Tells whether this host's /dev/kvm can run an operating system kernel. See [`probe`].
pub const PROBE: &[u8] = program!("probe");

/// Echoes lines of COM1 (polled, interrupts off) until one is `quit`.
///
/// It prints `echo: type, end with quit`, then answers each line, ended by CR or LF and cut at 200 bytes, with `echo: ` and the line. At
/// `quit` it prints `echo: bye` and powers off as [`DEMO`] does.
pub const ECHO: &[u8] = program!("echo");

/// Writes numbered blocks to its disk until it is killed, and says on COM1 which are durable. See [`writer`].
pub const WRITER: &[u8] = program!("writer");

/// Uses a network card as it is told: DHCP, TCP in both directions, echo requests. See [`net`].
pub const NET: &[u8] = program!("net");

/// Counts, hashes memory, uses its devices, and notices when something of it is not as it left it. See [`life`].
pub const LIFE: &[u8] = program!("life");

/// All images with their names, for tests and lists.
pub const ALL: [(&str, &[u8]); 11] = [
    ("demo", DEMO),
    ("start", START),
    ("exits", EXITS),
    ("blk", BLK),
    ("smp", SMP),
    ("paging", PAGING),
    ("probe", PROBE),
    ("echo", ECHO),
    ("writer", WRITER),
    ("net", NET),
    ("life", LIFE),
];

/// Guest-physical address of the parameter block: the first 128 bytes of every image, sixteen little-endian 64-bit words.
///
/// A host writes it after loading the image and before the first instruction, or while the program waits.
pub const PARAMS: u64 = 0x10_0000;

/// Port by which the programs tell the host that a step is done (QEMU's `isa-debug-exit` sits there as well).
pub const DONE_PORT: u16 = 0xF4;

/// A flat 16-bit program: writes `Hello` and a line end to COM1 and halts with interrupts off.
///
/// Load it anywhere below 64 KiB and start in real mode with CS:IP there, CS and DS of base 0. It is position-independent.
///
/// ```text
/// 00  E8 00 00     call next        ; push the address of next
/// 03  5E     next: pop  si
/// 04  83 C6 11     add  si, 0x11    ; the text is 17 bytes after next
/// 07  BA F8 03     mov  dx, 0x3F8
/// 0A  B9 07 00     mov  cx, 7
/// 0D  FC           cld
/// 0E  F3 6E        rep outsb
/// 10  FA           cli
/// 11  F4     stop: hlt
/// 12  EB FD        jmp  stop
/// 14  "Hello\r\n"
/// ```
///
/// It needs a stack of two bytes at SS:SP.
pub const REAL_MODE_HELLO: &[u8] =
    b"\xE8\x00\x00\x5E\x83\xC6\x11\xBA\xF8\x03\xB9\x07\x00\xFC\xF3\x6E\xFA\xF4\xEB\xFDHello\r\n";
