//! The checks that every virtio device must pass on both transports and with both ring formats, with a driver that was written from
//! the specification alone: every device, in every configuration that makes it work differently.
#![cfg(any(
    feature = "blk",
    feature = "console",
    feature = "rng",
    feature = "balloon",
    feature = "vsock",
    feature = "pmem",
    feature = "mem",
    feature = "net"
))]

#[cfg(feature = "blk")]
mod common;

use freestone_bus::Plug;
use freestone_virtio::{Transport, VirtioDevice, VirtioPlug};

fn plug(transport: Transport, device: impl VirtioDevice + 'static) -> Box<dyn Plug> {
    Box::new(VirtioPlug::new(transport, device, "under test"))
}

/// All checks of one device: `$make` makes it.
macro_rules! conformance {
    ($name:ident, $make:expr) => {
        freestone_testkit::virtio_conformance!(
            $name,
            mmio: || crate::plug(crate::Transport::Mmio, $make),
            pci: || crate::plug(crate::Transport::Pci, $make),
        );
    };
}

#[cfg(feature = "blk")]
mod blk {
    use std::io;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;
    use std::time::Duration;

    use freestone_block::{Engine, Image, IoQueue, Op, Submitted, SyncQueue};
    use freestone_memory::{MemorySlice, MemoryView};
    use freestone_virtio::rate::{RateLimiter, TokenBucket};
    use freestone_virtio::{Block, BlockConfig};

    use crate::common::TestImage;

    pub(crate) fn config() -> BlockConfig {
        BlockConfig::new().poll(Duration::ZERO)
    }

    pub(crate) fn disk(config: BlockConfig) -> Block {
        Block::new(TestImage::with(128, false), config)
    }

    pub(crate) fn read_only() -> Block {
        Block::new(TestImage::with(128, true), config())
    }

    pub(crate) fn slow() -> Block {
        Block::new(Arc::new(Slow(TestImage::with(128, false))), config().queues(2))
    }

    /// Two requests, and no more before the test is over.
    fn two_requests() -> RateLimiter {
        RateLimiter::new().ops(TokenBucket::new(2, Duration::from_secs(1 << 20)))
    }

    pub(crate) fn limited() -> Block {
        let fast = TokenBucket::per_second(1 << 40);
        disk(config().rate_limiter(RateLimiter::new().ops(fast).bandwidth(fast)))
    }

    /// An image whose requests are under way for a while: until the queue was looked at twice.
    #[derive(Debug)]
    struct Slow(Arc<TestImage>);

    impl Image for Slow {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read_only(&self) -> bool {
            false
        }

        fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
            self.0.read_vectored_at(bufs, offset)
        }

        fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
            self.0.write_vectored_at(bufs, offset)
        }

        fn flush(&self) -> io::Result<()> {
            self.0.flush()
        }

        fn open_queue(self: Arc<Self>, _engine: Engine, _depth: u16) -> io::Result<Box<dyn IoQueue>> {
            Ok(Box::new(SlowQueue { queue: SyncQueue::new(self), under_way: Vec::new(), looked: false }))
        }
    }

    #[derive(Debug)]
    struct SlowQueue {
        queue: SyncQueue,
        under_way: Vec<(u64, io::Result<()>)>,
        looked: bool,
    }

    impl IoQueue for SlowQueue {
        fn submit<'m>(&mut self, tag: u64, view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted {
            match self.queue.submit(tag, view, op) {
                Submitted::Done(outcome) => self.under_way.push((tag, outcome)),
                Submitted::Pending => {}
            }
            Submitted::Pending
        }

        fn commit(&mut self) -> io::Result<()> {
            Ok(())
        }

        /// The last comes first, and only every second time.
        fn reap(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
            self.looked = !self.looked;
            if !self.looked
                && let Some((tag, outcome)) = self.under_way.pop()
            {
                done(tag, outcome);
            }
        }

        fn wait(&mut self) -> io::Result<()> {
            self.looked = true;
            Ok(())
        }

        fn in_flight(&self) -> usize {
            self.under_way.len()
        }

        fn completion_source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
            None
        }
    }

    conformance!(plain, crate::blk::disk(crate::blk::config()));
    conformance!(read_only, crate::blk::read_only());
    conformance!(polling, crate::blk::disk(crate::blk::config().poll(std::time::Duration::from_micros(10))));
    conformance!(four_queues, crate::blk::disk(crate::blk::config().queues(4)));
    conformance!(limited, crate::blk::limited());
    conformance!(slow, crate::blk::slow());

    /// A device whose requests wait for tokens cannot pass the checks that want to see requests served after a reset.
    #[test]
    fn a_disk_whose_requests_wait_for_tokens_stops_at_any_time() {
        use freestone_testkit::conformance::{loses_nothing_when_paused, resets, resets_while_paused};
        use freestone_testkit::driver::{MmioRegisters, PciRegisters};
        use freestone_virtio::Transport;

        fn limited(transport: Transport) -> Box<dyn freestone_bus::Plug> {
            crate::plug(transport, disk(config().rate_limiter(two_requests())))
        }
        let mmio = [
            loses_nothing_when_paused::<MmioRegisters>,
            resets::<MmioRegisters>,
            resets_while_paused::<MmioRegisters>,
        ];
        mmio.iter().for_each(|check| check(&|| limited(Transport::Mmio)).unwrap());
        let pci = [
            loses_nothing_when_paused::<PciRegisters>,
            resets::<PciRegisters>,
            resets_while_paused::<PciRegisters>,
        ];
        pci.iter().for_each(|check| check(&|| limited(Transport::Pci)).unwrap());
    }
}

#[cfg(feature = "console")]
mod console {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io;

    use freestone_bus::Source;
    use freestone_virtio::console::{Console, Port, PortInput, PortOutput};

    /// A host's end that always has bytes for the guest, and takes bytes in pieces.
    struct End;

    impl PortInput for End {
        fn source(&self) -> Option<Source> {
            None
        }

        fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
            let len = data.len().min(7);
            data.iter_mut().take(len).for_each(|byte| *byte = b'x');
            Ok(len)
        }
    }

    impl PortOutput for End {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            Ok(data.len().min(100))
        }
    }

    pub(crate) fn one_port() -> Console {
        Console::new(vec![Port::console().input(End).output(End)]).unwrap()
    }

    pub(crate) fn without_ends() -> Console {
        Console::new(vec![Port::console()]).unwrap()
    }

    pub(crate) fn several_ports() -> Console {
        let port = |name| Port::named(name).input(End).output(End);
        Console::new(vec![Port::console().output(End), port("one"), port("two")]).unwrap()
    }

    conformance!(one, crate::console::one_port());
    conformance!(nobody, crate::console::without_ends());
    conformance!(several, crate::console::several_ports());
}

#[cfg(feature = "rng")]
mod rng {
    use freestone_virtio::rate::{RateLimiter, TokenBucket};
    use freestone_virtio::rng::Rng;

    pub(crate) fn limited() -> Rng {
        Rng::new().limit(Some(RateLimiter::new().bandwidth(TokenBucket::per_second(1 << 40))))
    }

    conformance!(plain, freestone_virtio::rng::Rng::new());
    conformance!(limited, crate::rng::limited());
}

#[cfg(feature = "balloon")]
mod balloon {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use freestone_virtio::balloon::{Balloon, BalloonConfig};

    pub(crate) fn all_features() -> Balloon {
        let config = BalloonConfig::new().target(1 << 20).deflate_on_oom(true);
        Balloon::new(config.statistics(true).reporting(true).hinting(true)).unwrap()
    }

    pub(crate) fn no_features() -> Balloon {
        let config = BalloonConfig::new().deflate_on_oom(false);
        Balloon::new(config.statistics(false).reporting(false).hinting(false)).unwrap()
    }

    conformance!(all, crate::balloon::all_features());
    conformance!(none, crate::balloon::no_features());
}

#[cfg(feature = "vsock")]
mod vsock {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use freestone_virtio::vsock::{UnixHost, Vsock, VsockConfig};

    pub(crate) fn vsock() -> Vsock {
        // The socket needs no file any more once it listens.
        let dir = tempfile::tempdir().unwrap();
        let host = UnixHost::bind(dir.path().join("s"), UnixHost::DEFAULT_MODE).unwrap();
        Vsock::new(host, VsockConfig::new(3)).unwrap()
    }

    conformance!(unix, crate::vsock::vsock());
}

#[cfg(feature = "pmem")]
mod pmem {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use freestone_virtio::pmem::{Pmem, PmemConfig};

    pub(crate) fn pmem(read_only: bool) -> Pmem {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 << 20).unwrap();
        Pmem::open(file.path(), PmemConfig::new().reserve(false).read_only(read_only)).unwrap()
    }

    conformance!(plain, crate::pmem::pmem(false));
    conformance!(read_only, crate::pmem::pmem(true));
}

#[cfg(feature = "mem")]
mod mem {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use freestone_virtio::mem::{Mem, MemConfig};

    pub(crate) fn mem() -> Mem {
        Mem::new(&MemConfig::new(256 << 20).requested(16 << 20).queue_size(16)).unwrap()
    }

    pub(crate) fn small_queue() -> Mem {
        Mem::new(&MemConfig::new(256 << 20)).unwrap()
    }

    conformance!(plain, crate::mem::mem());
    conformance!(small_queue, crate::mem::small_queue());
}

#[cfg(feature = "net")]
mod net {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;
    use std::time::Duration;

    use freestone_net::{
        Endpoint, Frame, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source,
        VnetHeader,
    };
    use freestone_virtio::net::{Net, NetConfig};
    use freestone_virtio::rate::{RateLimiter, TokenBucket};

    /// A network in which every frame comes back, one waits at first, and every third frame must be offered twice.
    #[derive(Debug)]
    struct Mirror {
        offloads: Offloads,
    }

    impl Port for Mirror {
        fn info(&self) -> PortInfo {
            let offloads = self.offloads;
            PortInfo { max_pairs: 4, transmit: offloads, receive: offloads, mtu: Some(1500), mac: None }
        }

        fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
            let end = |_| Box::new(End { frames: vec![vec![0xff; 100]], offered: 0 }) as Box<dyn Endpoint>;
            Ok((0..setup.pairs).map(end).collect())
        }

        fn set_receive(&mut self, _receive: Offloads) -> Result<()> {
            Ok(())
        }

        fn stats(&self) -> Arc<PortStats> {
            Arc::default()
        }
    }

    struct End {
        frames: Vec<Vec<u8>>,
        offered: usize,
    }

    impl Endpoint for End {
        fn sources(&self) -> Vec<Source> {
            Vec::new()
        }

        fn transmit(&mut self, _header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
            self.offered += 1;
            if self.offered.is_multiple_of(3) {
                return Sent::Busy;
            }
            let mut bytes = vec![0; frame.len().min(1514)];
            frame.read_at(0, &mut bytes);
            if self.frames.len() < 4 {
                self.frames.push(bytes);
            }
            Sent::Done
        }

        fn waiting(&mut self) -> Option<usize> {
            Some(65_550)
        }

        fn receive(&mut self, room: Frame<'_, '_>) -> Received {
            let Some(frame) = self.frames.first() else { return Received::Nothing };
            if frame.len() > room.len() {
                return Received::NeedsRoom(frame.len());
            }
            let frame = self.frames.remove(0);
            Received::Frame(room.write_at(0, &frame), VnetHeader::default())
        }

        fn drop_next(&mut self) {
            self.frames.remove(0);
        }
    }

    pub(crate) fn config() -> NetConfig {
        NetConfig::new().poll(Duration::ZERO)
    }

    pub(crate) fn net(config: NetConfig) -> Net {
        Net::new(Mirror { offloads: Offloads::all() }, config).unwrap()
    }

    pub(crate) fn plain() -> Net {
        Net::new(Mirror { offloads: Offloads::empty() }, config()).unwrap()
    }

    pub(crate) fn limited() -> Net {
        let fast = TokenBucket::per_second(1 << 40);
        let limiter = RateLimiter::new().ops(fast).bandwidth(fast);
        net(config().rx_limiter(limiter).tx_limiter(limiter))
    }

    conformance!(without_offloads, crate::net::plain());
    conformance!(offloads, crate::net::net(crate::net::config()));
    conformance!(three_pairs, crate::net::net(crate::net::config().pairs(3)));
    conformance!(small_queues, crate::net::net(crate::net::config().queue_size(4)));
    conformance!(polling, crate::net::net(crate::net::config().poll(std::time::Duration::from_micros(10))));
    conformance!(limited, crate::net::limited());
}
