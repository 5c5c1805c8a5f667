//! Nothing of a machine is left in the process that made it: no thread, descriptor, mapping, memory, child or file, however often.
//!
//! Each test measures its whole process, so each is to run in one of its own, or alone: [`ALONE`].
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use common::{Console, kvm};
use freestone_testkit::footprint::Footprint;
use freestone_testkit::{Op, Script, ScriptedHypervisor};
use freestone_vmm::block::{RawImage, RawOptions};
use freestone_vmm::bus::ThreadSpawner;
use freestone_vmm::devices::{
    DebugPlug, I8042Plug, PciRootPlug, PowerPlug, PvPanicPlug, RtcPlug, SerialInput, SerialPlug,
};
use freestone_vmm::hypervisor::Hypervisor;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::net::switch::{PortOptions, Switch, SwitchConfig};
use freestone_vmm::virtio::balloon::{Balloon, BalloonConfig};
use freestone_vmm::virtio::console;
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::rng::Rng;
use freestone_vmm::virtio::vsock::{UnixHost, Vsock, VsockConfig};
use freestone_vmm::virtio::{Mem, MemConfig, Pmem, PmemConfig, Transport, VirtioDevice, VirtioPlug, blk};
use freestone_vmm::{MachineBuilder, Payload};

/// Lives of a machine, of which the first ones are not measured: allocators and lazily made tables grow in them.
const CYCLES: usize = 1000;
/// Lives on KVM, where one takes the host some hundredths of a second, unless [`KVM_CYCLES_VARIABLE`] says how many.
const KVM_CYCLES: usize = 200;
const KVM_CYCLES_VARIABLE: &str = "FREESTONE_LIVES";
const WARM_UP: usize = 50;
/// Bytes of memory, of the disk and of persistent memory.
const MEMORY: u64 = 2 << 20;

/// One test at a time, where tests share a process.
static ALONE: Mutex<()> = Mutex::new(());

/// A machine with one of every device, with `files` of `dir`; half of them have a thread.
fn builder<'h, H: Hypervisor>(hypervisor: &'h H, dir: &Path, transport: Transport) -> MachineBuilder<'h, H> {
    let (input, _typed) = std::io::pipe().unwrap();
    let image = Arc::new(RawImage::open(dir.join("disk"), RawOptions::new()).unwrap());
    let switch = Switch::new(SwitchConfig::default());
    let port = console::Port::console().output(Vec::new());
    let host = UnixHost::bind(dir.join("v.sock"), UnixHost::DEFAULT_MODE).unwrap();
    let thread = Arc::new(ThreadSpawner::new("devices").unwrap());
    let on_thread = |plug: VirtioPlug| plug.spawner(Arc::clone(&thread) as _);
    MachineBuilder::new(hypervisor)
        .memory(GuestMem::anonymous(MEMORY).unwrap())
        .device(SerialPlug::com1(Console::default(), Some(SerialInput::new(input))))
        .device(DebugPlug::new(std::io::sink()))
        .device(PowerPlug::new())
        .device(PvPanicPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .device(PciRootPlug::new())
        .device(virtio(transport, blk::Block::new(image, blk::BlockConfig::new()), "vda"))
        .device(on_thread(virtio(transport, net(Nat::new(NatConfig::default()).unwrap()), "net0")))
        .device(virtio(transport, net(switch.port(PortOptions::default()).unwrap()), "net1"))
        .device(virtio(transport, console::Console::new(vec![port]).unwrap(), "console"))
        .device(on_thread(virtio(transport, Rng::new(), "rng")))
        .device(virtio(transport, Vsock::new(host, VsockConfig::new(3)).unwrap(), "vsock"))
        .device(virtio(transport, Balloon::new(BalloonConfig::new()).unwrap(), "balloon"))
        .device(on_thread(virtio(
            transport,
            Pmem::open(dir.join("pmem"), PmemConfig::new()).unwrap(),
            "pmem0",
        )))
        .device(virtio(transport, Mem::new(&MemConfig::new(128 << 20)).unwrap(), "mem"))
}

fn virtio(transport: Transport, device: impl VirtioDevice + 'static, name: &str) -> VirtioPlug {
    VirtioPlug::new(transport, device, name)
}

fn net(port: impl freestone_vmm::net::Port + 'static) -> Net {
    Net::new(port, NetConfig::new()).unwrap()
}

/// A directory with the files that machines open.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["disk", "pmem"] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(MEMORY).unwrap();
    }
    dir
}

/// Does `life` again and again, and fails if the process grows by it.
fn again_and_again(dir: &Path, cycles: usize, mut life: impl FnMut(usize)) {
    (0..WARM_UP).for_each(&mut life);
    let before = Footprint::of_dir(dir).unwrap();
    (WARM_UP..cycles).for_each(&mut life);
    before.assert_not_grown();
}

fn transport(cycle: usize) -> Transport {
    if cycle.is_multiple_of(2) { Transport::Pci } else { Transport::Mmio }
}

#[test]
fn a_thousand_lives_with_every_device_leave_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = files();
    again_and_again(dir.path(), CYCLES, |cycle| {
        let hypervisor =
            ScriptedHypervisor::new(Script::new().op(Op::WaitKick).op(Op::WaitKick).op(Op::WaitKick));
        let payload = Payload::Flat {
            bytes: (&[0xf4]).into(),
            at: 0x1000,
            mode: freestone_vmm::loader::FlatMode::Real16,
        };
        let mut machine =
            builder(&hypervisor, dir.path(), transport(cycle)).payload(payload).build().unwrap();
        machine.start().unwrap();
        machine.pause().unwrap();
        machine.resume().unwrap();
        machine.stop().unwrap();
    });
}

#[test]
fn hundreds_of_lives_on_kvm_leave_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(kvm) = kvm("hundreds_of_lives_on_kvm_leave_nothing") else { return };
    let cycles = std::env::var(KVM_CYCLES_VARIABLE).map_or(KVM_CYCLES, |n| n.parse().unwrap());
    let dir = files();
    again_and_again(dir.path(), cycles, |cycle| {
        let payload = Payload::Image { bytes: freestone_guest::LIFE.into(), cmdline: "mode=count".into() };
        let mut machine = builder(&kvm, dir.path(), transport(cycle)).payload(payload).build().unwrap();
        machine.start().unwrap();
        machine.pause().unwrap();
        machine.resume().unwrap();
        // Some are dropped as they run.
        if !cycle.is_multiple_of(3) {
            machine.stop().unwrap();
        }
    });
}

#[test]
fn a_machine_that_cannot_be_built_leaves_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = files();
    again_and_again(dir.path(), CYCLES, |cycle| {
        let hypervisor = ScriptedHypervisor::new(Script::new());
        let image = Payload::Image { bytes: (&[1, 2, 3]).into(), cmdline: String::new() };
        assert!(builder(&hypervisor, dir.path(), transport(cycle)).payload(image).build().is_err());
    });
}
