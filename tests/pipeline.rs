//! What holds of every pruned checkpoint, whatever the model and the recipe: counts, patterns, the
//! very bits of what is kept and of what is left alone.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use dfdx::tensor::Cpu;
use half::{bf16, f16};
use llm_barber::{
    checkpoint::Reader,
    family::{Decoder, decoder},
    model::Model,
};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use util::{Tensor, barber, tensors, write};

/// The first matrix of an MLP in either family.
const MLP: &str = "*.{fc1,gate_proj}";

/// A model and how it is pruned.
#[derive(Clone, Debug)]
struct Case {
    config: Value,
    dtype: Dtype,
    seed: u64,
    init: &'static str,
    /// N and M; none is unstructured.
    tile: Option<(usize, usize)>,
    ratio: f64,
    scope: &'static str,
    stage: &'static str,
    passes: usize,
    exclude: &'static str,
}

fn config() -> impl Strategy<Value = Value> {
    let sizes =
        (1..4usize, 1..4usize, 1..3usize, prop::bool::ANY, prop::sample::select(vec![1, 2]));
    sizes.prop_map(|(hidden, inner, layers, opt, kv_heads)| {
        json!({
            "model_type": if opt { "opt" } else { "llama" }, "vocab_size": 24,
            "hidden_size": 8 * hidden, "num_hidden_layers": layers, "num_attention_heads": 2,
            "num_key_value_heads": kv_heads, "intermediate_size": 8 * inner, "ffn_dim": 8 * inner,
            "max_position_embeddings": 16, "tie_word_embeddings": true,
        })
    })
}

fn case() -> impl Strategy<Value = Case> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::F16]);
    let model = (config(), dtype, any::<u64>());
    let init = prop::sample::select(vec!["magnitude", "wanda"]);
    let tile = prop::sample::select(vec![None, Some((2, 4)), Some((1, 4)), Some((4, 8))]);
    let scope = prop::sample::select(vec!["group", "layer", "row", "column"]);
    let stage = prop::sample::select(vec!["none", "rebuild", "auto", "swap", "end-to-end"]);
    let exclude = prop::sample::select(vec!["", "*.v_proj", "*.layers.0.self_attn.*", MLP]);
    let pruned = (init, tile, 0.0..0.95, scope, stage, 1..3usize, exclude);
    (model, pruned).prop_map(|(model, pruned)| {
        let (config, dtype, seed) = model;
        let (init, tile, ratio, scope, stage, passes, exclude) = pruned;
        Case { config, dtype, seed, init, tile, ratio, scope, stage, passes, exclude }
    })
}

impl Case {
    /// Random tensors, none of whose numbers is zero in any format.
    fn write_model(&self, dir: &Path) -> BTreeMap<String, Tensor> {
        let mut random = llm_barber::random::SplitMix64::new(self.seed);
        let mut number = || {
            let magnitude = 0.05 + random.below(1 << 16) as f32 / (1 << 16) as f32;
            if random.below(2) == 0 { magnitude } else { -magnitude }
        };
        let bytes = |x: f32| match self.dtype {
            Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let decoder = self.decoder();
        let tensors = decoder.tensors().map(|(name, shape)| {
            let values = (0..shape.iter().product::<usize>()).flat_map(|_| bytes(number()));
            (name.to_owned(), (self.dtype, shape, values.collect()))
        });
        let tensors = tensors.collect();
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        write(&dir.join("model.safetensors"), &tensors);
        tensors
    }

    fn decoder(&self) -> Decoder {
        decoder(&self.config).unwrap()
    }

    fn recipe(&self) -> String {
        let (pattern, ratio) = match self.tile {
            Some((n, m)) => (format!("{n}:{m}"), String::new()),
            None => ("unstructured".into(), format!("ratio = {}\n", self.ratio)),
        };
        let stage = match self.stage {
            "rebuild" => format!("use = 'rebuild'\nscope = '{}'\nalpha = 0.4", self.scope),
            "auto" => format!("use = 'rebuild'\nscope = '{}'\nalpha = 'auto'", self.scope),
            "swap" => format!("use = 'swap'\nscope = '{}'", self.stage_scope()),
            "end-to-end" => format!(
                "use = 'end-to-end'\nscope = '{}'\nsteps = 7\ntokens = 1\nlambda = 1\nfraction = 0.5",
                self.stage_scope()
            ),
            _ => String::new(),
        };
        let stage = if stage.is_empty() { stage } else { format!("[[refine]]\n{stage}\n") };
        let exclude: Vec<&str> =
            [self.exclude].into_iter().filter(|glob| !glob.is_empty()).collect();
        let init = self.init;
        let passes = if self.stage == "none" { 2 } else { self.passes };
        format!(
            "[model]\npath = 'model'\n[calibration]\nsource = 'ids.json'\nsamples = 3\n\
             [sparsity]\npattern = '{pattern}'\n{ratio}exclude = {exclude:?}\n\
             [mask]\ninit = '{init}'\npasses = {passes}\n{stage}[output]\npath = 'out'\n"
        )
    }

    /// The scope that its stage has in place of the case's, which stages do not all know.
    fn stage_scope(&self) -> &'static str {
        match (self.stage, self.scope) {
            ("swap" | "end-to-end", "column") => "row",
            ("swap", "group") => "layer",
            ("end-to-end", "group") => "model",
            (_, scope) => scope,
        }
    }

    /// Whether weights of several rows may change places.
    fn mixes_rows(&self) -> bool {
        self.stage != "none" && self.stage_scope() != "row"
    }

    fn excludes(&self, name: &str) -> bool {
        match self.exclude {
            "" => false,
            MLP => name.ends_with(".fc1.weight") || name.ends_with(".gate_proj.weight"),
            "*.layers.0.self_attn.*" => name.contains(".layers.0.self_attn."),
            glob => name.trim_end_matches(".weight").ends_with(glob.trim_start_matches('*')),
        }
    }
}

/// Where a matrix is zero.
fn zeros((dtype, _, bytes): &Tensor) -> Vec<bool> {
    let size = if *dtype == Dtype::F32 { 4 } else { 2 };
    bytes.chunks(size).map(|bytes| bytes.iter().all(|byte| *byte == 0)).collect()
}

fn count(zeros: &[bool]) -> usize {
    zeros.iter().filter(|zero| **zero).count()
}

/// Embeddings, norms, biases, routers and vision towers, in whatever layout they are stored.
#[test]
fn only_matrices_of_decoder_layers_are_pruned_in_every_family() {
    let dir = tempfile::tempdir().unwrap();
    let ids = json!({ "token_ids": [[1, 2, 3, 4, 5]] });
    fs::write(dir.path().join("ids.json"), ids.to_string()).unwrap();
    let recipe = dir.path().join("r.toml");
    let here = std::env::current_dir().unwrap();
    let fixtures = ["logits", "stacked"]
        .map(|of| fs::read_dir(here.join("tests/fixtures").join(of)).unwrap())
        .into_iter()
        .flatten();
    for model in fixtures.map(|entry| entry.unwrap().path()) {
        let text = format!(
            "model.path = {model:?}\ncalibration = {{ source = 'ids.json', samples = 1 }}\n\
             sparsity.ratio = 0.5\nmask.init = 'magnitude'\nrefine = []\noutput.path = 'out'\n"
        );
        fs::write(&recipe, text).unwrap();
        let run = barber(&["prune", recipe.to_str().unwrap(), "--force", "--json"]);
        assert_eq!(run.status, 0, "{}: {}", model.display(), run.stderr);
        let [dense, sparse] =
            [&model, &dir.path().join("out")].map(|dir| Reader::open(dir).unwrap());
        assert!(dense.names().eq(sparse.names()), "{}", model.display());
        let decoder = Model::new(&dense, Cpu::default()).unwrap().decoder;
        let mut pruned: BTreeSet<_> = decoder.projections().map(|of| &*of.weight).collect();
        let routers = decoder.layers.iter().filter_map(|layer| layer.mlp.router.as_ref());
        for of in routers.flat_map(|of| [&of.projection].into_iter().chain(&of.shared_gate)) {
            assert!(dense.tensor(&of.weight).is_ok() && !pruned.contains(&*of.weight));
        }
        for name in dense.names() {
            let [before, after] = [&dense, &sparse].map(|of| of.tensor(name).unwrap());
            let place = format!("{}: {name}", model.display());
            assert_eq!((before.dtype, before.shape), (after.dtype, after.shape), "{place}");
            let [before, after] = [before, after].map(|of| of.bytes().unwrap());
            if pruned.remove(name) {
                let size = dense.tensor(name).unwrap().dtype.bitsize() / 8;
                let pairs = before.chunks(size).zip(after.chunks(size));
                let changed: Vec<_> = pairs.filter(|(before, after)| before != after).collect();
                assert!(changed.iter().all(|(_, after)| after.iter().all(|b| *b == 0)), "{place}");
                let half = after.len() / size / 2;
                assert!(changed.len() <= half && changed.len() * 10 > half * 9, "{place}");
            } else {
                assert!(before == after, "{place}");
            }
        }
        assert!(pruned.is_empty(), "{pruned:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_pruned_checkpoint_is_sparse_as_asked_and_else_the_same(case in case()) {
        let dir = tempfile::tempdir().unwrap();
        let dense = case.write_model(&dir.path().join("model"));
        let ids = json!({ "token_ids": [[1, 2, 3, 4, 5], [9, 8, 7, 6, 5], [20, 21, 22, 23, 0]] });
        fs::write(dir.path().join("ids.json"), ids.to_string()).unwrap();
        let recipe = dir.path().join("r.toml");
        fs::write(&recipe, case.recipe()).unwrap();
        let run = barber(&["prune", recipe.to_str().unwrap(), "--json"]);
        prop_assert_eq!(run.status, 0, "{}{}", case.recipe(), run.stderr);
        let sparse = tensors(&dir.path().join("out"));

        let decoder = case.decoder();
        let is_pruned = |name: &str| {
            !case.excludes(name) && decoder.projections().any(|linear| linear.weight == name)
        };
        prop_assert_eq!(dense.len(), sparse.len());
        for (name, tensor) in &dense {
            let found = &sparse[name];
            if !is_pruned(name) {
                prop_assert_eq!(tensor, found, "{}", name);
                continue;
            }
            prop_assert_eq!((&tensor.0, &tensor.1), (&found.0, &found.1));
            let size = tensor.2.len() / tensor.1.iter().product::<usize>();
            for (dense, kept) in tensor.2.chunks(size).zip(found.2.chunks(size)) {
                prop_assert!(dense == kept || kept.iter().all(|byte| *byte == 0), "{}", name);
            }
        }
        // What each scope has, layer by layer, and the whole model.
        let mut all = [0; 2];
        for layer in &decoder.layers {
            for part in [&layer.attention, &layer.mlp] {
                let (mut pooled, mut expected) = (0, 0);
                for linear in part.projections.iter().filter(|linear| is_pruned(&linear.weight)) {
                    let zeros = zeros(&sparse[&linear.weight]);
                    let (rows, columns) = (linear.dims.rows, linear.dims.columns);
                    if let Some((n, m)) = case.tile {
                        for tile in zeros.chunks(m) {
                            prop_assert_eq!(count(tile), m - n, "{}", linear.weight);
                        }
                        continue;
                    }
                    let share = |of: usize| (case.ratio * of as f64) as usize;
                    let of_matrix = match case.init {
                        "wanda" => rows * share(columns),
                        _ => share(rows * columns),
                    };
                    pooled += count(&zeros);
                    expected += of_matrix;
                    let pools = case.stage != "none"
                        && matches!(case.stage_scope(), "group" | "model");
                    if !pools {
                        prop_assert_eq!(count(&zeros), of_matrix, "{}", linear.weight);
                    }
                    if case.init == "wanda" && !case.mixes_rows() {
                        for row in zeros.chunks(columns) {
                            prop_assert_eq!(count(row), share(columns), "{}", linear.weight);
                        }
                    }
                }
                if case.stage != "end-to-end" || case.stage_scope() != "model" {
                    prop_assert_eq!(pooled, expected);
                }
                all[0] += pooled;
                all[1] += expected;
            }
        }
        prop_assert_eq!(all[0], all[1]);
    }
}
