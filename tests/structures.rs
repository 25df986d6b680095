//! Removal of whole structures: the smaller model is what the masked one was, each row and column that
//! is left has the dense model's bits, and what a model or a recipe cannot have is said at the start.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde_json::{Value, json};
use util::{Run, Tensor, barber, command, flat, output, tensors};

/// A fixture of tests/fixtures/logits, texts of its tokens, and a recipe.
struct Case {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Case {
    fn new(fixture: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = util::copy_fixture(fixture, &dir.path().join("dense"));
        // A token is its number.
        let numbers: BTreeMap<String, u32> = (0..96).map(|id| (id.to_string(), id)).collect();
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": { "type": "WhitespaceSplit" },
            "model": { "type": "WordLevel", "vocab": numbers, "unk_token": "0" },
        });
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, by) in [("calibration", 7), ("test", 11)] {
            let words: Vec<String> = (0..64).map(|i| (i * i * by % 96).to_string()).collect();
            fs::write(dir.path().join(format!("{name}.txt")), words.join(" ")).unwrap();
        }
        let recipe = "model.path = 'dense'\n\
             calibration = { source = 'calibration.txt', samples = 4, sequence_length = 16 }\n\
             output.path = 'out'\n\
             [evaluate]\nperplexity = ['test.txt']\nsequence_length = 16\n";
        fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
        Self { dir, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, verb: &str, sets: &[&str]) -> Run {
        let recipe = self.path("recipe.toml");
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        barber(&[verb, recipe.to_str().unwrap()].into_iter().chain(sets).collect::<Vec<_>>())
    }

    /// Prunes, and checks all that is true of every result.
    #[track_caller]
    fn prunes(&self, sets: &[&str]) -> Value {
        let run = self.run("check", sets);
        assert_eq!(run.status, 0, "{}", run.stderr);
        let run = self.run("prune", sets);
        assert_eq!(run.status, 0, "{}", run.stderr);
        let out = self.path("out");
        let out = out.to_str().unwrap();
        for verb in ["verify", "reproduce"] {
            let run = barber(&[verb, out]);
            assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
        }
        let report = fs::read(self.path("out/barber-report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let text = self.path("test.txt");
        let eval = ["eval", out, "--text", text.to_str().unwrap(), "--sequence-length", "16"];
        let run = barber(&[&eval[..], &["--json"]].concat());
        assert_eq!(run.status, 0, "{}", run.stderr);
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        let [found, expected] = [
            &found["perplexity"][0]["perplexity"],
            &report["perplexity"][0]["final"]["perplexity"],
        ]
        .map(|of| of.as_f64().unwrap());
        assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        report
    }

    #[track_caller]
    fn refuses(&self, sets: &[&str], words: &[&str]) {
        for verb in ["check", "prune"] {
            let run = self.run(verb, sets);
            let said = flat(&run.stderr);
            assert_eq!(run.status, 2, "{}{said}", run.stdout);
            words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
        }
        assert!(!self.path("out").exists());
    }

    fn dense(&self) -> BTreeMap<String, Tensor> {
        tensors(&self.model)
    }

    fn config(&self) -> Value {
        let config = fs::read(self.path("out/config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        if config["text_config"].is_object() { config["text_config"].clone() } else { config }
    }
}

/// The indices that a report has as ranges.
fn indices(ranges: &Value) -> BTreeSet<usize> {
    let ranges = ranges.as_str().unwrap().split(", ").filter(|range| !range.is_empty());
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        first.parse().unwrap()..=last.parse::<usize>().unwrap()
    };
    ranges.flat_map(range).collect()
}

/// Rows and columns of a tensor, as bytes of its elements.
fn rows((dtype, shape, bytes): &Tensor) -> Vec<Vec<&[u8]>> {
    let size = dtype.bitsize() / 8;
    let columns = if shape.len() > 1 { shape[1] } else { 1 };
    bytes.chunks(size * columns).map(|row| row.chunks(size).collect()).collect()
}

/// Checks that a tensor is the dense one without these rows or columns.
fn without(name: &str, [new, old]: [&Tensor; 2], gone: [&BTreeSet<usize>; 2]) {
    let rows_of_old = rows(old);
    let kept = rows_of_old.iter().enumerate().filter(|(i, _)| !gone[0].contains(i));
    let kept = kept.map(|(_, row)| {
        let kept = row.iter().enumerate().filter(|(i, _)| !gone[1].contains(i));
        kept.map(|(_, element)| *element).collect::<Vec<_>>()
    });
    assert_eq!(new.0, old.0, "{name}");
    assert!(rows(new) == kept.collect::<Vec<_>>(), "{name}");
}

const CHANNELS: &str = "sparsity.structure=channels";
const HEADS: &str = "sparsity.structure=heads";

#[test]
fn channels_are_cut_from_every_dense_family() {
    let none = BTreeSet::new();
    for (fixture, init) in [
        ("gqa-tied", "magnitude"),
        ("biases", "wanda"),
        ("opt", "wanda"),
        ("gpt-neox", "magnitude"),
        ("phi", "wanda"),
        ("phi3", "wanda"),
        ("gemma3-images", "wanda"),
        ("mistral3", "magnitude"),
        ("olmo2", "wanda"),
        ("nemotron-biases", "wanda"),
        ("sharded-bf16", "wanda"),
    ] {
        let case = Case::new(fixture);
        let report = case.prunes(&[CHANNELS, "sparsity.ratio=0.25", &format!("mask.init={init}")]);
        let structures = &report["structures"][0];
        assert_eq!(structures["structure"], "channels", "{fixture}");
        let (of, lost) = (structures["of"].as_u64().unwrap(), structures["lost"].as_u64().unwrap());
        assert_eq!(lost, of / 4, "{fixture}");
        let sizes = ["intermediate_size", "ffn_dim"].map(|key| case.config()[key].as_u64());
        assert_eq!(sizes.into_iter().flatten().collect::<Vec<_>>(), [of - lost], "{fixture}");
        let (dense, new) = (case.dense(), tensors(&case.path("out")));
        assert!(new.keys().eq(dense.keys()), "{fixture}");
        let mut cut = 0;
        for (name, old) in &dense {
            let new = &new[name];
            let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
            let gone = layer.filter(|_| !name.starts_with("vision")).map(|layer| {
                let gone = indices(&structures["removed"][layer]);
                assert_eq!(gone.len() as u64, lost, "{fixture}");
                gone
            });
            let (module, tensor) = name.rsplit_once('.').unwrap();
            let module = module.rsplit('.').next().unwrap();
            match (module, gone) {
                ("down_proj" | "fc2" | "dense_4h_to_h", Some(gone)) if tensor == "weight" => {
                    without(name, [new, old], [&none, &gone]);
                    cut += 1;
                }
                ("gate_proj" | "up_proj" | "fc1" | "dense_h_to_4h", Some(gone)) => {
                    without(name, [new, old], [&gone, &none]);
                    cut += 1;
                }
                ("gate_up_proj", Some(gone)) => {
                    let both = gone.iter().flat_map(|i| [*i, i + of as usize]).collect();
                    without(name, [new, old], [&both, &none]);
                    cut += 1;
                }
                _ => assert!(new == old, "{fixture}: {name}"),
            }
        }
        assert!(cut >= 4, "{fixture}");
        // `inspect` shows an ordinary checkpoint.
        let run = barber(&["inspect", case.path("out").to_str().unwrap(), "--json"]);
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        let weights = report["model_weights"].as_u64().unwrap();
        assert!(found["total"]["weights"].as_u64().unwrap() < weights, "{}", run.stdout);
    }
}

/// The configuration is a dense one's, whatever the model was.
#[test]
fn channels_are_cut_from_quantised_and_compressed_models() {
    for fixture in ["fp8", "int8-packed"] {
        let case = Case::new(fixture);
        case.prunes(&[CHANNELS, "sparsity.ratio=0.25"]);
        assert_eq!(case.config()["quantization_config"], Value::Null, "{fixture}");
    }
    let case = Case::new("sharded-bf16");
    case.prunes(&["output.format=sparse-bitmask"]);
    fs::remove_dir_all(&case.model).unwrap();
    fs::rename(case.path("out"), &case.model).unwrap();
    case.prunes(&[CHANNELS, "sparsity.ratio=0.25"]);
    assert_eq!(case.config()["quantization_config"], Value::Null);
}

#[test]
fn heads_go_with_their_query_heads() {
    let none = BTreeSet::new();
    for (fixture, heads, head_dim) in [
        ("gqa-tied", [4, 2], 8),
        ("head-dim", [4, 2], 12),
        ("biases", [4, 4], 8),
        ("qwen3", [4, 2], 12),
        ("phi", [4, 4], 8),
        ("gemma3", [4, 2], 12),
        ("sharded-f16", [4, 2], 8),
        ("../stacked/qwen2-moe", [4, 2], 8),
    ] {
        let case = Case::new(fixture);
        let report = case.prunes(&[HEADS, "sparsity.ratio=0.5"]);
        let structures = &report["structures"][0];
        let config = case.config();
        let found = ["num_attention_heads", "num_key_value_heads", "head_dim"]
            .map(|key| config[key].as_u64().unwrap() as usize);
        assert_eq!(found, [heads[0] / 2, heads[1] / 2, head_dim], "{fixture}");
        let (dense, new) = (case.dense(), tensors(&case.path("out")));
        assert!(new.keys().eq(dense.keys()), "{fixture}");
        for (name, old) in &dense {
            let new = &new[name];
            let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
            let gone = |width: usize| -> BTreeSet<usize> {
                let gone = indices(&structures["removed"][layer.unwrap()]);
                gone.iter().flat_map(|head| head * width..(head + 1) * width).collect()
            };
            let query = heads[0] / heads[1] * head_dim;
            let (module, tensor) = name.rsplit_once('.').unwrap();
            match module.rsplit('.').next().unwrap() {
                "q_proj" => without(name, [new, old], [&gone(query), &none]),
                "k_proj" | "v_proj" => without(name, [new, old], [&gone(head_dim), &none]),
                "o_proj" | "dense" if tensor == "weight" => {
                    without(name, [new, old], [&none, &gone(query)]);
                }
                _ => assert!(new == old, "{fixture}: {name}"),
            }
        }
    }
}

/// The values of an f32 tensor.
fn values((dtype, _, bytes): &Tensor) -> Vec<f64> {
    assert_eq!(*dtype, Dtype::F32);
    let (values, _) = bytes.as_chunks();
    values.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
}

#[test]
fn the_channels_with_the_lowest_sums_go() {
    let case = Case::new("f32");
    let report = case.prunes(&[CHANNELS, "sparsity.ratio=0.3", "mask.init=magnitude"]);
    let dense = case.dense();
    for layer in 0..2 {
        let of = |name: &str| &dense[&format!("model.layers.{layer}.mlp.{name}_proj.weight")];
        let [rows, columns] = of("up").1[..] else { panic!("a matrix") };
        let sum = |channel: usize| {
            let inputs = ["gate", "up"].map(|name| {
                let row = &values(of(name))[channel * columns..(channel + 1) * columns];
                row.iter().map(|w| w.abs()).sum::<f64>()
            });
            let output = values(of("down")).into_iter().skip(channel).step_by(rows);
            inputs.iter().sum::<f64>() + output.map(f64::abs).sum::<f64>()
        };
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by(|a, b| sum(*a).total_cmp(&sum(*b)));
        let expected: BTreeSet<usize> = order.into_iter().take(rows * 3 / 10).collect();
        assert_eq!(indices(&report["structures"][0]["removed"][layer]), expected);
    }
}

#[test]
fn any_metric_scores_structures() {
    let case = Case::new("qwen3");
    let removed = |structure: &str, metric: &str| {
        let metric = format!("mask.metric=[{metric}]");
        let output = case.path("out");
        if output.exists() {
            fs::remove_dir_all(&output).unwrap();
        }
        let sets = [structure, "sparsity.ratio=0.5", "mask.init=metric", &metric];
        case.prunes(&sets)["structures"][0]["removed"].clone()
    };
    let metrics = [
        "{ use = 'random' }",
        "{ use = 'random', seed = 1 }",
        "{ use = 'weight-gradient' }",
        "{ use = 'weight-gradient' }, { use = 'activation-norm' }",
        "{ use = 'hessian-diagonal' }",
    ];
    let found: BTreeSet<String> =
        metrics.iter().map(|metric| removed(CHANNELS, metric).to_string()).collect();
    assert_eq!(found.len(), metrics.len(), "{found:?}");
    assert!(removed(HEADS, "{ use = 'weight-gradient' }").is_array());
    // A repeated run has the same bytes with another number of threads.
    let before = tensors(&case.path("out"));
    fs::remove_dir_all(case.path("out")).unwrap();
    let recipe = case.path("recipe.toml");
    let mut program = command(Path::new(env!("CARGO_BIN_EXE_barber")));
    program.args(["prune", recipe.to_str().unwrap()]).env("RAYON_NUM_THREADS", "1");
    let metric = "mask.metric=[{ use = 'weight-gradient' }]";
    for set in [HEADS, "sparsity.ratio=0.5", "mask.init=metric", metric] {
        program.args(["--set", set]);
    }
    let run = output(&mut program);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(tensors(&case.path("out")) == before);
}

/// Checks that the layers of the result are those of the dense model without the ones that went, and
/// all else is as it was.
#[track_caller]
fn layers_are(case: &Case, gone: &BTreeSet<usize>, fixture: &str) {
    let (dense, new) = (case.dense(), tensors(&case.path("out")));
    let mut left = BTreeMap::new();
    for (name, tensor) in dense {
        let name = match name.split_once("layers.").filter(|_| !name.starts_with("vision")) {
            Some((before, after)) => {
                let (number, rest) = after.split_once('.').unwrap();
                let number: usize = number.parse().unwrap();
                if gone.contains(&number) {
                    continue;
                }
                let number = number - gone.iter().filter(|gone| **gone < number).count();
                format!("{before}layers.{number}.{rest}")
            }
            None => name,
        };
        left.insert(name, tensor);
    }
    assert!(new == left, "{fixture}: {:?} {:?}", new.keys(), left.keys());
}

#[test]
fn layers_go_from_every_family() {
    for fixture in [
        "biases",
        "cohere2",
        "deepseek-v3",
        "exaone4",
        "gemma2",
        "gemma3",
        "gemma3-images",
        "glm4",
        "gpt-neox",
        "gpt-oss",
        "gqa-tied",
        "granitemoe",
        "linear",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo3",
        "opt",
        "opt-norm-after",
        "phi",
        "phi3-longrope",
        "qwen2",
        "qwen3",
        "sharded-bf16",
        "smollm3",
        "smollm3-windows",
        "../stacked/mixtral",
        "../stacked/granitemoe",
    ] {
        let case = Case::new(fixture);
        let metric = "mask.metric=[{ use = 'block-influence' }]";
        let sets = ["sparsity.structure=layers", "sparsity.ratio=0.5", "mask.init=metric", metric];
        let report = case.prunes(&sets);
        let layers = &report["structures"][0];
        let of = layers["of"].as_u64().unwrap() as usize;
        let gone = indices(&layers["removed"][0]);
        assert_eq!((gone.len(), &layers["structure"]), (of / 2, &json!("layers")), "{fixture}");
        assert_eq!(case.config()["num_hidden_layers"], of - of / 2, "{fixture}");
        layers_are(&case, &gone, fixture);
    }
}

#[test]
fn experts_go_with_their_rows_of_the_router() {
    for fixture in [
        "mixtral",
        "olmoe",
        "granitemoe",
        "gpt-oss",
        "qwen2-moe",
        "qwen3-moe",
        "qwen3-moe-mixed",
        "deepseek-v3-one-group",
        "fp8-moe",
        "../stacked/mixtral",
        "../stacked/granitemoe",
        "../stacked/qwen2-moe",
    ] {
        let case = Case::new(fixture);
        let metric = "mask.metric=[{ use = 'expert-contribution' }]";
        let sets = ["sparsity.structure=experts", "sparsity.ratio=0.5", "mask.init=metric", metric];
        let report = case.prunes(&sets);
        let experts = &report["structures"][0];
        let [of, lost] = ["of", "lost"].map(|key| experts[key].as_u64().unwrap() as usize);
        assert_eq!(lost, of / 2, "{fixture}");
        for removed in experts["removed"].as_array().unwrap() {
            assert_eq!(indices(removed).len(), lost, "{fixture}");
        }
        let config = case.config();
        let counts = ["num_experts", "num_local_experts", "n_routed_experts"];
        assert!(counts.iter().any(|key| config[key] == of - lost), "{fixture}: {config}");
    }
}

#[test]
fn structures_of_several_kinds_go_together() {
    let case = Case::new("qwen3-moe");
    let structures = "sparsity.structures=[{ structure = 'experts', ratio = 0.5 }, \
                      { structure = 'layers', ratio = 0.5 }, { structure = 'heads', ratio = 0.5 }]";
    let report = case.prunes(&[structures, "mask.init=wanda"]);
    let kinds = report["structures"].as_array().unwrap();
    let names: Vec<_> = kinds.iter().map(|of| of["structure"].as_str().unwrap()).collect();
    // Of layers that are gone nothing else is chosen.
    assert_eq!(names, ["layers", "experts", "heads"]);
    let card = fs::read_to_string(case.path("out/README.md")).unwrap();
    assert!(card.contains("- Removed: layers, experts, key/value heads"), "{card}");
    fs::remove_dir_all(case.path("out")).unwrap();
    case.refuses(
        &["sparsity.structures=[{ structure = 'heads', ratio = 0.5 }, { structure = 'heads', ratio = 0 }]"],
        &["must be above 0 and below 1, got 0", "key/value heads are named twice"],
    );
    case.refuses(
        &["sparsity.structures=[{ ratio = 0.5 }]"],
        &["`sparsity.structures.0.structure`"],
    );
    case.refuses(&["sparsity.structures=[{ structure = 'heads' }]"], &["structures.0.ratio"]);
    case.refuses(
        &["sparsity.structures=[{ structure = 'weights', ratio = 0.5 }]"],
        &["single weights are not removed as a whole"],
    );
    // One value of the list is changed by its index.
    let changed = [structures, "sparsity.structures.0.ratio=0.01"];
    case.refuses(&changed, &["0.01 of the 6 experts of a layer"]);
    case.refuses(&[structures, "sparsity.structures.7.ratio=0.5"], &["no table with this index"]);
    case.refuses(
        &[
            "sparsity.structure=layers",
            "sparsity.structures=[{ structure = 'heads', ratio = 0.5 }]",
        ],
        &["there is a list of structures, too"],
    );
}

#[test]
fn metrics_of_structures_score_theirs_alone() {
    let case = Case::new("qwen3-moe");
    let of =
        |metric: &str| format!("mask={{ init = 'metric', metric = [{{ use = '{metric}' }}] }}");
    let influence = of("block-influence");
    case.refuses(&[&influence], &["`block-influence` scores layers, not single weights"]);
    let heads = ["sparsity.structure=heads", "sparsity.ratio=0.5", &influence];
    case.refuses(&heads, &["`block-influence` scores layers, not key/value heads"]);
    let experts = |ratio: &'static str| ["sparsity.structure=experts", ratio];
    case.refuses(
        &experts("sparsity.ratio=0.99"),
        &["a token would have more experts than are left"],
    );
    let reconstruct = "refine=[{ use = 'reconstruct' }]";
    case.refuses(
        &[&experts("sparsity.ratio=0.5")[..], &[reconstruct]].concat(),
        &["without some experts no group is left as it is, to compare with"],
    );
    // Scores of weights and of structures are multiplied.
    let both = "mask.metric=[{ use = 'weight-gradient' }, { use = 'expert-contribution' }]";
    case.prunes(&[&experts("sparsity.ratio=0.5")[..], &["mask.init=metric", both]].concat());
    let dense = Case::new("gqa-tied");
    dense.refuses(&experts("sparsity.ratio=0.5"), &["the model has no experts"]);
}

#[test]
fn what_is_left_can_be_reconstructed() {
    let case = Case::new("gqa-tied");
    let sets = [CHANNELS, "sparsity.ratio=0.25", "refine=[{ use = 'reconstruct' }]"];
    for passes in ["mask.passes=1", "mask.passes=2"] {
        let report = case.prunes(&[&sets[..], &[passes]].concat());
        assert!(report["changed_weights"].as_u64().unwrap() > 0, "{report}");
        let card = fs::read_to_string(case.path("out/README.md")).unwrap();
        assert!(card.contains("without 12 of the 48 channels of each of 2 layers"), "{card}");
        assert!(card.contains("- Removed: channels") && !card.contains("- sparse"), "{card}");
        fs::remove_dir_all(case.path("out")).unwrap();
    }
}

#[test]
fn a_rebuild_exchanges_structures_and_never_raises_the_error() {
    for (fixture, structure) in [("gqa-tied", CHANNELS), ("opt", CHANNELS), ("qwen3", HEADS)] {
        let case = Case::new(fixture);
        let rebuild = "refine=[{ use = 'rebuild', alpha = 'auto', rounds = 2 }]";
        let random = "mask.metric=[{ use = 'random' }]";
        let sets = [structure, "sparsity.ratio=0.5", "mask.init=metric", random];
        let report = case.prunes(&[&sets[..], &[rebuild]].concat());
        let structures = &report["structures"][0];
        let lost = structures["lost"].as_u64().unwrap() as usize;
        for removed in structures["removed"].as_array().unwrap() {
            assert_eq!(indices(removed).len(), lost, "{fixture}");
        }
        let stages = report["groups"].as_array().unwrap().iter().map(|group| &group["stages"][0]);
        let mut exchanged = 0;
        for stage in stages {
            let [before, after] =
                ["before", "after"].map(|of| stage[of]["calibration"].as_f64().unwrap());
            assert!(after <= before, "{fixture}: {before} {after}");
            exchanged += usize::from(after < before);
        }
        assert!(exchanged > 0 || structure == HEADS, "{fixture}");
    }
}

const COMPENSATE: &str = "refine=[{ use = 'compensate' }]";

#[test]
fn biases_keep_what_removed_inputs_gave_on_average() {
    for (fixture, structure, key) in [
        ("gqa-tied", CHANNELS, "mlp_bias"),
        ("gqa-tied", HEADS, "attention_bias"),
        ("opt", CHANNELS, "ffn_dim"),
        ("phi", HEADS, "head_dim"),
    ] {
        let case = Case::new(fixture);
        // All tokens alike, so that every input is its mean.
        for text in ["calibration.txt", "test.txt"] {
            fs::write(case.path(text), "7 ".repeat(64)).unwrap();
        }
        let sets = [structure, "sparsity.ratio=0.5", "mask.init=magnitude", "output.dtype=f32"];
        let of = |report: &Value, stage: &str| {
            report["perplexity"][0][stage]["perplexity"].as_f64().unwrap()
        };
        let without = case.prunes(&sets);
        fs::remove_dir_all(case.path("out")).unwrap();
        let report = case.prunes(&[&sets[..], &[COMPENSATE]].concat());
        let found = [of(&without, "final"), of(&report, "final"), of(&report, "dense")];
        // OPT adds positions, so that its inputs differ.
        match fixture {
            "opt" => assert!(found[0] != found[1], "{fixture}: {found:?}"),
            _ => assert!((found[1] / found[2] - 1.0).abs() < 1e-5, "{fixture}: {found:?}"),
        }
        assert!((found[0] / found[2] - 1.0).abs() > 1e-2, "{fixture}: {found:?}");
        assert_eq!(report["structures"][0]["compensated"], true);
        assert_eq!(report["changed_weights"], 0);
        assert!(report["changed_biases"].as_u64().unwrap() > 0);
        assert_ne!(case.config()[key], Value::Null, "{fixture}");
        let (dense, new) = (case.dense(), tensors(&case.path("out")));
        let zero = |(_, _, bytes): &Tensor| bytes.iter().all(|byte| *byte == 0);
        let is_output = |name: &str| {
            ["down_proj.bias", "o_proj.bias", "out_proj.bias", "fc2.bias", "self_attn.dense.bias"]
                .iter()
                .any(|end| name.ends_with(end))
        };
        for (name, tensor) in new.iter().filter(|(name, _)| name.ends_with(".bias")) {
            match dense.get(name) {
                None => assert_eq!(zero(tensor), !is_output(name), "{fixture}: {name}"),
                Some(old) if is_output(name) => {
                    assert!(old != tensor || structure == CHANNELS && name.contains("out_proj"));
                }
                Some(_) => {}
            }
        }
    }
    let case = Case::new("qwen2");
    let heads = [HEADS, "sparsity.ratio=0.5", COMPENSATE];
    case.refuses(&heads, &["gives output projections no biases: `model.layers.0.self_attn.o_proj"]);
    case.refuses(&[COMPENSATE], &["makes up for whole channels or heads, not single weights"]);
}

#[test]
fn a_compensated_result_is_verified() {
    let case = Case::new("gqa-tied");
    case.prunes(&[CHANNELS, "sparsity.ratio=0.5", COMPENSATE]);
    let out = case.path("out");
    let report = out.join("barber-report.json");
    let text = fs::read_to_string(&report).unwrap();
    fs::write(&report, text.replace("\"compensated\": true", "\"compensated\": false")).unwrap();
    let run = barber(&["verify", out.to_str().unwrap()]);
    assert_eq!(run.status, 1, "{}", run.stdout);
    assert!(flat(&run.stdout).contains("config.json does not have the sizes"), "{}", run.stdout);
}

#[test]
fn a_rebuild_begins_with_the_dense_biases() {
    let case = Case::new("gqa-tied");
    let stages = "refine=[{ use = 'compensate' }, { use = 'rebuild', alpha = 1.0 }]";
    let report = case.prunes(&[CHANNELS, "sparsity.ratio=0.5", stages]);
    // Nothing is left of the biases, so the model gets none.
    assert_eq!(report["structures"][0]["compensated"], false);
    assert_eq!((&report["changed_biases"], &report["changed_weights"]), (&json!(0), &json!(0)));
    assert_eq!(case.config()["mlp_bias"], Value::Null);
    assert!(tensors(&case.path("out")).keys().all(|name| !name.ends_with("mlp.down_proj.bias")));
}

#[test]
fn what_was_tampered_with_is_found() {
    let case = Case::new("f32");
    case.prunes(&[CHANNELS, "sparsity.ratio=0.25"]);
    let out = case.path("out");
    let (report, config) = (out.join("barber-report.json"), out.join("config.json"));
    let wrong = |words: &str| {
        let run = barber(&["verify", out.to_str().unwrap()]);
        assert_eq!(run.status, 1, "{}{}", run.stdout, run.stderr);
        assert!(flat(&run.stdout).contains(words), "{words}: {}", run.stdout);
    };
    let text = fs::read_to_string(&report).unwrap();
    let mut other: Value = serde_json::from_str(&text).unwrap();
    let removed = &mut other["structures"][0]["removed"][0];
    let mut gone = indices(removed);
    let kept = (0..24).find(|i| !gone.contains(i)).unwrap();
    gone.pop_first();
    gone.insert(kept);
    let all: Vec<String> = gone.iter().map(ToString::to_string).collect();
    *removed = all.join(", ").into();
    fs::write(&report, other.to_string()).unwrap();
    wrong("kept weights are not the dense model's");
    for hostile in [json!(""), json!("0-18446744073709551615"), json!("0-47")] {
        other["structures"][0]["removed"][0] = hostile;
        fs::write(&report, other.to_string()).unwrap();
        wrong("the report's structures are not those of the dense model");
        wrong("not compared with");
    }
    for (key, value) in [("of", json!(7)), ("lost", json!(3))] {
        let mut other: Value = serde_json::from_str(&text).unwrap();
        other["structures"][0][key] = value;
        fs::write(&report, other.to_string()).unwrap();
        wrong("its numbers are not those of the removed indices");
        let run = barber(&["reproduce", out.to_str().unwrap()]);
        assert_eq!(run.status, 1, "{}", run.stdout);
        assert!(flat(&run.stdout).contains("structures"), "{}", run.stdout);
    }
    fs::write(&report, &text).unwrap();
    let sizes = fs::read_to_string(&config).unwrap();
    fs::write(&config, sizes.replace("\"intermediate_size\": 18", "\"intermediate_size\": 17"))
        .unwrap();
    wrong("config.json does not have the sizes of the smaller model");
}

#[test]
fn what_a_recipe_cannot_ask_for_is_said() {
    let case = Case::new("gqa-tied");
    for (sets, words) in [
        (
            &["sparsity.ratio=0.01"][..],
            "0.01 of the 48 channels of a layer, rounded down, is 0: nothing would be",
        ),
        (&["sparsity.ratio=0.999999999999"], "nothing would be left"),
        (&["sparsity.ratio=1.0"], "must be at least 0 and below 1"),
        (&["sparsity.multiple=0"], "must be at least 1"),
        (&["sparsity.multiple=9223372036854775807"], "would be left only if none were removed"),
        (&["sparsity.pattern=2:4"], "channels are removed as a whole"),
        (&["sparsity.allocation=owl"], "all layers lose as many channels"),
        (&["override=[{ tensors = '*.0.*', ratio = 0.2 }]"], "all layers lose as many channels"),
        (&["blocks=[{ name = 'a', layers = ['up_proj'] }]"], "are one group"),
        (&["refine=[{ use = 'swap' }]"], "`swap` works on single weights, not on channels"),
        (&["refine=[{ use = 'end-to-end' }]"], "`end-to-end` works on single weights"),
        (&["preset=best"], "`swap` works on single weights"),
        (&["mask.init=sparsegpt"], "`sparsegpt` has no scores"),
        (&["mask.init=metric", "mask.metric=[{ use = 'ria' }]", "mask.scope=layer"], "compete"),
        (&["output.format=sparse-bitmask"], "stores zeros"),
        (&["sparsity.exclude=['*.up_proj']"], "leaves out `model.layers.0.mlp.up_proj.weight`"),
        (
            &[
                "mask={ init = 'metric', passes = 1, metric = [{ use = 'gradient' }] }",
                "refine=[{ use = 'reconstruct' }]",
            ],
            "set `mask.passes` to 2",
        ),
    ] {
        case.refuses(&[&[CHANNELS], sets].concat(), &[words]);
    }
    case.refuses(&["sparsity.structure=chanels"], &["`channels`"]);
    // Of two heads a quarter is none.
    case.refuses(&[HEADS, "sparsity.ratio=0.25"], &["0.25 of the 2 key/value heads"]);
    let gradient = "mask.metric=[{ use = 'gradient' }]";
    case.refuses(&["mask.init=metric", gradient], &["needs gradients of the output error"]);
}

#[test]
fn what_a_family_lacks_is_said() {
    for (fixture, structure, words) in [
        ("olmoe", CHANNELS, "a mixture of experts"),
        ("olmo2", HEADS, "normalised together"),
        ("opt", HEADS, "config.json cannot describe a model with fewer key/value heads"),
        ("gpt-neox", HEADS, "config.json cannot describe"),
        ("phi-norms", HEADS, "config.json cannot describe"),
        ("phi3-longrope", HEADS, "config.json cannot describe"),
        ("deepseek-v3", HEADS, "projected from latents"),
        ("gpt-oss", HEADS, "a sink for each query head"),
    ] {
        let case = Case::new(fixture);
        case.refuses(&[structure, "sparsity.ratio=0.5"], &[words, "sparsity.structure"]);
    }
}
