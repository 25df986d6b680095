//! The metric `hessian-diagonal`: the increase of the layer's squared output error when a weight is
//! removed. H = 2·Σ x xᵀ is that error's Hessian. With H's diagonal the other weights are assumed
//! to stay as they are (Optimal Brain Damage, LeCun et al., NIPS 1989); with the diagonal of H⁻¹
//! they are assumed to compensate for the loss (Optimal Brain Surgeon, Hassibi and Stork, NIPS
//! 1992; SparseGPT, arXiv 2301.00774).
//!
//! ```
//! # use barber_hessian_diagonal as _;
//! use barber_metric::{Needs, registered};
//!
//! assert_eq!(registered().unwrap()["hessian-diagonal"].needs(), Needs::GRAM);
//! ```

mod inverse;

use barber_metric::{Error, LayerStats, Metric, MetricPlugin, Needs, inventory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use inverse::inverse_diagonal;

/// Multiplies each score by ½·W_ij²·H_jj, or by ½·W_ij² / [(H + λI)⁻¹]_jj.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HessianDiagonal {
    /// The matrix whose diagonal is used: the `hessian`, which assumes that other weights stay as
    /// they are, or its `inverse`, which assumes that they compensate for the loss.
    pub of: Of,
    /// λ as a fraction of the Hessian's mean diagonal, for its inverse.
    pub damping: Damping,
}

/// The matrix whose diagonal is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// H.
    Hessian,
    /// (H + λI)⁻¹.
    #[default]
    Inverse,
}

/// A fraction of the Hessian's mean diagonal, above 0; SparseGPT's 0.01 by default. Other values
/// are errors of the recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "f64", into = "f64")]
pub struct Damping(f64);

impl Default for Damping {
    fn default() -> Self {
        Self(0.01)
    }
}

impl TryFrom<f64> for Damping {
    type Error = String;

    fn try_from(fraction: f64) -> Result<Self, String> {
        if fraction.is_finite() && fraction > 0.0 {
            Ok(Self(fraction))
        } else {
            Err(format!("the damping must be > 0, got {fraction}; 0.01 is usual"))
        }
    }
}

impl From<Damping> for f64 {
    fn from(Damping(fraction): Damping) -> Self {
        fraction
    }
}

impl Metric for HessianDiagonal {
    fn needs(&self) -> Needs {
        match self.of {
            Of::Hessian => Needs::INPUT_SQUARE,
            Of::Inverse => Needs::GRAM,
        }
    }

    fn score(&self, stats: &LayerStats<'_>, scores: &mut [f32]) -> Result<(), Error> {
        let columns = stats.dims.columns.max(1);
        // ½·H_jj, or ½ / [(H + λI)⁻¹]_jj.
        let factors: Vec<f64> = match self.of {
            Of::Hessian => stats.input_square()?.iter().map(|square| f64::from(*square)).collect(),
            Of::Inverse => {
                let inverse = inverse_diagonal(stats.gram()?, stats.dims.columns, self.damping.0)?;
                inverse.into_iter().map(|diagonal| 0.5 / diagonal).collect()
            }
        };
        for (scores, row) in scores.chunks_mut(columns).zip(stats.weight.chunks(columns)) {
            for ((score, weight), factor) in scores.iter_mut().zip(row).zip(&factors) {
                *score *= (f64::from(*weight).powi(2) * factor) as f32;
            }
        }
        Ok(())
    }
}

inventory::submit! {
    MetricPlugin::of::<HessianDiagonal>(
        "hessian-diagonal",
        "the output error without the weight: ½·W²·H_jj, or ½·W² / [H⁻¹]_jj",
    )
}

#[cfg(test)]
mod tests {
    use barber_metric::{Dims, figment::value::Dict, testing, testing::Symmetry};

    use super::*;

    fn scores(of: Of, damping: f64, weight: &[f32], gram: &[f32]) -> Vec<f32> {
        let columns = gram.len().isqrt();
        let dims = Dims { rows: weight.len() / columns, columns };
        let input_square: Vec<f32> = (0..columns).map(|j| gram[j * columns + j]).collect();
        let mask = vec![true; weight.len()];
        let stats = LayerStats {
            name: "w",
            dims,
            weight,
            mask: &mask,
            input_square: Some(&input_square),
            gram: Some(gram),
            ..LayerStats::default()
        };
        let mut scores = vec![1.0; weight.len()];
        HessianDiagonal { of, damping: Damping(damping) }
            .score(&stats, &mut scores)
            .expect("scores");
        scores
    }

    #[test]
    fn with_the_hessian_it_is_the_error_without_the_weight() {
        // ‖w·x‖² over the tokens (1, 2), (3, 0).
        let gram = [10.0, 2.0, 2.0, 4.0];
        let weight = [2.0, -1.0, 0.0, 0.5];
        assert_eq!(scores(Of::Hessian, 0.01, &weight, &gram), [40.0, 4.0, 0.0, 1.0]);
    }

    #[test]
    fn with_the_inverse_it_is_the_least_error_that_the_others_can_leave() {
        let (gram, weight) = ([10.0, 2.0, 2.0, 4.0], [2.0, -1.0, 0.0, 0.5]);
        // Without w_0 = 2, w_1 moves to minimise ‖(w_1 + d)·x_1 − (2·x_0 + w_1·x_1)‖²: what is left
        // is 4·(10 − 2²/4) = 36; without w_1 = −1 it is 1·(4 − 2²/10) = 3.6.
        for (found, expected) in
            scores(Of::Inverse, 1e-9, &weight, &gram).iter().zip([36.0, 3.6, 0.0, 0.9])
        {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        // Inputs that do not hang together cannot make up for one another.
        let gram = [3.0, 0.0, 0.0, 5.0];
        let [of, inverse] = [Of::Hessian, Of::Inverse].map(|of| scores(of, 1e-9, &weight, &gram));
        for (a, b) in of.iter().zip(&inverse) {
            assert!((a - b).abs() < 1e-5, "{of:?} {inverse:?}");
        }
    }

    #[test]
    fn its_damping_is_above_zero() {
        let plugin = MetricPlugin::of::<HessianDiagonal>("hessian-diagonal", "");
        let build =
            |damping: f64| plugin.build(Dict::from([("damping".into(), damping.into())])).err();
        assert_eq!(build(0.1), None);
        for wrong in [0.0, -1.0, f64::NAN] {
            assert_eq!(build(wrong).expect("no damping").path, ["damping"]);
        }
    }

    #[test]
    fn it_has_the_properties_of_a_metric() {
        use Symmetry::{Columns, Scale, Signs};
        for of in ["hessian", "inverse"] {
            let metric = testing::metric("hessian-diagonal").parameter("of", of);
            metric.with([Columns, Signs, Scale]).check();
        }
    }
}
