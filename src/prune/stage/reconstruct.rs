//! Reconstruction as a stage: new values for the kept weights.

use std::{borrow::Cow, iter::zip};

use barber_metric::{LayerStats, Needs};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::{
    Described, Error, Event, Outcome, Run, Shares, Stage, Wrong,
    swap::{gram, of_rows, shift, wrong_shrinkage},
    wrong_step_size,
};
use crate::{
    choice::word,
    executor::{Pass, Probe, Targets, ops::Ops},
    mask::{self, Mask, OutputError},
    prune::{Tally, group::GroupState},
};

/// A reconstruction: the method that computes the new values, and its settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Keys", into = "Keys")]
pub enum Reconstruct {
    /// The values that minimise the error of each matrix' output.
    Fit {
        /// Whether the equations of each row are solved in closed form, by a factor of its own, and
        /// not all rows together by conjugate gradients.
        exact: bool,
        /// Penalty on changes of the weights, as a fraction of the mean squared input.
        damping: f64,
        /// Shrinkage of the Gram matrix towards its diagonal, from 0 to 1.
        shrinkage: f64,
    },
    /// Steps down the gradient of the group's output error (arXiv 2510.14444).
    Gradient {
        /// Number of passes over the calibration samples.
        passes: usize,
        /// Step size, as a fraction of the root mean square of the matrix's weights.
        rate: f64,
    },
}

impl Default for Reconstruct {
    fn default() -> Self {
        Keys::default().into()
    }
}

/// The keys of a recipe.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// The method: the least output error of each matrix, by `conjugate-gradient` on all its rows or
    /// by `least-squares` in closed form, row by row; or steps down the `gradient` of the group's
    /// output error (arXiv 2510.14444).
    #[serde(deserialize_with = "word")]
    method: Method,
    /// Number of passes over the calibration samples, for the method `gradient`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("default" = 8))]
    passes: Option<usize>,
    /// Step size, as a fraction of the root mean square of the matrix's weights, for the method
    /// `gradient`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0, "default" = 0.002))]
    rate: Option<f64>,
    /// Penalty on changes of the weights, as a fraction of the mean squared input, for the methods
    /// `conjugate-gradient` and `least-squares`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("default" = 0.01))]
    damping: Option<f64>,
    /// Shrinkage of the inputs' correlations towards zero, from 0 to 1. With few samples, much of a
    /// measured correlation is chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1), extend("default" = 0.2))]
    shrinkage: Option<f64>,
}

/// The method of a reconstruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Method {
    /// The least output error of each matrix, all rows together.
    #[default]
    ConjugateGradient,
    /// The least output error of each matrix, in closed form.
    LeastSquares,
    /// Steps down the gradient of the output error.
    Gradient,
}

impl From<Keys> for Reconstruct {
    fn from(Keys { method, passes, rate, damping, shrinkage }: Keys) -> Self {
        match method {
            Method::ConjugateGradient | Method::LeastSquares => Self::Fit {
                exact: method == Method::LeastSquares,
                damping: damping.unwrap_or(0.01),
                shrinkage: shrinkage.unwrap_or(0.2),
            },
            Method::Gradient => {
                Self::Gradient { passes: passes.unwrap_or(8), rate: rate.unwrap_or(0.002) }
            }
        }
    }
}

impl From<Reconstruct> for Keys {
    fn from(reconstruct: Reconstruct) -> Self {
        match reconstruct {
            Reconstruct::Fit { exact, damping, shrinkage } => Self {
                method: if exact { Method::LeastSquares } else { Method::ConjugateGradient },
                damping: Some(damping),
                shrinkage: Some(shrinkage),
                ..Self::default()
            },
            Reconstruct::Gradient { passes, rate } => Self {
                method: Method::Gradient,
                passes: Some(passes),
                rate: Some(rate),
                ..Self::default()
            },
        }
    }
}

impl JsonSchema for Reconstruct {
    fn schema_name() -> Cow<'static, str> {
        "Reconstruct".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Keys::json_schema(generator)
    }
}

impl Stage for Reconstruct {
    fn check(&self, given: &[&str]) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        let others: [&'static str; 2] = match *self {
            Self::Fit { damping, shrinkage, .. } => {
                wrong.extend(wrong_shrinkage(shrinkage));
                if !(damping.is_finite() && damping >= 0.0) {
                    let why = format!("must be at least 0, got {damping}");
                    wrong.push(Wrong {
                        key: "damping",
                        why,
                        help: "0.01 is usual, 0 turns it off",
                    });
                }
                ["passes", "rate"]
            }
            Self::Gradient { rate, .. } => {
                wrong.extend(wrong_step_size("rate", rate, "0.002 is usual"));
                ["damping", "shrinkage"]
            }
        };
        wrong.extend(others.into_iter().filter(|key| given.contains(key)).map(|key| Wrong {
            key,
            why: "is not a key of this method".into(),
            help: "leave it out, or change `method`",
        }));
        wrong
    }

    fn describe(&self, _: &Described<'_>) -> String {
        let method = match self {
            Self::Fit { exact: true, .. } => "least squares",
            Self::Fit { exact: false, .. } => "conjugate gradients",
            Self::Gradient { .. } => "gradient",
        };
        format!("reconstruct by {method}: kept weights change")
    }

    fn takes_structures(&self) -> bool {
        true
    }

    fn needs_gram(&self) -> bool {
        true
    }

    fn shares(&self) -> Option<Shares> {
        // In closed form, rows with the same mask are solved together.
        matches!(self, Self::Fit { exact: false, .. }).then_some(Shares::Rows(32.0))
    }

    fn count(&self, tally: &mut Tally<'_>) {
        tally.error();
        match *self {
            Self::Fit { .. } => tally.grams(),
            Self::Gradient { passes, .. } => tally.gradients(passes),
        }
        tally.forward();
        tally.measures_result();
    }
}

impl Run for Reconstruct {
    const HELP: &'static str = "new values for the kept weights, group by group";

    fn run<D: Ops>(
        &self,
        state: &mut GroupState<'_, D>,
        _: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, Error> {
        let before = state.error()?;
        let members = state.group.members.iter();
        let names: Vec<String> =
            members.map(|member| state.linear(*member).weight.clone()).collect();
        let saved = state.pruned.save(&names);
        match *self {
            Self::Fit { exact, damping, shrinkage } => {
                fit(state, exact, damping, shrinkage as f32)?;
            }
            Self::Gradient { passes, rate } => descend(state, passes, rate as f32)?,
        }
        Outcome::of_change(state, before, |pruned| pruned.put_back(saved))
    }
}

/// Stores the new values of a matrix.
fn change<D: Ops>(state: &mut GroupState<'_, D>, name: &str, values: &[f32]) -> Result<(), Error> {
    let (reader, refinement) = (state.model.reader, state.refinement);
    let (dtype, scratch) = (refinement.dtype, refinement.scratch);
    state.pruned.change(reader, name, values, dtype, scratch)?;
    Ok(())
}

/// The least output error, matrix by matrix.
fn fit<D: Ops>(
    state: &mut GroupState<'_, D>,
    exact: bool,
    damping: f64,
    shrinkage: f32,
) -> Result<(), Error> {
    state.each_matrix(|state, member, statistics| {
        let linear = state.linear(member).clone();
        let dense = state.model.values(&linear)?;
        let shift = shift(&dense, None, linear.dims, statistics, state.refinement.blend);
        let error = OutputError { gram: gram(statistics), shift: shift.as_deref(), shrinkage };
        if error.has_no_inputs(linear.dims.columns) {
            tracing::warn!(
                "`{}`: its inputs are zero in all calibration samples; its weights stay as they \
                 are",
                linear.weight
            );
            return Ok(());
        }
        let (name, dims, mask) = (linear.weight.as_str(), linear.dims, state.mask(member));
        let values = if exact {
            mask::least_squares(name, &dense, &mask, error, damping)?
        } else {
            let stats = LayerStats { name, dims, weight: &dense, ..LayerStats::default() };
            let shape = (dims.rows, dims.columns);
            state.model.executor.ranks.numbers_of_rows(shape, mask::FITTED, |rows| {
                let (stats, mask, error) = of_rows(&stats, &mask, error, rows);
                mask::conjugate_gradient(name, stats.weight, &mask, error, damping)
            })?
        };
        change(state, &linear.weight, &values)
    })
}

/// Adam on all matrices of the group together, one batch of samples at a time.
fn descend<D: Ops>(state: &mut GroupState<'_, D>, passes: usize, rate: f32) -> Result<(), Error> {
    state.make_target()?;
    let group = state.group;
    let mut matrices = Vec::new();
    for member in &group.members {
        let linear = state.linear(*member);
        let (dense, mask) = (state.model.values(linear)?, state.mask(*member));
        // Weights that are zero in the checkpoint stay zero.
        let free = Mask::from_fn(linear.dims, |i| mask.get(i) && dense[i] != 0.0);
        matrices.push(Adam::new(state.values(linear)?, free, rate));
    }
    let stream = &state.streams.sparse;
    let (mut parts, wanted) = (state.sparse()?, state.group.linears());
    for run in (0..passes).flat_map(|_| stream.calibration_runs()) {
        let pass = Pass {
            runs: Some(run..run + 1),
            targets: Targets::Outputs(state.target()),
            probe: Some(Probe { members: &wanted, needs: Needs::NOTHING, gradient: true }),
            ..Pass::new(&parts, stream)
        };
        let found = state.run(pass)?;
        for (member, adam) in zip(&group.members, &mut matrices) {
            let place = state.place(*member);
            let gradient = found.statistics[place][member.linear].gradient.as_deref();
            adam.step(gradient.unwrap_or_default());
            let linear = state.linear(*member);
            parts[place].linears[member.linear] =
                state.model.weight(linear, adam.values.clone(), Some(&adam.mask), state.pruned)?;
        }
    }
    for (member, Adam { values, .. }) in zip(&group.members, matrices) {
        let name = state.linear(*member).weight.clone();
        change(state, &name, &values)?;
    }
    Ok(())
}

/// Adam (arXiv 1412.6980) on the weights of one matrix that may change.
struct Adam {
    values: Vec<f32>,
    /// The weights that may change; the others count as zero.
    mask: Mask,
    moments: Vec<[f32; 2]>,
    rate: f32,
    steps: i32,
}

impl Adam {
    const DECAY: [f32; 2] = [0.9, 0.99];

    fn new(values: Vec<f32>, mask: Mask, rate: f32) -> Self {
        let square: f64 = values.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
        let rate = rate * (square / values.len().max(1) as f64).sqrt() as f32;
        Self { moments: vec![[0.0; 2]; values.len()], values, mask, rate, steps: 0 }
    }

    fn step(&mut self, gradient: &[f32]) {
        self.steps += 1;
        let [first, second] = Self::DECAY;
        let [fix, fix_square] = Self::DECAY.map(|decay| 1.0 - decay.powi(self.steps));
        let weights = self.values.iter_mut().zip(&mut self.moments).zip(gradient).enumerate();
        for (i, ((w, [mean, square]), g)) in weights {
            *mean = first * *mean + (1.0 - first) * g;
            *square = second * *square + (1.0 - second) * g * g;
            if self.mask.get(i) {
                // Smaller gradients have squares below the smallest normal f32.
                let scale = (*square / fix_square).sqrt() + f32::MIN_POSITIVE.sqrt();
                *w -= self.rate * (*mean / fix) / scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;

    use super::*;

    #[test]
    fn steps_go_down_and_leave_pruned_weights() {
        let mask = Mask::from_bools(Dims { rows: 1, columns: 3 }, &[true, false, true]);
        let mut adam = Adam::new(vec![1.0, 1.0, 1.0], mask, 0.1);
        adam.step(&[2.0, 5.0, -3.0]);
        // The first step goes as far as the rate says.
        for (found, expected) in adam.values.iter().zip([0.9, 1.0, 1.1]) {
            assert!((found - expected).abs() < 1e-6, "{:?}", adam.values);
        }
        // A gradient whose square is nothing moves nothing far.
        let mask = Mask::kept_everywhere(Dims { rows: 1, columns: 2 });
        let mut tiny = Adam::new(vec![1.0, 1.0], mask, 0.1);
        tiny.step(&[1e-30, -1e-22]);
        assert!(tiny.values.iter().all(|w| (w - 1.0).abs() < 0.11), "{:?}", tiny.values);
        // A gradient of nothing moves nothing.
        adam.moments.fill([0.0; 2]);
        let values = adam.values.clone();
        adam.step(&[0.0; 3]);
        assert_eq!(adam.values, values);
    }
}
