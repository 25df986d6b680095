//! Numbers that stages over the whole model keep of each matrix, such as running means. A rank keeps those
//! of its own rows.

use std::ops::Range;

use barber_metric::Dims;

use crate::{
    executor::{Error, Storage, Store, ops::Ops},
    model::Model,
};

/// Numbers of some matrices, of this rank's rows.
pub(super) struct OwnRows<'a, D: Ops> {
    model: &'a Model<'a, D>,
    store: Store<D>,
}

impl<'a, D: Ops> OwnRows<'a, D> {
    /// Room for so many matrices.
    pub(super) fn new(model: &'a Model<'a, D>, storage: &Storage, matrices: usize) -> Self {
        Self { model, store: storage.store(matrices) }
    }

    /// The numbers of a matrix that were put last, of this rank's rows, row-major.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(super) fn get(&self, matrix: usize, dims: Dims) -> Result<Vec<f32>, Error> {
        if self.rows(dims).is_empty() {
            return Ok(Vec::new());
        }
        let found = self.store.get(matrix, &self.model.executor.device)?;
        found.on_host().map_err(Error::device)
    }

    /// Puts numbers of this rank's rows of a matrix, row-major.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(super) fn put(&mut self, matrix: usize, dims: Dims, own: Vec<f32>) -> Result<(), Error> {
        let rows = self.rows(dims).len();
        if rows == 0 {
            return Ok(());
        }
        let held = self.model.executor.device.hold(own, (rows, dims.columns));
        self.store.put(matrix, held.map_err(Error::device)?)
    }

    /// Puts those that are of this rank's rows of the numbers of all rows.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(super) fn put_all(&mut self, matrix: usize, dims: Dims, all: &[f32]) -> Result<(), Error> {
        let own = all[self.weights(dims)].to_vec();
        self.put(matrix, dims, own)
    }

    /// The places of the weights of this rank's rows.
    pub(super) fn weights(&self, dims: Dims) -> Range<usize> {
        let rows = self.rows(dims);
        rows.start * dims.columns..rows.end * dims.columns
    }

    fn rows(&self, dims: Dims) -> Range<usize> {
        self.model.executor.ranks.own_rows(dims.rows, 1)
    }
}
