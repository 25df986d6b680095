//! `barber new-metric`: writes a crate with a metric to start from.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::show;

/// Writes a crate with a metric to start from: code, tests and, with its feature `barber`, a binary
/// of Barber with the metric. In Barber's source tree it becomes a plugin, elsewhere a separate
/// crate. `cargo test` passes at once.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The metric's name in recipes: lower-case words with hyphens, such as row-norm.
    #[arg(value_parser = name)]
    name: String,
    /// The directory to write; NAME if left out, or plugins/NAME in Barber's source tree.
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// Barber's source tree, for a crate outside it; by default the one that this binary was built
    /// from.
    #[arg(long, value_name = "DIR")]
    barber: Option<PathBuf>,
    /// Write into a directory that has files, replacing those of the same names.
    #[arg(long)]
    force: bool,
}

/// Why the crate could not be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{} exists; give another --path, or --force to write over its files", show(.0))]
    Exists(PathBuf),
    #[error(
        "{} is not Barber's source tree, which the crate needs; give --barber DIR, the directory of \
         a clone of Barber",
        show(.0)
    )]
    NoSource(PathBuf),
    #[error("{} is not Unicode, so a Cargo.toml cannot name it", .0.display())]
    NotUnicode(PathBuf),
    #[error("{} is {kind}, and only regular files are replaced; give another --path", show(path))]
    NotReplaced { path: PathBuf, kind: &'static str },
    #[error("{}: {source}", show(path))]
    File { path: PathBuf, source: std::io::Error },
}

impl Error {
    /// Whether the command line is wrong: exit status 2, not 1.
    pub(super) fn is_usage(&self) -> bool {
        !matches!(self, Self::File { .. })
    }

    fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let Arguments { name, path, barber, force } = arguments;
    let here = is_source(Path::new("")).then(|| Path::new("plugins").join(name));
    let target = path.clone().or(here).unwrap_or_else(|| name.into());
    let target = std::path::absolute(&target).map_err(Error::file(&target))?;
    let inside = target.parent().is_some_and(is_plugins);
    let built_from = || PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let barber = barber.clone().unwrap_or_else(built_from);
    if !inside && !is_source(&barber) {
        return Err(Error::NoSource(barber));
    }
    let entries = |dir: &Path| fs::read_dir(dir).map(Iterator::count);
    if target.exists() && !force && entries(&target).is_ok_and(|entries| entries > 0) {
        return Err(Error::Exists(target));
    }
    let files = if inside { inside_files(name) } else { outside_files(name, &barber)? };
    write(&target, &files)?;
    println!("written   {}: |W|·‖x‖^power, a metric to start from", show(&target));
    println!("next      {}", show(&target.join("README.md")));
    Ok(())
}

/// Whether a directory is Barber's source tree.
fn is_source(dir: &Path) -> bool {
    is_plugins(&dir.join("plugins"))
}

/// Whether a directory is `plugins` in Barber's source tree.
fn is_plugins(dir: &Path) -> bool {
    dir.ends_with("plugins")
        && dir.join("metric/Cargo.toml").is_file()
        && fs::read_to_string(dir.join("../Cargo.toml"))
            .is_ok_and(|manifest| manifest.contains("name = \"llm-barber\""))
}

/// The files of the crate: path in the crate, and text.
type Files = Vec<(&'static str, String)>;

/// A template filled in for a metric.
fn fill(template: &str, name: &str, more: &[(&str, &str)]) -> String {
    let package = format!("barber-{name}");
    let module = package.replace('-', "_");
    let type_name = type_name(name);
    let known = [("name", name), ("package", &package), ("module", &module), ("type", &type_name)];
    known.iter().chain(more).fold(template.to_owned(), |text, (key, value)| {
        text.replace(&format!("{{{{{key}}}}}"), value)
    })
}

/// The files that every crate has; `test` and `run` are the commands that test it and run its
/// binary.
fn common_files(name: &str, [test, run]: [&str; 2], readme: &str) -> Files {
    let readme = format!("{}{readme}", include_str!("template/README.md"));
    vec![
        ("src/lib.rs", fill(include_str!("template/lib.rs"), name, &[])),
        ("src/main.rs", fill(include_str!("template/main.rs"), name, &[])),
        ("README.md", fill(&readme, name, &[("test", test), ("run", run)])),
    ]
}

/// The files of a plugin in Barber's workspace.
fn inside_files(name: &str) -> Files {
    let test = format!("cargo test -p barber-{name}");
    let run = format!("cargo run --release -p barber-{name} --features barber --");
    let mut files = common_files(name, [&test, &run], include_str!("template/inside.md"));
    files.push(("Cargo.toml", fill(include_str!("template/inside.toml"), name, &[])));
    files
}

/// The files of a crate that depends on Barber in a directory.
fn outside_files(name: &str, barber: &Path) -> Result<Files, Error> {
    let barber = fs::canonicalize(barber).map_err(Error::file(barber))?;
    let quoted = |path: &Path| match path.to_str() {
        Some(path) => Ok(toml::Value::from(path).to_string()),
        None => Err(Error::NotUnicode(path.to_owned())),
    };
    let (metric, source) = (quoted(&barber.join("plugins/metric"))?, quoted(&barber)?);
    let paths = [("metric", &*metric), ("barber", &*source)];
    let commands = ["cargo test", "cargo run --release --features barber --"];
    let mut files = common_files(name, commands, "");
    let manifest = barber.join("Cargo.toml");
    let manifest = fs::read_to_string(&manifest).map_err(Error::file(&manifest))?;
    let template = format!("{}{}", include_str!("template/outside.toml"), profiles(&manifest));
    files.push(("Cargo.toml", fill(&template, name, &paths)));
    files.push((".gitignore", "/target\n".into()));
    // The crate gets the versions that Barber is tested with.
    if let Ok(lock) = fs::read_to_string(barber.join("Cargo.lock")) {
        files.push(("Cargo.lock", lock));
    }
    Ok(files)
}

/// The profile sections of a manifest, which come last.
fn profiles(manifest: &str) -> &str {
    manifest.find("[profile.").map_or("", |start| &manifest[start..])
}

/// Checks that the places of a crate's files are free, or directories and regular files.
fn check(target: &Path, files: &Files) -> Result<(), Error> {
    for (path, _) in files {
        let path = target.join(path);
        let inside = path.ancestors().take_while(|above| *above != target);
        for (i, place) in inside.enumerate() {
            let Ok(found) = fs::symlink_metadata(place) else { continue };
            if if i == 0 { !found.is_file() } else { !found.is_dir() } {
                let kind = crate::files::describe(&found.file_type());
                return Err(Error::NotReplaced { path: place.to_owned(), kind });
            }
        }
    }
    Ok(())
}

/// Writes the files of a crate as drafts, and then renames them.
fn write(target: &Path, files: &Files) -> Result<(), Error> {
    check(target, files)?;
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(Error::file(parent))?;
    let staging = tempfile::tempdir_in(parent).map_err(Error::file(parent))?;
    for (path, text) in files {
        let path = staging.path().join(path);
        let dir = path.parent().unwrap_or(parent);
        fs::create_dir_all(dir).map_err(Error::file(dir))?;
        fs::write(&path, text).map_err(Error::file(&path))?;
    }
    for (path, _) in files {
        let to = target.join(path);
        let dir = to.parent().unwrap_or(target);
        fs::create_dir_all(dir).map_err(Error::file(dir))?;
        fs::rename(staging.path().join(path), &to).map_err(Error::file(&to))?;
    }
    Ok(())
}

/// The name of a metric's type: `RowNorm` for `row-norm`.
fn type_name(name: &str) -> String {
    let capital = |word: &str| {
        let (first, rest) = word.split_at(word.len().min(1));
        first.to_uppercase() + rest
    };
    name.split('-').map(capital).collect()
}

/// Names that the crate's code already uses.
const TAKEN: [&str; 14] = [
    "Deserialize",
    "Dims",
    "Err",
    "Error",
    "JsonSchema",
    "LayerStats",
    "Metric",
    "MetricPlugin",
    "Needs",
    "Power",
    "Result",
    "Self",
    "Serialize",
    "Symmetry",
];

/// Parses and checks a metric's name.
fn name(text: &str) -> Result<String, String> {
    let word = |word: &str| {
        !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) || !text.split('-').all(word) {
        return Err(
            "lower-case words and digits with hyphens between them, such as row-norm".into()
        );
    }
    if text.len() > 50 {
        return Err("a name of 50 letters at most".into());
    }
    if TAKEN.contains(&&*type_name(text)) {
        return Err(format!("the crate's code already uses the name `{}`", type_name(text)));
    }
    match barber_metric::registered() {
        Ok(metrics) if metrics.contains_key(text) => {
            Err("a metric has this name already; `barber metrics` lists all".into())
        }
        _ => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_with_hyphens() {
        for fine in ["x", "row-norm", "l2", "match", "a-1"] {
            assert_eq!(name(fine), Ok(fine.into()));
        }
        for (wrong, why) in [
            ("", "such as"),
            ("RowNorm", "such as"),
            ("row_norm", "such as"),
            ("row--norm", "such as"),
            ("-row", "such as"),
            ("row-", "such as"),
            ("2-norm", "such as"),
            ("größe", "such as"),
            ("../x", "such as"),
            ("layer-stats", "`LayerStats`"),
            ("self", "`Self`"),
            ("magnitude", "has this name already"),
            (&"x".repeat(51), "50"),
        ] {
            let error = name(wrong).expect_err(wrong);
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn templates_are_filled_in() {
        let outside = outside_files("row-norm", Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        for (path, text) in inside_files("row-norm").iter().chain(&outside) {
            assert!(!text.contains("{{"), "{path}: {text}");
            if path.ends_with("Cargo.toml") {
                let manifest: toml::Table = text.parse().unwrap();
                assert_eq!(manifest["package"]["name"].as_str(), Some("barber-row-norm"));
            }
        }
        assert!(outside.iter().any(|(_, text)| text.contains("pub struct RowNorm {")));
        let parsed = |text: &str| text.parse::<toml::Table>().unwrap()["profile"].clone();
        let (_, manifest) = outside.iter().find(|(path, _)| *path == "Cargo.toml").unwrap();
        assert_eq!(parsed(manifest), parsed(include_str!("../../../Cargo.toml")));
    }
}
