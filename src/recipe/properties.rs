//! Properties of all recipes.

use std::{fs, path::Path};

use proptest::{prelude::*, sample::select};
use toml::{Table, Value};

use super::{Loaded, load_text};

/// A key, and values that it can have whatever the others are.
fn setting() -> impl Strategy<Value = (&'static str, Value)> {
    let fraction = || (0.0..1.0_f64).prop_map(Value::from);
    let any = |values: &'static [&'static str]| select(values).prop_map(parse);
    let of = |key: &'static str, value: BoxedStrategy<Value>| (Just(key), value);
    prop_oneof![
        of("preset", any(&["'paper'", "'best'", "'fast'"]).boxed()),
        of("model.revision", any(&["'main'", "'ü \"'"]).boxed()),
        of("calibration.source", any(&["'a.txt'", "'b/c.txt'"]).boxed()),
        of("calibration.samples", (1..1000i64).prop_map(Value::from).boxed()),
        of("calibration.held_out", (0..1000i64).prop_map(Value::from).boxed()),
        of("calibration.seed", (0..=i64::MAX).prop_map(Value::from).boxed()),
        of("calibration.selection", any(&["'random'", "'packed'"]).boxed()),
        of("sparsity.ratio", fraction().boxed()),
        of("sparsity.spread", fraction().boxed()),
        of("sparsity.exclude", any(&["[]", "['lm_head', '*.q_proj']"]).boxed()),
        of("mask.init", any(&["'wanda'", "'sparsegpt'", "'magnitude'"]).boxed()),
        of("mask.passes", (1..=2_i64).prop_map(Value::from).boxed()),
        of("streams.blend", fraction().boxed()),
        of("executor.memory", any(&["'6 GiB'", "'1.5 GB'", "12345", "0"]).boxed()),
        of("output.dtype", any(&["'f32'", "'bf16'"]).boxed()),
        of("evaluate.perplexity", any(&["[]", "['a', { path = 'b', join = ' ' }]"]).boxed()),
        of("evaluate.tasks.piqa", any(&["'p'", "'q'"]).boxed()),
        of("evaluate.tasks.rte", any(&["'r'"]).boxed()),
        of("evaluate.generate", any(&["0", "[]", "['a']", "['b', 'c']"]).boxed()),
        of("blocks", any(&["[]", "[{ name = 'a', layers = ['q_proj'] }]"]).boxed()),
        of("override", any(&["[]", "[{ tensors = '*.q_proj', ratio = 0.3 }]"]).boxed()),
        of("refine", refine().boxed()),
        of(
            "metric",
            any(&["[{ use = 'magnitude', power = 0.1 }]", "[{ use = 'gradient' }]"]).boxed()
        ),
    ]
}

/// An array of stages.
fn refine() -> impl Strategy<Value = Value> {
    let rebuild = |(alpha, rounds): (f64, usize)| {
        parse(&format!("{{ use = 'rebuild', alpha = {alpha:?}, rounds = {rounds} }}"))
    };
    let swap = |limit: u32| parse(&format!("{{ use = 'swap', limit = {limit} }}"));
    let fixed = [
        "{ use = 'rebuild', alpha = 'auto', rounds = 'until-converged', scope = 'layer' }",
        "{ use = 'reconstruct' }",
        "{ use = 'reconstruct', method = 'gradient', rate = 0.1 }",
    ];
    let stage = prop_oneof![
        (0.0..=1.0, 1..9_usize).prop_map(rebuild),
        any::<u32>().prop_map(swap),
        select(fixed.map(parse).to_vec()),
    ];
    prop::collection::vec(stage, 0..3).prop_map(Value::from)
}

/// A value as TOML writes it.
fn parse(text: &str) -> Value {
    toml::from_str::<Table>(&format!("value = {text}")).unwrap().remove("value").unwrap()
}

/// A part of a recipe.
fn part() -> impl Strategy<Value = Table> {
    prop::collection::vec(setting(), 0..6).prop_map(|settings| {
        let mut part = Table::new();
        for (key, value) in settings {
            let nested = key.rsplit('.').fold(value, |value, segment| {
                Table::from_iter([(segment.to_owned(), value)]).into()
            });
            if let Value::Table(nested) = nested {
                part = over(part, nested);
            }
        }
        part
    })
}

/// One table merged over another, as users expect of layers.
fn over(below: Table, above: Table) -> Table {
    let mut merged = below;
    for (key, value) in above {
        let value = match (merged.remove(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => over(below, above).into(),
            (_, value) => value,
        };
        merged.insert(key, value);
    }
    merged
}

fn fine() -> Table {
    let text = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'";
    toml::from_str(text).unwrap()
}

/// Resolves recipes, each of which extends the one before it.
fn load(dir: &Path, parts: &[&Table]) -> Loaded {
    let mut text = String::new();
    for (i, part) in parts.iter().enumerate() {
        let mut part = (*part).clone();
        if i > 0 {
            part.insert("extends".into(), format!("{}.toml", i - 1).into());
        }
        text = toml::to_string(&part).unwrap();
        fs::write(dir.join(format!("{i}.toml")), &text).unwrap();
    }
    load_text(&dir.join("top.toml"), &text, [], &[]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_resolved_recipe_says_the_same(part in part()) {
        let text = toml::to_string(&over(fine(), part)).unwrap();
        let recipe = load_text(Path::new("dir/r.toml"), &text, [], &[]).unwrap().recipe;
        let written = recipe.to_toml().unwrap();
        let again = load_text(Path::new("r.toml"), &written, [], &[]).unwrap().recipe;
        prop_assert_eq!(&again, &recipe);
        prop_assert_eq!(again.to_toml().unwrap(), written);
    }

    /// Three recipes that extend one another resolve to the same values if the upper or the lower
    /// two are merged first.
    #[test]
    fn layers_are_associative(low in part(), middle in part(), high in part()) {
        let dir = tempfile::tempdir().unwrap();
        let low = over(fine(), low);
        let recipe = |parts: &[&Table]| load(dir.path(), parts).recipe;
        let chain = recipe(&[&low, &middle, &high]);
        let lower = over(low.clone(), middle.clone());
        let upper = over(middle, high.clone());
        prop_assert_eq!(&recipe(&[&lower, &high]), &chain);
        prop_assert_eq!(&recipe(&[&low, &upper]), &chain);
        prop_assert_eq!(&recipe(&[&over(lower, high)]), &chain);
    }
}
