//! The smallest machine: memory, one processor, and a log of its ports.

use freestone_guest::{DONE_PORT, PARAMS};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::elf;

pub const MEMORY: usize = 16 << 20;
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x8000;
const EXIT_LIMIT: usize = 100_000;

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The keyboard controller was told to reset.
    Reset,
    /// Triple fault, or KVM's shutdown.
    Shutdown,
    /// HLT with no interrupt controller.
    Halt,
    /// `KVM_RUN` could not emulate an instruction.
    InternalError,
    /// The console has what was waited for.
    Asked,
}

/// What the guest did so far.
#[derive(Debug, Default)]
pub struct Log {
    pub console: Vec<u8>,
    pub panicked: bool,
    pub done: Vec<u8>,
    pub out_bytes: usize,
    pub ins: usize,
    pub mmio_writes: usize,
    pub mmio_reads: usize,
}

pub struct Machine {
    // Dropped first: it uses the memory.
    vcpu: VcpuFd,
    _vm: VmFd,
    pub memory: GuestMemoryMmap,
    pub log: Log,
    /// Ends a run when the console has it, once.
    pub stop_at: Option<&'static str>,
}

/// None, with a message, where there is no /dev/kvm.
pub fn kvm() -> Option<Kvm> {
    Kvm::new().inspect_err(|error| eprintln!("SKIPPED: /dev/kvm: {error}")).ok()
}

impl Machine {
    fn empty(kvm: &Kvm) -> Self {
        let vm = kvm.create_vm().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        vm.set_tss_address(0xFFFB_D000).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: the mapping is `MEMORY` bytes long and outlives the VM: the struct's fields drop in order.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 0x4000_0001) {
            entry.eax &= !(1 << 7 | 1 << 11 | 1 << 13);
        }
        vcpu.set_cpuid2(&cpuid).unwrap();
        Self { vcpu, _vm: vm, memory, log: Log::default(), stop_at: None }
    }

    /// An ELF image in the state that PVH asks for, with a start info that says `MEMORY` bytes.
    pub fn pvh(kvm: &Kvm, image: &[u8]) -> Self {
        let machine = Self::empty(kvm);
        for segment in elf::loads(image) {
            machine.memory.write_slice(&image[segment.file], GuestAddress(segment.phys)).unwrap();
        }
        let words = |at: u64, words: &[u64]| {
            for (i, word) in (0..).zip(words) {
                machine.memory.write_obj(*word, GuestAddress(at + 8 * i)).unwrap();
            }
        };
        words(START_INFO, &[0x1_336E_C578, 0, 0, 0, 0, MEMORY_MAP, 1]);
        words(MEMORY_MAP, &[0, MEMORY as u64, 1]);

        let mut sregs = machine.vcpu.get_sregs().unwrap();
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 0x10,
            type_: 3,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { selector: 0x08, type_: 11, ..data };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
        sregs.cr0 = 1;
        machine.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: elf::pvh_entry(image).unwrap(),
            rbx: START_INFO,
            rflags: 2,
            ..Default::default()
        };
        machine.vcpu.set_regs(&regs).unwrap();
        machine
    }

    /// As [`Machine::pvh`], with a command line.
    pub fn pvh_with(kvm: &Kvm, image: &[u8], command_line: &str) -> Self {
        let machine = Self::pvh(kvm, image);
        machine.memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE)).unwrap();
        machine.memory.write_obj(COMMAND_LINE, GuestAddress(START_INFO + 24)).unwrap();
        machine
    }

    /// A flat image in real mode.
    pub fn real_mode(kvm: &Kvm, image: &[u8], at: u16) -> Self {
        let machine = Self::empty(kvm);
        machine.memory.write_slice(image, GuestAddress(u64::from(at))).unwrap();
        let mut sregs = machine.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        machine.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs { rip: u64::from(at), rsp: 0x800, rflags: 2, ..Default::default() };
        machine.vcpu.set_regs(&regs).unwrap();
        machine
    }

    pub fn set_param(&self, index: usize, value: u64) {
        self.memory.write_obj(value, GuestAddress(PARAMS + 8 * index as u64)).unwrap();
    }

    pub fn param(&self, index: usize) -> u64 {
        self.memory.read_obj(GuestAddress(PARAMS + 8 * index as u64)).unwrap()
    }

    pub fn cr3(&self) -> u64 {
        self.vcpu.get_sregs().unwrap().cr3
    }

    /// Runs until the program writes to `DONE_PORT`, or ends.
    pub fn step(&mut self) -> Result<u8, End> {
        for _ in 0..EXIT_LIMIT {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(DONE_PORT, data) => {
                    self.log.done.push(data[0]);
                    return Ok(data[0]);
                }
                VcpuExit::IoOut(0x64, &[0xFE]) => return Err(End::Reset),
                VcpuExit::IoOut(0x505, &[1]) => self.log.panicked = true,
                VcpuExit::IoOut(0x3F8, data) => {
                    self.log.console.extend_from_slice(data);
                    if self.stop_at.is_some_and(|text| self.console().contains(text)) {
                        self.stop_at = None;
                        return Err(End::Asked);
                    }
                }
                VcpuExit::IoOut(_, data) => self.log.out_bytes += data.len(),
                VcpuExit::IoIn(_, data) => {
                    self.log.ins += 1;
                    data.fill(0xFF);
                }
                VcpuExit::MmioWrite(_, _) => self.log.mmio_writes += 1,
                VcpuExit::MmioRead(_, data) => {
                    self.log.mmio_reads += 1;
                    data.fill(0xFF);
                }
                VcpuExit::Hlt => return Err(End::Halt),
                VcpuExit::Shutdown => return Err(End::Shutdown),
                VcpuExit::InternalError => return Err(End::InternalError),
                other => panic!("unexpected exit {other:?}"),
            }
        }
        panic!("no end after {EXIT_LIMIT} exits; console: {}", self.console());
    }

    /// Runs to the end.
    pub fn run(&mut self) -> End {
        loop {
            if let Err(end) = self.step() {
                return end;
            }
        }
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.log.console).into_owned()
    }
}
