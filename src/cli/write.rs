//! Writing a file that a user names, whole or not at all.

use std::{
    io::{self, Write},
    path::Path,
};

use super::Error;

/// Writes a file; one that exists is replaced only with `force`.
pub(super) fn new(path: &Path, contents: &[u8], force: bool) -> Result<(), Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".barber-").tempfile_in(dir).map_err(failed)?;
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
