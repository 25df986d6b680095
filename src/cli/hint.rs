//! Hints for arguments that another command, option or key takes.

use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use toml::Table;

use super::{Command, Error, show};
use crate::{
    checkpoint::RECIPE,
    hub::is_name,
    limits,
    recipe::{keys, misspelt_settings},
    report::JSON,
};

/// The keys of a study.
const STUDY: [&str; 3] = ["case", "method", "seeds"];

/// Checks whether an argument is for another command, which the error names.
pub(super) fn check(command: &Command) -> Result<(), Error> {
    let hint = match command {
        Command::Prune(arguments) => recipe("prune", &arguments.recipe),
        Command::Check(arguments) => recipe("check", &arguments.recipe),
        Command::Plan(arguments) => recipe("plan", &arguments.recipe),
        Command::Study(arguments) => study(&arguments.study),
        Command::Eval(arguments) => model("eval", &arguments.dir),
        Command::Inspect(arguments) => model("inspect", &arguments.dir),
        Command::Samples(arguments) => model("samples", &arguments.model),
        Command::Init(arguments) => model("init", &arguments.model),
        _ => None,
    };
    if matches!(
        command,
        Command::Prune(_) | Command::Check(_) | Command::Plan(_) | Command::Study(_)
    ) {
        for (name, meant) in misspelt_settings() {
            tracing::warn!("unknown environment variable {name}; did you mean {meant}?");
        }
    }
    hint.map_or(Ok(()), |hint| Err(Error::Meant(hint)))
}

/// The problem of a file that a command takes for a recipe.
fn recipe(command: &str, path: &Path) -> Option<String> {
    let shown = show(path);
    let init = format!("`barber init {shown}` writes one for it");
    if path.join(JSON).is_file() {
        let own = show(&path.join(RECIPE));
        return Some(format!(
            "{shown} is the result of a run, and `barber {command}` takes a recipe; its own is {own}"
        ));
    }
    if path.is_dir() {
        let what = if path.join("config.json").is_file() { "checkpoint" } else { "directory" };
        return Some(format!("{shown} is a {what}, and `barber {command}` takes a recipe; {init}"));
    }
    if !path.exists() && is_name(path) && path.extension().is_none_or(|of| of != "toml") {
        return Some(format!("there is no recipe {shown}; if it is a model on the hub, {init}"));
    }
    let table = table(path)?;
    let is_study = STUDY.iter().any(|key| table.contains_key(*key));
    is_study.then(|| format!("{shown} is a study, not a recipe; run `barber study {shown}`"))
}

/// The problem of a file that is taken for a study.
fn study(path: &Path) -> Option<String> {
    let table = table(path)?;
    let sections = || keys().iter().filter(|key| table.contains_key(&key.path));
    // A study has a key `recipe`.
    let is_recipe =
        STUDY.iter().all(|key| !table.contains_key(*key)) && sections().next().is_some();
    let shown = show(path);
    is_recipe.then(|| format!("{shown} is a recipe, not a study; run `barber prune {shown}`"))
}

/// The problem of a path that a command takes for a model.
fn model(command: &str, path: &Path) -> Option<String> {
    let is_toml = path.is_file() && path.extension().is_some_and(|of| of == "toml");
    let shown = show(path);
    is_toml.then(|| {
        format!(
            "{shown} is a TOML file, and `barber {command}` takes a model's directory; \
             `barber check {shown}` shows what a recipe means"
        )
    })
}

/// The TOML in a file; `None` if it is not a file or not TOML.
fn table(path: &Path) -> Option<Table> {
    // A pipe can be read only once.
    let is_file = path.metadata().is_ok_and(|found| found.is_file());
    let bytes = is_file.then(|| limits::read(path, limits::RECIPE).ok()).flatten()?;
    std::str::from_utf8(&bytes).ok()?.parse().ok()
}

/// The error for an argument with an unexpanded `~`. Values of recipes are checked elsewhere.
pub(super) fn home(arguments: &[String]) -> Option<Error> {
    let before = std::iter::once("").chain(arguments.iter().map(String::as_str));
    let found = before.zip(arguments).find(|(before, argument)| {
        let set = *before == "--set" || argument.starts_with("--set=");
        let value = argument.rsplit('=').next().unwrap_or_default();
        !set && (value == "~" || value.starts_with("~/"))
    });
    found.map(|(_, argument)| {
        Error::Meant(format!(
            "{argument}: `~` is not expanded inside a word or quotes; write the directory in full, \
             or start a word with `~`"
        ))
    })
}

/// A tip for an unknown option that has the name of a recipe's key.
pub(super) fn option(error: &clap::Error, arguments: &[String]) -> Option<String> {
    let takes_keys = ["prune", "check", "study"];
    let of_recipe = arguments.first().is_some_and(|name| takes_keys.contains(&name.as_str()));
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    if error.kind() != ErrorKind::UnknownArgument || !of_recipe {
        return None;
    }
    let (name, _) = option.split_once('=').unwrap_or((option, ""));
    let name = name.strip_prefix("--")?.replace('-', "_");
    let named = |path: &str| path.rsplit('.').next() == Some(&name) && !path.contains(".N");
    let of_section = |path: &str| path.starts_with(&format!("{name}."));
    let key = keys().iter().find(|key| named(&key.path) && !has_keys(&key.path));
    let key = key.or_else(|| keys().iter().find(|key| of_section(&key.path)))?;
    Some(format!("\n  tip: a value of the recipe is set with `--set {}=VALUE`\n", key.path))
}

/// Whether a key is a section.
fn has_keys(path: &str) -> bool {
    let inside = format!("{path}.");
    keys().iter().any(|key| key.path.starts_with(&inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_that_is_not_expanded_is_told() {
        let found = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
            home(&arguments).is_some()
        };
        for arguments in [
            &["inspect", "~/model"][..],
            &["init", "m", "--output=~/r.toml"],
            &["eval", "m", "--task", "piqa=~/piqa.jsonl"],
            &["inspect", "~"],
        ] {
            assert!(found(arguments), "{arguments:?}");
        }
        for arguments in [
            &["prune", "r.toml", "--set", "output.path=~/x"][..],
            &["prune", "r.toml", "--set=output.path=~/x"],
            &["inspect", "./~/model"],
            &["inspect", "~model"],
        ] {
            assert!(!found(arguments), "{arguments:?}");
        }
    }
}
