//! How a mask starts: one file per initialiser.

mod lowest;
mod magnitude;
mod sparsegpt;
mod wanda;

use std::fmt;

use barber_metric::{Dims, LayerStats, Needs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Mask, Pattern, Scope, pattern::Tile};
use lowest::{Ties, prune_lowest};

/// The mask that the rebuild starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The lowest |W| of each matrix are pruned.
    Magnitude,
    /// The lowest |W|·‖x‖ of each row are pruned, ‖x‖ being the norm of a weight's input
    /// (arXiv 2306.11695).
    Wanda,
    /// Blocks of columns are pruned one after the other, by the error that a weight's loss causes,
    /// and the kept weights make up for it (arXiv 2301.00774). It changes kept weights.
    SparseGpt,
    /// The lowest scores of a metric pipeline are pruned, in each row or each matrix.
    Metric,
    /// The weights that are zero already are pruned.
    None,
}

impl Init {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Magnitude, Self::Wanda, Self::SparseGpt, Self::Metric, Self::None];

    /// One line of help.
    pub const fn help(self) -> &'static str {
        match self {
            Self::Magnitude => "prunes the lowest |W| of each matrix",
            Self::Wanda => "prunes the lowest |W|·‖x‖ of each row (arXiv 2306.11695)",
            Self::SparseGpt => {
                "prunes by the error that it causes, and changes kept weights (arXiv 2301.00774)"
            }
            Self::Metric => "prunes the lowest scores of metrics, in each row or matrix",
            Self::None => "keeps the zeros that the weights have",
        }
    }

    /// The statistics that [`Init::start`] needs. What metrics need, they say.
    pub const fn needs(self) -> Needs {
        match self {
            Self::Magnitude | Self::Metric | Self::None => Needs::NOTHING,
            Self::Wanda => Needs::INPUT_SQUARE,
            Self::SparseGpt => Needs::GRAM,
        }
    }

    /// The initial mask of a matrix, with so many weights pruned. An N:M pattern has its own: the N
    /// highest scores of each tile are kept, and `amount` is not used. Among equal scores the first
    /// weights are pruned, as the stable sort of Wanda's authors does; under unstructured
    /// [`Init::Magnitude`], where the authors' code prunes all of them, the last. [`Init::Metric`]'s
    /// scores are not in `stats`: [`Initial::of_scores`] takes them.
    ///
    /// # Errors
    /// If the statistics lack something or do not fit the matrix, a score is not a number,
    /// the share is not within 0 and 1, the pattern's tiles do not divide the rows, the zeros do not
    /// follow the pattern ([`Init::None`]), or the Hessian is not positive definite however damped
    /// ([`Init::SparseGpt`]).
    pub fn start(
        self,
        stats: &LayerStats<'_>,
        pattern: Pattern,
        amount: impl Into<Amount>,
    ) -> Result<Initial, Error> {
        let &LayerStats { name, dims, weight, .. } = stats;
        let amount = amount.into();
        let ratio = amount.ratio(dims)?;
        Error::check_length(name, "weights", weight.len(), dims.len())?;
        let (scores, pool, ties) = match self {
            Self::None => {
                Error::check_numbers(name, dims.columns, weight)?;
                let mask = Mask::from_fn(dims, |i| weight[i] != 0.0);
                pattern.check(name, &mask)?;
                return Ok(Initial::of(mask));
            }
            Self::SparseGpt => return sparsegpt::prune(stats, pattern, ratio),
            Self::Metric => {
                return Err(Error::Missing { name: name.into(), statistic: "scores" });
            }
            Self::Magnitude => (magnitude::scores(stats), dims.len(), Ties::Last),
            Self::Wanda => (wanda::scores(stats)?, dims.columns, Ties::First),
        };
        lowest(name, dims, &scores, (pool, ties), pattern, amount)
    }
}

/// Prunes the lowest scores of every `pool` consecutive ones, or of each tile.
fn lowest(
    name: &str,
    dims: Dims,
    scores: &[f32],
    (pool, ties): (usize, Ties),
    pattern: Pattern,
    amount: Amount,
) -> Result<Initial, Error> {
    Error::check_numbers(name, dims.columns, scores)?;
    Ok(Initial::of(match (pattern.tile(name, dims.columns)?, amount) {
        (Some(Tile { n, m }), _) => {
            prune_lowest(dims, scores, m, |_| m.saturating_sub(n), Ties::First)
        }
        (None, Amount::Share(ratio)) => {
            prune_lowest(dims, scores, pool, |_| share(ratio, pool), ties)
        }
        (None, Amount::Exactly(count)) => {
            // As many of each pool, and one more of the first ones.
            let pools = dims.len() / pool.max(1);
            let (each, more) = (count / pools.max(1), count % pools.max(1));
            prune_lowest(dims, scores, pool, |i| each + usize::from(i < more), ties)
        }
    }))
}

/// How many weights of a matrix are pruned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// A share r: exactly ⌊r·n⌋ of each matrix ([`Init::Magnitude`], [`Init::SparseGpt`]) or row
    /// ([`Init::Wanda`]); [`Init::Metric`] has a choice.
    Share(f64),
    /// So many of the matrix.
    Exactly(usize),
}

impl Amount {
    /// The share of a matrix.
    fn ratio(self, dims: Dims) -> Result<f64, Error> {
        let ratio = match self {
            Self::Share(ratio) => ratio,
            Self::Exactly(count) => count as f64 / dims.len().max(1) as f64,
        };
        if (0.0..=1.0).contains(&ratio) { Ok(ratio) } else { Err(Error::Ratio { ratio }) }
    }
}

impl From<f64> for Amount {
    fn from(ratio: f64) -> Self {
        Self::Share(ratio)
    }
}

/// How one matrix starts.
#[derive(Clone, Debug, PartialEq)]
pub struct Initial {
    /// Its mask.
    pub mask: Mask,
    /// The weights, row-major, where the initialiser changed kept ones; pruned ones are as dense.
    pub values: Option<Vec<f32>>,
    /// The damping of the Hessian as a share of its mean diagonal, where the usual one did not
    /// make it positive definite.
    pub damping: Option<f64>,
}

impl Initial {
    /// A mask that changes no weight.
    fn of(mask: Mask) -> Self {
        Self { mask, values: None, damping: None }
    }

    /// The mask that prunes the lowest of a matrix's scores, row-major, in each row
    /// ([`Scope::Row`]) or of the whole matrix ([`Scope::Layer`]), or of each tile of a pattern N:M.
    /// Among equal scores the first weights are pruned.
    ///
    /// # Errors
    /// If the scores do not fit the matrix, one is not a number, the share is not within 0 and 1,
    /// the pattern's tiles do not divide the rows, or for another scope.
    pub fn of_scores(
        (name, dims, scores): (&str, Dims, &[f32]),
        scope: Scope,
        pattern: Pattern,
        amount: impl Into<Amount>,
    ) -> Result<Self, Error> {
        let amount = amount.into();
        amount.ratio(dims)?;
        Error::check_length(name, "scores", scores.len(), dims.len())?;
        let pool = match scope {
            Scope::Row => dims.columns,
            Scope::Layer => dims.len(),
            Scope::Group | Scope::Column => return Err(Error::InitialScope { scope }),
        };
        lowest(name, dims, scores, (pool, Ties::First), pattern, amount)
    }
}

/// ⌊`ratio`·n⌋ for the decimal number that the user wrote: 0.29 of 100 are 29, though the nearest
/// binary number is below 0.29.
fn share(ratio: f64, weights: usize) -> usize {
    (ratio * weights as f64 + 1e-6) as usize
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magnitude => "magnitude",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
            Self::Metric => "metric",
            Self::None => "none",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those whose scores are in the statistics.
    const RULES: [Init; 4] = [Init::Magnitude, Init::Wanda, Init::SparseGpt, Init::None];
    const ALL: Pattern = Pattern::Unstructured;
    const TWO_OF_FOUR: Pattern = Pattern::NofM { n: 2, m: 4 };

    fn stats<'a>(weight: &'a [f32], rows: usize, input_square: &'a [f32]) -> LayerStats<'a> {
        LayerStats {
            name: "w",
            dims: Dims { rows, columns: weight.len() / rows },
            weight,
            mask: &[],
            input_square: Some(input_square),
            gram: Some(&[]),
            ..LayerStats::default()
        }
    }

    fn kept(init: Init, stats: &LayerStats<'_>, pattern: Pattern, ratio: f64) -> Vec<u8> {
        let initial = init.start(stats, pattern, ratio).expect("a mask");
        initial.mask.to_bools().into_iter().map(u8::from).collect()
    }

    #[test]
    fn a_share_is_that_of_the_decimal_number() {
        for (ratio, weights, pruned) in
            [(0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.7, 64, 44)]
        {
            assert_eq!(share(ratio, weights), pruned);
        }
    }

    #[test]
    fn magnitude_prunes_the_lowest_of_the_matrix() {
        let stats = stats(&[1.0, -2.0, -3.0, 4.0, 8.0, -7.0, 6.0, 5.0], 2, &[]);
        let kept = |ratio| kept(Init::Magnitude, &stats, ALL, ratio);
        assert_eq!(kept(0.0), [1; 8]);
        assert_eq!(kept(0.4), [0, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(kept(0.5), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(kept(1.0), [0; 8]);
    }

    #[test]
    fn wanda_prunes_the_lowest_of_each_row() {
        // Scores: 2 1 3 8, 8 7 1 2.
        let stats = stats(&[-1.0, 1.0, 1.5, 1.0, 4.0, 7.0, -0.5, 0.25], 2, &[4.0, 1.0, 4.0, 64.0]);
        let kept = |ratio| kept(Init::Wanda, &stats, ALL, ratio);
        assert_eq!(kept(0.5), [0, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(kept(0.49), [1, 0, 1, 1, 1, 1, 0, 1]);
    }

    #[test]
    fn scores_are_compared_in_rows_or_in_the_matrix() {
        let dims = Dims { rows: 2, columns: 4 };
        let scores = [5.0, 6.0, 7.0, 8.0, 4.0, 1.0, 3.0, 2.0];
        let kept = |scope, pattern| {
            let initial = Initial::of_scores(("w", dims, &scores), scope, pattern, 0.5);
            initial.map(|of| of.mask.to_bools().into_iter().map(u8::from).collect::<Vec<_>>())
        };
        assert_eq!(kept(Scope::Row, ALL), Ok(vec![0, 0, 1, 1, 1, 0, 1, 0]));
        assert_eq!(kept(Scope::Layer, ALL), Ok(vec![1, 1, 1, 1, 0, 0, 0, 0]));
        assert_eq!(kept(Scope::Layer, TWO_OF_FOUR), Ok(vec![0, 0, 1, 1, 1, 0, 1, 0]));
        for scope in [Scope::Group, Scope::Column] {
            assert_eq!(kept(scope, ALL), Err(Error::InitialScope { scope }));
        }
        let few = Initial::of_scores(("w", dims, &scores[1..]), Scope::Row, ALL, 0.5);
        assert_eq!(few.unwrap_err().to_string(), "`w`: 7 scores, but the matrix needs 8");
        let nan = Initial::of_scores(("w", dims, &[f32::NAN; 8]), Scope::Row, ALL, 0.5);
        assert!(matches!(nan, Err(Error::NotANumber { row: 0, column: 0, .. })));
    }

    #[test]
    fn a_count_is_exact_whatever_the_pools() {
        let weight: Vec<f32> = (0..21).map(|i| i as f32 - 10.2).collect();
        let gram: Vec<f32> = (0..49).map(|i| f32::from(u8::from(i % 8 == 0))).collect();
        let stats = LayerStats { gram: Some(&gram), ..stats(&weight, 3, &[1.0; 7]) };
        for init in [Init::Magnitude, Init::Wanda, Init::SparseGpt] {
            for count in 0..=21 {
                let found = init.start(&stats, ALL, Amount::Exactly(count)).unwrap();
                assert_eq!(found.mask.kept(), 21 - count, "{init}");
            }
            assert!(init.start(&stats, ALL, Amount::Exactly(22)).is_err());
        }
    }

    #[test]
    fn tiles_keep_their_highest() {
        let weight = [1.0, 2.0, -4.0, -3.0, 8.0, -7.0, 6.0, 5.0];
        let stats = stats(&weight, 1, &[100.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(kept(Init::Magnitude, &stats, TWO_OF_FOUR, 0.1), [0, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(kept(Init::Wanda, &stats, TWO_OF_FOUR, 0.9), [1, 0, 1, 0, 0, 1, 1, 0]);
    }

    #[test]
    fn equal_scores_have_an_order() {
        let stats = stats(&[1.0, -1.0, 1.0, 1.0], 1, &[1.0; 4]);
        assert_eq!(kept(Init::Magnitude, &stats, ALL, 0.75), [1, 0, 0, 0]);
        assert_eq!(kept(Init::Wanda, &stats, ALL, 0.75), [0, 0, 0, 1]);
        for init in [Init::Magnitude, Init::Wanda] {
            assert_eq!(kept(init, &stats, TWO_OF_FOUR, 0.75), [0, 0, 1, 1]);
        }
    }

    #[test]
    fn none_keeps_the_zeros() {
        let mut weight = [0.0, 1.0, -0.0, 1e-45, 0.0, 0.0, 0.0, -2.0];
        let after = [0, 1, 0, 1, 0, 0, 0, 1];
        assert_eq!(kept(Init::None, &stats(&weight, 2, &[]), ALL, 0.5), after);
        assert_eq!(kept(Init::None, &stats(&weight, 2, &[]), TWO_OF_FOUR, 0.5), after);
        weight[2] = 1.0;
        let error = Init::None.start(&stats(&weight, 2, &[]), TWO_OF_FOUR, 0.5).expect_err("three");
        assert!(matches!(error, Error::Overfull { row: 0, column: 0, kept: 3, .. }), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let fine = stats(&[1.0; 6], 2, &[1.0; 3]);
        let error = |init: Init, stats: &LayerStats<'_>, pattern, ratio| {
            init.start(stats, pattern, ratio).expect_err("an error").to_string()
        };
        for init in RULES {
            for ratio in [-0.1, 1.1, f64::NAN] {
                assert_eq!(
                    error(init, &fine, ALL, ratio),
                    format!("the sparsity ratio is {ratio}, not within 0 and 1")
                );
            }
            let nan = stats(&[1.0, 1.0, 1.0, 1.0, f32::NAN, 1.0], 2, &[1.0; 3]);
            assert_eq!(
                error(init, &nan, ALL, 0.5),
                "`w`: the score at row 1, column 1 is not a number"
            );
            assert_eq!(
                error(init, &fine, TWO_OF_FOUR, 0.5),
                "`w`: its 3 columns are not whole tiles of the pattern 2:4"
            );
            let short = LayerStats { weight: &[1.0; 5], ..fine };
            assert_eq!(error(init, &short, ALL, 0.5), "`w`: 5 weights, but the matrix needs 6");
        }
        let without = LayerStats { input_square: None, ..fine };
        assert_eq!(
            error(Init::Wanda, &without, ALL, 0.5),
            "`w`: the initial mask needs `input_square`, which was not computed"
        );
        let short = LayerStats { input_square: Some(&[1.0]), ..fine };
        assert_eq!(
            error(Init::Wanda, &short, ALL, 0.5),
            "`w`: 1 mean squared input norms, but the matrix needs 3"
        );
    }

    #[test]
    fn initialisers_are_named_as_they_are_read() {
        for init in Init::ALL {
            let json = serde_json::to_string(&init).expect("a string");
            assert_eq!(json, format!("\"{init}\""));
            assert_eq!(serde_json::from_str::<Init>(&json).expect("an initialiser"), init);
        }
    }

    #[test]
    fn an_empty_matrix_has_an_empty_mask() {
        let stats = stats(&[], 1, &[]);
        for init in RULES {
            assert_eq!(kept(init, &stats, ALL, 0.5), [0; 0]);
        }
    }
}
