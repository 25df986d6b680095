//! Outputs of the linear layers of a part, cached so that later passes need not compute them again,
//! or only correct them where weights have changed.

use std::rc::Rc;

use super::{
    CacheShape, Error, Executor, PartShape, PartWeights, Store, Stream,
    forward::{Hook, Input},
    ops::{Matrix, Ops},
    stream::Run,
};
use crate::family::Feed;

/// Maximum bytes of cached outputs of a part, with the hidden states of this number of tokens.
pub(super) fn recorded_limit(recorded: Recorded, part: &PartShape, tokens: usize) -> usize {
    match recorded {
        // Filling all memory would take several times what a small model's samples need.
        Recorded::All => {
            let channels = part.output().map_or(0, |of| of.outputs);
            (2 * tokens * channels * size_of::<f32>()).max(128 << 20)
        }
        // The result must not depend on the memory that a machine has.
        Recorded::First => 256 << 20,
    }
}

/// The widths of the outputs that are recorded, and the fraction of the tokens that have each.
pub(super) fn recorded_widths(
    recorded: Recorded,
    part: &PartShape,
) -> impl Iterator<Item = (usize, f64)> + use<'_> {
    let wanted = part.linears.iter().filter(move |of| recorded.has(of.feed));
    let outputs = wanted.map(|of| (of.outputs, of.share));
    let attention = part.output().map(|of| (of.inputs, 1.0));
    let has_attention = recorded == Recorded::All && part.attention.is_some();
    outputs.chain(attention.filter(|_| has_attention))
}

/// Number of recorded outputs of a token, on average.
pub(super) fn recorded_numbers(recorded: Recorded, part: &PartShape) -> f64 {
    recorded_widths(recorded, part).map(|(width, share)| share * width as f64).sum()
}

/// The recorded outputs of the linear layers of a part, for each run of samples.
#[derive(Debug)]
pub struct ActivationCache<D: Ops> {
    recorded: Recorded,
    /// The outputs of each linear layer.
    outputs: Vec<Store<D>>,
    /// The outputs of attention, before the output projection.
    attention: Store<D>,
}

/// For each linear layer, its current weights minus those with which its outputs were recorded;
/// `None` if so many differ that computing the outputs again is faster.
pub type Changes<D> = [Option<<D as super::ops::SparseProduct>::Entries>];

/// What a pass through one part does with an [`ActivationCache`].
#[derive(Default)]
pub enum Caching<'a, D: Ops> {
    /// Ignores the cache.
    #[default]
    Off,
    /// Records outputs: [`Found::cache`](super::Found::cache).
    Record(Recorded),
    /// Uses recorded outputs of the same weights.
    Use(&'a ActivationCache<D>),
    /// Uses recorded outputs of other weights for the same inputs, corrected by the changes;
    /// removes them from the cache.
    Correct(&'a mut ActivationCache<D>, &'a Changes<D>),
}

/// Which outputs are recorded, for as many of the first runs as fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Outputs of all linear layers and of attention.
    All,
    /// Outputs of the layers that read the part's input.
    First,
}

impl Recorded {
    /// Whether the outputs of projections with this feed are recorded.
    fn has(self, feed: Feed) -> bool {
        self == Self::All || feed == Feed::Hidden
    }
}

impl<D: Ops> Caching<'_, D> {
    /// The setting without the outputs, for counting costs.
    pub(super) fn shape(&self) -> CacheShape {
        match self {
            Self::Off => CacheShape::Off,
            Self::Record(recorded) => CacheShape::Record(*recorded),
            Self::Use(cache) => CacheShape::Use(cache.recorded),
            Self::Correct(cache, _) => CacheShape::Correct(cache.recorded),
        }
    }

    /// The recorder of a pass through a part; `None` if the pass does not record.
    pub(super) fn recorder(
        &self,
        executor: &Executor<D>,
        part: &PartWeights<D>,
        stream: &Stream<D>,
    ) -> Option<Recorder<D>> {
        let Self::Record(recorded) = self else { return None };
        Some(Recorder::new(*recorded, executor, part, stream))
    }

    /// The cached outputs for a run.
    pub(super) fn known(&mut self, run: usize, device: &D) -> Result<KnownOutputs<'_, D>, Error> {
        let of = match self {
            Self::Off | Self::Record(_) => return Ok(KnownOutputs::default()),
            Self::Use(cache) => {
                let outputs = cache.outputs.iter().map(|store| store.find(run, device));
                let attention = cache.attention.find(run, device)?;
                KnownOutputs {
                    outputs: outputs.collect::<Result<_, _>>()?,
                    attention,
                    changes: None,
                }
            }
            Self::Correct(cache, changes) => {
                let outputs = cache.outputs.iter_mut().map(|store| store.take(run, device));
                let outputs = outputs.collect::<Result<_, _>>()?;
                KnownOutputs { outputs, attention: None, changes: Some(changes) }
            }
        };
        Ok(of)
    }
}

/// The cached outputs of the layers of a part for a run.
pub(super) struct KnownOutputs<'a, D: Ops> {
    outputs: Vec<Option<Matrix<D>>>,
    attention: Option<Matrix<D>>,
    changes: Option<&'a Changes<D>>,
}

impl<D: Ops> Default for KnownOutputs<'_, D> {
    /// No cached outputs.
    fn default() -> Self {
        Self { outputs: Vec::new(), attention: None, changes: None }
    }
}

impl<D: Ops> KnownOutputs<'_, D> {
    /// The cached output of a layer for its input `x`; `None` if it must be computed.
    pub(super) fn output(
        &mut self,
        layer: usize,
        x: &Matrix<D>,
    ) -> Result<Option<Matrix<D>>, D::Err> {
        let Some(y) = self.outputs.get_mut(layer).and_then(Option::take) else { return Ok(None) };
        match self.changes {
            None => Ok(Some(y)),
            Some(changes) => match changes.get(layer).and_then(Option::as_ref) {
                None => Ok(None),
                Some(entries) => D::add_sparse_product(y, x, entries).map(Some),
            },
        }
    }

    /// The cached output of attention, which then is computed only for a backward pass.
    pub(super) fn attention(&mut self) -> Option<Matrix<D>> {
        self.attention.take()
    }
}

/// Fills an [`ActivationCache`] in a pass.
pub(super) struct Recorder<D: Ops> {
    pub(super) cache: ActivationCache<D>,
    /// Whether the outputs of a projection are recorded.
    wanted: Rc<[bool]>,
    attention: bool,
    /// Number of runs that are recorded, from the first.
    runs: usize,
}

impl<D: Ops> Recorder<D> {
    fn new(
        recorded: Recorded,
        executor: &Executor<D>,
        part: &PartWeights<D>,
        stream: &Stream<D>,
    ) -> Self {
        let (storage, shape) = (&executor.storage, PartShape::from(part));
        let width = recorded_numbers(recorded, &shape);
        let all = stream.runs.iter().map(Run::tokens).sum();
        let most = recorded_limit(recorded, &shape, all);
        let is_all = recorded == Recorded::All;
        let fits = |numbers: usize| {
            numbers * size_of::<f32>() <= most && (!is_all || storage.fits(numbers))
        };
        let mut tokens = 0;
        let runs = stream.runs.iter().take_while(|run| {
            tokens += run.tokens();
            fits((tokens as f64 * width) as usize)
        });
        let (runs, count) = (runs.count(), stream.runs.len());
        let store = || storage.exact().store(count);
        let outputs = part.linears.iter().map(|_| store()).collect();
        let cache = ActivationCache { recorded, outputs, attention: store() };
        let wanted = part.projections.iter().map(|of| recorded.has(of.feed())).collect();
        Self { cache, wanted, attention: is_all && shape.attention.is_some(), runs }
    }

    /// The recording of a run; `None` if the run is not recorded.
    pub(super) fn recording(&self, run: usize) -> Option<Recording<D>> {
        let wanted = self.wanted.clone();
        let (wants_attention, outputs) = (self.attention, Vec::new());
        let new = Recording { wanted, wants_attention, outputs, attention: None };
        (run < self.runs).then_some(new)
    }

    /// Stores the outputs of a run.
    pub(super) fn add(&mut self, run: usize, recording: Recording<D>) -> Result<(), Error> {
        let ActivationCache { outputs, attention, .. } = &mut self.cache;
        for (projection, y) in recording.outputs {
            outputs[projection].put(run, y)?;
        }
        recording.attention.map_or(Ok(()), |o| attention.put(run, o))
    }
}

/// The outputs of a part's projections and of attention in one run.
pub(super) struct Recording<D: Ops> {
    wanted: Rc<[bool]>,
    wants_attention: bool,
    outputs: Vec<(usize, Matrix<D>)>,
    attention: Option<Matrix<D>>,
}

impl<D: Ops> Hook<D> for Recording<D> {
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        if self.wants_attention && input.feed == Feed::Inner {
            self.attention = Some(input.x.clone());
        }
        Ok(())
    }

    fn output(&mut self, projection: usize, y: &Matrix<D>) {
        if self.wanted[projection] {
            self.outputs.push((projection, y.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;
    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{
        executor::{
            Found, Inner, Outputs, Pass, Positions, Targets,
            ops::{SparseProduct, Weight, testing::noise},
        },
        family::{Activation, Part, Projection, Role},
    };

    #[test]
    fn corrected_outputs_are_those_of_the_changed_weights() {
        let (device, tokens, width, inner) = (Cpu::default(), 70, 6, 9);
        let mut values =
            [noise(inner * width, 1), noise(inner * width, 2), noise(inner * width, 3)];
        let projection = |role| {
            let dims = match role {
                Role::Down => Dims { rows: width, columns: inner },
                _ => Dims { rows: inner, columns: width },
            };
            let (name, weight) = (String::new(), String::new());
            Projection { name, role, expert: None, weight, bias: None, dims }
        };
        let part = |values: &[Vec<f32>; 3]| {
            let dims = [(inner, width), (inner, width), (width, inner)];
            let weights = values.iter().zip(dims);
            PartWeights {
                part: Part::Mlp,
                projections: [Role::Gate, Role::Up, Role::Down].map(projection).into(),
                input_norm: None,
                linears: weights
                    .map(|(w, dims)| Weight::new(&device, w, dims, None).unwrap())
                    .collect(),
                inner: Inner::Gated(Activation::Silu.into()),
                router: None,
                output_norm: None,
                residual_norm: None,
                parallel: false,
            }
        };
        let executor = Executor::from(device.clone());
        let positions = Positions { length: tokens, first: 0, masks: None, rotations: Vec::new() };
        let states = noise(tokens * width, 4);
        let stream = || {
            let samples = [positions.clone()].into_iter();
            executor.stream(samples, 0, |_| Ok::<_, Error>(states.clone())).unwrap()
        };
        let of = |stream: &Stream<Cpu>| stream.states.get(0, &device).unwrap().to_vec();

        let before = [part(&values)];
        let at_first = stream();
        let recorded = Pass {
            outputs: Outputs::Kept,
            cache: Caching::Record(Recorded::First),
            ..Pass::new(&before, &at_first)
        };
        let Found { outputs, cache, .. } = executor.run(recorded).unwrap();
        let (targets, mut cache) = (outputs, cache.unwrap());
        values[0][7] += 0.5;
        values[2][3] += 0.5;
        let after = [part(&values)];
        let entries = |entries| Some(device.entries(entries, (inner, width)).unwrap());
        // The second layer's weights did not change; the third's outputs were not recorded.
        let changes = [entries(vec![(1, 1, 0.5)]), entries(vec![]), None];
        let (mut corrected, mut again) = (stream(), stream());
        let advance = |stream, cache| {
            let targets = Targets::Outputs(&targets);
            let pass = Pass { targets, cache, ..Pass::advancing(&after, stream) };
            executor.run(pass).unwrap().loss.calibration
        };
        let found = advance(&mut corrected, Caching::Correct(&mut cache, &changes));
        let expected = advance(&mut again, Caching::Off);
        assert!(expected > 0.0 && (found / expected - 1.0).abs() < 1e-3, "{found} {expected}");
        for (found, expected) in of(&corrected).iter().zip(of(&again)) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        assert!(of(&corrected) != states);
        assert!(cache.outputs.iter().all(|store| store.find(0, &device).unwrap().is_none()));
    }
}
