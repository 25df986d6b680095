//! What Barber is made of, by `deny.toml`: licences, versions and sources; and the Rust that each
//! dependency asks for. And where there is code that the compiler does not check.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::Value;

/// Every package that the workspace is built of.
fn packages() -> Vec<Value> {
    let arguments = ["metadata", "--format-version", "1", "--locked", "--filter-platform"];
    let mut command = Command::new(env!("CARGO"));
    let output = command.args(arguments).arg("x86_64-unknown-linux-gnu").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let built: BTreeSet<&str> = nodes.iter().map(|node| node["id"].as_str().unwrap()).collect();
    let all = metadata["packages"].as_array().unwrap().iter();
    all.filter(|package| built.contains(package["id"].as_str().unwrap())).cloned().collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn deny() -> toml::Table {
    fs::read_to_string("deny.toml").unwrap().parse().unwrap()
}

/// Whether a licence expression of SPDX leaves a choice that is all allowed; `MIT/X` is an old form
/// of `MIT OR X`.
fn allows(allowed: &[&str], expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let fine = either(allowed, &mut words);
    assert_eq!(words.next(), None, "{expression}");
    fine
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn either(allowed: &[&str], words: &mut Words<'_>) -> bool {
    let mut fine = both(allowed, words);
    while words.next_if_eq(&"OR").is_some() {
        fine |= both(allowed, words);
    }
    fine
}

fn both(allowed: &[&str], words: &mut Words<'_>) -> bool {
    let mut fine = one(allowed, words);
    while words.next_if_eq(&"AND").is_some() {
        fine &= one(allowed, words);
    }
    fine
}

fn one(allowed: &[&str], words: &mut Words<'_>) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let fine = either(allowed, words);
        assert_eq!(words.next(), Some(")"));
        return fine;
    }
    let name = words.next().unwrap();
    match words.next_if_eq(&"WITH") {
        Some(_) => allowed.contains(&format!("{name} WITH {}", words.next().unwrap()).as_str()),
        None => allowed.contains(&name),
    }
}

#[test]
fn licences_are_allowed() {
    assert!(allows(&["MIT"], "GPL-3.0/MIT") && allows(&["A", "B"], "(A OR C) AND B"));
    assert!(!allows(&["A"], "A AND (B OR C)") && !allows(&["A"], "A WITH B"));
    let deny = deny();
    let allowed: Vec<&str> =
        deny["licenses"]["allow"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
    for package in packages() {
        let licence = text(&package, "license");
        let name = text(&package, "name");
        assert!(allows(&allowed, licence), "{name} is under `{licence}`");
    }
}

#[test]
fn packages_are_of_the_registry_or_our_own() {
    let here = std::env::current_dir().unwrap();
    for package in packages() {
        match package["source"].as_str() {
            Some(source) => assert!(source.starts_with("registry+https://github.com/rust-lang/")),
            None => assert!(Path::new(text(&package, "manifest_path")).starts_with(&here)),
        }
    }
}

#[test]
fn two_versions_of_a_crate_have_a_reason() {
    let mut versions: BTreeMap<String, BTreeSet<Vec<u64>>> = BTreeMap::new();
    for package in packages() {
        let version = text(&package, "version").split(['-', '+']).next().unwrap();
        let version = version.split('.').map(|part| part.parse().unwrap()).collect();
        versions.entry(text(&package, "name").to_owned()).or_default().insert(version);
    }
    let mut older = BTreeSet::new();
    for (name, versions) in versions {
        let shown =
            |version: &Vec<u64>| version.iter().map(u64::to_string).collect::<Vec<_>>().join(".");
        let all = versions.iter().rev().skip(1);
        older.extend(all.map(|version| format!("{name}@{}", shown(version))));
    }
    let deny = deny();
    let skipped = deny["bans"]["skip"].as_array().unwrap().iter();
    let skipped = skipped.map(|skipped| {
        assert!(!skipped["reason"].as_str().unwrap().is_empty());
        skipped["crate"].as_str().unwrap().to_owned()
    });
    let skipped = skipped.collect::<BTreeSet<_>>();
    let new: Vec<_> = older.difference(&skipped).collect();
    assert!(new.is_empty(), "older beside newer, without a reason in deny.toml: {new:?}");
    let gone: Vec<_> = skipped.difference(&older).collect();
    assert!(gone.is_empty(), "in deny.toml, but no longer there twice: {gone:?}");
}

/// The fuzz targets are not members of the workspace, and have a lock file of their own.
#[test]
fn the_fuzz_targets_are_locked_to_the_same_dependencies() {
    let lock: toml::Table = fs::read_to_string("fuzz/Cargo.lock").unwrap().parse().unwrap();
    let name = |of: &toml::Value| of.as_str().unwrap().split(' ').next().unwrap().to_owned();
    let mut all = lock["package"].as_array().unwrap().iter();
    let barber = all.find(|package| name(&package["name"]) == "llm-barber").unwrap();
    let locked: BTreeSet<_> = barber["dependencies"].as_array().unwrap().iter().map(name).collect();
    let packages = packages();
    let own = packages.iter().find(|package| package["name"] == "llm-barber").unwrap();
    let wanted = own["dependencies"].as_array().unwrap().iter().filter(|of| of["kind"].is_null());
    let (optional, always): (Vec<_>, Vec<_>) = wanted.partition(|of| of["optional"] == true);
    let [optional, always] = [optional, always]
        .map(|of| of.iter().map(|of| text(of, "name").to_owned()).collect::<BTreeSet<_>>());
    let missing: Vec<_> = always.difference(&locked).collect();
    let gone: Vec<_> = locked
        .iter()
        .filter(|name| !(always.contains(*name) || optional.contains(*name)))
        .collect();
    let help = "run `cargo update --manifest-path fuzz/Cargo.toml -p llm-barber`";
    assert!(missing.is_empty() && gone.is_empty(), "{missing:?} {gone:?}: {help}");
}

/// Clippy's `incompatible_msrv` sees to the standard library in our own code.
#[test]
fn no_dependency_wants_a_newer_rust() {
    let parts = |version: &str| -> Vec<u64> {
        version.split('.').map(|part| part.parse().unwrap()).collect()
    };
    let packages = packages();
    let own = packages.iter().find(|package| package["name"] == "llm-barber").unwrap();
    let own = parts(text(own, "rust_version"));
    for package in &packages {
        if let Some(wanted) = package["rust_version"].as_str() {
            let name = text(package, "name");
            assert!(parts(wanted)[..2] <= own[..2], "{name} wants Rust {wanted}");
        }
    }
}

/// The files with `unsafe` code. Each says why, and what makes it sound; clippy sees to the latter.
/// Miri runs none of it: Miri maps no files, and comes with nightly toolchains alone, with which dfdx
/// does not build.
const UNSAFE: [&str; 6] = [
    // What the C library does with freed memory.
    "src/buffer.rs",
    // A memory-mapped file.
    "src/checkpoint/reader/mod.rs",
    // Matrix products by the gemm crate, over pointers.
    "src/executor/ops/gemm.rs",
    // Kernels and products of a GPU, by address.
    "src/executor/ops/gpu/halves.rs",
    "src/executor/ops/gpu/kernels.rs",
    "src/executor/ops/gpu/mod.rs",
];

#[test]
fn unsafe_code_is_where_it_is_known_to_be() {
    let mut found = BTreeSet::new();
    let mut dirs: Vec<_> = ["src", "plugins", "tests", "benches", "recipes", "fuzz/src"]
        .map(|dir| Path::new(dir).to_owned())
        .into();
    // Put together here, so that this file is not found.
    let marks =
        [["unsafe", " {"].concat(), ["unsafe", " fn"].concat(), ["unsafe", " impl"].concat()];
    let allowed = ["allow(", "unsafe_code"].concat();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let has = marks.iter().any(|mark| text.contains(mark)) || text.contains(&allowed);
                if has {
                    assert!(text.contains(&format!("{allowed}, reason = ")), "{}", path.display());
                    found.insert(path.display().to_string());
                }
            }
        }
    }
    assert_eq!(found, UNSAFE.map(str::to_owned).into());
    let manifest: toml::Table = fs::read_to_string("Cargo.toml").unwrap().parse().unwrap();
    assert_eq!(manifest["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("deny"));
}
