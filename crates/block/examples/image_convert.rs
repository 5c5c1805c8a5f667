//! Makes a small raw image, copies it to qcow2, lays an overlay over the copy and writes there:
//! `cargo run -p freestone-block --features tools --example image_convert`.

use std::error::Error;

use freestone_block::tools::{ConvertOptions, CreateOptions, check_qcow2, convert, create};
use freestone_block::{Backing, DiskOptions, FormatChoice, ImageFormat};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let [raw, base, top] = ["disk.img", "base.qcow2", "top.qcow2"].map(|name| dir.path().join(name));
    std::fs::write(&raw, vec![7; 1 << 20])?;

    let mut options = ConvertOptions::default();
    options.source = FormatChoice::Given(ImageFormat::Raw);
    convert(&raw, &base, &options, &mut |done, total| println!("{done} of {total} bytes"))?;

    let mut overlay = CreateOptions::default();
    overlay.backing = Some(("base.qcow2".into(), ImageFormat::Qcow2));
    create(&top, &overlay)?;

    let open = DiskOptions::new().format(FormatChoice::Given(ImageFormat::Qcow2)).backing(Backing::Allow);
    let disk = open.open(&top)?;
    let mem = GuestMem::anonymous(1 << 20)?;
    let view = mem.view();
    disk.write_vectored_at(&[view.get_slice(GuestAddress(0), 4096)?], 8192)?;
    disk.flush()?;
    drop(disk);
    let report = check_qcow2(&top)?;
    println!("the overlay has {} of {} clusters", report.allocated_clusters, report.total_clusters);
    Ok(())
}
