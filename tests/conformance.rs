//! What the paper authors' own code decided on a tiny LLaMA and a tiny OPT, case by case. `tests/conformance/`
//! has the checkpoint, the calibration tokens and, per case, the recorded masks, mean squared
//! gradients and losses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "figures for whoever runs it with --nocapture")]

mod util;

use std::path::Path;

use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Masks, Pruned, Reader},
    executor::ops::Ops,
    mask::{Init, Mask, Pattern, Scope},
    model::Model,
    plan::{Plan, Rule},
    prune::{
        Alpha, Event, InitialMasks, Rebuild, Refine, Refinement, Sampled, Side, initial_masks,
        refine,
    },
};
use safetensors::SafeTensors;
use serde_json::Value;

struct Case {
    settings: Value,
    bytes: Vec<u8>,
}

impl Case {
    fn open(name: &str) -> Self {
        let file = |extension: &str| {
            Path::new("tests/conformance/cases").join(format!("{name}.{extension}"))
        };
        Self {
            settings: serde_json::from_slice(&std::fs::read(file("json")).unwrap()).unwrap(),
            bytes: std::fs::read(file("safetensors")).unwrap(),
        }
    }

    fn tensor(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// Entries in which a recorded mask and ours differ, and entries in all.
    fn differences(&self, kind: &str, masks: &Masks) -> (usize, usize) {
        let mut counts = (0, 0);
        for (name, mask) in masks {
            let recorded = self.tensor(&format!("{kind}.{name}"));
            assert_eq!(recorded.len(), mask.dims().len());
            counts.1 += recorded.len();
            counts.0 +=
                recorded.iter().zip(mask.to_bools()).filter(|(r, m)| (**r == 1) != *m).count();
        }
        counts
    }

    /// The recorded initial masks.
    fn initial(&self, ours: &Masks) -> Masks {
        let mask = |name: &String, dims| {
            let recorded = self.tensor(&format!("init.{name}"));
            Mask::from_fn(dims, |i| recorded[i] == 1)
        };
        ours.iter().map(|(name, m)| (name.clone(), mask(name, m.dims()))).collect()
    }

    /// Entries that the authors' rebuild changed.
    fn changed(&self, masks: &Masks) -> usize {
        let differ = |name: &String| {
            let [init, rebuilt] =
                ["init", "rebuilt"].map(|kind| self.tensor(&format!("{kind}.{name}")));
            init.iter().zip(rebuilt).filter(|(a, b)| **a != *b).count()
        };
        masks.keys().map(differ).sum()
    }

    fn squared_gradients(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensor(&format!("scaler.{name}"));
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn number(&self, key: &str) -> f64 {
        self.settings[key].as_f64().unwrap()
    }
}

/// The 99th percentile of the errors of single weights, relative to what was recorded, and the norm
/// of all errors relative to that of all that was recorded.
fn errors(ours: &[f32], recorded: &[f32]) -> [f64; 2] {
    let pairs = || ours.iter().zip(recorded).map(|(o, r)| (f64::from(*o), f64::from(*r)));
    let mut of_each: Vec<f64> =
        pairs().filter(|(_, r)| *r > 0.0).map(|(o, r)| (o - r).abs() / r).collect();
    of_each.sort_by(f64::total_cmp);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut pairs().map(|(o, r)| o - r));
    [of_each[of_each.len() * 99 / 100], off / norm(&mut pairs().map(|(_, r)| r))]
}

fn conforms(name: &str, init: &str, pattern: &str, ratio: f64, scope: Scope) {
    for family in ["llama", "opt"] {
        let settings = (init, pattern, ratio, scope);
        family_conforms(Cpu::default(), family, name, settings);
        #[cfg(feature = "cuda")]
        if let Some(gpu) = util::gpu() {
            family_conforms(gpu, family, name, settings);
        }
    }
}

fn family_conforms<D: Ops>(
    device: D,
    family: &str,
    name: &str,
    (init, pattern, ratio, scope): (&str, &str, f64, Scope),
) {
    let case = Case::open(&format!("{family}-{name}"));
    let pattern: Pattern = pattern.parse().unwrap();
    let reader = Path::new("tests/conformance").join(format!("tiny-{family}"));
    let reader = Reader::open(&reader).unwrap();
    let model = Model::new(&reader, device).unwrap();
    let plan = |more: usize| {
        let rule = |name: &str| {
            let dims =
                model.decoder.projections().find(|linear| linear.weight == name).unwrap().dims;
            let blocks = if init == "sparsegpt" { dims.columns.div_ceil(128) } else { 1 };
            let ratio = ratio + (more * blocks) as f64 / dims.len() as f64;
            Some(Rule { pattern, ratio, count: None, scope: None })
        };
        Plan::new(&model.decoder, &[], rule).unwrap()
    };
    // The authors' thresholds prune one weight more per matrix, or block of columns.
    let unstructured = pattern == Pattern::UNSTRUCTURED;
    let more = unstructured && ["magnitude", "sparsegpt"].contains(&init);
    let (exact, plan) = (plan(0), plan(more.into()));
    let samples = util::calibration_samples(&reader);
    let samples = Sampled::from(&samples[..]);

    let scratch = tempfile::tempdir().unwrap();
    let first = InitialMasks {
        init: Init::named(init).unwrap(),
        metric: (&[], None),
        sparse: None,
        side: Side::Sparse,
        dtype: None,
        scratch: scratch.path(),
    };
    let initial =
        initial_masks(&model, &exact, &first, samples, Pruned::default(), &mut |_: Event<'_>| ())
            .unwrap();
    assert_eq!(initial.masks.len(), model.decoder.projections().count());
    let (differ, entries) = case.differences("init", &initial.masks);
    // SparseGPT chooses each block of weights after what it made of those before.
    let most = if init == "sparsegpt" { 5 } else { 1 };
    println!("{family}-{name}: {differ} of {entries} initial entries differ");
    assert!(differ * 1000 <= entries * most, "{differ} of {entries} initial mask entries differ");

    let plugin = barber_metric::registered().unwrap()["weight-gradient"];
    let stage = Refine::Rebuild(Rebuild {
        alpha: Alpha::Fraction(case.number("alpha")),
        scope,
        ..Rebuild::default()
    });
    let pipeline = [(plugin.name.into(), plugin.build(Default::default()).unwrap())];
    let settings = Refinement {
        stages: &[stage],
        pipeline: &pipeline,
        blend: 0.0,
        statistics: Side::Sparse,
        initial: None,
        dtype: None,
        scratch: scratch.path(),
    };
    let initial =
        initial_masks(&model, &plan, &first, samples, Pruned::default(), &mut |_: Event<'_>| ())
            .unwrap();
    let rebuilt =
        refine(&model, &plan, &settings, samples, initial, &mut |_: Event<'_>| ()).unwrap();
    let (differ, _) = case.differences("rebuilt", &rebuilt.masks);
    let changed = case.changed(&rebuilt.masks);
    println!("{family}-{name}: {differ} of {changed} changed entries differ");
    assert!(differ * 10 <= changed, "{differ} of {changed} rebuilt mask entries differ");

    // Statistics are compared at the very masks at which the authors' code measured its own.
    let mut recorded =
        initial_masks(&model, &plan, &first, samples, Pruned::default(), &mut |_: Event<'_>| ())
            .unwrap();
    recorded.masks = case.initial(&recorded.masks);
    let mut losses = Vec::new();
    let mut event = |event: Event<'_>| match event {
        Event::Measured(tensor, statistics) => {
            let ours = statistics.squared_gradient.as_deref().unwrap();
            let recorded = case.squared_gradients(tensor);
            assert_eq!(ours.len(), recorded.len());
            let [most, norm] = errors(ours, &recorded);
            println!("{family}-{name}: {tensor}: 99% within {most:.1e}, norm {norm:.1e}");
            assert!(most < 1e-2, "{tensor}: of the squared gradients 1% differ by {most}");
            assert!(norm < 1e-3, "{tensor}: the squared gradients differ by {norm} of their norm");
        }
        Event::Group(report) => {
            losses.push(report.errors().unwrap().map(|loss| loss.calibration));
        }
        Event::Experts(_) | Event::Layer(_) | Event::Step(_) | Event::Repeated(_) => (),
    };
    refine(&model, &plan, &settings, samples, recorded, &mut event).unwrap();
    let recorded = case.settings["losses"].as_array().unwrap();
    assert_eq!(recorded.len(), losses.len());
    for (recorded, [before, after]) in recorded.iter().zip(losses) {
        let [expected_before, expected_after] = [1, 2].map(|i| recorded[i].as_f64().unwrap());
        assert!((before / expected_before - 1.0).abs() < 1e-3, "{before} {expected_before}");
        assert!((after / expected_after - 1.0).abs() < 1e-3, "{after} {expected_after}");
    }
}

#[test]
fn magnitude_4of8() {
    conforms("magnitude-4of8", "magnitude", "4:8", 0.5, Scope::Row);
}

#[test]
fn magnitude_block() {
    conforms("magnitude-block", "magnitude", "unstructured", 0.5, Scope::Group);
}

#[test]
fn sparsegpt_column() {
    conforms("sparsegpt-column", "sparsegpt", "unstructured", 0.5, Scope::Column);
}

#[test]
fn wanda_2of4() {
    conforms("wanda-2of4", "wanda", "2:4", 0.5, Scope::Row);
}

#[test]
fn wanda_layer_70() {
    conforms("wanda-layer-70", "wanda", "unstructured", 0.7, Scope::Layer);
}

#[test]
fn wanda_row() {
    conforms("wanda-row", "wanda", "unstructured", 0.5, Scope::Row);
}
