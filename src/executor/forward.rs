//! The forward pass of one part of a decoder layer: one for all families.

use dfdx::tensor::{HasErr, PutTape, SplitTape, Tape};

use super::{
    Positions, Vector,
    ops::{InputGradient, Matrix, Ops, Weight},
};
use crate::family::Part;

/// The weights of one part of a decoder layer.
#[derive(Clone, Debug)]
pub struct PartWeights<D: Ops> {
    /// Which part they are of.
    pub part: Part,
    /// The norm before the part.
    pub norm: Vector<D>,
    /// Its epsilon.
    pub norm_epsilon: f32,
    /// The linear layers, in the order of [`crate::family::Layer::linears`].
    pub linears: Vec<Weight<D>>,
}

impl<D: Ops> PartWeights<D> {
    /// The part's input: the normalised hidden states.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn normalise<T: Tape<f32, D> + 'static>(
        &self,
        states: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        D::rms_norm(states, &self.norm, self.norm_epsilon)
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
    // The first layers share their input; the tape goes with the first of them.
    let first = |input: Matrix<D, T>, i: usize| {
        let (input, tape) = input.split_tape();
        let y = D::linear(input.clone().put_tape(tape), &weights.linears[i], input_gradient)?;
        Ok::<_, D::Err>((y, input.put_tape(T::default())))
    };
    let last = weights.linears.len() - 1;
    seen(&(0..last).collect::<Vec<_>>(), &input)?;
    let inner = match weights.part {
        Part::Attention => {
            let (q, input) = first(input, 0)?;
            let (k, input) = first(input, 1)?;
            let (v, _) = first(input, 2)?;
            let q = D::rotary(q, &positions.rotation)?;
            let k = D::rotary(k, &positions.rotation)?;
            D::attention(q, k, v, positions.heads)?
        }
        Part::Mlp => {
            let (gate, input) = first(input, 0)?;
            let (up, _) = first(input, 1)?;
            D::swiglu(gate, up)?
        }
    };
    seen(&[last], &inner)?;
    D::linear(inner, &weights.linears[last], InputGradient::Wanted)
}
