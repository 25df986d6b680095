//! What the layers of a part gave: noted, so that it is not computed again, or only as far as
//! weights have changed since.

use std::ops::Range;

use super::{
    Error, Executor, PartWeights, Storage, Store, Stream,
    forward::Watch,
    ops::{Matrix, Ops},
};
use crate::family::Part;

/// Bytes of what a sparse part's layers gave that wait at most, wherever they wait: the result must
/// not depend on the memory that a machine has.
pub(crate) const NOTED: usize = 256 << 20;

/// Bytes of what a dense part's layers gave that wait at most, beside hidden states of so many. With
/// all that would fit, a small model's memory would be several times what its samples need.
pub(crate) fn kept(states: usize) -> usize {
    (2 * states).max(128 << 20)
}

/// What the layers of a part gave for each run of samples, as far as it was noted.
#[derive(Debug)]
pub struct Known<D: Ops> {
    /// One per linear layer.
    outputs: Vec<Store<D>>,
    attention: Store<D>,
}

/// An entry per linear layer: what its weights are now more than when its outputs were noted; `None`
/// where that is so much that the outputs are better computed again.
pub type Changes<D> = [Option<<D as super::ops::SparseProduct>::Entries>];

impl<D: Ops> Known<D> {
    /// Nothing yet, of a part's layers and so many runs.
    fn nothing(storage: &Storage, part: &PartWeights<D>, runs: usize) -> Self {
        let store = || storage.exact().store(runs);
        Self { outputs: part.linears.iter().map(|_| store()).collect(), attention: store() }
    }

    fn note(&mut self, run: usize, noted: Noting<D>) -> Result<(), Error> {
        for (store, y) in self.outputs.iter_mut().zip(noted.outputs) {
            store.put(run, y)?;
        }
        noted.attention.map_or(Ok(()), |o| self.attention.put(run, o))
    }

    /// What is known of a run, of layers with these weights.
    pub(super) fn of_run(&self, run: usize, device: &D) -> Result<Knowing<'_, D>, Error> {
        let outputs = self.outputs.iter().map(|store| store.find(run, device));
        Ok(Knowing {
            outputs: outputs.collect::<Result<_, _>>()?,
            attention: self.attention.find(run, device)?,
            changes: None,
        })
    }

    /// What is known of a run of layers whose inputs are what they were, and whose weights changed.
    /// It is forgotten.
    pub(super) fn corrected<'a>(
        &mut self,
        run: usize,
        device: &D,
        changes: &'a Changes<D>,
    ) -> Result<Knowing<'a, D>, Error> {
        let outputs = self.outputs.iter_mut().map(|store| store.take(run, device));
        let outputs = outputs.collect::<Result<_, _>>()?;
        Ok(Knowing { outputs, attention: None, changes: Some(changes) })
    }
}

/// Notes what the first layers of a part give, and attention where it is wanted.
pub(super) struct Noting<D: Ops> {
    layers: usize,
    of_attention: bool,
    outputs: Vec<Matrix<D>>,
    attention: Option<Matrix<D>>,
}

impl<D: Ops> Watch<D> for Noting<D> {
    fn input(&mut self, _: Part, layers: Range<usize>, x: &Matrix<D>) -> Result<(), D::Err> {
        if self.of_attention && layers.start > 0 {
            self.attention = Some(x.clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: usize, y: &Matrix<D>) {
        if layer < self.layers {
            self.outputs.push(y.clone());
        }
    }
}

/// Knows what the layers of a part give for a run.
pub(super) struct Knowing<'a, D: Ops> {
    outputs: Vec<Option<Matrix<D>>>,
    attention: Option<Matrix<D>>,
    changes: Option<&'a Changes<D>>,
}

impl<D: Ops> Default for Knowing<'_, D> {
    /// Nothing.
    fn default() -> Self {
        Self { outputs: Vec::new(), attention: None, changes: None }
    }
}

impl<D: Ops> Watch<D> for Knowing<'_, D> {
    fn known(&mut self, layer: usize, x: &Matrix<D>) -> Result<Option<Matrix<D>>, D::Err> {
        let Some(y) = self.outputs.get_mut(layer).and_then(Option::take) else { return Ok(None) };
        match self.changes {
            None => Ok(Some(y)),
            Some(changes) => match changes.get(layer).and_then(Option::as_ref) {
                None => Ok(None),
                Some(entries) => D::add_sparse_product(y, x, entries).map(Some),
            },
        }
    }

    fn known_attention(&mut self) -> Option<Matrix<D>> {
        self.attention.take()
    }
}

impl<D: Ops> Executor<D> {
    /// Notes all that a dense part's layers give, for the first runs, as far as it fits into memory.
    pub(super) fn noting(&self, part: &PartWeights<D>, stream: &Stream<D>) -> Notes<D> {
        let attention = part.linears.last().filter(|_| part.is_attention());
        let width: usize = part.linears.iter().map(|linear| linear.outputs()).sum();
        let width = width + attention.map_or(0, |linear| linear.inputs());
        let channels = part.linears.last().map_or(0, |linear| linear.outputs());
        let most = kept(stream.tokens() * channels * size_of::<f32>());
        let fits = |numbers| numbers * size_of::<f32>() <= most && self.storage.fits(numbers);
        let layers = part.linears.len();
        self.notes(part, stream, layers, attention.is_some(), |tokens| fits(tokens * width))
    }

    /// Notes what the layers that share a part's input give, for the first runs.
    pub(super) fn noting_first(&self, part: &PartWeights<D>, stream: &Stream<D>) -> Notes<D> {
        let layers = part.linears.len() - 1;
        let width: usize = part.linears[..layers].iter().map(|linear| linear.outputs()).sum();
        let fits = |tokens| tokens * width * size_of::<f32>() <= NOTED;
        self.notes(part, stream, layers, false, fits)
    }

    /// Notes what `layers` of a part give for the first runs, as many as have tokens that fit.
    fn notes(
        &self,
        part: &PartWeights<D>,
        stream: &Stream<D>,
        layers: usize,
        of_attention: bool,
        fits: impl Fn(usize) -> bool,
    ) -> Notes<D> {
        let known = Known::nothing(&self.storage, part, stream.runs.len());
        let mut tokens = 0;
        let runs = stream.runs.iter().take_while(|run| {
            tokens += run.tokens();
            fits(tokens)
        });
        Notes { known, layers, of_attention, runs: runs.count() }
    }
}

/// What is noted in a pass.
pub(super) struct Notes<D: Ops> {
    pub(super) known: Known<D>,
    layers: usize,
    of_attention: bool,
    /// How many runs.
    runs: usize,
}

impl<D: Ops> Notes<D> {
    /// Whether a run is noted.
    pub(super) fn wants(&self, run: usize) -> bool {
        run < self.runs
    }

    /// What notes a run.
    pub(super) fn of_run(&self, run: usize) -> Noting<D> {
        let wanted = self.wants(run);
        Noting {
            layers: if wanted { self.layers } else { 0 },
            of_attention: wanted && self.of_attention,
            outputs: Vec::new(),
            attention: None,
        }
    }

    /// Takes what was noted of a run.
    pub(super) fn add(&mut self, run: usize, noted: Noting<D>) -> Result<(), Error> {
        self.known.note(run, noted)
    }
}

#[cfg(test)]
mod tests {
    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{
        executor::{
            Inner, Positions,
            ops::{SparseProduct, Weight, testing::noise},
        },
        family::Activation,
    };

    #[test]
    fn corrected_outputs_are_those_of_the_changed_weights() {
        let (device, tokens, width, inner) = (Cpu::default(), 70, 6, 9);
        let mut values =
            [noise(inner * width, 1), noise(inner * width, 2), noise(inner * width, 3)];
        let part = |values: &[Vec<f32>; 3]| {
            let dims = [(inner, width), (inner, width), (width, inner)];
            let weights = values.iter().zip(dims);
            PartWeights {
                part: Part::Mlp,
                names: Vec::new(),
                input_norm: None,
                linears: weights
                    .map(|(w, dims)| Weight::new(&device, w, dims, None).unwrap())
                    .collect(),
                inner: Inner::Gated(Activation::Silu),
                output_norm: None,
                residual_norm: None,
            }
        };
        let executor = Executor::from(device.clone());
        let positions = Positions { length: tokens, sights: None, rotation: None };
        let states = noise(tokens * width, 4);
        let stream = || {
            let samples = [Ok::<_, Error>((states.clone(), positions.clone()))];
            executor.stream(samples.into_iter(), 0).unwrap()
        };
        let of = |stream: &Stream<Cpu>| stream.states.get(0, &device).unwrap().to_vec();

        let (targets, mut known) = executor.noted_outputs(&part(&values), &stream()).unwrap();
        values[0][7] += 0.5;
        values[2][3] += 0.5;
        let entries = |entries| Some(device.entries(entries, (inner, width)).unwrap());
        // The second layer's weights did not change; the third's outputs were not noted.
        let changes = [entries(vec![(1, 1, 0.5)]), entries(vec![]), None];
        let (mut corrected, mut again) = (stream(), stream());
        let before = Some((&mut known, &changes[..]));
        let found = executor.advance_towards(&part(&values), &mut corrected, &targets, before);
        let expected = executor.advance_towards(&part(&values), &mut again, &targets, None);
        let (found, expected) = (found.unwrap().calibration, expected.unwrap().calibration);
        assert!(expected > 0.0 && (found / expected - 1.0).abs() < 1e-3, "{found} {expected}");
        for (found, expected) in of(&corrected).iter().zip(of(&again)) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        assert!(of(&corrected) != states);
        assert!(known.outputs.iter().all(|store| store.find(0, &device).unwrap().is_none()));
    }
}
