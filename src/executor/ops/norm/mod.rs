//! Normalisation: y = w · n + b with n = (x − μ) / σ, σ² = mean((x − μ)²) + ε. Layer norm
//! (arXiv 1607.06450) has the row's mean for μ, root mean square norm (arXiv 1910.07467) zero.
//!
//! With h = w · ∂L/∂y: ∂L/∂x = (h − n · mean(h · n) − mean(h)) / σ, without the last mean if μ is
//! zero. Only training needs ∂L/∂w = Σ ∂L/∂y · n; no backward pass computes it.

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, cpu::sum, tape::record};
use crate::{buffer::stale, simd::simd};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

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
    /// y.
    fn normalise_forward(x: &Matrix<Self>, norm: &Norm<Self>) -> Computed<Self>;

    /// ∂L/∂x, for ∂L/∂y in `g`.
    fn normalise_backward(x: &Matrix<Self>, norm: &Norm<Self>, g: Self::Numbers) -> Computed<Self>;

    /// `x`, [tokens, channels], with every `width` consecutive channels of a row normalised: the
    /// whole row, or each head of it.
    fn normalise<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let y = x.beside(Self::normalise_forward(&x, norm)?, x.shape())?;
        let norm = norm.clone();
        Ok(record(tape, [x.name()], y, move |g| Ok([Self::normalise_backward(&x, &norm, g)?])))
    }
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

impl Norm<Cpu> {
    /// ∂L/∂w, for the input `x` and ∂L/∂y in `g`.
    pub fn weight_gradient(&self, x: &Matrix<Cpu>, g: &[f32]) -> Vec<f32> {
        let width = self.weight.shape().1;
        let mut sums = vec![0.0; width];
        for (g, x) in g.chunks_exact(width).zip(x.values.chunks_exact(width)) {
            simd!({
                let (mean, scale) = self.moments(x);
                for ((sum, g), x) in sums.iter_mut().zip(g).zip(x) {
                    *sum += g * (x - mean) * scale;
                }
            });
        }
        sums
    }
}

/// Number of rows that one task normalises.
const ROWS: usize = 32;

impl Normalise for Cpu {
    fn normalise_forward(x: &Matrix<Self>, norm: &Norm<Self>) -> Result<Buffer, CpuError> {
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
        Ok(y.into())
    }

    fn normalise_backward(
        x: &Matrix<Self>,
        norm: &Norm<Self>,
        mut g: Buffer,
    ) -> Result<Buffer, CpuError> {
        let width = norm.weight.shape().1;
        let task = ROWS * width;
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
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix, noise};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (biased, centred) in [(false, false), (true, true), (false, true)] {
            // A row, and heads of it.
            for width in [300, 5] {
                check!(|device: D| [(2, 300)], |[x]| {
                    let vector = |seed| device.hold(noise(width, seed), (1, width)).unwrap();
                    let (weight, bias) = (vector(4), biased.then(|| vector(6)));
                    D::normalise(x, &Norm { weight, bias, epsilon: 1e-5, centred })
                });
            }
        }
    }

    #[test]
    fn the_weights_gradient_is_that_of_finite_differences() {
        for centred in [false, true] {
            let norm = |weight| {
                let weight = matrix(weight, (1, 5));
                Norm { weight, bias: None, epsilon: 1e-5, centred }
            };
            let (weight, x, g) = (noise(5, 4), matrix(noise(30, 5), (3, 10)), noise(30, 6));
            let loss = |weight| {
                let y = Cpu::normalise(x.clone(), &norm(weight)).unwrap().to_vec();
                y.iter().zip(&g).map(|(y, g)| y * g).sum::<f32>()
            };
            let gradient = norm(weight.clone()).weight_gradient(&x, &g);
            for (i, gradient) in gradient.into_iter().enumerate() {
                let mut raised = weight.clone();
                raised[i] += 1.0;
                let slope = loss(raised) - loss(weight.clone());
                assert!((slope - gradient).abs() < 1e-4, "{slope} {gradient}");
            }
        }
    }

    #[test]
    fn heads_are_normalised_one_by_one() {
        // Two rows of two heads.
        let x = matrix(vec![1.0, 3.0, 3.0, -3.0, 1.0, 7.0, 3.0, -3.0], (2, 4));
        let vector = |values: [f32; 2]| matrix(values.to_vec(), (1, 2));
        let of = |epsilon, centred, bias| {
            let norm = Norm { weight: vector([2.0, 4.0]), bias, epsilon, centred };
            Cpu::normalise(x.clone(), &norm).unwrap().to_vec()
        };
        let centred = of(0.0, true, Some(vector([0.5, -1.0])));
        assert_eq!(centred, [-1.5, 3.0, 2.5, -5.0, -1.5, 3.0, 2.5, -5.0]);
        let square = of(7.0, false, None);
        let scale = [12f32, 16.0, 32.0, 16.0].map(|square| square.sqrt().recip());
        for (i, found) in square.into_iter().enumerate() {
            let expected = [2.0, 4.0][i % 2] * x.to_vec()[i] * scale[i / 2];
            assert!((found - expected).abs() < 1e-6, "{i}: {found}, not {expected}");
        }
    }
}
