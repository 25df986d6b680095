//! Rotary position embedding on a GPU.

use std::sync::Arc;

use cudarc::driver::DeviceSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, Rotary, Rotation,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    /// Rotates the first 2 · half channels of each head; `sign` is −1 for the opposite angle.
    fn rotate(
        n: usize, width: usize, head: usize, half: usize, positions: usize, sign: f32, cos: &Slice,
        sin: &Slice, x: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i >= n) return;
    index_t position = i / width % positions, channel = i % width % head;
    if (channel < half) {
        index_t angle = position * half + channel;
        y[i] = x[i] * cos[angle] - x[i + half] * (sign * sin[angle]);
    } else if (channel < 2 * half) {
        index_t angle = position * half + channel - half;
        y[i] = x[i] * cos[angle] + x[i - half] * (sign * sin[angle]);
    } else {
        y[i] = x[i];
    }
"
}

/// A rotation's tables on a GPU.
#[derive(Debug)]
pub struct Angles {
    cos: Slice,
    sin: Slice,
    half: usize,
    positions: usize,
}

impl Rotary for Cuda {
    type Angles = Angles;

    fn angles(x: &Matrix<Self>, rotation: &Rotation) -> Result<Angles> {
        let (cos, sin) = (x.gpu().upload(&rotation.cos)?, x.gpu().upload(&rotation.sin)?);
        Ok(Angles { cos, sin, half: rotation.half, positions: rotation.positions() })
    }

    fn rotate(
        x: Arc<Numbers>,
        width: usize,
        angles: &Angles,
        head: usize,
        sign: f32,
    ) -> Result<Numbers> {
        let (gpu, count) = (&x.gpu, x.len());
        let Angles { cos, sin, half, positions } = angles;
        let (grid, mut y) = (Grid::each(count), gpu.stale(count)?);
        rotate(gpu, grid, count, width, head, *half, *positions, sign, cos, sin, &x, &mut y)?;
        Ok(y)
    }
}
