//! The operations on an NVIDIA GPU: kernels of our own, products by cuBLAS, dfdx's tape.

mod attention;
mod gpu;

use std::{ops::Range, sync::Arc};

use cudarc::driver::{CudaSlice, DeviceSlice};
use dfdx::tensor::{
    CpuError, Cuda, CudaError, Gradients, PutTape, Tape, Tensor, TensorFromVec, ZerosTensor,
};

pub(in crate::executor) use self::gpu::Gpu;
use self::gpu::{Factor, Numbers, Place};
use super::{
    Activate, Add, Blend, Cap, ColumnSquares, Columns, CrossEntropy, Entry, Gated, Hold,
    InputGradient, Linear, Matrix, Norm, Normalise, Rotary, Rotation, SparseProduct, SquaredError,
    Sums, Trace, Weight,
};
use crate::family::Activation;

type Result<T> = std::result::Result<T, CudaError>;

impl Matrix<Cuda> {
    /// A matrix of a device.
    fn of(device: &Cuda, gpu: &Arc<Gpu>, x: CudaSlice<f32>, shape: (usize, usize)) -> Result<Self> {
        // As on the CPU, the tensor is only the name under which the tape knows the matrix.
        let tensor = device.try_zeros_like(&(0, 0))?;
        Ok(Self { tensor, values: Arc::new(gpu.hold(x)), shape })
    }

    /// A matrix on the same device.
    fn beside(&self, x: CudaSlice<f32>, shape: (usize, usize)) -> Result<Self> {
        Self::of(self.device(), self.gpu(), x, shape)
    }

    fn gpu(&self) -> &Arc<Gpu> {
        &self.values.gpu
    }

    fn numbers(&self) -> &CudaSlice<f32> {
        &self.values.slice
    }

    /// How many numbers it has.
    const fn count(&self) -> usize {
        self.shape.0 * self.shape.1
    }
}

/// That there are as many values as a matrix has.
fn check(values: &[f32], shape: (usize, usize)) -> Result<()> {
    if values.len() == shape.0 * shape.1 { Ok(()) } else { Err(CpuError::WrongNumElements.into()) }
}

/// The name under which the tape knows a matrix.
type Name = Tensor<(usize, usize), f32, Cuda>;

/// Takes the gradient of a matrix of so many numbers.
fn take(
    gradients: &mut Gradients<f32, Cuda>,
    gpu: &Gpu,
    of: &Name,
    count: usize,
) -> Result<CudaSlice<f32>> {
    let gradient = gradients.get_or_alloc_mut(of)?;
    let gradient = std::mem::replace(&mut **gradient, gpu.stale(0)?);
    if gradient.is_empty() { gpu.zeros(count) } else { Ok(gradient) }
}

/// Adds to the gradient of a matrix.
fn add_gradient(
    gradients: &mut Gradients<f32, Cuda>,
    gpu: &Gpu,
    of: &Name,
    gradient: CudaSlice<f32>,
) -> Result<()> {
    let sum = &mut **gradients.get_or_alloc_mut(of)?;
    if sum.is_empty() {
        *sum = gradient;
        return Ok(());
    }
    let count = gradient.len();
    gpu.each("accumulate", count, (count, &gradient, sum))
}

/// The gradient of a loss.
fn scalar(
    gradients: &mut Gradients<f32, Cuda>,
    gpu: &Gpu,
    of: &Tensor<(), f32, Cuda>,
) -> Result<f32> {
    Ok(gpu.download(&**gradients.get_or_alloc_mut(of)?)?[0])
}

impl Hold for Cuda {
    type Values = Arc<Numbers>;

    fn hold(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Matrix<Self>> {
        check(&values, shape)?;
        let gpu = Gpu::of(self)?;
        let numbers = gpu.upload(&values)?;
        Matrix::of(self, &gpu, numbers, shape)
    }

    fn host<T>(matrix: &Matrix<Self, T>) -> Result<Vec<f32>> {
        matrix.values.gpu.download(&matrix.values.slice)
    }

    fn first_not_finite(x: &Matrix<Self>) -> Result<Option<(usize, f32)>> {
        let (gpu, count) = (x.gpu(), x.count());
        let mut place = gpu.upload(&[count as u64])?;
        gpu.each("first_not_finite", count, (count, x.numbers(), &mut place))?;
        let at = gpu.download(&place)?[0] as usize;
        Ok(if at < count { Some((at, x.on_host()?[at])) } else { None })
    }

    fn take_gradient(gradients: &mut Gradients<f32, Self>, of: &Matrix<Self>) -> Result<Vec<f32>> {
        let gradient = take(gradients, of.gpu(), &of.tensor, of.count())?;
        of.gpu().download(&gradient)
    }
}

impl Activate for Cuda {
    fn activate<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>> {
        let (x, mut tape) = x.split_tape();
        let (gpu, count, kind) = (x.gpu().clone(), x.count(), activation as i32);
        let mut y = gpu.stale(count)?;
        gpu.each("activate", count, (count, kind, x.numbers(), &mut y))?;
        let y = x.beside(y, x.shape)?;
        let output = y.tensor.clone();
        tape.add_backward_op(move |gradients| {
            let mut g = take(gradients, &gpu, &output, count)?;
            gpu.each("activate_backward", count, (count, kind, x.numbers(), &mut g))?;
            add_gradient(gradients, &gpu, &x.tensor, g)
        });
        Ok(y.put_tape(tape))
    }
}

impl Add for Cuda {
    fn add<T: Tape<f32, Self> + 'static>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>> {
        let (a, mut tape) = a.split_tape();
        let (gpu, count) = (a.gpu().clone(), a.count());
        let mut y = gpu.stale(count)?;
        gpu.each("add", count, (count, a.numbers(), b.numbers(), &mut y))?;
        let y = a.beside(y, a.shape)?;
        let (output, a, b) = (y.tensor.clone(), a.tensor, b.tensor);
        tape.add_backward_op(move |gradients| {
            let g = take(gradients, &gpu, &output, count)?;
            add_gradient(gradients, &gpu, &a, gpu.copy(&g)?)?;
            add_gradient(gradients, &gpu, &b, g)
        });
        Ok(y.put_tape(tape))
    }
}

impl Blend for Cuda {
    fn blend(a: &Matrix<Self>, b: &Matrix<Self>, t: f32) -> Result<Matrix<Self>> {
        let mut y = a.gpu().stale(a.count())?;
        let parameters = (a.count(), a.numbers(), b.numbers(), t, &mut y);
        a.gpu().each("blend", a.count(), parameters)?;
        a.beside(y, a.shape)
    }

    fn difference(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Matrix<Self>> {
        let mut y = a.gpu().stale(a.count())?;
        let parameters = (a.count(), a.numbers(), b.numbers(), &mut y);
        a.gpu().each("difference", a.count(), parameters)?;
        a.beside(y, a.shape)
    }
}

impl Cap for Cuda {
    fn cap(x: &Matrix<Self>, cap: f32) -> Result<Matrix<Self>> {
        let mut y = x.gpu().stale(x.count())?;
        x.gpu().each("cap", x.count(), (x.count(), x.numbers(), cap, &mut y))?;
        x.beside(y, x.shape)
    }
}

impl ColumnSquares for Cuda {
    fn column_squares(x: &Matrix<Self>, rows: &[Range<usize>]) -> Result<Vec<Vec<f32>>> {
        let (gpu, width) = (x.gpu(), x.shape.1);
        let ranges: Vec<u64> =
            rows.iter().flat_map(|rows| [rows.start as u64, rows.end as u64]).collect();
        let (ranges, mut sums) = (gpu.upload(&ranges)?, gpu.stale(rows.len() * width)?);
        let grid = (width.div_ceil(32) as u32, rows.len() as u32);
        gpu.launch("column_squares", grid, (32, 8), (width, &ranges, x.numbers(), &mut sums))?;
        let sums = gpu.download(&sums)?;
        Ok(sums.chunks(width.max(1)).map(<[f32]>::to_vec).collect())
    }
}

impl Columns for Cuda {
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>> {
        let (x, mut tape) = x.split_tape();
        let ((rows, width), part, start) = (x.shape, columns.len(), columns.start);
        let (gpu, count) = (x.gpu().clone(), rows * part);
        let mut y = gpu.stale(count)?;
        gpu.each("columns", count, (count, width, part, start, x.numbers(), &mut y))?;
        let y = x.beside(y, (rows, part))?;
        let (output, x) = (y.tensor.clone(), x.tensor);
        tape.add_backward_op(move |gradients| {
            let g = take(gradients, &gpu, &output, count)?;
            let mut gx = gpu.zeros(rows * width)?;
            gpu.each("columns_backward", count, (count, width, part, start, &g, &mut gx))?;
            add_gradient(gradients, &gpu, &x, gx)
        });
        Ok(y.put_tape(tape))
    }
}

impl CrossEntropy for Cuda {
    fn cross_entropy<T: Tape<f32, Self> + 'static>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>> {
        let (logits, mut tape) = logits.split_tape();
        let (gpu, (rows, width)) = (logits.gpu().clone(), logits.shape);
        let (targets, mut losses) = (gpu.upload(targets)?, gpu.stale(rows)?);
        let parameters = (width, logits.numbers(), &targets, &mut losses);
        gpu.rows("cross_entropy", (rows, 1), parameters)?;
        let losses = gpu.download(&losses)?;
        let sum: f64 = losses.into_iter().map(f64::from).sum();
        let loss = logits.device().try_tensor_from_vec(vec![sum as f32], ())?;
        let result = loss.clone();
        tape.add_backward_op(move |gradients| {
            let scale = scalar(gradients, &gpu, &result)?;
            let mut g = gpu.stale(rows * width)?;
            let parameters = (width, scale, logits.numbers(), &targets, &mut g);
            gpu.rows("cross_entropy_backward", (rows, 1), parameters)?;
            add_gradient(gradients, &gpu, &logits.tensor, g)
        });
        Ok(loss.put_tape(tape))
    }
}

impl Gated for Cuda {
    fn gated<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>> {
        let (gate, tape) = gate.split_tape();
        let (up, up_tape) = up.split_tape();
        let mut tape = tape.merge(up_tape);
        let (gpu, count, kind) = (gate.gpu().clone(), gate.count(), activation as i32);
        let mut y = gpu.stale(count)?;
        gpu.each("gated", count, (count, kind, gate.numbers(), up.numbers(), &mut y))?;
        let y = gate.beside(y, gate.shape)?;
        let output = y.tensor.clone();
        tape.add_backward_op(move |gradients| {
            let mut g = take(gradients, &gpu, &output, count)?;
            let mut g_up = gpu.stale(count)?;
            let parameters = (count, kind, gate.numbers(), up.numbers(), &mut g, &mut g_up);
            gpu.each("gated_backward", count, parameters)?;
            add_gradient(gradients, &gpu, &gate.tensor, g)?;
            add_gradient(gradients, &gpu, &up.tensor, g_up)
        });
        Ok(y.put_tape(tape))
    }
}

impl Linear for Cuda {
    /// [outputs, inputs].
    type Factor = Arc<Numbers>;

    fn factor(&self, values: &[f32], dims: (usize, usize)) -> Result<Arc<Numbers>> {
        check(values, dims)?;
        Ok(Arc::new(Gpu::of(self)?.numbers(values)?))
    }

    fn linear<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Weight<Self>,
        input_gradient: InputGradient,
        known: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>> {
        let (x, mut tape) = x.split_tape();
        let (gpu, weight) = (x.gpu().clone(), weight.clone());
        let ((tokens, inputs), outputs) = (x.shape, weight.outputs());
        let y = match known {
            Some(y) => y,
            None => {
                let count = tokens * outputs;
                let mut y = gpu.stale(count)?;
                if let Some(bias) = &weight.bias {
                    gpu.each("rows_of", count, (count, outputs, bias.numbers(), &mut y))?;
                }
                let keep = if weight.bias.is_some() { 1.0 } else { 0.0 };
                gpu.product(
                    (tokens, outputs, inputs),
                    (1.0, keep),
                    Factor::whole(x.numbers(), inputs),
                    Factor::whole(&weight.factor.slice, inputs).transposed(),
                    (&mut y, Place::rows(outputs, 0)),
                    1,
                )?;
                x.beside(y, (tokens, outputs))?
            }
        };
        let output = y.tensor.clone();
        tape.add_backward_op(move |gradients| {
            let g = take(gradients, &gpu, &output, tokens * outputs)?;
            let g = x.beside(g, (tokens, outputs))?;
            if input_gradient == InputGradient::Wanted {
                let mut gx = gpu.stale(tokens * inputs)?;
                gpu.product(
                    (tokens, inputs, outputs),
                    (1.0, 0.0),
                    Factor::whole(g.numbers(), outputs),
                    Factor::whole(&weight.factor.slice, inputs),
                    (&mut gx, Place::rows(inputs, 0)),
                    1,
                )?;
                add_gradient(gradients, &gpu, &x.tensor, gx)?;
            }
            weight.note(|| Ok(Trace { input: x, gradient: g }))
        });
        Ok(y.put_tape(tape))
    }
}

impl Normalise for Cuda {
    fn normalise<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>> {
        let (x, mut tape) = x.split_tape();
        let (gpu, norm, width) = (x.gpu().clone(), norm.clone(), norm.weight.shape.1);
        let (rows, centred) = (x.count() / width, i32::from(norm.centred));
        let mut y = gpu.stale(x.count())?;
        // Without a bias, any address will do.
        let bias = norm.bias.as_ref().unwrap_or(&norm.weight);
        let biased = i32::from(norm.bias.is_some());
        let weight = norm.weight.numbers();
        let parameters =
            (width, centred, norm.epsilon, weight, biased, bias.numbers(), x.numbers(), &mut y);
        gpu.rows("normalise", (rows, 1), parameters)?;
        let y = x.beside(y, x.shape)?;
        let output = y.tensor.clone();
        tape.add_backward_op(move |gradients| {
            // The norm's own parameters are nobody's to change: they get no gradient here.
            let mut g = take(gradients, &gpu, &output, x.count())?;
            let weight = norm.weight.numbers();
            let parameters = (width, centred, norm.epsilon, weight, x.numbers(), &mut g);
            gpu.rows("normalise_backward", (rows, 1), parameters)?;
            add_gradient(gradients, &gpu, &x.tensor, g)
        });
        Ok(y.put_tape(tape))
    }
}

impl Rotary for Cuda {
    fn rotary<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        rotation: &Rotation,
        head: usize,
    ) -> Result<Matrix<Self, T>> {
        let (x, mut tape) = x.split_tape();
        let (gpu, count, width) = (x.gpu().clone(), x.count(), x.shape.1);
        let (half, positions) = (rotation.half, rotation.positions());
        let (cos, sin) = (gpu.upload(&rotation.cos)?, gpu.upload(&rotation.sin)?);
        let rotate = move |gpu: &Gpu, x: &CudaSlice<f32>, sign: f32| {
            let mut y = gpu.stale(count)?;
            let parameters = (count, width, head, half, positions, sign, &cos, &sin, x, &mut y);
            gpu.each("rotate", count, parameters)?;
            Ok::<_, CudaError>(y)
        };
        let y = x.beside(rotate(&gpu, x.numbers(), 1.0)?, x.shape)?;
        let (output, x) = (y.tensor.clone(), x.tensor);
        tape.add_backward_op(move |gradients| {
            let g = take(gradients, &gpu, &output, count)?;
            add_gradient(gradients, &gpu, &x, rotate(&gpu, &g, -1.0)?)
        });
        Ok(y.put_tape(tape))
    }
}

impl SparseProduct for Cuda {
    /// [outputs, inputs], as a whole: few entries take a GPU no less time than many.
    type Entries = Numbers;

    fn entries(&self, entries: Vec<Entry>, (outputs, inputs): (usize, usize)) -> Result<Numbers> {
        let gpu = Gpu::of(self)?;
        let places: Vec<u64> =
            entries.iter().map(|(row, column, _)| (row * inputs + column) as u64).collect();
        let values: Vec<f32> = entries.into_iter().map(|(_, _, value)| value).collect();
        let mut all = gpu.zeros(outputs * inputs)?;
        let (count, places, values) = (values.len(), gpu.upload(&places)?, gpu.upload(&values)?);
        gpu.each("scatter", count, (count, &places, &values, &mut all))?;
        Ok(gpu.hold(all))
    }

    fn add_sparse_product(
        y: Matrix<Self>,
        x: &Matrix<Self>,
        entries: &Numbers,
    ) -> Result<Matrix<Self>> {
        let (gpu, (tokens, outputs), inputs) = (x.gpu(), y.shape, x.shape.1);
        let shape = y.shape;
        // An output that nobody else holds is added to where it is.
        let mut sum = match Arc::try_unwrap(y.values) {
            Ok(own) => own.slice,
            Err(shared) => gpu.copy(&shared.slice)?,
        };
        gpu.product(
            (tokens, outputs, inputs),
            (1.0, 1.0),
            Factor::whole(x.numbers(), inputs),
            Factor::whole(&entries.slice, inputs).transposed(),
            (&mut sum, Place::rows(outputs, 0)),
            1,
        )?;
        x.beside(sum, shape)
    }
}

impl SquaredError for Cuda {
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
        samples: &[Range<usize>],
    ) -> Result<Tensor<(), f32, Self, T>> {
        let (y, mut tape) = output.split_tape();
        let (gpu, (rows, width)) = (y.gpu().clone(), y.shape);
        let mut sums = gpu.stale(rows)?;
        let parameters = (width, y.numbers(), target.numbers(), &mut sums);
        gpu.rows("squared_error", (rows, 1), parameters)?;
        let sums = gpu.download(&sums)?;
        let mean = |rows: &[f32]| {
            rows.iter().copied().map(f64::from).sum::<f64>() / (rows.len() * width) as f64
        };
        let sum: f64 = samples.iter().map(|sample| mean(&sums[sample.clone()])).sum();
        let loss = y.device().try_tensor_from_vec(vec![sum as f32], ())?;
        let (result, target, samples) = (loss.clone(), target.clone(), samples.to_vec());
        tape.add_backward_op(move |gradients| {
            let scale = scalar(gradients, &gpu, &result)?;
            let mut scales = vec![0.0; rows];
            for sample in samples {
                let scale = scale * 2.0 / (sample.len() * width) as f32;
                scales[sample].fill(scale);
            }
            let (scales, mut g) = (gpu.upload(&scales)?, gpu.stale(y.count())?);
            let parameters = (y.count(), width, &scales, y.numbers(), target.numbers(), &mut g);
            gpu.each("squared_error_backward", y.count(), parameters)?;
            add_gradient(gradients, &gpu, &y.tensor, g)
        });
        Ok(loss.put_tape(tape))
    }
}

/// C = `keep` C + Aᵀ B, over some rows of both.
fn add_transposed_product(
    sum: &mut CudaSlice<f32>,
    keep: f32,
    a: &Matrix<Cuda>,
    b: &Matrix<Cuda>,
    rows: &Range<usize>,
) -> Result<()> {
    let ((_, a_width), (_, b_width)) = (a.shape, b.shape);
    a.gpu().product(
        (a_width, b_width, rows.len()),
        (1.0, keep),
        Factor::new(a.numbers(), Place::rows(a_width, rows.start)).transposed(),
        Factor::new(b.numbers(), Place::rows(b_width, rows.start)),
        (sum, Place::rows(b_width, 0)),
        1,
    )
}

impl Sums for Cuda {
    type Sum = Numbers;

    fn nothing(&self, rows: usize, columns: usize) -> Result<Numbers> {
        let gpu = Gpu::of(self)?;
        Ok(gpu.hold(gpu.zeros(rows * columns)?))
    }

    fn sums(sum: Numbers) -> Result<Vec<f32>> {
        sum.gpu.download(&sum.slice)
    }

    fn add_squared_gradients(
        layers: &mut [(&mut Numbers, Trace<Self>)],
        samples: &[Range<usize>],
    ) -> Result<()> {
        for (sum, Trace { input, gradient }) in layers {
            let (gpu, count) = (input.gpu(), input.shape.1 * gradient.shape.1);
            let mut product = gpu.stale(count)?;
            for sample in samples {
                add_transposed_product(&mut product, 0.0, gradient, input, sample)?;
                gpu.each("accumulate_square", count, (count, &product, &mut sum.slice))?;
            }
        }
        Ok(())
    }

    fn add_gram(sum: &mut Numbers, x: &Matrix<Self>) -> Result<()> {
        add_transposed_product(&mut sum.slice, 1.0, x, x, &(0..x.shape.0))
    }

    fn add_product(sum: &mut Numbers, a: &Matrix<Self>, b: &Matrix<Self>) -> Result<()> {
        add_transposed_product(&mut sum.slice, 1.0, a, b, &(0..a.shape.0))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kernels_compile() {
        if let Err(problem) = cudarc::nvrtc::compile_ptx(super::gpu::SOURCE) {
            panic!("{problem}");
        }
    }
}
