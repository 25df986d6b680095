//! The rotation of rotary position embedding (arXiv 2104.09864), in the half-split layout: of a
//! head's channels, i and i + d/2 are a pair, rotated by the angle of position and i.
//!
//! The rotation is linear and orthogonal up to the attention factor in the tables: its gradient is
//! the rotation by the opposite angle.

use std::sync::Arc;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Hold, Matrix, cpu};
use crate::simd::simd;

/// The cosines and sines of the angles of each position, [positions, head_dim / 2].
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Cosines, times the attention factor.
    pub cos: Arc<Vec<f32>>,
    /// Sines, times the attention factor.
    pub sin: Arc<Vec<f32>>,
    /// Half the number of channels of a head that are rotated, its first ones.
    pub half: usize,
}

impl Rotation {
    /// The number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Rotates the heads of each row; `sign` is −1 for the opposite angle.
    fn rotate(&self, x: &mut [f32], width: usize, head: usize, sign: f32) {
        let (half, positions) = (self.half, self.positions());
        x.par_chunks_mut(width).with_min_len(32).enumerate().for_each(|(token, row)| {
            let angles = (token % positions) * half..(token % positions + 1) * half;
            let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
            simd!({
                for head in row.chunks_exact_mut(head) {
                    let (first, second) = head[..2 * half].split_at_mut(half);
                    for i in 0..half {
                        let (a, b, sin) = (first[i], second[i], sign * sin[i]);
                        first[i] = a * cos[i] - b * sin;
                        second[i] = b * cos[i] + a * sin;
                    }
                }
            });
        });
    }
}

/// Rotary position embedding.
pub trait Rotary: Hold {
    /// Rotates the heads of `x`, [tokens, heads · `head`], or as many of a head's channels as the
    /// rotation has. Its rows are one sequence, or several of [`Rotation::positions`] tokens each.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn rotary<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        rotation: &Rotation,
        head: usize,
    ) -> Result<Matrix<Self, T>, Self::Err>;
}

impl Rotary for Cpu {
    fn rotary<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        rotation: &Rotation,
        head: usize,
    ) -> Result<Matrix<Self, T>, CpuError> {
        let (x, mut tape) = x.split_tape();
        let (shape, rotation) = (x.shape(), rotation.clone());
        // A projection that nobody else holds is rotated where it is.
        let input = x.without_values();
        let mut y = Arc::unwrap_or_clone(x.values).into_vec();
        rotation.rotate(&mut y, shape.1, head, 1.0);
        let y = input.device().hold(y, shape)?;

        let output = y.without_values();
        tape.add_backward_op(move |gradients| {
            let mut g = Cpu::take_gradient(gradients, &output)?;
            rotation.rotate(&mut g, shape.1, head, -1.0);
            cpu::add(gradients, &input, g)
        });
        Ok(y.put_tape(tape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::check_gradient;

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let angles = [0.0, 0.0, 1.0, 0.1, 2.0, 0.2f32];
        let rotation = Rotation {
            cos: Arc::new(angles.map(|a| 1.1 * a.cos()).to_vec()),
            sin: Arc::new(angles.map(|a| 1.1 * a.sin()).to_vec()),
            half: 2,
        };
        check_gradient((6, 8), |x| Cpu::rotary(x, &rotation, 4));
        check_gradient((6, 10), |x| Cpu::rotary(x, &rotation, 5));
    }
}
