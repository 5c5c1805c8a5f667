//! Saves guest memory into a file, maps it twice, and brings a later difference into it.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use freestone_memory::image::{self, Extents, ImageLayout};
use freestone_memory::{Bytes, GuestAddress, GuestMemBuilder, Prefetch, layout};

/// Guest memory in all, and what the guest has used of it.
const SIZE: u64 = 4 << 30;
const USED: usize = 50 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mem = GuestMemBuilder::new(SIZE).dirty_log(true).build()?;
    let data: Vec<u8> = (0..=u8::MAX).cycle().take(USED).collect();
    mem.view().write_slice(&data, GuestAddress(layout::HIGH_MEMORY))?;
    mem.take_dirty();

    // A full image, with checksums.
    let image_layout = ImageLayout::of(&mem)?;
    let base = tempfile::tempfile()?;
    let start = Instant::now();
    let stats = image::write_full(&mem, &image_layout, &base, true, &mut |_, _| {})?;
    println!(
        "full image: {} pages written, {} of zeros, {} never touched; {} MiB on disk, {:?}",
        stats.written,
        stats.zero,
        stats.untouched,
        on_disk(&base)? >> 20,
        start.elapsed()
    );
    let mut sums = stats.checksums.ok_or("no checksums")?;

    // A moment later: only what was written since.
    mem.view().write_slice(b"later", GuestAddress(layout::HIGH_MEMORY + 0x12_3000))?;
    let dirty = mem.take_dirty().ok_or("no dirty log")?;
    let diff = tempfile::tempfile()?;
    let (stats, extents) = image::write_diff(&mem, &image_layout, &dirty, &diff, false, &mut |_, _| {})?;
    println!("difference: {} page written, {:x?}", stats.written, extents.as_slice());

    // The difference brought into its base, and the base checked.
    image::apply_diff(&base, &diff, &image_layout, &extents, Some(&mut sums), &mut |_, _| {})?;
    image::verify(&base, &image_layout, &Extents::all(&image_layout), &sums, &mut |_, _| {})?;

    // Two guests from one file, ready at once.
    let file = Arc::new(base);
    let map = || {
        let builder = GuestMemBuilder::with_ranges(image_layout.ranges().collect());
        builder.image(Arc::clone(&file)).build()
    };
    let start = Instant::now();
    let (first, second) = (map()?, map()?);
    println!("mapped twice in {:?}", start.elapsed());
    first.view().write_slice(b"first", GuestAddress(layout::HIGH_MEMORY + 0x12_3000))?;
    let text: [u8; 5] = second.view().read_obj(GuestAddress(layout::HIGH_MEMORY + 0x12_3000))?;
    println!("the second has {:?}", str::from_utf8(&text)?);

    // What the first used is fetched for the second before it asks.
    let set = first.working_set()?;
    println!("working set: {set:x?}, fetched {} bytes", second.prefetch(&set, Prefetch::Read)?);
    Ok(())
}

fn on_disk(file: &File) -> std::io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}
