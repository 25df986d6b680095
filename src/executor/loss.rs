//! The output error.

use std::iter::zip;

use serde::{Deserialize, Deserializer};

use super::{
    Error,
    ops::{Matrix, Ops},
};

/// Mean over samples of the squared error between outputs and their targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Loss {
    /// Mean over the calibration samples.
    #[serde(deserialize_with = "or_nan")]
    pub calibration: f64,
    /// Mean over the held-out samples; `None` if there are none.
    pub held_out: Option<f64>,
}

impl Loss {
    /// Whether the loss is lower than another. With held-out samples, it must be lower on them, and
    /// not higher on the calibration samples.
    pub fn improves(self, on: Self) -> bool {
        match (self.held_out, on.held_out) {
            (Some(own), Some(other)) => own < other && self.calibration <= on.calibration,
            _ => self.calibration < on.calibration,
        }
    }

    /// Adds the loss of a run.
    pub(super) fn add(&mut self, held_out: bool, loss: f64) {
        if held_out {
            *self.held_out.get_or_insert_default() += loss;
        } else {
            self.calibration += loss;
        }
    }

    /// The means of the sums, over these numbers for calibration and held-out samples.
    pub(super) fn mean(self, [calibration, held_out]: [f64; 2]) -> Self {
        Self {
            calibration: self.calibration / calibration,
            held_out: self.held_out.map(|sum| sum / held_out),
        }
    }
}

/// The sum of ‖y − t‖² / ‖t‖² over the rows y of the outputs of a run and t of their targets.
pub(super) fn relative_error<D: Ops>(output: &Matrix<D>, target: &Matrix<D>) -> Result<f64, Error> {
    let width = output.shape().1;
    let [y, t] = [output, target].map(|of| of.on_host().map_err(Error::device));
    let (y, t) = (y?, t?);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let of_rows = zip(y.chunks(width), t.chunks(width)).map(|(y, t)| {
        let off: f64 = zip(y, t).map(|(y, t)| square(y - t)).sum();
        let whole: f64 = t.iter().map(|t| square(*t)).sum();
        if whole > 0.0 { off / whole } else { 0.0 }
    });
    Ok(of_rows.sum())
}

/// A number; NaN if JSON has `null`.
pub(crate) fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// [`or_nan`] for a key that may be missing.
pub(crate) fn some_or_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    or_nan(deserializer).map(Some)
}
