//! Forecasts the memory, work and time of a run.

use std::time::Duration;

use dfdx::tensor::Cpu;

use super::{Error, ScheduledPhase, Tests, expected, on_device, schedule::schedule};
use crate::{
    calibration::Extent,
    dtype::Dtype,
    estimate::{Estimate, estimate},
    executor::{ops::Ops, rate},
    family::Decoder,
    model::Model,
    permutation::Site,
    plan::Plan,
    precision::Precision,
    ranks::Ranks,
    recipe::{Device, Executor, Loaded, Recipe},
};

/// The forecast of a run.
pub(crate) struct Forecast {
    /// Memory and operations of the run.
    pub(crate) takes: Estimate,
    /// The phases of the run.
    pub(crate) phases: Vec<ScheduledPhase>,
    device: Device,
    precision: Precision,
    /// [`searches`].
    search: [f64; 2],
}

/// Operations of matrix products that take as long as the searches for swaps, and as that for the order
/// of channels, which run on the CPU.
pub(super) fn searches(recipe: &Recipe, decoder: &Decoder, plan: &Plan) -> [f64; 2] {
    let limit: usize = recipe.refine.iter().map(|stage| stage.searches()).sum();
    let layers = 0..plan.layers.len();
    let dims = layers.flat_map(|layer| plan.matrices(decoder, layer)).map(|(_, of)| of.dims);
    // A row has no more pairs than half of its weights.
    let swaps: f64 = dims.map(|dims| dims.len() as f64 * limit.min(dims.columns / 2) as f64).sum();
    let ordering = if recipe.sparsity.permute { Site::search(plan, decoder) } else { 0.0 };
    [SEARCH * swaps, COMPARISON * ordering]
}

/// Operations of matrix products that take as long as one of these comparisons.
const COMPARISON: f64 = 4.0;

/// Operations of matrix products that take as long as the search for a swap, per weight of its row.
/// On SmolLM2-135M and 32 × 256 tokens, the search takes about as long as all products.
const SEARCH: f64 = 1000.0;

/// The fraction of a run's time without such searches that its matrix products take. On
/// SmolLM2-135M and on a layer of LLaMA-7B's shape it was between 82% and 94%; a GPU waits for the
/// CPU to choose masks.
pub(super) const fn products(device: Device) -> f64 {
    match device {
        Device::Cpu => 0.85,
        Device::Cuda(_) => 0.6,
    }
}

impl Forecast {
    /// The forecast of a recipe's run on a model.
    pub(crate) fn new<D: Ops>(
        loaded: &Loaded,
        model: &Model<'_, D>,
        plan: &Plan,
        tests: &Tests,
        calibration: Extent,
    ) -> Result<Self, Error> {
        let (recipe, decoder) = (&loaded.recipe, &model.decoder);
        let segments = tests.texts.iter().flat_map(|(_, segments)| segments).map(Vec::len);
        // One rank sends no weights: their format does not count.
        let alone = (1, Dtype::F32);
        let takes =
            estimate(decoder, plan, &expected(loaded, decoder, segments, calibration, alone)?);
        let phases = schedule(recipe, decoder, tests, &takes);
        let search = searches(recipe, decoder, plan);
        let Executor { device, precision, .. } = recipe.executor;
        Ok(Self { takes, phases, device, precision, search })
    }

    /// Estimated time of the run on its device, from the rate of matrix products. Measuring that
    /// rate takes about a second, and at most a small part of the run's time. Zero without
    /// products.
    pub(crate) fn time<D: Ops>(&self, device: &D, decoder: &Decoder) -> Result<Duration, Error> {
        let (work, search) =
            (self.phases.iter().map(|phase| phase.work).sum(), self.search.iter().sum());
        let on_device = rate(device, decoder, work).map_err(crate::model::Error::from)?;
        let on_host = match self.device {
            Device::Cpu => on_device,
            Device::Cuda(_) if search == 0.0 => on_device,
            Device::Cuda(_) => {
                rate(&Cpu::default(), decoder, search).map_err(crate::model::Error::from)?
            }
        };
        let seconds = work / on_device / products(self.device) + search / on_host;
        Ok(Duration::from_secs_f64(seconds))
    }

    /// [`Forecast::time`] on the recipe's device, which it opens.
    pub(crate) fn time_here(&self, decoder: &Decoder) -> Result<Duration, Error> {
        on_device!(self.device, self.precision, Ranks::ONE, timed(self, decoder))
    }
}

fn timed<D: Ops>(
    device: D,
    _memory: u64,
    forecast: &Forecast,
    decoder: &Decoder,
) -> Result<Duration, Error> {
    forecast.time(&device, decoder)
}
