//! Files of records, the rows of a data set: JSON Lines, a JSON list or Parquet; and compressed
//! text. All are read as streams and never held as a whole, compressed or not.

mod form;
mod list;
#[cfg(feature = "parquet")]
mod parquet;
mod stream;

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use serde_json::{Map, Value};

pub use self::form::Form;
pub(crate) use self::form::extension;
use self::{list::Elements, stream::Stream};
use crate::limits::{EXPANSION, LINE, TEXT, VALUES};

/// The place of a record, for messages: `FILE, line 3` or `FILE, row 3`.
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
    /// Place of the record.
    pub place: Place,
    /// Fields of the record, by name.
    pub fields: Map<String, Value>,
}

/// An error of a file: what is wrong, where, and what to do.
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
        "{place}: the file expands to more than {EXPANSION} times its size; decompress and check it"
    )]
    Bomb { place: Place },
    #[error(
        "{place}: longer than {}, the limit for a line of text or a record",
        ByteSize(LINE as u64)
    )]
    LongLine { place: Place },
    #[error("{place}: more than {VALUES} values, the limit for a record")]
    ManyValues { place: Place },
    #[error(
        "{}: more than {} of text, the limit for one text; take fewer `documents` or `questions`, \
         or a shorter text",
        path.display(), ByteSize(TEXT as u64)
    )]
    LongText { path: PathBuf },
    #[error("{place}: not UTF-8 text")]
    NotText { place: Place },
    #[error("{place}: expected a JSON object: {problem}")]
    NotAnObject { place: Place, problem: String },
    #[error("{}: {what}", path.display())]
    Other { path: PathBuf, what: &'static str },
    #[error("{}: not a valid Parquet file: {source}", path.display())]
    Parquet { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{place}: no field `{field}`; there is {known}")]
    NoField { place: Place, field: String, known: String },
    #[error("{place}: `{field}` must be {expected}, found {found}")]
    Mistyped { place: Place, field: String, expected: &'static str, found: String },
}

impl Record {
    /// The field of this name. If no field is named `a.b`, it is the field `b` of the object `a`.
    ///
    /// # Errors
    /// If there is no such field.
    pub fn field(&self, name: &str) -> Result<&Value, Error> {
        find(&self.fields, name).ok_or_else(|| {
            let mut known = Vec::new();
            names(&self.fields, "", &mut known);
            no_field(self.place.clone(), name, &known)
        })
    }

    /// The text of a field.
    ///
    /// # Errors
    /// If there is no such field, or it is not a text.
    pub fn text(&self, name: &str) -> Result<&str, Error> {
        let value = self.field(name)?;
        value.as_str().ok_or_else(|| self.mistyped(name, "a string", value))
    }

    /// The texts of a field that is a list of texts.
    ///
    /// # Errors
    /// If there is no such field, or it is not a list of texts.
    pub fn texts(&self, name: &str) -> Result<Vec<&str>, Error> {
        let value = self.field(name)?;
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.mistyped(name, "a list of strings", value))
    }

    /// The error of a field with the wrong type.
    pub fn mistyped(&self, name: &str, expected: &'static str, found: &Value) -> Error {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(40) {
            found.truncate(end);
            found.push('…');
        }
        Error::Mistyped { place: self.place.clone(), field: name.into(), expected, found }
    }
}

/// The field of this name in an object.
fn find<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let inside = |(dot, _)| match fields.get(&name[..dot]) {
        Some(Value::Object(inner)) => find(inner, &name[dot + 1..]),
        _ => None,
    };
    fields.get(name).or_else(|| name.match_indices('.').find_map(inside))
}

/// The names of an object's fields, those of nested objects included, as [`find`] takes them.
fn names(fields: &Map<String, Value>, before: &str, known: &mut Vec<String>) {
    for (name, value) in fields {
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                names(inner, &format!("{before}{name}."), known);
            }
            _ => known.push(format!("{before}{name}")),
        }
    }
}

/// Maximum number of fields that the error of a missing field names.
const NAMED: usize = 20;

fn no_field(place: Place, field: &str, known: &[String]) -> Error {
    let mut named: Vec<_> = known.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
    match known.len() {
        0 => named.push("none".into()),
        NAMED.. if known.len() > NAMED => named.push(format!("{} more", known.len() - NAMED)),
        _ => {}
    }
    Error::NoField { place, field: field.into(), known: named.join(", ") }
}

/// The records of a file of JSON or Parquet. With a `field`, other columns of a Parquet file are
/// not read.
///
/// # Errors
/// If the file cannot be opened, or is a Parquet file without that field.
pub fn records(path: &Path, field: Option<&str>) -> Result<Records, Error> {
    let reader = if Form::of(path) == Form::Parquet {
        #[cfg(not(feature = "parquet"))]
        {
            let _ = field;
            let what = "this barber was built without Parquet; build it with its feature `parquet`";
            return Err(Error::Other { path: path.to_owned(), what });
        }
        #[cfg(feature = "parquet")]
        Reader::Rows(Box::new(parquet::records(path, field)?))
    } else {
        let mut stream = Stream::open(path)?;
        if stream.begins_list()? {
            Reader::List(Elements::new(stream))
        } else {
            Reader::Lines(Lines(stream))
        }
    };
    Ok(Records(reader))
}

/// The records of a file, in order.
pub struct Records(Reader);

enum Reader {
    Lines(Lines),
    List(Elements),
    #[cfg(feature = "parquet")]
    Rows(Box<dyn Iterator<Item = Result<Record, Error>>>),
}

impl Iterator for Records {
    type Item = Result<Record, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Reader::Lines(lines) => loop {
                match lines.next()? {
                    Ok(line) if line.trim().is_empty() => {}
                    Ok(line) => return Some(record(lines.0.place(), &line)),
                    Err(error) => return Some(Err(error)),
                }
            },
            Reader::List(elements) => {
                let element = elements.next()?;
                Some(element.and_then(|(place, element)| record(place, &element)))
            }
            #[cfg(feature = "parquet")]
            Reader::Rows(rows) => rows.next(),
        }
    }
}

/// Parses a record from a JSON object.
fn record(place: Place, json: &str) -> Result<Record, Error> {
    if json.len() > VALUES && values(json) > VALUES {
        return Err(Error::ManyValues { place });
    }
    match serde_json::from_str(json) {
        Ok(fields) => Ok(Record { place, fields }),
        Err(e) => Err(Error::NotAnObject { place, problem: e.to_string() }),
    }
}

/// The lines of a text, compressed or not.
pub struct Lines(Stream);

/// The lines of a file; gzip and Zstandard are detected by their first bytes.
///
/// # Errors
/// If the file cannot be opened.
pub fn open(path: &Path) -> Result<Lines, Error> {
    Stream::open(path).map(Lines)
}

/// Maximum number of values in a JSON text: one per comma, and a first one in each list and object.
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

impl Iterator for Lines {
    type Item = Result<String, Error>;

    /// The next line, with its line break.
    fn next(&mut self) -> Option<Self::Item> {
        self.0.line()
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
        records(path, None).unwrap().map(|record| record.map_err(|e| e.to_string())).collect()
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
            assert_eq!(Form::of(&path), Form::Json);
            let found: Vec<Record> = all(&path).into_iter().map(Result::unwrap).collect();
            assert_eq!(found.len(), 2);
            assert_eq!(found[0].text("text").unwrap(), "one");
            assert_eq!(found[0].texts("n.a").unwrap(), ["x"]);
            let place = format!("{}, line 3", path.display());
            assert_eq!(found[1].place.to_string(), place);
            let error = found[1].text("text").unwrap_err().to_string();
            assert_eq!(error, format!("{place}: `text` must be a string, found 2"));
            let error = found[0].text("txt").unwrap_err().to_string();
            assert!(error.ends_with("line 1: no field `txt`; there is `text`, `n.a`"), "{error}");
        }
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
    }
}
