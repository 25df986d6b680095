//! Blocks that pool matrices of self-attention and the MLP: their gradients are those of the whole
//! decoder layer's output error.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, fs};

use barber_metric::Needs;
use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    executor::{Outputs, PartWeights, Pass, Probe, Targets, ops::Weight},
    family::Part,
    mask::Mask,
    model::Model,
};

#[test]
fn gradients_across_parts_are_those_of_finite_differences() {
    let mut families = BTreeSet::new();
    for dir in fs::read_dir("tests/fixtures/logits").unwrap() {
        let dir = dir.unwrap().path();
        let reader = Reader::open(&dir).unwrap();
        let model = Model::new(&reader, Cpu::default()).unwrap();
        if model.decoder.layers[0].mlp.router.is_some() {
            continue;
        }
        families.insert(reader.config()["model_type"].as_str().unwrap().to_owned());
        let mut pruned = Pruned::default();
        for linear in model.decoder.projections() {
            let mask = Mask::from_fn(linear.dims, |i| i % 3 != 0);
            pruned.masks.insert(linear.weight.clone(), mask);
        }
        let parts = |pruned: &Pruned| -> Vec<_> {
            Part::ALL.iter().map(|part| model.part(0, *part, pruned).unwrap()).collect()
        };
        let (dense, sparse) = (parts(&Pruned::dense()), parts(&pruned));
        let executor = &model.executor;
        let stream = model.embed(&[(0..12).collect()], 0).unwrap();
        let members = [0, 1].map(|part| (0..dense[part].linears.len()).collect::<Vec<_>>());
        let needs = Needs::SQUARED_GRADIENT;
        let run = |pass: Pass<'_, Cpu>| executor.run(pass).unwrap();
        let kept = Pass { outputs: Outputs::Kept, ..Pass::new(&sparse, &stream) };
        let target = run(kept).outputs;
        let targets = || Targets::Outputs(&target);
        let probe = Some(Probe::new(&members, needs));
        let measured = run(Pass { targets: targets(), probe, ..Pass::new(&dense, &stream) });
        let loss = |parts: &[PartWeights<Cpu>]| {
            run(Pass { targets: targets(), ..Pass::new(parts, &stream) }).loss.calibration
        };
        assert!((loss(&dense) / measured.loss.calibration - 1.0).abs() < 1e-5);
        for (part, members) in members.iter().enumerate() {
            for &member in members {
                let found = measured.statistics[part][member].squared_gradient.as_ref().unwrap();
                let largest = found.iter().copied().fold(0.0, f32::max);
                let at = found.iter().position(|square| *square == largest).unwrap();
                let shifted = |h: f32| {
                    let mut parts = dense.clone();
                    let linear = &model.decoder.layers[0].projections(Part::ALL[part])[member];
                    let mut values = model.values(linear).unwrap();
                    values[at] += h;
                    let bias = linear.bias.as_ref();
                    let bias = bias.map(|b| model.reader.read(b, &[linear.dims.rows]).unwrap());
                    let dims = (linear.dims.rows, linear.dims.columns);
                    parts[part].linears[member] =
                        Weight::new(&executor.device, &values, dims, bias).unwrap();
                    loss(&parts)
                };
                let slope = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
                let gradient = f64::from(largest.sqrt());
                let off = (slope.abs() / gradient - 1.0).abs();
                assert!(off < 2e-2, "{}, {part}, {member}: {slope} {gradient}", dir.display());
            }
        }
    }
    // tests/experts.rs has the mixtures.
    assert!(families.len() >= 23, "{families:?}");
}
