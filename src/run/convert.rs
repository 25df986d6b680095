//! A compressed checkpoint, written dense.

use std::path::Path;

use super::{Error, Watch, finish, verify};
use crate::{
    checkpoint::{Existing, Format, Output, Pruned, Reader, Written},
    progress::Steps,
    recipe,
    report::{self, Report, Size},
};

/// What came of a conversion.
#[derive(Clone, Copy, Debug)]
pub struct Converted {
    /// Bytes of all tensors before.
    pub from: u64,
    /// What was written.
    pub written: Written,
}

/// Writes the compressed checkpoint in `dir` to `target`, with every matrix dense: the bytes that a
/// run with the format `dense` would have written. The report, the card and the resolved recipe of a
/// run's result say so then. With `force`, a result that is at `target` is replaced.
///
/// # Errors
/// If the checkpoint is damaged, not as its run wrote it, or not compressed, or if `target` cannot be
/// written.
pub fn convert(
    dir: &Path,
    target: &Path,
    force: bool,
    watch: &dyn Watch,
) -> Result<Converted, Error> {
    let reader = Reader::open(dir)?;
    if reader.format().is_dense() {
        return Err(Error::NotCompressed(dir.to_owned()));
    }
    let result = match dir.join(report::JSON).exists() {
        true => Some(result(dir)?),
        false => None,
    };
    let format = Format::default();
    let bytes = Output::least_bytes(&reader, format, None);
    let output = Output::create(target, Existing { force, resume: false }, &reader, [], bytes)?;
    let bar = watch.bar("writing", Steps::Bytes(bytes));
    let dense = Pruned::dense();
    let written = output.write(&reader, format, None, &dense, |bytes| bar.advance(bytes))?;
    drop(bar);
    match result {
        Some((recipe, report)) => record(recipe, report, written, &reader, &output)?,
        None => output.finish()?,
    }
    Ok(Converted { from: reader.weight_bytes(), written })
}

/// The recipe and the report of a result whose files are as they were written.
fn result(dir: &Path) -> Result<(recipe::Recipe, Report), Error> {
    let report = report::read(dir).map_err(Error::NoReport)?;
    for (file, written) in &report.outputs {
        if verify::digest_if_there(&dir.join(file))?.as_ref() != Some(written) {
            return Err(Error::NotAsWritten(dir.join(file)));
        }
    }
    Ok((verify::recipe(dir)?.recipe, report))
}

/// Says in the output's report, card and recipe how it is stored.
fn record(
    mut recipe: recipe::Recipe,
    mut report: Report,
    written: Written,
    reader: &Reader,
    output: &Output,
) -> Result<(), Error> {
    recipe.output.format = Format::default();
    recipe.output.path = Some(output.target().to_owned());
    report.output = output.target().to_owned();
    report.sizes.format = Format::default();
    report.sizes.compressed_matrices = 0;
    report.sizes.output =
        Size { weight_bytes: written.weight_bytes, directory_bytes: written.directory_bytes };
    let format = report.recipe.iter_mut().filter(|setting| setting.key == "output.format");
    format.for_each(|setting| {
        setting.value = format!("\"{}\"", Format::default());
        setting.source = "barber convert".into();
    });
    let card = report::card(&recipe, &report, reader.path());
    output.add_file(report::CARD, card.as_bytes())?;
    finish(&recipe, report, output)?;
    Ok(())
}
