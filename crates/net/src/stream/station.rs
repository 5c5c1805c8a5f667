//! For tests: a machine at any port, and a loop that waits for sources as an event loop does.

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::{Endpoint, Frame, Offloads, Port, Received, Sent, Setup, Source, VnetHeader};

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
        let slices =
            [(0, front), (0x1_1003, back)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
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

/// Waits for edges of sources, as the event loop of a VMM does.
pub(crate) struct Edges {
    epoll: Epoll,
    _sources: Vec<Source>,
}

impl Edges {
    pub(crate) fn of(sources: impl IntoIterator<Item = Source>) -> Self {
        let (epoll, sources) = (Epoll::new().unwrap(), Vec::from_iter(sources));
        for source in &sources {
            let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, source.as_raw_fd(), edges).unwrap();
        }
        Self { epoll, _sources: sources }
    }

    /// Calls `step` after every edge until it gives something.
    pub(crate) fn until<T>(&self, mut step: impl FnMut() -> Option<T>) -> T {
        let mut events = [EpollEvent::default(); 8];
        loop {
            if let Some(value) = step() {
                return value;
            }
            match self.epoll.wait(20_000, &mut events) {
                Ok(count) => assert!(count > 0, "nothing happened for 20 seconds"),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
            }
        }
    }
}
