//! What the end-to-end tests share: running the binary, and small checkpoints.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use llm_barber::{
    calibration::{Samples, Selection, Tokens, samples},
    checkpoint::Reader,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

/// The tiny LLaMA of the conformance tests: f32, one file, no tokenizer.
pub(crate) const TINY: &str = "tests/conformance/tiny-llama";

/// The 8 × 48 tokens that the conformance tests' tiny checkpoints are calibrated on.
pub(crate) fn calibration_samples(reader: &Reader) -> Vec<Vec<u32>> {
    let wanted = Samples {
        count: 8,
        held_out: 0,
        sequence_length: 48,
        seed: 0,
        selection: Selection::Sequential,
    };
    let ids = Path::new("tests/conformance/calibration.json");
    let tokens = Tokens::of(reader.path(), 256, false);
    samples(&ids.into(), wanted, &tokens).unwrap()
}

/// The GPU that `BARBER_TEST_DEVICE` names, such as `cuda:0`: tests that are generic over the device
/// run on it too.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<dfdx::tensor::Cuda> {
    let name = std::env::var("BARBER_TEST_DEVICE").ok()?;
    let number = name.strip_prefix("cuda:")?.parse().unwrap();
    Some(
        llm_barber::executor::cuda(
            number,
            Default::default(),
            llm_barber::ranks::Ranks::ONE.neighbours(),
        )
        .unwrap()
        .0,
    )
}

/// What a run of the program printed, and its exit status.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A command that the environment does not change.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let shown = name.to_string_lossy().to_uppercase();
        let ours = shown == "COLUMNS" || shown.starts_with("BARBER_");
        if ours || shown.starts_with("HF_") || shown.ends_with("_PROXY") {
            command.env_remove(name);
        }
    }
    command
}

pub(crate) fn run(program: &Path, arguments: &[&str]) -> Run {
    output(command(program).args(arguments))
}

/// Runs a command to its end.
pub(crate) fn output(command: &mut Command) -> Run {
    let Output { status, stdout, stderr } = command.env("NO_COLOR", "1").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { status: status.code().unwrap(), stdout: text(stdout), stderr: text(stderr) }
}

pub(crate) fn barber(arguments: &[&str]) -> Run {
    run(Path::new(env!("CARGO_BIN_EXE_barber")), arguments)
}

/// A message without the line breaks and borders of its layout.
pub(crate) fn flat(message: &str) -> String {
    message.replace(['│', '╰', '─', '×'], " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A recipe that magnitude-prunes and rebuilds the tiny LLaMA, with `extra` lines before.
pub(crate) fn recipe(dir: &Path, extra: &str) -> String {
    let here = std::env::current_dir().unwrap();
    let path = dir.join("recipe.toml");
    let text = format!(
        "{extra}
[model]
path = '{model}'
[calibration]
source = '{calibration}'
samples = 4
[mask]
init = 'magnitude'
[[refine]]
use = 'rebuild'
scope = 'layer'
alpha = 0.2
[output]
path = 'out'
",
        model = here.join(TINY).display(),
        calibration = here.join("tests/conformance/calibration.json").display(),
    );
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// A tensor's format, shape and bytes.
pub(crate) type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// All tensors of a directory's safetensors files.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(all.insert(name, tensor).is_none());
            }
        }
    }
    all
}

/// Writes one safetensors file.
pub(crate) fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A copy of the tiny LLaMA whose tensors and configuration a test may change.
pub(crate) fn tiny(
    dir: &Path,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value),
) -> String {
    let model = dir.join("model");
    fs::create_dir_all(&model).unwrap();
    let mut tensors = tensors(Path::new(TINY));
    let config = fs::read(Path::new(TINY).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut tensors, &mut config);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    write(&model.join("model.safetensors"), &tensors);
    format!("model.path={}", model.display())
}

/// Copies the checkpoint of a fixture of tests/fixtures/logits to a new directory; returns that.
pub(crate) fn copy_fixture(fixture: &str, to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(Path::new("tests/fixtures/logits").join(fixture)).unwrap() {
        let (path, name) = file.map(|file| (file.path(), file.file_name())).unwrap();
        if name != "expected.safetensors" {
            fs::copy(path, to.join(name)).unwrap();
        }
    }
    to.to_owned()
}
