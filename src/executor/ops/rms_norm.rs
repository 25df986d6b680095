//! Root mean square normalisation (arXiv 1910.07467): y = w · x / rms(x), rms(x)² = mean(x²) + ε.
//!
//! With n = x / rms and h = w · ∂L/∂y: ∂L/∂x = (h − n · mean(h · n)) / rms, ∂L/∂w = Σ ∂L/∂y · n.

use dfdx::{
    shapes::HasShape,
    tensor::{Cpu, CpuError, PutTape, SplitTape, Tape, Tensor, TensorFromVec},
    tensor_ops::Device,
};
use rayon::prelude::*;

use super::{Matrix, cpu};

/// y = w · x / rms(x), for each row.
pub trait RmsNorm: Device<f32> {
    /// The normalised rows of `x`, [tokens, channels], scaled by `weight`, `[channels]`.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn rms_norm<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Tensor<(usize,), f32, Self>,
        epsilon: f32,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

fn inverse_rms(row: &[f32], epsilon: f32) -> f32 {
    (dot(row, row) / row.len() as f32 + epsilon).sqrt().recip()
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

impl RmsNorm for Cpu {
    fn rms_norm<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Tensor<(usize,), f32, Self>,
        epsilon: f32,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let width = x.shape().1;
        let (x_values, w) = (cpu::values(&x), cpu::values(weight));
        let mut y = vec![0.0; x_values.len()];
        y.par_chunks_mut(width).zip(x_values.par_chunks(width)).for_each(|(y, x)| {
            let scale = inverse_rms(x, epsilon);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w.iter()) {
                *y = w * (x * scale);
            }
        });
        let y = x.device().try_tensor_from_vec(y, *x.shape())?;

        let (output, weight) = (y.clone(), weight.clone());
        tape.add_backward_op(move |gradients| {
            let g = cpu::take(gradients, &output)?;
            let mut gx = vec![0.0; g.len()];
            gx.par_chunks_mut(width)
                .zip(g.par_chunks(width).zip(x_values.par_chunks(width)))
                .for_each(|(gx, (g, x))| {
                    let scale = inverse_rms(x, epsilon);
                    for ((h, g), w) in gx.iter_mut().zip(g).zip(w.iter()) {
                        *h = g * w;
                    }
                    let mean = dot(gx, x) * scale / width as f32;
                    for (gx, x) in gx.iter_mut().zip(x) {
                        *gx = (*gx - x * scale * mean) * scale;
                    }
                });
            cpu::add(gradients, &x, &gx)?;
            let gw = gradients.get_or_alloc_mut(&weight)?;
            for (g, x) in g.chunks_exact(width).zip(x_values.chunks_exact(width)) {
                let scale = inverse_rms(x, epsilon);
                for ((gw, g), x) in gw.iter_mut().zip(g).zip(x) {
                    *gw += g * x * scale;
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

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let device = Cpu::default();
        let weight = device.tensor_from_vec(noise(19, 4), (19,));
        check_gradient((3, 19), |x| Cpu::rms_norm(x, &weight, 1e-5));

        let x = device.tensor_from_vec(noise(57, 5), (3, 19));
        let loss = |w: &Tensor<(usize,), f32, Cpu>| {
            weighted_sum(Cpu::rms_norm(x.leaky_trace(), w, 1e-5).unwrap())
        };
        let gradient = loss(&weight).backward().get(&weight).as_vec();
        for i in 0..19 {
            let mut w = weight.as_vec();
            w[i] += 1.0;
            let raised = loss(&device.tensor_from_vec(w, (19,))).split_tape().0.array();
            let slope = raised - loss(&weight).split_tape().0.array();
            assert!((slope - gradient[i]).abs() < 1e-3, "{slope} {}", gradient[i]);
        }
    }
}
