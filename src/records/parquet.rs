//! Parquet files. The `parquet` crate allocates what a page says that it expands to, follows a schema
//! as deep as it goes and panics on some damage: all of that is bounded here, before the crate sees
//! the bytes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    sync::Mutex,
};

use bytes::Bytes;
use parquet::{
    errors::{ParquetError, Result},
    file::{
        reader::{ChunkReader, Length},
        serialized_reader::SerializedFileReader,
    },
    record::{Field, reader::RowIter},
};
use serde_json::{Map, Value};

use crate::guard::guarded;

/// Bytes of a footer, which describes the columns of each row group.
const FOOTER: u64 = 4 << 20;
/// Elements of a schema: columns, and the groups that they are in.
const ELEMENTS: u64 = 256;
/// Bytes of the pages, one of each column, that are held at a time.
const PAGES: u64 = 128 << 20;
/// Bytes of a dictionary, whose values take sixteen times as much; or a sixteenth of a page's, if
/// that is more. Writers go on without one where it would be larger.
const DICTIONARY: u64 = 1 << 20;

/// The rows of a file, in order.
pub(super) struct Rows(RowIter<'static>);

impl Rows {
    pub(super) fn open(mut file: File) -> Result<Self> {
        let (footer, elements) = footer(&mut file)?;
        let pages = Pages { file, footer, most: PAGES / elements, headers: Mutex::default() };
        let reader = caught(|| SerializedFileReader::new(pages))?;
        Ok(Self(RowIter::from_file_into(Box::new(reader))))
    }
}

impl Iterator for Rows {
    type Item = Result<Map<String, Value>>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = guarded(|| self.0.next()).unwrap_or_else(|problem| Some(wrong(problem)))?;
        Some(row.map(|row| object(row.get_column_iter())))
    }
}

fn wrong<T>(problem: impl Into<String>) -> Result<T> {
    Err(ParquetError::General(problem.into()))
}

fn caught<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    guarded(call).unwrap_or_else(wrong)
}

/// Where the footer starts, and how many elements its schema has.
fn footer(file: &mut File) -> Result<(u64, u64)> {
    let length = file.seek(SeekFrom::End(0))?;
    let mut tail = [0; 8];
    file.seek(SeekFrom::Start(length.saturating_sub(8)))?;
    file.read_exact(&mut tail)?;
    let [a, b, c, d, magic @ ..] = tail;
    let size = u64::from(u32::from_le_bytes([a, b, c, d]));
    let start = length.checked_sub(8 + size).filter(|_| magic == *b"PAR1");
    let Some(start) = start else { return wrong("no footer at its end") };
    if size > FOOTER {
        return wrong(format!("a footer of {size} bytes; at most {FOOTER} are read"));
    }
    let mut bytes = vec![0; size as usize];
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut bytes)?;
    match Thrift::new(&bytes).schema() {
        Some(elements) if elements <= ELEMENTS => Ok((start, elements.max(1))),
        Some(elements) => wrong(format!("a schema of {elements} elements; {ELEMENTS} are most")),
        None => wrong("a footer that starts with no schema"),
    }
}

/// A file that hands out pages within their bounds.
struct Pages {
    file: File,
    footer: u64,
    /// Bytes of a page.
    most: u64,
    /// What was said of pages that were not read yet, by where their headers start.
    headers: Mutex<BTreeMap<u64, Page>>,
}

/// What a page's header says of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    /// Bytes that it expands to.
    expanded: u64,
    /// Bytes at its start that are not compressed.
    levels: usize,
    /// The number of its values, if it is a dictionary.
    values: Option<u64>,
}

impl Page {
    /// That it is within its bounds, `most` bytes.
    fn check(self, most: u64) -> Result<()> {
        let Self { expanded, values, .. } = self;
        if expanded > most {
            return wrong(format!("a page of {expanded} bytes; {most} are most"));
        }
        let Some(values) = values else { return Ok(()) };
        let most = DICTIONARY.max(most / 16);
        if expanded > most {
            return wrong(format!("a dictionary of {expanded} bytes; {most} are most"));
        }
        // A value has at least two bytes.
        if values > expanded / 2 {
            return wrong(format!("a dictionary of {values} values in {expanded} bytes"));
        }
        Ok(())
    }
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for Pages {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        if start < self.footer {
            let length = self.footer - start;
            let bytes = self.file.get_bytes(start, length.min(64) as usize)?;
            // The reader comes here a second time for some pages, behind the header.
            if let Some(page) = Thrift::new(&bytes).page() {
                page.check(self.most)?;
                if let Ok(mut headers) = self.headers.lock() {
                    headers.insert(start, page);
                }
            }
        }
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let page =
            self.headers.lock().ok().filter(|_| start < self.footer).and_then(|mut headers| {
                let (&header, _) = headers.range(..start).next_back()?;
                headers.remove(&header)
            });
        if length as u64 > self.most.max(FOOTER) {
            return wrong(format!("a page of {length} bytes; {} are most", self.most));
        }
        let bytes = self.file.get_bytes(start, length)?;
        match page {
            Some(page) if expands_beyond(&bytes, page) => {
                wrong(format!("a page that expands beyond its {} bytes", page.expanded))
            }
            _ => Ok(bytes),
        }
    }
}

/// Whether a page of a stream format, which ends where it likes, has more in it than it says.
fn expands_beyond(bytes: &[u8], page: Page) -> bool {
    let stream = bytes.get(page.levels..).unwrap_or_default();
    let most = page.expanded.saturating_add(1);
    let mut sink = io::sink();
    // What is broken is for the reader to say.
    let found = if stream.starts_with(&[0x1f, 0x8b]) {
        io::copy(&mut flate2::read::MultiGzDecoder::new(stream).take(most), &mut sink).ok()
    } else if stream.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder = zstd::Decoder::new(stream).ok();
        decoder.and_then(|decoder| io::copy(&mut decoder.take(most), &mut sink).ok())
    } else {
        None
    };
    found == Some(most)
}

/// As much of Thrift's compact protocol as it takes to see sizes.
struct Thrift<'a> {
    bytes: &'a [u8],
    /// The number of the last field.
    field: u64,
}

/// Types of fields.
const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

impl<'a> Thrift<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, field: 0 }
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    /// However many bytes it has: the crate takes overlong ones, and so must what sees through them.
    fn varint(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).wrapping_shl(shift);
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    }

    /// A number that is not negative.
    fn number(&mut self) -> Option<u64> {
        self.varint().filter(|zigzag| zigzag % 2 == 0).map(|zigzag| zigzag / 2)
    }

    /// The number and type of the next field.
    fn next(&mut self) -> Option<(u64, u8)> {
        let header = self.byte()?;
        self.field = match header >> 4 {
            0 => self.number()?,
            delta => self.field + u64::from(delta),
        };
        Some((self.field, header & 0xf))
    }

    /// How many elements the schema of a footer has; it comes after the version.
    fn schema(mut self) -> Option<u64> {
        let version = self.next()? == (1, I32);
        self.varint().filter(|_| version)?;
        let list = self.next()? == (2, LIST);
        match self.byte().filter(|_| list)? >> 4 {
            15 => self.varint(),
            size => Some(u64::from(size)),
        }
    }

    /// What the header of a page says.
    fn page(mut self) -> Option<Page> {
        // Its type, its sizes, perhaps a checksum; then what there is to its type.
        let mut sizes = [0; 3];
        for (i, size) in sizes.iter_mut().enumerate() {
            let field = self.next()? == (1 + i as u64, I32);
            *size = self.number().filter(|_| field)?;
        }
        let mut page = Page { expanded: sizes[1], levels: 0, values: None };
        let mut next = self.next();
        if next == Some((4, I32)) {
            self.varint();
            next = self.next();
        }
        if next == Some((7, STRUCT)) {
            self.field = 0;
            let count = self.next()? == (1, I32);
            page.values = Some(self.number().filter(|_| count)?);
        }
        if next != Some((8, STRUCT)) {
            return Some(page);
        }
        // Of the second version, whose levels are not compressed: the lengths of both.
        self.field = 0;
        while let Some((field, I32)) = self.next() {
            let number = self.varint()?;
            if field == 5 || field == 6 {
                page.levels = page.levels.saturating_add(usize::try_from(number / 2).ok()?);
            }
        }
        Some(page)
    }
}

fn object<'a>(columns: impl Iterator<Item = (&'a String, &'a Field)>) -> Map<String, Value> {
    columns.map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out that their bytes are text.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => object(row.get_column_iter()).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Dates, decimals and maps are in no field that Barber reads.
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_seen_through() {
        // Version 1, 3 elements; 300 elements; no version.
        assert_eq!(Thrift::new(&[0x15, 2, 0x19, 0x3c]).schema(), Some(3));
        assert_eq!(Thrift::new(&[0x15, 2, 0x19, 0xfc, 0xac, 2]).schema(), Some(300));
        assert_eq!(Thrift::new(&[0x29, 0x3c]).schema(), None);
        // A data page of 64 bytes that expands to 128; one of the second version with levels of 2
        // and 3; one that ends early.
        let page = |expanded, levels| Some(Page { expanded, levels, values: None });
        assert_eq!(
            Thrift::new(&[0x15, 0, 0x15, 0x80, 2, 0x15, 0x80, 1, 0x2c]).page(),
            page(128, 0)
        );
        let second = [0x15, 6, 0x15, 16, 0x15, 16, 0x5c, 0x15, 2, 0x15, 2, 0x15, 2, 0x15, 0];
        let levels = [0x15, 4, 0x15, 6, 0x11, 0];
        assert_eq!(Thrift::new(&[&second[..], &levels].concat()).page(), page(8, 5));
        // A dictionary.
        let header = [0x15, 4, 0x15, 16, 0x15, 16, 0x4c, 0x15, 6];
        let dictionary = Page { expanded: 8, levels: 0, values: Some(3) };
        assert_eq!(Thrift::new(&header).page(), Some(dictionary));
        assert!(dictionary.check(8).is_ok() && dictionary.check(7).is_err());
        assert!(Page { values: Some(5), ..dictionary }.check(8).is_err());
        assert_eq!(Thrift::new(&[0x15, 0, 0x15]).page(), None);
        assert_eq!(Thrift::new(b"any other bytes").page(), None);
    }
}
