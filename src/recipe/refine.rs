//! Checks `[[refine]]` tables one by one, with the keys of each table's stage.

use figment::value::{Dict, Value};

use super::{
    diagnose::{read_all, shown, typed},
    error::{Fault, Problem, alternatives, segments},
};
use crate::{
    mask::Scope,
    prune::{
        Refine,
        stage::{self, KINDS, Kind, NAMES, Wrong},
    },
};

/// Removes wrong tables and keys from a recipe's stages, so that the rest can be read; returns the
/// problems.
pub(super) fn check(recipe: &mut Value) -> Vec<Problem> {
    let mut problems = Vec::new();
    let Value::Dict(_, recipe) = recipe else { return problems };
    let Some(Value::Array(_, stages)) = recipe.get_mut("refine") else { return problems };
    let mut places = 0..;
    stages.retain_mut(|stage| {
        let path = format!("refine.{}", places.next().unwrap_or_default());
        let found = match stage {
            Value::Dict(_, keys) => kind(keys, &path).map(|kind| check_keys(kind, keys, &path)),
            other => {
                let expected = "a table".to_owned();
                let fault = Fault::Type { found: shown(&other.to_actual()), expected };
                Err(Problem::at(&path, fault).help("a stage is a table: `{ use = \"swap\" }`"))
            }
        };
        match found {
            Ok(found) => {
                problems.extend(found);
                true
            }
            Err(problem) => {
                problems.push(problem);
                false
            }
        }
    });
    problems
}

/// The stage that a table names.
fn kind(keys: &Dict, path: &str) -> Result<&'static Kind, Problem> {
    let at = format!("{path}.use");
    let Some(named) = keys.get("use") else {
        let help = format!("a stage is {}", alternatives(NAMES.iter().copied()));
        return Err(Problem::at(&at, Fault::Missing).help(help));
    };
    let wrong = |error: figment::Error| {
        let mut problem = typed(error);
        problem.path = segments(&at);
        problem
    };
    let name: String = named.deserialize().map_err(wrong)?;
    let known = KINDS.iter().find(|kind| kind.name == name);
    known.ok_or_else(|| wrong(figment::error::Kind::UnknownVariant(name, NAMES).into()))
}

/// The problems of a stage's keys; removes keys that cannot be read.
fn check_keys(kind: &Kind, keys: &mut Dict, path: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut own = keys.clone();
    let used = own.remove("use");
    own.retain(|key, _| {
        let of = stage::with_key(key);
        if of.contains(&kind.name) {
            return true;
        }
        let why = format!("is not a key of the stage `{}`", kind.name);
        let of = alternatives(of.iter().copied());
        let problem = Problem::at(&format!("{path}.{key}"), Fault::Value(why));
        let problem = problem.help(format!("it is a key of {of}"));
        problems.push(problem.against(&format!("{path}.use")));
        false
    });
    let mut own = Value::from(own);
    let (stage, mut mistyped) = read_all(&mut own, kind.read);
    for problem in &mut mistyped {
        problem.path.splice(0..0, segments(path));
        problem.help = super::keys::key(&problem.path).map(|key| key.help.clone());
    }
    problems.extend(mistyped);
    let Value::Dict(_, mut own) = own else { return problems };
    if let Some(stage) = stage {
        if let Some((why, help)) = stage.scope().and_then(|scope| wrong_scope(&stage, scope)) {
            problems.push(Problem::at(&format!("{path}.scope"), Fault::Value(why)).help(help));
        }
        let given: Vec<&str> = own.keys().map(String::as_str).collect();
        problems.extend(stage.check(&given).into_iter().map(|Wrong { key, why, help }| {
            Problem::at(&format!("{path}.{key}"), Fault::Value(why)).help(help)
        }));
    }
    own.extend(used.map(|used| ("use".to_owned(), used)));
    *keys = own;
    problems
}

/// What is wrong with a scope for a stage and what to do about it, if the stage does not know it.
pub(super) fn wrong_scope(stage: &Refine, scope: Scope) -> Option<(String, String)> {
    let scopes = stage.scopes();
    (!scopes.contains(&scope)).then(|| {
        let known = alternatives(scopes.iter().map(|scope| scope.name()));
        (
            format!("`{scope}` is not a scope of `{}`", stage.name()),
            format!("its scopes are {known}"),
        )
    })
}
