//! Checks symbolic links in a checkpoint. A downloaded archive may have links to any file of this
//! machine, which would be copied to the output.

use std::{fs, path::Path};

use super::Error;

/// Checks that a file of the checkpoint in `dir`, with links resolved, is below `dir`, or among the
/// cache's blobs if `dir` is a snapshot in the hub's cache.
///
/// # Errors
/// If the file is elsewhere, or does not exist.
pub(crate) fn check_inside(dir: &Path, path: &Path) -> Result<(), Error> {
    let real = |path: &Path| fs::canonicalize(path).map_err(|e| Error::io(path, e));
    let (home, target) = (real(dir)?, real(path)?);
    // models--OWNER--NAME/{blobs, snapshots/COMMIT}
    let blobs = home.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = blobs.and_then(Path::parent).map(|repository| repository.join("blobs"));
    if target.starts_with(&home) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(());
    }
    Err(Error::Outside { path: path.to_owned(), target })
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_inside_or_lead_to_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("models--a--b");
        let snapshot = repository.join("snapshots/c0ffee");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(repository.join("blobs")).unwrap();
        for name in ["blobs/1", "snapshots/c0ffee/own", "outside", "../secret"] {
            fs::write(repository.join(name), name).unwrap();
        }
        for (target, fine) in [
            ("../../blobs/1", true),
            ("own", true),
            ("../../outside", false),
            ("../../../secret", false),
            ("/etc/passwd", false),
            ("../../blobs/../outside", false),
            ("nothing", false),
            ("link", false),
        ] {
            let link = snapshot.join("link");
            symlink(target, &link).unwrap();
            let result = check_inside(&snapshot, &link);
            assert_eq!(result.is_ok(), fine, "{target}: {result:?}");
            fs::remove_file(&link).unwrap();
        }
        // The directory itself may be a link.
        let elsewhere = dir.path().join("model");
        symlink(&snapshot, &elsewhere).unwrap();
        assert!(check_inside(&elsewhere, &elsewhere.join("own")).is_ok());
    }
}
