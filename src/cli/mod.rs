//! The command line: arguments and printing. It knows everything, and nothing knows it.
#![allow(clippy::print_stdout, reason = "printing is what a command line does")]

mod check;
mod compare;
mod evaluate;
mod metrics;
mod phases;
mod progress;
mod prune;
mod study;
mod summary;
mod table;
mod write;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use miette::Report;

use crate::{
    calibration, checkpoint, evaluate as evaluation, hub, model, plan, prune as pruning, recipe,
    records,
};

/// Prunes large language models from a declarative recipe.
#[derive(Parser)]
#[command(name = "barber", version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a recipe means and what it will take, without running it.
    Check(check::Arguments),
    /// Prune a checkpoint as a recipe says.
    Prune(prune::Arguments),
    /// Measure a checkpoint's perplexity on texts, and its accuracy on tasks.
    Eval(evaluate::Arguments),
    /// Compare methods: prune a model with each of them, in several cases and with several seeds.
    Study(study::Arguments),
    /// Put runs side by side, in tables and on a page.
    Compare(compare::Arguments),
    /// List the metrics that a recipe's pipeline can use.
    Metrics,
}

/// Why a command failed; each is shown with its causes.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Recipe(#[from] recipe::RecipeError),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Hub(#[from] hub::Error),
    #[error(transparent)]
    Calibration(#[from] calibration::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Plan(#[from] plan::Error),
    #[error(transparent)]
    Prune(#[from] pruning::Error),
    #[error(transparent)]
    Duplicate(#[from] barber_metric::Duplicate),
    #[error(transparent)]
    Records(#[from] records::Error),
    #[error(transparent)]
    Accuracy(#[from] evaluation::Error),
    #[error("{0}")]
    #[cfg(feature = "cuda")]
    Device(String),
    #[error(
        "executor.device is a GPU, but this barber was built without CUDA; build it with \
         `cargo build --release --features cuda`, or set executor.device to \"cpu\""
    )]
    #[cfg(not(feature = "cuda"))]
    NoCuda,
    #[error(
        "executor.memory is too little: a layer of this model needs about {needed} at a time; \
         raise it, or lower calibration.sequence_length"
    )]
    Memory { needed: bytesize::ByteSize },
    #[error("{}: no questions", .0.display())]
    NoQuestions(PathBuf),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(
        "{}, line {line}, is no run of a study: {problem}; remove the line, or choose another \
         --output",
        path.display()
    )]
    NoRecord { path: PathBuf, line: usize, problem: String },
    #[error("--only {name}: the study has no such method; there is {known}")]
    NoMethod { name: String, known: String },
    #[error(
        "`{0}` differs from the study's first run, but all runs have one model, one device and the \
         same texts and tasks; set it in the study's recipe, in the study's own `set`, or with --set"
    )]
    Varies(&'static str),
    #[error("{run}: {error}")]
    Run { run: String, error: Box<Error> },
    #[error("the report cannot be written: {0}")]
    Report(String),
    #[error(transparent)]
    NoReport(#[from] crate::report::Error),
    #[error("{} exists; choose another file, or replace it with --force", .0.display())]
    Exists(PathBuf),
}

impl Error {
    /// 2 for what the user wrote, 1 for what went wrong.
    fn status(&self) -> u8 {
        match self {
            Self::Recipe(_) | Self::Plan(_) | Self::Duplicate(_) | Self::Memory { .. } => 2,
            Self::NoMethod { .. } | Self::Varies(_) => 2,
            Self::Run { error, .. } => error.status(),
            #[cfg(not(feature = "cuda"))]
            Self::NoCuda => 2,
            _ => 1,
        }
    }

    /// As it is shown: a recipe's problems with their lines.
    fn report(self) -> Report {
        match self {
            Self::Recipe(error) => Report::new(error),
            Self::Run { run, error } => error.report().wrap_err(run),
            other => Report::msg(other.to_string()),
        }
    }
}

/// Calls a function with the device that a recipe names and the bytes of memory that it has free.
macro_rules! on_device {
    ($device:expr, $run:ident($($argument:expr),*)) => {
        match $device {
            $crate::executor::Device::Cpu => $run(
                dfdx::tensor::Cpu::default(),
                $crate::executor::available_memory(),
                $($argument),*
            ),
            #[cfg(feature = "cuda")]
            $crate::executor::Device::Cuda(number) => {
                let opened = $crate::executor::cuda(number).map_err($crate::cli::Error::Device);
                opened.and_then(|(device, memory)| $run(device, memory, $($argument),*))
            }
            #[cfg(not(feature = "cuda"))]
            $crate::executor::Device::Cuda(_) => Err($crate::cli::Error::NoCuda),
        }
    };
}
use on_device;

/// Runs the command line with the process's arguments. A binary of your own calls it to run with
/// the metrics that it links.
pub fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BARBER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // A second call in one process keeps the first one's subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
    // A path that is broken over two lines can be neither clicked nor searched for.
    let _ = miette::set_hook(Box::new(|_| {
        Box::new(miette::MietteHandlerOpts::new().wrap_lines(false).build())
    }));
    // The exit status of a usage error is 2, clap's own.
    let Arguments { command } = Arguments::parse();
    let result = match command {
        Command::Check(arguments) => check::run(&arguments),
        Command::Prune(arguments) => prune::run(&arguments),
        Command::Study(arguments) => study::run(&arguments),
        Command::Eval(arguments) => evaluate::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Metrics => metrics::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = error.status();
            eprintln!("{:?}", error.report());
            ExitCode::from(status)
        }
    }
}

/// A path as messages show it.
fn show(path: &std::path::Path) -> String {
    let current = std::env::current_dir().unwrap_or_else(|_| PathBuf::new());
    path.strip_prefix(&current).unwrap_or(path).display().to_string()
}
