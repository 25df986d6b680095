//! What must not depend on where samples wait, on how often they pass the layers, or on threads.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::path::Path;

use barber_metric::registered;
use dfdx::tensor::Cpu;
use llm_barber::{
    checkpoint::{Masks, Pruned, Reader},
    dtype::Dtype,
    executor::{Executor, Storage},
    mask::{Init, Pattern, Scope},
    model::Model,
    plan::{Plan, Rule},
    prune::{
        Alpha, Event, InitialMasks, Rebuild, Refine, Refinement, Sampled, Side, initial_masks,
        refine,
    },
    run::ScratchDir,
};
use util::{barber, calibration_samples, flat, recipe, tensors};

/// The masks of a tiny model, and the errors of its groups before and after.
fn masks(name: &str, init: &str, storage: Storage, passes: usize) -> (Masks, Vec<[f64; 2]>) {
    let reader = Reader::open(&Path::new("tests/conformance").join(name)).unwrap();
    let executor = Executor { storage, ..Executor::from(Cpu::default()) };
    let model: Model<'_, Cpu> = Model::new(&reader, executor).unwrap();
    let rule = Rule { pattern: Pattern::UNSTRUCTURED, ratio: 0.5, count: None, scope: None };
    let plan = Plan::new(&model.decoder, &[], |_| Some(rule)).unwrap();
    let samples = calibration_samples(&reader);
    let scratch = tempfile::tempdir().unwrap();
    let init = InitialMasks {
        init: Init::named(init).unwrap(),
        metric: (&[], None),
        sparse: None,
        side: Side::Sparse,
        dtype: None,
        scratch: scratch.path(),
    };
    let metric = registered().unwrap()["weight-gradient"];
    let stage = Refine::Rebuild(Rebuild {
        alpha: Alpha::Fraction(0.2),
        scope: Scope::Layer,
        ..Rebuild::default()
    });
    let pipeline = [(metric.name.into(), metric.build(Default::default()).unwrap())];
    let samples = Sampled::from(&samples[..]);
    let mut errors = Vec::new();
    let mut event = |event: Event<'_>| {
        if let Event::Group(group) = event {
            errors.push(group.errors().unwrap().map(|loss| loss.calibration));
        }
    };
    let single = passes == 1;
    let initial = if single {
        Pruned::default()
    } else {
        initial_masks(&model, &plan, &init, samples, Pruned::default(), &mut |_: Event<'_>| ())
            .unwrap()
    };
    let settings = Refinement {
        stages: &[stage],
        pipeline: &pipeline,
        blend: 0.0,
        statistics: Side::Sparse,
        initial: single.then_some(init),
        dtype: None,
        scratch: scratch.path(),
    };
    let pruned = refine(&model, &plan, &settings, samples, initial, &mut event);
    (pruned.unwrap().masks, errors)
}

fn storage(dtype: Dtype, memory: u64) -> Storage {
    Storage::new(dtype, memory, ScratchDir::new(std::env::temp_dir()))
}

#[test]
fn a_scratch_file_changes_nothing() {
    for name in ["tiny-llama", "tiny-opt"] {
        for passes in [1, 2] {
            let expected = masks(name, "wanda", Storage::default(), passes);
            assert_eq!(masks(name, "wanda", storage(Dtype::F32, 0), passes), expected);
        }
    }
}

#[test]
fn half_precision_changes_little() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let (expected, _) = masks("tiny-llama", "wanda", Storage::default(), 2);
        let (found, _) = masks("tiny-llama", "wanda", storage(dtype, 1 << 30), 2);
        for (name, expected) in expected {
            let pairs = expected.to_bools().into_iter().zip(found[&name].to_bools());
            let differ = pairs.filter(|(a, b)| a != b).count();
            assert!(differ * 50 < expected.dims().len(), "{name}: {differ}");
            assert_eq!(expected.kept(), found[&name].kept());
        }
    }
}

#[test]
fn one_pass_starts_as_two_do() {
    // Before the first group everything is dense: both passes measure the same there. Known outputs
    // must not change what is measured.
    for init in ["wanda", "magnitude"] {
        let (two, errors_of_two) = masks("tiny-llama", init, Storage::default(), 2);
        let (one, errors_of_one) = masks("tiny-llama", init, Storage::default(), 1);
        assert_eq!(errors_of_one[0], errors_of_two[0]);
        let first = "model.layers.0.self_attn.q_proj.weight";
        assert_eq!(one[first], two[first]);
        for (name, mask) in one {
            assert_eq!(mask.kept(), two[&name].kept(), "{name}");
        }
    }
}

#[test]
fn threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let outputs = ["1", "2", "3"].map(|threads| {
        let out = dir.path().join(threads);
        let mut command = util::command(Path::new(env!("CARGO_BIN_EXE_barber")));
        command.env("RAYON_NUM_THREADS", threads).args(["prune", &recipe]);
        command.arg("--set").arg(format!("output.path={}", out.display()));
        let stages = "refine=[{ use = 'swap', scope = 'layer' }, { use = 'rebuild' }, \
                      { use = 'reconstruct' }, { use = 'reconstruct', method = 'gradient' }]";
        for set in ["mask.init=wanda", "mask.passes=1", "streams.blend=0.3", stages] {
            command.args(["--set", set]);
        }
        assert_eq!(util::output(&mut command).status, 0);
        tensors(&out)
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0], outputs[2]);
}

/// Runs on processors without AVX-512, and without AVX2 either, in the emulator of Debian's
/// qemu-user.
#[cfg(target_arch = "x86_64")]
#[test]
#[ignore = "needs qemu-x86_64"]
fn older_processors_do_the_same() {
    let emulator = Path::new("qemu-x86_64");
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let prune = |program: &Path, arguments: &[&str], name: &str| {
        let mut command = util::command(program);
        let set = format!("output.path={}", dir.path().join(name).display());
        command.args(arguments).args(["prune", &recipe, "--set", "mask.init=wanda", "--set", &set]);
        let run = util::output(&mut command);
        assert_eq!(run.status, 0, "{name}: {}", run.stderr);
        tensors(&dir.path().join(name))
    };
    let barber = env!("CARGO_BIN_EXE_barber");
    let native = prune(Path::new(barber), &[], "native");
    for processor in ["Haswell", "Nehalem"] {
        let found = prune(emulator, &["-cpu", processor, barber], processor);
        for (name, (_, _, bytes)) in &native {
            let pairs = bytes.chunks(4).zip(found[name].2.chunks(4));
            let differ = pairs.filter(|(a, b)| a != b).count();
            assert!(differ * 100 <= bytes.len(), "{processor}, {name}: {differ}");
        }
    }
}

#[test]
fn what_the_executor_cannot_do_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    for (set, expected) in [
        ("executor.memory=1 MB", "executor.memory is too little"),
        ("executor.memory=much", "executor.memory"),
        ("executor.device=gpu", "unknown device `gpu`"),
        ("executor.stream_dtype=f8", "executor.stream_dtype"),
        ("mask.passes=3", "must be 1 or 2, got 3"),
        #[cfg(not(feature = "cuda"))]
        ("executor.device=cuda:0", "built without CUDA"),
    ] {
        let run = barber(&["prune", &recipe, "--set", set]);
        assert_eq!(run.status, 2, "{set}: {}", run.stderr);
        assert!(flat(&run.stderr).contains(expected), "{set}: {}", run.stderr);
        assert!(!dir.path().join("out").exists());
    }
}
