//! Finds unknown keys and values of the wrong type in a recipe, and suggests corrections.

use figment::{
    error::{Actual, Kind},
    value::Value,
};

use super::{
    error::{Fault, Problem, alternatives},
    keys::{key, keys},
};
use crate::nearest::nearest;

/// Maximum number of type errors that are collected.
const MOST_PROBLEMS: usize = 100;

/// Removes unknown keys and reports them.
pub(super) fn take_unknown(value: &mut Value, path: &mut Vec<String>, problems: &mut Vec<Problem>) {
    match value {
        Value::Dict(_, dict) => {
            // Only a metric knows its parameters.
            let open = matches!(path.as_slice(), [first, ..] if first == "metric")
                || matches!(path.as_slice(), [first, second, ..] if first == "mask" && second == "metric");
            if !open && has_children(path) {
                let names: Vec<String> = dict.keys().cloned().collect();
                for name in names {
                    path.push(name.clone());
                    if key(path).is_none() {
                        dict.remove(&name);
                        problems.push(unknown(path.clone()));
                    }
                    path.pop();
                }
            }
            for (name, value) in dict.iter_mut() {
                path.push(name.clone());
                take_unknown(value, path, problems);
                path.pop();
            }
        }
        Value::Array(_, items) => {
            for (i, item) in items.iter_mut().enumerate() {
                path.push(i.to_string());
                take_unknown(item, path, problems);
                path.pop();
            }
        }
        _ => {}
    }
}

/// The names of the keys in the table at `path`.
fn children(path: &[String]) -> impl Iterator<Item = &'static str> {
    let segments = path.iter().map(|s| if s.parse::<usize>().is_ok() { "N" } else { s });
    let mut prefix = segments.collect::<Vec<_>>().join(".");
    if !prefix.is_empty() {
        prefix.push('.');
    }
    keys().iter().filter_map(move |key| {
        let name = key.path.strip_prefix(&prefix)?;
        (!name.contains('.')).then_some(name)
    })
}

fn has_children(path: &[String]) -> bool {
    children(path).next().is_some()
}

pub(super) fn unknown(path: Vec<String>) -> Problem {
    let (name, table) = match path.split_last() {
        Some((name, table)) => (name.clone(), table.to_vec()),
        None => (String::new(), Vec::new()),
    };
    // The key may be in the wrong table.
    let elsewhere = keys()
        .iter()
        .find(|key| key.path.rsplit('.').next() == Some(&name) && key.path.contains('.'));
    let help = match (nearest(&name, children(&table)), elsewhere) {
        (Some(near), _) => format!("did you mean `{near}`?"),
        (None, Some(key)) => format!("there is `{}`", key.path),
        (None, None) => format!("known here: {}", alternatives(children(&table))),
    };
    Problem::new(path, Fault::UnknownKey).help(help)
}

/// A type error of figment's as a problem.
pub(super) fn typed(error: figment::Error) -> Problem {
    let mut path = error.path.clone();
    let (fault, help) = match error.kind {
        Kind::MissingField(name) => {
            path.push(name.into_owned());
            (Fault::Missing, None)
        }
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            (Fault::Type { found: shown(&found), expected: kind(expected) }, None)
        }
        Kind::UnknownVariant(found, known) => {
            let near = nearest(&found, known.iter().copied());
            let known = alternatives(known.iter().copied());
            let help = match near {
                Some(near) => format!("did you mean `{near}`? There is {known}"),
                None => format!("there is {known}"),
            };
            (Fault::Choice { found }, Some(help))
        }
        Kind::UnknownField(name, known) => {
            // For a wrong key of a map, figment's path includes the key.
            if path.last() != Some(&name) {
                path.push(name.clone());
            }
            let near = nearest(&name, known.iter().copied());
            let known = alternatives(known.iter().copied());
            let help = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None if known.is_empty() => "the metric has no parameters".into(),
                None => format!("known here: {known}"),
            };
            (Fault::UnknownKey, Some(help))
        }
        other => (Fault::Value(other.to_string()), None),
    };
    let help = help.or_else(|| key(&path).map(|key| key.help.clone()));
    let problem = Problem::new(path, fault);
    match help {
        Some(help) => problem.help(help),
        None => problem,
    }
}

/// A value as a message shows it.
pub(super) fn shown(value: &Actual) -> String {
    match value {
        Actual::Bool(value) => format!("`{value}`"),
        Actual::Unsigned(value) => format!("the number {value}"),
        Actual::Signed(value) => format!("the number {value}"),
        Actual::Float(value) => format!("the number {value:?}"),
        Actual::Str(text) => format!("the string {text:?}"),
        Actual::Seq => "an array".into(),
        Actual::Map => "a table".into(),
        other => other.to_string(),
    }
}

/// A Rust type in the words of a recipe's author.
fn kind(expected: String) -> String {
    match expected.as_str() {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0 on",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "a boolean" => "`true` or `false`",
        "a sequence" => "an array",
        "a map" => "a table",
        expected if expected.starts_with("struct ") => "a table",
        "path string" => "a path",
        _ => return expected,
    }
    .into()
}

/// Deserializes a value, and repeats that without each wrong value, so that all errors are found.
pub(super) fn read_all<T>(
    values: &mut Value,
    read: impl Fn(&Value) -> figment::error::Result<T>,
) -> (Option<T>, Vec<Problem>) {
    let mut problems = Vec::new();
    loop {
        match read(values) {
            Ok(found) => return (Some(found), problems),
            Err(error) => {
                let path = error.path.clone();
                let unknown = match &error.kind {
                    Kind::UnknownField(name, _) => Some(name.clone()),
                    _ => None,
                };
                problems.extend(error.into_iter().map(typed));
                let path = match unknown {
                    Some(name) if path.last() != Some(&name) => [path, vec![name]].concat(),
                    _ => path,
                };
                if problems.len() >= MOST_PROBLEMS || !remove(values, &path) {
                    return (None, problems);
                }
            }
        }
    }
}

/// Removes the value at `path`, or the array that holds it; returns whether there was one.
fn remove(value: &mut Value, path: &[String]) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    let Value::Dict(_, dict) = value else { return false };
    let inner = dict.get_mut(first).is_some_and(|value| match (value, rest) {
        (Value::Array(_, items), [index, rest @ ..]) if !rest.is_empty() => {
            let item = index.parse().ok().and_then(|index: usize| items.get_mut(index));
            item.is_some_and(|item| remove(item, rest))
        }
        (value, rest) => remove(value, rest),
    });
    inner || dict.remove(first).is_some()
}
