//! Doorbells of a scripted VM: writes that signal an eventfd and cause no exit.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{DoorbellGuard, Doorbells, EventFd, IoAddr};

struct Bell {
    id: u64,
    addr: IoAddr,
    datamatch: Option<u32>,
    fd: EventFd,
}

#[derive(Default)]
struct Bound {
    bells: Vec<Bell>,
    next: u64,
}

/// The bells of one VM.
#[derive(Default)]
pub(crate) struct Bells(Mutex<Bound>);

impl Bells {
    fn lock(&self) -> MutexGuard<'_, Bound> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().bells.len()
    }

    /// Whether a write of `data` to `addr` rings a bell.
    pub(crate) fn ring(&self, addr: IoAddr, data: &[u8]) -> bool {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes).ok();
        let bound = self.lock();
        let rings = |b: &&Bell| b.addr == addr && b.datamatch.is_none_or(|wanted| value == Some(wanted));
        let bell = bound.bells.iter().find(rings);
        // A full counter has been signalled already.
        bell.map(|b| b.fd.write(1)).is_some()
    }
}

/// The handle that devices are given.
pub(crate) struct BellHandle(pub(crate) Arc<Bells>);

impl Doorbells for BellHandle {
    fn bind(&self, addr: IoAddr, datamatch: Option<u32>, fd: &EventFd) -> io::Result<DoorbellGuard> {
        let fd = fd.try_clone()?;
        let mut bound = self.0.lock();
        // As KVM: two bells collide if one write could ring both.
        let collides = |b: &Bell| {
            b.addr == addr && (b.datamatch.is_none() || datamatch.is_none() || b.datamatch == datamatch)
        };
        if bound.bells.iter().any(collides) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = bound.next;
        bound.next += 1;
        bound.bells.push(Bell { id, addr, datamatch, fd });
        drop(bound);
        let bells = Arc::clone(&self.0);
        Ok(DoorbellGuard::new(move || bells.lock().bells.retain(|b| b.id != id)))
    }
}
