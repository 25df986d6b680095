//! `barber samples`: calibration samples that the model writes itself.

use std::path::PathBuf;

use super::{Error, progress::Terminal, show, write};
use crate::{
    calibration::{Samples, Selection, Text, samples},
    checkpoint::Reader,
    evaluate::written,
    executor::ops::Ops,
    hub::locate,
    model::{Model, check_config},
    precision::Precision,
    progress::Steps,
    ranks::Ranks,
    recipe::Device,
    run::{PARTS, Watch, on_device, parts, tokens},
};

/// Writes a file of calibration samples: some of a text, and others that the dense model writes itself
/// (self-calibration, arXiv 2410.17170), each token drawn from its predictions. A written sample
/// continues the beginning of one of the text's. Without a text, the model writes all samples, from its
/// first token.
///
/// More samples make better masks and values where the text is short: a stage fits few samples
/// closely, and others less.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber samples models/smollm2 --text text.txt --samples 32 --written 96 --output samples.json
  barber prune smollm2.toml --set calibration.source=samples.json --set calibration.samples=128")]
pub(super) struct Arguments {
    /// The model: a directory in the Hugging Face layout, or `owner/name` on the hub.
    pub(super) model: PathBuf,
    /// The branch, tag or commit of a model on the hub; main if left out.
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    /// The file to write, for `calibration.source`.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Number of samples that the model writes.
    #[arg(long, value_name = "N", default_value_t = 128,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=1 << 24))]
    written: usize,
    /// A text, as for `calibration.source`.
    #[arg(long, value_name = "FILE", requires = "samples")]
    text: Option<PathBuf>,
    /// Number of samples of the text, which are spread evenly among those that the model writes.
    #[arg(long, value_name = "N", requires = "text",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    samples: Option<usize>,
    /// Number of held-out samples, which come last: of the text; without a text, written ones.
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=1 << 24))]
    held_out: usize,
    /// Tokens of a sample; the smaller of 2048 and the model's positions if left out.
    #[arg(long, value_name = "N",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=1 << 24))]
    sequence_length: Option<usize>,
    /// Which parts of the text become samples, as `calibration.selection`.
    #[arg(long, value_name = "WORD", default_value = "random", value_parser = selection)]
    selection: Selection,
    /// The field of a record that holds its text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// The seed of random places in the text, and of what the model writes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Leave out the special tokens that the tokenizer adds.
    #[arg(long)]
    no_special_tokens: bool,
    /// The device: cpu, or cuda:0 for the first NVIDIA GPU, which needs a binary with the feature
    /// `cuda`.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    /// Replace the file if it exists.
    #[arg(long)]
    force: bool,
}

/// The part of a sample of the text that a written one begins with: an eighth.
const PROMPT: usize = 8;

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    write::check(&arguments.output, arguments.force)?;
    on_device!(arguments.device, Precision::F32, Ranks::ONE, run_on(arguments))
}

fn run_on<D: Ops>(device: D, _: u64, arguments: &Arguments) -> Result<(), Error> {
    let Arguments { model: path, output, text, held_out, seed, selection, .. } = arguments;
    let watch = Terminal { quiet: false };
    let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
    let located = locate(path, arguments.revision.as_deref(), &new, &|dir| Ok(check_config(dir)?))?;
    let reader = Reader::open(&located.dir)?;
    let model = Model::new(&reader, device)?;
    let length = model.decoder.sequence(arguments.sequence_length);
    model.within("samples", length, "--sequence-length")?;
    let count = arguments.samples.unwrap_or(0);
    let mut all = match text {
        None => Vec::new(),
        Some(path) => {
            let text = Text { field: Some(arguments.field.clone()), ..Text::from(path.as_path()) };
            let (held_out, seed, selection) = (*held_out, *seed, *selection);
            let wanted = Samples { count, held_out, sequence_length: length, seed, selection };
            samples(&text, wanted, &tokens(&model, !arguments.no_special_tokens))?
        }
    };
    let mut last = all.split_off(count);
    let prompts = arguments.written + if text.is_none() { *held_out } else { 0 };
    let first = model.first_token().map_or_else(|| vec![0], |token| vec![token]);
    let prompt = |i: usize| match all.get(i % count.max(1)) {
        Some(sample) => sample[..sample.len().div_ceil(PROMPT)].to_vec(),
        None => first.clone(),
    };
    let prompts: Vec<_> = (0..prompts).map(prompt).collect();
    let bar = watch.bar("writing samples", Steps::Parts(PARTS));
    let mut own = written(&model, &prompts, length, *seed, |done| bar.reach(parts(done)))?;
    drop(bar);
    if text.is_none() {
        last = own.split_off(arguments.written);
    }
    let shares = [(count, "of the text"), (own.len(), "by the model"), (last.len(), "held out")];
    let mut all = in_turn(all, own);
    let used = all.len();
    all.extend(last);
    let file = serde_json::json!({ "token_ids": all }).to_string();
    write::new(output, file.as_bytes(), arguments.force)?;
    let shares = shares.map(|(count, what)| format!("{count} {what}")).join(", ");
    println!("samples   {shares}; {length} tokens each");
    println!("written   {}", show(output));
    println!(
        "use       calibration.source = '{}', samples = {used}, held_out = {held_out}",
        show(output)
    );
    Ok(())
}

/// All samples of two kinds, both spread evenly: a step of a stage sees some of each.
fn in_turn<T>(few: Vec<T>, others: Vec<T>) -> Vec<T> {
    let (count, all) = (few.len(), few.len() + others.len());
    let (mut few, mut others) = (few.into_iter(), others.into_iter());
    // The place of the first kind's sample `i` among all is ⌈i · all / count⌉.
    let is_of_few = |place: usize| (place * count) % all < count;
    (0..all).filter_map(|place| if is_of_few(place) { few.next() } else { others.next() }).collect()
}

/// Reads a word of `calibration.selection`.
fn selection(word: &str) -> Result<Selection, String> {
    serde_json::from_value(word.into()).map_err(|e: serde_json::Error| e.to_string())
}
