//! The forward pass of one part of a decoder layer: one for all families.

use dfdx::tensor::{HasErr, PutTape, SplitTape, Tape};

use super::{
    Hidden, Positions,
    ops::{Activation, Heads, InputGradient, Matrix, Norm, Ops, Weight},
};
use crate::family::{Attention, Part};

/// The weights of one part of a decoder layer.
#[derive(Clone, Debug)]
pub struct PartWeights<D: Ops> {
    /// Which part they are of.
    pub part: Part,
    /// The norm before the part.
    pub input_norm: Option<Norm<D>>,
    /// The linear layers, in the order of [`crate::family::Layer::linears`].
    pub linears: Vec<Weight<D>>,
    /// What happens between them.
    pub inner: Inner<D>,
    /// The norm of the part's output.
    pub output_norm: Option<Norm<D>>,
    /// The norm of the hidden states that it was added to.
    pub residual_norm: Option<Norm<D>>,
}

/// What happens between the linear layers of a part, as [`crate::family::Inner`] tells.
#[derive(Clone, Debug)]
pub enum Inner<D: Ops> {
    /// Causal attention, with the norms of queries and keys.
    Attention(Attention, Option<Box<[Norm<D>; 2]>>),
    /// activation(gate) · up.
    Gated(Activation),
    /// The activation.
    Plain(Activation),
}

fn normalise<D: Ops, T: Tape<f32, D> + 'static>(
    x: Matrix<D, T>,
    norm: Option<&Norm<D>>,
) -> Result<Matrix<D, T>, D::Err> {
    norm.into_iter().try_fold(x, D::normalise)
}

impl<D: Ops> PartWeights<D> {
    /// The part's input: the hidden states, normalised where there is a norm.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn normalise<T: Tape<f32, D> + 'static>(
        &self,
        states: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        normalise(states, self.input_norm.as_ref())
    }

    /// Adds the part's outputs to the hidden states.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn add(&self, samples: &mut [Hidden<D>], outputs: Vec<Matrix<D>>) -> Result<(), D::Err> {
        for (sample, output) in samples.iter_mut().zip(outputs) {
            sample.states = self.residual(sample.states.clone(), output)?;
        }
        Ok(())
    }

    /// The hidden states after the part.
    pub(super) fn residual<T: Tape<f32, D> + 'static>(
        &self,
        states: Matrix<D>,
        output: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        use dfdx::tensor_ops::TryAdd;
        normalise(output.try_add(states)?, self.residual_norm.as_ref())
    }
}

/// What is shown the inputs of linear layers, with the indices of the layers that share one.
pub type Seen<'a, D, T> = dyn FnMut(&[usize], &Matrix<D, T>) -> Result<(), <D as HasErr>::Err> + 'a;

/// The output of a part, without the residual, for its normalised input.
///
/// # Errors
/// If the device has not enough memory.
pub fn forward<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    positions: &Positions,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
    seen: &mut Seen<'_, D, T>,
) -> Result<Matrix<D, T>, D::Err> {
    let (linears, last) = (&weights.linears, weights.linears.len() - 1);
    seen(&(0..last).collect::<Vec<_>>(), &input)?;
    // The first layers share their input; the tape goes with the first of them.
    let (input, tape) = input.split_tape();
    let mut tape = Some(tape);
    let mut taped = |x: &Matrix<D>| x.clone().put_tape(tape.take().unwrap_or_default());
    let mut projections = Vec::with_capacity(3);
    for linear in &linears[..last] {
        projections.push(D::linear(taped(&input), linear, input_gradient)?);
    }
    let inner = match &weights.inner {
        Inner::Attention(attention, norms) => {
            let (q, k) =
                (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
            let [mut q, mut k, v] = split(projections, [q, k, k])?;
            if let Some([q_norm, k_norm]) = norms.as_deref() {
                q = D::normalise(q, q_norm)?;
                k = D::normalise(k, k_norm)?;
            }
            if let Some(rotation) = &positions.rotation {
                q = D::rotary(q, rotation, attention.head_dim)?;
                k = D::rotary(k, rotation, attention.head_dim)?;
            }
            let heads = Heads {
                queries: attention.heads,
                keys: attention.kv_heads,
                width: attention.head_dim,
                sequence_length: positions.length,
                scale: attention.scale,
                window: attention.window,
                cap: attention.score_cap,
            };
            D::attention(q, k, v, heads, positions.sights.as_ref())?
        }
        Inner::Gated(activation) => {
            let width = linears[last].inputs();
            let [gate, up] = split(projections, [width, width])?;
            D::gated(gate, up, *activation)?
        }
        Inner::Plain(activation) => {
            let [x] = split(projections, [linears[last].inputs()])?;
            D::activate(x, *activation)?
        }
    };
    seen(&[last], &inner)?;
    let output = D::linear(inner, &linears[last], InputGradient::Wanted)?;
    normalise(output, weights.output_norm.as_ref())
}

/// The projections of so many columns each: those there are, or the parts of a fused one.
fn split<D: Ops, T: Tape<f32, D> + 'static, const N: usize>(
    projections: Vec<Matrix<D, T>>,
    widths: [usize; N],
) -> Result<[Matrix<D, T>; N], D::Err> {
    let projections = match <[Matrix<D, T>; N]>::try_from(projections) {
        Ok(separate) => return Ok(separate),
        Err(fused) => fused,
    };
    let mut start = 0;
    let mut parts = Vec::with_capacity(N);
    for fused in projections {
        let (fused, tape) = fused.split_tape();
        let mut tape = Some(tape);
        for width in widths {
            let x = fused.clone().put_tape(tape.take().unwrap_or_default());
            parts.push(D::columns(x, start..start + width)?);
            start += width;
        }
    }
    Ok(parts.try_into().unwrap_or_else(|_| unreachable!("a family has one projection, or N")))
}
