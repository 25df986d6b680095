//! The last norm and the output head: hidden states to logits.

use dfdx::{shapes::HasShape, tensor_ops::TryMul};

use crate::{
    executor::ops::{InputGradient, Matrix, Norm, Ops, Weight},
    family::Decoder,
    model::{Error, Model},
};

/// Logits, in numbers, that are held at a time: 32 MiB.
const LOGITS: usize = 1 << 23;

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
        let values = model.reader.read(&decoder.head, &[dims.0, dims.1])?;
        let weight = Weight::frozen(&model.device, values, dims, None);
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
        states: &Matrix<D>,
        tokens: &[usize],
        mut see: impl FnMut(&[usize], Matrix<D>) -> Result<(), D::Err>,
    ) -> Result<(), Error> {
        let Decoder { hidden_size: width, vocab_size, logit_cap, .. } = self.model.decoder;
        let mut run = || {
            let mut values = vec![0.0; states.shape().0 * width];
            D::copy_into(states, &mut values);
            let step = (LOGITS / vocab_size).max(1);
            for rows in tokens.chunks(step) {
                let tile = rows.iter().flat_map(|row| &values[row * width..(row + 1) * width]);
                let tile = tile.copied().collect();
                let mut x = self.model.device.try_tensor_from_vec(tile, (rows.len(), width))?;
                if let Some(norm) = &self.norm {
                    x = D::normalise(x, norm)?;
                }
                if let Some(project) = &self.project {
                    x = D::linear(x, project, InputGradient::Skipped)?;
                }
                let mut logits = D::linear(x, &self.weight, InputGradient::Skipped)?;
                if let Some(cap) = logit_cap {
                    logits = logits.try_mul(cap.recip())?.try_tanh()?.try_mul(cap)?;
                }
                see(rows, logits)?;
            }
            Ok(())
        };
        run().map_err(|e: D::Err| Error::device("output head")(e))
    }
}
