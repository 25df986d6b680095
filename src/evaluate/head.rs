//! The last norm and the output head: hidden states to logits.

use rayon::prelude::*;

use crate::{
    executor::ops::{
        InputGradient, Matrix, Norm, Ops, Tape, Traced, TracedLoss, Weight, gradient, traced,
    },
    family::Decoder,
    model::{Error, Model},
    random::SplitMix64,
};

/// Maximum number of logits held at a time: 32 MiB.
pub(crate) const LOGITS: usize = 1 << 23;

/// Fraction of an evaluation's matrix products that the output head takes.
pub(super) fn head_fraction(decoder: &Decoder) -> f64 {
    let head = (decoder.vocab_size * decoder.embedding.width) as f64;
    let layers: usize = decoder.projections().map(|linear| linear.dims.len()).sum();
    head / (head + layers as f64)
}

/// The last norm and the output head.
pub(crate) struct Head<'a, D: Ops> {
    model: &'a Model<'a, D>,
    norm: Option<Norm<D>>,
    project: Option<Weight<D>>,
    weight: Weight<D>,
}

impl<'a, D: Ops> Head<'a, D> {
    pub(crate) fn new(model: &'a Model<'a, D>) -> Result<Self, Error> {
        let decoder = &model.decoder;
        let dims = (decoder.vocab_size, decoder.embedding.width);
        let values = model.read(&decoder.head, &[dims.0, dims.1])?;
        let bias = decoder.head_bias.as_ref().map(|bias| model.read(bias, &[dims.0]));
        let weight = Weight::new(&model.executor.device, &values, dims, bias.transpose()?);
        let project = decoder.project_out.as_ref();
        Ok(Self {
            model,
            norm: decoder.final_norm.as_ref().map(|norm| model.norm(norm)).transpose()?,
            project: project.map(|linear| model.linear(linear)).transpose()?,
            weight: weight.map_err(Error::device(&decoder.head))?.single(),
        })
    }

    /// The logits of some tokens' hidden states after the last layer.
    fn logits<T: Tape<f32, D> + 'static>(
        &self,
        mut x: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        if let Some(norm) = &self.norm {
            x = D::normalise(x, norm)?;
        }
        if let Some(project) = &self.project {
            x = D::linear(x, project, InputGradient::Wanted, None)?;
        }
        let logits = D::linear(x, &self.weight, InputGradient::Wanted, None)?;
        match self.model.decoder.logit_cap {
            Some(cap) => D::cap(logits, cap),
            None => Ok(logits),
        }
    }

    /// The hidden states of some tokens of a sequence as a matrix.
    fn hold(&self, states: &[f32], rows: &[usize]) -> Result<Matrix<D>, D::Err> {
        let width = self.model.decoder.hidden_size;
        let tile = rows.iter().flat_map(|row| &states[row * width..(row + 1) * width]);
        self.model.executor.device.hold(tile.copied().collect(), (rows.len(), width))
    }

    /// Number of tokens whose logits are held at a time.
    fn step(&self) -> usize {
        (LOGITS / self.model.decoder.vocab_size).max(1)
    }

    /// Calls `see` with the logits of some tokens, a few rows at a time, as those of a whole
    /// segment would take hundreds of megabytes.
    pub(super) fn tiles(
        &self,
        states: &[f32],
        tokens: &[usize],
        mut see: impl FnMut(&[usize], Matrix<D>) -> Result<(), D::Err>,
    ) -> Result<(), Error> {
        let mut run = || {
            for rows in tokens.chunks(self.step()) {
                see(rows, self.logits(self.hold(states, rows)?)?)?;
            }
            Ok(())
        };
        run().map_err(|e: D::Err| Error::device("output head")(e))
    }

    /// The sum over tokens of a loss of their logits. Adds the gradient of their hidden states,
    /// [tokens, channels], to `found`, if given. `loss` is called with some rows and their logits.
    pub(crate) fn loss(
        &self,
        states: &[f32],
        mut found: Option<&mut Vec<f32>>,
        mut loss: impl FnMut(&[usize], Traced<D>) -> Result<TracedLoss<D>, D::Err>,
    ) -> Result<f64, Error> {
        let tokens: Vec<usize> = (0..states.len() / self.model.decoder.hidden_size).collect();
        let mut run = || {
            let mut sum = 0.0;
            for rows in tokens.chunks(self.step()) {
                let x = self.hold(states, rows)?;
                let loss = loss(rows, self.logits(traced(x.clone()))?)?;
                sum += f64::from(loss.as_vec()[0]);
                if let Some(found) = &mut found {
                    found.append(&mut gradient(loss, &x)?.on_host()?);
                }
            }
            Ok(sum)
        };
        run().map_err(|e: D::Err| Error::device("output head")(e))
    }

    /// The sum over tokens of KL(dense ‖ sparse), the divergence of the pruned model's predictions
    /// from the dense model's.
    pub(crate) fn divergence(
        &self,
        sparse: &[f32],
        dense: &[f32],
        gradient: Option<&mut Vec<f32>>,
    ) -> Result<f64, Error> {
        self.loss(sparse, gradient, |rows, logits| {
            D::divergence(logits, self.logits(self.hold(dense, rows)?)?)
        })
    }

    /// The gradient of the mean cross-entropy of a sequence's next tokens, [tokens, channels]; that of
    /// the last token, which predicts none of them, is zero.
    pub(crate) fn next_tokens_gradient(
        &self,
        states: &[f32],
        ids: &[u32],
    ) -> Result<Vec<f32>, Error> {
        let predictions = ids.len().saturating_sub(1);
        let (mut gradient, width) = (Vec::new(), self.model.decoder.hidden_size);
        self.loss(&states[..predictions * width], Some(&mut gradient), |rows, logits| {
            let next: Vec<u32> = rows.iter().map(|row| ids[row + 1]).collect();
            D::cross_entropy(logits, &next)
        })?;
        gradient.iter_mut().for_each(|g| *g /= predictions as f32);
        gradient.resize(states.len(), 0.0);
        Ok(gradient)
    }

    /// The gradient of the cross-entropy of tokens that are drawn from the model's own predictions.
    pub(crate) fn drawn_gradient(
        &self,
        states: &[f32],
        random: &mut SplitMix64,
    ) -> Result<Vec<f32>, Error> {
        let mut gradient = Vec::new();
        self.loss(states, Some(&mut gradient), |_, logits| {
            let (logits, tape) = logits.split_tape();
            let width = logits.shape().1;
            let values = logits.on_host()?;
            let draws: Vec<f64> = values.chunks(width).map(|_| uniform(random)).collect();
            let drawn = values.par_chunks(width).zip(draws);
            let drawn: Vec<u32> = drawn.map(|(row, at)| draw(row, at)).collect();
            D::cross_entropy(logits.put_tape(tape), &drawn)
        })?;
        Ok(gradient)
    }
}

/// A token that is drawn from the probabilities of a row of logits.
pub(super) fn drawn(logits: &[f32], random: &mut SplitMix64) -> u32 {
    draw(logits, uniform(random))
}

/// A uniform random number from 0 to below 1.
fn uniform(random: &mut SplitMix64) -> f64 {
    (random.bits() >> 11) as f64 / (1u64 << 53) as f64
}

/// The token drawn from the probabilities of a row of logits by the uniform number `at`.
fn draw(logits: &[f32], at: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| f64::from((logit - largest).exp());
    let mut left = at * logits.iter().map(weight).sum::<f64>();
    let drawn = logits.iter().position(|logit| {
        left -= weight(logit);
        left < 0.0
    });
    drawn.unwrap_or(0) as u32
}
