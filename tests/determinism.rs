//! What a model's result must not depend on: how its tensors are spread over files, in which order,
//! in which of the formats that hold the same values, and on how many threads it is made.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;
use util::{Tensor, command, output, recipe, tensors, write};

/// The tiny LLaMA with weights that all formats hold exactly.
fn values() -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let exact = |bytes: &[u8]| {
        let value = bf16::from_f32(f32::from_le_bytes(bytes.try_into().unwrap())).to_f32();
        let half = f16::from_f32(value).to_f32();
        if half == value { value } else { 0.0 }
    };
    let all = tensors(Path::new(util::TINY)).into_iter();
    all.map(|(name, (_, shape, bytes))| (name, (shape, bytes.chunks(4).map(exact).collect())))
        .collect()
}

/// A tensor in a format.
fn stored(dtype: Dtype, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|&value| match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    });
    (dtype, shape.to_vec(), bytes.collect())
}

/// The values of a tensor.
fn loaded((dtype, _, bytes): &Tensor) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => {
            bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        Dtype::F16 => {
            bytes.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        _ => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
    }
}

/// On the GPU that `BARBER_TEST_DEVICE` names: the same bytes again, and the CPU's masks but for
/// what rounding decides.
#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a GPU in BARBER_TEST_DEVICE"]
fn a_gpu_gives_the_same_again() {
    let gpu = std::env::var("BARBER_TEST_DEVICE").expect("BARBER_TEST_DEVICE is not set");
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let results = [&gpu, &gpu, "cpu"].map(|device| {
        let out = dir.path().join(device.replace(':', " "));
        let out = if out.exists() { out.with_extension("again") } else { out };
        let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
        command.args(["prune", &recipe, "--set", "mask.init=wanda"]);
        command.args(["--set", "refine=[{ use = 'swap' }, { use = 'rebuild' }]"]);
        command.arg("--set").arg(format!("output.path={}", out.display()));
        command.arg("--set").arg(format!("executor.device={device}"));
        let run = output(&mut command);
        assert_eq!(run.status, 0, "{}", run.stderr);
        tensors(&out)
    });
    assert!(results[0] == results[1]);
    let values = |i: usize| -> Vec<f32> { results[i].values().flat_map(loaded).collect() };
    let (gpu, cpu) = (values(0), values(2));
    let differ = gpu.iter().zip(&cpu).filter(|(a, b)| a != b).count();
    assert!(differ * 100 < gpu.len(), "{differ} of {} weights differ", gpu.len());
}

#[test]
fn neither_formats_nor_files_nor_threads_change_the_result() {
    let values = values();
    let kept = values.values().flat_map(|(_, values)| values).filter(|value| **value != 0.0);
    assert!(kept.count() > 50_000);
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let mut results = Vec::new();
    // The file of each tensor, by its number: all in one, alternately, or the last ones first.
    let spreads: [fn(usize) -> usize; 3] = [|_| 0, |i| i % 3, |i| usize::from(i < 9)];
    let formats = [Dtype::F32, Dtype::F16, Dtype::BF16];
    let cases = [(0, 0, "1"), (1, 0, "2"), (2, 0, "3"), (0, 1, "2"), (2, 1, "1"), (1, 2, "3")];
    for (i, (format, spread, threads)) in cases.into_iter().enumerate() {
        let model = dir.path().join(format!("model {i}"));
        fs::create_dir(&model).unwrap();
        fs::copy(Path::new(util::TINY).join("config.json"), model.join("config.json")).unwrap();
        let mut files: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
        let mut map = serde_json::Map::new();
        for (number, (name, (shape, values))) in values.iter().enumerate() {
            let file = format!("model-{}.safetensors", spreads[spread](number));
            map.insert(name.clone(), file.clone().into());
            let tensor = stored(formats[format], shape, values);
            files.entry(file).or_default().insert(name.clone(), tensor);
        }
        files.iter().for_each(|(file, tensors)| write(&model.join(file), tensors));
        let index = json!({ "metadata": {}, "weight_map": map });
        fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();

        let out = dir.path().join(format!("out {i}"));
        let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
        command.env("RAYON_NUM_THREADS", threads).args(["prune", &recipe]);
        for (key, path) in [("model.path", &model), ("output.path", &out)] {
            command.arg("--set").arg(format!("{key}={}", path.display()));
        }
        let stages = "refine=[{ use = 'swap', scope = 'layer' }, { use = 'rebuild' }]";
        for set in ["mask.init=wanda", "streams.blend=0.3", stages] {
            command.args(["--set", set]);
        }
        let run = output(&mut command);
        assert_eq!(run.status, 0, "{}", run.stderr);
        let found: Vec<_> = tensors(&out).iter().map(|(n, t)| (n.clone(), loaded(t))).collect();
        results.push(found);
    }
    let zeros = results[0].iter().flat_map(|(_, values)| values).filter(|value| **value == 0.0);
    assert!(zeros.count() > 10_000);
    for (result, case) in results.iter().zip(cases) {
        assert!(*result == results[0], "{case:?}");
    }
}
