//! Rotary position embedding on a GPU.

use std::sync::Arc;

use cudarc::driver::DeviceSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Matrix, Rotary, Rotation,
    gpu::{Grid, Numbers, Result, Slice, kernels},
};

kernels! {
    /// Rotates 2 · half channels of each head, from the channel `from` on; `sign` is −1 for the
    /// opposite angle.
    fn rotate(
        n: usize, width: usize, head: usize, from: usize, half: usize, interleaved: usize, positions: usize,
        sign: f32, cos: &Slice, sin: &Slice, x: &Slice, y: &mut Slice
    ) "
    index_t i = ELEMENT;
    if (i >= n) return;
    index_t position = i / width % positions, channel = i % width % head;
    if (channel < from || channel >= from + 2 * half) {
        y[i] = x[i];
        return;
    }
    channel -= from;
    index_t plane = interleaved ? channel / 2 : channel % half;
    index_t apart = interleaved ? 1 : half;
    bool first = interleaved ? channel % 2 == 0 : channel < half;
    index_t angle = position * half + plane;
    float turned = first ? -x[i + apart] : x[i - apart];
    y[i] = x[i] * cos[angle] + turned * (sign * sin[angle]);
"
}

/// A rotation's tables on a GPU.
#[derive(Debug)]
pub struct Angles {
    cos: Slice,
    sin: Slice,
    half: usize,
    interleaved: bool,
    positions: usize,
}

impl Rotary for Cuda {
    type Angles = Angles;

    fn angles(x: &Matrix<Self>, rotation: &Rotation) -> Result<Angles> {
        let (cos, sin) = (x.gpu().upload(&rotation.cos)?, x.gpu().upload(&rotation.sin)?);
        let Rotation { half, interleaved, .. } = *rotation;
        Ok(Angles { cos, sin, half, interleaved, positions: rotation.positions() })
    }

    fn rotate(
        x: Arc<Numbers>,
        width: usize,
        angles: &Angles,
        (head, from): (usize, usize),
        sign: f32,
    ) -> Result<Numbers> {
        let (gpu, count) = (&x.gpu, x.len());
        let Angles { cos, sin, half, interleaved, positions } = angles;
        let (grid, mut y, interleaved) =
            (Grid::each(count), gpu.stale(count)?, usize::from(*interleaved));
        rotate(
            gpu,
            grid,
            count,
            width,
            head,
            from,
            *half,
            interleaved,
            *positions,
            sign,
            cos,
            sin,
            &x,
            &mut y,
        )?;
        Ok(y)
    }
}
