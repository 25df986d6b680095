//! Makes the quickstart's model, tokenizer and texts: `cargo run --release --example quickstart`.

#![allow(clippy::print_stdout, reason = "a program that says what it does")]

mod text;
mod tokenizer;
mod train;

use std::{error::Error, fs, path::PathBuf};

use clap::Parser;

/// Makes the quickstart's tiny LLaMA, its tokenizer and its texts.
#[derive(Parser)]
struct Arguments {
    /// Where to write them.
    #[arg(long, default_value = "recipes/quickstart")]
    out: PathBuf,
    /// Training steps.
    #[arg(long, default_value_t = 2000)]
    steps: usize,
}

/// The seeds of the three texts: no document is in two of them but by chance.
const TRAINING: u64 = 1;
const CALIBRATION: u64 = 2;
const EVALUATION: u64 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { out, steps } = Arguments::parse();
    let model = out.join("model");
    fs::create_dir_all(&model)?;
    fs::write(out.join("calibration.txt"), text::text(CALIBRATION, 100_000))?;
    fs::write(out.join("evaluation.txt"), text::text(EVALUATION, 100_000))?;
    let corpus = text::text(TRAINING, 6_000_000);
    let vocabulary = tokenizer::write(&corpus, &model)?;
    let tokens = llm_barber::calibration::Tokens::of(&model, vocabulary, false).encode(&corpus)?;
    println!("{} tokens of {vocabulary} kinds", tokens.len());
    train::train(&tokens, vocabulary, steps, &model)
}
