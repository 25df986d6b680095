//! Checks the place of an output before a run, without writing: resolves its path, and checks that
//! a directory can be renamed to it.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use bytesize::ByteSize;

use super::Error;
use crate::files;

/// A path with links resolved; its last parts need not exist.
///
/// # Errors
/// If it is a link to nothing, or cannot be read.
pub(super) fn resolved(path: &Path) -> Result<PathBuf, Error> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    let mut real = PathBuf::new();
    for part in absolute.components() {
        if part == Component::ParentDir {
            real.pop();
            continue;
        }
        real.push(part);
        match fs::symlink_metadata(&real) {
            Ok(found) if found.is_symlink() => {
                real = fs::canonicalize(&real).map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => no_place(&real, "is a link to nothing"),
                    _ => Error::io(&real, e),
                })?;
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(&real, e)),
            _ => {}
        }
    }
    Ok(real)
}

/// Checks that a directory of this number of bytes can be renamed to `target`, whose links are
/// resolved.
///
/// # Errors
/// If `target` exists and is not a directory, or is a mount point; or if the directory above it
/// cannot be written to, or has too little space.
pub(super) fn check(target: &Path, bytes: u64) -> Result<(), Error> {
    let Some(parent) = target.parent() else {
        return Err(no_place(target, "is the root of the file system"));
    };
    match fs::symlink_metadata(target) {
        Ok(found) if !found.is_dir() => {
            let kind = files::describe(&found.file_type());
            return Err(no_place(target, &format!("is {kind}, not a directory")));
        }
        Ok(_) if is_mount_point(target) => {
            return Err(no_place(target, "is a mount point, which cannot be replaced"));
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(target, e)),
        _ => {}
    }
    let above = parent.ancestors().find(|dir| dir.exists()).unwrap_or(parent);
    let written = |e| no_place(target, &format!("cannot be written to: {}: {e}", above.display()));
    writable(above).map_err(written)?;
    match free(above) {
        Some(free) if free < bytes => {
            let (bytes, free) = (ByteSize(bytes), ByteSize(free));
            let problem = format!("takes {bytes}, and {free} are free in {}", above.display());
            Err(no_place(target, &problem))
        }
        _ => Ok(()),
    }
}

fn no_place(output: &Path, problem: &str) -> Error {
    Error::NoPlace { output: output.to_owned(), problem: problem.into() }
}

#[cfg(target_os = "linux")]
fn is_mount_point(dir: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

    statx(CWD, dir, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// On other systems, the rename fails.
#[cfg(not(target_os = "linux"))]
fn is_mount_point(_: &Path) -> bool {
    false
}

#[cfg(unix)]
fn writable(dir: &Path) -> io::Result<()> {
    use rustix::fs::Access;

    Ok(rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// On other systems, creating the working directory fails.
#[cfg(not(unix))]
fn writable(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Free bytes of a directory's file system; `None` if the system does not tell.
#[cfg(unix)]
fn free(dir: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(dir).ok()?;
    // Some file systems do not count blocks.
    (found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_are_resolved_though_their_ends_are_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(root.join("real/below")).unwrap();
        symlink("real/below", root.join("link")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        for (path, expected) in [
            ("out", "out"),
            ("a/b/out", "a/b/out"),
            ("link", "real/below"),
            ("link/out", "real/below/out"),
            ("link/../out", "real/out"),
            ("not/there/../out", "not/out"),
        ] {
            assert_eq!(resolved(&root.join(path)).unwrap(), root.join(expected), "{path}");
        }
        for path in ["dangling", "dangling/out"] {
            let error = resolved(&root.join(path)).unwrap_err().to_string();
            assert!(error.contains("dangling is a link to nothing"), "{error}");
        }
    }

    #[test]
    fn places_that_cannot_be_taken_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        check(&root.join("out"), 1).unwrap();
        check(&root.join("not/there/out"), 1).unwrap();
        check(&root, 1).unwrap();
        for (path, expected) in [
            ("file", "is a file, not a directory"),
            ("socket", "is a socket, not a directory"),
            ("/dev/null", "is a device, not a directory"),
            ("/", "is the root of the file system"),
        ] {
            let error = check(&root.join(path), 1).unwrap_err().to_string();
            assert!(error.contains(expected), "{path}: {error}");
        }
        let error = check(&root.join("not/there/out"), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("takes 16.0 EiB, and") && error.contains("are free in"), "{error}");
        assert!(resolved(&root.join("file/out")).and_then(|path| check(&path, 1)).is_err());
        #[cfg(target_os = "linux")]
        for path in ["/proc", "/dev"] {
            let error = check(path.as_ref(), 1).unwrap_err().to_string();
            assert!(error.contains("is a mount point"), "{path}: {error}");
        }
    }
}
