//! `barber eval`.

use std::path::PathBuf;

use dfdx::tensor::Cpu;

use super::{Error, progress::bar, show};
use crate::{
    calibration::{Text, Tokens, segments},
    checkpoint::{Pruned, Reader},
    evaluate::{Perplexity, perplexity},
    model::Model,
};

/// Measures a checkpoint's perplexity on texts: a text's tokens are cut into consecutive segments,
/// each predicted on its own, its first token excepted.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The checkpoint: a directory in the Hugging Face layout.
    dir: PathBuf,
    /// A text: a text file; or JSON Lines or Parquet, whose records are documents. Text and JSON
    /// Lines may be compressed with gzip or Zstandard. May be repeated.
    #[arg(long = "text", value_name = "FILE", required = true)]
    texts: Vec<PathBuf>,
    /// The field of a record that holds its text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Leave out the special tokens that the tokenizer adds.
    #[arg(long)]
    no_special_tokens: bool,
    /// Tokens of a segment.
    #[arg(long, value_name = "N", default_value_t = 2048,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=1 << 24))]
    sequence_length: usize,
    /// How many segments to measure at most, from the start; all if left out.
    #[arg(long, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    segments: Option<usize>,
    /// Print JSON, and no progress.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let Arguments { dir, sequence_length, segments: limit, json, .. } = arguments;
    let reader = Reader::open(dir)?;
    let model = Model::new(&reader, Cpu::default())?;
    let tokens = tokens(&model, !arguments.no_special_tokens);
    let mut texts = Vec::new();
    for path in &arguments.texts {
        let text = Text { field: Some(arguments.field.clone()), ..Text::from(path.as_path()) };
        texts.push((path, segments(&text, *sequence_length, *limit, &tokens)?));
    }
    let mut reports = Vec::new();
    for (path, segments) in texts {
        let found = measure(&model, &Pruned::default(), &segments, "perplexity", *json)?;
        reports.push(Report { text: path.display().to_string(), found });
        if !json {
            println!(
                "{}: perplexity {:.4} on {} ({} predictions, {} segments)",
                show(dir),
                found.perplexity,
                show(path),
                found.predictions,
                found.segments
            );
        }
    }
    if *json {
        println!("{}", serde_json::json!({ "perplexity": reports }));
    }
    Ok(())
}

/// A perplexity, and the text that it is on.
#[derive(serde::Serialize)]
struct Report {
    text: String,
    #[serde(flatten)]
    found: Perplexity,
}

/// The tokenizer of a model.
pub(super) fn tokens(model: &Model<'_, Cpu>, special: bool) -> Tokens {
    Tokens::of(model.reader.path(), model.decoder.vocab_size, special)
}

/// The perplexity of a model as pruning left it, behind a progress bar.
pub(super) fn measure(
    model: &Model<'_, Cpu>,
    pruned: &Pruned,
    segments: &[Vec<u32>],
    name: &str,
    quiet: bool,
) -> Result<Perplexity, Error> {
    let bar = bar(name, model.decoder.layers.len() as u64, quiet);
    let layers = model.decoder.layers.len() as f64;
    let found = perplexity(model, pruned, segments, |share| {
        bar.set_position((share * layers) as u64);
    });
    bar.finish_and_clear();
    Ok(found?)
}
