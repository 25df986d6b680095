//! `barber study` as a user runs it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{fs, path::Path};

use serde_json::Value;
use util::{Run, barber, flat};

/// Two methods × two cases × two seeds on the quickstart's model.
const STUDY: &str = "
seeds = [0, 1]
set = [
    'calibration.selection=random',
    'calibration.samples=8',
    'calibration.sequence_length=64',
    'evaluate.sequence_length=64',
    'evaluate.segments=4',
]
[[case]]
name = '50%'
set = ['sparsity.ratio=0.5']
[[case]]
name = '2:4'
set = ['sparsity.pattern=2:4']
[[method]]
name = 'Wanda'
set = ['mask.init=wanda', 'refine=[]']
[[method]]
name = 'rebuilt'
set = ['mask.init=wanda']
";

/// Writes the study, with some text replaced; its path.
fn study(dir: &Path, from: &str, to: &str) -> String {
    let recipe = std::env::current_dir().unwrap().join("recipes/quickstart.toml");
    let path = dir.join("study.toml");
    let text = STUDY.replace(from, to);
    fs::write(&path, format!("recipe = '{}'{text}", recipe.display())).unwrap();
    path.display().to_string()
}

fn succeeds(run: &Run) {
    assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
}

/// What a study prints, but for its last table, the seconds.
fn perplexities(run: &Run) -> &str {
    run.stdout.split("\nSeconds for the masks").next().unwrap()
}

#[test]
fn methods_are_compared_and_a_study_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("runs.jsonl");
    let output = file.display().to_string();
    let path = study(dir.path(), "", "");
    // A part of it first, and then the rest.
    succeeds(&barber(&["study", &path, "--output", &output, "--only", "Wanda"]));
    let lines = || fs::read_to_string(&file).unwrap().lines().count();
    assert_eq!(lines(), 4);
    let run = barber(&["study", &path, "--output", &output]);
    succeeds(&run);
    assert_eq!(lines(), 8);
    let title = "Perplexity on recipes/quickstart/evaluation.txt (lower is better), \
                 mean ± standard deviation over 2 seeds; dense 1.";
    assert!(flat(&run.stdout).starts_with(title), "{}", run.stdout);
    let table: Vec<_> = run.stdout.lines().skip_while(|line| !line.starts_with('|')).collect();
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    assert_eq!(cells(table[0]), ["", "", "50%", "2:4", ""]);
    assert_eq!(cells(table[1]).len(), 5);
    let kept = fs::read_to_string(&file).unwrap();
    let kept: Vec<Value> = kept.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (line, method) in [(2, "Wanda"), (3, "rebuilt")] {
        let cells = cells(table[line]);
        assert_eq!(cells[1], method);
        for (cell, case) in cells[2..4].iter().zip(["50%", "2:4"]) {
            let of = kept.iter().filter(|run| run["method"] == method && run["case"] == case);
            let of = of.map(|run| run["perplexity"][0]["pruned"].as_f64().unwrap());
            let [one, other] = of.collect::<Vec<_>>().try_into().unwrap();
            assert!(one > 1.8 && other > 1.8 && one != other, "{one} {other}");
            let expected = [(one + other) / 2.0, (one - other).abs() / 2.0_f64.sqrt()];
            let (mean, deviation) = cell.split_once(" ± ").unwrap();
            for (shown, expected) in [mean, deviation].into_iter().zip(expected) {
                assert!((shown.parse::<f64>().unwrap() - expected).abs() < 0.006, "{cell}");
            }
        }
    }
    assert!(table[5].starts_with("Seconds for the masks, mean ± "), "{}", run.stdout);
    // Nothing is left to do.
    let again = barber(&["study", &path, "--output", &output]);
    succeeds(&again);
    assert_eq!((lines(), &again.stdout), (8, &run.stdout));
    // Without the file the same comes of it, and nothing is left behind.
    let alone = barber(&["study", &path, "--json"]);
    succeeds(&alone);
    let found: Value = serde_json::from_str(&alone.stdout).unwrap();
    let runs = found["runs"].as_array().unwrap();
    for run in runs {
        let same = |other: &&Value| {
            ["method", "case", "seed", "settings"].iter().all(|key| run[key] == other[key])
        };
        let other = kept.iter().find(same).unwrap();
        assert_eq!(run["perplexity"], other["perplexity"]);
    }
    assert_eq!(runs.len(), 8);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);

    // A run is what `barber prune` makes of the same settings.
    let out = format!("output.path={}", dir.path().join("out").display());
    let mut arguments = vec!["prune", "recipes/quickstart.toml", "--json", "--set", &out];
    let sets = [
        "calibration.selection=random",
        "calibration.samples=8",
        "calibration.sequence_length=64",
        "evaluate.sequence_length=64",
        "evaluate.segments=4",
        "sparsity.pattern=2:4",
        "mask.init=wanda",
        "calibration.seed=1",
    ];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let pruned = barber(&arguments);
    succeeds(&pruned);
    let report: Value = serde_json::from_str(&pruned.stdout).unwrap();
    let of = |method: &str| {
        let of = |run: &&Value| run["method"] == method && run["case"] == "2:4" && run["seed"] == 1;
        &runs.iter().find(of).unwrap()["perplexity"][0]
    };
    let measured = &report["perplexity"][0];
    assert_eq!(measured["initial"]["perplexity"], of("Wanda")["pruned"]);
    assert_eq!(measured["refined"]["perplexity"], of("rebuilt")["pruned"]);
    assert_eq!(measured["dense"]["perplexity"], of("rebuilt")["dense"]);

    // Other settings are other runs.
    let sets = ["--set", "evaluate.segments=3", "--only", "Wanda"];
    let other = barber(&[&["study", &path, "--output", &output], &sets[..]].concat());
    succeeds(&other);
    assert_eq!(lines(), 12);
    assert_ne!(perplexities(&other), perplexities(&run));
}

#[test]
fn what_is_wrong_with_a_study_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to, expected) in [
        ("seeds", "sedes", &["did you mean `seeds`", "study.toml:2:"][..]),
        ("seeds = [0, 1]", "seeds = [0, 1", &["not TOML", "study.toml:"]),
        ("sparsity.ratio", "sparsity.ratoi", &["Wanda, 50%, seed 0", "did you mean `ratio`"]),
        ("refine=[]", "evaluate.segments=1", &["rebuilt, 50%, seed 0", "`evaluate` differs"]),
        (
            "pattern=2:4",
            "pattern=5:10",
            &["Wanda, 2:4, seed 0", "the pattern 5:10 does not divide"],
        ),
        ("refine=[]", "executor.memory=1 KiB", &["Wanda, 50%, seed 0", "memory is too little"]),
    ] {
        let run = barber(&["study", &study(dir.path(), from, to)]);
        let message = flat(&run.stderr);
        assert_eq!(run.status, 2, "{message}");
        for expected in expected {
            assert!(message.contains(expected), "no {expected:?} in: {message}");
        }
    }
    assert_eq!(barber(&["study", "no/such/study.toml"]).status, 2);
    let path = study(dir.path(), "", "");
    let run = barber(&["study", &path, "--only", "wanda"]);
    assert_eq!(run.status, 2);
    assert!(flat(&run.stderr).contains("there is `Wanda`, `rebuilt`"), "{}", run.stderr);
    let file = dir.path().join("runs.jsonl");
    fs::write(&file, "Wanda\n").unwrap();
    let run = barber(&["study", &path, "--output", &file.display().to_string()]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("runs.jsonl, line 1, is not a run"), "{}", run.stderr);
}

#[test]
fn a_study_goes_on_with_the_same_inputs_alone() {
    let dir = tempfile::tempdir().unwrap();
    let here = std::env::current_dir().unwrap().join("recipes/quickstart");
    fs::create_dir(dir.path().join("model")).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(here.join("model").join(name), dir.path().join("model").join(name)).unwrap();
    }
    for text in ["calibration.txt", "evaluation.txt"] {
        fs::copy(here.join(text), dir.path().join(text)).unwrap();
    }
    let path = |name: &str| dir.path().join(name).display().to_string();
    let [model, calibration, evaluation] = ["model", "calibration.txt", "evaluation.txt"].map(path);
    let sets = [
        format!("model.path={model}"),
        format!("calibration.source={calibration}"),
        format!("evaluate.perplexity=['{evaluation}']"),
    ];
    let output = path("runs.jsonl");
    let study = study(dir.path(), "seeds = [0, 1]", "seeds = [0]");
    let run = |more: &[&str]| {
        let mut arguments = vec!["study", &study, "--output", &output];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        barber(&[&arguments[..], more].concat())
    };
    succeeds(&run(&["--only", "Wanda"]));
    let first = fs::read(&output).unwrap();
    for name in
        ["model/model.safetensors", "calibration.txt", "evaluation.txt", "model/config.json"]
    {
        let file = dir.path().join(name);
        let bytes = fs::read(&file).unwrap();
        let mut changed = bytes.clone();
        match name {
            "model/config.json" => changed.push(b'\n'),
            _ => *changed.last_mut().unwrap() ^= 1,
        }
        fs::write(&file, changed).unwrap();
        // Whether something is left to run, or nothing.
        for more in [&[][..], &["--only", "Wanda"]] {
            let refused = run(more);
            let message = flat(&refused.stderr);
            assert_eq!(refused.status, 1, "{message}");
            for expected in ["the run Wanda, 50%, seed 0 had other inputs", name, "has changed"] {
                assert!(message.contains(expected), "{message}");
            }
        }
        fs::write(&file, bytes).unwrap();
    }
    // A line that was being written goes; the run is done again, to the same bytes but for its time.
    let line = first.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    fs::write(&output, &first[..line + 40]).unwrap();
    let again = run(&[]);
    succeeds(&again);
    assert!(flat(&again.stderr).contains("line 2 was cut off"), "{}", again.stderr);
    let read = |bytes: &[u8]| -> Vec<Value> {
        let lines = std::str::from_utf8(bytes).unwrap().lines();
        lines.map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (first, all) = (read(&first), read(&fs::read(&output).unwrap()));
    assert_eq!((first.len(), all.len()), (2, 4));
    for run in &all {
        // What is known of the dense model has not lost a bit.
        let dense = |run: &Value| run["perplexity"][0]["dense"].to_string();
        assert_eq!(dense(run), dense(&first[0]));
    }
    assert_eq!(all[0], first[0]);
    assert_eq!(all[1]["perplexity"], first[1]["perplexity"]);
}
