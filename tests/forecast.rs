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
    for linear in model.decoder.linears() {
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
    let all = Needs::SQUARED_GRADIENT.or(Needs::INPUT_SQUARE).or(Needs::GRAM);
    for parts in [0..1, 1..2, 0..2] {
        let (dense, sparse) = (&dense[parts.clone()], &sparse[parts]);
        let members: Vec<Vec<usize>> =
            dense.iter().map(|part| (1..part.linears.len()).collect()).collect();
        let pass = || Pass::new(dense, &on_sparse);
        let outputs = || Outputs::Kept;
        run(pass());
        for needs in [Needs::INPUT_SQUARE, Needs::GRAM] {
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

/// What `check` forecasts for the quickstart's model is what a run's report says.
#[test]
fn a_run_takes_what_check_says() {
    let dir = tempfile::tempdir().unwrap();
    let out = format!("output.path={}", dir.path().join("out").display());
    let number = |value: &Value| value.as_f64().unwrap();
    for sets in [
        &[][..],
        &["mask.init=wanda", "mask.passes=1", "refine=[{ use = 'rebuild' }]"],
        &["preset=best", "refine=[{ use = 'swap' }]"],
        &["mask.init=sparsegpt", "refine=[{ use = 'reconstruct' }]", "calibration.held_out=8"],
        &["mask.init=wanda", "sparsity.allocation=owl", "refine=[{ use = 'swap' }]"],
    ] {
        let mut arguments = vec!["recipes/quickstart.toml", "--json", "--set", &out];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let json = |command: &[&str]| -> Value {
            let run = barber(&[command, &arguments].concat());
            assert_eq!(run.status, 0, "{sets:?}: {}", run.stderr);
            serde_json::from_str(&run.stdout).unwrap()
        };
        let check = json(&["check"]);
        let report = json(&["prune", "--force", "--save-every", "never"]);
        let operations = &check["operations"];
        let forecast = number(&operations["pruning"]) - number(&operations["solving"]);
        let took = number(&report["operations"]);
        let off = forecast / took - 1.0;
        eprintln!("{sets:?}: operations {off}");
        let memory = number(&check["memory"]) + number(&check["waiting"]);
        for (phase, value) in report["memory"].as_object().unwrap() {
            eprintln!("    {phase}: {}", number(value) / memory);
        }
        assert!(off.abs() < 0.05, "{sets:?}: {forecast:.4e} of {took:.4e}");
    }
}
