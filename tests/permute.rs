//! Permuted channels: the result is an ordinary checkpoint, whose kept weights are the dense model's at
//! the places that the report says, and what cannot be permuted is refused at the start.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{collections::BTreeMap, fs, path::PathBuf};

use serde_json::{Value, json};
use util::{Run, barber, flat, tensors};

/// A fixture of tests/fixtures/logits, a text of its tokens, and a recipe that permutes its channels.
struct Case(tempfile::TempDir);

impl Case {
    fn new(fixture: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        util::copy_fixture(fixture, &dir.path().join("dense"));
        let ids: Vec<Vec<u32>> =
            (0..10).map(|i| (0..16).map(|j| (i * 37 + j * j * 7 + j) % 96).collect()).collect();
        let ids = json!({ "token_ids": ids });
        fs::write(dir.path().join("ids.json"), ids.to_string()).unwrap();
        let recipe = "model.path = 'dense'\n\
             calibration = { source = 'ids.json', samples = 8, held_out = 2, sequence_length = 16, \
                             selection = 'sequential' }\n\
             sparsity = { pattern = '2:4', permute = true }\n\
             output = { path = 'out', masks = true }\n\
             refine = [{ use = 'swap' }]\n";
        fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, verb: &str, sets: &[&str]) -> Run {
        let recipe = self.path("recipe.toml");
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        barber(&[verb, recipe.to_str().unwrap()].into_iter().chain(sets).collect::<Vec<_>>())
    }

    #[track_caller]
    fn succeeds(&self, verb: &str, sets: &[&str]) -> String {
        let run = self.run(verb, sets);
        assert_eq!(run.status, 0, "{}{}", run.stdout, run.stderr);
        run.stdout
    }

    fn on_result(&self, verb: &str) -> Run {
        barber(&[verb, self.path("out").to_str().unwrap()])
    }

    fn report(&self) -> Value {
        let report = fs::read(self.path("out/barber-report.json")).unwrap();
        serde_json::from_slice(&report).unwrap()
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
}

/// The orders of a report, by the tensor name of the output projection.
fn orders(report: &Value) -> BTreeMap<String, Vec<usize>> {
    let parts = report["permuted"].as_array().unwrap().iter();
    let orders = parts.flat_map(|part| part["orders"].as_object().unwrap());
    let numbers = |order: &Value| -> Vec<usize> {
        order.as_str().unwrap().split(", ").map(|number| number.parse().unwrap()).collect()
    };
    orders.map(|(name, order)| (name.clone(), numbers(order))).collect()
}

/// Plain, grouped, fused, with biases, stacked and transposed, quantised.
#[test]
fn results_are_the_dense_model_in_another_order() {
    for fixture in ["gqa-tied", "opt", "gpt-neox", "phi3", "mixtral", "qwen3-moe", "gpt-oss", "fp8"]
    {
        let case = Case::new(fixture);
        let said = case.succeeds("check", &[]) + &case.succeeds("prune", &[]);
        assert_eq!(said.matches("permute   inner channels of").count(), 2, "{said}");
        let report = case.report();
        let orders = orders(&report);
        assert!(!orders.is_empty(), "{fixture}: {report}");
        for part in report["permuted"].as_array().unwrap() {
            let falls = |on: &str| {
                part["after"][on].as_f64().unwrap() < part["before"][on].as_f64().unwrap()
            };
            let accepted = !part["orders"].as_object().unwrap().is_empty();
            assert!(!accepted || falls("held_out"), "{part}");
        }
        for verb in ["verify", "reproduce"] {
            let run = case.on_result(verb);
            assert_eq!(run.status, 0, "{fixture}: {}{}", run.stdout, run.stderr);
            let words = format!("inner channels of {} output", orders.len());
            assert!(verb == "reproduce" || run.stdout.contains(&words), "{}", run.stdout);
        }
        let page = fs::read_to_string(case.path("out/barber-report.html")).unwrap();
        let card = fs::read_to_string(case.path("out/README.md")).unwrap();
        assert!(page.contains("channels were put in another order"));
        assert!(card.contains("- Permuted: inner channels in"), "{card}");
    }
}

/// Without Barber's own arithmetic: kept weights of down_proj are the dense ones of the reported columns.
#[test]
fn kept_weights_are_at_their_places() {
    let case = Case::new("gqa-tied");
    case.succeeds("prune", &["output.masks=false"]);
    let (dense, found) = (tensors(&case.path("dense")), tensors(&case.path("out")));
    for (name, order) in orders(&case.report()).iter().filter(|(name, _)| name.contains("down")) {
        let (dtype, shape, bytes) = &dense[name];
        let (size, columns) = (dtype.bitsize() / 8, shape[1]);
        let mut moved = 0;
        for (i, weight) in found[name].2.chunks(size).enumerate() {
            let (row, column) = (i / columns, order[i % columns]);
            let at = (row * columns + column) * size;
            if weight.iter().any(|byte| *byte != 0) {
                assert_eq!(weight, &bytes[at..at + size]);
                moved += usize::from(column != i % columns);
            }
        }
        assert!(moved > 0);
    }
}

#[test]
fn a_spoiled_permutation_is_found() {
    let case = Case::new("gqa-tied");
    case.succeeds("prune", &[]);
    let path = case.path("out/barber-report.json");
    let written = fs::read_to_string(&path).unwrap();
    let (name, order) = orders(&case.report()).pop_first().unwrap();
    let text = |order: &[usize]| order.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let spoil = |order: &[usize], wrong: &str| {
        let mut report: Value = serde_json::from_str(&written).unwrap();
        for part in report["permuted"].as_array_mut().unwrap() {
            if let Some(of) = part["orders"].get_mut(&name) {
                *of = text(order).into();
            }
        }
        fs::write(&path, report.to_string()).unwrap();
        let run = case.on_result("verify");
        assert_eq!(run.status, 1, "{}", run.stdout);
        let said = flat(&run.stdout);
        assert!(said.contains(wrong), "{said}");
    };
    let mut other = order.clone();
    other.swap(0, 1);
    spoil(&other, "kept weights are not the dense model's");
    let twice = [&order[..1], &order[..1], &order[2..]].concat();
    spoil(&twice, "cannot be in the order");
    spoil(&order[1..], "cannot be in the order");
}

#[test]
fn what_cannot_be_permuted_is_said_at_the_start() {
    let case = Case::new("gqa-tied");
    let wanda = "refine=[]";
    for (sets, words) in [
        (&["sparsity.pattern='unstructured'"][..], &["sparsity.permute", "patterns N:M alone"][..]),
        (
            &[
                "sparsity.structure='heads'",
                "sparsity.pattern='unstructured'",
                "output.masks=false",
            ],
            &["sparsity.permute", "key/value heads are removed as a whole"],
        ),
        (&["mask.init='none'", wanda], &["sparsity.permute", "order of its channels"]),
        (
            &["sparsity.exclude=['*.down_proj', '*.o_proj']"],
            &["sparsity.permute", "no output projection"],
        ),
    ] {
        case.refuses(sets, words);
    }
    // Tiles that span heads are left as they are.
    let deepseek = Case::new("deepseek-v3");
    let said = flat(&deepseek.succeeds("check", &["sparsity.exclude=['*.kv_b_proj']"]));
    assert!(said.contains("whose tiles span several heads"), "{said}");
    // A result with permuted channels is no mask of the dense model.
    case.succeeds("prune", &["output.masks=false", wanda]);
    fs::rename(case.path("out"), case.path("sparse")).unwrap();
    let [sparse, dense] = [("path", "sparse"), ("dense", "dense")]
        .map(|(key, name)| format!("model.{key}='{}'", case.path(name).display()));
    let zeros = ["mask.init='none'", "sparsity.permute=false", "output.masks=false"];
    let run = case.run("prune", &[&[&*sparse, &*dense], &zeros[..]].concat());
    assert_eq!(run.status, 1, "{}", run.stderr);
    assert!(flat(&run.stderr).contains("was made with `sparsity.permute`"), "{}", run.stderr);
    // On its own, it is a sparse model like any other.
    case.succeeds("prune", &[&[&*sparse, wanda], &zeros[..]].concat());
}
