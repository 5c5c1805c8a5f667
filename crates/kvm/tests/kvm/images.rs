//! Guests whose memory is an image: mapped privately, or filled by a page server.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use freestone_hypervisor::{CpuState, Exit, MapFlags, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu};
use freestone_memory::image::{self, ImageLayout};
use freestone_memory::uffd::{PageServer, Uffd};
use freestone_memory::{GuestMem, GuestMemBuilder};

use crate::common::*;

/// The image of a guest that adds 1 to the first byte of one page after the other, and says what it is then. The first byte of
/// page `n` is `n`.
fn saved(kvm: &Kvm) -> File {
    // next: add bx, 0x1000; inc byte [bx]; mov al, [bx]; out 0x80, al; jmp next
    let code = [0x81, 0xC3, 0x00, 0x10, 0xFE, 0x07, 0x8A, 0x07, 0xE6, 0x80, 0xEB, 0xF4];
    let machine = Machine::new(kvm, &code);
    for page in 3..16u8 {
        machine.write(u64::from(page) << 12, &[page]);
    }
    let layout = ImageLayout::of(&machine.memory).unwrap();
    image::to_memfd(&machine.memory, &layout).unwrap().0
}

fn start(kvm: &Kvm, memory: GuestMem) -> (Machine, KvmVcpu) {
    use freestone_hypervisor::Hypervisor;
    let vm = kvm.create_vm().unwrap();
    vm.map(0, Arc::clone(&memory.regions()[0]), MapFlags::empty()).unwrap();
    let machine = Machine { memory, vm };
    let mut vcpu = machine.vcpu(0);
    let mut regs = vcpu.regs().unwrap();
    regs.rbx = 0x2000;
    vcpu.set_regs(&regs).unwrap();
    (machine, vcpu)
}

/// What the guest says of its next page.
fn next(vcpu: &mut KvmVcpu) -> u8 {
    match vcpu.run().unwrap() {
        Exit::PioWrite { data, .. } => data[0],
        other => panic!("{other:?}"),
    }
}

fn from_image(file: &File) -> GuestMem {
    GuestMemBuilder::new(MEMORY).image(Arc::new(file.try_clone().unwrap())).build().unwrap()
}

#[test]
fn guests_of_one_image_run_apart_from_each_other() {
    let Some(kvm) = kvm("guests_of_one_image_run_apart_from_each_other") else { return };
    let file = saved(&kvm);
    for _ in 0..3 {
        let (machine, mut vcpu) = start(&kvm, from_image(&file));
        for page in 3..16u8 {
            assert_eq!(next(&mut vcpu), page + 1);
        }
        assert_eq!(machine.read::<1>(0x5000), [6]);
    }
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x5000).unwrap();
    assert_eq!(byte, [5]);
}

#[test]
fn a_guest_finds_zeros_where_pages_of_its_image_were_given_back() {
    let Some(kvm) = kvm("a_guest_finds_zeros_where_pages_of_its_image_were_given_back") else { return };
    let (machine, mut vcpu) = start(&kvm, from_image(&saved(&kvm)));
    assert_eq!(next(&mut vcpu), 4);
    // One that the guest has written to, and two that it has not seen.
    assert_eq!(machine.memory.discard(0x3000, 0x3000).unwrap(), 0x3000);
    assert_eq!([next(&mut vcpu), next(&mut vcpu), next(&mut vcpu)], [1, 1, 7]);
    assert_eq!(machine.read::<1>(0x3000), [0]);
    let mut regs = vcpu.regs().unwrap();
    regs.rbx = 0x2000;
    vcpu.set_regs(&regs).unwrap();
    assert_eq!([next(&mut vcpu), next(&mut vcpu), next(&mut vcpu), next(&mut vcpu)], [1, 2, 2, 8]);
}

#[test]
fn a_guest_runs_while_a_page_server_fills_its_memory() {
    let Some(kvm) = kvm("a_guest_runs_while_a_page_server_fills_its_memory") else { return };
    let file = saved(&kvm);
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    let uffd = match Uffd::new() {
        Ok(uffd) => uffd,
        Err(error) => return skip("a_guest_runs_while_a_page_server_fills_its_memory", &error.to_string()),
    };
    let regions = uffd.register(&memory).unwrap();
    let mut server = PageServer::new(uffd, regions, file).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        server.run(theirs.as_fd()).unwrap();
        server
    });
    let (machine, mut vcpu) = start(&kvm, memory);
    assert_eq!([next(&mut vcpu), next(&mut vcpu)], [4, 5]);
    machine.memory.discard(0x5000, 0x1000).unwrap();
    assert_eq!([next(&mut vcpu), next(&mut vcpu)], [1, 7]);
    drop(ours);
    let set: Vec<_> = thread.join().unwrap().working_set().iter().map(|extent| extent.offset).collect();
    assert_eq!(set, [ENTRY, 0x3000]);
}
