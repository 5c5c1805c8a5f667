//! A file that appears under its name only when it is complete.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::{Error, Result};

/// A file that is written beside its place. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Aside {
    target: PathBuf,
    path: PathBuf,
    overwrite: bool,
    done: bool,
}

impl Aside {
    /// Makes an empty file beside `target`, which must not exist unless `overwrite` says so.
    pub(super) fn create(target: &Path, overwrite: bool) -> Result<Self> {
        let create = |reason: String| Error::Create { path: target.to_owned(), reason };
        match std::fs::metadata(target) {
            Ok(meta) if !meta.is_file() => {
                return Err(create("something is there that is not a file".into()));
            }
            Ok(_) if !overwrite => return Err(create("the file exists; --force replaces it".into())),
            _ => {}
        }
        let name = target.file_name().ok_or_else(|| create("this is no name for a file".into()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", std::process::id()));
        let path = target.with_file_name(hidden);
        File::create_new(&path).map_err(|source| Error::Io { path: path.clone(), op: "make it", source })?;
        Ok(Self { target: target.to_owned(), path, overwrite, done: false })
    }

    /// Where the file is for now.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file durable and gives it its name.
    pub(super) fn finish(mut self) -> Result<()> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Create {
                path: self.target.clone(),
                reason: "the file exists; --force replaces it".into(),
            },
            _ => Error::Io { path: self.target.clone(), op: "put it in its place", source },
        };
        File::open(&self.path).and_then(|file| file.sync_all()).map_err(fail)?;
        let renamed = if self.overwrite {
            std::fs::rename(&self.path, &self.target)
        } else {
            match rustix::fs::renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE) {
                // A file system that cannot: then a link, which does not replace anything either.
                Err(rustix::io::Errno::INVAL) => std::fs::hard_link(&self.path, &self.target)
                    .and_then(|()| std::fs::remove_file(&self.path)),
                other => other.map_err(io::Error::from),
            }
        };
        renamed.map_err(fail)?;
        self.done = true;
        let folder = self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The name is durable too, where the file system lets a folder be synchronised.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
