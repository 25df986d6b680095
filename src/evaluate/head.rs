//! The last norm and the output head: hidden states to logits.

use crate::{
    executor::ops::{InputGradient, Matrix, Norm, Ops, Weight},
    family::Decoder,
    model::{Error, Model},
};

/// Logits, in numbers, that are held at a time: 32 MiB.
pub(crate) const LOGITS: usize = 1 << 23;

/// The share that the head has in the matrix products of an evaluation.
pub(super) fn share(decoder: &Decoder) -> f64 {
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let layers: usize = decoder.projections().map(|linear| linear.dims.len()).sum();
    head / (head + layers as f64)
}

/// The last norm and the output head.
pub(super) struct Head<'a, D: Ops> {
    model: &'a Model<'a, D>,
    norm: Option<Norm<D>>,
    project: Option<Weight<D>>,
    weight: Weight<D>,
}

impl<'a, D: Ops> Head<'a, D> {
    pub(super) fn new(model: &'a Model<'a, D>) -> Result<Self, Error> {
        let decoder = &model.decoder;
        let dims = (decoder.vocab_size, decoder.embedding.width);
        let values = model.read(&decoder.head, &[dims.0, dims.1])?;
        let weight = Weight::new(&model.executor.device, &values, dims, None);
        let project = decoder.project_out.as_ref();
        Ok(Self {
            model,
            norm: decoder.final_norm.as_ref().map(|norm| model.norm(norm)).transpose()?,
            project: project.map(|linear| model.linear(linear)).transpose()?,
            weight: weight.map_err(Error::device(&decoder.head))?,
        })
    }

    /// Shows `see` the logits of some tokens, a few rows at a time: those of a whole segment
    /// would be hundreds of megabytes.
    pub(super) fn tiles(
        &self,
        states: &[f32],
        tokens: &[usize],
        mut see: impl FnMut(&[usize], Matrix<D>) -> Result<(), D::Err>,
    ) -> Result<(), Error> {
        let Decoder { hidden_size: width, vocab_size, logit_cap, .. } = self.model.decoder;
        let mut run = || {
            let step = (LOGITS / vocab_size).max(1);
            for rows in tokens.chunks(step) {
                let tile = rows.iter().flat_map(|row| &states[row * width..(row + 1) * width]);
                let tile = tile.copied().collect();
                let mut x = self.model.executor.device.hold(tile, (rows.len(), width))?;
                if let Some(norm) = &self.norm {
                    x = D::normalise(x, norm)?;
                }
                if let Some(project) = &self.project {
                    x = D::linear(x, project, InputGradient::Skipped, None)?;
                }
                let mut logits = D::linear(x, &self.weight, InputGradient::Skipped, None)?;
                if let Some(cap) = logit_cap {
                    logits = D::cap(&logits, cap)?;
                }
                see(rows, logits)?;
            }
            Ok(())
        };
        run().map_err(|e: D::Err| Error::device("output head")(e))
    }
}
