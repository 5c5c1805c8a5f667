//! Machines on the real /dev/kvm, with the freestanding guests. Skipped by name where there is none.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::borrow::Cow;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Console, kvm};
use freestone_guest::paging::{HAS_GIB, PAGES, ROOT, UNMAPPED};
use freestone_guest::{DONE_PORT, PARAMS};
use freestone_vmm::block::{RawImage, RawOptions};
use freestone_vmm::bus::{Access, Bus, IoDevice};
use freestone_vmm::devices::{I8042Plug, PowerPlug, RtcPlug, SerialInput, SerialPlug};
use freestone_vmm::hypervisor::{CpuState, Hypervisor, MapFlags, Vm};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::loader::{Entry, FlatMode, load_bytes};
use freestone_vmm::memory::paging::{PageSize, PagingState, read_virtual, translate};
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::vcpu::{BootState, CpuidConfig, Dispatcher, Step, configure_boot, cpuid};
use freestone_vmm::virtio::{VirtioMmioPlug, blk};
use freestone_vmm::{ExitReason, Machine, MachineBuilder, Payload};

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn builder<'h>(kvm: &'h Kvm, image: &'static [u8], console: &Console) -> MachineBuilder<'h, Kvm> {
    builder_with_input(kvm, image, console, None)
}

fn builder_with_input<'h>(
    kvm: &'h Kvm,
    image: &'static [u8],
    console: &Console,
    input: Option<SerialInput>,
) -> MachineBuilder<'h, Kvm> {
    MachineBuilder::new(kvm)
        .memory(GuestMem::anonymous(64 << 20).unwrap())
        .device(SerialPlug::com1(console.clone(), input))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .payload(Payload::Image { bytes: Cow::Borrowed(image), cmdline: String::new() })
}

/// Runs the machine, or stops it after a while, so that a test fails instead of hanging.
fn run(machine: &mut Machine<Kvm>) -> ExitReason {
    let handle = machine.handle();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            handle.stop();
        }
    });
    let reason = machine.run().unwrap();
    drop(done);
    reason
}

#[test]
fn a_real_mode_program_prints_and_halts() {
    let Some(kvm) = kvm("a_real_mode_program_prints_and_halts") else { return };
    let console = Console::default();
    let mut machine = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(1 << 20).unwrap())
        .device(SerialPlug::com1(console.clone(), None))
        .payload(Payload::Flat {
            bytes: Cow::Borrowed(freestone_guest::REAL_MODE_HELLO),
            at: 0x1000,
            mode: FlatMode::Real16,
        })
        .build()
        .unwrap();
    let handle = machine.handle();
    let seen = console.clone();
    // With an interrupt controller a halted vCPU waits in the kernel: stop it when it has said its word.
    std::thread::spawn(move || {
        for _ in 0..600 {
            if seen.text().contains("Hello\r\n") {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        handle.stop();
    });
    assert!(matches!(run(&mut machine), ExitReason::Stopped));
    assert_eq!(console.text(), "Hello\r\n");
}

#[test]
fn the_built_in_guest_checks_its_disk_and_powers_off() {
    let Some(kvm) = kvm("the_built_in_guest_checks_its_disk_and_powers_off") else { return };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS)).unwrap();
    let image = Arc::new(RawImage::open(file.path(), RawOptions::new()).unwrap());
    let block = blk::Block::new(image, blk::BlockConfig::new().serial(freestone_guest::DEMO_DISK_ID));
    let stats = block.stats();
    let console = Console::default();
    let mut machine = builder(&kvm, freestone_guest::DEMO, &console)
        .device(VirtioMmioPlug::new(block, "vda"))
        .build()
        .unwrap();
    let reason = run(&mut machine);
    let text = console.text();
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{text}");
    assert!(text.contains(" 0 failed"), "{text}");
    assert!(text.contains("sector 2046 written, flushed, read back, restored"), "{text}");
    assert!(stats.counts().reads > 0 && stats.counts().flushes > 0, "{:?}", stats.counts());
    let disk = std::fs::read(file.path()).unwrap();
    assert_eq!(
        disk,
        freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS),
        "the guest restored the disk"
    );
}

#[test]
fn application_processors_start_by_init_and_sipi() {
    let Some(kvm) = kvm("application_processors_start_by_init_and_sipi") else { return };
    for cpus in [2, 3] {
        let console = Console::default();
        let mut machine = builder(&kvm, freestone_guest::SMP, &console).cpus(cpus).build().unwrap();
        let reason = run(&mut machine);
        let text = console.text();
        assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{text}");
        assert!(text.contains(&format!("smp: {cpus} of {cpus} cpus up")), "{text}");
    }
}

#[test]
fn console_input_reaches_the_guest_and_its_answer_comes_back() {
    let Some(kvm) = kvm("console_input_reaches_the_guest_and_its_answer_comes_back") else { return };
    let (read, mut write) = std::io::pipe().unwrap();
    // More than the UART's FIFO holds, in one go: nothing may be lost.
    let long = "0123456789".repeat(15);
    write.write_all(format!("{long}\nquit\n").as_bytes()).unwrap();
    let console = Console::default();
    let input = Some(SerialInput::new(read));
    let mut machine = builder_with_input(&kvm, freestone_guest::ECHO, &console, input).build().unwrap();
    let reason = run(&mut machine);
    let text = console.text();
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{text}");
    assert!(text.contains(&format!("echo: {long}")), "{text}");
    assert!(text.contains("echo: bye"), "{text}");
}

#[test]
fn a_machine_pauses_and_goes_on_where_it_was() {
    let Some(kvm) = kvm("a_machine_pauses_and_goes_on_where_it_was") else { return };
    let (read, mut write) = std::io::pipe().unwrap();
    let console = Console::default();
    let input = Some(SerialInput::new(read));
    let mut machine = builder_with_input(&kvm, freestone_guest::ECHO, &console, input).build().unwrap();
    machine.start().unwrap();
    for _ in 0..20 {
        machine.pause().unwrap();
        let before = console.text();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(console.text(), before, "a paused machine is silent");
        machine.resume().unwrap();
    }
    write.write_all(b"quit\n").unwrap();
    let reason = machine.wait().unwrap();
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}");
    machine.stop().unwrap();
    assert!(console.text().contains("echo: bye"), "{}", console.text());
}

/// Remembers that the guest said it is done.
#[derive(Default)]
struct Done(AtomicBool);

impl IoDevice for Done {
    fn read(&self, _: u64, _: &mut [u8]) -> Access {
        Ok(())
    }
    fn write(&self, _: u64, data: &[u8]) -> Access {
        self.0.store(data == [1], Ordering::Release);
        Ok(())
    }
}

/// The parts by hand, without the machine: one vCPU that runs until the guest says that it is done.
#[test]
fn the_walker_agrees_with_the_page_tables_of_a_running_guest() {
    let Some(kvm) = kvm("the_walker_agrees_with_the_page_tables_of_a_running_guest") else { return };
    let memory = GuestMem::anonymous(16 << 20).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.map(0, Arc::clone(&memory.regions()[0]), MapFlags::empty()).unwrap();
    let entry = load_bytes(&memory, freestone_guest::PAGING, "", None).unwrap().entry;
    let Entry::Pvh32 { entry, start_info } = entry else { panic!("{entry:?}") };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let config = CpuidConfig { lapic: false, ..CpuidConfig::new(1, 0) };
    vcpu.set_cpuid(&cpuid::filter(&kvm.supported_cpuid().unwrap(), &config)).unwrap();
    configure_boot(&mut vcpu, &memory, &BootState::Protected32 { entry, ebx: start_info, esi: 0 }).unwrap();

    let (pio, done) = (Bus::new(), Arc::new(Done::default()));
    pio.insert(DONE_PORT.into(), 1, done.clone()).unwrap();
    let mut dispatcher = Dispatcher::new(pio.view(), Bus::new().view());
    while !done.0.load(Ordering::Acquire) {
        let step = dispatcher.step(&mut vcpu).unwrap();
        assert!(matches!(step, Step::Continue | Step::Interrupted), "{step:?}");
    }

    let special = vcpu.special_regs().unwrap();
    let word = |n: usize| memory.view().read_obj::<u64>(GuestAddress(PARAMS + 8 * n as u64)).unwrap();
    assert_eq!(special.cr3, word(ROOT));
    let state = PagingState::new(special.cr0, special.cr3, special.cr4, special.efer);
    let view = memory.view();
    let pages = if word(HAS_GIB) == 1 { &PAGES[..] } else { &PAGES[..PAGES.len() - 1] };
    for page in pages {
        for offset in [0, page.marker, page.size - 1] {
            let found = translate(&*view, &state, page.virt + offset).unwrap();
            assert_eq!(found.gpa.0, page.phys + offset, "{page:x?}");
            let size = match page.size {
                0x1000 => PageSize::Size4K,
                0x20_0000 => PageSize::Size2M,
                _ => PageSize::Size1G,
            };
            assert_eq!(
                (found.page_size, found.writable, found.user),
                (Some(size), page.write, page.user),
                "{page:x?}"
            );
        }
        let mut marker = [0; 8];
        assert_eq!(read_virtual(&*view, &state, page.virt + page.marker, &mut marker).unwrap(), 8);
        assert_eq!(u64::from_le_bytes(marker), page.virt, "{page:x?}");
    }
    for gva in UNMAPPED {
        assert!(translate(&*view, &state, gva).is_err(), "{gva:#x}");
    }
}
