//! Reconstruction as a stage: other values for the kept weights. It changes weights, and is named
//! so.

use std::path::Path;

use super::{
    Error,
    group::{Grouped, Ran},
    swap::{each_matrix, gram, shift},
};
use crate::{
    checkpoint::Dtype,
    executor::ops::Ops,
    mask::{self, OutputError},
};

/// How kept weights get their values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Least squares of each row, with this damping as a share of the mean diagonal.
    LeastSquares(f64),
}

/// How a group is reconstructed.
#[derive(Clone, Copy, Debug)]
pub struct Reconstruct<'a> {
    /// How values are found.
    pub method: Method,
    /// By how much the Gram matrix is shrunk towards its diagonal, from 0 to 1.
    pub shrinkage: f32,
    /// The format in which changed weights are stored; as in the checkpoint if there is none.
    pub dtype: Option<Dtype>,
    /// The directory for the scratch file of changed weights.
    pub scratch: &'a Path,
}

impl Reconstruct<'_> {
    pub(super) fn run<D: Ops>(&self, grouped: &mut Grouped<'_, D>) -> Result<Ran, Error> {
        let before = grouped.measured()?;
        let names: Vec<String> = grouped
            .group
            .members
            .iter()
            .map(|member| grouped.linear(*member).weight.clone())
            .collect();
        let saved = grouped.pruned.save(&names);
        let Method::LeastSquares(damping) = self.method;
        each_matrix(grouped, |grouped, member, statistics| {
            let linear = grouped.linear(member).clone();
            let dense = grouped.model.values(&linear)?;
            let shift = shift(&dense, None, linear.dims, statistics, grouped.blend);
            let shrinkage = self.shrinkage;
            let error = OutputError { gram: gram(statistics), shift: shift.as_deref(), shrinkage };
            let mask = grouped.mask(member);
            let values = mask::least_squares(&linear.weight, &dense, &mask, error, damping)?;
            let reader = grouped.model.reader;
            grouped.pruned.change(reader, &linear.weight, &values, self.dtype, self.scratch)?;
            Ok(())
        })?;
        grouped.loss = None;
        let after = grouped.measured()?;
        let accepted = after.improves(before);
        if !accepted {
            grouped.pruned.put_back(saved);
            grouped.loss = Some(before);
        }
        Ok(Ran { before, after: Some(if accepted { after } else { before }), accepted })
    }
}
