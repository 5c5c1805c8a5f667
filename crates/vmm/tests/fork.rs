//! A hundred children of one machine, in one process, on the real /dev/kvm: each has an overlay of the machine's disk and writes what is its own,
//! and shares the memory that it does not write. Skipped by name where there is no /dev/kvm.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Console, kvm};
use freestone_guest::life;
use freestone_testkit::life::{Checker, Line};
use freestone_vmm::block::tools::{CreateOptions, create};
use freestone_vmm::block::{Backing, Hold, Image, ImageFormat, Qcow2Options, RawImage, RawOptions};
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, PvPanicPlug, SerialPlug, VmGenIdPlug};
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::snapshot::State;
use freestone_vmm::virtio::blk::{Block, BlockConfig, BlockHandle};
use freestone_vmm::virtio::{Transport, VirtioPlug};
use freestone_vmm::{Attention, Machine, MachineBuilder, Payload};

const CHILDREN: u64 = 100;
const MEMORY: u64 = 32 << 20;
/// Memory that the guest does not use, which the machine was filled with.
const WARM: (u64, usize) = (16 << 20, 8 << 20);
const DISK: u64 = 512 * 1024;

fn builder<'h>(
    kvm: &'h Kvm,
    image: Arc<dyn Image>,
    console: &Console,
) -> (MachineBuilder<'h, Kvm>, BlockHandle) {
    let block = Block::new(image, BlockConfig::new());
    let handle = block.handle();
    let builder = MachineBuilder::new(kvm)
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .device(PvPanicPlug::new())
        .device(I8042Plug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(Transport::Pci, block, "vda"))
        .device(VmGenIdPlug::new());
    (builder, handle)
}

fn run_for(machine: &mut Machine<Kvm>, time: Duration) {
    let handle = machine.handle();
    let call = std::thread::spawn(move || {
        std::thread::sleep(time);
        handle.call();
    });
    let attention = machine.attend().unwrap();
    call.join().unwrap();
    assert!(matches!(attention, Attention::Called), "{attention:?}");
}

fn text(console: &Console) -> String {
    String::from_utf8_lossy(&console.0.lock().unwrap()).into_owned()
}

/// The whole lines of a console.
fn lines(console: &Console) -> Vec<Line> {
    let text = text(console);
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(Line::parse).collect()
}

fn overlay(path: &Path, base: &Path) -> Arc<dyn Image> {
    let mut options = CreateOptions::new(ImageFormat::Qcow2, 0);
    options.size = None;
    options.backing = Some((base.to_str().unwrap().to_owned(), ImageFormat::Raw));
    create(path, &options).unwrap();
    Arc::new(Qcow2Options::new().backing(Backing::Allow).open(path).unwrap())
}

/// KiB of all private mappings of files in memory: (number, resident, of those shared with others, of those written).
fn mapped() -> (u64, u64, u64, u64) {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut sum = (0, 0, 0, 0);
    let mut ours = false;
    for line in smaps.lines() {
        // A mapping begins with its addresses and access, and what it is of is last.
        let mut words = line.split_ascii_whitespace();
        if words.next().is_some_and(|word| !word.ends_with(':')) {
            let private = words.next().is_some_and(|access| access.ends_with('p'));
            ours = private && line.contains("/memfd:");
            sum.0 += u64::from(ours);
            continue;
        }
        let Some((key, rest)) = line.split_once(':').filter(|_| ours) else { continue };
        let Some(kib) = rest.trim().strip_suffix(" kB").and_then(|n| n.trim().parse::<u64>().ok()) else {
            continue;
        };
        match key {
            "Rss" => sum.1 += kib,
            "Shared_Clean" | "Shared_Dirty" => sum.2 += kib,
            "Private_Dirty" => sum.3 += kib,
            _ => {}
        }
    }
    sum
}

struct Child {
    number: u64,
    machine: Machine<Kvm>,
    console: Console,
    overlay: PathBuf,
}

#[test]
fn a_hundred_children_differ_where_they_wrote_and_share_the_rest() {
    let name = "a_hundred_children_differ_where_they_wrote_and_share_the_rest";
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    create(&base, &CreateOptions::new(ImageFormat::Raw, DISK)).unwrap();

    let console = Console::default();
    let image = Arc::new(RawImage::open(&base, RawOptions::new()).unwrap());
    let (parts, disk) = builder(&kvm, image, &console);
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    memory.view().write_slice(&vec![0x5A; WARM.1], GuestAddress(WARM.0)).unwrap();
    let words = "every=1 spin=500 memory=256 timer=off";
    let payload = Payload::Image { bytes: freestone_guest::LIFE.into(), cmdline: words.to_owned() };
    let mut machine = parts.memory(memory).payload(payload).build().unwrap();
    machine.start().unwrap();
    while lines(&console).len() < 10 {
        run_for(&mut machine, Duration::from_millis(20));
    }
    machine.pause().unwrap();
    disk.set_hold(Hold::Share).unwrap();
    let template = machine.paused().unwrap().template("test", State::new(), false).unwrap();
    let before = std::fs::read(&base).unwrap();

    let mut children = Vec::new();
    for number in 1..=CHILDREN {
        let console = Console::default();
        let path = dir.path().join(format!("{number}.qcow2"));
        let memory = template.map(false).unwrap();
        memory.view().write_slice(&number.to_le_bytes(), GuestAddress(life::word(life::SALT))).unwrap();
        let (parts, _) = builder(&kvm, overlay(&path, &base), &console);
        let mut sections = template.sections().unwrap();
        let machine = parts.memory(memory).restore(&mut sections, ClockPolicy::Advance).unwrap();
        template.fill(&machine).unwrap();
        // What it says of the host is for those who restore on another.
        assert_eq!(sections.finish().unwrap(), ["host"]);
        children.push(Child { number, machine, console, overlay: path });
    }
    // While they live, nobody goes on with what is below their disks.
    assert!(disk.set_hold(Hold::Own).is_err());
    assert!(machine.resume().is_err(), "the disk is shared");

    for child in &mut children {
        // One after the other: a guest that waits for a hundred others takes its device for dead.
        child.machine.resume().unwrap();
        // Some go on longer than others.
        let wanted = 3 + usize::try_from(child.number % 3).unwrap();
        while lines(&child.console).iter().filter(|line| line.number("salt") == Some(child.number)).count()
            < wanted
        {
            run_for(&mut child.machine, Duration::from_millis(20));
        }
        child.machine.pause().unwrap();
        let mut warm = vec![0; WARM.1];
        child.machine.memory().view().read_slice(&mut warm, GuestAddress(WARM.0)).unwrap();
        assert!(warm.iter().all(|&byte| byte == 0x5A), "child {}", child.number);
    }

    let (mappings, rss, shared, dirty) = mapped();
    eprintln!("{mappings} mappings: {rss} KiB resident, {shared} KiB shared, {dirty} KiB written");
    assert!(mappings >= CHILDREN, "{mappings}");
    let warm = CHILDREN * (WARM.1 as u64 >> 10);
    assert!(shared >= warm, "{shared} KiB of at least {warm} are shared");
    assert!(dirty / CHILDREN < 2048, "each child wrote {} KiB", dirty / CHILDREN);

    let mut at = std::collections::BTreeSet::new();
    for child in children {
        let Child { number, mut machine, console, overlay } = child;
        machine.stop().unwrap();
        drop(machine);
        let told = text(&console);
        let mut checker = Checker::new();
        // The first line may have begun in the template.
        let (_, whole) = told.split_once('\n').unwrap();
        checker.text(whole.rsplit_once('\n').unwrap().0).unwrap();
        let last = checker.last().unwrap();
        assert_eq!(last.number("salt"), Some(number), "{told}");
        at.insert(last.round);
        let image = Qcow2Options::new().backing(Backing::Allow).read_only(true).open(&overlay).unwrap();
        life::check_disk(&bytes(&image), life::MAX_SECTORS, last.round).unwrap();
    }
    assert!(at.len() > 1, "all children were equal: {at:?}");
    assert!(before == std::fs::read(&base).unwrap(), "the disk below has changed");
    // They are gone: the machine has its disk again and goes on where it was.
    disk.set_hold(Hold::Own).unwrap();
    let told = lines(&console).len();
    machine.resume().unwrap();
    while lines(&console).len() < told + 3 {
        run_for(&mut machine, Duration::from_millis(20));
    }
    machine.pause().unwrap();
    machine.stop().unwrap();
    let mut checker = Checker::new();
    checker.text(text(&console).rsplit_once('\n').unwrap().0).unwrap();
    assert_eq!(checker.last().unwrap().number("salt"), Some(0));
}

/// All that is in an image.
fn bytes(image: &dyn Image) -> Vec<u8> {
    let size = usize::try_from(image.size()).unwrap();
    let memory = GuestMem::anonymous(image.size()).unwrap();
    let view = memory.view();
    let slice = freestone_vmm::memory::GuestMemoryBackend::get_slice(&*view, GuestAddress(0), size).unwrap();
    image.read_vectored_at(&[slice], 0).unwrap();
    let mut bytes = vec![0; size];
    view.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}
