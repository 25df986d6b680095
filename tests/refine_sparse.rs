//! `mask.init = "none"` with `model.dense`: the masks of a sparse checkpoint are refined towards the
//! dense model that it was made of.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use util::{Run, Tensor, barber, flat, recipe, tensors, write};

/// A directory with the tiny LLaMA pruned by magnitude in `sparse`, and a recipe that names both.
struct Place {
    dir: tempfile::TempDir,
    recipe: String,
}

const STAGES: &str = "refine=[{ use = 'rebuild', scope = 'group' }, { use = 'swap' }]";

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path(), "");
        let place = Self { dir, recipe };
        let sparse = format!("output.path={}", place.path("sparse").display());
        let run = barber(&["prune", &place.recipe, "--set", &sparse, "--set", "refine=[]"]);
        assert_eq!(run.status, 0, "{}", run.stderr);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Refines the masks of what is in a directory.
    fn refine(&self, from: &str, more: &[&str]) -> Run {
        let path = format!("model.path={}", self.path(from).display());
        let mut arguments = vec!["prune", &self.recipe, "--json", "--set", &path];
        arguments.extend(["--set", "mask.init=none", "--set", STAGES, "--force"]);
        more.iter().for_each(|set| arguments.extend(["--set", set]));
        barber(&arguments)
    }

    /// Writes the sparse checkpoint once more, otherwise.
    fn change(&self, to: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value)) {
        let sparse = self.path("sparse");
        let mut of = tensors(&sparse);
        let config = fs::read(sparse.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        change(&mut of, &mut config);
        let to = self.path(to);
        fs::create_dir(&to).unwrap();
        fs::write(to.join("config.json"), config.to_string()).unwrap();
        write(&to.join("model.safetensors"), &of);
    }
}

/// `model.dense` of the tiny LLaMA.
fn dense() -> String {
    let here = std::env::current_dir().unwrap();
    format!("model.dense={}", here.join(util::TINY).display())
}

fn zeros((_, _, bytes): &Tensor) -> usize {
    bytes.chunks(4).filter(|weight| **weight == [0; 4]).count()
}

#[test]
fn masks_of_a_sparse_checkpoint_are_refined_with_the_dense_weights() {
    let place = Place::new();
    let run = place.refine("sparse", &[&dense()]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(!run.stderr.contains("dense model's"), "{}", run.stderr);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let [sparse, refined, whole] =
        [place.path("sparse"), place.path("out"), util::TINY.into()].map(|dir| tensors(&dir));
    let mut came_back = 0;
    // The weights of a group compete, whichever matrix they are in.
    let all = |of: &BTreeMap<String, Tensor>| of.values().map(zeros).sum::<usize>();
    assert_eq!(all(&refined), all(&sparse));
    for name in refined.keys() {
        let weights = |of: &BTreeMap<String, Tensor>| {
            of[name].2.chunks(4).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        for ((new, old), dense) in
            weights(&refined).into_iter().zip(weights(&sparse)).zip(weights(&whole))
        {
            assert!(new == dense || new == [0; 4], "{name}");
            came_back += usize::from(old == [0; 4] && new != [0; 4]);
        }
    }
    assert!(came_back > 100, "{came_back}");
    for group in report["groups"].as_array().unwrap() {
        let stages = group["stages"].as_array().unwrap();
        let [before, after] = [&stages[0]["before"], &stages[1]["after"]]
            .map(|loss| loss["calibration"].as_f64().unwrap());
        assert!(0.0 < after && after < before, "{before} {after}");
    }
    // The report knows both models, and the result is verified and made again by it.
    let inputs = report["inputs"].as_object().unwrap();
    for dir in [place.path("sparse"), std::path::absolute(util::TINY).unwrap()] {
        for file in ["config.json", "model.safetensors"] {
            let path = dir.join(file);
            assert!(inputs.contains_key(path.to_str().unwrap()), "{}", path.display());
        }
    }
    let out = place.path("out").display().to_string();
    for command in ["verify", "reproduce"] {
        let run = barber(&[command, &out]);
        assert_eq!(run.status, 0, "{command}: {}{}", run.stdout, run.stderr);
    }
    let card = fs::read_to_string(place.path("out").join("README.md")).unwrap();
    assert!(card.starts_with("---\n") && card.contains("# tiny-llama, "), "{card}");
    assert!(card.contains("- Initial mask: the zeros of sparse\n"), "{card}");
    // A changed sparse checkpoint is no longer what the run read.
    let weights = place.path("sparse").join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_eq!(barber(&["verify", &out]).status, 1);
}

#[test]
fn what_the_sparse_checkpoint_changed_is_counted() {
    let place = Place::new();
    place.change("changed", |tensors, _| {
        let (_, _, bytes) = tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap();
        let kept = bytes.chunks_mut(4).filter(|weight| **weight != [0; 4]).take(3);
        kept.for_each(|weight| weight[0] ^= 1);
        // A zero with a sign is one.
        let zero = bytes.chunks_mut(4).find(|weight| **weight == [0; 4]).unwrap();
        zero[3] = 0x80;
        let (_, _, norm) = tensors.get_mut("model.norm.weight").unwrap();
        norm[..8].fill(0);
    });
    let run = place.refine("changed", &[&dense(), "refine=[]"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let said = flat(&run.stderr);
    assert!(
        said.contains("3 weights that") && said.contains("`model.layers.0.mlp.up_proj.weight`"),
        "{said}"
    );
    assert!(said.contains("2 zeros of") && said.contains("`model.norm.weight`"), "{said}");
    let [sparse, refined] = ["sparse", "out"].map(|name| tensors(&place.path(name)));
    assert!(refined == sparse, "the result has the dense weights under the sparse masks");
}

#[test]
fn a_run_goes_on_from_the_values_of_a_sparse_checkpoint() {
    const CHANGED: &str = "model.layers.0.mlp.up_proj.weight";
    let place = Place::new();
    place.change("changed", |tensors, _| {
        let (_, _, bytes) = tensors.get_mut(CHANGED).unwrap();
        for weight in bytes.as_chunks_mut().0 {
            *weight = (1.5 * f32::from_le_bytes(*weight)).to_le_bytes();
        }
    });
    let run = |stages: &str| {
        let run = place.refine("changed", &[&dense(), "mask.retain=true", stages]);
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert!(!run.stderr.contains("dense model's"), "{}", run.stderr);
        let out = place.path("out");
        let verified = barber(&["verify", &out.display().to_string()]);
        assert_eq!(verified.status, 0, "{}{}", verified.stdout, verified.stderr);
        tensors(&out)
    };
    let changed = tensors(&place.path("changed"));
    assert!(run("refine=[]") == changed);
    let (refined, whole) = (run("refine=[{ use = 'swap' }]"), tensors(Path::new(util::TINY)));
    let weights = |of: &BTreeMap<String, Tensor>| -> Vec<f32> {
        of[CHANGED].2.as_chunks().0.iter().map(|weight| f32::from_le_bytes(*weight)).collect()
    };
    let [refined, before, whole] = [&refined, &changed, &whole].map(weights);
    let mut came_back = 0;
    for ((new, old), dense) in refined.into_iter().zip(before).zip(whole) {
        assert!([0.0, if old == 0.0 { dense } else { old }].contains(&new), "{old} {dense}: {new}");
        came_back += usize::from(old == 0.0 && new != 0.0);
    }
    assert!(came_back > 10, "{came_back}");
}

#[test]
fn nothing_is_refined_without_a_dense_model_of_its_own() {
    let place = Place::new();
    let refused = |run: &Run, expected: &str| {
        assert_eq!(run.status, 2, "{}{}", run.stdout, run.stderr);
        let error = flat(&run.stderr);
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!place.path("out").exists());
    };
    refused(&place.refine("sparse", &[]), "set `model.dense` to the dense model");
    refused(&place.refine("sparse", &[&dense(), "mask.init=wanda"]), "set `mask.init` to `none`");
    // The dense model itself has no mask.
    let itself = format!("model.path={}", Path::new(util::TINY).display());
    refused(&place.refine("sparse", &[&dense(), &itself]), "there is no mask to refine");
    place.change("other", |_, config| config["rope_theta"] = 77.0.into());
    refused(&place.refine("other", &[&dense()]), "config.json differs in `rope_theta`");
    place.change("narrow", |tensors, _| {
        let (_, shape, bytes) = tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap();
        shape[0] -= 1;
        bytes.truncate(shape[0] * shape[1] * 4);
    });
    refused(
        &place.refine("narrow", &[&dense()]),
        "`model.layers.0.mlp.up_proj.weight` is missing from one of them, or has another shape",
    );
}
