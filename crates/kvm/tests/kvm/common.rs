//! What the tests share: a small machine, and the way to skip.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use freestone_hypervisor::x86::{Regs, Segment};
use freestone_hypervisor::{CpuState, Exit, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu, KvmVm};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
pub use freestone_testkit::skip;

/// Where guest code begins.
pub const ENTRY: u64 = 0x1000;
/// Where guest code finds or leaves data.
pub const DATA: u64 = 0x2000;
/// Guest memory ends here; what is beyond is MMIO.
pub const MEMORY: u64 = 0x1_0000;
/// A real-mode segment beyond guest memory, and its address.
pub const MMIO_SEGMENT: u16 = 0xA000;
pub const MMIO: u64 = 0xA_0000;

/// KVM, or `None` after saying that `test` is skipped.
pub fn kvm(test: &str) -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            skip(test, &error.to_string());
            None
        }
    }
}

/// A VM with 64 KiB of memory.
pub struct Machine {
    pub memory: GuestMem,
    pub vm: KvmVm,
}

impl Machine {
    /// With `code` at [`ENTRY`].
    pub fn new(kvm: &Kvm, code: &[u8]) -> Self {
        let memory = GuestMem::anonymous(MEMORY).unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.map(0, Arc::clone(&memory.regions()[0]), MapFlags::empty()).unwrap();
        let machine = Self { memory, vm };
        machine.write(ENTRY, code);
        machine
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.view().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.view().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// vCPU `index`, in real mode with flat segments at [`ENTRY`].
    pub fn vcpu(&self, index: u32) -> KvmVcpu {
        let mut vcpu = self.vm.create_vcpu(index).unwrap();
        set_real_mode(&mut vcpu, 0);
        vcpu
    }
}

/// Real mode at [`ENTRY`] with DS at `data_segment` and everything else at 0.
pub fn set_real_mode(vcpu: &mut KvmVcpu, data_segment: u16) {
    let mut special = vcpu.special_regs().unwrap();
    special.cs.base = 0;
    special.cs.selector = 0;
    special.ds.selector = data_segment;
    special.ds.base = u64::from(data_segment) << 4;
    vcpu.set_special_regs(&special).unwrap();
    vcpu.set_regs(&Regs { rip: ENTRY, rsp: 0x8000, rflags: 2, ..Regs::default() }).unwrap();
}

/// 64-bit mode at [`ENTRY`] with `regs`; the first 1 GiB and the last below 4 GiB are mapped one to one.
pub fn set_long_mode(machine: &Machine, vcpu: &mut KvmVcpu, regs: Regs) {
    const PML4: u64 = 0x9000;
    const PDPT: u64 = 0xA000;
    const LOW: u64 = 0xB000;
    const HIGH: u64 = 0xC000;
    const TABLE: u64 = 3;
    const LARGE: u64 = 0x83;
    machine.write(PML4, &(PDPT | TABLE).to_le_bytes());
    machine.write(PDPT, &(LOW | TABLE).to_le_bytes());
    machine.write(PDPT + 3 * 8, &(HIGH | TABLE).to_le_bytes());
    for i in 0..512 {
        machine.write(LOW + i * 8, &((i << 21) | LARGE).to_le_bytes());
        machine.write(HIGH + i * 8, &((3 << 30) | (i << 21) | LARGE).to_le_bytes());
    }
    let mut special = vcpu.special_regs().unwrap();
    let code = Segment {
        limit: u32::MAX,
        selector: 8,
        kind: 0xB,
        present: true,
        s: true,
        l: true,
        g: true,
        ..Segment::default()
    };
    let data = Segment { selector: 16, kind: 3, l: false, db: true, ..code };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    special.cr0 = 0x8000_0011;
    special.cr3 = PML4;
    special.cr4 = 0x20;
    special.efer = 0x500;
    vcpu.set_special_regs(&special).unwrap();
    vcpu.set_regs(&Regs { rip: ENTRY, rsp: 0x8000, rflags: 2, ..regs }).unwrap();
}

/// Runs until `hlt`, and hands every other exit to `handle`.
pub fn run_to_halt(vcpu: &mut KvmVcpu, mut handle: impl FnMut(Exit<'_>)) {
    loop {
        match vcpu.run().unwrap() {
            Exit::Halt => return,
            exit => handle(exit),
        }
    }
}

/// Ends the process when a test hangs, because a vCPU that never returns cannot be waited for.
pub struct Watchdog(#[expect(dead_code, reason = "dropping it calls the dog off")] Sender<()>);

impl Watchdog {
    pub fn new(test: &'static str) -> Self {
        let (alive, told) = mpsc::channel();
        std::thread::spawn(move || {
            if told.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
                // Past the harness, which would keep the message of `eprintln!` to itself.
                std::io::stderr().write_all(format!("{test} hangs\n").as_bytes()).unwrap();
                std::process::abort();
            }
        });
        Self(alive)
    }
}
