//! Parquet files. The `parquet` crate allocates the size that a page claims, holds lists of any
//! length, follows schemas of any depth, and panics on some damage. All of this is checked here,
//! before the crate sees the bytes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, OnceLock, atomic},
};

use bytes::Bytes;
use parquet::{
    basic::{ConvertedType, Repetition},
    data_type::ByteArray,
    errors::{ParquetError, Result},
    file::{
        reader::{ChunkReader, FileReader, Length},
        serialized_reader::SerializedFileReader,
    },
    record::{Field, reader::RowIter},
    schema::types::{SchemaDescriptor, Type, TypePtr},
};
use serde_json::{Map, Value};

use super::{
    Error, Place, Record, io_error, no_field,
    stream::{GZIP, ZSTANDARD},
};
use crate::{catch_panic::catch_panic, files};

/// Maximum bytes of a footer, which describes the columns of each row group.
const FOOTER: u64 = 4 << 20;
/// Maximum number of elements of a schema: columns, and groups of columns.
const ELEMENTS: u64 = 256;
/// Maximum bytes of the pages held at a time, one of each column that is read, and of the
/// dictionaries.
const PAGES: u64 = 128 << 20;
/// Maximum number of values in all columns of lists that are read.
const LISTED: u64 = 1 << 22;
/// Bytes of a dictionary's value in memory, without its text.
const VALUE: u64 = size_of::<ByteArray>() as u64;

/// The rows of a file as records, up to the first that cannot be read. With a `field`, other
/// columns are not read.
///
/// # Errors
/// If the file cannot be opened, or has no such field.
pub(super) fn records(
    path: &Path,
    field: Option<&str>,
) -> std::result::Result<impl Iterator<Item = std::result::Result<Record, Error>> + use<>, Error> {
    let mut file = files::open(path).map_err(|e| io_error(path, e))?;
    let mut start = Vec::new();
    file.by_ref().take(4).read_to_end(&mut start).map_err(|e| io_error(path, e))?;
    if start.starts_with(GZIP) || start.starts_with(ZSTANDARD) {
        let what = "a Parquet file that is compressed as a whole; decompress it";
        return Err(Error::Other { path: path.to_owned(), what });
    }
    let path = path.to_owned();
    let place = |path: &Path, number| Place { path: path.to_owned(), unit: "row", number };
    let wrong = |path: &Path, source: ParquetError| Error::Parquet {
        path: path.to_owned(),
        source: source.into(),
    };
    let table = Table::open(file).map_err(|source| wrong(&path, source))?;
    if let Some(field) = field
        && !table.has(field)
    {
        return Err(no_field(place(&path, 1), field, &table.fields()));
    }
    let mut rows = Some(table.rows(field).map_err(|source| wrong(&path, source))?);
    let mut number = 0;
    Ok(std::iter::from_fn(move || {
        let row = rows.as_mut()?.next()?;
        number += 1;
        if row.is_err() {
            rows = None;
        }
        let row = row.map_err(|source| wrong(&path, source));
        Some(row.map(|fields| Record { place: place(&path, number), fields }))
    }))
}

/// A file whose footer was read.
pub(super) struct Table {
    reader: SerializedFileReader<Pages>,
    bounds: Arc<OnceLock<Bounds>>,
}

/// The rows of a file, in order.
pub(super) struct Rows(RowIter<'static>);

impl Table {
    pub(super) fn open(mut file: File) -> Result<Self> {
        check_footer(&mut file)?;
        let bounds = Arc::new(OnceLock::new());
        let pages = Pages { file, bounds: bounds.clone(), headers: Mutex::default() };
        let reader = caught(|| SerializedFileReader::new(pages))?;
        Ok(Self { reader, bounds })
    }

    fn schema(&self) -> &SchemaDescriptor {
        self.reader.metadata().file_metadata().schema_descr()
    }

    /// The names of the fields, see [`super::Record::field`].
    pub(super) fn fields(&self) -> Vec<String> {
        fn add(group: &Type, before: &str, fields: &mut Vec<String>) {
            for field in group.get_fields() {
                let name = format!("{before}{}", field.name());
                let info = field.get_basic_info();
                // Lists and maps are groups, too.
                let repeated = info.has_repetition() && info.repetition() == Repetition::REPEATED;
                let plain = info.converted_type() == ConvertedType::NONE
                    && info.logical_type_ref().is_none()
                    && !repeated;
                match field.is_group() && plain {
                    true => add(field, &format!("{name}."), fields),
                    false => fields.push(name),
                }
            }
        }
        let mut fields = Vec::new();
        add(self.schema().root_schema(), "", &mut fields);
        fields
    }

    /// Whether a column has this field, see [`super::Record::field`].
    pub(super) fn has(&self, field: &str) -> bool {
        self.schema().root_schema().get_fields().iter().any(|column| holds(column, field))
    }

    /// The rows; with a `field`, only its column is read.
    pub(super) fn rows(self, field: Option<&str>) -> Result<Rows> {
        caught(move || {
            let root = self.schema().root_schema();
            let columns = root.get_fields().iter();
            let columns = columns.filter(|column| field.is_none_or(|field| holds(column, field)));
            let columns = columns.cloned().collect();
            let root = Type::group_type_builder(root.name()).with_fields(columns).build()?;
            let bounds = Bounds::of(&self.reader, &SchemaDescriptor::new(Arc::new(root.clone())));
            self.bounds.get_or_init(|| bounds);
            let rows = RowIter::from_file_into(Box::new(self.reader)).project(Some(root))?;
            // Values that are read ahead would keep their pages in memory.
            Ok(Rows(rows.with_batch_size(1)))
        })
    }
}

/// Whether a top-level column has this field: the column of the same name, or the group `a` for
/// `a.b`.
fn holds(column: &TypePtr, field: &str) -> bool {
    let rest = field.strip_prefix(column.name());
    rest.is_some_and(|rest| rest.is_empty() || (rest.starts_with('.') && column.is_group()))
}

impl Iterator for Rows {
    type Item = Result<Map<String, Value>>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = catch_panic(|| self.0.next()).unwrap_or_else(|problem| Some(wrong(problem)))?;
        Some(row.map(|row| object(row.get_column_iter())))
    }
}

fn wrong<T>(problem: impl Into<String>) -> Result<T> {
    Err(ParquetError::General(problem.into()))
}

fn caught<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_panic(call).unwrap_or_else(wrong)
}

/// Checks that the footer exists, and that it and its schema are within the limits.
fn check_footer(file: &mut File) -> Result<()> {
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
        Some(..=ELEMENTS) => Ok(()),
        Some(elements) => {
            wrong(format!("a schema of {elements} elements; at most {ELEMENTS} are read"))
        }
        None => wrong("a footer that starts with no schema"),
    }
}

/// The limits of the pages of a file.
struct Bounds {
    /// Maximum bytes of a page, and of a dictionary in memory.
    page: u64,
    /// Byte ranges of the columns of lists.
    lists: Vec<Range<u64>>,
    /// Number of values of these columns so far.
    listed: atomic::AtomicU64,
}

impl Bounds {
    /// The limits for the columns that are read.
    fn of(reader: &SerializedFileReader<Pages>, read: &SchemaDescriptor) -> Self {
        let lists = read.columns().iter().filter(|column| column.max_rep_level() > 0);
        let lists: Vec<_> = lists.map(|column| column.path()).collect();
        let groups = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
        let lists = groups.filter(|column| lists.contains(&column.column_path())).map(|column| {
            let (start, length) = column.byte_range();
            start..start.saturating_add(length)
        });
        Self {
            page: PAGES / (read.num_columns() as u64).max(1),
            lists: lists.collect(),
            listed: atomic::AtomicU64::new(0),
        }
    }

    /// Checks that the page at this offset is within the limits.
    fn check(&self, start: u64, page: Page) -> Result<()> {
        let most = self.page;
        if page.expanded > most {
            return wrong(format!("a page of {} bytes; at most {most} are read", page.expanded));
        }
        if page.dictionary {
            let held = page.expanded.saturating_add(page.values.saturating_mul(VALUE));
            if held > most {
                return wrong(format!(
                    "a dictionary that takes {held} bytes in memory; at most {most} are read"
                ));
            }
        } else if self.lists.iter().any(|list| list.contains(&start)) {
            let before = self.listed.fetch_add(page.values, atomic::Ordering::Relaxed);
            if before.saturating_add(page.values) > LISTED {
                return wrong(format!("more than {LISTED} values in lists"));
            }
        }
        Ok(())
    }
}

/// A file that returns only pages within the limits.
struct Pages {
    file: File,
    /// The limits, once the footer was read; from then on, only pages are read.
    bounds: Arc<OnceLock<Bounds>>,
    /// The headers of pages that were not read yet, by the offset after the header.
    headers: Mutex<BTreeMap<u64, Page>>,
}

/// The header of a page.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    /// Bytes of the expanded page.
    expanded: u64,
    /// Bytes at the start that are not compressed.
    levels: usize,
    /// Number of values.
    values: u64,
    /// Whether the page is a dictionary.
    dictionary: bool,
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for Pages {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        // For some pages the reader comes here a second time, at the offset after the header.
        let known = || self.headers.lock().is_ok_and(|headers| headers.contains_key(&start));
        if let Some(bounds) = self.bounds.get()
            && !known()
        {
            let (page, length) = self.header(start)?;
            bounds.check(start, page)?;
            if let Ok(mut headers) = self.headers.lock() {
                headers.insert(start + length, page);
            }
        }
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let page = self.headers.lock().ok().and_then(|mut headers| headers.remove(&start));
        let most = self.bounds.get().map_or(FOOTER, |bounds| bounds.page.max(FOOTER));
        if length as u64 > most {
            return wrong(format!("a page of {length} bytes; at most {most} are read"));
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

impl Pages {
    /// The header of a page, and its length, which may be large: old writers include extreme
    /// values.
    fn header(&self, start: u64) -> Result<(Page, u64)> {
        let rest = self.file.len().saturating_sub(start);
        for window in [1 << 10, 1 << 18] {
            let bytes = self.file.get_bytes(start, rest.min(window) as usize)?;
            let mut thrift = Thrift::new(&bytes);
            if let Some(page) = thrift.page() {
                return Ok((page, (bytes.len() - thrift.bytes.len()) as u64));
            }
        }
        wrong("a page without a valid header")
    }
}

/// Whether a page of a stream format, which has no length, expands to more bytes than its header
/// says.
fn expands_beyond(bytes: &[u8], page: Page) -> bool {
    let stream = bytes.get(page.levels..).unwrap_or_default();
    let most = page.expanded.saturating_add(1);
    let mut sink = io::sink();
    // The reader reports broken streams.
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

/// A reader of Thrift's compact protocol that interprets numbers exactly like the crate, and
/// rejects values of the wrong type.
struct Thrift<'a> {
    /// The unread bytes.
    bytes: &'a [u8],
}

/// Types of fields.
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const STRUCT: u8 = 12;

/// Maximum nesting of skipped fields.
const DEPTH: u8 = 16;

impl<'a> Thrift<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    /// A number of variable length; overlong encodings are accepted.
    fn varint(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0, 0u32);
        loop {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).wrapping_shl(shift);
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift = shift.wrapping_add(7);
        }
    }

    fn i64(&mut self) -> Option<i64> {
        let zigzag = self.varint()?;
        Some((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    /// A number, truncated to 32 bits.
    fn i32(&mut self) -> Option<i32> {
        self.i64().map(|value| value as i32)
    }

    /// The number and type of the field after `last`; `Some(None)` at the end of a struct.
    #[allow(clippy::option_option, reason = "broken, at its end, or a field")]
    fn field(&mut self, last: &mut i16) -> Option<Option<(i16, u8)>> {
        let header = self.byte()?;
        let kind = header & 0xf;
        if kind == 0 {
            return Some(None);
        }
        *last = match header >> 4 {
            0 => self.i64()? as i16,
            delta => last.checked_add(i16::from(delta))?,
        };
        Some(Some((*last, kind)))
    }

    /// The type and number of a list's elements.
    fn list(&mut self) -> Option<(u8, u64)> {
        let header = self.byte()?;
        let size = match header >> 4 {
            15 => self.varint()?,
            size => u64::from(size),
        };
        Some((header & 0xf, size))
    }

    fn skip(&mut self, kind: u8, depth: u8) -> Option<()> {
        match kind {
            TRUE | FALSE => {}
            BYTE => drop(self.byte()?),
            I16 | I32 | I64 => drop(self.varint()?),
            DOUBLE => self.bytes = self.bytes.get(8..)?,
            BINARY => {
                let length = usize::try_from(self.varint()?).ok()?;
                self.bytes = self.bytes.get(length..)?;
            }
            LIST | SET => {
                let (kind, size) = self.list()?;
                // A Boolean in a list takes one byte.
                let kind = if matches!(kind, TRUE | FALSE) { BYTE } else { kind };
                for _ in 0..size {
                    self.skip(kind, depth.checked_sub(1)?)?;
                }
            }
            STRUCT => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip(kind, depth.checked_sub(1)?)?;
                }
            }
            // Headers have no maps.
            _ => return None,
        }
        Some(())
    }

    /// Number of elements of a footer's schema, which comes after the version.
    fn schema(mut self) -> Option<u64> {
        let mut last = 0;
        let version = self.field(&mut last)? == Some((1, I32));
        self.varint().filter(|_| version)?;
        let list = self.field(&mut last)? == Some((2, LIST));
        self.list().filter(|_| list).map(|(_, size)| size)
    }

    /// Reads the header of a page.
    fn page(&mut self) -> Option<Page> {
        let (mut last, mut expanded, mut compressed) = (0, None, None);
        let (mut levels, mut values, mut dictionary) = (0, 0, false);
        while let Some(field) = self.field(&mut last)? {
            match field {
                (2, I32) => expanded = Some(self.i32()?),
                (3, I32) => compressed = Some(self.i32()?),
                // The page's type, and a checksum.
                (1 | 4, I32) => drop(self.i32()?),
                (5, STRUCT) => [values] = self.numbers([1])?,
                (7, STRUCT) => ([values], dictionary) = (self.numbers([1])?, true),
                (8, STRUCT) => {
                    let [all, definitions, repetitions] = self.numbers([1, 5, 6])?;
                    (values, levels) = (all, definitions.checked_add(repetitions)?);
                }
                (6, STRUCT) => self.skip(STRUCT, DEPTH)?,
                (1..=8, _) => return None,
                (_, kind) => self.skip(kind, DEPTH)?,
            }
        }
        compressed?;
        let expanded = u64::try_from(expanded?).ok()?;
        Some(Page { expanded, levels, values: values as u64, dictionary })
    }

    /// Some non-negative numbers of a struct; zero if missing.
    fn numbers<const N: usize>(&mut self, fields: [i16; N]) -> Option<[usize; N]> {
        let (mut last, mut numbers) = (0, [0; N]);
        while let Some((field, kind)) = self.field(&mut last)? {
            match fields.iter().position(|wanted| *wanted == field) {
                Some(i) if kind == I32 => numbers[i] = usize::try_from(self.i32()?).ok()?,
                Some(_) => return None,
                None => self.skip(kind, DEPTH)?,
            }
        }
        Some(numbers)
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
        // Some writers do not mark bytes as text.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => object(row.get_column_iter()).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Barber reads no fields with dates, decimals or maps.
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
        // and 3, and a field that is not known; one that ends early.
        let page =
            |expanded, levels, values| Some(Page { expanded, levels, values, dictionary: false });
        let first = [0x15, 0, 0x15, 0x80, 2, 0x15, 0x80, 1, 0x2c, 0x15, 14, 0, 0];
        assert_eq!(Thrift::new(&first).page(), page(128, 0, 7));
        let second = [0x15, 6, 0x15, 16, 0x15, 16, 0x5c, 0x15, 2, 0x15, 2, 0x15, 2, 0x15, 0];
        let levels = [0x15, 4, 0x15, 6, 0x11, 0, 0x18, 1, b'x', 0];
        assert_eq!(Thrift::new(&[&second[..], &levels].concat()).page(), page(8, 5, 1));
        // A dictionary.
        let header = [0x15, 4, 0x15, 16, 0x15, 16, 0x4c, 0x15, 6, 0x15, 0, 0, 0];
        let dictionary = Page { expanded: 8, levels: 0, values: 3, dictionary: true };
        assert_eq!(Thrift::new(&header).page(), Some(dictionary));
        // Its number written in three bytes, as 6 + 2³⁵; of another type.
        let overlong =
            [0x15, 4, 0x15, 16, 0x15, 16, 0x4c, 0x15, 0x86, 0x80, 0x80, 0x80, 0x80, 1, 0, 0];
        assert_eq!(Thrift::new(&overlong).page(), Some(dictionary));
        assert_eq!(Thrift::new(&[0x15, 4, 0x18, 1, b'x', 0x15, 16, 0]).page(), None);
        assert_eq!(Thrift::new(&[0x15, 0, 0x15]).page(), None);
        assert_eq!(Thrift::new(b"any other bytes").page(), None);
    }

    #[test]
    fn what_takes_memory_is_bounded() {
        let lists = std::iter::once(100..200).collect();
        let bounds = Bounds { page: 1000, lists, listed: atomic::AtomicU64::new(0) };
        let check = |start, page| bounds.check(start, page).map_err(|e| e.to_string());
        let page = Page { expanded: 1000, levels: 0, values: LISTED, dictionary: false };
        assert_eq!(check(0, page), Ok(()));
        assert!(check(0, Page { expanded: 1001, ..page }).unwrap_err().contains("a page of 1001"));
        // What counts of a dictionary is what it takes in memory, however long its values are.
        let dictionary = Page { expanded: 1000 - VALUE, values: 1, dictionary: true, ..page };
        assert_eq!(check(0, dictionary), Ok(()));
        let error = check(0, Page { values: 2, ..dictionary }).unwrap_err();
        assert!(error.contains("a dictionary that takes 1032 bytes"), "{error}");
        assert!(check(0, Page { values: u64::MAX, ..dictionary }).is_err());
        // All lists together.
        assert_eq!(check(100, page), Ok(()));
        assert!(check(199, Page { values: 1, ..page }).unwrap_err().contains("values in lists"));
        assert_eq!(check(200, page), Ok(()));
    }

    /// Writes strings, ids beside them and a column of lists, with dictionaries as large as they
    /// become.
    fn write(path: &std::path::Path, documents: &[String]) {
        use parquet::{
            column::writer::ColumnWriter,
            file::{properties::WriterProperties, writer::SerializedFileWriter},
            schema::parser::parse_message_type,
        };
        let schema = "message m {
            required binary text (utf8); required binary id (utf8);
            optional group meta { required binary a.b (utf8); }
            repeated int32 numbers; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_compression(parquet::basic::Compression::SNAPPY)
            .set_dictionary_page_size_limit(usize::MAX)
            .build();
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts: Vec<ByteArray> = documents.iter().map(|text| text.as_str().into()).collect();
        while let Some(mut column) = group.next_column().unwrap() {
            match column.untyped() {
                ColumnWriter::ByteArrayColumnWriter(column) => {
                    let levels = vec![1; texts.len()];
                    column.write_batch(&texts, Some(&levels), None).unwrap();
                }
                ColumnWriter::Int32ColumnWriter(column) => {
                    let levels = vec![0; texts.len()];
                    column.write_batch(&[], Some(&levels), Some(&levels)).unwrap();
                }
                _ => unreachable!(),
            }
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn large_dictionaries_of_long_texts_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.parquet");
        // Two and a half times what a dictionary of two-byte values could be.
        let document = |i: usize| format!("{i} {}", "a page of the web ".repeat(1000));
        let documents: Vec<String> = (0..150).map(document).collect();
        write(&path, &documents);
        let open = || Table::open(File::open(&path).unwrap()).unwrap();
        assert_eq!(open().fields(), ["text", "id", "meta.a.b", "numbers"]);
        for field in [None, Some("text"), Some("meta.a.b")] {
            let rows: Vec<_> = open().rows(field).unwrap().map(Result::unwrap).collect();
            assert_eq!(rows.len(), documents.len());
            for (row, document) in rows.iter().zip(&documents) {
                let text = match field {
                    Some("meta.a.b") => &row["meta"]["a.b"],
                    _ => &row["text"],
                };
                assert_eq!(text, document);
                // What is not wanted is not read.
                assert_eq!(row.len(), if field.is_some() { 1 } else { 4 });
            }
        }
        assert!(open().has("meta.a.b") && open().has("id"));
        assert!(!open().has("text.b") && !open().has("tex") && !open().has(""));
    }

    #[test]
    fn rows_are_records() {
        let path = Path::new("tests/fixtures/records.parquet");
        let found: Vec<Record> = records(path, None).unwrap().map(Result::unwrap).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[1].text("text").unwrap(), "the second document");
        assert_eq!(found[2].texts("choices.label").unwrap(), ["A", "B"]);
        assert_eq!(found[0].field("label").unwrap(), &Value::from(1));
        assert_eq!(found[2].place.to_string(), format!("{}, row 3", path.display()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.parquet");
        std::fs::write(&path, b"PAR1 and no more").unwrap();
        let error = records(&path, None).err().unwrap().to_string();
        assert!(error.contains("not a valid Parquet file"), "{error}");
    }
}
