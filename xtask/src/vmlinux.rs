//! Extracts the uncompressed ELF kernel (vmlinux) from a bzImage whose payload is an LZ4 legacy frame, as Debian's is.
//!
//! The payload is found by the fields of the Linux x86 boot protocol (`setup_sects`, `payload_offset`,
//! `payload_length`). Other compressions are refused with their name: no kernel that the tests use has them.

use anyhow::{Context, Result, bail};

/// Offset of `setup_sects` in the image: the count of 512-byte sectors of real-mode code after the first.
const SETUP_SECTS: usize = 0x1f1;
/// Offset of the magic number "HdrS".
const HEADER_MAGIC: usize = 0x202;
/// Offset of `payload_offset`, from the start of the protected-mode code.
const PAYLOAD_OFFSET: usize = 0x248;
/// Offset of `payload_length`.
const PAYLOAD_LENGTH: usize = 0x24c;
/// First bytes of an LZ4 legacy frame (0x184C2102, little endian).
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Every block of a legacy frame but the last expands to this many bytes.
const LZ4_BLOCK: usize = 8 << 20;
/// An upper bound for the image, so that a bad file cannot ask for all memory.
const MAX_IMAGE: usize = 1 << 30;

/// Returns the ELF image inside `bzimage`.
pub fn extract(bzimage: &[u8]) -> Result<Vec<u8>> {
    let elf = decompress(payload(bzimage)?)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("the decompressed payload is not an ELF file");
    }
    Ok(elf)
}

/// The compressed payload of a bzImage.
fn payload(bzimage: &[u8]) -> Result<&[u8]> {
    if bzimage.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS".as_slice()) {
        bail!("not a bzImage: no HdrS at offset {HEADER_MAGIC:#x}");
    }
    let sectors = match bzimage.get(SETUP_SECTS).copied().unwrap_or(0) {
        0 => 4, // the boot protocol's value for images older than the field
        n => usize::from(n),
    };
    let start = ((sectors + 1) * 512)
        .checked_add(read_u32(bzimage, PAYLOAD_OFFSET)?)
        .context("payload_offset is out of range")?;
    let end =
        start.checked_add(read_u32(bzimage, PAYLOAD_LENGTH)?).context("payload_length is out of range")?;
    bzimage
        .get(start..end)
        .with_context(|| format!("the payload {start:#x}..{end:#x} is outside of the file"))
}

/// Expands an LZ4 legacy frame. The kernel's build appends the expanded size as a 32-bit number, which is not a block.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY) else {
        let head = payload.get(..4).unwrap_or(payload);
        bail!("the payload is not an LZ4 legacy frame (it begins with {head:02x?})");
    };
    let blocks_end = blocks.len().checked_sub(4).context("the payload has no size at its end")?;
    let size = read_u32(blocks, blocks_end)?;
    if size > MAX_IMAGE {
        bail!("the payload says that it expands to {size} bytes, more than {MAX_IMAGE}");
    }
    let mut image = Vec::with_capacity(size);
    let mut at = 0;
    while at < blocks_end {
        let length = read_u32(blocks, at)?;
        let block = blocks.get(at + 4..(at + 4).saturating_add(length)).context("a block is cut short")?;
        let mut expanded = lz4_flex::block::decompress(block, LZ4_BLOCK)
            .with_context(|| format!("expanding the block at {at:#x}"))?;
        image.append(&mut expanded);
        at += 4 + length;
    }
    if image.len() != size {
        bail!("the payload expanded to {} bytes instead of {size}", image.len());
    }
    Ok(image)
}

fn read_u32(bytes: &[u8], at: usize) -> Result<usize> {
    let field = bytes.get(at..at + 4).with_context(|| format!("the file ends before offset {at:#x}"))?;
    Ok(usize::try_from(u32::from_le_bytes(field.try_into()?))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with one setup sector whose payload is `elf` in a legacy frame of one block.
    fn bzimage(elf: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        // An LZ4 block of literals alone: token, length bytes, data.
        let mut block = vec![0xf0];
        let mut rest = elf.len() - 15;
        while rest >= 255 {
            block.push(255);
            rest -= 255;
        }
        block.push(u8::try_from(rest).unwrap());
        block.extend_from_slice(elf);
        payload.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend_from_slice(&block);
        payload.extend_from_slice(&u32::try_from(elf.len()).unwrap().to_le_bytes());

        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(&payload);
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..600u32).map(|n| n.to_le_bytes()[0]));
        elf
    }

    #[test]
    fn the_elf_image_of_an_lz4_payload_is_extracted() {
        assert_eq!(extract(&bzimage(&elf())).unwrap(), elf());
    }

    #[test]
    fn a_file_without_the_boot_header_is_refused() {
        assert!(extract(&[0; 4096]).unwrap_err().to_string().contains("not a bzImage"));
    }

    #[test]
    fn another_compression_is_refused() {
        let mut image = bzimage(&elf());
        image[1040..1044].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        assert!(extract(&image).unwrap_err().to_string().contains("not an LZ4 legacy frame"));
    }

    #[test]
    fn an_image_cut_short_at_any_byte_is_refused() {
        let image = bzimage(&elf());
        for length in 0..image.len() {
            assert!(extract(&image[..length]).is_err(), "cut to {length} bytes");
        }
    }
}
