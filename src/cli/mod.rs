//! The command line: arguments and printing. No other module uses it.

/// Prints a line of a command's result.
macro_rules! println {
    ($($text:tt)*) => { $crate::cli::print::line(format_args!($($text)*)) };
}

mod check;
mod clean;
mod columns;
mod compare;
mod complete;
mod console;
mod convert;
mod evaluate;
mod gains;
mod hint;
mod init;
mod inspect;
mod interrupt;
mod job;
mod metrics;
mod new_metric;
mod plan;
mod print;
mod progress;
mod prune;
mod samples;
mod schema;
mod study;
mod summary;
mod sweep;
mod table;
mod verify;
mod write;

use std::{borrow::Cow, io::ErrorKind, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use miette::Report;

use crate::run;

/// Prunes large language models from a declarative recipe.
#[derive(Parser)]
#[command(name = "barber", version, about, max_term_width = 100, after_help = EXAMPLES)]
struct Arguments {
    #[command(flatten)]
    console: console::Arguments,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
A first run, in a clone of the repository:
  barber prune recipes/quickstart.toml

A model of your own:
  barber init models/smollm2 --calibration text.txt
  barber check smollm2.toml
  barber prune smollm2.toml
  barber inspect smollm2-pruned
";

#[derive(Subcommand)]
enum Command {
    /// Write a recipe for a checkpoint.
    Init(init::Arguments),
    /// Show a recipe's values and the cost of its run, without running it.
    Check(check::Arguments),
    /// Count what a recipe's run takes on several devices, from the model's config.json alone.
    Plan(plan::Arguments),
    /// Prune a checkpoint as a recipe says.
    Prune(prune::Arguments),
    /// Measure a checkpoint's perplexity on texts, and its accuracy on tasks.
    Eval(evaluate::Arguments),
    /// Show the tensors of a checkpoint and their zeros.
    Inspect(inspect::Arguments),
    /// Compare methods: prune a model with each of them, in several cases and with several seeds.
    Study(study::Arguments),
    /// Compare runs in tables and on a page.
    Compare(compare::Arguments),
    /// Check a result of `prune`: digests, zeros, pattern, and every kept weight's bits.
    Verify(verify::Arguments),
    /// Write a compressed or quantised checkpoint dense.
    Convert(convert::Arguments),
    /// Run the recipe of a result again, and compare.
    Reproduce(verify::Again),
    /// Write calibration samples, of a text and by the model itself.
    Samples(samples::Arguments),
    /// List the metrics that a recipe's pipeline can use.
    Metrics(metrics::Arguments),
    /// Print the JSON Schema of recipes, for editors that complete and explain their keys.
    Schema,
    /// Write a crate for a metric of your own.
    NewMetric(new_metric::Arguments),
    /// Print shell completions of commands and options.
    Completions(complete::CompletionsArguments),
    /// Print or write the manual pages.
    Man(complete::ManArguments),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Job(run::Error),
    #[error(transparent)]
    Duplicate(#[from] barber_metric::Duplicate),
    #[error(transparent)]
    NewMetric(#[from] new_metric::Error),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(
        "{}, line {line}, is not a run of a study: {problem}; remove the line, or choose another \
         --output",
        path.display()
    )]
    NoRecord { path: PathBuf, line: usize, problem: String },
    #[error(
        "{}: the run {run} had other inputs: {}; undo the change, or choose another --output",
        path.display(), differences.join("; ")
    )]
    OtherInputs { path: PathBuf, run: String, differences: Vec<String> },
    #[error("--only {name}: the study has no such method; there is {known}")]
    NoMethod { name: String, known: String },
    #[error(
        "`{0}` differs from the study's first run, but all runs must have the same model, device, \
         texts and tasks; set it in the study's recipe, in the study's own `set`, or with --set"
    )]
    Varies(&'static str),
    #[error("{0}")]
    Meant(String),
    #[error(
        "there is nothing to measure; give a text with --text FILE, or the questions of a task with \
         --task NAME=FILE"
    )]
    Nothing,
    #[error("the result does not match {what}: {count} wrong")]
    Wrong { what: &'static str, count: usize },
    #[error("{run}: {error}")]
    Run { run: String, error: Box<Error> },
    #[error(transparent)]
    NoReport(#[from] crate::report::Error),
    #[error(
        "{} exists, but was made with another recipe or other inputs; choose another output.path, \
         or replace it with --force",
        .0.display()
    )]
    OtherRun(PathBuf),
    #[error(
        "{} is a checkpoint, so the runs of a sweep cannot be written into it; choose another \
         output.path",
        .0.display()
    )]
    InCheckpoint(PathBuf),
    #[error("{} exists; choose another file, or replace it with --force", .0.display())]
    Exists(PathBuf),
    #[error("{} is {kind}, and only regular files are replaced; choose another file", path.display())]
    NotReplaced { path: PathBuf, kind: &'static str },
    #[error(
        "BARBER_LOG: {0}; expected a level, such as `info`, or a list such as \
         `warn,llm_barber=debug`"
    )]
    Log(String),
    #[error(transparent)]
    NoMpi(#[from] crate::ranks::NoMpi),
    #[error(
        "several processes do not share the runs of a sweep or a study by themselves; give each whole \
         runs with --split runs, or start one process"
    )]
    RunsOfRanks,
    #[error(
        "--split runs: the recipe has no [sweep], so there is one run, whose samples all processes \
         share; leave the option out"
    )]
    OneRun,
    #[error("the result cannot be printed: {0}")]
    Print(&'static str),
    #[error("the manual page cannot be made: {0}")]
    Page(std::io::Error),
}

/// The errors of a run are errors of a command.
impl<E> From<E> for Error
where
    run::Error: From<E>,
{
    fn from(error: E) -> Self {
        Self::Job(error.into())
    }
}

impl Error {
    /// The exit status: 2 if the recipe or the command line is wrong, otherwise 1.
    fn status(&self) -> u8 {
        match self {
            Self::Job(error) if error.is_usage() => 2,
            Self::NewMetric(error) if error.is_usage() => 2,
            Self::Duplicate(_) | Self::NoMethod { .. } | Self::Varies(_) | Self::Log(_) => 2,
            Self::Meant(_) | Self::Nothing | Self::NoMpi(_) | Self::RunsOfRanks => 2,
            Self::OneRun => 2,
            Self::Run { error, .. } => error.status(),
            _ => 1,
        }
    }

    /// The error as it is printed, with the lines of a recipe's problems.
    fn report(self) -> Report {
        match self {
            Self::Job(run::Error::Recipe(error)) => Report::new(error),
            Self::Run { run, error } => error.report().wrap_err(run),
            other => Report::msg(other.to_string()),
        }
    }
}

/// Runs the command line with the process's arguments. A binary of your own calls it to run with
/// the metrics that it links.
pub fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let Arguments { console, command } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refused(&error, &words),
    };
    crate::buffer::keep_freed();
    // The main thread works, too, so that no other thread must be woken for small tasks.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    let meant = || hint::home(&words).map_or_else(|| hint::check(&command), Err);
    let result = console.apply().and_then(|()| meant()).and_then(|()| match command {
        Command::Init(arguments) => init::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Prune(arguments) => prune::run(&arguments),
        Command::Study(arguments) => study::run(&arguments),
        Command::Eval(arguments) => evaluate::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Reproduce(arguments) => verify::again(&arguments),
        Command::Samples(arguments) => samples::run(&arguments),
        Command::Metrics(arguments) => metrics::run(&arguments),
        Command::Schema => schema::run(),
        Command::NewMetric(arguments) => new_metric::run(&arguments).map_err(Error::from),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Completions(arguments) => {
            complete::completions(&arguments);
            Ok(())
        }
        Command::Man(arguments) => complete::man(&arguments),
    });
    let result = result.and_then(|()| print::failed().map_or(Ok(()), |why| Err(Error::Print(why))));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = error.status();
            print::message(&format!("{:?}\n", error.report()));
            ExitCode::from(status)
        }
    }
}

/// Prints the error in the arguments, or the requested help.
fn refused(error: &clap::Error, words: &[String]) -> ExitCode {
    let text = error.render().to_string();
    match clean::clean(&text) {
        // Nothing to escape: printed in colours.
        Cow::Borrowed(_) => match error.print() {
            Err(lost) if lost.kind() != ErrorKind::BrokenPipe && !error.use_stderr() => {
                print::message(&format!("the help cannot be printed: {lost}\n"));
                return ExitCode::FAILURE;
            }
            _ => {}
        },
        Cow::Owned(text) => print::message(&text),
    }
    print::message(&hint::option(error, words).unwrap_or_default());
    // clap's status for a usage error is 2.
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// A path as shown in messages.
fn show(path: &std::path::Path) -> String {
    let current = std::env::current_dir().unwrap_or_else(|_| PathBuf::new());
    clean::line(&path.strip_prefix(&current).unwrap_or(path).display().to_string())
}
