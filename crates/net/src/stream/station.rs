//! For tests: a machine at any port, and a loop that waits for sources as an event loop does.

use std::os::fd::{AsRawFd, BorrowedFd};

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use rustix::event::epoll;

use crate::{Endpoint, Frame, MacAddr, Offloads, Port, Received, Sent, Setup, Source, VnetHeader};

/// A machine with memory of its own, and the endpoint it has at a port.
pub(crate) struct Station {
    pub(crate) end: Box<dyn Endpoint>,
    mem: GuestMem,
}

impl Station {
    pub(crate) fn at(port: &mut dyn Port) -> Self {
        let end = port.open(&Setup { pairs: 1, receive: Offloads::empty() }).unwrap().remove(0);
        Self { end, mem: GuestMem::anonymous(0x4_0000).unwrap() }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Sent {
        let view = self.mem.view();
        // In two slices, as cards often have it.
        let (front, back) = (bytes.len().min(10), bytes.len().saturating_sub(10));
        let slices = [(0, front), (0x1_1003, back)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let frame = Frame::new(&slices);
        assert_eq!(frame.write_at(0, bytes), bytes.len());
        self.end.transmit(&VnetHeader::default(), frame)
    }

    pub(crate) fn receive(&mut self) -> Option<Vec<u8>> {
        let room = self.end.waiting()?;
        let view = self.mem.view();
        let slices = [view.get_slice(GuestAddress(0x2_2000), room).unwrap()];
        let frame = Frame::new(&slices);
        match self.end.receive(frame) {
            Received::Frame(len, header) => {
                assert_eq!(header.needs(), Offloads::empty());
                let mut bytes = vec![0; len];
                assert_eq!(frame.read_at(0, &mut bytes), len);
                Some(bytes)
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn all(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.receive()).collect()
    }
}

/// Waits for edges of sources.
pub(crate) struct Edges(std::os::fd::OwnedFd);

impl Edges {
    pub(crate) fn of(sources: impl IntoIterator<Item = Source>) -> Self {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for source in sources {
            // SAFETY is not needed: the descriptor is duplicated through the process's own list of them.
            let path = format!("/proc/self/fd/{}", source.as_raw_fd());
            assert!(std::fs::symlink_metadata(&path).is_ok());
            add(&poll, source.as_raw_fd());
        }
        Self(poll)
    }

    /// Calls `step` after every edge until it gives something.
    pub(crate) fn until<T>(&self, mut step: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(value) = step() {
                return value;
            }
            let mut room = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 8];
            let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
            let events = rustix::io::retry_on_intr(|| {
                epoll::wait(&self.0, room.as_mut_slice(), Some(&limit)).map(|(events, _)| events.len())
            });
            assert!(events.unwrap() > 0, "nothing happened for 20 seconds");
        }
    }
}
