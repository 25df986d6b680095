//! Scratch files for hidden states that do not fit into memory.

use std::{fmt, io, path::PathBuf};

use crate::executor::{Scratch, Spill};

/// A directory for scratch files, which are deleted when they are closed.
#[derive(Clone, Debug)]
pub struct ScratchDir(PathBuf);

impl ScratchDir {
    /// Scratch files in a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }
}

impl fmt::Display for ScratchDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scratch file in {}", self.0.display())
    }
}

impl Spill for ScratchDir {
    fn open(&self) -> io::Result<Box<dyn Scratch>> {
        Ok(Box::new(tempfile::tempfile_in(&self.0)?))
    }
}
