//! Queues of every engine: the same results, none lost, and nothing touched after the end.

mod queues;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use freestone_block::{Engine, Image, Op, RawImage, RawOptions, Submitted};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder, GuestMemoryBackend};
use queues::{bytes, disk, folder, queue, ready, run, uring_or_skip, wait_for_all};

const ENGINES: [Engine; 3] = [Engine::Sync, Engine::Uring, Engine::Auto];

#[test]
fn what_is_written_is_read_back_by_every_engine() {
    for engine in ENGINES {
        let dir = folder();
        let image = disk(&dir, 1 << 20);
        let Some(mut queue) = queue(&image, engine, 8) else { continue };
        let mem = GuestMem::anonymous(0x1_0000).unwrap();
        let view = mem.view();
        view.write_slice(&[7; 0x1000], GuestAddress(0x1000)).unwrap();
        let from = [(0x1000, 0x200), (0x1800, 0x600)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        run(&mut *queue, &view, Op::Write { bufs: &from, offset: 0x2000 }).unwrap();
        run(&mut *queue, &view, Op::Flush).unwrap();
        let to = [view.get_slice(GuestAddress(0x4000), 0x800).unwrap()];
        run(&mut *queue, &view, Op::Read { bufs: &to, offset: 0x2000 }).unwrap();
        assert_eq!(bytes(&view, 0x4000, 0x800), [7; 0x800], "{engine:?}");
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn what_was_not_committed_has_not_begun() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 4) else { return };
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let view = mem.view();
    view.write_slice(&[1; 512], GuestAddress(0)).unwrap();
    let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
    assert!(matches!(queue.submit(1, &view, Op::Write { bufs: &bufs, offset: 0 }), Submitted::Pending));
    assert_eq!(queue.in_flight(), 1);
    queue.reap(&mut |_, _| unreachable!());
    drop(queue);
    assert_eq!(std::fs::read(image.path()).unwrap()[0], 0);
}

#[test]
fn more_requests_than_the_depth_would_block() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 3) else { return };
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let view = mem.view();
    let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
    let read = Op::Read { bufs: &bufs, offset: 0 };
    for tag in 0..3 {
        assert!(matches!(queue.submit(tag, &view, read), Submitted::Pending));
    }
    for op in [read, Op::Flush] {
        let Submitted::Done(Err(error)) = queue.submit(3, &view, op) else { panic!("{op:?}") };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
    assert_eq!(wait_for_all(&mut *queue).len(), 3);
    assert!(matches!(queue.submit(3, &view, read), Submitted::Pending));
}

#[test]
fn room_is_there_again_only_when_the_outcome_was_taken() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 1) else { return };
    let view = GuestMem::anonymous(0x1000).unwrap().view();
    assert!(matches!(queue.submit(1, &view, Op::Flush), Submitted::Pending));
    queue.wait().unwrap();
    assert_eq!(queue.in_flight(), 1);
    assert!(matches!(queue.submit(2, &view, Op::Flush), Submitted::Done(Err(_))));
    queue.reap(&mut |tag, result| assert_eq!((tag, result.is_ok()), (1, true)));
    assert_eq!(queue.in_flight(), 0);
    assert!(matches!(queue.submit(2, &view, Op::Flush), Submitted::Pending));
}

#[test]
fn of_a_thousand_requests_in_flight_none_is_lost_or_mixed_up() {
    const COUNT: u16 = 1000;
    let dir = folder();
    let image = disk(&dir, u64::from(COUNT) * 4096);
    let file = File::options().write(true).open(image.path()).unwrap();
    for n in 0..COUNT {
        file.write_all_at(&n.to_le_bytes().repeat(2048), u64::from(n) * 4096).unwrap();
    }
    // Half of it has to come from the disk, so that requests overtake each other.
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, std::num::NonZero::new(2_000_000), rustix::fs::Advice::DontNeed).unwrap();
    for engine in [Engine::Uring, Engine::Auto] {
        let Some(mut queue) = queue(&image, engine, COUNT) else { continue };
        let mem = GuestMem::anonymous(u64::from(COUNT) * 4096).unwrap();
        let view = mem.view();
        let mut seen = vec![0; usize::from(COUNT)];
        for n in 0..COUNT {
            let n = u64::from(n) * 7 % u64::from(COUNT);
            let bufs = [view.get_slice(GuestAddress(n * 4096), 4096).unwrap()];
            match queue.submit(n, &view, Op::Read { bufs: &bufs, offset: n * 4096 }) {
                Submitted::Pending => {}
                Submitted::Done(result) => {
                    result.unwrap();
                    seen[usize::try_from(n).unwrap()] += 1;
                }
            }
        }
        for (tag, result) in wait_for_all(&mut *queue) {
            result.unwrap();
            seen[usize::try_from(tag).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| *count == 1), "{engine:?}");
        for n in 0..COUNT {
            assert_eq!(bytes(&view, u64::from(n) * 4096, 4096), n.to_le_bytes().repeat(2048));
        }
    }
}

#[test]
fn completions_make_the_source_readable_and_nothing_else_does() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 4) else { return };
    let source = queue.completion_source().unwrap();
    assert!(!ready(&*source));
    let view = GuestMem::anonymous(0x1000).unwrap().view();
    assert!(matches!(queue.submit(1, &view, Op::Flush), Submitted::Pending));
    assert!(!ready(&*source));
    queue.commit().unwrap();
    queue.wait().unwrap();
    assert!(ready(&*source));
}

#[test]
fn synchronous_queue_has_nothing_to_wait_for() {
    let dir = folder();
    let mut queue = queue(&disk(&dir, 1 << 20), Engine::Sync, 4).unwrap();
    assert!(queue.completion_source().is_none());
    queue.wait().unwrap();
}

#[test]
fn waiting_with_nothing_in_flight_returns() {
    let dir = folder();
    let Some(mut queue) = uring_or_skip(&disk(&dir, 1 << 20), 4) else { return };
    queue.wait().unwrap();
    queue.commit().unwrap();
}

#[test]
fn request_with_more_buffers_than_the_kernel_takes_at_once_is_carried_out_whole() {
    const PIECES: u64 = 3000;
    let dir = folder();
    let image = disk(&dir, PIECES * 512);
    let content: Vec<u8> = (0..PIECES * 512).map(|i| u8::try_from(i / 512 % 251).unwrap()).collect();
    std::fs::write(image.path(), &content).unwrap();
    let Some(mut queue) = uring_or_skip(&image, 4) else { return };
    let mem = GuestMem::anonymous(8 << 20).unwrap();
    let view = mem.view();
    let bufs: Vec<_> = (0..PIECES).map(|n| view.get_slice(GuestAddress(n * 1024), 512).unwrap()).collect();
    run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
    for n in 0..PIECES {
        let expected = u8::try_from(n % 251).unwrap();
        assert_eq!(bytes(&view, n * 1024, 512), [expected; 512]);
    }
    view.write_slice(&[9; 512], GuestAddress(2999 * 1024)).unwrap();
    run(&mut *queue, &view, Op::Write { bufs: &bufs, offset: 0 }).unwrap();
    let written = std::fs::read(image.path()).unwrap();
    assert_eq!(written[..2999 * 512], content[..2999 * 512]);
    assert_eq!(written[2999 * 512..], [9; 512]);
}

#[test]
fn empty_buffers_are_passed_over() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 4) else { return };
    let view = GuestMem::anonymous(0x1000).unwrap().view();
    let empty = view.get_slice(GuestAddress(0), 0).unwrap();
    let bufs = [empty, view.get_slice(GuestAddress(0), 512).unwrap(), empty];
    run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
    for op in [Op::Read { bufs: &[empty], offset: 0 }, Op::Write { bufs: &[], offset: 1 << 20 }] {
        assert!(matches!(queue.submit(1, &view, op), Submitted::Done(Ok(()))), "{op:?}");
    }
}

#[test]
fn reads_mark_the_pages_that_they_fill_and_writes_mark_none() {
    for engine in ENGINES {
        let dir = folder();
        let Some(mut queue) = queue(&disk(&dir, 1 << 20), engine, 4) else { continue };
        let mem = GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap();
        let view = mem.view();
        let bufs = [(0x3000, 0x1000), (0x8200, 0x200)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        run(&mut *queue, &view, Op::Write { bufs: &bufs, offset: 0 }).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 0, "{engine:?}");
        run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].pages().collect::<Vec<_>>(), [0x3000, 0x8000], "{engine:?}");
    }
}

#[test]
fn buffers_of_other_memory_are_refused() {
    let dir = folder();
    let Some(mut queue) = uring_or_skip(&disk(&dir, 1 << 20), 4) else { return };
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let view = mem.view();
    let other = GuestMem::anonymous(0x1_0000).unwrap();
    let other = other.view();
    let good = view.get_slice(GuestAddress(0), 512).unwrap();
    let foreign = other.get_slice(GuestAddress(0), 512).unwrap();
    for bufs in [vec![foreign], vec![good, foreign]] {
        for op in [Op::Read { bufs: &bufs, offset: 0 }, Op::Write { bufs: &bufs, offset: 0 }] {
            let Submitted::Done(Err(error)) = queue.submit(1, &view, op) else { panic!("{op:?}") };
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
    assert_eq!(queue.in_flight(), 0);
    run(&mut *queue, &view, Op::Read { bufs: &[good], offset: 0 }).unwrap();
}

#[test]
fn memory_stays_mapped_until_the_request_is_over() {
    let dir = folder();
    let Some(mut queue) = uring_or_skip(&disk(&dir, 64 << 20), 64) else { return };
    let mem = GuestMem::anonymous(64 << 20).unwrap();
    let region = Arc::downgrade(&mem.regions()[0]);
    {
        let view = mem.view();
        for n in 0..64 {
            let bufs = [view.get_slice(GuestAddress(n << 20), 1 << 20).unwrap()];
            let read = Op::Read { bufs: &bufs, offset: n << 20 };
            assert!(matches!(queue.submit(n, &view, read), Submitted::Pending));
        }
    }
    drop(mem);
    queue.commit().unwrap();
    assert!(region.upgrade().is_some());
    assert!(wait_for_all(&mut *queue).into_iter().all(|(_, result)| result.is_ok()));
    assert!(region.upgrade().is_none());
}

#[test]
fn dropping_a_queue_leaves_memory_alone_and_the_image_unlocked() {
    // Around the page cache, so that requests are really under way for a while.
    let dir = folder();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![0xAA; 32 << 20]).unwrap();
    for round in 0..8u64 {
        let options = RawOptions::new().direct(true);
        let Ok(image) = options.open(&path) else {
            println!("SKIP: no direct I/O on this file system");
            return;
        };
        let Some(mut queue) = uring_or_skip(&Arc::new(image), 128) else { return };
        let mem = GuestMemBuilder::new(32 << 20).dirty_log(true).build().unwrap();
        let view = mem.view();
        for n in 0..128u64 {
            let at = n * (256 << 10);
            let bufs = [view.get_slice(GuestAddress(at), 256 << 10).unwrap()];
            assert!(matches!(
                queue.submit(n, &view, Op::Read { bufs: &bufs, offset: at }),
                Submitted::Pending
            ));
            if n % 16 == round {
                queue.commit().unwrap();
            }
        }
        drop(queue);
        // What the kernel wrote is marked; after this nothing changes any more.
        let dirty: Vec<u64> = mem.take_dirty().unwrap()[0].pages().collect();
        let changed = |page: u64| view.read_obj::<u8>(GuestAddress(page * 4096)).unwrap() != 0;
        assert!(
            (0..8192).filter(|page| changed(*page)).all(|page| dirty.binary_search(&(page * 4096)).is_ok())
        );
        for page in 0..8192u64 {
            view.write_slice(&[1; 4096], GuestAddress(page * 4096)).unwrap();
        }
        std::thread::yield_now();
        assert!((0..8192u64).all(|page| bytes(&view, page * 4096, 4096) == [1; 4096]));
        // The next round locks the same file.
    }
}

#[test]
fn queue_works_on_after_the_thread_that_committed_has_ended() {
    let dir = folder();
    let image = disk(&dir, 16 << 20);
    let Some(mut queue) = uring_or_skip(&image, 64) else { return };
    let mem = GuestMem::anonymous(16 << 20).unwrap();
    let view = mem.view();
    let mut queue = std::thread::spawn(move || {
        for n in 0..64u64 {
            let bufs = [view.get_slice(GuestAddress(n << 18), 1 << 18).unwrap()];
            assert!(matches!(
                queue.submit(n, &view, Op::Write { bufs: &bufs, offset: n << 18 }),
                Submitted::Pending
            ));
        }
        queue.commit().unwrap();
        queue
    })
    .join()
    .unwrap();
    let outcomes = wait_for_all(&mut *queue);
    assert_eq!(outcomes.len(), 64);
    for (tag, result) in outcomes {
        result.unwrap_or_else(|error| panic!("{tag}: {error}"));
    }
}

#[test]
fn requests_beyond_the_end_are_refused() {
    for engine in ENGINES {
        let dir = folder();
        let Some(mut queue) = queue(&disk(&dir, 4096), engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
        for offset in [4096, 3585, u64::MAX, u64::MAX - 511, 1 << 63] {
            for op in [
                Op::Read { bufs: &bufs, offset },
                Op::Write { bufs: &bufs, offset },
                Op::Discard { offset, len: 512 },
                Op::WriteZeroes { offset, len: 512, unmap: true },
                Op::WriteZeroes { offset: 0, len: offset.max(4097), unmap: false },
            ] {
                let error = run(&mut *queue, &view, op).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{engine:?} {op:?}");
            }
        }
    }
}

#[test]
fn read_only_image_refuses_every_change_and_flushes() {
    for engine in ENGINES {
        let dir = folder();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [1; 4096]).unwrap();
        let image = Arc::new(RawOptions::new().read_only(true).open(&path).unwrap());
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
        for op in [
            Op::Write { bufs: &bufs, offset: 0 },
            Op::Discard { offset: 0, len: 512 },
            Op::WriteZeroes { offset: 0, len: 512, unmap: false },
        ] {
            let error = run(&mut *queue, &view, op).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{engine:?} {op:?}");
        }
        run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
        run(&mut *queue, &view, Op::Flush).unwrap();
    }
}

#[test]
fn queue_for_no_requests_is_refused() {
    let dir = folder();
    let image = disk(&dir, 4096);
    if uring_or_skip(&image, 1).is_some() {
        let error = Arc::clone(&image).open_queue(Engine::Uring, 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn without_io_uring_the_automatic_engine_is_synchronous() {
    // More than any ring takes: io_uring is refused, which is as good as absent.
    let dir = folder();
    let image = disk(&dir, 4096);
    assert!(Arc::clone(&image).open_queue(Engine::Uring, u16::MAX).is_err());
    let mut queue = Arc::clone(&image).open_queue(Engine::Auto, u16::MAX).unwrap();
    assert!(queue.completion_source().is_none());
    let view = GuestMem::anonymous(0x1000).unwrap().view();
    let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
    run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
}

#[test]
fn file_in_memory_needs_no_queue_in_the_kernel() {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(fd.as_fd(), 4096).unwrap();
    let image = Arc::new(RawImage::from_file(File::from(fd), "memory", RawOptions::new()).unwrap());
    assert!(image.open_queue(Engine::Auto, 4).unwrap().completion_source().is_none());
}

#[test]
fn many_queues_of_one_image_work_at_once() -> io::Result<()> {
    let dir = folder();
    let image = disk(&dir, 4 << 20);
    if uring_or_skip(&image, 1).is_none() {
        return Ok(());
    }
    let threads = (0..4u64).map(|n| {
        let image = Arc::clone(&image);
        std::thread::spawn(move || {
            let mut queue = image.open_queue(Engine::Uring, 16).unwrap();
            let mem = GuestMem::anonymous(1 << 20).unwrap();
            let view = mem.view();
            view.write_slice(&vec![u8::try_from(n + 1).unwrap(); 1 << 20], GuestAddress(0)).unwrap();
            for at in (0..1 << 20).step_by(1 << 16) {
                let bufs = [view.get_slice(GuestAddress(at), 1 << 16).unwrap()];
                let op = Op::Write { bufs: &bufs, offset: (n << 20) + at };
                assert!(matches!(queue.submit(at, &view, op), Submitted::Pending));
            }
            assert!(wait_for_all(&mut *queue).into_iter().all(|(_, result)| result.is_ok()));
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().unwrap();
    }
    let content = std::fs::read(image.path())?;
    assert!(content.chunks(1 << 20).zip(1u8..).all(|(chunk, n)| chunk.iter().all(|byte| *byte == n)));
    Ok(())
}

#[test]
fn another_event_tells_of_completions_when_it_is_asked_to() {
    let dir = folder();
    let image = disk(&dir, 1 << 20);
    let Some(mut queue) = uring_or_skip(&image, 4) else { return };
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    queue.notify_by(event.as_fd()).unwrap();
    let mut value = [0; 8];
    let _ = rustix::io::read(&event, &mut value);
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let view = mem.view();
    let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
    assert!(matches!(queue.submit(1, &view, Op::Read { bufs: &bufs, offset: 0 }), Submitted::Pending));
    queue.commit().unwrap();
    queue.wait().unwrap();
    assert_eq!(wait_for_all(&mut *queue).len(), 1);
    assert_eq!(rustix::io::read(&event, &mut value).unwrap(), 8);
}
