//! A recipe's text: its TOML, and where in the text every key stands.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use figment::value::{Dict, Num, Tag, Value};
use toml::de::{DeTable, DeValue};

use super::error::{Fault, Problem};

/// Deeper than any recipe: what is nested further is not looked into.
const DEPTH: usize = 16;

/// The text of a recipe.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// What the user calls it.
    pub(super) name: String,
    pub(super) text: String,
    places: BTreeMap<Vec<String>, Place>,
    /// Where lines end.
    ends: Vec<usize>,
}

/// Where a key stands.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) key: Range<usize>,
    pub(super) value: Range<usize>,
}

impl Text {
    /// Reads the text as TOML; returns all that is wrong with its syntax.
    pub(super) fn parse(name: &str, text: &str) -> Result<(Self, Dict), Vec<Problem>> {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let ends = ends.map(|(end, _)| end).collect();
        let mut this = Self { name: name.into(), text: text.into(), places: BTreeMap::new(), ends };
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut problems: Vec<Problem> = Vec::new();
        let mut lines = BTreeSet::new();
        for error in errors {
            let mut problem = Problem::new(Vec::new(), Fault::Syntax(error.message().into()));
            if let Some(span) = error.span() {
                // One slip of the pen is one problem, however many the parser makes of it.
                if !lines.insert(this.line(span.start)) {
                    continue;
                }
                problem.origin = Some(this.origin(span.start));
                problem.span = Some(span.start.min(text.len())..span.end.min(text.len()));
            }
            problems.push(problem);
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let dict = this.table(table.get_ref(), &mut Vec::new());
        Ok((this, dict))
    }

    /// Where the key at `path` stands.
    pub(super) fn place(&self, path: &[String]) -> Option<&Place> {
        self.places.get(path)
    }

    /// What the user calls a place in the text.
    pub(super) fn origin(&self, offset: usize) -> String {
        format!("{} line {}", self.name, self.line(offset))
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.ends.partition_point(|end| *end < offset)
    }

    fn table(&mut self, table: &DeTable<'_>, path: &mut Vec<String>) -> Dict {
        let mut dict = Dict::new();
        for (key, value) in table {
            path.push(key.get_ref().clone().into_owned());
            self.places.insert(path.clone(), Place { key: key.span(), value: value.span() });
            let value = self.value(value.get_ref(), path);
            path.pop();
            dict.insert(key.get_ref().clone().into_owned(), value);
        }
        dict
    }

    fn value(&mut self, value: &DeValue<'_>, path: &mut Vec<String>) -> Value {
        match value {
            DeValue::Array(items) if path.len() < DEPTH => {
                let mut array = Vec::with_capacity(items.len());
                for (i, item) in items.iter().enumerate() {
                    path.push(i.to_string());
                    self.places
                        .insert(path.clone(), Place { key: item.span(), value: item.span() });
                    array.push(self.value(item.get_ref(), path));
                    path.pop();
                }
                Value::Array(Tag::Default, array)
            }
            DeValue::Table(table) if path.len() < DEPTH => {
                Value::Dict(Tag::Default, self.table(table, path))
            }
            other => scalar(other),
        }
    }
}

/// A value outside a recipe's text, such as that of a `--set`.
pub(super) fn parse_value(text: &str) -> Result<Value, String> {
    let value = DeValue::parse(text).map_err(|error| error.message().to_owned())?;
    let mut nowhere = Text {
        name: String::new(),
        text: String::new(),
        places: BTreeMap::new(),
        ends: Vec::new(),
    };
    Ok(nowhere.value(value.get_ref(), &mut Vec::new()))
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
                // Too large for any key of a recipe: the types will say so.
                Err(_) => match i128::from_str_radix(integer.as_str(), integer.radix()) {
                    Ok(value) => Value::Num(Tag::Default, Num::I128(value)),
                    Err(_) => integer.as_str().into(),
                },
            }
        }
        DeValue::Array(_) => Vec::<Value>::new().into(),
        DeValue::Table(_) => Dict::new().into(),
    }
}
