//! Gated activations, SwiGLU and the like (arXiv 2002.05202): y = f(a) · b; with a limit c and an
//! offset d, y = f(min(a, c)) · (b + d), where b is limited to ±c.
//!
//! ∂y/∂a = (b + d) f′(a) up to the limit and 0 beyond it, ∂y/∂b = f(a) or 0 likewise.

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::CHUNK, tape::record};
use crate::{buffer::stale, family::Gating, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// y = f(gate) · up, as far as its [`Gating`] says nothing else.
pub trait Gated: Hold {
    /// y.
    fn gated_forward(gate: &Matrix<Self>, up: &Matrix<Self>, gating: Gating) -> Computed<Self>;

    /// ∂L/∂gate and ∂L/∂up, for ∂L/∂y in `g`.
    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        gating: Gating,
        g: Self::Numbers,
    ) -> Result<[Self::Numbers; 2], Self::Err>;

    /// The gated activation of two matrices of one shape.
    fn gated<T: Tape<f32, Self>>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        gating: Gating,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (gate, tape) = gate.split_tape();
        let (up, up_tape) = up.split_tape();
        let y = gate.beside(Self::gated_forward(&gate, &up, gating)?, gate.shape())?;
        let inputs = [gate.name(), up.name()];
        Ok(record(tape.merge(up_tape), inputs, y, move |g| {
            Self::gated_backward(&gate, &up, gating, g)
        }))
    }
}

/// x, but at most `limit` and at least −`limit`; NaN stays.
#[inline(always)]
fn limited(x: f32, limit: f32) -> f32 {
    if x > limit {
        limit
    } else if x < -limit {
        -limit
    } else {
        x
    }
}

impl Gated for Cpu {
    fn gated_forward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        gating: Gating,
    ) -> Result<Buffer, CpuError> {
        let mut y = stale(gate.values.len());
        let Gating { activation, offset, .. } = gating;
        let limit = gating.limit.unwrap_or(f32::INFINITY);
        let inputs = gate.values.par_chunks(CHUNK).zip(up.values.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (a, b))| {
            simd!({
                let (y, b) = (&mut y[..a.len()], &b[..a.len()]);
                activation.each(
                    a,
                    limit,
                    #[inline(always)]
                    |i, value, _| y[i] = value * (limited(b[i], limit) + offset),
                );
            });
        });
        Ok(y.into())
    }

    fn gated_backward(
        gate: &Matrix<Self>,
        up: &Matrix<Self>,
        gating: Gating,
        mut ga: Buffer,
    ) -> Result<[Buffer; 2], CpuError> {
        let mut gb = stale(ga.len());
        let Gating { activation, offset, .. } = gating;
        let limit = gating.limit.unwrap_or(f32::INFINITY);
        let inputs = gate.values.par_chunks(CHUNK).zip(up.values.par_chunks(CHUNK));
        let outputs = ga.par_chunks_mut(CHUNK).zip(gb.par_chunks_mut(CHUNK));
        outputs.zip(inputs).for_each(|((ga, gb), (a, b))| {
            simd!({
                let n = a.len();
                let (ga, gb, b) = (&mut ga[..n], &mut gb[..n], &b[..n]);
                activation.each(
                    a,
                    limit,
                    #[inline(always)]
                    |i, value, slope| {
                        let (inside, up) = (b[i].abs() <= limit, limited(b[i], limit) + offset);
                        gb[i] = if inside { ga[i] * value } else { 0.0 };
                        ga[i] *= if a[i] > limit { 0.0 } else { up * slope };
                    },
                );
            });
        });
        Ok([ga, gb.into()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        executor::ops::testing::{check, matrix},
        family::Activation,
    };

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for activation in Activation::ALL {
            let plain = Gating::from(activation);
            check!(|device: D| [(3, 100); 2], |[gate, up]| D::gated(gate, up, plain));
            // None of these inputs is near the limit, which is a kink.
            let limited = Gating { limit: Some(0.344), offset: 1.0, ..plain };
            check!(|device: D| [(3, 20); 2], |[gate, up]| D::gated(gate, up, limited));
        }
    }

    #[test]
    fn the_activation_is_the_gates() {
        let [gate, up] = [vec![-3.0, 2.0], vec![5.0, 7.0]].map(|values| matrix(values, (1, 2)));
        let y = Cpu::gated(gate, up, Activation::SquaredRelu.into()).unwrap();
        assert_eq!(y.to_vec(), [0.0, 28.0]);
    }

    #[test]
    fn gate_and_up_are_limited() {
        let gate = matrix(vec![9.0, -9.0, 2.0, f32::NAN], (1, 4));
        let up = matrix(vec![-9.0, 9.0, 3.0, 1.0], (1, 4));
        let gating = Gating { activation: Activation::Relu, limit: Some(5.0), offset: 1.0 };
        let y = Cpu::gated(gate, up, gating).unwrap().to_vec();
        assert_eq!(y[..3], [-20.0, 0.0, 8.0]);
    }
}
