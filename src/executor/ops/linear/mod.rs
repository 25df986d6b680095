//! The linear layer y = x Wᵀ + b.
//!
//! ∂L/∂x = ∂L/∂y W. The gradient of W, ∂L/∂yᵀ x, is never computed as a whole: the layer records x
//! and ∂L/∂y, and [`Sums`](super::Sums) computes the requested sums from them.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use dfdx::tensor::{Cpu, CpuError, Tape};

use super::{
    Buffer, Computed, Factor, Hold, Matrix, Sums,
    gemm::{View, add_product, product},
    tape::record,
};
use crate::buffer::{recycle, zeros};

#[cfg(feature = "cuda")]
pub(super) mod cuda;

/// The weight of a linear layer and its bias.
#[derive(Clone, Debug)]
pub struct Weight<D: Linear> {
    source: Source<D>,
    /// Numbers of outputs and inputs.
    dims: (usize, usize),
    /// [1, outputs].
    bias: Option<Matrix<D>>,
    trace: Option<Arc<Mutex<Option<Trace<D>>>>>,
    /// Indices of the input's rows in the batch; `None` for all rows.
    rows: Option<Arc<[usize]>>,
    /// Whether the CPU keeps no second copy of it, for gradients.
    single: bool,
}

/// Where a weight's factor comes from.
#[derive(Clone, Debug)]
enum Source<D: Linear> {
    /// The factor is in memory.
    Held(D::Factor),
    /// Each product reads the values.
    Read(D, Arc<dyn Values>),
}

/// The values of a weight that is too large to stay in memory.
pub trait Values: fmt::Debug + Send + Sync {
    /// Reads the values, row-major.
    fn read(&self) -> Vec<f32>;
}

/// The factors of a weight's gradient: ∂L/∂W = `gradient`ᵀ `input`, for the rows of each sample.
#[derive(Clone, Debug)]
pub struct Trace<D: Hold> {
    /// The layer's input, [tokens, inputs].
    pub input: Matrix<D>,
    /// The gradient of the layer's output, [tokens, outputs].
    pub gradient: Matrix<D>,
    /// Indices of the tokens in the batch, in order; `None` for all tokens.
    pub rows: Option<Arc<[usize]>>,
}

impl Trace<Cpu> {
    /// The gradient of the weight, [outputs, inputs], row-major, summed over the samples.
    pub fn gradient(&self) -> Result<Vec<f32>, CpuError> {
        let mut sum = Cpu::default().nothing(self.gradient.shape().1, self.input.shape().1)?;
        Cpu::add_product(&mut sum, &self.gradient, &self.input)?;
        Cpu::sums(sum)
    }
}

impl<D: Linear> Weight<D> {
    /// A weight of `dims`, (outputs, inputs), from its row-major values.
    pub fn new(
        device: &D,
        values: &[f32],
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<Self, D::Err> {
        let source = Source::Held(device.factor(values, dims)?);
        Self::of(device, source, dims, bias)
    }

    /// A weight of `dims`, (outputs, inputs), whose values are read by each product.
    pub fn read(
        device: &D,
        values: Arc<dyn Values>,
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<Self, D::Err> {
        Self::of(device, Source::Read(device.clone(), values), dims, bias)
    }

    fn of(
        device: &D,
        source: Source<D>,
        dims: (usize, usize),
        bias: Option<Vec<f32>>,
    ) -> Result<Self, D::Err> {
        let bias = bias.map(|bias| device.hold(bias, (1, dims.0))).transpose()?;
        Ok(Self { source, dims, bias, trace: None, rows: None, single: false })
    }

    /// The factor of products.
    fn factor(&self) -> Result<D::Factor, D::Err> {
        match &self.source {
            Source::Held(factor) => Ok(factor.clone()),
            Source::Read(device, values) => {
                let values = values.read();
                let factor = device.factor(&values, self.dims);
                recycle(values);
                factor
            }
        }
    }

    /// The weight, with a backward pass recording its [`Trace`].
    #[must_use]
    pub fn traced(&self) -> Self {
        Self { trace: Some(Arc::default()), ..self.clone() }
    }

    /// The weight for an input that has only some `rows` of the batch, which its [`Trace`] names.
    #[must_use]
    pub fn of_rows(&self, rows: &Arc<[usize]>) -> Self {
        Self { rows: Some(rows.clone()), ..self.clone() }
    }

    /// The weight with one copy in memory, of which a gradient of the input transposes a block at a time:
    /// for the largest matrix of a model, which few tokens read at a time.
    #[must_use]
    pub fn single(self) -> Self {
        Self { single: true, ..self }
    }

    /// Takes the trace that the backward pass recorded, if the weight is traced.
    pub fn take_trace(&self) -> Option<Trace<D>> {
        let mut trace = self.trace.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        trace.take()
    }

    /// Records the trace, if the weight is traced.
    fn note(&self, trace: Trace<D>) {
        if let Some(slot) = &self.trace {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(trace);
        }
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.dims.1
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.dims.0
    }
}

/// Whether the gradient of a linear layer's input is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// Computed, as weights before this layer need it.
    Wanted,
    /// Not computed, as this layer is the first of its group.
    Skipped,
}

/// y = x Wᵀ + b.
pub trait Linear: Hold {
    /// A weight in the layout of the device's products.
    type Factor: Clone + fmt::Debug;

    /// The factor of a weight of `dims`, (outputs, inputs), from its row-major values.
    fn factor(&self, values: &[f32], dims: (usize, usize)) -> Result<Self::Factor, Self::Err>;

    /// x Wᵀ + b, for the weight's factor.
    fn linear_forward(
        x: &Matrix<Self>,
        factor: &Self::Factor,
        weight: &Weight<Self>,
    ) -> Computed<Self>;

    /// ∂L/∂x, for ∂L/∂y in `g` and the weight's factor.
    fn linear_backward(
        g: &Matrix<Self>,
        factor: &Self::Factor,
        weight: &Weight<Self>,
    ) -> Computed<Self>;

    /// The layer's output, [tokens, outputs], for `x` of [tokens, inputs]; a `known` output is not
    /// computed again.
    fn linear<T: Tape<f32, Self>>(
        x: Matrix<Self, T>,
        weight: &Weight<Self>,
        input_gradient: InputGradient,
        known: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (x, tape) = x.split_tape();
        let shape = (x.shape().0, weight.outputs());
        let y = match known {
            Some(y) => y,
            None => x.beside(Self::linear_forward(&x, &weight.factor()?, weight)?, shape)?,
        };
        let (weight, input) = (weight.clone(), x.name());
        let rows = weight.rows.clone();
        let trace =
            move |g| Ok::<_, Self::Err>(Trace { gradient: x.beside(g, shape)?, input: x, rows });
        Ok(match input_gradient {
            InputGradient::Wanted => record(tape, [input], y, move |g| {
                let trace = trace(g)?;
                let g = Self::linear_backward(&trace.gradient, &weight.factor()?, &weight)?;
                weight.note(trace);
                Ok([g])
            }),
            InputGradient::Skipped => record(tape, [], y, move |g| {
                weight.note(trace(g)?);
                Ok([])
            }),
        })
    }
}

impl Linear for Cpu {
    type Factor = Factor;

    fn factor(&self, values: &[f32], dims: (usize, usize)) -> Result<Factor, CpuError> {
        Ok(Factor::new(values, dims))
    }

    fn linear_forward(
        x: &Matrix<Self>,
        factor: &Factor,
        weight: &Weight<Self>,
    ) -> Result<Buffer, CpuError> {
        let (tokens, inputs) = x.shape();
        let bias = weight.bias.as_ref().map(|bias| &bias.values[..]);
        Ok(product(View::new(&x.values, tokens, inputs), factor.forward(), bias).into())
    }

    fn linear_backward(
        g: &Matrix<Self>,
        factor: &Factor,
        weight: &Weight<Self>,
    ) -> Result<Buffer, CpuError> {
        let (tokens, outputs) = g.shape();
        if !weight.single {
            return Ok(
                product(View::new(&g.values, tokens, outputs), factor.backward(), None).into()
            );
        }
        let mut sum = zeros(tokens * weight.inputs());
        for (of, panels) in factor.backward_blocks() {
            let g = View::strided(&g.values[of.start..], tokens, of.len(), outputs);
            add_product(&mut sum, 1.0, g, &panels);
        }
        Ok(sum.into())
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor_ops::Backward;

    use super::*;
    use crate::executor::ops::{
        tape::gradient,
        testing::{check, matrix, noise, traced, weighted_sum},
    };

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let device = Cpu::default();
        for bias in [None, Some(noise(4, 3))] {
            let values = noise(20, 1);
            let of = |w: &[f32]| Weight::new(&device, w, (4, 5), bias.clone()).unwrap().traced();
            let weight = of(&values);
            check!(|device: D| [(3, 5)], |[x]| {
                let weight = Weight::new(device, &values, (4, 5), bias.clone()).unwrap();
                D::linear(x, &weight, InputGradient::Wanted, None)
            });

            let loss = |weight: &Weight<Cpu>| {
                let x = traced(matrix(noise(15, 2), (3, 5)));
                weighted_sum(Cpu::linear(x, weight, InputGradient::Skipped, None).unwrap())
            };
            loss(&weight).backward();
            let gradient = weight.take_trace().unwrap().gradient().unwrap();
            for (i, gradient) in gradient.into_iter().enumerate() {
                let shifted = |h: f32| {
                    let mut w = values.clone();
                    w[i] += h;
                    loss(&of(&w)).as_vec()[0]
                };
                let slope = (shifted(0.01) - shifted(-0.01)) / 0.02;
                assert!((slope - gradient).abs() < 1e-2, "{slope} {gradient}");
            }
        }
    }

    #[test]
    fn outputs_are_products_with_rows() {
        let bias = Some(vec![0.5, -0.5]);
        let weight = Weight::new(&Cpu::default(), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (2, 3), bias);
        let x = matrix(vec![1.0, 0.0, -1.0, 0.0, 2.0, 1.0], (2, 3));
        let y = Cpu::linear(x, &weight.unwrap(), InputGradient::Skipped, None).unwrap();
        assert_eq!(y.to_vec(), [-1.5, -2.5, 7.5, 15.5]);
    }

    #[test]
    fn a_weight_that_is_read_gives_the_same() {
        #[derive(Debug)]
        struct Noise;

        impl Values for Noise {
            fn read(&self) -> Vec<f32> {
                noise(20, 1)
            }
        }

        let (device, bias) = (Cpu::default(), Some(noise(4, 3)));
        let held = Weight::new(&device, &noise(20, 1), (4, 5), bias.clone()).unwrap();
        let read = Weight::read(&device, Arc::new(Noise), (4, 5), bias).unwrap();
        let of = |weight: &Weight<Cpu>| {
            let x = matrix(noise(15, 2), (3, 5));
            let y = Cpu::linear(traced(x.clone()), weight, InputGradient::Wanted, None).unwrap();
            let values = y.to_vec();
            (values, gradient(weighted_sum(y), &x).unwrap().to_vec())
        };
        assert_eq!(of(&held), of(&read));
    }

    /// With more outputs than a block has, and a last panel and block that are not full.
    #[test]
    fn a_weight_with_one_copy_gives_the_same() {
        let (outputs, inputs) = (9001, 7);
        let values = noise(outputs * inputs, 5);
        let both = Weight::new(&Cpu::default(), &values, (outputs, inputs), None).unwrap();
        let x = matrix(noise(3 * inputs, 6), (3, inputs));
        let of = |weight: &Weight<Cpu>| {
            let y = Cpu::linear(traced(x.clone()), weight, InputGradient::Wanted, None).unwrap();
            gradient(weighted_sum(y), &x).unwrap().to_vec()
        };
        for (found, expected) in of(&both.clone().single()).iter().zip(of(&both)) {
            assert!(
                (found - expected).abs() < 1e-3 * expected.abs().max(1.0),
                "{found} {expected}"
            );
        }
    }

    #[test]
    fn a_known_output_is_not_computed() {
        let weight = Weight::new(&Cpu::default(), &noise(20, 1), (4, 5), None).unwrap();
        let known = matrix(noise(12, 8), (3, 4));
        let x = matrix(noise(15, 2), (3, 5));
        let y = Cpu::linear(x, &weight, InputGradient::Wanted, Some(known.clone())).unwrap();
        assert_eq!(y.to_vec(), known.to_vec());
    }
}
