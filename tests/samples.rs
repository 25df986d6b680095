//! Calibration samples that the model writes itself, as a user makes and uses them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{fs, path::Path};

use util::{Run, barber, flat};

const MODEL: &str = "recipes/quickstart/model";
const TEXT: &str = "recipes/quickstart/calibration.txt";

fn samples(output: &Path, arguments: &[&str]) -> Run {
    let output = output.display().to_string();
    barber(
        &[&["samples", MODEL, "--output", &output, "--sequence-length", "32"], arguments].concat(),
    )
}

/// The rows of a file of samples.
fn rows(path: &Path) -> Vec<Vec<u64>> {
    let file: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    serde_json::from_value(file["token_ids"].clone()).unwrap()
}

#[test]
fn a_recipe_takes_samples_of_a_text_and_by_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let of_text =
        ["--text", TEXT, "--samples", "4", "--held-out", "2", "--selection", "sequential"];
    let run = samples(&file("text.json"), &[&of_text[..], &["--written", "0"]].concat());
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    let run = samples(&file("both.json"), &[&of_text[..], &["--written", "6"]].concat());
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    assert!(
        flat(&run.stdout).contains("4 of the text, 6 by the model, 2 held out; 32 tokens each")
    );
    let (text, both) = (rows(&file("text.json")), rows(&file("both.json")));
    assert_eq!((text.len(), both.len()), (6, 12));
    let (calibration, held_out) = both.split_at(10);
    assert_eq!(held_out, &text[4..]);
    // The text's samples are spread among those that the model wrote.
    let of_text = |place: &usize| [0, 3, 5, 8].contains(place);
    let (of_text, written): (Vec<_>, Vec<_>) =
        calibration.iter().enumerate().partition(|(place, _)| of_text(place));
    let [of_text, written] = [of_text, written].map(|of| Vec::from_iter(of.iter().map(|of| of.1)));
    assert_eq!(of_text, Vec::from_iter(&text[..4]));
    for (i, written) in written.iter().enumerate() {
        assert_eq!((written.len(), &written[..4]), (32, &text[i % 4][..4]));
    }
    // The fifth continues the same beginning as the first, in another way.
    assert_ne!(written[0], written[4]);
    let recipe = file("recipe.toml");
    let model = std::env::current_dir().unwrap().join(MODEL);
    let (source, out) = (file("both.json"), file("out"));
    let text = format!(
        "model.path = '{}'\ncalibration = {{ source = '{}', samples = 10, held_out = 2 }}\n\
         refine = [{{ use = 'swap' }}]\noutput.path = '{}'\n",
        model.display(),
        source.display(),
        out.display()
    );
    fs::write(&recipe, text).unwrap();
    let run = barber(&["prune", &recipe.display().to_string(), "--json"]);
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(
        (&report["calibration"]["samples"], &report["calibration"]["tokens"]),
        (&10.into(), &384.into())
    );
}

#[test]
fn no_text_is_needed_and_the_seed_decides() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, seed: &str| {
        let path = dir.path().join(name);
        let run = samples(&path, &["--written", "3", "--held-out", "1", "--seed", seed]);
        assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
        fs::read(path).unwrap()
    };
    let [a, again, other] = [("a", "0"), ("b", "0"), ("c", "1")].map(|(name, seed)| of(name, seed));
    assert_eq!(a, again);
    assert_ne!(a, other);
    let found = rows(&dir.path().join("a"));
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [32; 4]);
    assert!(found.iter().all(|row| row[0] == found[0][0]));
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.json");
    fs::write(&path, "mine").unwrap();
    let run = samples(&path, &["--written", "1"]);
    assert_eq!((run.status, fs::read_to_string(&path).unwrap().as_str()), (1, "mine"));
    assert!(flat(&run.stderr).contains("exists; choose another file"), "{}", run.stderr);
    for (arguments, why) in [
        (["--text", TEXT], "--samples"),
        (["--samples", "4"], "--text"),
        (["--selection", "first"], "unknown variant `first`"),
        (["--written", "many"], "--written"),
    ] {
        let run = samples(&dir.path().join("new.json"), &arguments);
        assert_eq!(run.status, 2, "{arguments:?}");
        assert!(flat(&run.stderr).contains(why), "{}", run.stderr);
    }
    let absent = dir.path().join("none/samples.json");
    assert_eq!(samples(&absent, &["--written", "1"]).status, 1);
    assert!(!absent.exists());
}
