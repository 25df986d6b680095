//! The operations on an NVIDIA GPU: compositions of dfdx's own.

use std::{ops::Range, sync::Arc};

use dfdx::{
    shapes::HasShape,
    tensor::{AsArray, Cuda, CudaError, Gradients, Tape, Tensor, TensorFromVec},
    tensor_ops::{SumTo, TryAdd, TryMul, TrySub},
};

use super::{
    Activate, Activation, Add, Attention, Blend, Cap, ColumnSquares, Columns, CrossEntropy, Entry,
    Gated, Heads, Hold, InputGradient, Linear, Matrix, Norm, Normalise, Rotary, Rotation, Sight,
    SparseProduct, SquaredError, Sums, Trace, Weight,
    composed::{self, Rank2},
    panels::transpose,
};
use crate::find;

type Result<T> = std::result::Result<T, CudaError>;

/// A matrix of a tensor.
fn matrix<T>(tensor: Rank2<Cuda, T>) -> Matrix<Cuda, T> {
    Matrix { shape: *tensor.shape(), tensor, values: () }
}

impl Hold for Cuda {
    type Values = ();

    fn hold(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Matrix<Self>> {
        self.try_tensor_from_vec(values, shape).map(matrix)
    }

    fn host<T>(matrix: &Matrix<Self, T>) -> Vec<f32> {
        matrix.tensor.as_vec()
    }

    fn first_not_finite(matrix: &Matrix<Self>) -> Result<Option<(usize, f32)>> {
        // Times zero, all finite values sum to zero; they are copied only where they do not.
        let sum = matrix.tensor.clone().try_mul(0.0)?.try_sum::<(), _>()?;
        if sum.array().is_finite() {
            return Ok(None);
        }
        let values = matrix.to_vec();
        Ok(find::first(&values, |value| !value.is_finite()).map(|at| (at, values[at])))
    }

    fn take_gradient(gradients: &mut Gradients<f32, Self>, of: &Matrix<Self>) -> Result<Vec<f32>> {
        gradients.get_or_alloc_mut(&of.tensor)?;
        Ok(gradients.get(&of.tensor).as_vec())
    }
}

impl Activate for Cuda {
    fn activate<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>> {
        composed::activate(x.tensor, activation).map(matrix)
    }
}

impl Add for Cuda {
    fn add<T: Tape<f32, Self> + 'static>(
        a: Matrix<Self, T>,
        b: Matrix<Self>,
    ) -> Result<Matrix<Self, T>> {
        a.tensor.try_add(b.tensor).map(matrix)
    }
}

impl Attention for Cuda {
    fn attention<T: Tape<f32, Self> + 'static>(
        q: Matrix<Self, T>,
        k: Matrix<Self, T>,
        v: Matrix<Self, T>,
        heads: Heads,
        sights: Option<&Arc<Vec<Sight>>>,
        _: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>> {
        // The backward pass is dfdx's own, which needs what lies between.
        composed::attention(q.tensor, k.tensor, v.tensor, heads, sights).map(matrix)
    }
}

impl Blend for Cuda {
    fn blend(a: &Matrix<Self>, b: &Matrix<Self>, t: f32) -> Result<Matrix<Self>> {
        composed::blend(&a.tensor, &b.tensor, t).map(matrix)
    }

    fn difference(a: &Matrix<Self>, b: &Matrix<Self>) -> Result<Matrix<Self>> {
        b.tensor.clone().try_sub(a.tensor.clone()).map(matrix)
    }
}

impl Cap for Cuda {
    fn cap(x: &Matrix<Self>, cap: f32) -> Result<Matrix<Self>> {
        composed::cap(x.tensor.clone(), cap).map(matrix)
    }
}

impl ColumnSquares for Cuda {
    fn column_squares(x: &Matrix<Self>, rows: &[Range<usize>]) -> Result<Vec<Vec<f32>>> {
        composed::column_squares(&x.tensor, rows)
    }
}

impl Columns for Cuda {
    fn columns<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        columns: Range<usize>,
    ) -> Result<Matrix<Self, T>> {
        composed::columns(x.tensor, columns).map(matrix)
    }
}

impl CrossEntropy for Cuda {
    fn cross_entropy<T: Tape<f32, Self> + 'static>(
        logits: Matrix<Self, T>,
        targets: &[u32],
    ) -> Result<Tensor<(), f32, Self, T>> {
        composed::cross_entropy(logits.tensor, targets)
    }
}

impl Gated for Cuda {
    fn gated<T: Tape<f32, Self> + 'static>(
        gate: Matrix<Self, T>,
        up: Matrix<Self, T>,
        activation: Activation,
    ) -> Result<Matrix<Self, T>> {
        composed::gated(gate.tensor, up.tensor, activation).map(matrix)
    }
}

impl Linear for Cuda {
    /// The transpose, [inputs, outputs].
    type Factor = Matrix<Self>;

    fn factor(&self, values: &[f32], (outputs, inputs): (usize, usize)) -> Result<Matrix<Self>> {
        let mut transposed = vec![0.0; values.len()];
        transpose(values, inputs, &mut transposed);
        self.hold(transposed, (inputs, outputs))
    }

    fn linear<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        weight: &Weight<Self>,
        input_gradient: InputGradient,
        known: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>> {
        let traced = weight.clone();
        composed::linear(
            x.tensor,
            weight.factor.tensor.clone(),
            weight.bias.as_ref().map(|bias| bias.tensor.clone()),
            input_gradient == InputGradient::Wanted,
            known.map(|known| known.tensor),
            move |x, g| traced.note(|| Ok(Trace { input: matrix(x), gradient: matrix(g) })),
        )
        .map(matrix)
    }
}

impl Normalise for Cuda {
    fn normalise<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        norm: &Norm<Self>,
    ) -> Result<Matrix<Self, T>> {
        let bias = norm.bias.as_ref().map(|bias| bias.tensor.clone());
        let weight = norm.weight.tensor.clone();
        composed::normalise(x.tensor, weight, bias, norm.epsilon, norm.centred).map(matrix)
    }
}

impl Rotary for Cuda {
    fn rotary<T: Tape<f32, Self> + 'static>(
        x: Matrix<Self, T>,
        rotation: &Rotation,
        head: usize,
    ) -> Result<Matrix<Self, T>> {
        composed::rotary(x.tensor, rotation, head).map(matrix)
    }
}

impl SparseProduct for Cuda {
    type Entries = Rank2<Self>;

    fn entries(
        &self,
        entries: Vec<Entry>,
        (outputs, inputs): (usize, usize),
    ) -> Result<Rank2<Self>> {
        let mut values = vec![0.0; outputs * inputs];
        for (row, column, value) in entries {
            values[column * outputs + row] = value;
        }
        self.try_tensor_from_vec(values, (inputs, outputs))
    }

    fn add_sparse_product(
        y: Matrix<Self>,
        x: &Matrix<Self>,
        entries: &Rank2<Self>,
    ) -> Result<Matrix<Self>> {
        composed::add_sparse_product(y.tensor, &x.tensor, entries).map(matrix)
    }
}

impl SquaredError for Cuda {
    fn squared_error<T: Tape<f32, Self> + 'static>(
        output: Matrix<Self, T>,
        target: &Matrix<Self>,
        samples: &[Range<usize>],
    ) -> Result<Tensor<(), f32, Self, T>> {
        composed::squared_error(output.tensor, target.tensor.clone(), samples)
    }
}

impl Sums for Cuda {
    type Sum = Rank2<Self>;

    fn nothing(&self, rows: usize, columns: usize) -> Result<Self::Sum> {
        self.try_tensor_from_vec(vec![0.0; rows * columns], (rows, columns))
    }

    fn sums(sum: Self::Sum) -> Vec<f32> {
        sum.as_vec()
    }

    fn add_squared_gradients(
        sum: &mut Self::Sum,
        trace: &Trace<Self>,
        samples: &[Range<usize>],
    ) -> Result<()> {
        composed::add_squared_gradients(sum, &trace.input.tensor, &trace.gradient.tensor, samples)
    }

    fn add_gram(sum: &mut Self::Sum, x: &Matrix<Self>) -> Result<()> {
        composed::add_product(sum, &x.tensor, &x.tensor)
    }

    fn add_product(sum: &mut Self::Sum, a: &Matrix<Self>, b: &Matrix<Self>) -> Result<()> {
        composed::add_product(sum, &a.tensor, &b.tensor)
    }
}
