//! `barber convert`: writes a compressed or quantised checkpoint dense.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::builder::PossibleValuesParser;

use super::{Error, progress::Terminal, show};
use crate::{
    checkpoint::Format,
    run::{Converted, convert},
};

/// Writes a compressed checkpoint, in any layout of `output.format`, with every matrix dense, which
/// all loaders read. Every weight keeps its bits. For a result of `barber prune`, the files are
/// first compared with their digests, and report and card get the new format. A checkpoint that is
/// quantised to fp8 or int8 is dequantised, as `barber prune` reads it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber convert out/compressed --format dense
  barber convert out/compressed --format dense --output out/dense")]
pub(super) struct Arguments {
    /// The checkpoint, a directory.
    dir: PathBuf,
    /// The format to write.
    #[arg(long, value_parser = PossibleValuesParser::new([Format::default().name]))]
    format: String,
    /// The directory to write; by default beside the checkpoint, its name with `-dense`.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace the directory if it holds a result.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let Arguments { dir, format, output, force } = arguments;
    let target = match output {
        Some(output) => output.clone(),
        None => beside(dir, format)?,
    };
    let Converted { from, written } = convert(dir, &target, *force, &Terminal { quiet: false })?;
    println!("size      {} of weights, {} before", ByteSize(written.weight_bytes), ByteSize(from));
    println!("written   {}", show(&target));
    Ok(())
}

/// A directory's name with the format, beside it.
fn beside(dir: &Path, format: &str) -> Result<PathBuf, Error> {
    let whole = std::fs::canonicalize(dir)
        .map_err(|source| Error::File { path: dir.to_owned(), source })?;
    let mut name = whole.file_name().unwrap_or_default().to_owned();
    name.push(format!("-{format}"));
    Ok(whole.with_file_name(name))
}
