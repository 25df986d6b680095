//! The rotation of rotary position embedding (arXiv 2104.09864): of a head's channels, i and i + d/2
//! are a pair, or 2i and 2i + 1 if pairs are interleaved, rotated by the angle of position and i.
//!
//! The rotation is linear and orthogonal up to the attention factor in the tables: its gradient is
//! the rotation by the opposite angle.

use std::sync::Arc;

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{Buffer, Computed, Hold, Matrix, tape::record};
use crate::simd::simd;

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// The cosines and sines of the angles of each position, [positions, head_dim / 2].
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Cosines, times the attention factor.
    pub cos: Arc<Vec<f32>>,
    /// Sines, times the attention factor.
    pub sin: Arc<Vec<f32>>,
    /// Half the number of rotated channels of a head.
    pub half: usize,
    /// Whether the channels of a pair are neighbours.
    pub interleaved: bool,
}

impl Rotation {
    /// The number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }
}

/// Rotary position embedding.
pub trait Rotary: Hold {
    /// A rotation in the layout of the device's kernels.
    type Angles: 'static;

    /// The rotation for the matrices on the device of `x`.
    fn angles(x: &Matrix<Self>, rotation: &Rotation) -> Result<Self::Angles, Self::Err>;

    /// Rotates the heads of each row of `width` channels; `head` has the number of channels of a head
    /// and the first one that is rotated, and `sign` is −1 for the opposite angle.
    fn rotate(
        x: Arc<Self::Numbers>,
        width: usize,
        angles: &Self::Angles,
        head: (usize, usize),
        sign: f32,
    ) -> Computed<Self>;

    /// Rotates the heads of `x`, [tokens, heads · width], from the channel `first` on as many of a
    /// head's channels as the rotation has. Its rows are one sequence, or several of
    /// [`Rotation::positions`] tokens each.
    fn rotary<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        rotation: &Rotation,
        (head, first): (usize, usize),
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let (input, device, shape) = (x.name(), x.device().clone(), x.shape());
        let angles = Self::angles(&x, rotation)?;
        let y = Self::rotate(x.values, shape.1, &angles, (head, first), 1.0)?;
        let y = Matrix::of(&device, y, shape)?;
        Ok(record(tape, [input], y, move |g| {
            Ok([Self::rotate(Arc::new(g), shape.1, &angles, (head, first), -1.0)?])
        }))
    }
}

impl Rotary for Cpu {
    type Angles = Rotation;

    fn angles(_: &Matrix<Self>, rotation: &Rotation) -> Result<Rotation, CpuError> {
        Ok(rotation.clone())
    }

    fn rotate(
        x: Arc<Buffer>,
        width: usize,
        rotation: &Rotation,
        (head, from): (usize, usize),
        sign: f32,
    ) -> Result<Buffer, CpuError> {
        // A projection that has no other owner is rotated in place.
        let mut y = Arc::unwrap_or_clone(x);
        let (half, positions) = (rotation.half, rotation.positions());
        y.par_chunks_mut(width).with_min_len(32).enumerate().for_each(|(token, row)| {
            let angles = (token % positions) * half..(token % positions + 1) * half;
            let (cos, sin) = (&rotation.cos[angles.clone()], &rotation.sin[angles]);
            if rotation.interleaved {
                for head in row.chunks_exact_mut(head) {
                    let angles = cos.iter().zip(sin);
                    for (pair, (cos, sin)) in head[from..].chunks_exact_mut(2).zip(angles) {
                        let (a, b, sin) = (pair[0], pair[1], sign * sin);
                        pair[0] = a * cos - b * sin;
                        pair[1] = b * cos + a * sin;
                    }
                }
                return;
            }
            simd!({
                for head in row.chunks_exact_mut(head) {
                    let (first, second) = head[from..from + 2 * half].split_at_mut(half);
                    for i in 0..half {
                        let (a, b, sin) = (first[i], second[i], sign * sin[i]);
                        first[i] = a * cos[i] - b * sin;
                        second[i] = b * cos[i] + a * sin;
                    }
                }
            });
        });
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{check, matrix};

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let angles = [0.0, 0.0, 1.0, 0.1, 2.0, 0.2f32];
        for (head, first, interleaved) in
            [(4, 0, false), (5, 0, false), (4, 0, true), (5, 0, true), (7, 3, false), (6, 2, true)]
        {
            let rotation = Rotation {
                cos: Arc::new(angles.map(|a| 1.1 * a.cos()).to_vec()),
                sin: Arc::new(angles.map(|a| 1.1 * a.sin()).to_vec()),
                half: 2,
                interleaved,
            };
            check!(|device: D| [(6, 2 * head)], |[x]| D::rotary(x, &rotation, (head, first)));
        }
    }

    #[test]
    fn halves_of_heads_are_turned() {
        // A quarter turn at the second position; the last channel of a head stays.
        let (cos, sin) = (Arc::new(vec![1.0, 0.0]), Arc::new(vec![0.0, 1.0]));
        let rotation = Rotation { cos, sin, half: 1, interleaved: false };
        let x = matrix((1..=12).map(|i| i as f32).collect(), (2, 6));
        let y = Cpu::rotary(x, &rotation, (3, 0)).unwrap().to_vec();
        let turned = [-8.0, 7.0, 9.0, -11.0, 10.0, 12.0];
        assert_eq!((&y[..6], &y[6..]), (&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..], &turned[..]));
    }

    #[test]
    fn interleaved_pairs_are_neighbours() {
        let cos = Arc::new(vec![1.0, 1.0, 0.0, -1.0]);
        let sin = Arc::new(vec![0.0, 0.0, 1.0, 0.0]);
        let rotation = Rotation { cos, sin, half: 2, interleaved: true };
        let x = matrix((1..=10).map(|i| i as f32).collect(), (2, 5));
        let y = Cpu::rotary(x, &rotation, (5, 0)).unwrap().to_vec();
        assert_eq!(y, [1.0, 2.0, 3.0, 4.0, 5.0, -7.0, 6.0, -8.0, -9.0, 10.0]);
    }
}
