//! The machines that are saved, and small helpers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use freestone_testkit::{Op, Script, ScriptedHypervisor};
use freestone_vmm::block::{RawImage, RawOptions};
use freestone_vmm::devices::{
    I8042Plug, PciRootPlug, PowerPlug, ProgressPlug, PvPanicPlug, RtcPlug, SerialPlug, VmGenIdPlug,
};
use freestone_vmm::hypervisor::Hypervisor;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder};
use freestone_vmm::net::MacAddr;
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::snapshot::{Header, Limits, Reader, Sections, State, Writer};
use freestone_vmm::store::{Kind, StoreOptions, StorePaths, StoreReport, Stored};
use freestone_vmm::virtio::balloon::{Balloon, BalloonConfig};
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::rng::Rng;
use freestone_vmm::virtio::vsock::{UnixHost, Vsock, VsockConfig};
use freestone_vmm::virtio::{Mem, MemConfig, Transport, VirtioPlug, blk, console};
use freestone_vmm::{Machine, MachineBuilder, Payload, Result};

use crate::common::Console;

pub(crate) const MEMORY: u64 = 1 << 20;
pub(crate) const DISK: usize = 512 * 1024;
/// A device's hardware address, which a snapshot has.
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 7];

/// A number that looks random, below `below`.
pub(crate) struct Random(u64);

impl Random {
    /// Begins with `FREESTONE_SEED`, or with `seed`; says which.
    pub(crate) fn new(seed: u64) -> Self {
        let seed = std::env::var("FREESTONE_SEED").map_or(seed, |text| text.parse().unwrap());
        eprintln!("FREESTONE_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below.max(1)
    }
}

/// A number of the environment.
pub(crate) fn count(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// A description of a machine with one of every device that can be saved, in `dir`, where its disk is made if there is none.
pub(crate) fn builder<'h, H: Hypervisor>(
    hypervisor: &'h H,
    dir: &Path,
    transport: Transport,
    out: &Console,
) -> MachineBuilder<'h, H> {
    let disk = dir.join("disk.raw");
    if !disk.exists() {
        std::fs::write(&disk, vec![0; DISK]).unwrap();
    }
    let image = Arc::new(RawImage::open(&disk, RawOptions::new()).unwrap());
    let block = blk::Block::new(image, blk::BlockConfig::new().serial("golden"));
    let net = Net::new(Nat::new(NatConfig::default()).unwrap(), NetConfig::new().mac(MacAddr(MAC))).unwrap();
    let host = UnixHost::bind(dir.join("v.sock"), UnixHost::DEFAULT_MODE).unwrap();
    let vsock = Vsock::new(host, VsockConfig::new(3)).unwrap();
    let port = console::Port::console().output(Vec::new());
    let balloon = Balloon::new(BalloonConfig::new()).unwrap();
    let mem = Mem::new(&MemConfig::new(128 << 20)).unwrap();
    MachineBuilder::new(hypervisor)
        .device(SerialPlug::com1(out.clone(), None))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .device(PvPanicPlug::new())
        .device(ProgressPlug::new())
        .device(VmGenIdPlug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(transport, block, "vda"))
        .device(VirtioPlug::new(transport, net, "net0"))
        .device(VirtioPlug::new(transport, vsock, "vsock"))
        .device(VirtioPlug::new(transport, Rng::new(), "rng"))
        .device(VirtioPlug::new(transport, console::Console::new(vec![port]).unwrap(), "console"))
        .device(VirtioPlug::new(transport, balloon, "balloon"))
        .device(VirtioPlug::new(transport, mem, "mem"))
}

/// First queues and their number, by device as [`builder`] has them.
const QUEUES: [u32; 7] = [1, 2, 3, 1, 2, 3, 1];
/// Where the registers of virtio-mmio devices begin, and how far apart they are.
const MMIO: (u64, u64) = (0xd000_0000, 0x1000);

/// A guest that makes every virtio device on MMIO ready, and then waits.
fn script(transport: Transport, ready: Sender<()>) -> Script {
    let mut script = Script::new().out8(0x3f8, b'G').out8(0x70, 0x0a).out8(0x60, 0xd2);
    if transport == Transport::Mmio {
        let mut ring = 0x2_0000u32;
        for (index, queues) in (0u64..).zip(QUEUES) {
            let base = MMIO.0 + index * MMIO.1;
            let mut set = |register: u64, value: u32| {
                script = std::mem::take(&mut script).mmio_write32(base + register, value);
            };
            for (register, value) in
                [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 0), (0x70, 0xb)]
            {
                set(register, value);
            }
            for queue in 0..queues {
                for (register, value) in [
                    (0x30, queue),
                    (0x38, 4),
                    (0x80, ring),
                    (0x84, 0),
                    (0x90, ring + 0x400),
                    (0x94, 0),
                    (0xa0, ring + 0x800),
                    (0xa4, 0),
                    (0x44, 1),
                ] {
                    set(register, value);
                }
                ring += 0x1000;
            }
            set(0x70, 0xf);
        }
    }
    let script = script.out8(0x3f8, b'R').call(move |_| ready.send(()).unwrap());
    (0..16).fold(script, |script, _| script.op(Op::WaitKick))
}

/// A hypervisor whose guests do nothing: for machines that are restored.
pub(crate) fn waiting() -> ScriptedHypervisor {
    ScriptedHypervisor::new((0..16).fold(Script::new(), |script, _| script.op(Op::WaitKick)))
}

/// A new machine that is paused after its guest has made the devices ready, with a mark on some pages.
pub(crate) fn fresh(dir: &Path, transport: Transport, log: bool) -> Machine<ScriptedHypervisor> {
    let (ready, is_ready) = channel();
    let hypervisor = ScriptedHypervisor::new(script(transport, ready));
    let mut machine = builder(&hypervisor, dir, transport, &Console::default())
        .memory(GuestMemBuilder::new(MEMORY).dirty_log(log).build().unwrap())
        .payload(Payload::Flat { bytes: (&[0xf4]).into(), at: 0x1000, mode: FlatMode::Real16 })
        .build()
        .unwrap();
    mark(machine.memory(), 1);
    machine.start().unwrap();
    is_ready.recv_timeout(Duration::from_secs(30)).unwrap();
    machine.pause().unwrap();
    machine
}

/// Pages with a mark.
const MARKED: std::ops::Range<u64> = 64..68;

/// Writes `generation` to some pages.
pub(crate) fn mark(memory: &GuestMem, generation: u64) {
    for page in MARKED {
        memory.view().write_obj(generation, GuestAddress(page << 12)).unwrap();
    }
}

/// The generation of the pages; they must be of one.
pub(crate) fn marked(memory: &GuestMem) -> u64 {
    let found: Vec<u64> =
        MARKED.map(|page| memory.view().read_obj(GuestAddress(page << 12)).unwrap()).collect();
    assert!(found.iter().all(|one| *one == found[0]), "pages of several snapshots: {found:?}");
    found[0]
}

pub(crate) fn store<H: Hypervisor>(
    machine: &mut Machine<H>,
    to: &StorePaths,
    kind: Kind,
) -> Result<StoreReport> {
    let mut options = StoreOptions::new("freestone-tests 0.1.0");
    options.kind = kind;
    machine.paused().unwrap().store(to, &options, State::new(), &mut |_, _| {})
}

/// Restores a scripted machine whole, and verifies its memory before.
pub(crate) fn restore(
    paths: &StorePaths,
    dir: &Path,
    transport: Transport,
) -> Result<Machine<ScriptedHypervisor>> {
    let mut stored = Stored::open(paths)?;
    stored.verify(&mut |_, _| {})?;
    let machine = build(&mut stored, dir, transport)?;
    stored.fill(&machine)?;
    stored.finish()?;
    Ok(machine)
}

pub(crate) fn build(
    stored: &mut Stored,
    dir: &Path,
    transport: Transport,
) -> Result<Machine<ScriptedHypervisor>> {
    let memory = stored.map(true)?;
    builder(&waiting(), dir, transport, &Console::default())
        .memory(memory)
        .restore(stored.sections(), ClockPolicy::Continue)
}

/// Sections as they are: version, whether optional, body.
pub(crate) type Bodies = BTreeMap<String, (u32, bool, Vec<u8>)>;

pub(crate) fn bodies(bytes: &[u8]) -> (Header, Bodies) {
    let mut reader = Reader::new(bytes, Limits::default()).unwrap();
    let header = reader.header().clone();
    let mut bodies = Bodies::new();
    while let Some(section) = reader.next_section().unwrap() {
        let (name, version, optional) = (section.name().to_owned(), section.version(), section.is_optional());
        bodies.insert(name, (version, optional, section.read_body().unwrap()));
    }
    (header, bodies)
}

/// A state file of these sections, with right checksums.
pub(crate) fn state_file<'a>(
    header: &Header,
    bodies: impl IntoIterator<Item = (&'a String, &'a (u32, bool, Vec<u8>))>,
) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), header).unwrap();
    for (name, (version, optional, body)) in bodies {
        let mut section = writer.section(name.clone(), *version, *optional).unwrap();
        std::io::Write::write_all(&mut section, body).unwrap();
        section.finish().unwrap();
    }
    writer.finish().unwrap()
}

/// Sections of a state, as they are.
pub(crate) fn bodies_of(sections: Sections) -> Bodies {
    let header = sections.header().clone();
    let mut writer = Writer::new(Vec::new(), &header).unwrap();
    sections.into_state().write_to(&mut writer).unwrap();
    bodies(&writer.finish().unwrap()).1
}

/// What a guest has said.
pub(crate) fn text(console: &Console) -> String {
    String::from_utf8_lossy(&console.0.lock().unwrap()).into_owned()
}

/// A folder in `dir`.
pub(crate) fn folder(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}
