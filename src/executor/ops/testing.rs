//! Helpers for the tests of the operations.

use std::array::from_fn;

use dfdx::{
    tensor::{Cpu, CpuError, Tape, Tensor},
    tensor_ops::Backward,
};

use super::{Hold, Matrix, TracedLoss, tape::record_loss};
pub(super) use super::{Traced, traced};

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

/// The gradients of some matrices, for a loss that depends on them.
pub(super) fn gradients<D: Hold, const N: usize>(
    loss: TracedLoss<D>,
    of: [&Matrix<D>; N],
) -> [Vec<f32>; N] {
    let mut gradients = loss.backward();
    of.map(|x| D::download(&D::take_gradient(&mut gradients, &x.name()).unwrap()).unwrap())
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

/// The output of an operation and the gradients of its inputs; then the inputs.
pub(super) fn outcome<D: Hold, const N: usize>(
    device: &D,
    shapes: [(usize, usize); N],
    op: impl FnOnce([Traced<D>; N]) -> Result<Traced<D>, D::Err>,
) -> (Vec<Vec<f32>>, [Vec<f32>; N]) {
    // Activations have kinks at 0, where central differences are no slopes.
    let apart = |x: f32| x + 0.01_f32.copysign(x);
    let values: [Vec<f32>; N] = from_fn(|i| {
        noise(shapes[i].0 * shapes[i].1, 7 + i as u64).into_iter().map(apart).collect()
    });
    let inputs: [_; N] = from_fn(|i| device.hold(values[i].clone(), shapes[i]).unwrap());
    let y = op(inputs.clone().map(traced)).unwrap();
    let mut outcome = vec![y.on_host().unwrap()];
    outcome.extend(gradients(weighted_sum(y), inputs.each_ref()));
    (outcome, values)
}

/// Checks the gradients of an operation's inputs against central differences.
pub(super) fn check_gradients<const N: usize>(
    shapes: [(usize, usize); N],
    op: impl Fn([Traced<Cpu>; N]) -> Result<Traced<Cpu>, CpuError>,
) {
    let (found, values) = outcome(&Cpu::default(), shapes, &op);
    for (i, gradient) in found[1..].iter().enumerate() {
        for (j, gradient) in gradient.iter().enumerate() {
            let shifted = |h: f32| {
                let mut values = values.clone();
                values[i][j] += h;
                let mut inputs = values.into_iter().zip(shapes).map(|(x, shape)| matrix(x, shape));
                let y = op(from_fn(|_| traced(inputs.next().unwrap()))).unwrap();
                weighted_sum(y).as_vec()[0]
            };
            let slope = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
            let error = (slope - gradient).abs();
            assert!(error < 5e-3 + 5e-3 * slope.abs(), "input {i}, {j}: {slope}, not {gradient}");
        }
    }
}

/// Checks an operation: its gradients on the CPU against central differences, and all that it gives
/// on the GPU that `BARBER_TEST_DEVICE` names against the CPU's.
macro_rules! check {
    (|$device:ident: $D:ident| $shapes:expr, $op:expr) => {{
        type $D = dfdx::tensor::Cpu;
        #[allow(unused, reason = "some operations have parameters on the device")]
        let $device = &$D::default();
        $crate::executor::ops::testing::check_gradients($shapes, $op);
    }
    $crate::executor::ops::testing::assert_agrees!(|$device: $D| {
        $crate::executor::ops::testing::outcome($device, $shapes, $op).0
    });};
}
pub(super) use check;

/// Checks what an expression gives on the GPU that `BARBER_TEST_DEVICE` names, if it names one,
/// against what it gives on the CPU.
macro_rules! assert_agrees {
    (|$device:ident: $D:ident| $outcome:expr) => {
        let expected: Vec<Vec<f32>> = {
            type $D = dfdx::tensor::Cpu;
            let $device = &$D::default();
            $outcome
        };
        #[cfg(not(feature = "cuda"))]
        drop(expected);
        #[cfg(feature = "cuda")]
        if let Some(gpu) = $crate::executor::ops::testing::gpu() {
            let found: Vec<Vec<f32>> = {
                type $D = dfdx::tensor::Cuda;
                let $device: &$D = &gpu;
                $outcome
            };
            $crate::executor::ops::testing::assert_close(&found, &expected);
        }
    };
}
pub(super) use assert_agrees;

/// The GPU that `BARBER_TEST_DEVICE` names, such as `cuda:0`, if it names one.
#[cfg(feature = "cuda")]
pub(super) fn gpu() -> Option<dfdx::tensor::Cuda> {
    let name = std::env::var("BARBER_TEST_DEVICE").ok()?;
    let number = name.strip_prefix("cuda:")?.parse().unwrap();
    Some(
        crate::executor::cuda(number, Default::default(), crate::ranks::Ranks::ONE.neighbours())
            .unwrap()
            .0,
    )
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
