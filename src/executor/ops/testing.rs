//! What the tests of the operations share.

use dfdx::{
    shapes::HasShape,
    tensor::{AsArray, Cpu, CpuError, OwnedTape, SplitTape, Tape, Tensor, TensorFromVec, Trace},
    tensor_ops::{Backward, SumTo, TryMul},
};

use super::Matrix;

/// `len` numbers that look random, in [-1, 1].
pub(super) fn noise(len: usize, seed: u64) -> Vec<f32> {
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

/// A scalar that depends on every element in its own way.
pub(super) fn weighted_sum<T: Tape<f32, Cpu>>(y: Matrix<Cpu, T>) -> Tensor<(), f32, Cpu, T> {
    let shape = *y.shape();
    let factors = y.device().tensor_from_vec(noise(shape.0 * shape.1, 99), shape);
    y.try_mul(factors).unwrap().try_sum().unwrap()
}

/// Checks the gradient of an operation's input against central differences.
pub(super) fn check_gradient(
    shape: (usize, usize),
    op: impl Fn(Matrix<Cpu, OwnedTape<f32, Cpu>>) -> Result<Matrix<Cpu, OwnedTape<f32, Cpu>>, CpuError>,
) {
    let device = Cpu::default();
    let values = noise(shape.0 * shape.1, 7);
    let loss = |values: Vec<f32>| {
        let x = device.tensor_from_vec(values, shape);
        (weighted_sum(op(x.leaky_trace()).unwrap()), x)
    };
    let (sum, x) = loss(values.clone());
    let gradient = sum.backward().get(&x).as_vec();
    for i in 0..values.len() {
        let shifted = |h: f32| {
            let mut values = values.clone();
            values[i] += h;
            loss(values).0.split_tape().0.array()
        };
        let slope = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
        let error = (slope - gradient[i]).abs();
        assert!(error < 5e-3 + 5e-3 * slope.abs(), "element {i}: {slope} against {}", gradient[i]);
    }
}
