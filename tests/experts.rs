//! Mixtures of experts: gradients against finite differences, masks against a plain implementation
//! (`tests/fixtures/make-experts.py`), and runs from a recipe to a checkpoint.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{fs, path::Path, slice::from_ref};

use barber_metric::Needs;
use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Masks, Pruned, Reader},
    evaluate::logits,
    executor::{
        Caching, FEWEST_ROWS, Outputs, PartWeights, Pass, Positions, Probe, Recorded, Targets,
        forward,
        ops::{Hold, InputGradient, Products, gradient, seeded, traced},
    },
    family::{Feed, Part},
    mask::{Init, Mask, Pattern},
    model::Model,
    plan::{Plan, Rule},
    prune::{
        Alpha, Event, ExpertReport, InitialMasks, Rebuild, Refine, Refinement, Sampled, Side, Swap,
        initial_masks, refine,
    },
    random::SplitMix64,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use util::barber;

/// A mixture of four experts in two layers, with two experts for each token.
const MODEL: &str = "tests/fixtures/experts";

fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64::new(seed);
    (0..count).map(|_| random.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0).collect()
}

/// A scalar that depends on every number in its own way.
fn weighted(values: &[f32], factors: &[f32]) -> f64 {
    values.iter().zip(factors).map(|(y, f)| f64::from(*y) * f64::from(*f)).sum()
}

#[test]
fn gradients_pass_through_experts_and_router() {
    let device = Cpu::default();
    for (path, layer) in [
        (MODEL, 1),
        ("tests/fixtures/logits/qwen3-moe-mixed", 1),
        ("tests/fixtures/logits/qwen2-moe", 1),
        ("tests/fixtures/logits/mixtral", 1),
        ("tests/fixtures/logits/olmoe", 1),
        ("tests/fixtures/logits/granitemoe", 1),
        ("tests/fixtures/logits/gpt-oss", 1),
        ("tests/fixtures/logits/gpt-oss-defaults", 2),
        ("tests/fixtures/logits/deepseek-v3", 1),
        ("tests/fixtures/logits/deepseek-v3-biases", 1),
    ] {
        let reader = Reader::open(Path::new(path)).unwrap();
        let model = Model::new(&reader, device.clone()).unwrap();
        let part = model.part(layer, Part::Mlp, &Pruned::dense()).unwrap();
        let router = &model.decoder.layers[layer].mlp.router.as_ref().unwrap().projection;
        let (tokens, width) = (6, model.decoder.hidden_size);
        let positions = Positions::new(&model.decoder, tokens);
        let (x, factors) = (noise(tokens * width, 1), noise(tokens * width, 2));
        let held = |x: &[f32]| device.hold(x.to_vec(), (tokens, width)).unwrap();
        let value = |part: &PartWeights<Cpu>, x: &[f32]| {
            let y = forward(part, &positions, held(x), InputGradient::Wanted).unwrap();
            weighted(&y.to_vec(), &factors)
        };
        let mut of_router = part.clone();
        if let Some(router) = &mut of_router.router {
            router.weight = router.weight.traced();
        }
        let input = held(&x);
        let y = forward(&of_router, &positions, traced(input.clone()), InputGradient::Wanted);
        let loss = seeded(y.unwrap(), held(&factors)).unwrap();
        let of_input = gradient(loss, &input).unwrap().to_vec();
        let trace = of_router.router.unwrap().weight.take_trace().unwrap();
        let of_router = trace.gradient().unwrap();
        // So small a step that no token changes its experts.
        let h = 1e-3_f32;
        let close = |what: &str, i: usize, slope: f64, found: f32| {
            let off = (slope - f64::from(found)).abs();
            assert!(off < 2e-2 + 2e-2 * slope.abs(), "{path}, {what} {i}: {slope}, not {found}");
        };
        for (i, found) in of_input.iter().enumerate() {
            let at = |h: f32| {
                let mut x = x.clone();
                x[i] += h;
                value(&part, &x)
            };
            close("input", i, (at(h) - at(-h)) / f64::from(2.0 * h), *found);
        }
        let weights = model.values(router).unwrap();
        for (i, found) in of_router.iter().enumerate().step_by(5) {
            let at = |h: f32| {
                let (mut part, mut weights) = (part.clone(), weights.clone());
                weights[i] += h;
                if let Some(router) = &mut part.router {
                    let projection = &router.of.projection;
                    router.weight =
                        model.weight(projection, weights, None, &Pruned::dense()).unwrap();
                }
                value(&part, &x)
            };
            close("router", i, (at(h) - at(-h)) / f64::from(2.0 * h), *found);
        }
        assert!(of_router.iter().any(|gradient| gradient.abs() > 0.1), "{path}");
    }
}

/// The backward pass through a layer: the gradients of attention pass through router and experts.
#[test]
fn gradients_of_a_layer_are_those_of_finite_differences() {
    check_gradients(MODEL, 0);
    for (name, layer) in
        [("mixtral-window", 0), ("olmoe", 0), ("qwen2-moe-mixed", 1), ("granitemoe-biases", 0)]
    {
        check_gradients(&format!("tests/fixtures/logits/{name}"), layer);
    }
}

#[test]
fn gradients_pass_through_sinks_and_limited_gates() {
    check_gradients("tests/fixtures/logits/gpt-oss", 0);
    check_gradients("tests/fixtures/logits/gpt-oss-defaults", 1);
}

#[test]
fn gradients_pass_through_latents() {
    check_gradients("tests/fixtures/logits/deepseek-v3", 1);
    check_gradients("tests/fixtures/logits/deepseek-v3-one-group", 1);
}

/// Checks the largest gradient of each matrix of a layer.
fn check_gradients(path: &str, layer: usize) {
    let reader = Reader::open(Path::new(path)).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let ids = &Expected::read().ids()[..2];
    let parts: Vec<PartWeights<Cpu>> =
        Part::ALL.map(|part| model.part(layer, part, &Pruned::dense()).unwrap()).into();
    let members: Vec<Vec<usize>> =
        parts.iter().map(|part| (0..part.linears.len()).collect()).collect();
    let stream = model.embed(ids, 0).unwrap();
    let factors: Vec<Vec<f32>> =
        [3, 4].map(|seed| noise(48 * model.decoder.hidden_size, seed)).into();
    let mut gradients = model.executor.by_run(&stream, &factors).unwrap();
    let traces = model.executor.backward(&parts, &members, &stream, &mut gradients).unwrap();
    let value = |parts: &[PartWeights<Cpu>]| {
        let mut stream = model.embed(ids, 0).unwrap();
        model.executor.run(Pass::advancing(parts, &mut stream)).unwrap();
        let mut sum = 0.0;
        let see = |i: usize, states: &[f32]| {
            sum += weighted(states, &factors[i]);
            Ok::<_, llm_barber::executor::Error>(())
        };
        model.executor.each_sample(&stream, see).unwrap();
        sum
    };
    for (part, traces) in traces.iter().enumerate() {
        for (place, traces) in traces.iter().enumerate() {
            let linear = &model.decoder.layers[layer].projections(Part::ALL[part])[place];
            let found = traces.iter().map(|(_, trace)| trace.gradient().unwrap());
            let Some(found) = found.reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect())
            else {
                continue;
            };
            let largest = |a: &usize, b: &usize| found[*a].abs().total_cmp(&found[*b].abs());
            let i = (0..found.len()).max_by(largest).unwrap();
            let dense = model.values(linear).unwrap();
            let at = |h: f32| {
                let (mut parts, mut values) = (parts.clone(), dense.clone());
                values[i] += h;
                parts[part].linears[place] =
                    model.weight(linear, values, None, &Pruned::dense()).unwrap();
                value(&parts)
            };
            // So small a step that no token changes its experts.
            let h = 1e-4;
            let slope = (at(h) - at(-h)) / f64::from(2.0 * h);
            let off = (slope - f64::from(found[i])).abs();
            assert!(off < 0.1 + 0.03 * slope.abs(), "{}: {slope} {}", linear.weight, found[i]);
        }
    }
}

/// What the plain implementation gave.
struct Expected(Vec<u8>);

impl Expected {
    fn read() -> Self {
        Self(fs::read(Path::new(MODEL).join("expected.safetensors")).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn ids(&self) -> Vec<Vec<u32>> {
        let ids = self.bytes("ids");
        let ids = ids.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
        ids.collect::<Vec<_>>().chunks(48).map(<[u32]>::to_vec).collect()
    }

    fn mask(&self, method: &str, of: &Mask, name: &str) -> Mask {
        let bits = self.bytes(&format!("{method}.{name}"));
        Mask::from_fn(of.dims(), |i| bits[i / 8] >> (i % 8) & 1 == 1)
    }

    /// Entries that differ, and entries that changed since Wanda's masks.
    fn compare(&self, method: &str, masks: &Masks) -> [usize; 2] {
        let mut counts = [0, 0];
        for (name, mask) in masks {
            let expected = self.mask(method, mask, name);
            counts[0] += mask.differences(&expected).count();
            counts[1] += expected.differences(&self.mask("wanda", mask, name)).count();
        }
        counts
    }
}

fn plan(model: &Model<'_, Cpu>, blocks: &[(String, Vec<String>)]) -> Plan {
    let rule = Rule { pattern: Pattern::UNSTRUCTURED, ratio: 0.5, count: None, scope: None };
    Plan::new(&model.decoder, blocks, |_| Some(rule)).unwrap()
}

fn initial<'a>(init: &str, scratch: &'a Path) -> InitialMasks<'a> {
    InitialMasks {
        init: Init::named(init).unwrap(),
        metric: (&[], None),
        sparse: None,
        side: Side::Sparse,
        dtype: None,
        scratch,
    }
}

#[test]
fn masks_are_those_of_a_plain_implementation() {
    let (expected, scratch) = (Expected::read(), std::env::temp_dir());
    let reader = Reader::open(Path::new(MODEL)).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let (ids, plan) = (expected.ids(), plan(&model, &[]));
    let samples = Sampled::from(&ids[..]);
    let start = |init: &str, tokens: &mut Vec<ExpertReport>| {
        let settings = initial(init, &scratch);
        let mut event = |event: Event<'_>| {
            if let Event::Experts(found) = event {
                tokens.push(found.clone());
            }
        };
        initial_masks(&model, &plan, &settings, samples, Pruned::default(), &mut event).unwrap()
    };
    let mut tokens = Vec::new();
    let magnitude = start("magnitude", &mut tokens).masks;
    let all = magnitude.values().map(|mask| mask.dims().len()).sum::<usize>();
    assert_eq!(expected.compare("magnitude", &magnitude)[0], 0);
    let wanda = start("wanda", &mut tokens).masks;
    let [differ, _] = expected.compare("wanda", &wanda);
    assert!(differ * 1000 <= all, "{differ} of {all}");
    // Each token has two experts.
    assert_eq!(tokens.len(), 2);
    for ExpertReport { experts, tokens, layer } in &tokens {
        assert_eq!(*experts, format!("model.layers.{layer}.mlp.experts"));
        assert_eq!((tokens.len(), tokens.iter().sum::<usize>()), (4, 2 * 8 * 48));
    }
    let found = logits(&model, &Pruned::from(wanda), &ids[0]).unwrap();
    let recorded = expected.floats("logits");
    assert_eq!(found.len(), recorded.len());
    for (found, recorded) in found.iter().zip(recorded) {
        assert!((found - recorded).abs() < 1e-3, "{found} {recorded}");
    }

    let plugin = barber_metric::registered().unwrap()["weight-gradient"];
    let pipeline = [(plugin.name.into(), plugin.build(Default::default()).unwrap())];
    let rebuild = Rebuild { alpha: Alpha::Fraction(0.2), ..Rebuild::default() };
    let stages = [("rebuild", Refine::Rebuild(rebuild)), ("swap", Refine::Swap(Swap::default()))];
    for (method, stage) in stages {
        let settings = Refinement {
            stages: &[stage],
            pipeline: &pipeline,
            blend: 0.0,
            statistics: Side::Sparse,
            initial: None,
            dtype: None,
            scratch: &scratch,
        };
        let mut groups = Vec::new();
        let mut event = |event: Event<'_>| {
            if let Event::Group(report) = event {
                groups.push((report.group.clone(), report.stages[0].matrices.len()));
            }
        };
        let first = start("wanda", &mut Vec::new());
        let masks = refine(&model, &plan, &settings, samples, first, &mut event).unwrap().masks;
        let [differ, changed] = expected.compare(method, &masks);
        assert!(changed > 50 && differ * 100 <= changed, "{method}: {differ} of {changed}");
        // All experts of a layer are one group.
        assert_eq!(groups[1], ("mlp".into(), 12));
    }
}

#[test]
fn statistics_of_structures_are_those_of_a_plain_implementation() {
    let reader = Reader::open(Path::new(MODEL)).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let expected = Expected(fs::read(Path::new(MODEL).join("structures.safetensors")).unwrap());
    // The last two samples are held out.
    let mut ids = Expected::read().ids();
    ids.extend([vec![1, 2, 3], vec![4, 5, 6]]);
    let mut stream = model.embed(&ids, 2).unwrap();
    let close = |found: &[f32], expected: &[f32], what: &str| {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            let error = (found - expected).abs();
            assert!(error <= 1e-5 + 1e-4 * expected.abs(), "{what}: {found} {expected}");
        }
    };
    for (layer, of) in model.decoder.layers.iter().enumerate() {
        let dense = Pruned::dense();
        let parts = Part::ALL.map(|part| model.part(layer, part, &dense).unwrap());
        let needs = Needs::INFLUENCE.or(Needs::CONTRIBUTION);
        let found = model.executor.structure_statistics(&parts, &stream, needs).unwrap();
        let influence = expected.floats("influence")[layer];
        close(&[found.influence.unwrap()], &[influence], "influence");
        let contribution = expected.floats(&format!("contribution.{layer}"));
        close(&found.contribution.unwrap(), &contribution, "contribution");
        let members = Part::ALL.map(|part| (0..of.projections(part).len()).collect());
        let probe = Some(Probe::new(&members, Needs::INPUT_VARIANCE));
        let found = model.executor.run(Pass { probe, ..Pass::new(&parts, &stream) }).unwrap();
        let mut compared = 0;
        for (part, found) in Part::ALL.iter().zip(found.statistics) {
            for (projection, found) in of.projections(*part).iter().zip(found) {
                if projection.feed() != Feed::Inner {
                    continue;
                }
                let name = format!("{layer}.{}", projection.name);
                let values = |what: &str| expected.floats(&format!("{what}.{name}"));
                close(&found.input_mean.unwrap(), &values("mean"), &name);
                close(&found.input_variance.unwrap(), &values("variance"), &name);
                compared += 1;
            }
        }
        assert_eq!(compared, 5);
        for part in &parts {
            model.executor.run(Pass::advancing(from_ref(part), &mut stream)).unwrap();
        }
    }
}

#[test]
fn statistics_of_few_tokens_are_those_of_all_experts() {
    let reader = Reader::open(Path::new(MODEL)).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let part = [model.part(0, Part::Mlp, &Pruned::dense()).unwrap()];
    let all: Vec<usize> = (0..part[0].linears.len()).collect();
    let needs = Needs::INPUT_SQUARE.or(Needs::GRAM);
    let run = |ids: &[Vec<u32>], members: &[Vec<usize>]| {
        let stream = model.embed(ids, 0).unwrap();
        let probe = Some(Probe::new(members, needs));
        let found = model.executor.run(Pass { probe, ..Pass::new(&part, &stream) }).unwrap();
        found.statistics.into_iter().next().unwrap()
    };
    // One token: two experts see it, two see none.
    let found = run(&[vec![5]], from_ref(&all));
    let rows: Vec<usize> = found.iter().step_by(3).map(|of| of.rows).collect();
    assert_eq!(rows.iter().sum::<usize>(), 2);
    let square = |i: usize| found[i].input_square.as_ref().unwrap().to_vec();
    assert!(found.iter().all(|of| of.pooled));
    for place in 0..3 {
        let first = square(place);
        assert!((1..4).all(|expert| square(3 * expert + place) == first));
    }
    // The pool of the inner states is the mean of both experts.
    let one = |expert: usize| {
        let alone = run(&[vec![5]], &[vec![3 * expert + 2]]);
        assert_eq!(alone[3 * expert + 2].rows, rows[expert]);
        alone[3 * expert + 2].input_square.as_ref().unwrap().to_vec()
    };
    let seen: Vec<usize> = (0..4).filter(|expert| rows[*expert] > 0).collect();
    let (a, b, pool) = (one(seen[0]), one(seen[1]), square(2));
    for ((a, b), pool) in a.iter().zip(&b).zip(pool) {
        assert!(((a + b) / 2.0 - pool).abs() < 1e-6 * pool.max(1e-3), "{a} {b} {pool}");
    }
    // Without any token, all inputs are alike.
    let unseen = (0..4).find(|expert| rows[*expert] == 0).unwrap();
    assert!(one(unseen).iter().all(|square| *square == 1.0));

    let few = ExpertReport { layer: 0, experts: "e".into(), tokens: vec![FEWEST_ROWS, 3, 40, 0] };
    let warning = few.few().unwrap();
    assert!(warning.starts_with("`e.*`: experts 1, 3 saw fewer than 32"), "{warning}");
    assert!(warning.contains("(3, 0)"), "{warning}");
    let one = ExpertReport { tokens: vec![3, 100], ..few.clone() }.few().unwrap();
    assert!(one.starts_with("`e.0` saw"), "{one}");
    assert_eq!(ExpertReport { tokens: vec![FEWEST_ROWS], ..few }.few(), None);
}

#[test]
fn a_pass_takes_the_operations_of_its_shape() {
    check_operations(MODEL);
    check_operations("tests/fixtures/logits/deepseek-v3");
}

fn check_operations(path: &str) {
    let reader = Reader::open(Path::new(path)).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let samples: Vec<Vec<u32>> = (0..5).map(|i| (i..i + 40).collect()).collect();
    let stream = model.embed(&samples, 2).unwrap();
    let executor = &model.executor;
    let run = |pass: Pass<'_, Cpu>| {
        let expected = pass.shape().operations();
        let before = Products::so_far().operations;
        let found = executor.run(pass).unwrap();
        let took = (Products::so_far().operations - before) as f64;
        assert!((took - expected).abs() < 1.0, "{path}: {took} {expected}");
        found
    };
    let whole: Vec<_> = Part::ALL.map(|part| model.part(1, part, &Pruned::dense()).unwrap()).into();
    for parts in [&whole[..1], &whole[1..], &whole[..]] {
        let members: Vec<Vec<usize>> =
            parts.iter().map(|part| (0..part.linears.len()).collect()).collect();
        let pass = || Pass::new(parts, &stream);
        run(Pass { probe: Some(Probe::new(&members, Needs::GRAM)), ..pass() });
        let targets = run(Pass { outputs: Outputs::Kept, ..pass() }).outputs;
        let probe = Some(Probe::new(&members, Needs::SQUARED_GRADIENT.or(Needs::GRAM)));
        run(Pass { targets: Targets::Outputs(&targets), probe, ..pass() });
        if let [_] = parts {
            let cache = Caching::Record(Recorded::All);
            let probe = Some(Probe::new(&members, Needs::INPUT_SQUARE));
            let known = run(Pass { probe, cache, ..pass() }).cache.unwrap();
            let (outputs, cache) = (Outputs::Kept, Caching::Use(&known));
            let again = run(Pass { outputs, cache, ..pass() }).outputs;
            let targets = Targets::Outputs(&targets);
            assert_eq!(run(Pass { targets, ..pass() }).loss.calibration, 0.0);
            drop(again);
        }
    }
}

#[test]
fn experts_that_are_not_held_give_the_same() {
    let ids = &Expected::read().ids()[0];
    for path in [MODEL, "tests/fixtures/stacked/mixtral", "tests/fixtures/logits/gpt-oss"] {
        let reader = Reader::open(Path::new(path)).unwrap();
        let model = || Model::new(&reader, Cpu::default()).unwrap();
        let mut pruned = Pruned::default();
        for linear in model().decoder.projections() {
            let mask = Mask::from_fn(linear.dims, |i| i % 3 != 0);
            pruned.masks.insert(linear.weight.clone(), mask);
        }
        let held = logits(&model(), &pruned, ids).unwrap();
        assert_eq!(held, logits(&model().with_held_experts(0), &pruned, ids).unwrap(), "{path}");
    }
}

/// Prunes the mixture with some settings; returns the report and the directory of the output.
fn pruned(dir: &Path, sets: &[&str]) -> (Value, String) {
    let here = std::env::current_dir().unwrap();
    let ids = Expected::read().ids();
    fs::write(dir.join("ids.json"), json!({ "token_ids": ids }).to_string()).unwrap();
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "model.path = '{}'\ncalibration.source = 'ids.json'\ncalibration.samples = 6\n\
         output.path = 'out'\nevaluate.generate = 0\n",
        here.join(MODEL).display()
    );
    fs::write(&recipe, text).unwrap();
    let recipe = recipe.display().to_string();
    let mut arguments = vec!["prune", &recipe, "--force"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let run = barber(&arguments);
    assert_eq!(run.status, 0, "{sets:?}: {}", run.stderr);
    let out = dir.join("out");
    let report = fs::read(out.join("barber-report.json")).unwrap();
    let (report, out) = (serde_json::from_slice(&report).unwrap(), out.display().to_string());
    let verified = barber(&["verify", &out]);
    assert_eq!(verified.status, 0, "{sets:?}: {}", verified.stderr);
    (report, out)
}

#[test]
fn every_stage_prunes_experts() {
    let dir = tempfile::tempdir().unwrap();
    for sets in [
        &["mask.init=magnitude", "refine=[]"][..],
        &["mask.init=sparsegpt", "refine=[]"],
        &["mask.init=wanda", "refine=[{ use = 'rebuild' }]", "sparsity.pattern=2:4"],
        &["preset=best", "sparsity.pattern=2:4", "calibration.held_out=2"],
        &["preset=best", "calibration.held_out=1"],
        &["refine=[{ use = 'swap' }, { use = 'reconstruct' }]", "mask.init=magnitude"],
        &["refine=[{ use = 'reconstruct', method = 'gradient', passes = 2 }]"],
        &["refine=[{ use = 'rebuild', alpha = 'auto' }]", "mask.passes=1"],
        &["refine=[{ use = 'end-to-end', steps = 4, tokens = 64, lambda = 5 }]"],
        &["sparsity.allocation=owl", "mask.init=wanda"],
        &["sparsity.allocation=error", "mask.init=wanda"],
        &["streams.statistics=dense", "refine=[{ use = 'swap' }]"],
        &["blocks=[{ name = 'third', layers = ['*.experts.3.*'] }]", "mask.init=wanda"],
        &["override=[{ tensors = ['*.experts.3.*'], ratio = 0.25 }]", "mask.init=wanda"],
    ] {
        let (report, out) = pruned(dir.path(), sets);
        let matrices = report["matrices"].as_array().unwrap();
        for matrix in matrices {
            let (tensor, kept) = (matrix["tensor"].as_str().unwrap(), &matrix["kept"]);
            let shape: Vec<u64> =
                matrix["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
            assert!(!tensor.contains("mlp.gate."), "{tensor}");
            let third = sets[0].starts_with("override") && tensor.contains(".experts.3.");
            let ratio = if third { 0.25 } else { 0.5 };
            let kept = kept.as_u64().unwrap() as f64 / (shape[0] * shape[1]) as f64;
            // The swaps of `best` move weights between matrices, too.
            let moved = ["sparsity.allocation", "preset=best"];
            let spread = if moved.iter().any(|of| sets[0].starts_with(of)) { 0.2 } else { 0.01 };
            assert!((kept + ratio - 1.0).abs() < spread, "{sets:?}: {tensor} {kept}");
        }
        let blocks = if sets[0].starts_with("blocks") { 6 } else { 2 * 16 };
        assert_eq!(matrices.len(), blocks, "{sets:?}");
        if sets != ["mask.init=magnitude", "refine=[]"] {
            let experts = report["experts"].as_array();
            let counted = sets[0].contains("end-to-end") || experts.is_some_and(|of| of.len() == 2);
            assert!(counted, "{sets:?}: {experts:?}");
        }
        // The shares of experts in the forecast are means; what `auto` tries, and when the steps of
        // `best` end, is not known before.
        if !["auto", "blocks", "best"].iter().any(|of| sets[0].contains(of)) {
            let [took, forecast] =
                ["operations", "least_operations"].map(|key| report[key].as_f64().unwrap());
            assert!(
                (forecast - took).abs() <= 0.1 * took,
                "{sets:?}: {forecast:.4e} of {took:.4e}"
            );
        }
        // The router keeps its bits.
        let (dense, sparse) = (util::tensors(Path::new(MODEL)), util::tensors(Path::new(&out)));
        let router = "model.layers.1.mlp.gate.weight";
        assert_eq!(dense[router], sparse[router]);
    }
}

/// The values of a tensor in bf16.
fn halves((_, shape, bytes): &util::Tensor) -> (Vec<usize>, Vec<f32>) {
    let values = bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
    (shape.clone(), values.collect())
}

#[test]
fn stacked_experts_are_pruned_one_by_one_and_stay_stacked() {
    for (name, module, experts) in
        [("mixtral", "mlp", 4), ("qwen2-moe", "mlp", 5), ("granitemoe", "block_sparse_moe", 5)]
    {
        let [apart, stacked] =
            ["logits", "stacked"].map(|dir| Path::new("tests/fixtures").join(dir).join(name));
        let ids: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 96).collect();
        let of = |dir: &Path| {
            let reader = Reader::open(dir).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            logits(&model, &Pruned::dense(), &ids).unwrap()
        };
        for (one, other) in of(&apart).iter().zip(of(&stacked)) {
            assert!((one - other).abs() < 1e-4, "{name}: {one} {other}");
        }

        let dir = tempfile::tempdir().unwrap();
        let path = format!("model.path={}", fs::canonicalize(&stacked).unwrap().display());
        let (report, out) = pruned(dir.path(), &[&path, "mask.init=wanda", "sparsity.pattern=2:4"]);
        let matrices = report["matrices"].as_array().unwrap();
        let third = format!("model.layers.1.{module}.experts.3.gate_up_proj.weight");
        assert!(matrices.iter().any(|matrix| matrix["tensor"] == third), "{matrices:?}");
        let (dense, sparse) = (util::tensors(&stacked), util::tensors(Path::new(&out)));
        assert!(dense.keys().eq(sparse.keys()), "{:?}", sparse.keys());
        for matrix in ["gate_up_proj", "down_proj"] {
            let tensor = format!("model.layers.0.{module}.experts.{matrix}");
            let [(shape, dense), (found, sparse)] =
                [&dense, &sparse].map(|of| halves(&of[&tensor]));
            assert!(shape == found && shape[0] == experts, "{shape:?} {found:?}");
            // Each matrix of each expert, by its inputs.
            for (dense, sparse) in dense.chunks(4).zip(sparse.chunks(4)) {
                assert_eq!(sparse.iter().filter(|weight| **weight == 0.0).count(), 2);
                assert!(dense.iter().zip(sparse).all(|(d, s)| *s == 0.0 || d == s));
            }
        }
        let listed = barber(&["inspect", &out]);
        assert_eq!(listed.status, 0, "{}", listed.stderr);
    }
}

/// Granite's own layout, and that of gpt-oss, which has the columns of a matrix one after the other.
#[test]
fn experts_stay_in_the_layout_of_their_family() {
    for (name, stacks, turned) in [
        ("granitemoe", ["block_sparse_moe.input_linear", "block_sparse_moe.output_linear"], false),
        ("gpt-oss", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], true),
    ] {
        let dense = Path::new("tests/fixtures/logits").join(name);
        let dir = tempfile::tempdir().unwrap();
        let path = format!("model.path={}", fs::canonicalize(&dense).unwrap().display());
        let (report, out) = pruned(
            dir.path(),
            &[&path, "preset=best", "sparsity.pattern=2:4", "calibration.held_out=1"],
        );
        assert_eq!(report["matrices"].as_array().unwrap().len(), 2 * (4 + 2 * 5));
        let (mut dense, sparse) = (util::tensors(&dense), util::tensors(Path::new(&out)));
        // Without the logits.
        dense.retain(|name, _| name.contains('.'));
        assert!(dense.keys().eq(sparse.keys()), "{:?}", sparse.keys());
        for stack in stacks {
            let tensor = format!("model.layers.1.{stack}{}", if turned { "" } else { ".weight" });
            let [(shape, dense), (found, sparse)] =
                [&dense, &sparse].map(|of| halves(&of[&tensor]));
            let [experts, rows, columns] = shape[..] else { panic!("{shape:?}") };
            assert!(shape == found && experts == 5, "{shape:?} {found:?}");
            // Four inputs of an output.
            for start in (0..dense.len()).filter(|at| turned || at % 4 == 0) {
                let step = if turned { columns } else { 1 };
                if turned && start / columns % rows % 4 != 0 {
                    continue;
                }
                let at = |values: &[f32]| [0, 1, 2, 3].map(|i| values[start + i * step]);
                let (dense, sparse) = (at(&dense), at(&sparse));
                let zeros = sparse.iter().filter(|weight| **weight == 0.0).count();
                assert_eq!(zeros, 2, "{tensor}: {sparse:?}");
                assert!(dense.iter().zip(sparse).all(|(d, s)| s == 0.0 || *d == s));
            }
        }
        // Nothing else changes: biases, sinks, routers, norms.
        let weights = ["_proj.weight", "_linear.weight", "_up_proj", "down_proj"];
        for (tensor, dense) in
            dense.iter().filter(|(name, _)| !weights.iter().any(|of| name.ends_with(of)))
        {
            assert_eq!(*dense, sparse[tensor], "{tensor}");
        }
        let listed = barber(&["inspect", &out, "--tensors"]);
        assert!(listed.status == 0 && listed.stdout.contains("2:4"), "{}", listed.stdout);
    }
}

#[test]
fn every_projection_of_latent_attention_is_pruned() {
    let dense = Path::new("tests/fixtures/logits/deepseek-v3");
    let path = format!("model.path={}", fs::canonicalize(dense).unwrap().display());
    let dir = tempfile::tempdir().unwrap();
    for sets in [
        &["preset=best", "calibration.held_out=1"][..],
        &["mask.init=sparsegpt", "refine=[{ use = 'rebuild' }, { use = 'reconstruct' }]"],
    ] {
        let (report, out) = pruned(dir.path(), &[&[&*path], sets].concat());
        // Of the first layer an MLP, of the second eight experts and a shared one.
        let matrices = report["matrices"].as_array().unwrap();
        assert_eq!(matrices.len(), 2 * 5 + 3 + 3 * 9);
        let (dense, sparse) = (util::tensors(dense), util::tensors(Path::new(&out)));
        for matrix in matrices {
            let (rows, columns) = (&matrix["shape"][0], &matrix["shape"][1]);
            let all = rows.as_f64().unwrap() * columns.as_f64().unwrap();
            let kept = matrix["kept"].as_f64().unwrap() / all;
            assert!((0.3..0.7).contains(&kept), "{matrix}");
        }
        let [took, forecast] =
            ["operations", "least_operations"].map(|key| report[key].as_f64().unwrap());
        let close = sets[0] == "preset=best" || (forecast - took).abs() <= 0.1 * took;
        assert!(close, "{forecast:.4e} of {took:.4e}");
        for fixed in [
            "mlp.gate.weight",
            "mlp.gate.e_score_correction_bias",
            "self_attn.kv_a_layernorm.weight",
        ] {
            let name = format!("model.layers.1.{fixed}");
            assert_eq!(dense[&name], sparse[&name], "{name}");
        }
    }
}

/// An expert that the calibration samples miss is named, and counted in the report.
#[test]
fn experts_with_few_tokens_are_named() {
    let of = |tokens: &[usize]| {
        let (layer, experts) = (0, "layers.0.experts".into());
        ExpertReport { layer, experts, tokens: tokens.into() }.few()
    };
    assert_eq!(of(&[40, 32]), None);
    assert_eq!(
        of(&[40, 3, 0]).unwrap(),
        "`layers.0.experts.*`: experts 1, 2 saw fewer than 32 calibration tokens (3, 0): pruned by \
         the mean statistics of the layer's experts; more calibration samples would help"
    );
}

#[test]
fn an_expert_without_tokens_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (report, _) = pruned(dir.path(), &["calibration.samples=1", "mask.init=wanda"]);
    let tokens = &report["experts"][0]["tokens"];
    assert_eq!(tokens.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>(), 96);
    let page = fs::read_to_string(dir.path().join("out/barber-report.html")).unwrap();
    assert!(page.contains("saw fewer than 32") && page.contains("model.layers.0.mlp.experts.0"));
}
