//! Writes a file that a user names, completely or not at all.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use super::Error;

/// Checks that a file can be written, before its contents are computed. Only regular files are
/// replaced, not links or devices.
pub(super) fn check(path: &Path, force: bool) -> Result<(), Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::read_dir(parent(path)).map(drop).map_err(failed)
        }
        Err(e) => Err(failed(e)),
        Ok(found) if !found.is_file() => {
            let kind = crate::files::describe(&found.file_type());
            Err(Error::NotReplaced { path: path.to_owned(), kind })
        }
        Ok(_) if !force => Err(Error::Exists(path.to_owned())),
        Ok(_) => Ok(()),
    }
}

/// Writes a file; one that exists is replaced only with `force`.
pub(super) fn new(path: &Path, contents: &[u8], force: bool) -> Result<(), Error> {
    check(path, force)?;
    let failed = |source| Error::File { path: path.to_owned(), source };
    let mut draft = tempfile::Builder::new();
    draft.prefix(".barber-");
    #[cfg(unix)]
    draft.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = draft.tempfile_in(parent(path)).map_err(failed)?;
    file.write_all(contents).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    let written = if force { file.persist(path) } else { file.persist_noclobber(path) };
    match written {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Exists(path.to_owned()))
        }
        Err(error) => Err(failed(error.error)),
    }
}

/// The directory that a file is in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn only_regular_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("precious"), "precious").unwrap();
        fs::create_dir(path("directory")).unwrap();
        symlink("precious", path("link")).unwrap();
        symlink("nowhere", path("dangling")).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        for (name, kind) in [
            ("directory", "a directory"),
            ("link", "a link"),
            ("dangling", "a link"),
            ("socket", "a socket"),
            ("/dev/null", "a device"),
        ] {
            for force in [false, true] {
                let before = fs::symlink_metadata(path(name)).unwrap().file_type();
                let error = new(&path(name), b"new", force).unwrap_err().to_string();
                assert!(error.contains(&format!("is {kind}, ")), "{error}");
                assert_eq!(fs::symlink_metadata(path(name)).unwrap().file_type(), before);
            }
        }
        assert!(!path("nowhere").exists());
        let error = new(&path("precious"), b"new", false).unwrap_err().to_string();
        assert!(error.contains("precious exists"), "{error}");
        assert_eq!(fs::read(path("precious")).unwrap(), b"precious");
        new(&path("precious"), b"new", true).unwrap();
        new(&path("file"), b"new", false).unwrap();
        for name in ["precious", "file"] {
            assert_eq!(fs::read(path(name)).unwrap(), b"new");
        }
        assert!(check(&path("none/file"), true).is_err());
        // No draft is left.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 6);
    }
}
