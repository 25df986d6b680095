//! Wanda and its rebuild on SmolLM2-135M, beside the paper authors' own code on the same machine, in
//! turn.
//!
//! `BARBER_SMOLLM2` names the checkpoint and `BARBER_CALIBRATION` the calibration text. With
//! `BARBER_AUTHORS`, a command that runs the authors' code on a file of token ids that follows it
//! (`… {samples} {length}` are put in their places), theirs is measured too. `BARBER_ROUNDS` is the
//! number of rounds, 3 if left out, and `BARBER_SHAPES` the samples' shapes, `32x256,64x512`.
#![allow(clippy::print_stdout, reason = "a table is what a benchmark is for")]

mod util;

use std::{env, process::Command};

use util::{Run, at_layers, median, peak, reported, run};

/// SmolLM2-135M's decoder layers.
const LAYERS: f64 = 30.0;

fn barber(samples: usize, length: usize, passes: usize) -> Option<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_barber"));
    let out = env::temp_dir().join("barber-benchmark");
    command.args(["prune", "recipes/smollm2-wanda.toml", "--force", "--json"]);
    for set in [
        format!("model.path={}", env::var("BARBER_SMOLLM2").ok()?),
        format!("calibration.source={}", env::var("BARBER_CALIBRATION").ok()?),
        format!("calibration.samples={samples}"),
        format!("calibration.sequence_length={length}"),
        format!("mask.passes={passes}"),
        format!("output.path={}", out.display()),
        "evaluate.perplexity=[]".into(),
    ] {
        command.args(["--set", &set]);
    }
    Some(command)
}

fn authors(samples: usize, length: usize) -> Option<Command> {
    // What is watched is the command, not the shell.
    let line = format!("exec {}", env::var("BARBER_AUTHORS").ok()?);
    let line = line.replace("{samples}", &samples.to_string());
    let mut command = Command::new("sh");
    command.args(["-c", &line.replace("{length}", &length.to_string())]);
    Some(command)
}

fn main() {
    let rounds = env::var("BARBER_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let shapes = env::var("BARBER_SHAPES").unwrap_or_else(|_| "32x256,64x512".into());
    for shape in shapes.split(',') {
        let Some((Ok(samples), Ok(length))) =
            shape.split_once('x').map(|(a, b)| (a.parse::<usize>(), b.parse::<usize>()))
        else {
            println!("BARBER_SHAPES: `{shape}` is not SAMPLESxLENGTH");
            return;
        };
        let contenders = [
            ("authors' code", authors(samples, length)),
            ("two passes", barber(samples, length, 2)),
            ("one pass", barber(samples, length, 1)),
        ];
        let mut contenders: Vec<(&str, Command, Vec<Run>)> = contenders
            .into_iter()
            .filter_map(|(name, command)| Some((name, command?, Vec::new())))
            .collect();
        if contenders.is_empty() {
            println!("set BARBER_SMOLLM2 and BARBER_CALIBRATION; see the head of this file");
            return;
        }
        for _ in 0..rounds {
            contenders.iter_mut().for_each(|(_, command, runs)| runs.push(run(command)));
        }
        // Of the last run, which was Barber's in one pass.
        let output = env::temp_dir().join("barber-benchmark");
        let found = at_layers(&output);
        let [did, needed] = [found.operations, reported(&output, "least_operations")]
            .map(|operations| operations / LAYERS / 1e9);
        println!("{samples} samples of {length} tokens, median of {rounds}");
        println!(
            "  one pass: {did:.1} GFLOP of matrix products for each layer, attention included; its \
             linear layers need {needed:.1}"
        );
        let peak = peak();
        println!(
            "  they were {:.0}% of its time at the layers, {:.1} s, and ran at {:.0}% of the best rate, \
             {:.0} GFLOP/s",
            found.product_time(),
            found.seconds,
            found.rate(peak),
            peak / 1e9
        );
        let first = median(&contenders[0].2);
        for (name, _, runs) in &contenders {
            let Run { seconds, memory } = median(runs);
            println!(
                "  {name:14} {seconds:8.1} s  ({:.2} of the first)  {:7.0} MB  ({:.2})",
                seconds / first.seconds,
                memory as f64 / 1e6,
                memory as f64 / first.memory as f64
            );
        }
    }
}
