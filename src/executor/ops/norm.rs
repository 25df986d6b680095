//! Normalisation: y = w · n + b with n = (x − μ) / σ, σ² = mean((x − μ)²) + ε. Layer norm
//! (arXiv 1607.06450) has the row's mean for μ, root mean square norm (arXiv 1910.07467) zero.
//!
//! With h = w · ∂L/∂y: ∂L/∂x = (h − n · mean(h · n) − mean(h)) / σ, the last mean only where μ is
//! one; ∂L/∂w = Σ ∂L/∂y · n; ∂L/∂b = Σ ∂L/∂y.

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Hold, Matrix,
    cpu::{self, sum},
};
use crate::{buffer::stale, simd::simd};

/// A norm's parameters.
#[derive(Clone, Debug)]
pub struct Norm<D: Hold> {
    /// w, [1, width].
    pub weight: Matrix<D>,
    /// b, [1, width].
    pub bias: Option<Matrix<D>>,
    /// ε.
    pub epsilon: f32,
    /// Whether the mean is subtracted.
    pub centred: bool,
}

/// y = w · (x − μ) / σ + b.
pub trait Normalise: Hold {
    /// `x`, [tokens, channels], with every `width` consecutive channels of a row normalised: the
    /// whole row, or each head of it.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn normalise<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl<D: Hold> Norm<D> {
    /// μ and 1 / σ of some channels.
    #[inline(always)]
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let width = x.len() as f32;
        let mean = if self.centred { sum(x, x, |x, _| x) / width } else { 0.0 };
        let square = sum(x, x, |x, _| (x - mean) * (x - mean));
        (mean, (square / width + self.epsilon).sqrt().recip())
    }
}

/// Rows that one task normalises.
const ROWS: usize = 32;

impl Normalise for Cpu {
    fn normalise<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let width = norm.weight.shape().1;
        let task = ROWS * width;
        let mut y = stale(x.values.len());
        y.par_chunks_mut(task).zip(x.values.par_chunks(task)).for_each(|(y, x)| {
            simd!({
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let (mean, scale) = norm.moments(x);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(norm.weight.values.iter()) {
                        *y = w * ((x - mean) * scale);
                    }
                    if let Some(bias) = &norm.bias {
                        y.iter_mut().zip(bias.values.iter()).for_each(|(y, b)| *y += b);
                    }
                }
            });
        });
        let y = x.device().hold(y, x.shape())?;
        let (output, norm) = (y.without_values(), norm.clone());
        tape.add_backward_op(move |gradients| {
            let mut g = Cpu::take_gradient(gradients, &output)?;
            let mut gw = vec![0.0; width];
            for (g, x) in g.chunks_exact(width).zip(x.values.chunks_exact(width)) {
                simd!({
                    let (mean, scale) = norm.moments(x);
                    for ((gw, g), x) in gw.iter_mut().zip(g).zip(x) {
                        *gw += g * (x - mean) * scale;
                    }
                });
            }
            cpu::add(gradients, &norm.weight, gw)?;
            if let Some(bias) = &norm.bias {
                let mut gb = vec![0.0; width];
                for g in g.chunks_exact(width) {
                    gb.iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
                }
                cpu::add(gradients, bias, gb)?;
            }
            g.par_chunks_mut(task).zip(x.values.par_chunks(task)).for_each(|(g, x)| {
                simd!({
                    for (g, x) in g.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let (mean, scale) = norm.moments(x);
                        g.iter_mut().zip(norm.weight.values.iter()).for_each(|(g, w)| *g *= w);
                        let n = width as f32;
                        let h_mean = if norm.centred { sum(g, g, |h, _| h) / n } else { 0.0 };
                        // Σ h n, n being centred or μ zero.
                        let along = (sum(g, x, |h, x| h * x) - mean * h_mean * n) * scale / n;
                        for (g, x) in g.iter_mut().zip(x) {
                            *g = (*g - h_mean - (x - mean) * scale * along) * scale;
                        }
                    }
                });
            });
            cpu::add(gradients, &x, g)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor_ops::Backward;

    use super::*;
    use crate::executor::ops::testing::{
        check_gradient, gradient, matrix, noise, traced, weighted_sum,
    };

    fn norm(width: usize, bias: bool, centred: bool) -> Norm<Cpu> {
        let vector = |seed| matrix(noise(width, seed), (1, width));
        Norm { weight: vector(4), bias: bias.then(|| vector(6)), epsilon: 1e-5, centred }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (bias, centred) in [(false, false), (true, true), (false, true)] {
            check_gradient((3, 19), |x| Cpu::normalise(x, &norm(19, bias, centred)));
            // Two heads to a row.
            check_gradient((3, 10), |x| Cpu::normalise(x, &norm(5, bias, centred)));

            let norm = norm(19, bias, centred);
            let x = matrix(noise(57, 5), (3, 19));
            let loss =
                |norm: &Norm<Cpu>| weighted_sum(Cpu::normalise(traced(x.clone()), norm).unwrap());
            let mut gradients = loss(&norm).backward();
            for of in [Some(&norm.weight), norm.bias.as_ref()].into_iter().flatten() {
                let gradient = gradient(&mut gradients, of);
                for (i, gradient) in gradient.into_iter().enumerate() {
                    let mut raised = of.to_vec();
                    raised[i] += 1.0;
                    let raised = matrix(raised, (1, 19));
                    let mut other = norm.clone();
                    if std::ptr::eq(of, &norm.weight) {
                        other.weight = raised;
                    } else {
                        other.bias = Some(raised);
                    }
                    let slope = loss(&other).as_vec()[0] - loss(&norm).as_vec()[0];
                    assert!((slope - gradient).abs() < 1e-3, "{slope} {gradient}");
                }
            }
        }
    }
}
