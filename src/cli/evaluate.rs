//! `barber eval`.

use std::{fmt, path::PathBuf};

use super::{Error, columns::line, progress::Terminal, show};
use crate::{
    calibration::{Text, segments},
    checkpoint::{Pruned, Reader},
    evaluate::{Accuracy, Perplexity, TASKS, Task},
    executor::ops::Ops,
    hub::locate,
    model::{Model, check_config},
    precision::Precision,
    progress::Steps,
    ranks::Ranks,
    recipe::Device,
    run::{Asked, ScheduledPhase, Watch, check_text, measure, on_device, tokens},
};

/// Measures a checkpoint: its perplexity on texts, and its accuracy on zero-shot tasks. A text is
/// cut into consecutive segments; in each, every token but the first is predicted. A question's
/// answer is the choice with the highest likelihood (acc), or with the highest likelihood for its
/// length (acc_norm, where lm-eval has it), as in lm-eval.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber eval out/quickstart --text recipes/quickstart/evaluation.txt
  barber eval HuggingFaceTB/SmolLM2-135M --task arc_easy=arc_easy.jsonl --questions 100")]
pub(super) struct Arguments {
    /// The checkpoint: a directory in the Hugging Face layout, or `owner/name` on the hub.
    pub(super) dir: PathBuf,
    /// The branch, tag or commit of a model on the hub; main if left out.
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    /// A text: a text file; or JSON Lines or Parquet, whose records are documents. Text and JSON
    /// Lines may be compressed with gzip or Zstandard. May be repeated.
    #[arg(long = "text", value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// A zero-shot task and the file of its questions, JSON Lines or Parquet in the data set's
    /// usual layout: arc_challenge, arc_easy, boolq, hellaswag, openbookqa, piqa, rte or
    /// winogrande. May be repeated.
    #[arg(long = "task", value_name = "NAME=FILE", value_parser = task)]
    tasks: Vec<(&'static Task, PathBuf)>,
    /// Maximum number of questions of a task; all if left out.
    #[arg(long, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    questions: Option<usize>,
    /// The field of a record that holds its text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Leave out the special tokens that the tokenizer adds.
    #[arg(long)]
    no_special_tokens: bool,
    /// Tokens of a segment; the smaller of 2048 and the model's positions if left out.
    #[arg(long, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=1 << 24))]
    sequence_length: Option<usize>,
    /// Maximum number of segments, from the start; all if left out.
    #[arg(long, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    segments: Option<usize>,
    /// The device: cpu, or cuda:0 for the first NVIDIA GPU, which needs a binary with the feature
    /// `cuda`.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    /// Print JSON, and no progress.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    if arguments.texts.is_empty() && arguments.tasks.is_empty() {
        return Err(Error::Nothing);
    }
    on_device!(arguments.device, Precision::F32, Ranks::ONE, run_on(arguments))
}

fn run_on<D: Ops>(device: D, _: u64, arguments: &Arguments) -> Result<(), Error> {
    let Arguments { dir, segments: limit, json, .. } = arguments;
    let watch = Terminal { quiet: *json };
    let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
    let located = locate(dir, arguments.revision.as_deref(), &new, &|dir| Ok(check_config(dir)?))?;
    let reader = Reader::open(&located.dir)?;
    let model = Model::new(&reader, device)?;
    let tokens = tokens(&model, !arguments.no_special_tokens);
    let length = model.decoder.sequence(arguments.sequence_length);
    let mut texts = Vec::new();
    for path in &arguments.texts {
        let text = Text { field: Some(arguments.field.clone()), ..Text::from(path.as_path()) };
        let segments = segments(&text, length, *limit, &tokens)?;
        check_text(&model, &text, &segments, "--sequence-length")?;
        texts.push((path, text, segments));
    }
    let tasks = arguments.tasks.iter();
    let tasks = tasks.map(|(task, path)| Asked::read(task, path, arguments.questions));
    let tasks = tasks.collect::<Result<Vec<_>, _>>()?;
    let decoder = &model.decoder;
    let of_texts =
        texts.iter().map(|(_, text, segments)| ScheduledPhase::text(text, segments, decoder));
    let of_tasks = tasks.iter().map(|asked| asked.scheduled(decoder));
    watch.expect(&of_texts.chain(of_tasks).collect::<Vec<_>>());
    if let Some(quantisation) = reader.quantisation()?.filter(|_| !json) {
        println!("{}", line("", &format!("{}: {quantisation}", show(dir))));
    }
    let mut reports = Vec::new();
    for (path, text, segments) in texts {
        let found = measure(&model, &Pruned::dense(), &segments, &text.short(), &watch)?;
        if !json {
            let error = found.perplexity_stderr.map(|error| format!(" ± {error:.4}"));
            let said = format!(
                "{}: perplexity {:.4}{} on {} ({} predictions, {} segments of up to {} tokens)",
                show(dir),
                found.perplexity,
                error.unwrap_or_default(),
                show(path),
                found.predictions,
                found.segments,
                length
            );
            println!("{}", line("", &said));
        }
        reports.push(Report { text: path.display().to_string(), found });
    }
    let mut answers = Vec::new();
    for asked in tasks {
        let found = asked.answer(&model, &Pruned::dense(), &tokens, asked.task.name, &watch)?;
        if !json {
            let found = format!("{}: {} {}", show(dir), asked.task.name, Shown(&found));
            println!("{}", line("", &found));
        }
        answers.push(Answer { task: asked.task.name, file: asked.file, found });
    }
    if *json {
        println!("{}", serde_json::json!({ "perplexity": reports, "tasks": answers }));
    }
    Ok(())
}

/// Reads `NAME=FILE`.
fn task(text: &str) -> Result<(&'static Task, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("expected NAME=FILE")?;
    let known = || TASKS.iter().map(|task| task.name).collect::<Vec<_>>().join(", ");
    let task = Task::named(name).ok_or_else(|| format!("no task `{name}`; known: {}", known()))?;
    Ok((task, file.into()))
}

/// An accuracy in percent.
pub(super) struct Shown<'a>(pub(super) &'a Accuracy);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Accuracy { acc, acc_stderr, acc_norm, acc_norm_stderr, questions } = self.0;
        write!(f, "acc {:.2}% ± {:.2}", 100.0 * acc, 100.0 * acc_stderr)?;
        if let Some((acc, error)) = acc_norm.zip(*acc_norm_stderr) {
            write!(f, ", acc_norm {:.2}% ± {:.2}", 100.0 * acc, 100.0 * error)?;
        }
        let plural = if *questions == 1 { "" } else { "s" };
        write!(f, " ({questions} question{plural})")
    }
}

/// A task's accuracy.
#[derive(serde::Serialize)]
struct Answer {
    task: &'static str,
    file: PathBuf,
    #[serde(flatten)]
    found: Accuracy,
}

/// A perplexity, and its text.
#[derive(serde::Serialize)]
struct Report {
    text: String,
    #[serde(flatten)]
    found: Perplexity,
}
