//! Statistics are sums over samples: however the samples are split, the parts add up to the whole.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use barber_metric::Needs;
use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    executor::{Outputs, PartWeights, Pass, Probe, Statistics, Targets},
    family::Part,
    mask::Mask,
    model::Model,
};
use proptest::prelude::*;

/// Samples of several lengths, some of them the same.
fn samples() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let sample = (2..7usize).prop_flat_map(|length| prop::collection::vec(0..90u32, 4 * length));
    prop::collection::vec(sample, 2..9)
}

struct Tiny<'a> {
    model: Model<'a, Cpu>,
    dense: [PartWeights<Cpu>; 1],
    sparse: [PartWeights<Cpu>; 1],
}

impl<'a> Tiny<'a> {
    fn new(reader: &'a Reader, part: Part) -> Self {
        let model = Model::new(reader, Cpu::default()).unwrap();
        let mut pruned = Pruned::default();
        for linear in model.decoder.projections() {
            let mask = Mask::from_fn(linear.dims, |i| i % 3 != 0);
            pruned.masks.insert(linear.weight.clone(), mask);
        }
        let dense = [model.part(1, part, &Pruned::dense()).unwrap()];
        let sparse = [model.part(1, part, &pruned).unwrap()];
        Self { model, dense, sparse }
    }

    /// All statistics of the part's linear layers, each as a list, and the loss last: sums over
    /// the samples.
    fn sums(&self, samples: &[Vec<u32>]) -> Vec<Vec<f64>> {
        let executor = &self.model.executor;
        let stream = self.model.embed(samples, 0).unwrap();
        let kept = Pass { outputs: Outputs::Kept, ..Pass::new(&self.sparse, &stream) };
        let targets = executor.run(kept).unwrap().outputs;
        let members = [(0..self.dense[0].linears.len()).collect()];
        let needs = Needs::INPUT_SQUARE.or(Needs::GRAM).or(Needs::SQUARED_GRADIENT);
        let measured = executor.run(Pass {
            targets: Targets::Replaced(targets),
            probe: Some(Probe::new(&members, needs)),
            ..Pass::new(&self.dense, &stream)
        });
        let measured = measured.unwrap();
        let lists = |statistics: &Statistics| {
            let shared = [&statistics.input_square, &statistics.gram];
            let shared = shared.map(|values| values.as_ref().unwrap().to_vec());
            let gradient = statistics.squared_gradient.clone().unwrap();
            shared.into_iter().chain([gradient]).collect::<Vec<Vec<f32>>>()
        };
        let sum = |mean: f64| mean * samples.len() as f64;
        let mut all: Vec<Vec<f64>> = measured.statistics[0]
            .iter()
            .flat_map(lists)
            .map(|list| list.into_iter().map(|mean| sum(f64::from(mean))).collect())
            .collect();
        all.push(vec![sum(measured.loss.calibration)]);
        all
    }
}

/// f32 sums of few terms differ by some units in the last place of the largest.
const ROUNDING: f64 = 2e-6;

fn close(whole: &[Vec<f64>], parts: &[Vec<f64>]) -> Result<(), TestCaseError> {
    prop_assert_eq!(whole.len(), parts.len());
    for (whole, parts) in whole.iter().zip(parts) {
        let largest = whole.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        for (whole, parts) in whole.iter().zip(parts) {
            let difference = (whole - parts).abs();
            prop_assert!(difference <= ROUNDING * largest, "{} {} {}", whole, parts, largest);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    #[test]
    fn statistics_of_parts_add_up(samples in samples(), at in any::<prop::sample::Index>(), mlp: bool) {
        let reader = Reader::open(Path::new("tests/fixtures/logits/f32")).unwrap();
        let tiny = Tiny::new(&reader, Part::ALL[usize::from(mlp)]);
        let whole = tiny.sums(&samples);
        let (first, second) = samples.split_at(1 + at.index(samples.len() - 1));
        let mut parts = tiny.sums(first);
        for (sum, more) in parts.iter_mut().flatten().zip(tiny.sums(second).iter().flatten()) {
            *sum += more;
        }
        close(&whole, &parts)?;
        // Each alone: no two share a matrix.
        let mut alone: Vec<Vec<f64>> = whole.iter().map(|list| vec![0.0; list.len()]).collect();
        for sample in &samples {
            let more = tiny.sums(std::slice::from_ref(sample));
            alone.iter_mut().flatten().zip(more.iter().flatten()).for_each(|(sum, x)| *sum += x);
        }
        close(&whole, &alone)?;
    }
}
