//! The product with a matrix of few entries on a GPU.

use std::sync::Arc;

use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Entry, Matrix, SparseProduct,
    gpu::{Factor, Gpu, Grid, Numbers, Place, Result, Slice, kernels},
};

kernels! {
    fn scatter(n: usize, places: &Slice<u64>, values: &Slice, y: &mut Slice) "
    index_t i = ELEMENT;
    if (i < n) y[places[i]] = values[i];
"
}

impl SparseProduct for Cuda {
    /// [outputs, inputs], dense: on a GPU few entries take as long as many.
    type Entries = Numbers;

    fn entries(&self, entries: Vec<Entry>, (outputs, inputs): (usize, usize)) -> Result<Numbers> {
        let gpu = Gpu::of(self)?;
        let places: Vec<u64> =
            entries.iter().map(|(row, column, _)| (row * inputs + column) as u64).collect();
        let values: Vec<f32> = entries.into_iter().map(|(_, _, value)| value).collect();
        let mut all = gpu.zeros(outputs * inputs)?;
        let (count, places, values) = (values.len(), gpu.upload(&places)?, gpu.upload(&values)?);
        scatter(&gpu, Grid::each(count), count, &places, &values, &mut all)?;
        Ok(all)
    }

    fn add_sparse_product(
        y: Matrix<Self>,
        x: &Matrix<Self>,
        entries: &Numbers,
    ) -> Result<Matrix<Self>> {
        let (gpu, inputs, shape) = (x.gpu(), x.shape().1, y.shape());
        let (tokens, outputs) = shape;
        // An output that has no other owner is updated in place.
        let mut sum = match Arc::try_unwrap(y.values) {
            Ok(own) => own,
            Err(shared) => gpu.copy(&shared)?,
        };
        gpu.product(
            (tokens, outputs, inputs),
            (1.0, 1.0),
            Factor::whole(&x.values, inputs),
            Factor::whole(entries, inputs).transposed(),
            (&mut sum, Place::rows(outputs, 0)),
            1,
        )?;
        x.beside(sum, shape)
    }
}
