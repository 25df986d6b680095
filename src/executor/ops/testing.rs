//! What the tests of the operations share.

use dfdx::{
    tensor::{Cpu, CpuError, OwnedTape, Tape, Tensor},
    tensor_ops::Backward,
};

use super::{Hold, Matrix, tape::record_loss};

pub(super) type Traced<D = Cpu> = Matrix<D, OwnedTape<f32, D>>;

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
pub(super) fn traced<D: Hold>(x: Matrix<D>) -> Traced<D> {
    x.put_tape(OwnedTape::default())
}

/// The gradient of a matrix with respect to which a loss is differentiated.
pub(super) fn gradient<D: Hold>(
    loss: Tensor<(), f32, D, OwnedTape<f32, D>>,
    of: &Matrix<D>,
) -> Vec<f32> {
    let mut gradients = loss.backward();
    D::download(&D::take_gradient(&mut gradients, &of.name()).unwrap()).unwrap()
}

/// A scalar that depends on every element in its own way.
pub(super) fn weighted_sum<D: Hold, T: Tape<f32, D>>(y: Matrix<D, T>) -> Tensor<(), f32, D, T> {
    let (y, tape) = y.split_tape();
    let values = y.on_host().unwrap();
    let factors = noise(values.len(), 99);
    let sum = values.iter().zip(&factors).map(|(y, f)| f64::from(y * f)).sum();
    let backward = move |y: &Matrix<D>, g: f32| {
        y.device().upload(factors.iter().map(|f| f * g).collect(), y.shape())
    };
    record_loss(tape, y, sum, backward).unwrap()
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
    let gradient = gradient(sum, &x);
    for i in 0..values.len() {
        let shifted = |h: f32| {
            let mut values = values.clone();
            values[i] += h;
            loss(values).0.as_vec()[0]
        };
        let slope = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
        let error = (slope - gradient[i]).abs();
        assert!(error < 5e-3 + 5e-3 * slope.abs(), "element {i}: {slope} against {}", gradient[i]);
    }
}

/// What an operation gives on a device, and the gradients of its inputs.
#[cfg(feature = "cuda")]
pub(super) fn outcome<D: Hold, const N: usize>(
    device: &D,
    shapes: [(usize, usize); N],
    op: impl FnOnce([Traced<D>; N]) -> Result<Traced<D>, D::Err>,
) -> Vec<Vec<f32>> {
    let mut seed = 10;
    let inputs = shapes.map(|shape| {
        seed += 1;
        device.hold(noise(shape.0 * shape.1, seed), shape).unwrap()
    });
    let (y, tape) = op(inputs.clone().map(traced)).unwrap().split_tape();
    let mut outcome = vec![y.on_host().unwrap()];
    let mut gradients = weighted_sum(y.put_tape(tape)).backward();
    for x in inputs {
        let gradient = D::take_gradient(&mut gradients, &x.name()).unwrap();
        outcome.push(D::download(&gradient).unwrap());
    }
    outcome
}

/// Checks what an expression gives on the GPU that `BARBER_TEST_DEVICE` names, if it names one,
/// against what it gives on the CPU.
#[cfg(feature = "cuda")]
macro_rules! assert_agrees {
    (|$device:ident: $D:ident| $outcome:expr) => {
        if let Some(gpu) = $crate::executor::ops::testing::gpu() {
            let found: Vec<Vec<f32>> = {
                type $D = dfdx::tensor::Cuda;
                let $device: &$D = &gpu;
                $outcome
            };
            let expected: Vec<Vec<f32>> = {
                type $D = dfdx::tensor::Cpu;
                let $device = &$D::default();
                $outcome
            };
            $crate::executor::ops::testing::assert_close(&found, &expected);
        }
    };
}
#[cfg(feature = "cuda")]
pub(super) use assert_agrees;

/// The GPU that `BARBER_TEST_DEVICE` names, such as `cuda:0`.
#[cfg(feature = "cuda")]
pub(super) fn gpu() -> Option<dfdx::tensor::Cuda> {
    use crate::executor::{Device, cuda};

    match std::env::var("BARBER_TEST_DEVICE").ok()?.parse().unwrap() {
        Device::Cpu => None,
        Device::Cuda(number) => Some(cuda(number).unwrap().0),
    }
}

/// As close as rounding leaves numbers that are as large as the largest of them.
#[cfg(feature = "cuda")]
pub(super) fn assert_close(found: &[Vec<f32>], expected: &[Vec<f32>]) {
    assert_eq!(found.len(), expected.len());
    for (part, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "part {part}");
        let most = 1e-4 * expected.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            assert!(error <= most, "part {part}, {i}: {found}, not {expected}");
        }
    }
}
