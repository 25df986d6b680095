//! Files of records, a row of a data set each: JSON Lines or Parquet; and compressed text. Read as a
//! stream: a shard of hundreds of megabytes is never held as a whole, nor is what a small file
//! expands to.

mod parquet;

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use ::parquet::errors::ParquetError;
use bytesize::ByteSize;
use serde_json::{Map, Value};

use self::parquet::Rows;
use crate::limits::{EXPANSION, LINE, TEXT, VALUES};

/// Where a record stands, for messages: `FILE, line 3` or `FILE, row 3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    path: PathBuf,
    unit: &'static str,
    number: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} {}", self.path.display(), self.unit, self.number)
    }
}

/// A row of a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it stands.
    pub place: Place,
    /// Its fields by their names.
    pub fields: Map<String, Value>,
}

/// What is wrong with a file, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{place}: the {kind} stream is broken or cut off ({source}); download it again")]
    Compressed { place: Place, kind: &'static str, source: io::Error },
    #[error(
        "{place}: the {kind} stream wants more memory than the 128 MiB that it gets; \
         compress it again with a smaller window, without --long"
    )]
    Window { place: Place, kind: &'static str },
    #[error(
        "{place}: the file expands to more than {EXPANSION} times its size, which no text does; \
         decompress it and look"
    )]
    Bomb { place: Place },
    #[error(
        "{place}: longer than {}, the most that a line of text or a record may have",
        ByteSize(LINE as u64)
    )]
    LongLine { place: Place },
    #[error("{place}: more than {VALUES} values, the most that a record may have")]
    ManyValues { place: Place },
    #[error(
        "{}: more than {} of text, the most that is read as a whole; take fewer `documents` or \
         `questions`, or a shorter text",
        path.display(), ByteSize(TEXT as u64)
    )]
    LongText { path: PathBuf },
    #[error("{place}: not UTF-8 text")]
    NotText { place: Place },
    #[error("{place}: expected a JSON object: {problem}")]
    NotAnObject { place: Place, problem: String },
    #[error("{}: not a sound Parquet file: {source}", path.display())]
    Parquet { path: PathBuf, source: ParquetError },
    #[error("{place}: no field `{field}`; there is {known}")]
    NoField { place: Place, field: String, known: String },
    #[error("{place}: `{field}` must be {expected}, found {found}")]
    Mistyped { place: Place, field: String, expected: &'static str, found: String },
}

impl Record {
    /// The field of this name; `a.b` is the field `b` of the object `a`.
    ///
    /// # Errors
    /// If there is none.
    pub fn field(&self, name: &str) -> Result<&Value, Error> {
        let mut fields = &self.fields;
        let mut segments = name.split('.').peekable();
        while let Some(segment) = segments.next() {
            match (fields.get(segment), segments.peek()) {
                (Some(value), None) => return Ok(value),
                (Some(Value::Object(inner)), Some(_)) => fields = inner,
                _ => break,
            }
        }
        let known: Vec<String> = fields.keys().map(|key| format!("`{key}`")).collect();
        let known = if known.is_empty() { "none".into() } else { known.join(", ") };
        Err(Error::NoField { place: self.place.clone(), field: name.into(), known })
    }

    /// The text of a field.
    ///
    /// # Errors
    /// If there is none, or it is no text.
    pub fn text(&self, name: &str) -> Result<&str, Error> {
        let value = self.field(name)?;
        value.as_str().ok_or_else(|| self.mistyped(name, "a string", value))
    }

    /// The texts of a field that is a list of them.
    ///
    /// # Errors
    /// If there is none, or it is no list of texts.
    pub fn texts(&self, name: &str) -> Result<Vec<&str>, Error> {
        let value = self.field(name)?;
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.mistyped(name, "a list of strings", value))
    }

    /// That a field is not what it must be.
    pub fn mistyped(&self, name: &str, expected: &'static str, found: &Value) -> Error {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(40) {
            found.truncate(end);
            found.push('…');
        }
        Error::Mistyped { place: self.place.clone(), field: name.into(), expected, found }
    }
}

/// Whether a file is one of records, by its name, without `.gz` or `.zst`.
pub fn is_records(path: &Path) -> bool {
    is_parquet(path) || has_extension(path, "jsonl") || has_extension(path, "json")
}

/// Whether a file's name ends so, but for `.gz` or `.zst`.
pub fn has_extension(path: &Path, extension: &str) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    name.rsplit_once('.').is_some_and(|(_, found)| found == extension)
}

fn is_parquet(path: &Path) -> bool {
    has_extension(path, "parquet")
}

/// The records of a Parquet file or, under any other name, of JSON Lines, compressed or not.
///
/// # Errors
/// If it cannot be opened.
pub fn records(path: &Path) -> Result<Records, Error> {
    let reader = if is_parquet(path) {
        let wrong = |source| Error::Parquet { path: path.to_owned(), source };
        let file = File::open(path).map_err(|e| io_error(path, e))?;
        Reader::Parquet(Box::new(Rows::open(file).map_err(wrong)?))
    } else {
        Reader::Lines(open(path)?)
    };
    Ok(Records { path: path.to_owned(), reader, number: 0 })
}

/// The records of a file, in order.
pub struct Records {
    path: PathBuf,
    reader: Reader,
    number: usize,
}

enum Reader {
    Lines(Lines),
    Parquet(Box<Rows>),
    End,
}

impl Iterator for Records {
    type Item = Result<Record, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.reader {
            Reader::Lines(lines) => loop {
                let line = match lines.next()? {
                    Ok(line) => line,
                    Err(error) => return Some(Err(error)),
                };
                if line.trim().is_empty() {
                    continue;
                }
                let place = lines.place();
                if line.len() > VALUES && values(&line) > VALUES {
                    return Some(Err(Error::ManyValues { place }));
                }
                return Some(match serde_json::from_str(&line) {
                    Ok(fields) => Ok(Record { place, fields }),
                    Err(e) => Err(Error::NotAnObject { place, problem: e.to_string() }),
                });
            },
            Reader::End => None,
            Reader::Parquet(rows) => {
                let row = rows.next()?;
                self.number += 1;
                let place = Place { path: self.path.clone(), unit: "row", number: self.number };
                let path = self.path.clone();
                Some(match row {
                    Ok(fields) => Ok(Record { place, fields }),
                    Err(source) => {
                        self.reader = Reader::End;
                        Err(Error::Parquet { path, source })
                    }
                })
            }
        }
    }
}

/// The lines of a text, compressed or not.
pub struct Lines {
    path: PathBuf,
    kind: Option<&'static str>,
    reader: Box<dyn BufRead>,
    number: usize,
    /// Bytes so far, and how many there may be.
    read: u64,
    most: u64,
}

/// The largest window of a Zstandard stream, as a power of two: 128 MiB.
const WINDOW: u32 = 27;

/// The lines of a file; gzip and Zstandard are told by their first bytes.
///
/// # Errors
/// If it cannot be opened.
pub fn open(path: &Path) -> Result<Lines, Error> {
    let io = |e| io_error(path, e);
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let start = file.fill_buf().map_err(io)?;
    let (kind, reader): (_, Box<dyn BufRead>) = if start.starts_with(&[0x1f, 0x8b]) {
        (Some("gzip"), Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
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
    Ok(Lines { path: path.to_owned(), kind, reader, number: 0, read: 0, most })
}

/// How many values a text in JSON has at most: as many as there are commas, and a first one in each
/// list and object.
fn values(json: &str) -> usize {
    let (mut values, mut quoted, mut escaped) = (1, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b',' | b'[' | b'{' if !quoted => values += 1,
            _ => {}
        }
    }
    values
}

impl Lines {
    fn place(&self) -> Place {
        Place { path: self.path.clone(), unit: "line", number: self.number }
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

impl Iterator for Lines {
    type Item = Result<String, Error>;

    /// The next line, with its end.
    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        self.number += 1;
        let found = self.reader.by_ref().take(LINE as u64 + 1).read_until(b'\n', &mut line);
        self.read += line.len() as u64;
        let error = match found {
            Ok(0) => return None,
            Ok(length) if length > LINE => Error::LongLine { place: self.place() },
            Ok(_) if self.read > self.most => Error::Bomb { place: self.place() },
            Ok(_) => {
                let text = String::from_utf8(line);
                return Some(text.map_err(|_| Error::NotText { place: self.place() }));
            }
            Err(source) => self.broken(source),
        };
        // A broken stream would fail again and again.
        self.reader = Box::new(io::empty());
        Some(Err(error))
    }
}

fn io_error(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    const LINES: &[u8] = b"{\"text\": \"one\", \"n\": {\"a\": [\"x\"]}}\n\n{\"text\": 2}\n";

    fn all(path: &Path) -> Vec<Result<Record, String>> {
        records(path).unwrap().map(|record| record.map_err(|e| e.to_string())).collect()
    }

    fn compressed(dir: &Path) -> [PathBuf; 3] {
        let [plain, gz, zst] = ["a.jsonl", "a.json.gz", "a.jsonl.zst"].map(|name| dir.join(name));
        fs::write(&plain, LINES).unwrap();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(LINES).unwrap();
        fs::write(&gz, encoder.finish().unwrap()).unwrap();
        fs::write(&zst, zstd::encode_all(LINES, 3).unwrap()).unwrap();
        [plain, gz, zst]
    }

    #[test]
    fn lines_are_records_compressed_or_not() {
        let dir = tempfile::tempdir().unwrap();
        for path in compressed(dir.path()) {
            assert!(is_records(&path));
            let found: Vec<Record> = all(&path).into_iter().map(Result::unwrap).collect();
            assert_eq!(found.len(), 2);
            assert_eq!(found[0].text("text").unwrap(), "one");
            assert_eq!(found[0].texts("n.a").unwrap(), ["x"]);
            let place = format!("{}, line 3", path.display());
            assert_eq!(found[1].place.to_string(), place);
            let error = found[1].text("text").unwrap_err().to_string();
            assert_eq!(error, format!("{place}: `text` must be a string, found 2"));
            let error = found[0].text("txt").unwrap_err().to_string();
            assert!(error.ends_with("line 1: no field `txt`; there is `text`, `n`"), "{error}");
        }
        assert!(!is_records(Path::new("a.txt.gz")));
    }

    #[test]
    fn broken_streams_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        for path in &compressed(dir.path())[1..] {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 6]).unwrap();
            let error = all(path).pop().unwrap().unwrap_err();
            assert!(error.contains("broken or cut off") && error.contains("line"), "{error}");
        }
        let path = dir.path().join("b.jsonl");
        fs::write(&path, b"[1]\n").unwrap();
        assert!(all(&path)[0].as_ref().unwrap_err().contains("line 1: expected a JSON object"));
        fs::write(&path, b"{}\n\xff\n").unwrap();
        assert!(all(&path)[1].as_ref().unwrap_err().contains("line 2: not UTF-8"));
        let path = dir.path().join("b.parquet");
        fs::write(&path, b"PAR1 and no more").unwrap();
        assert!(records(&path).err().unwrap().to_string().contains("not a sound Parquet file"));
    }

    #[test]
    fn rows_are_records() {
        let path = Path::new("tests/fixtures/records.parquet");
        let found: Vec<Record> = all(path).into_iter().map(Result::unwrap).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[1].text("text").unwrap(), "the second document");
        assert_eq!(found[2].texts("choices.label").unwrap(), ["A", "B"]);
        assert_eq!(found[0].field("label").unwrap(), &Value::from(1));
        assert_eq!(found[2].place.to_string(), format!("{}, row 3", path.display()));
    }
}
