#![expect(clippy::cast_possible_truncation, reason = "lengths in tests are small")]

mod properties;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::layout::RamRange;
use crate::{Backing, FileMapping, GuestMem, GuestMemBuilder, Prefetch, RegionBuilder};

const HIGH: u64 = 1 << 32;
const LOW_LEN: u64 = 3 << 20;
const HIGH_LEN: u64 = 2 << 20;

fn ranges() -> Vec<RamRange> {
    vec![RamRange { start: 0, len: LOW_LEN }, RamRange { start: HIGH, len: HIGH_LEN }]
}

fn memory(backing: Backing) -> GuestMem {
    GuestMemBuilder::with_ranges(ranges()).backing(backing).dirty_log(true).build().unwrap()
}

fn fill(mem: &GuestMem, gpa: u64, len: u64, byte: u8) {
    mem.view().write_slice(&vec![byte; len as usize], GuestAddress(gpa)).unwrap();
}

fn bytes(mem: &GuestMem, gpa: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    mem.view().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

fn byte(mem: &GuestMem, gpa: u64) -> u8 {
    mem.view().read_obj(GuestAddress(gpa)).unwrap()
}

/// All memory, in the order of an image.
fn content(mem: &GuestMem) -> Vec<u8> {
    [bytes(mem, 0, LOW_LEN), bytes(mem, HIGH, HIGH_LEN)].concat()
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
    bytes
}

fn full(mem: &GuestMem, layout: &ImageLayout, checksums: bool) -> (File, ImageStats) {
    let file = tempfile::tempfile().unwrap();
    let stats = write_full(mem, layout, &file, checksums, &mut |_, _| {}).unwrap();
    (file, stats)
}

fn diff(mem: &GuestMem, layout: &ImageLayout, checksums: bool) -> (File, ImageStats, Extents) {
    let file = tempfile::tempfile().unwrap();
    let dirty = mem.take_dirty().unwrap();
    let (stats, extents) = write_diff(mem, layout, &dirty, &file, checksums, &mut |_, _| {}).unwrap();
    (file, stats, extents)
}

fn map(file: &File) -> GuestMem {
    let file = Arc::new(file.try_clone().unwrap());
    GuestMemBuilder::with_ranges(ranges()).image(file).dirty_log(true).build().unwrap()
}

/// Pages of a region that this process has mapped.
fn resident(mem: &GuestMem) -> u64 {
    mem.working_set().unwrap().iter().map(|range| range.len / 4096).sum()
}

#[test]
fn an_image_holds_region_after_region() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mem = memory(backing);
        fill(&mem, 0x1000, 0x2345, 1);
        fill(&mem, LOW_LEN - 0x1000, 0x1000, 2);
        fill(&mem, HIGH, 0x1000, 3);
        let layout = ImageLayout::of(&mem).unwrap();
        let (file, stats) = full(&mem, &layout, false);
        assert_eq!(read(&file), content(&mem), "{backing:?}");
        assert_eq!((stats.written, stats.bytes()), (5, 5 * 4096), "{backing:?}");
        assert_eq!(stats.written + stats.zero + stats.untouched, 5 << 8);
    }
}

#[test]
fn pages_that_nobody_touched_are_neither_read_nor_made_present() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mem = GuestMemBuilder::new(8 << 30).backing(backing).build().unwrap();
        fill(&mem, 0x10_0000, 0x5000, 1);
        fill(&mem, 6 << 30, 0x1000, 2);
        assert_eq!(resident(&mem), 6, "{backing:?}");
        let layout = ImageLayout::of(&mem).unwrap();
        let (file, stats) = full(&mem, &layout, true);
        assert_eq!((stats.written, stats.zero), (6, 0), "{backing:?}");
        assert_eq!(resident(&mem), 6, "{backing:?}");
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
        verify(&file, &layout, &Extents::all(&layout), &stats.checksums.unwrap(), &mut |_, _| {}).unwrap();
    }
}

#[test]
fn pages_that_were_only_read_are_untouched() {
    let mem = memory(Backing::Anonymous);
    content(&mem);
    let (_, stats) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
    assert_eq!((stats.written, stats.zero, stats.untouched), (0, 0, 5 << 8));
}

#[test]
fn pages_of_zeros_are_holes() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, 0x10_0000, 1);
    fill(&mem, 0x4000, 0xF_0000, 0);
    let (file, stats) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
    assert_eq!((stats.written, stats.zero), (16, 240));
    assert_eq!(file.metadata().unwrap().blocks() * 512, 16 * 4096);
    assert_eq!(read(&file), content(&mem));
}

#[test]
fn a_page_that_is_zero_but_for_its_last_byte_is_kept() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0x1FFF, 1, 1);
    for checksums in [false, true] {
        let (file, stats) = full(&mem, &ImageLayout::of(&mem).unwrap(), checksums);
        assert_eq!((stats.written, read(&file)[0x1FFF]), (1, 1));
    }
}

#[test]
fn what_the_file_held_before_is_gone() {
    let mem = memory(Backing::Anonymous);
    let layout = ImageLayout::of(&mem).unwrap();
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; 6 << 20], 0).unwrap();
    write_full(&mem, &layout, &file, false, &mut |_, _| {}).unwrap();
    assert_eq!(read(&file), content(&mem));
}

#[test]
fn progress_rises_to_the_whole() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let mut said = Vec::new();
    let file = tempfile::tempfile().unwrap();
    let layout = ImageLayout::of(&mem).unwrap();
    write_full(&mem, &layout, &file, false, &mut |done, total| said.push((done, total))).unwrap();
    assert!(said.is_sorted() && said.iter().all(|(_, total)| *total == 5 << 20), "{said:?}");
    assert_eq!(said.last(), Some(&(5 << 20, 5 << 20)));
}

#[test]
fn a_layout_that_names_no_memory_is_refused() {
    let mem = memory(Backing::Anonymous);
    let layout = ImageLayout::new(&[RamRange { start: 0, len: LOW_LEN + 0x1000 }]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = write_full(&mem, &layout, &file, false, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::ImageMemory { gpa: LOW_LEN, .. }), "{error:?}");
}

#[test]
fn a_layout_may_be_finer_or_coarser_than_the_regions() {
    let split = vec![RamRange { start: 0, len: 0x2000 }, RamRange { start: 0x2000, len: 0x2000 }];
    let mem = GuestMemBuilder::with_ranges(split).build().unwrap();
    fill(&mem, 0x1000, 0x2000, 1);
    for ranges in [&[(0, 0x4000)][..], &[(0, 0x1000), (0x1000, 0x3000)]] {
        let ranges: Vec<_> = ranges.iter().map(|&(start, len)| RamRange { start, len }).collect();
        let (file, _) = full(&mem, &ImageLayout::new(&ranges).unwrap(), true);
        assert_eq!(read(&file), bytes(&mem, 0, 0x4000));
    }
}

#[test]
fn memory_that_was_inserted_can_be_in_an_image_and_shared_files_are_not() {
    let mem = memory(Backing::Anonymous);
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    let disk = RegionBuilder::new(3 * HIGH, 0x1000).file(Arc::new(file), 0, FileMapping::Shared);
    mem.insert_region(disk.build().unwrap()).unwrap();
    mem.insert_region(RegionBuilder::new(2 * HIGH, 0x2000).backing(Backing::Memfd).build().unwrap()).unwrap();
    fill(&mem, 2 * HIGH + 0x1000, 1, 9);
    let layout = ImageLayout::of_all(&mem).unwrap();
    assert_eq!(layout.size(), LOW_LEN + HIGH_LEN + 0x2000);
    let (file, stats) = full(&mem, &layout, false);
    assert_eq!((stats.written, read(&file)[LOW_LEN as usize + HIGH_LEN as usize + 0x1000]), (1, 9));
}

#[test]
fn a_file_that_takes_no_more_is_an_error() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, 0x4000, 1);
    // As on a full disk, the length is accepted and the bytes are not.
    let layout = ImageLayout::of(&mem).unwrap();
    let file = crate::backing::memory_file(rustix::fs::MemfdFlags::empty(), layout.size()).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let error = write_full(&mem, &layout, &file, false, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::Image { doing: "write", offset: 0, .. }), "{error:?}");
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = write_full(&mem, &layout, &full, false, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::Image { .. }), "{error:?}");
}

#[test]
fn a_difference_has_the_dirty_pages_and_no_others() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    mem.take_dirty();
    fill(&mem, 0x4000, 0x2000, 2);
    fill(&mem, 0x8000, 0x1000, 0);
    fill(&mem, HIGH + 0x1000, 1, 3);
    mem.discard(0xA000, 0x1000).unwrap();
    let (file, stats, extents) = diff(&mem, &layout, false);
    let list: Vec<_> = extents.as_slice().iter().map(|extent| (extent.offset, extent.len)).collect();
    assert_eq!(list, [(0x4000, 0x2000), (0x8000, 0x1000), (0xA000, 0x1000), (LOW_LEN + 0x1000, 0x1000)]);
    assert_eq!((stats.written, stats.zero, stats.untouched), (3, 1, 1));
    let content = read(&file);
    assert_eq!(
        [0x3000, 0x4000, 0x5FFF, 0x6000, LOW_LEN + 0x1000].map(|at| content[at as usize]),
        [0, 2, 2, 0, 3]
    );
}

#[test]
fn a_difference_brought_into_its_base_is_the_later_image() {
    let mem = memory(Backing::Memfd);
    fill(&mem, 0, LOW_LEN, 1);
    fill(&mem, HIGH + 0x10_0000, 0x1000, 1);
    mem.take_dirty();
    let layout = ImageLayout::of(&mem).unwrap();
    let (base, stats) = full(&mem, &layout, true);
    let mut sums = stats.checksums.unwrap();
    for round in 2..6u8 {
        fill(&mem, u64::from(round) << 18, 0x1_1000, round);
        fill(&mem, u64::from(round) << 14, 0x3000, 0);
        mem.discard(0x20_0000 + (u64::from(round) << 12), 0x1000).unwrap();
        let (file, _, extents) = diff(&mem, &layout, false);
        apply_diff(&base, &file, &layout, &extents, Some(&mut sums), &mut |_, _| {}).unwrap();
        assert_eq!(read(&base), content(&mem), "{round}");
        verify(&base, &layout, &Extents::all(&layout), &sums, &mut |_, _| {}).unwrap();
    }
    assert_eq!(full(&mem, &layout, true).1.checksums.unwrap(), sums);
}

#[test]
fn zeros_in_a_difference_are_holes_in_the_base() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let (base, _) = full(&mem, &layout, false);
    mem.take_dirty();
    fill(&mem, 0, LOW_LEN, 0);
    let (file, _, extents) = diff(&mem, &layout, false);
    apply_diff(&base, &file, &layout, &extents, None, &mut |_, _| {}).unwrap();
    assert_eq!((read(&base), base.metadata().unwrap().blocks()), (content(&mem), 0));
}

#[test]
fn damage_is_found_in_full_images_and_differences() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0x4000, 0x2000, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let (full, full_stats) = full(&mem, &layout, true);
    let (diff, diff_stats, extents) = diff(&mem, &layout, true);
    let all = Extents::all(&layout);
    for (file, extents, stats) in [(full, all, full_stats), (diff, extents, diff_stats)] {
        let sums = stats.checksums.unwrap();
        verify(&file, &layout, &extents, &sums, &mut |_, _| {}).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[9], 0x5000).unwrap();
        let error = verify(&file, &layout, &extents, &sums, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Damaged { offset: 0, len: CHUNK }), "{error:?}");
    }
}

#[test]
fn a_byte_in_a_hole_is_damage_of_a_full_image() {
    let mem = memory(Backing::Anonymous);
    let layout = ImageLayout::of(&mem).unwrap();
    let (file, stats) = full(&mem, &layout, true);
    std::os::unix::fs::FileExt::write_all_at(&file, &[9], 4 * CHUNK + 7).unwrap();
    let sums = stats.checksums.unwrap();
    let error = verify(&file, &layout, &Extents::all(&layout), &sums, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::Damaged { offset, .. } if offset == 4 * CHUNK), "{error:?}");
}

#[test]
fn a_short_file_or_list_of_checksums_is_refused() {
    let mem = memory(Backing::Anonymous);
    let layout = ImageLayout::of(&mem).unwrap();
    let (file, stats) = full(&mem, &layout, true);
    let (all, mut sums) = (Extents::all(&layout), stats.checksums.unwrap());
    let good = full(&mem, &layout, false).0;
    sums.push(0);
    let error = verify(&file, &layout, &all, &sums, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::ImageRefused { .. }), "{error:?}");
    sums.pop();
    file.set_len(layout.size() - 1).unwrap();
    for error in [
        verify(&file, &layout, &all, &sums, &mut |_, _| {}).unwrap_err(),
        apply_diff(&file, &good, &layout, &all, None, &mut |_, _| {}).unwrap_err(),
        apply_diff(&good, &file, &layout, &all, None, &mut |_, _| {}).unwrap_err(),
        overlay(&mem, &layout, &file, &all, &mut |_, _| {}).unwrap_err(),
        GuestMemBuilder::with_ranges(ranges()).image(Arc::new(file)).build().unwrap_err(),
    ] {
        assert!(matches!(error, Error::ImageSize { .. }), "{error:?}");
    }
}

#[test]
fn a_copy_has_the_same_bytes_and_the_same_holes() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0x10_0000, 0x3000, 1);
    fill(&mem, HIGH + HIGH_LEN - 0x1000, 0x1000, 2);
    let layout = ImageLayout::of(&mem).unwrap();
    let (file, _) = full(&mem, &layout, false);
    let copy = tempfile::tempfile().unwrap();
    copy.set_len(9 << 20).unwrap();
    copy_sparse(&file, &copy, &mut |_, _| {}).unwrap();
    assert_eq!(read(&copy), read(&file));
    assert_eq!(copy.metadata().unwrap().blocks(), file.metadata().unwrap().blocks());
    // Between file systems too.
    let (memfd, _) = to_memfd(&mem, &layout).unwrap();
    copy_sparse(&memfd, &copy, &mut |_, _| {}).unwrap();
    assert_eq!(read(&copy), read(&file));
}

#[test]
fn a_mapped_image_is_the_memory_that_was_saved_and_the_file_never_changes() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0x1000, 0x2345, 1);
    fill(&mem, HIGH + 0x4000, 0x1000, 3);
    let (file, _) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
    let (first, second) = (map(&file), map(&file));
    assert_eq!(first.backing(), Backing::Image);
    assert_eq!(content(&first), content(&mem));
    fill(&first, 0x1000, 0x1000, 7);
    fill(&first, 0x9000, 0x1000, 8);
    assert_eq!((byte(&first, 0x1000), byte(&first, 0x9000)), (7, 8));
    assert_eq!(content(&second), content(&mem));
    assert_eq!(read(&file), content(&mem));
}

#[test]
fn an_image_can_be_made_of_memory_that_is_an_image() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, 0x8000, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let (file, _) = full(&mem, &layout, false);
    let mapped = map(&file);
    fill(&mapped, 0x2000, 0x1000, 2);
    fill(&mapped, HIGH, 0x1000, 3);
    mapped.discard(0x4000, 0x2000).unwrap();
    fill(&mapped, 0x5000, 0x1000, 4);
    let (again, stats) = full(&mapped, &layout, true);
    assert_eq!(read(&again), content(&mapped));
    assert_eq!((stats.written, byte(&mapped, 0x4000)), (8, 0));
}

#[test]
fn what_is_given_back_of_an_image_reads_as_zeros() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let (file, _) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
    let mapped = map(&file);
    fill(&mapped, 0x4000, 0x1000, 2);
    mapped.take_dirty();
    assert!(mapped.can_discard(0x4000));
    assert_eq!(mapped.discard(0x3000, 0x3000).unwrap(), 0x3000);
    assert_eq!([0x2000, 0x3000, 0x4000, 0x5000, 0x6000].map(|at| byte(&mapped, at)), [1, 0, 0, 0, 1]);
    assert_eq!(mapped.take_dirty().unwrap()[0].count(), 3);
    fill(&mapped, 0x4000, 0x1000, 3);
    assert_eq!(mapped.discard(0x4000, 0x1000).unwrap(), 0x1000);
    assert_eq!(byte(&mapped, 0x4000), 0);
    assert_eq!(read(&file)[0x4000], 1);
}

#[test]
fn boot_memory_and_what_was_inserted_are_mapped_from_one_image() {
    let mem = memory(Backing::Anonymous);
    // Between the two ranges of boot memory.
    mem.insert_region(RegionBuilder::new(HIGH / 2, 0x2000).build().unwrap()).unwrap();
    fill(&mem, 0x1000, 0x1000, 1);
    fill(&mem, HIGH / 2 + 0x1000, 0x1000, 2);
    fill(&mem, HIGH, 0x1000, 3);
    let layout = ImageLayout::of_all(&mem).unwrap();
    let file = Arc::new(full(&mem, &layout, false).0);
    let builder = GuestMemBuilder::with_ranges(ranges()).image(Arc::clone(&file));
    let mapped = builder.image_layout(layout.clone()).build().unwrap();
    let offset = layout.offset_of(HIGH / 2).unwrap();
    let inserted = RegionBuilder::new(HIGH / 2, 0x2000).file(file, offset, FileMapping::Private);
    mapped.insert_region(inserted.build().unwrap()).unwrap();
    assert_eq!(content(&mapped), content(&mem));
    assert_eq!(byte(&mapped, HIGH / 2 + 0x1000), 2);
}

#[test]
fn memory_that_an_image_does_not_have_is_not_mapped_from_it() {
    let mem = memory(Backing::Anonymous);
    let layout = ImageLayout::of(&mem).unwrap();
    let file = Arc::new(full(&mem, &layout, false).0);
    for (start, len) in
        [(0, LOW_LEN + 0x1000), (LOW_LEN, 0x1000), (0, HIGH + 0x1000), (HIGH + HIGH_LEN, 0x1000)]
    {
        let builder = GuestMemBuilder::with_ranges(vec![RamRange { start, len }]).image(file.clone());
        let error = builder.image_layout(layout.clone()).build().unwrap_err();
        assert!(matches!(error, Error::ImageMemory { gpa, .. } if gpa == start), "{error:?}");
    }
}

#[test]
fn an_image_backing_without_an_image_is_refused() {
    GuestMemBuilder::new(0x1000).backing(Backing::Image).build().unwrap_err();
    RegionBuilder::new(0, 0x1000).backing(Backing::Image).build().unwrap_err();
}

#[test]
fn a_chain_of_differences_over_their_base_is_the_latest_memory() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let (base, _) = full(&mem, &layout, false);
    mem.take_dirty();
    let chain: Vec<_> = (2..5u8)
        .map(|round| {
            fill(&mem, u64::from(round) << 16, 0x3_0000, round);
            fill(&mem, u64::from(round) << 13, 0x1000, 0);
            mem.discard(0x10_0000 * u64::from(round - 2), 0x8_0000).unwrap();
            diff(&mem, &layout, false)
        })
        .collect();
    let mapped = map(&base);
    for (file, _, extents) in &chain {
        overlay(&mapped, &layout, file, extents, &mut |_, _| {}).unwrap();
    }
    assert_eq!(content(&mapped), content(&mem));
    // Only what the differences have costs memory of its own.
    let dirty: u64 = mapped.take_dirty().unwrap().iter().map(|pages| pages.count()).sum();
    let most: u64 = chain.iter().map(|(_, _, extents)| extents.bytes() / 4096).sum();
    assert!(dirty <= most, "{dirty} {most}");
}

#[test]
fn forks_of_a_memory_file_are_apart() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mem = memory(backing);
        fill(&mem, 0x1000, 0x4000, 1);
        let (file, stats) = to_memfd(&mem, &ImageLayout::of(&mem).unwrap()).unwrap();
        assert_eq!((stats.written, file.metadata().unwrap().blocks() * 512), (4, 4 * 4096));
        let saved = content(&mem);
        // The template may go on.
        fill(&mem, 0x1000, 0x1000, 9);
        let forks: Vec<_> = (0..10).map(|_| map(&file)).collect();
        for (fork, mark) in forks.iter().zip(10u8..) {
            fill(fork, 0x2000, 1, mark);
        }
        for (fork, mark) in forks.iter().zip(10u8..) {
            assert_eq!((byte(fork, 0x1000), byte(fork, 0x2000), byte(fork, 0x2001)), (1, mark, 1));
        }
        assert_eq!(read(&file), saved);
    }
}

#[test]
fn a_memory_file_of_forks_can_be_neither_changed_nor_shrunk() {
    let mem = memory(Backing::Anonymous);
    let (file, _) = to_memfd(&mem, &ImageLayout::of(&mem).unwrap()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 0).unwrap_err();
    file.set_len(0).unwrap_err();
    file.set_len(8 << 20).unwrap_err();
}

#[test]
fn frozen_memory_that_is_a_memory_file_is_not_copied() {
    let mem = memory(Backing::Memfd);
    fill(&mem, HIGH, 0x1000, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let file = frozen_memfd(&mem, &layout).unwrap().unwrap();
    let own = mem.regions()[0].file_offset().unwrap().file().metadata().unwrap().ino();
    assert_eq!(file.metadata().unwrap().ino(), own);
    let fork = map(&file);
    fill(&fork, HIGH, 0x1000, 2);
    assert_eq!((byte(&fork, HIGH), byte(&mem, HIGH)), (2, 1));
}

#[test]
fn memory_that_is_no_file_or_lies_otherwise_in_it_must_be_copied() {
    let anonymous = memory(Backing::Anonymous);
    let layout = ImageLayout::of(&anonymous).unwrap();
    assert!(frozen_memfd(&anonymous, &layout).unwrap().is_none());
    let part = ImageLayout::new(&[RamRange { start: HIGH, len: HIGH_LEN }]).unwrap();
    assert!(frozen_memfd(&memory(Backing::Memfd), &part).unwrap().is_none());
    let mem = memory(Backing::Memfd);
    mem.insert_region(RegionBuilder::new(2 * HIGH, 0x1000).backing(Backing::Memfd).build().unwrap()).unwrap();
    assert!(frozen_memfd(&mem, &ImageLayout::of_all(&mem).unwrap()).unwrap().is_none());
}

#[test]
fn the_working_set_is_what_was_touched() {
    let mem = memory(Backing::Anonymous);
    assert!(mem.working_set().unwrap().is_empty());
    fill(&mem, 0x3000, 0x2000, 1);
    fill(&mem, HIGH + 0x1000, 1, 1);
    let expected = [RamRange { start: 0x3000, len: 0x2000 }, RamRange { start: HIGH + 0x1000, len: 0x1000 }];
    assert_eq!(mem.working_set().unwrap(), expected);
}

#[test]
fn a_working_set_fetched_in_advance_is_there_and_changes_nothing() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, LOW_LEN, 1);
    let (file, _) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
    for how in [Prefetch::Read, Prefetch::Write] {
        let mapped = map(&file);
        let ranges =
            [RamRange { start: 0x3800, len: 0x1000 }, RamRange { start: LOW_LEN - 0x1000, len: 0x10_0000 }];
        assert_eq!(mapped.prefetch(&ranges, how).unwrap(), 0x3000);
        let set = mapped.working_set().unwrap();
        for gpa in [0x3000, 0x4000, LOW_LEN - 0x1000] {
            let there = |range: &RamRange| (range.start..range.end().unwrap()).contains(&gpa);
            assert!(set.iter().any(there), "{gpa:#x} {set:x?}");
        }
        assert!(mapped.take_dirty().unwrap().iter().all(|pages| pages.count() == 0));
        assert_eq!(content(&mapped), content(&mem));
    }
}

#[test]
fn ranges_that_are_no_memory_are_passed_over_when_fetched() {
    let mem = memory(Backing::Anonymous);
    let ranges = [(LOW_LEN, 0x1000), (u64::MAX, u64::MAX), (0, 0), (!0xFFF, 0x2000)];
    let ranges = ranges.map(|(start, len)| RamRange { start, len });
    assert_eq!(mem.prefetch(&ranges, Prefetch::Write).unwrap(), 0);
    assert!(mem.working_set().unwrap().is_empty());
}

#[test]
fn an_image_that_is_open_is_not_changed_and_one_that_is_changed_is_not_opened() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let reader = open(named.path()).unwrap();
    let other = open(named.path()).unwrap();
    let writer = File::options().read(true).write(true).open(named.path()).unwrap();
    assert!(matches!(lock_exclusive(&writer), Err(Error::ImageRefused { .. })));
    drop((reader, other));
    lock_exclusive(&writer).unwrap();
    assert!(matches!(open(named.path()), Err(Error::ImageRefused { .. })));
}

#[test]
fn only_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(open(dir.path()), Err(Error::ImageRefused { .. })));
    assert!(matches!(open(&dir.path().join("none")), Err(Error::Image { doing: "open", .. })));
    assert!(matches!(open(Path::new("/dev/zero")), Err(Error::ImageRefused { .. })));
}

#[test]
fn a_file_is_never_written_under_its_own_mapping_or_over_itself() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, 0x1000, 1);
    let layout = ImageLayout::of(&mem).unwrap();
    let (file, _) = full(&mem, &layout, false);
    let mapped = map(&file);
    for error in [
        write_full(&mapped, &layout, &file, false, &mut |_, _| {}).unwrap_err(),
        write_diff(&mapped, &layout, &[], &file, false, &mut |_, _| {}).unwrap_err(),
        copy_sparse(&file, &file.try_clone().unwrap(), &mut |_, _| {}).unwrap_err(),
        apply_diff(&file, &file, &layout, &Extents::all(&layout), None, &mut |_, _| {}).unwrap_err(),
    ] {
        assert!(matches!(error, Error::ImageRefused { .. }), "{error:?}");
    }
    assert_eq!(read(&file), content(&mem));
}

#[test]
fn touched_memory_is_what_may_hold_something() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0x3000, 0x2000, 1);
    byte(&mem, 0x9000);
    let expected = vec![RamRange { start: 0x3000, len: 0x2000 }];
    assert_eq!(mem.touched(), expected);
    let (file, _) = to_memfd(&mem, &ImageLayout::of(&mem).unwrap()).unwrap();
    let mapped = map(&file);
    assert_eq!(mapped.touched(), expected);
    fill(&mapped, HIGH, 0x1000, 0);
    assert_eq!(mapped.touched().last(), Some(&RamRange { start: HIGH, len: 0x1000 }));
}

#[test]
fn a_view_of_an_image_outlives_its_file_handle() {
    let mem = memory(Backing::Anonymous);
    fill(&mem, 0, 0x1000, 5);
    let mapped = {
        let (file, _) = full(&mem, &ImageLayout::of(&mem).unwrap(), false);
        map(&file)
    };
    assert!(mapped.view().address_in_range(GuestAddress(0)));
    assert_eq!(byte(&mapped, 0), 5);
}
