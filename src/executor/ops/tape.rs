//! Puts pure functions on dfdx's tape, for all devices. Only this module passes gradients from the
//! output of an operation to its inputs.

use dfdx::{
    tensor::{OwnedTape, PutTape, Tape, Tensor},
    tensor_ops::Backward,
};

use super::{Hold, Matrix, Name};

/// Puts `backward` on the tape; returns `y` with the tape. `backward` computes the gradients of the
/// `inputs` from that of `y`. It is dropped at once if nothing is recorded.
pub(super) fn record<D: Hold, T: Tape<f32, D>, G: IntoIterator<Item = D::Numbers>>(
    mut tape: T,
    inputs: impl IntoIterator<Item = Name<D>> + 'static,
    y: Matrix<D>,
    backward: impl FnOnce(D::Numbers) -> Result<G, D::Err> + 'static,
) -> Matrix<D, T> {
    let output = y.name();
    tape.add_backward_op(move |gradients| {
        let g = D::take_gradient(gradients, &output)?;
        let mut found = inputs.into_iter().zip(backward(g)?);
        found.try_for_each(|(input, g)| D::add_gradient(gradients, &input, g))
    });
    y.put_tape(tape)
}

/// [`record`] for an operation with few of the numbers of its `input`: `backward` adds the gradient
/// of `y` to that of the input.
pub(super) fn record_in_place<D: Hold, T: Tape<f32, D>>(
    mut tape: T,
    input: Name<D>,
    y: Matrix<D>,
    backward: impl FnOnce(&mut D::Numbers, D::Numbers) -> Result<(), D::Err> + 'static,
) -> Matrix<D, T> {
    let output = y.name();
    tape.add_backward_op(move |gradients| {
        let g = D::take_gradient(gradients, &output)?;
        let mut sum = D::take_gradient(gradients, &input)?;
        backward(&mut sum, g)?;
        D::add_gradient(gradients, &input, sum)
    });
    y.put_tape(tape)
}

/// A loss that depends on `x`, with the tape; `backward` computes the gradient of `x` from that of
/// the loss.
pub(super) fn record_loss<D: Hold, T: Tape<f32, D>>(
    mut tape: T,
    x: Matrix<D>,
    loss: f64,
    backward: impl FnOnce(&Matrix<D>, f32) -> Result<D::Numbers, D::Err> + 'static,
) -> Result<Tensor<(), f32, D, T>, D::Err> {
    let loss = x.device().try_tensor_from_vec(vec![loss as f32], ())?;
    let result = loss.clone();
    tape.add_backward_op(move |gradients| {
        let g = D::loss_gradient(gradients, &result)?;
        D::add_gradient(gradients, &x.name(), backward(&x, g)?)
    });
    Ok(loss.put_tape(tape))
}

/// A loss whose gradient with respect to `y` is `gradient`; its value does not matter. It continues
/// a backward pass that ended at `y`.
pub fn seeded<D: Hold, T: Tape<f32, D>>(
    y: Matrix<D, T>,
    gradient: Matrix<D>,
) -> Result<Tensor<(), f32, D, T>, D::Err> {
    let (y, tape) = y.split_tape();
    record_loss(tape, y, 0.0, move |_, _| D::copy(&gradient.values))
}

/// A matrix with a tape of its own.
pub type Traced<D> = Matrix<D, OwnedTape<f32, D>>;

/// A loss that depends on such matrices.
pub type TracedLoss<D> = Tensor<(), f32, D, OwnedTape<f32, D>>;

/// The matrix with a tape of its own.
pub fn traced<D: Hold>(x: Matrix<D>) -> Traced<D> {
    x.put_tape(OwnedTape::default())
}

/// The gradient of a loss with respect to `x`, whose tape it has.
pub fn gradient<D: Hold>(loss: TracedLoss<D>, x: &Matrix<D>) -> Result<Matrix<D>, D::Err> {
    x.take_gradient(&mut loss.try_backward()?)
}
