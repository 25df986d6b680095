//! Converts a compressed or quantised checkpoint to a dense one.

use std::path::Path;

use super::{Error, Watch, finish, verify};
use crate::{
    checkpoint::{Existing, Form, Format, Output, Pruned, Reader, Written},
    progress::Steps,
    recipe,
    report::{self, Report, Size},
};

/// The result of a conversion.
#[derive(Clone, Copy, Debug)]
pub struct Converted {
    /// Bytes of all tensors of the checkpoint before.
    pub from: u64,
    /// The dense checkpoint.
    pub written: Written,
}

/// Writes the compressed or quantised checkpoint in `dir` to `target` with every matrix dense: the
/// same bytes as a run with the format `dense`. In a run's result, report, card and recipe are changed to that
/// format. `force` replaces a result at `target`.
///
/// # Errors
/// If the checkpoint is damaged, changed since its run wrote it, neither compressed nor quantised, or
/// quantised in a way that Barber does not read, or if `target` cannot be written.
pub fn convert(
    dir: &Path,
    target: &Path,
    force: bool,
    watch: &dyn Watch,
) -> Result<Converted, Error> {
    let reader = Reader::open(dir)?;
    if reader.format().is_dense() && reader.quantisation()?.is_none() {
        return Err(Error::NotCompressed(dir.to_owned()));
    }
    let result = match dir.join(report::JSON).exists() {
        true => Some(result(dir)?),
        false => None,
    };
    let form = Form::default();
    let bytes = Output::least_bytes(&reader, form.format, form.dtype, None);
    let output = Output::create(target, Existing { force, resume: false }, &reader, [], bytes)?;
    let bar = watch.bar("writing", Steps::Bytes(bytes));
    let dense = Pruned::dense();
    let written = output.write(&reader, form, (&dense, None), |bytes| bar.advance(bytes))?;
    drop(bar);
    match result {
        Some((recipe, report)) => record(recipe, report, written, &reader, &output)?,
        None => output.finish()?,
    }
    Ok(Converted { from: reader.weight_bytes(), written })
}

/// The recipe and the report of a result, whose files must be unchanged.
fn result(dir: &Path) -> Result<(recipe::Recipe, Report), Error> {
    let report = report::read(dir).map_err(Error::NoReport)?;
    for (file, written) in &report.outputs {
        if verify::digest_if_there(&dir.join(file))?.as_ref() != Some(written) {
            return Err(Error::NotAsWritten(dir.join(file)));
        }
    }
    Ok((verify::recipe(dir)?.recipe, report))
}

/// Writes the output's report, card and recipe with the new format.
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
