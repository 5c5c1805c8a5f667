//! Puts programs of this system, with the libraries that they link, into an archive.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::repo;

/// Adds a file with the libraries it links, or a directory with all that is in it.
pub fn ship(archive: &mut Archive, path: &Path, shipped: &mut BTreeSet<PathBuf>) -> Result<()> {
    let path = std::path::absolute(path).with_context(|| format!("resolving {}", path.display()))?;
    if !shipped.insert(path.clone()) {
        return Ok(());
    }
    let metadata = fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))? {
            ship(archive, &entry?.path(), shipped)?;
        }
        return Ok(());
    }
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    archive.copy(&path.to_string_lossy(), mode, &path)?;
    if mode & 0o111 != 0 {
        libraries(archive, &path, shipped)?;
    }
    Ok(())
}

/// Adds the shared libraries of a program, as `ldd` names them; none for a script or a static program.
pub fn libraries(archive: &mut Archive, path: &Path, shipped: &mut BTreeSet<PathBuf>) -> Result<()> {
    let Ok(text) = repo::output(repo::program("ldd")?.arg(path)) else {
        return Ok(());
    };
    for library in libraries_of_ldd(&text) {
        if shipped.insert(library.clone()) {
            archive.copy(&library.to_string_lossy(), 0o755, &library)?;
        }
    }
    Ok(())
}

/// Reads the paths out of lines like `libc.so.6 => /lib/libc.so.6 (0x...)` and `/lib64/ld.so (0x...)`.
fn libraries_of_ldd(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_the_paths_that_ldd_prints() {
        let text =
            "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7e)\n\t/lib64/ld-linux.so.2 (0x7d)\n";
        assert_eq!(libraries_of_ldd(text), ["/lib/libc.so.6", "/lib64/ld-linux.so.2"].map(PathBuf::from));
    }
}
