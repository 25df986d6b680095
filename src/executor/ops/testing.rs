//! What the tests of the operations share.

use dfdx::{
    tensor::{
        Cpu, CpuError, Gradients, OwnedTape, PutTape, SplitTape, Tape, Tensor, TensorFromVec,
    },
    tensor_ops::Backward,
};

use super::{Hold, Matrix, cpu};

type Traced = Matrix<Cpu, OwnedTape<f32, Cpu>>;

/// `len` numbers that look random, in [-1, 1].
pub(in crate::executor) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    for _ in 0..8 {
        next();
    }
    (0..len).map(|_| next()).collect()
}

/// A matrix on the CPU.
pub(in crate::executor) fn matrix(values: Vec<f32>, shape: (usize, usize)) -> Matrix<Cpu> {
    Cpu::default().hold(values, shape).unwrap()
}

/// The matrix with a tape of its own.
pub(super) fn traced(x: Matrix<Cpu>) -> Traced {
    x.put_tape(OwnedTape::default())
}

/// The gradient of a matrix.
pub(super) fn gradient(gradients: &mut Gradients<f32, Cpu>, of: &Matrix<Cpu>) -> Vec<f32> {
    Cpu::take_gradient(gradients, of).unwrap()
}

/// A scalar that depends on every element in its own way.
pub(super) fn weighted_sum<T: Tape<f32, Cpu> + 'static>(
    y: Matrix<Cpu, T>,
) -> Tensor<(), f32, Cpu, T> {
    let (y, mut tape) = y.split_tape();
    let factors = noise(y.values.len(), 99);
    let sum: f64 = y.values.iter().zip(&factors).map(|(y, f)| f64::from(y * f)).sum();
    let sum = y.device().tensor_from_vec(vec![sum as f32], ());
    let result = sum.clone();
    tape.add_backward_op(move |gradients| {
        let scale = cpu::take_scalar(gradients, &result)?;
        cpu::add(gradients, &y, factors.iter().map(|f| f * scale).collect())
    });
    sum.put_tape(tape)
}

/// Checks the gradient of an operation's input against central differences.
pub(super) fn check_gradient(
    shape: (usize, usize),
    op: impl Fn(Traced) -> Result<Traced, CpuError>,
) {
    let values = noise(shape.0 * shape.1, 7);
    let loss = |values: Vec<f32>| {
        let x = matrix(values, shape);
        (weighted_sum(op(traced(x.clone())).unwrap()), x)
    };
    let (sum, x) = loss(values.clone());
    let gradient = gradient(&mut sum.backward(), &x);
    for i in 0..values.len() {
        let shifted = |h: f32| {
            let mut values = values.clone();
            values[i] += h;
            loss(values).0.split_tape().0.as_vec()[0]
        };
        let slope = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
        let error = (slope - gradient[i]).abs();
        assert!(error < 5e-3 + 5e-3 * slope.abs(), "element {i}: {slope} against {}", gradient[i]);
    }
}
