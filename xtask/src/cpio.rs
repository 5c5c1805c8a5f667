//! Writes cpio archives in the "newc" format, which the kernel unpacks as its initial root file system.
//!
//! Only what an initramfs needs: directories, files and character devices, all owned by root. The format
//! is described in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive in the making. Parent directories are added on their own.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents, once.
    pub fn dir(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.directories.insert(path.to_owned());
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, S_IFREG | permissions, (0, 0), content)
    }

    /// Adds a copy of a file of the host.
    pub fn copy(&mut self, path: &str, permissions: u32, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("reading {}", source.display()))?;
        self.file(path, permissions, &content)
    }

    /// Adds a character device.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.parents(path)?;
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.dir(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).with_context(|| format!("{path} has 4 GiB or more"))?;
        let name_size = u32::try_from(path.len() + 1).context("a path is too long")?;
        self.next_inode += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        // Magic, then thirteen fields of eight hexadecimal digits: inode, mode, uid, gid, links, mtime, size, major and
        // minor of the file system, major and minor of the device, length of the name, checksum.
        let (major, minor) = device;
        let fields = [self.next_inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// Names and contents begin at multiples of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The path, mode and content of each entry, by an independent reading of the format.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let digits = std::str::from_utf8(&bytes[at + 6 + n * 8..at + 14 + n * 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let name_size = field(11) as usize;
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let content = (at + 110 + name_size).next_multiple_of(4);
            let end = content + field(6) as usize;
            all.push((name, field(1), bytes[content..end].to_vec()));
            at = end.next_multiple_of(4);
        }
        all
    }

    #[test]
    fn entries_come_back_with_their_parents_before_them() {
        let mut archive = Archive::new();
        archive.file("/bin/sub/tool", 0o755, b"12345").unwrap();
        archive.char_device("dev/console", 5, 1).unwrap();
        let names: Vec<_> = entries(&archive.finish().unwrap());
        let expected = [
            ("bin", 0o040_755, b"".as_slice()),
            ("bin/sub", 0o040_755, b""),
            ("bin/sub/tool", 0o100_755, b"12345"),
            ("dev", 0o040_755, b""),
            ("dev/console", 0o020_600, b""),
            ("TRAILER!!!", 0, b""),
        ];
        let expected: Vec<_> =
            expected.map(|(name, mode, data)| (name.to_owned(), mode, data.to_vec())).into();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_directory_is_written_once() {
        let mut archive = Archive::new();
        archive.dir("/a/b").unwrap();
        archive.file("/a/b/c", 0o644, b"").unwrap();
        archive.dir("a").unwrap();
        let bytes = archive.finish().unwrap();
        let names: Vec<_> = entries(&bytes).into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "TRAILER!!!"]);
    }
}
