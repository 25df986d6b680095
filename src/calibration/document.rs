//! Reads texts: plain text or the documents of a data set, compressed or not.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{IgnoredAny, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::Error;
use crate::{
    limits::TEXT,
    records::{self, Form, extension, records},
};

/// A text to measure on: a path or, for a data set, a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[schemars(deny_unknown_fields, extend("type" = ["string", "object"]))]
pub struct Text {
    /// The file: plain text; or JSON Lines or a JSON list of objects (`.jsonl`, `.ndjson`,
    /// `.jsonlines`, `.json`) or Parquet (`.parquet`), whose records are documents. Text and JSON
    /// may be compressed with gzip or Zstandard.
    pub path: PathBuf,
    /// Name of the text in reports. Left out: its path.
    pub name: Option<String>,
    /// The field of a record that holds its text. If no field is named `a.b`, it is the field `b`
    /// of the object `a`. Left out: `text`.
    pub field: Option<String>,
    /// Separator between documents. Left out: an empty line, `"\n\n"`.
    pub join: Option<String>,
    /// Number of documents to take, from the first. Left out: all.
    pub documents: Option<usize>,
    /// Maximum number of segments of this text. Left out: the setting for all texts.
    pub segments: Option<usize>,
}

/// A text's table in a recipe.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    join: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    documents: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    segments: Option<usize>,
}

impl From<&Path> for Text {
    fn from(path: &Path) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathOrTable;

        impl<'de> Visitor<'de> for PathOrTable {
            type Value = Text;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, or a table with a `path`")
            }

            fn visit_str<E>(self, path: &str) -> Result<Text, E> {
                Ok(Text::from(Path::new(path)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
                let Table { path, name, field, join, documents, segments } =
                    Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Text { path, name, field, join, documents, segments })
            }
        }

        deserializer.deserialize_any(PathOrTable)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == Self::from(self.path.as_path()) {
            return self.path.serialize(serializer);
        }
        let Self { path, name, field, join, documents, segments } = self.clone();
        Table { path, name, field, join, documents, segments }.serialize(serializer)
    }
}

impl Text {
    /// Name of the text in reports.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.path.display().to_string())
    }

    /// The name without directories.
    pub fn short(&self) -> String {
        let file = || self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.name.clone().unwrap_or_else(file)
    }

    /// The whole text, with all documents.
    ///
    /// # Errors
    /// If the file cannot be read or is too large, or a record lacks the field.
    pub fn read(&self) -> Result<String, Error> {
        let join = self.join.as_deref().unwrap_or("\n\n");
        let mut text = String::new();
        for (i, document) in documents(self)?.enumerate() {
            if i > 0 {
                text.push_str(join);
            }
            append(&mut text, &document?, &self.path)?;
        }
        Ok(text)
    }
}

/// The documents of a text, in order; a plain text is one document.
pub(super) fn documents(
    text: &Text,
) -> Result<Box<dyn Iterator<Item = Result<String, Error>>>, Error> {
    let most = text.documents.unwrap_or(usize::MAX);
    if Form::of(&text.path) == Form::Text {
        let path = text.path.clone();
        return Ok(Box::new(std::iter::once_with(move || plain(&path)).take(most)));
    }
    let field = text.field.clone().unwrap_or_else(|| "text".into());
    let documents = records(&text.path, Some(&field))?.map(move |record| {
        let record = record?;
        Ok(record.text(&field)?.to_owned())
    });
    Ok(Box::new(documents.take(most)))
}

/// A plain text; warns if it looks like a file of records.
fn plain(path: &Path) -> Result<String, Error> {
    let mut whole = String::new();
    let mut objects = None;
    for line in records::open(path)? {
        let line = line?;
        if objects != Some(false) && !line.trim().is_empty() {
            objects = Some(serde_json::from_str::<BTreeMap<String, IgnoredAny>>(&line).is_ok());
        }
        append(&mut whole, &line, path)?;
    }
    if objects == Some(true) {
        tracing::warn!(
            "{}: each line is a JSON object, but the file is read as one plain text; name it \
             .jsonl to read the text of its records",
            path.display()
        );
    } else if ["csv", "tsv"].contains(&extension(path).as_str()) {
        tracing::warn!(
            "{}: a table, but the file is read as one plain text; save it as JSON Lines or Parquet \
             to read one of its columns",
            path.display()
        );
    }
    Ok(whole)
}

/// Adds to a text, whose length is limited.
fn append(text: &mut String, more: &str, path: &Path) -> Result<(), records::Error> {
    if more.len() > TEXT.saturating_sub(text.len()) {
        return Err(records::Error::LongText { path: path.to_owned() });
    }
    text.push_str(more);
    Ok(())
}
