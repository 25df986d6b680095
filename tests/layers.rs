//! Which modules of `src/` may import which, as the sources say it: every path that begins with
//! `crate`, `super` or `self`, in `use` declarations and elsewhere, but for tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path as FilePath,
};

/// A path from the crate's root, such as `executor::ops::Ops`.
type Path = Vec<String>;
type Graph = BTreeMap<String, BTreeSet<String>>;

/// A module without its tests and comments.
struct Module {
    words: Vec<String>,
    imports: BTreeSet<Path>,
}

impl Module {
    fn new(of: &[String], text: &str) -> Self {
        let words = words(text);
        let imports = imports(of, &words);
        Self { words, imports }
    }

    fn has(&self, word: &str) -> bool {
        self.words.iter().any(|found| found == word)
    }
}

/// The identifiers of a text, and the signs that paths are made with; any other sign is a `;`.
fn words(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    let code: String = lines.flat_map(|line| [line, "\n"]).collect();
    let mut words = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = match first {
            _ if is_word(first) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            _ => first.len_utf8(),
        };
        let word = &rest[..length];
        let known = is_word(first) || ["::", "{", "}", ",", "*"].contains(&word);
        words.push(if known { word } else { ";" }.to_owned());
        rest = rest[length..].trim_start();
    }
    words
}

/// The paths in the words of the module `of`.
fn imports(of: &[String], words: &[String]) -> BTreeSet<Path> {
    let mut found = BTreeSet::new();
    for (i, word) in words.iter().enumerate() {
        let is_path = words.get(i + 1).is_some_and(|next| next == "::");
        let goes_on = i > 0 && words[i - 1] == "::";
        let start = match word.as_str() {
            _ if !is_path || goes_on => continue,
            "crate" => Vec::new(),
            "self" | "super" => of.to_vec(),
            _ => continue,
        };
        let from = if word == "super" { i } else { i + 2 };
        tree(words, from, start, &mut found);
    }
    found
}

/// Reads a tree of paths below `prefix`; returns where it ends.
fn tree(words: &[String], mut i: usize, mut prefix: Path, found: &mut BTreeSet<Path>) -> usize {
    let word = |i: usize| words.get(i).map_or("", String::as_str);
    loop {
        match word(i) {
            "{" => {
                i += 1;
                while !["}", ""].contains(&word(i)) {
                    let end = tree(words, i, prefix.clone(), found);
                    // Whatever is between two paths: a comma, an alias.
                    i = if end == i || word(end) == "," { end + 1 } else { end };
                }
                return i + 1;
            }
            "super" => drop(prefix.pop()),
            "self" => {}
            name => prefix.push(name.to_owned()),
        }
        i += 1;
        if word(i) != "::" {
            found.insert(prefix);
            return if word(i) == "as" { i + 2 } else { i };
        }
        i += 1;
    }
}

/// The modules of `src/`, by their paths.
fn modules() -> BTreeMap<Path, Module> {
    let mut modules = BTreeMap::new();
    let mut tests = BTreeSet::new();
    let mut dirs = vec![FilePath::new("src").to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let file = entry.unwrap().path();
            if file.is_dir() {
                dirs.push(file);
            } else if file.extension().is_some_and(|extension| extension == "rs") {
                let path = file.with_extension("");
                let path = path.strip_prefix("src").unwrap().iter();
                let mut path: Path = path.map(|name| name.to_str().unwrap().into()).collect();
                path.pop_if(|last| ["mod", "lib"].contains(&last.as_str()));
                let text = fs::read_to_string(&file).unwrap();
                for line in text.split("#[cfg(test)]\n").skip(1) {
                    let line = line.lines().next().unwrap();
                    if let Some(name) = line.rsplit("mod ").next().unwrap().strip_suffix(';') {
                        tests.insert([&path[..], &[name.to_owned()]].concat());
                    }
                }
                modules.insert(path.clone(), Module::new(&path, &text));
            }
        }
    }
    modules.retain(|path, _| !tests.contains(path));
    assert!(modules.len() > 100);
    modules
}

/// The top modules of the crate, each with those that it imports.
fn top(modules: &BTreeMap<Path, Module>) -> Graph {
    let mut graph = Graph::new();
    for (path, module) in modules {
        let Some(of) = path.first().filter(|of| *of != "main") else { continue };
        let imports = module.imports.iter().filter_map(|import| import.first());
        let known = imports.filter(|to| modules.contains_key(&[(*to).clone()][..]));
        let others = known.filter(|to| *to != of).cloned();
        graph.entry(of.clone()).or_default().extend(others);
    }
    graph
}

/// The files in a directory, each with those that it imports, also by names that the directory's
/// `mod.rs` imports in their place.
fn files(modules: &BTreeMap<Path, Module>, dir: &str) -> Graph {
    let inner = |path: &Path| (path.first()? == dir).then(|| path.get(1).cloned())?;
    let names = &modules[&[dir.to_owned()][..]].imports;
    let file = |import: &Path| {
        let name = inner(import)?;
        if modules.contains_key(&import[..2]) {
            return Some(name);
        }
        inner(names.iter().find(|import| import.len() > 2 && import.last() == Some(&name))?)
    };
    let mut graph = Graph::new();
    for (path, module) in modules {
        if let Some(of) = inner(path) {
            let others = module.imports.iter().filter_map(file).filter(|to| *to != of);
            graph.entry(of.clone()).or_default().extend(others);
        }
    }
    graph
}

/// What is left of a graph once all nodes that lead to no cycle are taken away.
fn cycles(mut graph: Graph) -> Graph {
    loop {
        let ends: Vec<_> = graph.iter().filter(|(_, to)| to.is_empty()).collect();
        let ends: BTreeSet<_> = ends.into_iter().map(|(name, _)| name.clone()).collect();
        if ends.is_empty() {
            return graph;
        }
        graph.retain(|name, _| !ends.contains(name));
        for to in graph.values_mut() {
            to.retain(|name| !ends.contains(name));
        }
    }
}

#[test]
fn planted_imports_are_found() {
    let of = ["family".to_owned(), "llama".to_owned()];
    let module = Module::new(
        &of,
        "use super::{Part, rope::{self, Rope as R}};\n\
         use crate::{nearest::nearest, executor::{ops::{Gram, Ops}, pass::*}};\n\
         // use crate::hidden;\n\
         fn f() { super::super::journal::open(crate::files::name()); g() }\n\
         #[cfg(test)]\nmod tests {\n    use crate::recipe;\n}",
    );
    let found: BTreeSet<_> = module.imports.iter().map(|path| path.join("::")).collect();
    let expected = [
        "executor::ops::Gram",
        "executor::ops::Ops",
        "executor::pass::*",
        "family::Part",
        "family::rope",
        "family::rope::Rope",
        "files::name",
        "journal::open",
        "nearest::nearest",
    ];
    assert_eq!(found, expected.map(str::to_owned).into());
    let name = |text: &str| text.to_owned();
    let planted = || {
        let family = Module::new(&[], "pub use self::llama::Llama;");
        let executor = Module::new(&[name("executor")], "use crate::family::Llama;");
        let rope = [name("family"), name("rope")];
        let back = Module::new(&rope, "use super::Llama;");
        let family = Module {
            imports: [vec![name("family"), name("llama"), name("Llama")]].into(),
            ..family
        };
        let llama = Module::new(&of, "use super::rope; use crate::executor::Ops;");
        BTreeMap::from([
            (vec![name("executor")], executor),
            (vec![name("family")], family),
            (of.to_vec(), llama),
            (rope.to_vec(), back),
        ])
    };
    assert_eq!(cycles(top(&planted())).len(), 2);
    assert_eq!(cycles(files(&planted(), "family")).len(), 2);
}

#[test]
fn no_modules_import_each_other() {
    let modules = modules();
    let found = top(&modules);
    assert!(found["run"].contains("prune") && found["prune"].contains("executor"), "{found:?}");
    assert_eq!(cycles(found), Graph::new());
    let found = files(&modules, "recipe");
    assert!(found["resolve"].contains("sections") && found.len() > 15, "{found:?}");
    assert_eq!(cycles(found), Graph::new());
}

/// What each layer must not import, beyond what is above it.
const APART: [(&str, &[&str]); 6] = [
    ("family", &["buffer", "checkpoint", "executor", "files", "mask"]),
    ("mask", &["checkpoint", "dtype", "executor", "files"]),
    ("executor", &["checkpoint", "files", "journal", "recipe"]),
    ("prune", &["journal"]),
    ("recipe", &["executor", "journal", "model"]),
    ("report", &["executor::ops", "model", "run"]),
];

/// The modules that read and write files; of a recipe, only those that it is built on.
const FILES: &[&str] =
    &["checkpoint", "cli", "files", "hub", "journal", "limits", "recipe", "records", "run"];

/// What only some modules name.
const WORDS: [(&str, &[&str]); 6] = [
    ("indicatif", &["cli"]),
    ("clap", &["cli"]),
    ("dfdx", &["cli", "executor", "run"]),
    ("tempfile", FILES),
    ("File", FILES),
    ("fs", FILES),
];

#[test]
fn layers_are_apart() {
    for (path, module) in modules() {
        let name = path.join("::");
        for (of, not) in APART.iter().filter(|(of, _)| path.first().is_some_and(|top| top == of)) {
            for import in module.imports.iter().map(|import| import.join("::")) {
                let fine = not
                    .iter()
                    .all(|not| import != *not && !import.starts_with(&format!("{not}::")));
                assert!(fine, "{name} imports {import}, and {of} is apart from it");
            }
        }
        for (word, only) in WORDS {
            let here = path.first().is_none_or(|top| only.contains(&top.as_str()));
            assert!(here || !module.has(word), "{name} names {word}");
        }
    }
}
