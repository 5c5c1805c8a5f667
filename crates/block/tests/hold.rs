//! How images change hands: held alone, shared for reading, given up and taken back.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::ErrorKind;
use std::path::Path;

use freestone_block::tools::{CreateOptions, create};
use freestone_block::{Backing, Error, Hold, Image, ImageFormat, Qcow2Options, RawOptions};

fn raw(path: &Path) {
    create(path, &CreateOptions::new(ImageFormat::Raw, 1 << 20)).unwrap();
}

fn overlay(path: &Path, over: &Path, format: ImageFormat) {
    let mut options = CreateOptions::new(ImageFormat::Qcow2, 0);
    options.size = None;
    options.backing = Some((over.to_str().unwrap().to_owned(), format));
    create(path, &options).unwrap();
}

#[test]
fn a_shared_image_can_be_read_by_others_and_not_be_taken_back_while_they_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    raw(&path);
    let image = RawOptions::new().open(&path).unwrap();
    let reader = || RawOptions::new().read_only(true).open(&path);
    assert!(matches!(reader(), Err(Error::Locked { .. })));
    image.set_hold(Hold::Share).unwrap();
    let other = reader().unwrap();
    assert!(matches!(RawOptions::new().open(&path), Err(Error::Locked { .. })));
    assert_eq!(image.set_hold(Hold::Own).unwrap_err().kind(), ErrorKind::WouldBlock);
    // What could not be done has changed nothing.
    assert!(matches!(RawOptions::new().open(&path), Err(Error::Locked { .. })));
    drop(other);
    image.set_hold(Hold::Own).unwrap();
    assert!(matches!(reader(), Err(Error::Locked { .. })));
}

#[test]
fn an_image_that_was_given_up_is_anothers_until_that_one_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    raw(&path);
    let image = RawOptions::new().open(&path).unwrap();
    image.set_hold(Hold::None).unwrap();
    let other = RawOptions::new().open(&path).unwrap();
    assert!(image.set_hold(Hold::Share).is_err());
    assert!(image.set_hold(Hold::Own).is_err());
    drop(other);
    image.set_hold(Hold::Own).unwrap();
}

#[test]
fn a_chain_of_overlays_is_given_up_whole() {
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, top] = ["base", "middle", "top"].map(|name| dir.path().join(name));
    raw(&base);
    overlay(&middle, &base, ImageFormat::Raw);
    overlay(&top, &middle, ImageFormat::Qcow2);
    let image = Qcow2Options::new().backing(Backing::Allow).open(&top).unwrap();
    assert!(RawOptions::new().open(&base).is_err());
    image.set_hold(Hold::Share).unwrap();
    // Those below were shared all the time, and still nobody may write to them.
    assert!(RawOptions::new().open(&base).is_err());
    let other = Qcow2Options::new().backing(Backing::Allow).read_only(true).open(&top).unwrap();
    drop(other);
    image.set_hold(Hold::None).unwrap();
    let other = RawOptions::new().open(&base).unwrap();
    assert!(image.set_hold(Hold::Own).is_err());
    drop(other);
    image.set_hold(Hold::Own).unwrap();
    assert!(RawOptions::new().open(&base).is_err());
}

#[test]
fn overlays_of_a_shared_image_see_what_was_written_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let [base, top] = ["base", "top"].map(|name| dir.path().join(name));
    create(&base, &CreateOptions::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
    let memory = freestone_memory::GuestMem::anonymous(4096).unwrap();
    let view = memory.view();
    let page =
        freestone_memory::GuestMemoryBackend::get_slice(&*view, freestone_memory::GuestAddress(0), 4096);
    let page = page.unwrap();
    page.copy_from(&[7_u8; 4096]);
    let image = Qcow2Options::new().open(&base).unwrap();
    image.write_vectored_at(&[page], 8192).unwrap();
    image.set_hold(Hold::Share).unwrap();
    overlay(&top, &base, ImageFormat::Qcow2);
    let child = Qcow2Options::new().backing(Backing::Allow).open(&top).unwrap();
    page.copy_from(&[0_u8; 4096]);
    child.read_vectored_at(&[page], 8192).unwrap();
    let mut bytes = [0_u8; 4096];
    page.copy_to(&mut bytes);
    assert_eq!(bytes, [7; 4096]);
}
