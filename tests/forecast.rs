//! What is forecast is what is taken: a pass's operations, and a run's operations and memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use barber_metric::Needs;
use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Pruned, Reader},
    executor::{
        Beside, Caching, Found, Outputs, PartWeights, Pass, Probe, Recorded, Side, Targets,
        ops::{Products, SparseProduct},
    },
    family::Part,
    mask::Mask,
    model::Model,
};
use serde_json::Value;
use util::barber;

#[test]
fn a_pass_takes_the_operations_of_its_shape() {
    let reader = Reader::open(Path::new("recipes/quickstart/model")).unwrap();
    let model = Model::new(&reader, Cpu::default()).unwrap();
    let mut pruned = Pruned::default();
    for linear in model.decoder.projections() {
        let mask = Mask::from_fn(linear.dims, |i| i % 3 != 0);
        pruned.masks.insert(linear.weight.clone(), mask);
    }
    let parts = |pruned: &Pruned| -> Vec<PartWeights<Cpu>> {
        Part::ALL.iter().map(|part| model.part(1, *part, pruned).unwrap()).collect()
    };
    let (dense, sparse) = (parts(&Pruned::dense()), parts(&pruned));
    let samples: Vec<Vec<u32>> = (0..5).map(|i| (i..i + 40).collect()).collect();
    let stream = || model.embed(&samples, 2).unwrap();
    let (executor, on_sparse, on_dense) = (&model.executor, stream(), stream());
    let run = |pass: Pass<'_, Cpu>| -> Found<Cpu> {
        let expected = pass.shape().operations();
        let before = Products::so_far().operations;
        let found = executor.run(pass).unwrap();
        let took = (Products::so_far().operations - before) as f64;
        assert!((took - expected).abs() < 1.0, "{took} {expected}");
        found
    };
    let all = Needs::SQUARED_GRADIENT.or(Needs::INPUT_VARIANCE).or(Needs::GRAM);
    for parts in [0..1, 1..2, 0..2] {
        let (dense, sparse) = (&dense[parts.clone()], &sparse[parts]);
        let members: Vec<Vec<usize>> =
            dense.iter().map(|part| (1..part.linears.len()).collect()).collect();
        let pass = || Pass::new(dense, &on_sparse);
        let outputs = || Outputs::Kept;
        run(pass());
        for needs in [Needs::INPUT_SQUARE, Needs::INPUT_VARIANCE, Needs::GRAM] {
            run(Pass { probe: Some(Probe::new(&members, needs)), ..pass() });
        }
        let targets = run(Pass { outputs: outputs(), ..Pass::new(sparse, &on_sparse) }).outputs;
        let probe = Some(Probe { members: &members, needs: all, gradient: false });
        run(Pass { targets: Targets::Outputs(&targets), probe, ..pass() });
        let gradient = Some(Probe { members: &members, needs: Needs::NOTHING, gradient: true });
        let (runs, towards) = (Some(0..1), Targets::Outputs(&targets));
        run(Pass { runs, targets: towards, probe: gradient, ..pass() });
        let (runs, towards) = (Some(1..2), Targets::Outputs(&targets));
        run(Pass { runs, targets: towards, ..pass() });
        for side in [Side::Dense, Side::Sparse] {
            let beside = Some(Beside { stream: &on_dense, side });
            let probe = Some(Probe::new(&members, Needs::GRAM));
            run(Pass { beside, outputs: outputs(), probe, ..pass() });
        }
        let [part] = sparse else { continue };
        let probe_inputs = Some(Probe::new(&members, Needs::INPUT_SQUARE));
        let cache = Caching::Record(Recorded::All);
        let known = run(Pass { probe: probe_inputs, cache, ..pass() }).cache.unwrap();
        let cache = Caching::Use(&known);
        run(Pass { targets: Targets::Replaced(targets), probe, cache, ..pass() });
        let cache = Caching::Record(Recorded::First);
        let found = run(Pass { outputs: outputs(), cache, ..Pass::new(sparse, &on_sparse) });
        let mut known = found.cache.unwrap();
        let changes: Vec<_> = part
            .linears
            .iter()
            .map(|of| {
                let dims = (of.outputs(), of.inputs());
                Some(executor.device.entries(Vec::new(), dims).unwrap())
            })
            .collect();
        let cache = Caching::Correct(&mut known, &changes);
        run(Pass { cache, ..Pass::advancing(sparse, &mut stream()) });
        let outputs = Outputs::Known(&found.outputs);
        run(Pass { outputs, ..Pass::advancing(sparse, &mut stream()) });
    }
}

/// Runs a recipe with some settings, and compares what it took with what `check` forecasts. Returns
/// the bytes of memory of the forecast and of the report, where the system says it.
fn compared(recipe: &str, sets: &[&str]) -> Option<[f64; 2]> {
    let dir = tempfile::tempdir().unwrap();
    let out = format!("output.path={}", dir.path().join("out").display());
    // What generation takes is not forecast.
    let mut arguments = vec![recipe, "--json", "--set", &out, "--set", "evaluate.generate=0"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let json = |command: &[&str]| -> Value {
        let run = barber(&[command, &arguments].concat());
        assert_eq!(run.status, 0, "{sets:?}: {}", run.stderr);
        serde_json::from_str(&run.stdout).unwrap()
    };
    let (check, report) = (json(&["check"]), json(&["prune", "--save-every", "never"]));
    // The configuration alone tells as much.
    let plan = json(&["plan", "--ranks", "1"]);
    assert_eq!(plan["operations"], check["operations"], "{sets:?}");
    let number = |value: &Value| value.as_f64().unwrap();
    let operations = &check["operations"];
    let forecast = number(&operations["pruning"]) - number(&operations["solving"]);
    assert_eq!(number(&report["least_operations"]), forecast);
    let took = number(&report["operations"]);
    assert!((forecast / took - 1.0).abs() < 0.05, "{sets:?}: {forecast:.4e} of {took:.4e}");
    let memory = number(&check["memory"]) + number(&check["waiting"]);
    let of_rank = &plan["ranks"][0];
    assert_eq!(number(&of_rank["memory"]), memory);
    let of_first = number(&of_rank["operations"]["passes"]);
    assert!((of_first / forecast - 1.0).abs() < 1e-9, "{sets:?}: {of_first:.4e} {forecast:.4e}");
    assert_eq!(of_rank["sent"]["all"], 0.0);
    let most = report["memory"].as_object().unwrap().values().map(number).reduce(f64::max);
    most.map(|most| [memory, most])
}

/// What `check` says of operations and memory is what the run takes.
#[test]
fn a_run_takes_what_was_forecast() {
    for sets in [
        &[][..],
        &["mask.init=wanda", "mask.passes=1"],
        &["preset=best", "refine=[{ use = 'swap' }]"],
        &["mask.init=sparsegpt", "refine=[{ use = 'reconstruct' }]", "calibration.held_out=8"],
        &["mask.init=wanda", "sparsity.allocation=owl", "refine=[{ use = 'swap' }]"],
        &[
            "mask.init=wanda",
            "calibration.samples=64",
            "evaluate.perplexity=[]",
            "refine=[{ use = 'end-to-end', steps = 4, tokens = 4096, lambda = 5 }]",
        ],
        &[
            "mask.init=wanda",
            "calibration.samples=64",
            "evaluate.perplexity=[]",
            "refine=[{ use = 'distill', steps = 4, tokens = 4096, step_size = 1e-4 }]",
        ],
    ] {
        let Some([forecast, took]) = compared("recipes/quickstart.toml", sets) else { continue };
        // The kernels' own buffers are of a few megabytes, and differ between processors.
        let off = (forecast - took).abs();
        assert!(off < 0.15 * took || off < 5e6, "{sets:?}: {forecast:.3e} of {took:.3e} bytes");
    }
}

/// The operations of every stage, and of what else changes the passes.
#[test]
fn short_runs_take_what_was_forecast() {
    let short =
        ["calibration.samples=8", "calibration.sequence_length=64", "evaluate.perplexity=[]"];
    let swap = "refine=[{ use = 'swap' }]";
    for sets in [
        &["mask.init=magnitude"][..],
        &["mask.init=wanda"],
        &["mask.init=wanda", "mask.passes=1"],
        &["mask.init=wanda", "refine=[]"],
        &["mask.init=sparsegpt", "refine=[]"],
        &["mask.init=sparsegpt", "mask.passes=1", "refine.0.retain=true"],
        &["mask.init=alps", "refine=[]"],
        &["mask.init=wanda", "calibration.held_out=3"],
        &["refine.0.gradient=sparse"],
        &["refine.0.gradient=sparse", "streams.blend=0.5"],
        &["streams.blend=0.5"],
        &["executor.stream_dtype=bf16"],
        &["mask.init=wanda", swap],
        &["mask.init=wanda", "mask.passes=1", swap, "streams.blend=0.3", "calibration.held_out=2"],
        &["mask.init=wanda", "refine=[{ use = 'swap' }, { use = 'reconstruct' }]"],
        &["mask.init=wanda", "refine=[{ use = 'rebuild' }, { use = 'swap' }]", "mask.passes=1"],
        &["refine=[{ use = 'reconstruct', method = 'gradient', passes = 2 }]"],
        &[
            "blocks=[{ name = 'a', layers = ['q_proj', 'k_proj'] }, { name = 'b', layers = ['v_proj'] }]",
        ],
        &[
            "blocks=[{ name = 'a', layers = ['o_proj', 'up_proj'] }]",
            "mask.init=wanda",
            "mask.passes=1",
        ],
        &["mask.init=wanda", "sparsity.allocation=error", swap],
        &["sparsity.pattern=2:4", "sparsity.permute=true", "calibration.held_out=2", swap],
        &["metric=[{ use = 'hessian-diagonal' }]"],
        // Few enough steps for all of them to be made.
        &["mask.init=wanda", "refine=[{ use = 'end-to-end', steps = 12, lambda = 5 }]"],
        &[
            "mask.init=wanda",
            "calibration.held_out=3",
            "refine=[{ use = 'swap' }, { use = 'end-to-end', steps = 4, tokens = 144, lambda = 5 }]",
        ],
        &["mask.init=wanda", "refine=[{ use = 'distill', steps = 12, step_size = 1e-4 }]"],
    ] {
        compared("recipes/quickstart.toml", &[&short[..], sets].concat());
    }
}
