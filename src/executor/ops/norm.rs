//! Normalisation: y = w · n + b with n = (x − μ) / σ, σ² = mean((x − μ)²) + ε. Layer norm
//! (arXiv 1607.06450) has the row's mean for μ, root mean square norm (arXiv 1910.07467) zero.
//!
//! With h = w · ∂L/∂y: ∂L/∂x = (h − n · mean(h · n) − mean(h)) / σ, the last mean only where μ is
//! one; ∂L/∂w = Σ ∂L/∂y · n; ∂L/∂b = Σ ∂L/∂y.

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::{Matrix, cpu};

/// A norm's parameters.
#[derive(Clone, Debug)]
pub struct Norm<D: Device<f32>> {
    /// w, `[width]`.
    pub weight: Tensor<(usize,), f32, D>,
    /// b, `[width]`.
    pub bias: Option<Tensor<(usize,), f32, D>>,
    /// ε.
    pub epsilon: f32,
    /// Whether the mean is subtracted.
    pub centred: bool,
}

/// y = w · (x − μ) / σ + b.
pub trait Normalise: Device<f32> {
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

impl<D: Device<f32>> Norm<D> {
    /// μ and 1 / σ of some channels.
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let width = x.len() as f32;
        let (mean, square) = if self.centred {
            let mean = x.iter().sum::<f32>() / width;
            (mean, x.iter().map(|x| (x - mean) * (x - mean)).sum())
        } else {
            (0.0, dot(x, x))
        };
        (mean, (square / width + self.epsilon).sqrt().recip())
    }
}

/// In sixteen lanes, which the compiler keeps in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut lanes = [0.0f32; 16];
    for (a, b) in a.zip(b) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

impl Normalise for Cpu {
    fn normalise<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let (width,) = *norm.weight.shape();
        let (x_values, w) = (cpu::values(&x), cpu::values(&norm.weight));
        let mut y = vec![0.0; x_values.len()];
        let bias = norm.bias.as_ref().map(cpu::values);
        y.par_chunks_mut(width).zip(x_values.par_chunks(width)).for_each(|(y, x)| {
            let (mean, scale) = norm.moments(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w.iter()) {
                *y = w * ((x - mean) * scale);
            }
            if let Some(bias) = &bias {
                y.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
            }
        });
        let y = x.device().try_tensor_from_vec(y, *x.shape())?;
        let (output, norm) = (y.clone(), norm.clone());
        tape.add_backward_op(move |gradients| {
            let g = cpu::take(gradients, &output)?;
            let mut gx = vec![0.0; g.len()];
            gx.par_chunks_mut(width)
                .zip(g.par_chunks(width).zip(x_values.par_chunks(width)))
                .for_each(|(gx, (g, x))| {
                    let (mean, scale) = norm.moments(x);
                    for ((h, g), w) in gx.iter_mut().zip(g).zip(w.iter()) {
                        *h = g * w;
                    }
                    let h_mean =
                        if norm.centred { gx.iter().sum::<f32>() / width as f32 } else { 0.0 };
                    // Σ h n, n being centred or μ zero.
                    let along = (dot(gx, x) - mean * h_mean * width as f32) * scale / width as f32;
                    for (gx, x) in gx.iter_mut().zip(x) {
                        *gx = (*gx - h_mean - (x - mean) * scale * along) * scale;
                    }
                });
            cpu::add(gradients, &x, &gx)?;
            let gw = gradients.get_or_alloc_mut(&norm.weight)?;
            for (g, x) in g.chunks_exact(width).zip(x_values.chunks_exact(width)) {
                let (mean, scale) = norm.moments(x);
                for ((gw, g), x) in gw.iter_mut().zip(g).zip(x) {
                    *gw += g * (x - mean) * scale;
                }
            }
            if let Some(bias) = &norm.bias {
                let gb = gradients.get_or_alloc_mut(bias)?;
                for g in g.chunks_exact(width) {
                    gb.iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
                }
            }
            Ok(())
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check_gradient, noise, weighted_sum};
    use dfdx::{
        tensor::{AsArray, Trace},
        tensor_ops::Backward,
    };

    fn norm(width: usize, bias: bool, centred: bool) -> Norm<Cpu> {
        let vector = |seed| Cpu::default().tensor_from_vec(noise(width, seed), (width,));
        Norm { weight: vector(4), bias: bias.then(|| vector(6)), epsilon: 1e-5, centred }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (bias, centred) in [(false, false), (true, true), (false, true)] {
            check_gradient((3, 19), |x| Cpu::normalise(x, &norm(19, bias, centred)));
            // Two heads to a row.
            check_gradient((3, 10), |x| Cpu::normalise(x, &norm(5, bias, centred)));

            let x = Cpu::default().tensor_from_vec(noise(57, 5), (3, 19));
            let norm = norm(19, bias, centred);
            let loss = |weight: Tensor<(usize,), f32, Cpu>| {
                let norm = Norm { weight, ..norm.clone() };
                weighted_sum(Cpu::normalise(x.leaky_trace(), &norm).unwrap())
            };
            let gradient = loss(norm.weight.clone()).backward().get(&norm.weight).as_vec();
            for i in 0..19 {
                let mut w = norm.weight.as_vec();
                w[i] += 1.0;
                let raised = Cpu::default().tensor_from_vec(w, (19,));
                let raised = loss(raised).split_tape().0.array();
                let slope = raised - loss(norm.weight.clone()).split_tape().0.array();
                assert!((slope - gradient[i]).abs() < 1e-3, "{slope} {}", gradient[i]);
            }
        }
    }
}
