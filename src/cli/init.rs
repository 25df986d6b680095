//! `barber init`: writes a recipe for a checkpoint, to be edited.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
};

use dfdx::tensor::Cpu;
use pathdiff::diff_paths;
use serde_json::Value;

use super::{
    Error,
    check::scaled,
    columns::labelled,
    progress::{Terminal, on_this_machine},
    show, write,
};
use crate::{
    checkpoint::Reader,
    estimate::Estimate,
    family::{Decoder, Part},
    files,
    hub::{Located, locate},
    model::{Model, check_config},
    progress::Steps,
    recipe::load_text,
    run::{Forecast, Tests, Watch, calibrate, extent, plan, tokens},
};

/// Writes a recipe for a checkpoint, to be edited: the preset `best` on 32 × 256 tokens, with the
/// names of the model's layers, and the other keys as comments. Prints an estimate of the run's
/// time on this machine.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber init models/smollm2 --calibration valid.txt --text test.txt
  barber init HuggingFaceTB/SmolLM2-135M --output recipes/smollm2.toml")]
pub(super) struct Arguments {
    /// The checkpoint: a directory in the Hugging Face layout, or `owner/name` on the hub.
    pub(super) model: PathBuf,
    /// The branch, tag or commit of a model on the hub; main if left out.
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    /// The calibration text, on which statistics are computed. Left out, the recipe names
    /// calibration.txt, which you have to provide.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// A text to measure the perplexity on. May be repeated.
    #[arg(long = "text", value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// The recipe; left out, the name of the model with .toml, in the current directory.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the recipe if it exists.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    for path in arguments.calibration.iter().chain(&arguments.texts) {
        files::open(path).map_err(|source| Error::File { path: path.clone(), source })?;
    }
    let name = name(&arguments.model);
    let target = arguments.output.clone().unwrap_or_else(|| format!("{name}.toml").into());
    write::check(&target, arguments.force)?;
    let watch = Terminal { quiet: false };
    let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
    let located = locate(&arguments.model, arguments.revision.as_deref(), &new, &|dir| {
        Ok(check_config(dir)?)
    })?;
    let reader = Reader::open(&located.dir)?;
    let model = Model::new(&reader, Cpu::default())?;
    let draft = Draft { arguments, name: &name, located: &located, model: &model, target: &target };

    // What it takes is part of what it says, and to know that it must be understood as it is.
    let text = draft.text(None);
    let loaded = load_text(&target, &text, [], &[])?;
    let planned = plan(&loaded, &model)?;
    let tests = Tests::read(&loaded.recipe, &model)?;
    let extent = extent(&loaded.recipe, &model)?;
    let forecast = Forecast::new(&loaded, &model, &planned, &tests, extent)?;
    let text = draft.text(Some(forecast.takes));

    write::new(&target, text.as_bytes(), arguments.force)?;
    println!("written   {}", show(&target));
    let time = forecast.time(&model.executor.device, &model.decoder)?;
    println!("takes     {}", on_this_machine(time));
    let missing = match arguments.calibration {
        Some(_) => vec![calibrate(&loaded.recipe, &model).err().map(|e| e.to_string())],
        None => vec![
            Some("a text: put it at calibration.txt, or name it in calibration.source".into()),
            tokens(&model, true).encode("").err().map(|e| e.to_string()),
        ],
    };
    for missing in missing.iter().flatten() {
        println!("{}", labelled("missing", missing));
    }
    println!("next      barber check {0}\n          barber prune {0}", argument(&target));
    Ok(())
}

/// A path, quoted for a shell.
fn argument(path: &Path) -> String {
    let shown = show(path);
    // A path must not look like an option.
    let shown = if shown.starts_with('-') { format!("./{shown}") } else { shown };
    shlex::try_quote(&shown).map_or_else(|_| shown.clone(), Cow::into_owned)
}

/// A text for a comment of one line.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// The last part of a model's path or name.
fn name(model: &Path) -> String {
    let whole = || fs::canonicalize(model).ok();
    let name = model.file_name().map(Into::into).or_else(|| whole()?.file_name().map(Into::into));
    let name: std::ffi::OsString = name.unwrap_or_else(|| "model".into());
    name.to_string_lossy().to_lowercase()
}

/// A recipe before it is written.
struct Draft<'a> {
    arguments: &'a Arguments,
    name: &'a str,
    located: &'a Located,
    model: &'a Model<'a, Cpu>,
    /// Path of the recipe.
    target: &'a Path,
}

impl Draft<'_> {
    /// The text of the recipe, with the estimate of its cost, if known.
    fn text(&self, found: Option<Estimate>) -> String {
        let Self { arguments, name, model, .. } = self;
        let decoder = &model.decoder;
        let config = |key: &str| model.reader.config().get(key);
        let weights: usize =
            decoder.tensors().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let dtype = model.reader.tensor(&decoder.embedding.weight);
        let longest = decoder.positions().tokens;
        // A directory is relative to the recipe's; a name on the hub stays unchanged.
        let (path, revision) = match &self.located.commit {
            Some(commit) => (quoted(&arguments.model), format!("revision = \"{commit}\"")),
            None => (self.path(&arguments.model), String::new()),
        };
        // A missing calibration text is expected beside the recipe.
        let calibration = arguments.calibration.as_deref().map(|text| self.path(text));
        let calibration = calibration.unwrap_or_else(|| quoted(Path::new("calibration.txt")));
        let texts: Vec<String> = arguments.texts.iter().map(|text| self.path(text)).collect();
        let cost = found.map_or_else(String::new, |found| {
            let memory = scaled(found.memory + found.waiting, "B");
            let pruning = scaled(found.pruning, "FLOP");
            let measured = match found.evaluation {
                0.0 => String::new(),
                work => format!("; measuring, {}", scaled(work, "FLOP")),
            };
            let takes = format!(
                "As it stands, pruning takes about {memory} of memory, beside the checkpoint's own \
                 pages, and {pruning} of matrix products{measured}. `barber check` says how long \
                 that takes on your machine."
            );
            let lines = textwrap::Options::new(WIDTH).initial_indent("# ").subsequent_indent("# ");
            textwrap::fill(&takes, lines)
        });
        let last = decoder.projections().last().map_or("", |of| of.short_name());
        let text = format!(
            include_str!("init.toml"),
            name = one_line(name),
            weights = weights,
            cost = cost,
            path = path,
            revision = revision,
            longest = longest,
            last = last,
            family = config("model_type").and_then(Value::as_str).unwrap_or_default(),
            layers = decoder.layers.len(),
            dtype = dtype.map(|tensor| format!("{:?}", tensor.dtype)).unwrap_or_default(),
            file = one_line(&argument(self.target)),
            calibration = calibration,
            samples = SAMPLES,
            length = longest.min(LENGTH),
            segment = longest.min(SEGMENT),
            linears = linears(decoder),
            output = quoted(&self.output()),
            texts = format!("[{}]", texts.join(", ")),
        );
        aligned(&text)
    }

    /// Path of the output: beside the recipe or, if the recipe is in the model's directory, beside
    /// that directory.
    fn output(&self) -> PathBuf {
        let name = format!("{}-pruned", self.name);
        let beside = || {
            let model = fs::canonicalize(&self.located.dir).ok()?;
            let recipe = fs::canonicalize(self.home()).ok()?;
            let beside = recipe.starts_with(&model).then(|| model.with_file_name(&name))?;
            diff_paths(beside, recipe)
        };
        beside().unwrap_or_else(|| name.clone().into())
    }

    /// The directory of the recipe.
    fn home(&self) -> &Path {
        let dir = self.target.parent().filter(|dir| !dir.as_os_str().is_empty());
        dir.unwrap_or(Path::new("."))
    }

    /// A path of the command line, relative to the recipe, quoted.
    fn path(&self, path: &Path) -> String {
        let from_there = || {
            let home = fs::canonicalize(self.home()).ok()?;
            let path = diff_paths(std::path::absolute(path).ok()?, home)?;
            Some(if path.as_os_str().is_empty() { PathBuf::from(".") } else { path })
        };
        let elsewhere = path.is_relative() && self.home() != Path::new(".");
        let named = if elsewhere { from_there() } else { None };
        quoted(&named.unwrap_or_else(|| path.to_owned()))
    }
}

/// Number of calibration samples in the recipe.
const SAMPLES: usize = 32;
/// Maximum number of tokens of a sample.
const LENGTH: usize = 256;
/// Maximum number of tokens of a segment of an evaluation.
const SEGMENT: usize = 512;
/// Maximum length of a line.
const WIDTH: usize = 100;
/// Column of the comments after values.
const COMMENTS: usize = 29;

fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// The linear layers of the first decoder layer, a line for each part.
fn linears(decoder: &Decoder) -> String {
    let layer = decoder.layers.first();
    let lines = layer.into_iter().flat_map(|layer| {
        Part::ALL.map(|part| {
            let linears = layer.projections(part).iter();
            // All experts are alike.
            let linears = linears.filter(|linear| linear.expert.unwrap_or(0) == 0);
            let linears: Vec<String> = linears
                .map(|linear| {
                    // Without the name of the part.
                    let name = linear.name.split_once('.').map_or(&*linear.name, |of| of.1);
                    let name = match linear.expert {
                        Some(_) => name.replacen(".0.", ".*.", 1),
                        None => name.to_owned(),
                    };
                    format!("{name} {}×{}", linear.dims.rows, linear.dims.columns)
                })
                .collect();
            let lines = textwrap::Options::new(WIDTH)
                .initial_indent("#   ")
                .subsequent_indent("#     ")
                .word_separator(textwrap::WordSeparator::AsciiSpace);
            textwrap::fill(&format!("{}: {}", part.name(), linears.join(", ")), lines)
        })
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The text with aligned comments, and without consecutive empty lines.
fn aligned(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let line = match line.split_once("  #") {
            Some((value, comment)) if !value.trim().is_empty() => {
                format!("{:COMMENTS$}#{comment}", format!("{} ", value.trim_end()))
            }
            _ => line.trim_end().to_owned(),
        };
        if !line.is_empty() || lines.last().is_some_and(|last| !last.is_empty()) {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}
