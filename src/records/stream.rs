//! A decompressed stream of a file, read by lines or elements of a JSON list. The length of each,
//! and the expansion of the file, are limited.

use std::{
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use super::{Error, Place, io_error};
use crate::{
    encoding, files,
    limits::{EXPANSION, LINE, TEXT},
};

/// The bytes of a file, decompressed.
pub(super) struct Stream {
    path: PathBuf,
    kind: Option<&'static str>,
    reader: Box<dyn BufRead>,
    /// Number of the current line, from 1.
    line: usize,
    /// Number of bytes so far, and its maximum.
    read: u64,
    most: u64,
}

/// The largest window of a Zstandard stream, as a power of two: 128 MiB.
const WINDOW: u32 = 27;

pub(super) const GZIP: &[u8] = &[0x1f, 0x8b];
pub(super) const ZSTANDARD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The first bytes of files in forms that are not supported.
const OTHERS: [(&[u8], &str); 5] = [
    (b"\xfd7zXZ\0", "a file that xz compressed; decompress it, or compress it with gzip or zstd"),
    (
        b"BZh91AY&SY",
        "a file that bzip2 compressed; decompress it, or compress it with gzip or zstd",
    ),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"ARROW1\0\0", "an Arrow file; save it as Parquet or JSON Lines"),
];

impl Stream {
    /// The stream of a file; gzip and Zstandard are detected by their first bytes.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let io = |e| io_error(path, e);
        let file = files::open_or_pipe(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::with_capacity(1 << 16, file);
        let start = file.fill_buf().map_err(io)?;
        let (kind, reader): (_, Box<dyn BufRead>) = if start.starts_with(GZIP) {
            (Some("gzip"), Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))))
        } else if start.starts_with(ZSTANDARD) {
            let mut decoder = zstd::Decoder::with_buffer(file).map_err(io)?;
            decoder.window_log_max(WINDOW).map_err(io)?;
            (Some("Zstandard"), Box::new(BufReader::new(decoder)))
        } else {
            (None, Box::new(file))
        };
        let most = match kind {
            Some(_) => (length.saturating_mul(EXPANSION)).max(TEXT as u64),
            None => u64::MAX,
        };
        Ok(Self { path: path.to_owned(), kind, reader, line: 0, read: 0, most })
    }

    /// The current place in the stream.
    pub(super) fn place(&self) -> Place {
        Place { path: self.path.clone(), unit: "line", number: self.line.max(1) }
    }

    /// Whether the stream begins, after spaces, with a JSON list.
    pub(super) fn begins_list(&mut self) -> Result<bool, Error> {
        let start = self.reader.fill_buf().map(|start| {
            let text = start[encoding::mark(start)..].trim_ascii_start();
            text.first() == Some(&b'[') && !encoding::is_wide(start)
        });
        start.map_err(|source| self.broken(source))
    }

    /// The next line, with its line break.
    pub(super) fn line(&mut self) -> Option<Result<String, Error>> {
        let mut line = Vec::new();
        self.line += 1;
        let found = self.reader.by_ref().take(LINE as u64 + 1).read_until(b'\n', &mut line);
        self.read += line.len() as u64;
        let place = self.place();
        let problem = match found {
            Ok(0) => return None,
            Ok(length) if length > LINE => Error::LongLine { place },
            Ok(_) if self.read > self.most => Error::Bomb { place },
            Ok(_) if self.line == 1 => return Some(self.first(line)),
            Ok(_) => return Some(text(line, place)),
            Err(source) => self.broken(source),
        };
        self.end();
        Some(Err(problem))
    }

    /// The first line, without a byte order mark; checks the encoding.
    fn first(&self, mut line: Vec<u8>) -> Result<String, Error> {
        let path = || self.path.clone();
        let other = OTHERS.iter().find(|(start, _)| line.starts_with(start));
        if let Some((_, what)) = other {
            return Err(Error::Other { path: path(), what });
        }
        encoding::unmark(&mut line).map_err(|source| Error::Io { path: path(), source })?;
        text(line, self.place())
    }

    /// The next byte.
    pub(super) fn byte(&mut self) -> Result<Option<u8>, Error> {
        let next = self.reader.fill_buf().map(|bytes| bytes.first().copied());
        let Some(byte) = next.map_err(|source| self.broken(source))? else { return Ok(None) };
        self.reader.consume(1);
        self.read += 1;
        if self.read > self.most {
            return Err(Error::Bomb { place: self.place() });
        }
        self.line = self.line.max(1) + usize::from(byte == b'\n');
        Ok(Some(byte))
    }

    /// Ends the stream, as a broken one would fail repeatedly.
    pub(super) fn end(&mut self) {
        self.reader = Box::new(io::empty());
    }

    fn broken(&self, source: io::Error) -> Error {
        let place = self.place();
        match self.kind {
            None => io_error(&self.path, source),
            Some(kind) if source.to_string().contains("too much memory") => {
                Error::Window { place, kind }
            }
            Some(kind) => Error::Compressed { place, kind, source },
        }
    }
}

/// Bytes as text.
pub(super) fn text(bytes: Vec<u8>, place: Place) -> Result<String, Error> {
    String::from_utf8(bytes).map_err(|_| Error::NotText { place })
}
