//! `barber verify` and `barber reproduce`: whether a result is what it says it is.

use std::path::PathBuf;

use super::{Error, progress::Terminal, show};
use crate::run::{Dense, Reproduced, Verified, reproduce, verify};

/// Checks a result of `barber prune` against its report: its files and the run's inputs by their
/// digests, the zeros and the pattern of each matrix, and that every kept weight has the bits of the
/// dense model. The exit status is 1 if something is wrong.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The directory that `barber prune` wrote.
    dir: PathBuf,
    /// The dense model, a directory or `owner/name` on the hub. Left out: the directory that the
    /// recipe names.
    #[arg(long)]
    dense: Option<PathBuf>,
}

/// Runs the recipe of a result of `barber prune` again, in a directory beside it that goes
/// afterwards, and compares byte for byte. The exit status is 1 if something is different.
#[derive(clap::Args)]
pub(super) struct Again {
    /// The directory that `barber prune` wrote.
    dir: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let found = verify(&arguments.dir, arguments.dense.as_deref(), &Terminal { quiet: false })?;
    let Verified { files, inputs, gone, matrices, weights, zeros, dense, findings } = &found;
    println!("files     {files} compared with their digests");
    println!("inputs    {inputs} compared with their digests");
    for path in gone {
        println!("          not there, and not compared: {}", show(path));
    }
    let share = 100.0 * *zeros as f64 / (*weights).max(1) as f64;
    println!("zeros     {zeros} of {weights} weights ({share:.2}%) in {matrices} matrices");
    match dense {
        Dense::NotThere(model) => {
            println!("dense     {} is not there; to compare, give it with --dense", show(model));
        }
        Dense::Compared { model, changed: 0 } => {
            println!("dense     every weight compared with {}, bit for bit", show(model));
        }
        Dense::Compared { model, changed } => println!(
            "dense     compared with {}: the recipe changed {changed} kept weights, so that only \
             zeros and what is not pruned can be checked",
            show(model)
        ),
    }
    conclude(findings, "what its report says")
}

pub(super) fn again(arguments: &Again) -> Result<(), Error> {
    let Reproduced { files, version, differences } =
        reproduce(&arguments.dir, &Terminal { quiet: false })?;
    println!("files     {files} compared byte for byte, and the report but for its times");
    if let Some(was) = version {
        println!("version   made by barber {} on {}, {}", was.barber, was.target, was.instructions);
    }
    conclude(&differences, "what comes out again")
}

/// Prints what is wrong.
fn conclude(findings: &[impl std::fmt::Display], what: &'static str) -> Result<(), Error> {
    findings.iter().for_each(|finding| println!("wrong     {finding}"));
    match findings.len() {
        0 => {
            println!("the result is {what}");
            Ok(())
        }
        count => Err(Error::Wrong { what, count }),
    }
}
