//! The programs do what their contracts say, on raw KVM. Skipped by name where there is no /dev/kvm.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::machine::{End, Machine, kvm};
use freestone_guest::exits::{Command, Operation};
use freestone_guest::{
    DEMO, EXITS, LIFE, PAGING, PARAMS, PROBE, REAL_MODE_HELLO, START, exits, life, paging, probe, start,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[test]
fn start_sends_its_byte_and_resets() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, START);
    assert_eq!(machine.run(), End::Reset);
    assert_eq!(machine.log.console, [start::FIRST_BYTE]);
}

#[test]
fn start_powers_off_by_the_port_it_is_given() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, START);
    machine.set_param(start::OFF_PORT, u64::from(freestone_guest::DONE_PORT));
    machine.set_param(start::OFF_VALUE, 0x34);
    machine.set_param(start::FIRST, u64::from(b'x'));
    assert_eq!(machine.step(), Ok(0x34));
    assert_eq!(machine.log.console, *b"x");
}

#[test]
fn real_mode_hello_says_hello_and_halts_wherever_it_lies() {
    let Some(kvm) = kvm() else { return };
    for at in [0x1000, 0x7C00] {
        let mut machine = Machine::real_mode(&kvm, REAL_MODE_HELLO, at);
        assert_eq!(machine.run(), End::Halt);
        assert_eq!(machine.console(), "Hello\r\n");
    }
}

fn exits_made(machine: &mut Machine, command: Command) -> (usize, usize, usize, usize) {
    machine.log = Default::default();
    machine.memory.write_slice(&command.to_bytes(), GuestAddress(PARAMS)).unwrap();
    assert_eq!(machine.step(), Ok(exits::DONE));
    let log = &machine.log;
    (log.out_bytes, log.ins, log.mmio_writes, log.mmio_reads)
}

#[test]
fn exits_makes_as_many_of_each_kind_as_asked_at_both_levels() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, EXITS);
    for level_0 in [false, true] {
        let mut made =
            |operation, address| exits_made(&mut machine, Command { operation, level_0, count: 7, address });
        assert_eq!(made(Operation::PortOut, 0x80), (7, 0, 0, 0));
        assert_eq!(made(Operation::PortIn, 0x80), (0, 7, 0, 0));
        assert_eq!(made(Operation::MmioWrite, 0xD000_0000), (0, 0, 7, 0));
        assert_eq!(made(Operation::MmioRead, 0xD000_0000), (0, 0, 0, 7));
        assert_eq!(made(Operation::StringOut, 0x80), (7 * 64, 0, 0, 0));
        assert_eq!(made(Operation::Nothing, 0), (0, 0, 0, 0));
    }
}

#[test]
fn exits_refuses_what_it_does_not_know_and_ends_when_told() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, EXITS);
    machine.set_param(0, 99);
    assert_eq!(machine.step(), Ok(exits::UNKNOWN));
    machine.set_param(0, Operation::End as u64);
    assert_eq!(machine.step(), Err(End::Reset));
}

#[test]
fn exits_tells_how_long_it_took() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, EXITS);
    let mut ticks = |count| {
        exits_made(
            &mut machine,
            Command { operation: Operation::PortOut, level_0: false, count, address: 0x80 },
        );
        machine.param(exits::TICKS)
    };
    assert!(ticks(1) > 0);
    assert!(ticks(1000) > ticks(1));
}

/// Walks 4-level tables by hand: what the page walker's tests compare with.
fn walk(memory: &GuestMemoryMmap, root: u64, virt: u64) -> Option<(u64, u64)> {
    let mut table = root;
    for shift in [39, 30, 21, 12] {
        let entry: u64 = memory.read_obj(GuestAddress(table + 8 * (virt >> shift & 511))).unwrap();
        if entry & 1 == 0 {
            return None;
        }
        let address = entry & 0x000F_FFFF_FFFF_F000;
        if shift == 12 || entry & 0x80 != 0 {
            let offset = virt & ((1 << shift) - 1);
            return Some(((address & !((1 << shift) - 1)) + offset, entry));
        }
        table = address;
    }
    None
}

#[test]
fn paging_maps_the_pages_that_it_lists() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, PAGING);
    assert_eq!(machine.step(), Ok(1), "the guest read its markers through the new tables");
    let root = machine.cr3();
    assert_eq!(machine.param(paging::ROOT), root);
    let has_gib = machine.param(paging::HAS_GIB) == 1;
    for page in paging::PAGES.into_iter().filter(|page| page.size < 1 << 30 || has_gib) {
        let (phys, entry) = walk(&machine.memory, root, page.virt + page.marker).unwrap();
        assert_eq!(phys, page.phys + page.marker);
        assert_eq!((entry & 2 != 0, entry & 4 != 0), (page.write, page.user));
        assert_eq!(machine.memory.read_obj::<u64>(GuestAddress(phys)).unwrap(), page.virt);
    }
    for virt in paging::UNMAPPED {
        assert_eq!(walk(&machine.memory, root, virt), None);
    }
    assert_eq!(machine.run(), End::Reset);
}

#[test]
fn probe_comes_to_an_answer() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, PROBE);
    let end = machine.run();
    let step = machine.param(probe::STEP);
    match machine.param(probe::RESULT) {
        0 => assert_eq!(end, End::InternalError, "at {}", probe::step_name(step)),
        result => assert_eq!(machine.log.done, [u8::try_from(result).unwrap()]),
    }
    eprintln!("this /dev/kvm: {:?} at {}", machine.log.done, probe::step_name(step));
    assert!((1..=6).contains(&step));
}

#[test]
fn demo_on_a_machine_without_devices_says_what_failed_and_ends() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, DEMO);
    assert_eq!(machine.run(), End::Reset);
    assert!(machine.log.panicked);
    let console = machine.console();
    assert!(console.contains("  ok      memory: 16 pages"), "{console}");
    assert!(console.contains("  FAILED  acpi: there is no RSDP"), "{console}");
    assert!(console.contains("freestone guest: 2 checks passed, 4 failed"), "{console}");
}

#[test]
fn life_on_a_machine_without_devices_counts_and_ends() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh_with(&kvm, LIFE, "rounds=20 every=10");
    assert_eq!(machine.run(), End::Reset);
    let console = machine.console();
    assert!(!machine.log.panicked, "{console}");
    assert!(
        console.starts_with("life begins memory=2048 disk=no vsock=no net=no cpus=1 timer=no"),
        "{console}"
    );
    assert!(console.contains("\nlife 20 hash="), "{console}");
    assert!(console.contains("\nlife done 20"), "{console}");
}

#[test]
fn life_notices_a_bit_that_flipped_in_its_memory() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh_with(&kvm, LIFE, "every=1");
    machine.stop_at = Some("life 3 ");
    assert_eq!(machine.run(), End::Asked);
    let at = GuestAddress(3 << 20);
    let byte: u8 = machine.memory.read_obj(at).unwrap();
    machine.memory.write_obj(byte ^ 1, at).unwrap();
    assert_eq!(machine.run(), End::Reset);
    assert!(machine.log.panicked);
    assert!(machine.console().contains("LIFE BAD memory in round"), "{}", machine.console());
}

#[test]
fn life_has_the_same_hash_for_the_same_round() {
    let Some(kvm) = kvm() else { return };
    let hashes = || {
        let mut machine = Machine::pvh_with(&kvm, LIFE, "rounds=4 every=2 memory=64");
        assert_eq!(machine.run(), End::Reset);
        let console = machine.console();
        let words = console.split_ascii_whitespace().filter(|word| word.starts_with("hash="));
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let first = hashes();
    assert_eq!(first.len(), 2);
    assert_ne!(first[0], first[1]);
    assert_eq!(hashes(), first);
}

#[test]
fn life_in_its_short_mode_counts_without_a_gap() {
    let Some(kvm) = kvm() else { return };
    let mut machine = Machine::pvh(&kvm, LIFE);
    machine.set_param(life::MODE, 1);
    machine.set_param(life::PORT, u64::from(freestone_guest::DONE_PORT));
    for n in 0..300u64 {
        assert_eq!(machine.step(), Ok(n.to_le_bytes()[0]));
        assert_eq!(machine.param(life::COUNT), n + 1);
        assert_eq!(machine.param(life::CHECK), life::mix(n + 1));
    }
}
