//! The little that the benches ask of the host beside KVM.

use std::io;
use std::time::Duration;

/// Keeps the calling thread on processor `cpu`.
///
/// # Errors
/// If there is no such processor, or this process may not run there.
pub fn pin(cpu: usize) -> io::Result<()> {
    // SAFETY: a set of zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: `cpu` is a bit of the set, checked above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is valid and has the size that is given.
    match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The processors this process may use.
pub fn cpus() -> Vec<usize> {
    // SAFETY: a set of zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set has the size that is given.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return vec![0];
    }
    let all = 0..8 * size_of::<libc::cpu_set_t>();
    // SAFETY: every number of the range is a bit of the set.
    all.filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

/// Processor time that the calling thread has used, in its guest too, in nanoseconds.
///
/// On a host with nothing else to do it is the time on the clock; on a busy one it leaves out the turns of others.
pub fn thread_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid, and the clock of the calling thread is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)).as_secs_f64() * 1e9
}

/// The rate of the time stamp counter, which guests read, in ticks for a nanosecond. Takes a tenth of a second.
pub fn ticks_per_nanosecond() -> f64 {
    // SAFETY: every x86-64 processor has RDTSC.
    let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
    let (begin, first) = (std::time::Instant::now(), tsc());
    std::thread::sleep(Duration::from_millis(100));
    #[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
    let ticks = tsc().wrapping_sub(first) as f64;
    ticks / (begin.elapsed().as_secs_f64() * 1e9)
}

/// Why this host cannot run the benches that need /dev/kvm, or `None` if it can.
pub fn kvm_unusable() -> Option<String> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => crate::floor::Vm::new(1 << 20, crate::floor::Order::MemoryFirst)
            .err()
            .map(|e| format!("/dev/kvm makes no VM: {e}")),
        Err(e) => Some(format!("/dev/kvm: {e}")),
    }
}
