//! `barber eval`.

use std::path::PathBuf;

use dfdx::tensor::Cpu;

use super::{Error, progress::bar, show};
use crate::{
    calibration::segments,
    checkpoint::{Pruned, Reader},
    evaluate::{Perplexity, perplexity},
    model::Model,
};

/// Measures a checkpoint's perplexity on a text: the text's tokens are cut into consecutive
/// segments, each predicted on its own, its first token excepted.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The checkpoint: a directory in the Hugging Face layout.
    dir: PathBuf,
    /// The text: a text file, or JSON Lines with a `text` field.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
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
    let Arguments { dir, text, sequence_length, segments: limit, json } = arguments;
    let reader = Reader::open(dir)?;
    let model = Model::new(&reader, Cpu::default())?;
    let segments = segments(text, *sequence_length, *limit, dir, model.decoder.vocab_size)?;
    let found = measure(&model, &Pruned::default(), &segments, "perplexity", *json)?;
    if *json {
        println!("{}", serde_json::to_value(found).unwrap_or_default());
    } else {
        println!(
            "{}: perplexity {:.4} on {} ({} predictions, {} segments)",
            show(dir),
            found.perplexity,
            show(text),
            found.predictions,
            found.segments
        );
    }
    Ok(())
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
