//! The texts of a recipe, files and assignments: their TOML, and the place of every key.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::Arc,
};

use figment::value::{Dict, Tag, Value};
use toml::de::{DeTable, DeValue};

use super::error::{Excerpt, Fault, Problem, RecipeError};
use crate::limits;

/// Maximum nesting that is looked into; recipes are less deep.
const DEPTH: usize = 16;

/// A text with keys in it.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// Name of the text, as the user sees it.
    pub(super) name: String,
    text: Arc<str>,
    places: BTreeMap<Vec<String>, Place>,
    /// Byte offsets of the ends of lines.
    ends: Vec<usize>,
}

/// The place of a key in a text.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) key: Range<usize>,
    pub(super) value: Range<usize>,
}

impl Text {
    fn new(name: &str, text: &str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let ends = ends.map(|(end, _)| end).collect();
        Self { name: name.into(), text: text.into(), places: BTreeMap::new(), ends }
    }

    /// Parses a file's text as TOML; the error has all problems of the syntax.
    pub(super) fn parse(name: &str, text: &str) -> Result<(Self, Dict), Vec<Problem>> {
        let mut this = Self::new(name, text);
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut problems: Vec<Problem> = Vec::new();
        let mut lines = BTreeSet::new();
        for error in errors {
            let mut problem = Problem::new(Vec::new(), Fault::Syntax(error.message().into()));
            if let Some(span) = error.span() {
                // One mistake may make several errors of the parser in a line; the first counts.
                if !lines.insert(this.line(span.start)) {
                    continue;
                }
                problem.origin = Some(this.origin(span.start));
                problem.excerpt = Some(this.excerpt(span));
            }
            problems.push(problem);
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let dict = this.table(table.get_ref(), 0, &mut Vec::new());
        Ok((this, dict))
    }

    /// Parses the value of an assignment to the key at `path`, at `place` in `text`: TOML, or a
    /// string without quotes.
    pub(super) fn assignment(
        name: &str,
        text: &str,
        path: &[String],
        place: Place,
    ) -> Result<(Self, Value), Problem> {
        let mut this = Self::new(name, text);
        let value = place.value.start;
        for length in 1..=path.len() {
            this.places.insert(path[..length].to_vec(), place.clone());
        }
        let written = &text[place.value];
        let found = match DeValue::parse(written) {
            Ok(found) => this.value(found.get_ref(), value, &mut path.to_vec()),
            // A value that starts like TOML is meant as TOML.
            Err(error) if written.starts_with(['[', '{', '"', '\'']) => {
                let mut problem =
                    Problem::new(path.to_vec(), Fault::Syntax(error.message().into()))
                        .help("a value that starts with a bracket or a quote is read as TOML");
                let span = error.span().unwrap_or(0..written.len());
                problem.excerpt = Some(this.excerpt(span.start + value..span.end + value));
                return Err(problem);
            }
            Err(_) => written.into(),
        };
        Ok((this, found))
    }

    /// The text with the key at `from` moved to `path`.
    pub(super) fn moved(&self, from: &[String], path: &[String]) -> Self {
        let below = self.places.range(from.to_vec()..);
        let below = below.map_while(|(key, place)| Some((key.strip_prefix(from)?, place)));
        let places = below.map(|(rest, place)| ([path, rest].concat(), place.clone())).collect();
        Self { name: self.name.clone(), text: self.text.clone(), places, ends: self.ends.clone() }
    }

    /// The place of the key at `path`.
    pub(super) fn place(&self, path: &[String]) -> Option<&Place> {
        self.places.get(path)
    }

    /// Whether an excerpt is from this text.
    pub(super) fn holds(&self, excerpt: &Excerpt) -> bool {
        Arc::ptr_eq(&self.text, &excerpt.text)
    }

    /// An excerpt of the text.
    pub(super) fn excerpt(&self, span: Range<usize>) -> Excerpt {
        let end = span.end.min(self.text.len());
        Excerpt {
            name: self.name.as_str().into(),
            text: self.text.clone(),
            span: span.start.min(end)..end,
        }
    }

    /// A place in the text, in words.
    pub(super) fn origin(&self, offset: usize) -> String {
        format!("{} line {}", self.name, self.line(offset))
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.ends.partition_point(|end| *end < offset)
    }

    /// A table's values; `start` is the offset of the parsed part in the text.
    fn table(&mut self, table: &DeTable<'_>, start: usize, path: &mut Vec<String>) -> Dict {
        let mut dict = Dict::new();
        for (key, value) in table {
            path.push(key.get_ref().clone().into_owned());
            self.note(path, start, key.span(), value.span());
            let value = self.value(value.get_ref(), start, path);
            path.pop();
            dict.insert(key.get_ref().clone().into_owned(), value);
        }
        dict
    }

    fn value(&mut self, value: &DeValue<'_>, start: usize, path: &mut Vec<String>) -> Value {
        match value {
            DeValue::Array(items) if path.len() < DEPTH => {
                let mut array = Vec::with_capacity(items.len());
                for (i, item) in items.iter().enumerate() {
                    path.push(i.to_string());
                    self.note(path, start, item.span(), item.span());
                    array.push(self.value(item.get_ref(), start, path));
                    path.pop();
                }
                Value::Array(Tag::Default, array)
            }
            DeValue::Table(table) if path.len() < DEPTH => {
                Value::Dict(Tag::Default, self.table(table, start, path))
            }
            other => scalar(other),
        }
    }

    fn note(&mut self, path: &[String], start: usize, key: Range<usize>, value: Range<usize>) {
        let within = |span: Range<usize>| span.start + start..span.end + start;
        self.places.insert(path.to_vec(), Place { key: within(key), value: within(value) });
    }
}

fn scalar(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(datetime) => datetime.to_string().into(),
        DeValue::Float(float) => match float.as_str().parse::<f64>() {
            Ok(value) => value.into(),
            Err(_) => float.as_str().into(),
        },
        DeValue::Integer(integer) => {
            match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(value) => value.into(),
                // Larger than TOML allows, and than any key: the types report it.
                Err(_) => match i128::from_str_radix(integer.as_str(), integer.radix()) {
                    Ok(value) => (value as f64).into(),
                    Err(_) => integer.as_str().into(),
                },
            }
        }
        DeValue::Array(_) => Vec::<Value>::new().into(),
        DeValue::Table(_) => Dict::new().into(),
    }
}

/// Reads a file; `what` says what it should be.
pub(super) fn read(path: &Path, what: &str) -> Result<String, RecipeError> {
    read_text(path).map_err(|why| {
        let name = path.display().to_string();
        let mut problem =
            Problem::new(Vec::new(), Fault::Read(why)).help(format!("give the path of {what}"));
        problem.origin = Some(name.clone());
        RecipeError::new(&name, vec![problem])
    })
}

/// The text of a file, or why it cannot be read.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    let bytes = limits::read(path, limits::RECIPE).map_err(|e| e.to_string())?;
    String::from_utf8(bytes)
        .map_err(|e| format!("not UTF-8 from byte {} on", e.utf8_error().valid_up_to()))
}
