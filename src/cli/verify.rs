//! `barber verify` and `barber reproduce`: check a result.

use std::path::PathBuf;

use serde_json::json;

use super::{Error, columns::line, progress::Terminal, show};
use crate::run::{Dense, Reproduced, Verified, reproduce, verify};

/// Checks a result of `barber prune` against its report: the digests of its files and of the run's
/// inputs, that no files were added, the page, the report's counts and sizes, the zeros, the pattern
/// and the stored mask of each matrix, or the rows and columns that a smaller model has, and that every kept weight
/// has the dense model's bits. Measurements are
/// not checked: `barber reproduce` measures again. The exit status is 1 if something is wrong.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The directory that `barber prune` wrote.
    dir: PathBuf,
    /// The dense model, a directory or `owner/name` on the hub. Left out: the directory that the
    /// recipe names.
    #[arg(long)]
    dense: Option<PathBuf>,
    /// Print JSON, and no progress.
    #[arg(long)]
    json: bool,
}

/// Runs the recipe of a result of `barber prune` again, in a temporary directory beside it, and
/// compares byte for byte. The exit status is 1 if something is different.
#[derive(clap::Args)]
pub(super) struct Again {
    /// The directory that `barber prune` wrote.
    dir: PathBuf,
    /// Print JSON, and no progress.
    #[arg(long)]
    json: bool,
}

/// What to compare a result with.
const VERIFIED: &str = "its report";
const REPRODUCED: &str = "its rerun";

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let watch = Terminal { quiet: arguments.json };
    let found = verify(&arguments.dir, arguments.dense.as_deref(), &watch)?;
    let Verified { files, page, inputs, gone, matrices, weights, zeros, dense, findings, .. } =
        &found;
    let Verified { masks, structures, permuted, .. } = &found;
    if arguments.json {
        let (model, quantisation, changed) = match dense {
            Dense::NotThere(model) | Dense::Unlike(model) => (model, None, None),
            Dense::Compared { model, quantisation, changed } => {
                (model, quantisation.as_ref(), Some(changed))
            }
        };
        println!(
            "{}",
            json!({
                "result": arguments.dir,
                "files": files,
                "page": { "compared": page },
                "inputs": inputs,
                "inputs_gone": gone,
                "matrices": matrices,
                "weights": weights,
                "zeros": zeros,
                "masks": masks,
                "structures": structures,
                "permuted": permuted,
                "dense": {
                    "model": model,
                    "quantisation": quantisation,
                    "compared": changed.is_some(),
                    "changed": changed,
                },
                "wrong": messages(findings),
            })
        );
        return judge(findings, VERIFIED);
    }
    let files = format!("{files} compared with their digests, no other files");
    println!("{}", line("files", &files));
    let page = match page {
        true => "compared with the page that the report gives",
        false => "not compared: it is missing, or another version made it",
    };
    println!("{}", line("page", page));
    println!("{}", line("inputs", &format!("{inputs} compared with their digests")));
    for path in gone {
        println!("          missing, not compared: {}", show(path));
    }
    let fraction = 100.0 * *zeros as f64 / (*weights).max(1) as f64;
    let (label, lost) = match structures {
        Some(structures) => ("removed", format!("{structures}, from {matrices} matrices")),
        None => (
            "zeros",
            format!("{zeros} of {weights} weights ({fraction:.2}%) in {matrices} matrices"),
        ),
    };
    println!("{}", line(label, &lost));
    if let Some(masks) = masks {
        println!("{}", line("masks", &format!("{masks} compared with the zeros")));
    }
    if *permuted > 0 {
        let permuted =
            format!("inner channels of {permuted} output projections, compared in order");
        println!("{}", line("permuted", &permuted));
    }
    let dense = match dense {
        Dense::NotThere(model) => {
            format!("{} is missing; give it with --dense to compare", show(model))
        }
        Dense::Unlike(model) => {
            format!(
                "not compared with {}, which cannot have these structures or channels",
                show(model)
            )
        }
        Dense::Compared { model, quantisation, changed } => {
            let form = quantisation.as_ref().map_or_else(String::new, |of| format!(" ({of})"));
            let model = format!("{}{form}", show(model));
            match changed {
                0 => format!("every weight compared with {model}, bit for bit"),
                changed => format!(
                    "compared with {model}: the recipe changed {changed} kept weights, so only \
                     zeros and tensors that are not pruned can be checked"
                ),
            }
        }
    };
    println!("{}", line("dense", &dense));
    let report = "counts and sizes compared; not what was measured (perplexity, accuracy, errors, \
                  time, memory), which `barber reproduce` measures again";
    println!("{}", line("report", report));
    conclude(findings, VERIFIED)
}

pub(super) fn again(arguments: &Again) -> Result<(), Error> {
    let Reproduced { files, version, differences } =
        reproduce(&arguments.dir, &Terminal { quiet: arguments.json })?;
    if arguments.json {
        println!(
            "{}",
            json!({
                "result": arguments.dir,
                "files": files,
                "made_by": version,
                "wrong": messages(&differences),
            })
        );
        return judge(&differences, REPRODUCED);
    }
    let files = format!("{files} compared byte for byte, and the report but for its times");
    println!("{}", line("files", &files));
    if let Some(was) = version {
        let made = format!("made by barber {} on {}, {}", was.barber, was.target, was.instructions);
        println!("{}", line("version", &made));
    }
    conclude(&differences, REPRODUCED)
}

fn messages(findings: &[impl ToString]) -> Vec<String> {
    findings.iter().map(ToString::to_string).collect()
}

/// Prints all findings and the conclusion.
fn conclude(findings: &[impl ToString], what: &'static str) -> Result<(), Error> {
    messages(findings).iter().for_each(|finding| println!("{}", line("wrong", finding)));
    judge(findings, what)?;
    println!("the result matches {what}");
    Ok(())
}

fn judge<T>(findings: &[T], what: &'static str) -> Result<(), Error> {
    match findings.len() {
        0 => Ok(()),
        count => Err(Error::Wrong { what, count }),
    }
}
