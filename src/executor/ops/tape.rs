//! How pure functions get on dfdx's tape: the only place that knows how gradients get from the
//! output of an operation to its inputs, whatever the device.

use dfdx::tensor::{PutTape, Tape, Tensor};

use super::{Hold, Matrix, Name};

/// `y` with the tape, on which `backward` is put: it makes the gradients of the `inputs` of that of
/// `y`. It holds what it needs until then, and is dropped at once where nothing is recorded.
pub(super) fn record<D: Hold, T: Tape<f32, D>, const N: usize>(
    mut tape: T,
    inputs: [Name<D>; N],
    y: Matrix<D>,
    backward: impl FnOnce(D::Numbers) -> Result<[D::Numbers; N], D::Err> + 'static,
) -> Matrix<D, T> {
    let output = y.name();
    tape.add_backward_op(move |gradients| {
        let g = D::take_gradient(gradients, &output)?;
        let found = inputs.iter().zip(backward(g)?);
        found.into_iter().try_for_each(|(input, g)| D::add_gradient(gradients, input, g))
    });
    y.put_tape(tape)
}

/// A loss that depends on `x`, with the tape: `backward` makes the gradient of `x` of the loss's
/// own.
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
