//! Limits for files from outside, such as downloaded models and data sets, many times above the
//! usual sizes.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use bytesize::ByteSize;

use crate::{encoding, files};

/// The size limit of a file that is read as a whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Kind of file, with an article.
    what: &'static str,
    pub(crate) bytes: u64,
}

const MIB: u64 = 1 << 20;

/// `config.json`.
pub(crate) const CONFIG: Limit = Limit { what: "a config.json", bytes: 4 * MIB };
/// The index of shards, of some 70,000 tensors.
pub(crate) const INDEX: Limit = Limit { what: "an index of shards", bytes: 8 * MIB };
/// `tokenizer.json`; those of a quarter of a million tokens have 35 MiB.
pub(crate) const TOKENIZER: Limit = Limit { what: "a tokenizer.json", bytes: 64 * MIB };
/// A file of token ids, of some three million.
pub(crate) const TOKEN_IDS: Limit = Limit { what: "a file of token ids", bytes: 16 * MIB };
/// A recipe or a study.
pub(crate) const RECIPE: Limit = Limit { what: "a recipe", bytes: MIB / 4 };
/// The recipe of a result, in which paths are longer and every default is filled in.
pub(crate) const RESULT: Limit = Limit { what: "the recipe of a result", bytes: MIB };
/// The report of a run; a thousand matrices that three stages refined take some two.
pub(crate) const REPORT: Limit = Limit { what: "a report", bytes: 32 * MIB };
/// The log of a study, a line a run.
pub(crate) const LOG: Limit = Limit { what: "the log of a study", bytes: 16 * MIB };
/// The page of a report.
pub(crate) const PAGE: Limit = Limit { what: "the page of a report", bytes: 64 * MIB };

/// Default number of tokens of a sequence, as in the paper.
pub(crate) const SEQUENCE: usize = 2048;
/// Maximum number of tokens of all calibration samples together; the paper's have 2¹⁸.
pub(crate) const TOKENS: usize = 1 << 28;
/// Maximum bytes of a glob over tensor names, which bounds its nesting.
pub(crate) const GLOB: usize = 256;
/// Maximum bytes of all globs of a recipe together, which become one automaton.
pub(crate) const GLOBS: usize = 16 << 10;
/// Maximum number of problems of a recipe that are shown.
pub(crate) const PROBLEMS: usize = 50;
/// Maximum number of experts of a model, in all layers together.
pub(crate) const EXPERTS: usize = 100_000;
/// Maximum bytes of the headers of all shards of a checkpoint together.
pub(crate) const HEADERS: u64 = 8 * MIB;
/// Maximum bytes of a line of text.
pub(crate) const LINE: usize = 16 << 20;
/// Maximum number of values of a record, those in lists and objects included.
pub(crate) const VALUES: usize = 1 << 18;
/// Maximum bytes of a text that is tokenised as a whole.
pub(crate) const TEXT: usize = 64 << 20;
/// Maximum expansion of a compressed file beyond [`TEXT`]. Text usually shrinks to a third or a
/// tenth.
pub(crate) const EXPANSION: u64 = 250;

/// Reads a whole text within its limit, without a byte order mark.
pub(crate) fn read(path: &Path, limit: Limit) -> io::Result<Vec<u8>> {
    let mut text = limit.read(&mut files::open_or_pipe(path)?)?;
    encoding::unmark(&mut text)?;
    Ok(text)
}

impl Limit {
    /// Reads the rest of a file within the limit.
    pub(crate) fn read(self, file: &mut File) -> io::Result<Vec<u8>> {
        let too_large = || {
            let (most, what) = (ByteSize(self.bytes), self.what);
            let problem = format!("larger than {most}, the limit for {what}");
            Err(io::Error::new(io::ErrorKind::FileTooLarge, problem))
        };
        if file.metadata()?.len() > self.bytes {
            return too_large();
        }
        // The file may grow meanwhile.
        let mut bytes = Vec::new();
        file.take(self.bytes + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > self.bytes { too_large() } else { Ok(bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_up_to_their_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let limit = Limit { what: "a file", bytes: 3 };
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(read(&path, limit).unwrap(), b"abc");
        std::fs::write(&path, "abcd").unwrap();
        let error = read(&path, limit).unwrap_err().to_string();
        assert_eq!(error, "larger than 3 B, the limit for a file");
        std::fs::write(&path, "\u{feff}").unwrap();
        assert_eq!(read(&path, limit).unwrap(), b"");
        // Without an end.
        #[cfg(target_os = "linux")]
        assert!(read(Path::new("/dev/zero"), limit).is_err());
    }
}
