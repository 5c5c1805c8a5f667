#![doc = include_str!("../README.md")]

mod backing;
mod dirty;
mod discard;
mod error;
mod guest_mem;
mod holes;
pub mod image;
pub mod io;
pub mod layout;
mod pages;
pub mod paging;
mod region;
#[cfg(feature = "uffd")]
pub mod uffd;

pub use backing::{Backing, HugePageSize};
pub use dirty::{DirtyLog, DirtyPages};
pub use error::{Error, Result};
pub use guest_mem::{GuestMem, GuestMemBuilder, MemoryMap, MemorySlice, MemoryView, Region, own_slice};
pub use pages::Prefetch;
pub use region::{FileMapping, RegionBuilder};
// vm-memory's vocabulary is part of our API on purpose: a device written for it works here.
pub use vm_memory::{
    self, Address, AtomicAccess, ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend,
    GuestMemoryRegion, GuestUsize, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};
