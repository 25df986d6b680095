//! What the book and the README say is so: recipes resolve, commands run, links lead somewhere,
//! messages are Barber's own, and nothing that a recipe can say is left out. Their Rust is run as
//! doctests of the library.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use llm_barber::{family::FAMILIES, recipe};
use toml::Table;

const BOOK: &str = "book/src";

/// A page and its path.
struct Page {
    path: String,
    text: String,
}

/// A fenced block: the words after its fence, the line that it begins in, and its text.
struct Block {
    words: Vec<String>,
    line: usize,
    text: String,
}

fn page(path: &str) -> Page {
    Page { path: path.into(), text: fs::read_to_string(path).unwrap() }
}

/// The chapters, and the README.
fn pages() -> Vec<Page> {
    let mut pages = vec![page("README.md")];
    for entry in fs::read_dir(BOOK).unwrap() {
        pages.push(page(entry.unwrap().path().to_str().unwrap()));
    }
    assert!(pages.len() > 10, "the book is at {BOOK}");
    pages
}

impl Page {
    fn blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut open = false;
        for (i, line) in self.text.lines().enumerate() {
            match (line.strip_prefix("```"), open) {
                (Some(words), false) => {
                    let words = words.split([',', ' ']).map(str::to_owned).collect();
                    blocks.push(Block { words, line: i + 1, text: String::new() });
                    open = true;
                }
                (Some(_), true) => open = false,
                (None, true) => {
                    let block = blocks.last_mut().unwrap();
                    block.text.push_str(line);
                    block.text.push('\n');
                }
                (None, false) => {}
            }
        }
        assert!(!open, "{}: a block is not closed", self.path);
        blocks
    }

    /// The blocks with a word after their fence, each with its place.
    fn marked(&self, word: &str) -> Vec<(String, String)> {
        let marked =
            self.blocks().into_iter().filter(|block| block.words.iter().any(|w| w == word));
        marked.map(|block| (format!("{}:{}", self.path, block.line), block.text)).collect()
    }

    /// The text without blocks and without code in lines.
    fn prose(&self) -> String {
        let outside = self.text.split("\n```").step_by(2).map(|text| {
            // After a block comes the rest of its last fence.
            text.split('`').step_by(2).collect::<String>()
        });
        outside.collect()
    }

    /// The names of the headings' places.
    fn places(&self) -> BTreeSet<String> {
        let outside: Vec<&str> = self.text.split("\n```").step_by(2).collect();
        let headings = outside.iter().flat_map(|text| text.lines()).filter(|l| l.starts_with('#'));
        headings
            .map(|heading| {
                let title = heading.trim_start_matches('#').trim().to_lowercase();
                let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                kept.map(|c| if c == ' ' { '-' } else { c }).collect()
            })
            .collect()
    }
}

/// A directory with the recipes of the repository, and all that the quickstart needs.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(Path::new("recipes"), &dir.path().join("recipes"));
    dir
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn recipes_resolve() {
    let place = workplace();
    let path = place.path().join("recipes/book.toml");
    let mut count = 0;
    for (at, text) in pages().iter().flat_map(|page| page.marked("recipe")) {
        let table: Table = text.parse().unwrap_or_else(|error| panic!("{at}: {error}"));
        // A part of a recipe is completed with what every recipe needs.
        let missing = [("model", "path"), ("calibration", "source"), ("output", "path")];
        let missing = missing.iter().filter(|(section, key)| {
            table.get(*section).and_then(|section| section.get(*key)).is_none()
        });
        let sets: Vec<String> =
            missing.map(|(section, key)| format!("{section}.{key}={key}")).collect();
        fs::write(&path, &text).unwrap();
        if let Err(error) = recipe::load(&path, &sets) {
            panic!("{at}: {:?}", miette::Report::new(error));
        }
        count += 1;
    }
    assert!(count > 5, "only {count} recipes");
}

/// Commands in a shell, with the `barber` that was built.
#[cfg(unix)]
#[test]
fn commands_run() {
    let program = Path::new(env!("CARGO_BIN_EXE_barber"));
    let found = std::env::var("PATH").unwrap();
    let found = format!("{}:{found}", program.parent().unwrap().display());
    for page in pages() {
        let commands = page.marked("run");
        if commands.is_empty() {
            continue;
        }
        let place = workplace();
        for (at, text) in commands {
            let text = text.replace("cargo run --release --", "barber");
            // Each block stands for itself, but for the files that those before it have left.
            let text = text.replace("barber prune", "barber prune --force");
            let mut shell: Command = util::command(Path::new("sh"));
            let shell = shell.args(["-euc", &text]).current_dir(place.path()).env("PATH", &found);
            let run = util::output(shell);
            assert_eq!(run.status, 0, "{at}: {}", run.stderr);
        }
    }
}

/// The words of two texts are the same, but numbers may differ by two per cent: the operations of Gram
/// matrices depend a little on the processor.
fn alike(one: &str, other: &str) -> bool {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (one, other) = (words(one), words(other));
    let same = |(one, other): (&String, &String)| match (one.parse::<f64>(), other.parse::<f64>()) {
        (Ok(one), Ok(other)) => (one - other).abs() <= 0.02 * one.abs().max(other.abs()),
        _ => one == other,
    };
    one.len() == other.len() && one.iter().zip(&other).all(same)
}

/// Commands print what stands below them.
#[cfg(unix)]
#[test]
fn commands_print_what_the_book_says() {
    let mut count = 0;
    for (at, text) in pages().iter().flat_map(|page| page.marked("prints")) {
        let (command, printed) = text.split_once("\n\n").unwrap();
        let command = command.strip_prefix("$ barber").unwrap().replace("\\\n", " ");
        let run = util::barber(&command.split_whitespace().collect::<Vec<_>>());
        assert_eq!(run.status, 0, "{at}: {}", run.stderr);
        assert!(alike(printed, &run.stdout), "{at}: it prints\n{}", run.stdout);
        count += 1;
    }
    assert!(count > 0);
}

/// Every block says what it is: rustdoc takes one that does not for Rust.
#[test]
fn blocks_have_languages() {
    let known = ["rust", "sh", "console", "text", "toml", "python", "json", "yaml", "dockerfile"];
    for page in pages() {
        for block in page.blocks() {
            let word = &block.words[0];
            assert!(known.contains(&word.as_str()), "{}:{}: {word:?}", page.path, block.line);
        }
    }
}

#[test]
fn links_lead_somewhere() {
    let mut count = 0;
    for page in pages() {
        let dir = Path::new(&page.path).parent().unwrap();
        for rest in page.prose().split("](").skip(1) {
            let link = rest.split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            let (path, place) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.path.clone().into() } else { dir.join(path) };
            assert!(target.exists(), "{}: {link}", page.path);
            if !place.is_empty() {
                let found = self::page(target.to_str().unwrap()).places();
                assert!(found.contains(place), "{}: {link}; there is {found:?}", page.path);
            }
            count += 1;
        }
    }
    assert!(count > 20, "only {count} links");
}

#[test]
fn the_summary_has_every_chapter() {
    let summary = page(&format!("{BOOK}/SUMMARY.md")).text;
    for entry in fs::read_dir(BOOK).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "{name}");
    }
}

/// Whether a page has the name as code, in a line or in a block.
fn says(page: &Page, name: &str) -> bool {
    let code = [format!("`{name}`"), format!("\n{name} = "), format!("\n[{name}]\n")];
    code.iter().any(|code| page.text.contains(code))
}

#[test]
fn every_key_is_explained() {
    let chapter = page(&format!("{BOOK}/recipes.md"));
    for key in recipe::keys() {
        let name = key.path.rsplit('.').next().unwrap();
        assert!(says(&chapter, name), "recipes.md does not say `{}`", key.path);
    }
}

#[test]
fn every_metric_and_family_is_explained() {
    let (metrics, families) =
        (page(&format!("{BOOK}/metrics.md")), page(&format!("{BOOK}/families.md")));
    for name in barber_metric::registered().unwrap().keys() {
        assert!(says(&metrics, name), "metrics.md does not say `{name}`");
    }
    let rows = FAMILIES.iter().map(|of| format!("| `{}` | {} |\n", of.model_type, of.doc));
    let table = format!("| `model_type` | models |\n|---|---|\n{}\n", rows.collect::<String>());
    assert!(families.text.contains(&table), "families.md needs this table:\n{table}");
}

/// The Rust of a directory, with texts that go over several lines in one.
fn sources(dir: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.push_str(&sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(path).unwrap();
            let lines: Vec<&str> = text.split("\\\n").collect();
            let joined = lines.iter().enumerate();
            let joined = joined.map(|(i, part)| if i == 0 { part } else { part.trim_start() });
            all.push_str(&joined.collect::<String>().replace("\\\"", "\""));
        }
    }
    all
}

/// The longest text that is put in for a `…` in the source of a message.
const GAP: usize = 60;

/// Whether the parts of a message stand in the source, one after the other.
fn stands(source: &str, parts: &[&str]) -> bool {
    let Some((first, others)) = parts.split_first() else { return true };
    source.match_indices(first).any(|(at, _)| {
        let mut rest = &source[at + first.len()..];
        others.iter().all(|part| {
            let found = rest.find(part).filter(|gap| *gap <= GAP);
            found.inspect(|gap| rest = &rest[gap + part.len()..]).is_some()
        })
    })
}

#[test]
fn messages_are_barbers_own() {
    let source = sources(Path::new("src"));
    let messages = page(&format!("{BOOK}/troubleshooting.md")).marked("message");
    assert!(messages.len() > 20);
    for (at, text) in messages {
        let parts: Vec<&str> =
            text.trim().split('…').filter(|part| !part.trim().is_empty()).collect();
        assert!(stands(&source, &parts), "{at}: no message of Barber's: {text}");
    }
}
