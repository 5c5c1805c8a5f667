//! A heap of a few small slots: all that a driver needs for its indirect descriptor lists.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

const SLOTS: usize = 64;
const SLOT: usize = 512;

#[repr(C, align(512))]
struct Slots(UnsafeCell<[[u8; SLOT]; SLOTS]>);

struct Heap {
    used: AtomicU64,
    slots: Slots,
}

// SAFETY: a slot belongs to whoever set its bit in `used`.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap { used: AtomicU64::new(0), slots: Slots(UnsafeCell::new([[0; SLOT]; SLOTS])) };

// SAFETY: slots are disjoint, 512 bytes and aligned to as much, and are given out once until freed.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > SLOT || layout.align() > SLOT {
            return core::ptr::null_mut();
        }
        let mut used = self.used.load(Ordering::Relaxed);
        while used != u64::MAX {
            let bit = used.trailing_ones();
            match self.used.compare_exchange(used, used | 1 << bit, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return self.slots.0.get().cast::<u8>().wrapping_add(bit as usize * SLOT),
                Err(now) => used = now,
            }
        }
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, at: *mut u8, _: Layout) {
        let slot = at.addr().wrapping_sub(self.slots.0.get().addr()) / SLOT;
        self.used.fetch_and(!(1 << slot), Ordering::Release);
    }
}
