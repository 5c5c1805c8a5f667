//! Images against memory to which anything may have happened.

use proptest::prelude::*;

use super::*;

/// What may happen to memory between two snapshots; pages by their number in the image.
#[derive(Debug, Clone)]
enum Step {
    Write {
        page: u64,
        pages: u64,
        byte: u8,
    },
    Discard {
        page: u64,
        pages: u64,
    },
    /// A difference, brought into the base and laid over the follower.
    Diff,
    /// A full image, from which all goes on.
    Full,
}

fn step() -> impl Strategy<Value = Step> {
    let some = (0..24u64, 1..9u64);
    prop_oneof![
        4 => (some.clone(), 0..3u8).prop_map(|((page, pages), byte)| Step::Write { page, pages, byte }),
        2 => some.prop_map(|(page, pages)| Step::Discard { page, pages }),
        2 => Just(Step::Diff),
        1 => Just(Step::Full),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn images_and_differences_are_the_memory_whatever_happened_to_it(
        steps in prop::collection::vec(step(), 1..24), memfd: bool, checksums: bool,
    ) {
        let ranges = vec![RamRange { start: 0, len: 0x1_0000 }, RamRange { start: HIGH, len: 0x8000 }];
        let layout = ImageLayout::new(&ranges).unwrap();
        let backing = if memfd { Backing::Memfd } else { Backing::Anonymous };
        let start = GuestMemBuilder::with_ranges(ranges.clone()).backing(backing).dirty_log(true);
        let mut mem = start.build().unwrap();
        let all = |mem: &GuestMem| [bytes(mem, 0, 0x1_0000), bytes(mem, HIGH, 0x8000)].concat();
        let map = |file: &File| {
            let file = Arc::new(file.try_clone().unwrap());
            GuestMemBuilder::with_ranges(ranges.clone()).image(file).dirty_log(true).build().unwrap()
        };
        let pieces = |page: u64, pages: u64| layout.pieces(Extent { offset: page << 12, len: pages << 12 });
        let (mut base, stats) = full(&mem, &layout, true);
        let mut sums = stats.checksums.unwrap();
        // The follower begins from a copy, because a mapped file must not change.
        let copy = |file: &File| {
            let copy = tempfile::tempfile().unwrap();
            copy_sparse(file, &copy, &mut |_, _| {}).unwrap();
            copy
        };
        let mut follower = map(&copy(&base));
        for step in steps {
            match step {
                Step::Write { page, pages, byte } => {
                    pieces(page, pages).for_each(|piece| fill(&mem, piece.start, piece.len, byte));
                }
                Step::Discard { page, pages } => {
                    for piece in pieces(page, pages) {
                        prop_assert_eq!(mem.discard(piece.start, piece.len).unwrap(), piece.len);
                    }
                }
                Step::Diff => {
                    let (file, stats, extents) = diff(&mem, &layout, checksums);
                    if let Some(sums) = stats.checksums {
                        verify(&file, &layout, &extents, &sums, &mut |_, _| {}).unwrap();
                    }
                    apply_diff(&base, &file, &layout, &extents, Some(&mut sums), &mut |_, _| {}).unwrap();
                    overlay(&follower, &layout, &file, &extents, &mut |_, _| {}).unwrap();
                    prop_assert_eq!(all(&follower), all(&mem));
                    prop_assert_eq!(read(&base), all(&mem));
                    verify(&base, &layout, &Extents::all(&layout), &sums, &mut |_, _| {}).unwrap();
                }
                Step::Full => {
                    let (file, stats) = full(&mem, &layout, true);
                    prop_assert_eq!(read(&file), all(&mem));
                    (base, sums) = (copy(&file), stats.checksums.unwrap());
                    follower = map(&file);
                    mem = map(&file);
                }
            }
        }
        let (file, _) = to_memfd(&mem, &layout).unwrap();
        prop_assert_eq!(read(&file), all(&mem));
    }
}
