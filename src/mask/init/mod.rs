//! Initial masks, from which the refinement starts: one file per initialiser, and a table of all.

mod alps;
mod lowest;
mod scores;
mod sparsegpt;
#[cfg(test)]
mod testing;
mod zeros;

use barber_metric::{Dims, LayerStats, Needs};

use super::{Error, Mask, Pattern, Scope, Tile};
use crate::choice::{Choice, Named, Table};
use lowest::{Ties, prune_lowest};
pub use scores::weight_norm;

/// Every initial mask.
static ALL: Table<InitialMask> = Table::new(&[
    &scores::MAGNITUDE,
    &scores::WANDA,
    &sparsegpt::SPARSEGPT,
    &alps::ALPS,
    &scores::METRIC,
    &zeros::NONE,
]);

/// Scores of a matrix's weights, row-major, from its statistics.
pub type Scores = fn(&LayerStats<'_>) -> Result<Vec<f32>, Error>;

/// An initialiser of masks.
pub struct InitialMask {
    /// The name in a recipe's `mask.init`.
    pub name: &'static str,
    /// Description of the weights that the initialiser prunes.
    pub prunes: &'static str,
    /// The statistics that the initialiser needs, in addition to those of the recipe's metrics.
    pub needs: Needs,
    /// The weights that compete: those of each row, or of the whole matrix.
    pub scope: Scope,
    /// Whether the recipe's metrics score the weights; the recipe may then set the scope.
    pub metrics: bool,
    /// Whether the mask is the zeros of a sparse checkpoint, whatever their number.
    pub zeros: bool,
    /// The scores of a matrix's weights, row-major, for an initialiser that prunes the lowest and has
    /// scores of its own.
    pub scores: Option<Scores>,
    /// What it takes to find the mask of a matrix, with its statistics.
    pub(crate) takes: Takes,
    /// Computes the mask of a matrix.
    run: fn(&Matrix<'_>) -> Result<Initial, Error>,
}

/// What it takes to find the mask of a matrix, with its statistics.
#[derive(Clone, Copy, Default)]
pub(crate) struct Takes {
    /// Floating-point operations, in multiples of rows · columns² and of columns³.
    pub(crate) operations: [f64; 2],
    /// 32-bit numbers in memory, in multiples of columns² and of the weights.
    pub(crate) numbers: [f64; 2],
}

/// Operations of matrix products that take as long as to choose whether to keep a weight. Masks by
/// magnitude take half of that on SmolLM2-135M, with the weights read and written; scores take more.
pub(crate) const CHOICE: f64 = 10_000.0;

impl Takes {
    /// Floating-point operations for a matrix of this shape.
    pub(crate) fn solving(self, dims: Dims) -> f64 {
        let ([of_rows, of_columns], columns) = (self.operations, dims.columns as f64);
        (of_rows * dims.rows as f64 + of_columns * columns) * columns * columns
    }

    /// Operations of matrix products that take as long as the mask of a matrix of this shape.
    pub(crate) fn work(self, dims: Dims) -> f64 {
        self.solving(dims) + CHOICE * dims.len() as f64
    }

    /// Too little to count.
    const LITTLE: Self = Self { operations: [0.0; 2], numbers: [0.0; 2] };
    /// A factorisation: its matrix and its result have 64 bits.
    const FACTOR: Self = Self { operations: [1.0, 1.0], numbers: [5.0, 3.0] };
}

/// The choice of an initial mask. The default is Wanda, which the paper starts from.
pub type Init = Choice<InitialMask>;

impl Default for Init {
    fn default() -> Self {
        Self(&scores::WANDA)
    }
}

impl Named for InitialMask {
    const SET: &str = "Init";

    fn table() -> &'static Table<Self> {
        &ALL
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn help(&self) -> &'static str {
        self.prunes
    }
}

impl InitialMask {
    /// Whether the initialiser has scores of weights, its own or those of the recipe's metrics.
    pub const fn is_scored(&self) -> bool {
        self.metrics || self.scores.is_some()
    }

    /// The initial mask of a matrix with `amount` weights pruned. A pattern with tiles ignores
    /// `amount` and keeps the highest scores of each tile. Among equal scores the first weights are
    /// pruned, like the stable sort of Wanda's authors; under unstructured magnitude the last, as
    /// the authors' code prunes all of them. For an initialiser with metrics, `metric` is the
    /// scores, row-major, and the scope; `None` for the initialiser's own scope.
    ///
    /// # Errors
    /// If a statistic is missing or does not fit the matrix, a score is NaN, the ratio is not
    /// within 0 and 1, the pattern does not divide the columns, the scope is neither row nor layer,
    /// the zeros do not follow the pattern (`none`), or the Hessian is not positive definite with
    /// any damping (`sparsegpt`, `alps`).
    pub fn choose(
        &self,
        stats: &LayerStats<'_>,
        pattern: Pattern,
        amount: impl Into<Amount>,
        metric: Option<(&[f32], Option<Scope>)>,
    ) -> Result<Initial, Error> {
        let &LayerStats { name, dims, weight, .. } = stats;
        let amount = amount.into();
        let ratio = amount.ratio(dims)?;
        Error::check_length(name, "weights", weight.len(), dims.len())?;
        let scope = metric.and_then(|(_, scope)| scope).unwrap_or(self.scope);
        let scores = metric.map(|(scores, _)| scores);
        (self.run)(&Matrix { stats, pattern, amount, ratio, scope, scores })
    }
}

/// A matrix that gets an initial mask.
struct Matrix<'a> {
    stats: &'a LayerStats<'a>,
    pattern: Pattern,
    amount: Amount,
    /// The amount as a fraction of the matrix.
    ratio: f64,
    /// The weights that compete.
    scope: Scope,
    /// The scores of the recipe's metrics.
    scores: Option<&'a [f32]>,
}

impl Matrix<'_> {
    /// The scores of the recipe's metrics.
    fn scores(&self) -> Result<&[f32], Error> {
        let missing = || Error::Missing { name: self.stats.name.into(), statistic: "scores" };
        self.scores.ok_or_else(missing)
    }

    /// Prunes the lowest scores of every row, of the whole matrix, or of each tile.
    fn lowest(&self, scores: &[f32], ties: Ties) -> Result<Initial, Error> {
        let &Self { stats: &LayerStats { name, dims, .. }, pattern, amount, scope, .. } = self;
        Error::check_length(name, "scores", scores.len(), dims.len())?;
        let pool = match scope {
            Scope::Row => dims.columns,
            Scope::Layer => dims.len(),
            Scope::Model | Scope::Group | Scope::Column => {
                return Err(Error::InitialScope { scope });
            }
        };
        Error::check_numbers(name, dims.columns, scores)?;
        Ok(Initial::of(match (pattern.tile_of(name, dims.columns)?, amount) {
            (Some(Tile { n, m }), _) => {
                prune_lowest(dims, scores, m, |_| m.saturating_sub(n), Ties::First)
            }
            (None, Amount::Ratio(ratio)) => {
                prune_lowest(dims, scores, pool, |_| floored(ratio, pool), ties)
            }
            (None, Amount::Exactly(count)) => {
                // The same number from each pool, and one more from the first pools.
                let pools = dims.len() / pool.max(1);
                let (each, more) = (count / pools.max(1), count % pools.max(1));
                prune_lowest(dims, scores, pool, |i| each + usize::from(i < more), ties)
            }
        }))
    }
}

/// The number of weights of a matrix to prune.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// A ratio r: exactly ⌊r·n⌋ of the n weights that compete, of a row or of a matrix.
    Ratio(f64),
    /// A number of weights of the matrix.
    Exactly(usize),
}

impl Amount {
    /// The amount as a fraction of the matrix.
    ///
    /// # Errors
    /// If the fraction is not within 0 and 1.
    fn ratio(self, dims: Dims) -> Result<f64, Error> {
        let ratio = match self {
            Self::Ratio(ratio) => ratio,
            Self::Exactly(count) => count as f64 / dims.len().max(1) as f64,
        };
        if (0.0..=1.0).contains(&ratio) { Ok(ratio) } else { Err(Error::Ratio { ratio }) }
    }
}

impl From<f64> for Amount {
    fn from(ratio: f64) -> Self {
        Self::Ratio(ratio)
    }
}

/// The initial mask of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Initial {
    /// The mask.
    pub mask: Mask,
    /// All weights, row-major, if the initialiser changed kept ones; pruned ones have dense values.
    pub values: Option<Vec<f32>>,
    /// The damping of the Hessian as a fraction of its mean diagonal, if the usual damping did not
    /// suffice.
    pub damping: Option<f64>,
}

impl Initial {
    /// A mask that changes no weight.
    fn of(mask: Mask) -> Self {
        Self { mask, values: None, damping: None }
    }
}

/// ⌊`ratio`·n⌋ for the decimal number that the user wrote: 0.29 of 100 is 29, though the nearest
/// binary number is below 0.29.
pub(crate) fn floored(ratio: f64, weights: usize) -> usize {
    (ratio * weights as f64 + 1e-6) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The initial masks whose scores are in the statistics.
    const RULES: [&str; 5] = ["magnitude", "wanda", "sparsegpt", "alps", "none"];
    const ALL: Pattern = Pattern::UNSTRUCTURED;
    const TWO_OF_FOUR: Pattern = Pattern::n_of_m(2, 4);

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

    fn start(
        init: &str,
        stats: &LayerStats<'_>,
        pattern: Pattern,
        amount: impl Into<Amount>,
    ) -> Result<Initial, Error> {
        Init::named(init).expect("an initial mask").choose(stats, pattern, amount, None)
    }

    fn kept(init: &str, stats: &LayerStats<'_>, pattern: Pattern, ratio: f64) -> Vec<u8> {
        let initial = start(init, stats, pattern, ratio).expect("a mask");
        initial.mask.to_bools().into_iter().map(u8::from).collect()
    }

    #[test]
    fn a_share_is_that_of_the_decimal_number() {
        for (ratio, weights, pruned) in
            [(0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.7, 64, 44)]
        {
            assert_eq!(floored(ratio, weights), pruned);
        }
    }

    #[test]
    fn magnitude_prunes_the_lowest_of_the_matrix() {
        let stats = stats(&[1.0, -2.0, -3.0, 4.0, 8.0, -7.0, 6.0, 5.0], 2, &[]);
        let kept = |ratio| kept("magnitude", &stats, ALL, ratio);
        assert_eq!(kept(0.0), [1; 8]);
        assert_eq!(kept(0.4), [0, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(kept(0.5), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(kept(1.0), [0; 8]);
    }

    #[test]
    fn wanda_prunes_the_lowest_of_each_row() {
        // Scores: 2 1 3 8, 8 7 1 2.
        let stats = stats(&[-1.0, 1.0, 1.5, 1.0, 4.0, 7.0, -0.5, 0.25], 2, &[4.0, 1.0, 4.0, 64.0]);
        let kept = |ratio| kept("wanda", &stats, ALL, ratio);
        assert_eq!(kept(0.5), [0, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(kept(0.49), [1, 0, 1, 1, 1, 1, 0, 1]);
    }

    #[test]
    fn scores_are_compared_in_rows_or_in_the_matrix() {
        let dims = Dims { rows: 2, columns: 4 };
        let scores = [5.0, 6.0, 7.0, 8.0, 4.0, 1.0, 3.0, 2.0];
        let stats = LayerStats { name: "w", dims, weight: &scores, ..LayerStats::default() };
        let metric = Init::named("metric").expect("an initial mask");
        let start = |scores: &[f32], scope, pattern| {
            metric.choose(&stats, pattern, 0.5, Some((scores, scope)))
        };
        let kept = |scope, pattern| {
            let initial = start(&scores, Some(scope), pattern);
            initial.map(|of| of.mask.to_bools().into_iter().map(u8::from).collect::<Vec<_>>())
        };
        assert_eq!(kept(Scope::Row, ALL), Ok(vec![0, 0, 1, 1, 1, 0, 1, 0]));
        assert_eq!(kept(Scope::Layer, ALL), Ok(vec![1, 1, 1, 1, 0, 0, 0, 0]));
        assert_eq!(kept(Scope::Layer, TWO_OF_FOUR), Ok(vec![0, 0, 1, 1, 1, 0, 1, 0]));
        for scope in [Scope::Model, Scope::Group, Scope::Column] {
            assert_eq!(kept(scope, ALL), Err(Error::InitialScope { scope }));
        }
        let few = start(&scores[1..], None, ALL);
        assert_eq!(few.unwrap_err().to_string(), "`w`: 7 scores, but the matrix needs 8");
        let nan = start(&[f32::NAN; 8], None, ALL);
        assert!(matches!(nan, Err(Error::NotANumber { row: 0, column: 0, .. })));
    }

    #[test]
    fn a_count_is_exact_whatever_the_pools() {
        let weight: Vec<f32> = (0..21).map(|i| i as f32 - 10.2).collect();
        let gram: Vec<f32> = (0..49).map(|i| f32::from(u8::from(i % 8 == 0))).collect();
        let stats = LayerStats { gram: Some(&gram), ..stats(&weight, 3, &[1.0; 7]) };
        for init in ["magnitude", "wanda", "sparsegpt", "alps"] {
            for count in 0..=21 {
                let found = start(init, &stats, ALL, Amount::Exactly(count)).unwrap();
                assert_eq!(found.mask.kept(), 21 - count, "{init}");
            }
            assert!(start(init, &stats, ALL, Amount::Exactly(22)).is_err());
        }
    }

    #[test]
    fn tiles_keep_their_highest() {
        let weight = [1.0, 2.0, -4.0, -3.0, 8.0, -7.0, 6.0, 5.0];
        let stats = stats(&weight, 1, &[100.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(kept("magnitude", &stats, TWO_OF_FOUR, 0.1), [0, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(kept("wanda", &stats, TWO_OF_FOUR, 0.9), [1, 0, 1, 0, 0, 1, 1, 0]);
    }

    #[test]
    fn equal_scores_have_an_order() {
        let stats = stats(&[1.0, -1.0, 1.0, 1.0], 1, &[1.0; 4]);
        assert_eq!(kept("magnitude", &stats, ALL, 0.75), [1, 0, 0, 0]);
        assert_eq!(kept("wanda", &stats, ALL, 0.75), [0, 0, 0, 1]);
        for init in ["magnitude", "wanda"] {
            assert_eq!(kept(init, &stats, TWO_OF_FOUR, 0.75), [0, 0, 1, 1]);
        }
    }

    #[test]
    fn none_keeps_the_zeros() {
        let mut weight = [0.0, 1.0, -0.0, 1e-45, 0.0, 0.0, 0.0, -2.0];
        let after = [0, 1, 0, 1, 0, 0, 0, 1];
        assert_eq!(kept("none", &stats(&weight, 2, &[]), ALL, 0.5), after);
        assert_eq!(kept("none", &stats(&weight, 2, &[]), TWO_OF_FOUR, 0.5), after);
        weight[2] = 1.0;
        let error = start("none", &stats(&weight, 2, &[]), TWO_OF_FOUR, 0.5).expect_err("three");
        assert!(matches!(error, Error::Overfull { row: 0, column: 0, kept: 3, .. }), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let fine = stats(&[1.0; 6], 2, &[1.0; 3]);
        let error = |init: &str, stats: &LayerStats<'_>, pattern, ratio: f64| {
            start(init, stats, pattern, ratio).expect_err("an error").to_string()
        };
        for init in RULES {
            for ratio in [-0.1, 1.1, f64::NAN] {
                assert_eq!(
                    error(init, &fine, ALL, ratio),
                    format!("the sparsity ratio must be from 0 to 1, got {ratio}")
                );
            }
            let nan = stats(&[1.0, 1.0, 1.0, 1.0, f32::NAN, 1.0], 2, &[1.0; 3]);
            assert_eq!(
                error(init, &nan, ALL, 0.5),
                "`w`: the score at row 1, column 1 is not a number"
            );
            assert_eq!(
                error(init, &fine, TWO_OF_FOUR, 0.5),
                "`w`: the pattern 2:4 does not divide its 3 columns"
            );
            let short = LayerStats { weight: &[1.0; 5], ..fine };
            assert_eq!(error(init, &short, ALL, 0.5), "`w`: 5 weights, but the matrix needs 6");
        }
        let without = LayerStats { input_square: None, ..fine };
        assert_eq!(
            error("wanda", &without, ALL, 0.5),
            "`w`: the initial mask needs `input_square`, which was not computed"
        );
        let short = LayerStats { input_square: Some(&[1.0]), ..fine };
        assert_eq!(
            error("wanda", &short, ALL, 0.5),
            "`w`: 1 mean squared input norms, but the matrix needs 3"
        );
    }

    #[test]
    fn initial_masks_are_named_as_they_are_read() {
        for init in Init::all() {
            let json = serde_json::to_string(&init).expect("a string");
            assert_eq!(json, format!("\"{init}\""));
            assert_eq!(serde_json::from_str::<Init>(&json).expect("an initial mask"), init);
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
