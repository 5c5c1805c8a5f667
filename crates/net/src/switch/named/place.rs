//! Where the socket of a named switch is.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The socket of the switch of that name; its folder is made.
pub(super) fn path(name: &str) -> Result<PathBuf> {
    if name.contains('/') {
        return std::path::absolute(name).map_err(Error::io(format!("find the switch {name}")));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Error::invalid(
            "name of a switch",
            name,
            "say up to 64 letters, digits, '.', '_' and '-'",
        ));
    }
    let user = rustix::process::geteuid().as_raw();
    Ok(folder(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), user)?.join(format!("{name}.sock")))
}

/// The file that the one who listens holds locked.
pub(super) fn lock_path(socket: &Path) -> PathBuf {
    if socket.extension().is_some_and(|extension| extension == "sock") {
        socket.with_extension("lock")
    } else {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        path.into()
    }
}

/// The folder for sockets of this user.
fn folder(runtime: Option<PathBuf>, user: u32) -> Result<PathBuf> {
    let of_user = |path: &Path| std::fs::metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == user);
    let candidates = [runtime.filter(|path| path.is_absolute()), Some(format!("/run/user/{user}").into())];
    let dir = match candidates.into_iter().flatten().find(|path| of_user(path)) {
        Some(path) => path.join("freestone"),
        None => PathBuf::from(format!("/tmp/freestone-{user}")),
    };
    private(&dir, user)?;
    Ok(dir)
}

/// Makes the folder if it is not there, and makes sure that it is the user's alone.
fn private(dir: &Path, user: u32) -> Result<()> {
    let op = || format!("make the folder {}", dir.display());
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io(op())(error));
        }
        _ => {}
    }
    // Of the folder itself: a link to one may be changed by whoever made it.
    let meta = std::fs::symlink_metadata(dir).map_err(Error::io(op()))?;
    if meta.is_dir() && meta.uid() == user && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    let reason = "it must be a folder that belongs to the user and that nobody else can use";
    Err(Error::invalid("folder of switches", dir.display().to_string(), reason))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn names_that_would_leave_the_folder_are_refused() {
        for name in ["", "..", ".hidden", "a b", "ä", &"x".repeat(65)] {
            assert!(path(name).is_err(), "{name:?}");
        }
        assert_eq!(path("/a/b").unwrap(), Path::new("/a/b"));
        assert_eq!(lock_path(Path::new("/a/b")), Path::new("/a/b.lock"));
        assert_eq!(lock_path(Path::new("/a/lan0.sock")), Path::new("/a/lan0.lock"));
    }

    #[test]
    fn a_folder_that_others_can_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let at = folder(Some(dir.path().into()), user).unwrap();
        assert_eq!(at, dir.path().join("freestone"));
        assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::set_permissions(&at, PermissionsExt::from_mode(0o750)).unwrap();
        assert!(folder(Some(dir.path().into()), user).is_err());
        std::fs::remove_dir(&at).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &at).unwrap();
        assert!(private(&at, user).is_err());
    }
}
