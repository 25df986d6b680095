//! The existing zeros of a checkpoint as an initial mask.

use barber_metric::Needs;

use super::{Initial, InitialMask, Takes};
use crate::mask::{Error, Mask, Scope};

pub(super) static NONE: InitialMask = InitialMask {
    name: "none",
    prunes: "only the weights that are zero already, which stages can refine where `model.dense` names \
             the dense model",
    needs: Needs::NOTHING,
    scope: Scope::Layer,
    metrics: false,
    zeros: true,
    scores: None,
    takes: Takes::LITTLE,
    run: |matrix| {
        let (name, dims, weight) = (matrix.stats.name, matrix.stats.dims, matrix.stats.weight);
        Error::check_numbers(name, dims.columns, weight)?;
        let mask = Mask::from_fn(dims, |i| weight[i] != 0.0);
        matrix.pattern.check(name, &mask)?;
        Ok(Initial::of(mask))
    },
};
