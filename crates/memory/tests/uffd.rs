//! Page faults of guest memory served from an image, by a thread and by another process.
#![cfg(feature = "uffd")]
#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};

use freestone_memory::image::{Extent, ImageLayout, write_full};
use freestone_memory::layout::RamRange;
use freestone_memory::uffd::{
    MAX_HANDSHAKE, PageServer, Uffd, UffdRegion, receive_handshake, send_handshake,
};
use freestone_memory::{Backing, Bytes, Error, GuestAddress, GuestMem, GuestMemBuilder};

const HIGH: u64 = 1 << 32;
const LOW_LEN: u64 = 2 << 20;
const HIGH_LEN: u64 = 1 << 20;
/// Set in a child that is to be the server: the folder with its socket and image.
const SERVER_DIR: &str = "FREESTONE_TEST_PAGE_SERVER";

fn memory() -> GuestMem {
    let ranges = vec![RamRange { start: 0, len: LOW_LEN }, RamRange { start: HIGH, len: HIGH_LEN }];
    GuestMemBuilder::with_ranges(ranges).dirty_log(true).build().unwrap()
}

fn content(mem: &GuestMem) -> Vec<u8> {
    let mut bytes = vec![0; (LOW_LEN + HIGH_LEN) as usize];
    let (low, high) = bytes.split_at_mut(LOW_LEN as usize);
    mem.view().read_slice(low, GuestAddress(0)).unwrap();
    mem.view().read_slice(high, GuestAddress(HIGH)).unwrap();
    bytes
}

fn byte(mem: &GuestMem, gpa: u64) -> u8 {
    mem.view().read_obj(GuestAddress(gpa)).unwrap()
}

/// The page at `offset` begins with its number, from 1 on, except that every fourth is zeros.
fn mark(offset: u64) -> u8 {
    let page = offset >> 12;
    if page % 4 == 3 { 0 } else { (page % 250 + 1) as u8 }
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    fill(&file);
    file
}

fn fill(file: &File) {
    file.set_len(LOW_LEN + HIGH_LEN).unwrap();
    for offset in (0..LOW_LEN + HIGH_LEN).step_by(4096).filter(|offset| mark(*offset) != 0) {
        file.write_all_at(&[mark(offset); 4096], offset).unwrap();
    }
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; (LOW_LEN + HIGH_LEN) as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A guest whose faults are served by a thread until it is dropped.
struct Served {
    mem: GuestMem,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<PageServer>>,
    _uffd: Uffd,
}

impl Served {
    fn new(prepare: impl FnOnce(&mut PageServer)) -> Self {
        let mem = memory();
        let (uffd, ours, theirs) = {
            let uffd = Uffd::new().unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            send_handshake(&ours, &uffd, &uffd.register(&mem).unwrap()).unwrap();
            (uffd, ours, theirs)
        };
        let mut server = PageServer::receive(&theirs, image()).unwrap();
        prepare(&mut server);
        let thread = thread::spawn(move || {
            server.run(theirs.as_fd()).unwrap();
            server
        });
        Self { mem, stop: Some(ours), thread: Some(thread), _uffd: uffd }
    }

    fn stop(&mut self) -> PageServer {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

#[test]
fn memory_is_what_the_image_holds() {
    let mut served = Served::new(|_| {});
    assert_eq!(content(&served.mem), bytes_of(&image()));
    let stats = served.stop().stats();
    let pages = (LOW_LEN + HIGH_LEN) / 4096;
    assert_eq!((stats.faults, stats.copied, stats.zeroed), (pages, pages / 4 * 3, pages / 4));
}

#[test]
fn what_is_written_stays() {
    let served = Served::new(|_| {});
    served.mem.view().write_obj(77u8, GuestAddress(0x5001)).unwrap();
    served.mem.view().write_obj(78u8, GuestAddress(0x7001)).unwrap();
    assert_eq!([0x5000, 0x5001, 0x5002, 0x7000, 0x7001].map(|at| byte(&served.mem, at)), [6, 77, 6, 0, 78]);
}

#[test]
fn the_order_of_first_faults_is_recorded() {
    let mut served = Served::new(|_| {});
    for gpa in [0x9000, HIGH, HIGH + 0x1FFF, 0x2000, 0x9800] {
        byte(&served.mem, gpa);
    }
    let set: Vec<_> = served.stop().working_set().iter().map(|extent| (extent.offset, extent.len)).collect();
    assert_eq!(set, [(0x9000, 0x1000), (LOW_LEN, 0x2000), (0x2000, 0x1000)]);
}

#[test]
fn pages_fetched_in_advance_need_no_fault() {
    let mem = memory();
    let uffd = Uffd::new().unwrap();
    let regions = uffd.register(&mem).unwrap();
    let mut server = PageServer::new(uffd, regions, image()).unwrap();
    // What is not in the image is passed over.
    let wanted =
        [(0x1000, 0x3000), (LOW_LEN - 0x1000, 0x2000), (0x1000, 0x1000), (u64::MAX - 5, 9), (1 << 40, 1)];
    server.prefetch(wanted.map(|(offset, len)| Extent { offset, len }));
    while !server.is_idle() {
        assert!(server.step().unwrap());
    }
    // Nobody serves: this would wait for ever if they were not there.
    let marks = [0x1000, 0x2000, 0x3000, LOW_LEN - 0x1000, HIGH].map(|gpa| byte(&mem, gpa));
    assert_eq!(marks, [2, 3, 0, 0, mark(LOW_LEN)]);
    assert_eq!((server.stats().faults, server.stats().copied, server.stats().zeroed), (0, 3, 2));
}

#[test]
fn everything_fetched_in_advance_is_all_memory() {
    let mem = memory();
    let uffd = Uffd::new().unwrap();
    let regions = uffd.register(&mem).unwrap();
    let mut server = PageServer::new(uffd, regions, image()).unwrap();
    server.prefetch_all();
    while !server.is_idle() {
        assert!(server.step().unwrap());
    }
    assert_eq!(content(&mem), bytes_of(&image()));
}

#[test]
fn pages_that_were_given_back_are_zeros_from_then_on() {
    let mut served = Served::new(|_| {});
    let mem = &served.mem;
    assert_eq!(byte(mem, 0x4000), 5);
    // One that was there, one that was not yet, and a zero.
    assert_eq!(mem.discard(0x4000, 0x3000).unwrap(), 0x3000);
    assert_eq!([0x4000, 0x5000, 0x6000, 0x8000].map(|at| byte(mem, at)), [0, 0, 0, 9]);
    mem.view().write_obj(1u8, GuestAddress(0x5000)).unwrap();
    mem.discard(0x5000, 0x1000).unwrap();
    assert_eq!(byte(mem, 0x5000), 0);
    assert_eq!(served.stop().stats().removed, 4);
}

#[test]
fn pages_that_were_given_back_are_not_fetched_in_advance() {
    let mut served = Served::new(|_| {});
    served.mem.discard(0, LOW_LEN).unwrap();
    let mut server = served.stop();
    server.prefetch_all();
    while !server.is_idle() {
        server.step().unwrap();
    }
    assert!(content(&served.mem).iter().take(LOW_LEN as usize).all(|byte| *byte == 0));
    assert_eq!(byte(&served.mem, HIGH), mark(LOW_LEN));
}

#[test]
fn many_threads_that_touch_and_give_back_see_the_image_or_zeros() {
    let served = Served::new(PageServer::prefetch_all);
    thread::scope(|scope| {
        for seed in 0..4u64 {
            let mem = &served.mem;
            scope.spawn(move || {
                for step in 0..600u64 {
                    let page = (step * 7 + seed * 131) % (LOW_LEN / 4096);
                    if step % 5 == seed {
                        mem.discard(page * 4096, 0x2000).unwrap();
                    } else {
                        let value = byte(mem, page * 4096 + seed);
                        assert!(value == 0 || value == mark(page * 4096), "{page} {value}");
                    }
                }
            });
        }
    });
}

#[test]
fn an_image_of_memory_that_is_still_being_filled_has_all_of_it() {
    let served = Served::new(|_| {});
    served.mem.view().write_obj(99u8, GuestAddress(0x4000)).unwrap();
    served.mem.discard(0x8000, 0x1000).unwrap();
    let layout = ImageLayout::of(&served.mem).unwrap();
    let file = tempfile::tempfile().unwrap();
    write_full(&served.mem, &layout, &file, false, &mut |_, _| {}).unwrap();
    let mut expected = bytes_of(&image());
    expected.get_mut(0x8000..0x9000).unwrap().fill(0);
    *expected.get_mut(0x4000).unwrap() = 99;
    assert_eq!(bytes_of(&file), expected);
}

#[test]
fn only_empty_anonymous_memory_is_served() {
    let uffd = Uffd::new().unwrap();
    let memfd = GuestMemBuilder::new(0x1000).backing(Backing::Memfd).build().unwrap();
    assert!(matches!(uffd.register(&memfd), Err(Error::ImageRefused { .. })));
    let written = memory();
    written.view().write_obj(1u8, GuestAddress(0)).unwrap();
    assert!(matches!(uffd.register(&written), Err(Error::ImageRefused { .. })));
    let read = memory();
    byte(&read, 0);
    assert!(matches!(uffd.register(&read), Err(Error::ImageRefused { .. })));
}

#[test]
fn an_image_that_is_too_short_is_refused() {
    let mem = memory();
    let uffd = Uffd::new().unwrap();
    let regions = uffd.register(&mem).unwrap();
    let short = tempfile::tempfile().unwrap();
    short.set_len(LOW_LEN + HIGH_LEN - 1).unwrap();
    assert!(matches!(PageServer::new(uffd, regions, short), Err(Error::ImageSize { .. })));
}

#[test]
fn the_message_is_that_of_firecracker() {
    let region = UffdRegion::new(0x7000_0000, 0x2000, 0x1000, 4096);
    let json = serde_json::to_value([region]).unwrap();
    let expected = serde_json::json!([{
        "base_host_virt_addr": 0x7000_0000, "size": 0x2000, "offset": 0x1000, "page_size": 4096, "page_size_kib": 4096
    }]);
    assert_eq!(json, expected);
}

/// Sends bytes with a descriptor beside them, in two parts.
fn send_raw(socket: &UnixStream, body: &[u8], split: usize) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let uffd = Uffd::new().unwrap();
    let fds = [uffd.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let (first, rest) = body.split_at(split);
    sendmsg(socket, &[std::io::IoSlice::new(first)], &mut control, SendFlags::empty()).unwrap();
    let mut socket = socket;
    socket.write_all(rest).unwrap();
}

#[test]
fn a_message_of_an_older_monitor_in_pieces_is_understood() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let body =
        br#"[{"base_host_virt_addr": 4096, "size": 8192, "offset": 0, "page_size_kib": 4096, "more": 1}]"#;
    send_raw(&ours, body, 10);
    let (_, regions) = receive_handshake(&theirs).unwrap();
    assert_eq!(
        (regions[0].base_host_virt_addr, regions[0].size, regions[0].page_size_kib),
        (4096, 8192, 4096)
    );
}

#[test]
fn what_is_no_handshake_is_refused() {
    let long = [b"[".as_slice(), &vec![b' '; MAX_HANDSHAKE]].concat();
    for body in [b"{}".as_slice(), b"[1]", b"[{\"size\": -1}]", b"\0\0\0\0", b"]", &long] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_raw(&ours, body, 1);
        let error = receive_handshake(&theirs).unwrap_err();
        assert!(matches!(error, Error::Handshake { .. }), "{error:?}");
    }
    // Without a descriptor.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"[]").unwrap();
    assert!(matches!(receive_handshake(&theirs), Err(Error::Handshake { .. })));
    // Closed too early.
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_raw(&ours, b"[", 1);
    drop(ours);
    assert!(matches!(receive_handshake(&theirs), Err(Error::Uffd { .. })));
}

/// Not a test by itself: the body of the other process.
#[test]
fn page_server_process() {
    let Some(dir) = env::var_os(SERVER_DIR) else { return };
    let dir = Path::new(&dir);
    let listener = UnixListener::bind(dir.join("new")).unwrap();
    std::fs::rename(dir.join("new"), dir.join("socket")).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let mut server = PageServer::receive(&socket, File::open(dir.join("image")).unwrap()).unwrap();
    server.prefetch([Extent { offset: 0x1_0000, len: 0x1000 }]);
    server.run(socket.as_fd()).unwrap();
    let set: Vec<_> = server.working_set().iter().map(|extent| format!("{:#x}", extent.offset)).collect();
    std::fs::write(dir.join("set"), set.join(" ")).unwrap();
}

fn spawn_server(dir: &Path) -> Child {
    fill(&File::create(dir.join("image")).unwrap());
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "page_server_process", "--nocapture"])
        .env(SERVER_DIR, dir)
        .spawn()
        .unwrap()
}

fn connect(dir: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(dir.join("socket")) {
            Ok(socket) => return socket,
            Err(_) => thread::sleep(std::time::Duration::from_millis(5)),
        }
    }
}

#[test]
fn another_process_serves_and_ends_with_the_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn_server(dir.path());
    let socket = connect(dir.path());
    let mem = memory();
    let uffd = Uffd::new().unwrap();
    send_handshake(&socket, &uffd, &uffd.register(&mem).unwrap()).unwrap();
    assert_eq!(
        [byte(&mem, 0x8000), byte(&mem, HIGH + 0x1000), byte(&mem, 0x1_0000)],
        [9, mark(LOW_LEN + 0x1000), 17]
    );
    mem.discard(0x8000, 0x1000).unwrap();
    let mut expected = bytes_of(&image());
    expected.get_mut(0x8000..0x9000).unwrap().fill(0);
    assert_eq!(content(&mem), expected);
    drop(socket);
    assert!(child.wait().unwrap().success());
    let set = std::fs::read_to_string(dir.path().join("set")).unwrap();
    assert!(set.starts_with(&format!("0x8000 {:#x} ", LOW_LEN + 0x1000)), "{set}");
}

#[test]
fn who_waits_for_a_page_gets_on_when_the_service_ends() {
    let mem = memory();
    let uffd = Uffd::new().unwrap();
    uffd.register(&mem).unwrap();
    let (told, waits) = std::sync::mpsc::channel();
    let reader = {
        let mem = mem.clone();
        thread::spawn(move || {
            told.send(()).unwrap();
            (byte(&mem, 0x5000), byte(&mem, HIGH))
        })
    };
    waits.recv().unwrap();
    uffd.unregister(&mem).unwrap();
    assert_eq!(reader.join().unwrap(), (0, 0));
}
