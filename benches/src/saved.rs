//! The floor of save and restore: the state of the raw VM as the calls that set it, one after the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_msrs, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use crate::floor::{Host, Order, Vm, request};

const _: () = assert!(KVMIO == 0xAE, "request() has it built in");

/// Number of a request in both directions and size of what it takes.
const READ: libc::c_ulong = 2;
const WRITE: libc::c_ulong = 1;
const BOTH: libc::c_ulong = 3;

const GET_MSR_INDEX_LIST: libc::c_ulong = request(BOTH, 0x02, 4);
const GET_MSRS: libc::c_ulong = request(BOTH, 0x88, size_of::<kvm_msrs>());
const SET_MSRS: libc::c_ulong = request(WRITE, 0x89, size_of::<kvm_msrs>());
const GET_CPUID2: libc::c_ulong = request(BOTH, 0x91, size_of::<kvm_cpuid2>());
const SET_CPUID2: libc::c_ulong = request(WRITE, 0x90, size_of::<kvm_cpuid2>());
const GET_IRQCHIP: libc::c_ulong = request(BOTH, 0x62, size_of::<kvm_irqchip>());
/// The kernel has it as one that reads.
const SET_IRQCHIP: libc::c_ulong = request(READ, 0x63, size_of::<kvm_irqchip>());
const SET_TSC_KHZ: libc::c_ulong = request(0, 0xA2, 0);
const GET_TSC_KHZ: libc::c_ulong = request(0, 0xA3, 0);
const SET_CLOCK: libc::c_ulong = request(WRITE, 0x7B, size_of::<kvm_clock_data>());
const GET_CLOCK: libc::c_ulong = request(READ, 0x7C, size_of::<kvm_clock_data>());
const GET_PIT2: libc::c_ulong = request(READ, 0x9F, size_of::<kvm_pit_state2>());
const SET_PIT2: libc::c_ulong = request(WRITE, 0xA0, size_of::<kvm_pit_state2>());

/// State of the vCPU that is got and set by a structure: number to get, number to set, size. In the order of restoring.
const VCPU: [(libc::c_ulong, libc::c_ulong, usize); 8] = [
    (0x98, 0x99, size_of::<kvm_mp_state>()),
    (0x81, 0x82, size_of::<kvm_regs>()),
    (0x83, 0x84, size_of::<kvm_sregs>()),
    (0xA6, 0xA7, size_of::<kvm_xcrs>()),
    (0xA4, 0xA5, size_of::<kvm_xsave>()),
    (0xA1, 0xA2, size_of::<kvm_debugregs>()),
    (0x8E, 0x8F, size_of::<kvm_lapic_state>()),
    (0x9F, 0xA0, size_of::<kvm_vcpu_events>()),
];

/// More than any of the structures needs, in words, so that they are aligned.
const WORDS: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Vm,
    Vcpu,
}

#[derive(Debug, Clone)]
struct Call {
    target: Target,
    request: libc::c_ulong,
    /// A structure, or a number if it is empty.
    words: Vec<u64>,
    number: u64,
}

/// The state of a raw VM.
#[derive(Debug, Clone)]
pub struct Saved {
    ranges: Vec<(u64, u64)>,
    calls: Vec<Call>,
}

impl Vm {
    /// The state of all but memory, by the calls that set it.
    ///
    /// # Errors
    /// If the host refuses one of the calls.
    pub fn save(&mut self) -> io::Result<Saved> {
        self.complete()?;
        let mut calls = vec![self.save_cpuid()?];
        // SAFETY: the call takes no argument.
        let khz = unsafe { libc::ioctl(self.vcpu_fd(), GET_TSC_KHZ, 0) };
        if let Ok(number @ 1..) = u64::try_from(khz) {
            calls.push(Call { target: Target::Vcpu, request: SET_TSC_KHZ, words: Vec::new(), number });
        }
        for (at, (get, set, size)) in VCPU.into_iter().enumerate() {
            if at == VCPU.len() - 1 {
                // Events come last.
                calls.push(self.save_msrs()?);
            }
            let mut words = vec![0; WORDS];
            ioctl(self.vcpu_fd(), request(READ, get, size), &mut words)?;
            words.truncate(size.div_ceil(8));
            calls.push(Call { target: Target::Vcpu, request: request(WRITE, set, size), words, number: 0 });
        }
        for chip in 0..3 {
            let mut words = vec![0; size_of::<kvm_irqchip>() / 8];
            if let Some(id) = words.first_mut() {
                *id = chip;
            }
            ioctl(self.fd(), GET_IRQCHIP, &mut words)?;
            calls.push(Call { target: Target::Vm, request: SET_IRQCHIP, words, number: 0 });
        }
        for (get, set, size) in [
            (GET_PIT2, SET_PIT2, size_of::<kvm_pit_state2>()),
            (GET_CLOCK, SET_CLOCK, size_of::<kvm_clock_data>()),
        ] {
            let mut words = vec![0; size.div_ceil(8)];
            ioctl(self.fd(), get, &mut words)?;
            if set == SET_CLOCK
                && let Some(flags) = words.get_mut(1)
            {
                *flags = 0;
            }
            calls.push(Call { target: Target::Vm, request: set, words, number: 0 });
        }
        Ok(Saved { ranges: self.ranges(), calls })
    }

    fn save_cpuid(&self) -> io::Result<Call> {
        let cpuid = CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut words = vec![0; WORDS];
        if let Some(count) = words.first_mut() {
            *count = cpuid.as_slice().len() as u64;
        }
        ioctl(self.vcpu_fd(), GET_CPUID2, &mut words)?;
        Ok(Call { target: Target::Vcpu, request: SET_CPUID2, words, number: 0 })
    }

    /// The registers that this vCPU lets itself be asked for and told.
    fn save_msrs(&self) -> io::Result<Call> {
        let mut list = vec![0_u64; WORDS];
        if let Some(count) = list.first_mut() {
            *count = 1024;
        }
        ioctl(self.host().fd().as_raw_fd(), GET_MSR_INDEX_LIST, &mut list)?;
        let halves: Vec<u32> = list.iter().flat_map(|word| [low(*word), low(*word >> 32)]).collect();
        let count = halves.first().map_or(0, |&count| count as usize);
        let mut words = vec![0];
        let mut kept = 0;
        // Those of Hyper-V and of the x2APIC are kept elsewhere.
        let wanted = halves
            .iter()
            .skip(1)
            .take(count)
            .filter(|&&index| !matches!(index, 0x4000_0000..=0x4000_01ff | 0x800..=0x8ff));
        for &index in wanted {
            let mut one = [1, u64::from(index), 0];
            let known = ioctl(self.vcpu_fd(), GET_MSRS, &mut one)? == 1;
            if known && kept + 1 < KVM_MAX_MSR_ENTRIES && ioctl(self.vcpu_fd(), SET_MSRS, &mut one)? == 1 {
                let [_, index, value] = one;
                words.extend([index, value]);
                kept += 1;
            }
        }
        if let Some(count) = words.first_mut() {
            *count = kept as u64;
        }
        const _: () = assert!(size_of::<kvm_msr_entry>() == 16);
        Ok(Call { target: Target::Vcpu, request: SET_MSRS, words, number: 0 })
    }

    /// A VM as it was saved, its memory copy-on-write from `image`.
    ///
    /// # Errors
    /// If the host refuses one of the calls.
    pub fn restore(host: &Arc<Host>, saved: &Saved, image: &File) -> io::Result<Self> {
        let vm = Self::with_ranges(host, &saved.ranges, Some(image), Order::MemoryFirst)?;
        for call in &saved.calls {
            let fd = if call.target == Target::Vm { vm.fd() } else { vm.vcpu_fd() };
            let argument =
                if call.words.is_empty() { call.number } else { call.words.as_ptr().addr() as u64 };
            // SAFETY: the words are the structure that the request takes, as the kernel gave it, and longer than its fixed
            // part; requests that set only read it. Without words the request takes a number.
            if unsafe { libc::ioctl(fd, call.request, argument) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(vm)
    }
}

impl Saved {
    /// As bytes, for another process.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut words = vec![self.ranges.len() as u64];
        words.extend(self.ranges.iter().flat_map(|&(gpa, len)| [gpa, len]));
        for call in &self.calls {
            let target = u64::from(call.target == Target::Vm);
            words.extend([target, call.request, call.number, call.words.len() as u64]);
            words.extend(&call.words);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The way back; `None` if they are not such bytes. They are trusted.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        let count = words.next()?;
        let mut ranges = Vec::new();
        for _ in 0..count {
            ranges.push((words.next()?, words.next()?));
        }
        let mut calls = Vec::new();
        while let Some(target) = words.next() {
            let target = if target == 1 { Target::Vm } else { Target::Vcpu };
            let (request, number, len) = (words.next()?, words.next()?, words.next()?);
            let words: Vec<u64> = words.by_ref().take(usize::try_from(len).ok()?).collect();
            calls.push(Call { target, request, words, number });
        }
        Some(Self { ranges, calls })
    }
}

fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

/// A call with a structure, which is no longer than `words`.
fn ioctl(fd: RawFd, request: libc::c_ulong, words: &mut [u64]) -> io::Result<libc::c_int> {
    // SAFETY: all callers give the structure of the request, at least as long as the kernel is told or as the request says.
    match unsafe { libc::ioctl(fd, request, words.as_mut_ptr()) } {
        ..0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
