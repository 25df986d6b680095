//! A run on several devices, one for each rank, foreseen from a recipe and the model's configuration
//! alone.

use super::{
    Error, expected,
    forecast::{products, searches},
    plan_of,
};
use crate::{
    calibration::Extent,
    checkpoint::{readable_config, weight_dtype},
    dtype::Dtype,
    estimate::{Estimate, OfFirst, estimate},
    family::{self, Decoder},
    plan::Plan,
    ranks::{Sent, Split},
    recipe::Loaded,
};

/// What devices and what connects them do in a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// Floating-point operations of matrix products of a device.
    pub(crate) device: f64,
    /// Those of a device's part of the host's cores.
    pub(crate) host: f64,
    /// Bytes that a rank sends to others.
    pub(crate) link: f64,
    /// Bytes of weights that a rank reads.
    pub(crate) disk: f64,
}

/// Seconds of a run, of which none overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Seconds {
    /// Passes over the calibration samples, of which each rank has some.
    pub(crate) passes: f64,
    /// Measurements on texts, of which each rank has some.
    pub(crate) measuring: f64,
    /// Searches for swaps; ranks share the rows of a matrix, if the stage's scope is one.
    pub(crate) search: f64,
    /// Masks and values, of which ranks share the matrices or their rows, where they can.
    pub(crate) masks: f64,
    /// The exchange of sums.
    pub(crate) exchange: f64,
    /// Reading the weights on each rank, and writing them on the first.
    pub(crate) disk: f64,
}

impl Seconds {
    /// All of them.
    pub(crate) fn sum(&self) -> f64 {
        let Self { passes, measuring, search, masks, exchange, disk } = self;
        passes + measuring + search + masks + exchange + disk
    }
}

/// A run on some ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OnRanks {
    /// The shares of the calibration samples.
    pub(crate) split: Split,
    /// The estimated cost.
    pub(crate) takes: Estimate,
    /// The time.
    pub(crate) seconds: Seconds,
}

impl OnRanks {
    /// Bytes of memory of a rank.
    pub(crate) fn memory(&self) -> f64 {
        self.takes.memory + self.takes.waiting
    }

    /// Bytes that ranks send.
    pub(crate) fn sent(&self) -> Sent {
        self.takes.sent
    }
}

/// A recipe's run on a model of which only the configuration is known.
pub(crate) struct Outlook<'a> {
    loaded: &'a Loaded,
    pub(crate) decoder: Decoder,
    pub(crate) plan: Plan,
    calibration: Extent,
    /// The lengths of the segments that are measured.
    segments: Vec<usize>,
    /// Bytes of the weights, and their format.
    pub(crate) bytes: f64,
    dtype: Dtype,
    /// Texts and tasks of which the configuration does not tell what they take.
    pub(crate) unknown: Vec<String>,
}

impl<'a> Outlook<'a> {
    /// The run of a recipe on the model whose `config.json` is in `model.path`.
    pub(crate) fn new(loaded: &'a Loaded) -> Result<Self, Error> {
        let recipe = &loaded.recipe;
        let dir = recipe.model.dense.as_deref().unwrap_or(&recipe.model.path);
        let config = readable_config(dir)?;
        let decoder = family::decoder(&config).map_err(crate::model::Error::from)?;
        let plan = plan_of(loaded, &decoder, decoder.tensors().map(|(name, _)| name), &config)?;
        let calibration = match recipe.calibrates() {
            true => {
                let of = &recipe.calibration;
                let length = decoder.sequence(of.sequence_length);
                Extent::of_equal(of.samples, of.held_out, length)
            }
            false => Extent::default(),
        };
        let (mut segments, mut unknown) = (Vec::new(), Vec::new());
        for text in &recipe.evaluate.perplexity {
            match text.segments.or(recipe.evaluate.segments) {
                Some(count) => {
                    let each = decoder.sequence(recipe.evaluate.sequence_length);
                    segments.extend(std::iter::repeat_n(each, count));
                }
                None => unknown.push(text.short()),
            }
        }
        unknown.extend(recipe.evaluate.tasks.keys().cloned());
        let numbers = decoder.tensors().map(|(_, shape)| shape.iter().product::<usize>() as f64);
        let dtype = weight_dtype(&config);
        let bytes = numbers.sum::<f64>() * dtype.size() as f64;
        Ok(Self { loaded, plan, calibration, segments, bytes, dtype, unknown, decoder })
    }

    /// The run on some ranks.
    pub(crate) fn on(&self, ranks: usize, rates: Rates) -> Result<OnRanks, Error> {
        let Self { loaded, decoder, plan, bytes, .. } = self;
        let recipe = &loaded.recipe;
        let segments = self.segments.iter().copied();
        let run = expected(loaded, decoder, segments, self.calibration, (ranks, self.dtype))?;
        let split = run.pruning.tokens().split();
        let takes = estimate(decoder, plan, &run);
        let [search, ordering] = searches(recipe, decoder, plan);
        let by_rows =
            recipe.refine.iter().all(|stage| stage.searches() == 0 || stage.shares().is_some());
        let search = if by_rows { search / ranks as f64 } else { search };
        let OfFirst { passes, solving, choosing, evaluation } = takes.of_first;
        let of_products = rates.device * products(recipe.executor.device);
        let seconds = Seconds {
            passes: passes / of_products,
            measuring: evaluation / of_products,
            search: search / rates.host,
            masks: (solving + choosing + ordering) / rates.host,
            exchange: takes.sent.first / rates.link,
            disk: (takes.sweeps + 1.0) * bytes / rates.disk,
        };
        Ok(OnRanks { split, takes, seconds })
    }
}
