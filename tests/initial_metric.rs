//! Initial masks by a pipeline of metrics.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use util::{barber, flat, recipe, tensors};

const WANDA: &str = "mask.metric=[{ use = 'magnitude' }, { use = 'activation-norm' }]";

#[test]
fn wandas_metric_makes_wandas_masks() {
    for more in [
        &["sparsity.pattern=unstructured"][..],
        &["sparsity.pattern=2:4"],
        &["refine=[{ use = 'swap', limit = 3 }]", "mask.passes=1"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path(), "");
        let masks = |name: &str, init: &[&str]| {
            let output = dir.path().join(name);
            let output_path = format!("output.path={}", output.display());
            let sets = [&["refine=[]", &output_path], init, more].concat();
            let sets = sets.iter().flat_map(|set| ["--set", set]);
            let run = barber(&["prune", &recipe].into_iter().chain(sets).collect::<Vec<_>>());
            assert_eq!(run.status, 0, "{}", run.stderr);
            (run.stdout, tensors(&output))
        };
        let (_, wanda) = masks("wanda", &["mask.init=wanda"]);
        let (shown, metric) = masks("metric", &["mask.init=metric", WANDA]);
        assert!(shown.contains("mask      metric magnitude · activation-norm"), "{shown}");
        assert!(wanda == metric, "{more:?}");
        let (_, layer) = masks("layer", &["mask.init=metric", WANDA, "mask.scope=layer"]);
        // A tile is a tile, wherever else weights compete.
        assert_eq!(layer == wanda, more[0].ends_with("2:4"), "{more:?}");
        let (_, ria) = masks("ria", &["mask.init=metric", "mask.metric=[{ use = 'ria' }]"]);
        assert!(ria != wanda);
    }
}

#[test]
fn what_needs_no_inputs_needs_no_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    let model = std::env::current_dir().unwrap().join(util::TINY);
    let text = format!(
        "model.path = '{}'\noutput.path = 'out'\n[mask]\ninit = 'metric'\nmetric = [{{ use = 'random' }}]\n",
        model.display()
    );
    std::fs::write(&recipe, text).unwrap();
    let recipe = recipe.to_str().unwrap();
    assert_eq!(barber(&["prune", recipe]).status, 0);
    let ria = barber(&["prune", recipe, "--force", "--set", "mask.metric=[{ use = 'ria' }]"]);
    assert_eq!(ria.status, 2);
    assert!(flat(&ria.stderr).contains("calibration.source"), "{}", ria.stderr);
}
