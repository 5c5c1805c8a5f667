//! The floor: a VM by raw KVM calls, written as tightly as it goes. What a VMM needs beyond this is the VMM's own cost.
//!
//! It is for the benches alone: it trusts the images it is given and knows only what they need.

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, OnceLock};

use freestone_memory::layout::{HOLE_START, KVM_TSS, RAM_ABOVE_HOLE};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid2, kvm_pit_config, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};

use crate::image::Image;

pub(crate) const fn request(direction: c_ulong, number: c_ulong, size: usize) -> c_ulong {
    direction << 30 | (size as c_ulong) << 16 | 0xAE << 8 | number
}

const KVM_CREATE_VM: c_ulong = request(0, 0x01, 0);
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = request(0, 0x04, 0);
const KVM_GET_SUPPORTED_CPUID: c_ulong = request(3, 0x05, size_of::<kvm_cpuid2>());
const KVM_CREATE_VCPU: c_ulong = request(0, 0x41, 0);
const KVM_SET_USER_MEMORY_REGION: c_ulong = request(1, 0x46, size_of::<kvm_userspace_memory_region>());
const KVM_SET_TSS_ADDR: c_ulong = request(0, 0x47, 0);
const KVM_CREATE_IRQCHIP: c_ulong = request(0, 0x60, 0);
const KVM_CREATE_PIT2: c_ulong = request(1, 0x77, size_of::<kvm_pit_config>());
const KVM_RUN: c_ulong = request(0, 0x80, 0);
const KVM_SET_REGS: c_ulong = request(1, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: c_ulong = request(2, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: c_ulong = request(1, 0x84, size_of::<kvm_sregs>());
const KVM_SET_CPUID2: c_ulong = request(1, 0x90, size_of::<kvm_cpuid2>());

/// Leaf and bits of KVM's paravirtual features that no host is asked for unless it is understood: steal time in guest
/// memory, and what else some hosts offer and do not keep (bits 7, 11 and 13 of EAX).
const PARAVIRTUAL_LEAF: u32 = 0x4000_0001;
const PARAVIRTUAL_OFF: u32 = 1 << 7 | 1 << 11 | 1 << 13;

/// When the interrupt controllers are made. It matters: see the README.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// After the memory slots.
    MemoryFirst,
    /// Before the memory slots.
    IrqchipFirst,
}

/// A mapping of this process.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, fd: RawFd, offset: libc::off_t) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory of this process.
        let base = unsafe {
            libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset)
        };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Self { base: base.cast(), len }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value; the `Vm` that owns it drops its vCPU before.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A VM with one vCPU, in-kernel interrupt controllers, and memory laid out around the 32-bit hole.
///
/// The fields are in the order in which they must be dropped.
#[derive(Debug)]
pub struct Vm {
    vcpu: OwnedFd,
    run: Mapping,
    vm: OwnedFd,
    memory: Vec<(u64, Mapping)>,
    host: Arc<Host>,
}

/// `/dev/kvm`, opened once for any number of VMs, and what it says of the host.
#[derive(Debug)]
pub struct Host {
    kvm: File,
    cpuid: OnceLock<CpuId>,
}

impl Host {
    /// Opens it.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open() -> io::Result<Arc<Self>> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        Ok(Arc::new(Self { kvm, cpuid: OnceLock::new() }))
    }

    fn cpuid(&self) -> io::Result<&CpuId> {
        if let Some(cpuid) = self.cpuid.get() {
            return Ok(cpuid);
        }
        let mut cpuid = CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| io::ErrorKind::OutOfMemory)?;
        call(&self.kvm, KVM_GET_SUPPORTED_CPUID, cpuid.as_mut_fam_struct_ptr())?;
        for leaf in cpuid.as_mut_slice() {
            if leaf.function == PARAVIRTUAL_LEAF {
                leaf.eax &= !PARAVIRTUAL_OFF;
            }
        }
        Ok(self.cpuid.get_or_init(|| cpuid))
    }

    pub(crate) fn fd(&self) -> &File {
        &self.kvm
    }
}

impl Vm {
    /// Makes the VM with `size` bytes of memory; its processor is as after reset.
    ///
    /// # Errors
    /// If the host refuses one of the calls.
    pub fn new(size: u64, order: Order) -> io::Result<Self> {
        Self::on(&Host::open()?, size, order)
    }

    /// The same by a `/dev/kvm` that is open.
    ///
    /// # Errors
    /// If the host refuses one of the calls.
    pub fn on(host: &Arc<Host>, size: u64, order: Order) -> io::Result<Self> {
        let low = size.min(HOLE_START);
        let mut ranges = vec![(0, low)];
        if size > low {
            ranges.push((RAM_ABOVE_HOLE, size - low));
        }
        Self::with_ranges(host, &ranges, None, order)
    }

    /// A VM whose memory is `ranges`, anonymous or one after the other from an image, copy-on-write.
    pub(crate) fn with_ranges(
        host: &Arc<Host>,
        ranges: &[(u64, u64)],
        image: Option<&File>,
        order: Order,
    ) -> io::Result<Self> {
        let kvm = &host.kvm;
        let vm = new_fd(kvm, KVM_CREATE_VM, 0)?;
        if order == Order::IrqchipFirst {
            create_irqchip(&vm)?;
        }
        let mut memory = Vec::with_capacity(ranges.len());
        let mut offset = 0;
        for (slot, &(gpa, len)) in (0..).zip(ranges) {
            memory.push((gpa, map_memory(&vm, slot, gpa, len, image.map(|image| (image, offset)))?));
            offset += len;
        }
        if order == Order::MemoryFirst {
            create_irqchip(&vm)?;
        }
        let vcpu = new_fd(&vm, KVM_CREATE_VCPU, 0)?;
        let len = number(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidData)?;
        if len < size_of::<kvm_run>() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let run = Mapping::new(len, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)?;
        Ok(Self { vcpu, run, vm, memory, host: Arc::clone(host) })
    }

    /// Loads `image` and puts the processor at its entry as PVH asks for it: 32-bit, flat segments, paging off.
    ///
    /// # Errors
    /// If the image does not fit the memory, or the host refuses one of the calls.
    pub fn boot(&mut self, image: &Image<'_>) -> io::Result<()> {
        for (gpa, data) in image.segments() {
            self.write(gpa, data)?;
        }
        self.enter_at(image.entry().ok_or(io::ErrorKind::InvalidData)?)
    }

    /// Puts `code` at `at` and the processor there, as [`boot`](Self::boot) does.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_flat(&mut self, code: &[u8], at: u64) -> io::Result<()> {
        self.write(at, code)?;
        self.enter_at(at)
    }

    fn enter_at(&mut self, rip: u64) -> io::Result<()> {
        self.set_cpuid()?;
        let mut sregs = kvm_sregs::default();
        call(&self.vcpu, KVM_GET_SREGS, &raw mut sregs)?;
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 0x18,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cs = kvm_segment { selector: 0x10, type_: 11, ..data };
        sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
        sregs.cr0 = 0x11;
        call(&self.vcpu, KVM_SET_SREGS, &raw mut sregs)?;
        let mut regs = kvm_regs { rip, rflags: 2, ..Default::default() };
        call(&self.vcpu, KVM_SET_REGS, &raw mut regs)
    }

    fn set_cpuid(&self) -> io::Result<()> {
        let cpuid = self.host.cpuid()?.as_fam_struct_ptr().cast_mut();
        // The kernel only reads it.
        call(&self.vcpu, KVM_SET_CPUID2, cpuid)
    }

    /// Writes `data` to guest memory. The guest must not run.
    ///
    /// # Errors
    /// If it is not all in one range of memory.
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> io::Result<()> {
        for (start, mapping) in &self.memory {
            let Some(offset) = gpa.checked_sub(*start).and_then(|o| usize::try_from(o).ok()) else {
                continue;
            };
            if offset.checked_add(data.len()).is_some_and(|end| end <= mapping.len) {
                // SAFETY: `offset` is within the mapping, checked above.
                let to = unsafe { mapping.base.as_ptr().add(offset) };
                // SAFETY: `offset..offset + data.len()` is within the mapping, no reference to which exists anywhere.
                unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
                return Ok(());
            }
        }
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// `KVM_RUN`, once more when a signal came; returns the exit reason.
    ///
    /// # Errors
    /// If the host refuses.
    #[inline]
    pub fn run(&mut self) -> io::Result<u32> {
        // SAFETY: the call takes no argument. What the kernel writes is the run page and guest memory, to which no
        // reference exists: those into the page borrow `self`.
        while unsafe { libc::ioctl(self.vcpu.as_raw_fd(), KVM_RUN, 0) } < 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
        Ok(self.page().exit_reason)
    }

    /// The run page.
    #[inline]
    pub fn page(&mut self) -> &mut kvm_run {
        // SAFETY: the mapping is at least as large as a `kvm_run`, page-aligned, initialized by the kernel, made of integers,
        // and borrowed with `self`, so that the kernel does not write it meanwhile.
        unsafe { self.run.base.cast().as_mut() }
    }

    /// `len` bytes at `offset` of the run page, where the data of port I/O are.
    #[inline]
    pub fn port_data(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if offset.checked_add(len).is_none_or(|end| end > self.run.len) {
            return &mut [];
        }
        // SAFETY: `offset` is within the mapping, checked above.
        let start = unsafe { self.run.base.as_ptr().add(offset) };
        // SAFETY: `offset..offset + len` is within the mapping, initialized, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// The VM's file descriptor.
    pub fn fd(&self) -> RawFd {
        self.vm.as_raw_fd()
    }

    pub(crate) fn vcpu_fd(&self) -> RawFd {
        self.vcpu.as_raw_fd()
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Guest-physical address and length of its memory.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        self.memory.iter().map(|(gpa, mapping)| (*gpa, mapping.len as u64)).collect()
    }

    /// Where `immediate_exit` of the run page is, for other threads; for as long as the VM is there.
    pub fn immediate_exit(&self) -> NonNull<AtomicU8> {
        // SAFETY: the field is within the mapping, which is at least as large as a `kvm_run`.
        let field = unsafe { &raw mut (*self.run.base.as_ptr().cast::<kvm_run>()).immediate_exit };
        // SAFETY: the address of a field of a mapping is not null.
        unsafe { NonNull::new_unchecked(field.cast()) }
    }

    /// Writes what is in the first `len` bytes of memory to `file`, which becomes an image of the whole.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_image(&self, file: &File, len: usize) -> io::Result<()> {
        const PAGE: usize = 4096;
        file.set_len(self.memory.iter().map(|(_, mapping)| mapping.len as u64).sum())?;
        let Some((_, first)) = self.memory.first() else { return Ok(()) };
        // SAFETY: within the mapping, initialized by the kernel; the guest does not run while `self` is borrowed, as `run`
        // takes it mutably.
        let bytes = unsafe { std::slice::from_raw_parts(first.base.as_ptr(), first.len.min(len)) };
        for (page, at) in bytes.chunks(PAGE).zip((0_u64..).step_by(PAGE)) {
            if page.iter().any(|&byte| byte != 0) {
                file.write_all_at(page, at)?;
            }
        }
        Ok(())
    }

    /// Finishes the instruction of the last exit, so that the state is whole.
    pub(crate) fn complete(&mut self) -> io::Result<()> {
        self.page().immediate_exit = 1;
        // SAFETY: as in `run`.
        let ran = unsafe { libc::ioctl(self.vcpu.as_raw_fd(), KVM_RUN, 0) };
        let error = io::Error::last_os_error();
        self.page().immediate_exit = 0;
        match ran {
            ..0 if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            ..0 => Err(error),
            _ => Err(io::Error::other("the guest ran")),
        }
    }

    /// `KVM_RUN` once; `None` if a signal or `immediate_exit` ended it.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn run_once(&mut self) -> io::Result<Option<u32>> {
        // SAFETY: as in `run`.
        if unsafe { libc::ioctl(self.vcpu.as_raw_fd(), KVM_RUN, 0) } == 0 {
            return Ok(Some(self.page().exit_reason));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Ok(None),
            _ => Err(error),
        }
    }
}

/// A call whose argument is the number `argument`; returns its result.
fn number(fd: &impl AsRawFd, request: c_ulong, argument: c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: every request that is called this way takes a number and no pointer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        ..0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// A call that makes a file descriptor.
fn new_fd(fd: &impl AsRawFd, request: c_ulong, argument: c_ulong) -> io::Result<OwnedFd> {
    let fd = number(fd, request, argument)?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A call with a structure; `T` is the structure of `request`.
fn call<T>(fd: &impl AsRawFd, request: c_ulong, argument: *mut T) -> io::Result<()> {
    // SAFETY: every caller passes a valid pointer to the structure that the request takes; the size is part of the request.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn create_irqchip(vm: &OwnedFd) -> io::Result<()> {
    number(vm, KVM_SET_TSS_ADDR, KVM_TSS)?;
    number(vm, KVM_CREATE_IRQCHIP, 0)?;
    let mut pit = kvm_pit_config::default();
    call(vm, KVM_CREATE_PIT2, &raw mut pit)
}

fn map_memory(
    vm: &OwnedFd,
    slot: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    image: Option<(&File, u64)>,
) -> io::Result<Mapping> {
    let len = usize::try_from(memory_size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let mapping = match image {
        Some((file, offset)) => {
            let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            Mapping::new(len, flags, file.as_raw_fd(), offset)?
        }
        None => Mapping::new(len, flags | libc::MAP_ANONYMOUS, -1, 0)?,
    };
    let userspace_addr = mapping.base.as_ptr().addr() as u64;
    let mut region =
        kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
    call(vm, KVM_SET_USER_MEMORY_REGION, &raw mut region)?;
    Ok(mapping)
}
