//! `barber check`: shows and checks a recipe without running it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use bytesize::ByteSize;
use dfdx::tensor::Cpu;
use serde_json::{Value, json};

use super::{
    Error,
    columns::{commented, labelled, wrapped},
    progress::{Terminal, on_this_machine},
    show,
};
use crate::{
    checkpoint::MASKS,
    family::{Part, Projection},
    model::Model,
    permutation::Reach,
    plan::Plan,
    recipe::{Loaded, Setting, load_runs},
    run::{self, Checkpoints, Forecast, Shared, Tests, extent, look_ahead, masks, plan},
};

/// Shows and checks a recipe without running it: each value with its source, the groups and tensors
/// that it matches, and estimates of the run's memory, work and time. Downloads a model on the hub.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber check recipes/quickstart.toml
  barber check recipe.toml --set preset=best")]
pub(super) struct Arguments {
    /// The recipe, a TOML file.
    pub(super) recipe: PathBuf,
    /// Overrides a value of the recipe, such as sparsity.ratio=0.6. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print JSON, with each matrix.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let runs = load_runs(&arguments.recipe, &arguments.sets)?;
    let Some(loaded) = runs.first() else { return Ok(()) };
    let recipe = &loaded.recipe;
    let watch = Terminal { quiet: arguments.json };
    let checkpoints = Checkpoints::open(recipe, &watch);
    // The recipe is shown even if its model does not exist.
    let settled = match &checkpoints {
        Ok(checkpoints) => checkpoints.settled(recipe),
        Err(_) => recipe.clone(),
    };
    let settings = loaded.settings_of(&settled);
    let settings = settings.map_err(|e| run::Error::Report(e.to_string()))?;
    if !arguments.json {
        values(loaded, &settings);
        if !loaded.point.settings.is_empty() {
            let runs = runs.len();
            let sweep = format!("{runs} runs; the values above and below are those of the first");
            println!("\n{}", labelled("sweep", &sweep));
        }
        for run in runs.iter().filter(|run| !run.point.settings.is_empty()) {
            println!("  {}", run.point.name);
        }
    }
    let checkpoints = checkpoints?;
    let model = Model::new(&checkpoints.dense, Cpu::default())?;
    let plan = plan(loaded, &model)?;
    let mut shared = Shared::default();
    let tests = shared.tests(recipe, || Tests::read(recipe, &model)).or_else(|error| {
        loaded.find_texts()?;
        Err(Error::from(error))
    })?;
    let forecast = Forecast::new(loaded, &model, &plan, &tests, extent(recipe, &model)?)?;
    // The time cannot be measured if another machine will run the recipe.
    let time = forecast.time_here(&model.decoder);
    let found = forecast.takes;
    let advice: BTreeSet<String> = runs.iter().flat_map(Loaded::advice).collect();
    advice.iter().for_each(|advice| tracing::warn!("{advice}"));
    // Errors of runs come after the output for the first run.
    let fine = |shared: &mut Shared| {
        runs.iter().try_for_each(|run| {
            look_ahead(run, shared, &watch).map_err(|error| match run.point.settings.is_empty() {
                true => error.into(),
                false => Error::Run { run: run.point.name.clone(), error: Box::new(error.into()) },
            })
        })
    };
    let [prunable, pruned] = plan.weights(&model.decoder);
    let all = checkpoints.dense.weights();
    let quantisation = checkpoints.dense.quantisation()?.map(ToString::to_string);
    let masks = masks(recipe, &model, &plan)?;
    let reach = recipe.sparsity.permute.then(|| Reach::of(&plan, &model.decoder));
    if arguments.json {
        let runs = runs.iter().map(|run| run.point.name.as_str());
        let report = json!({
            "recipe": settings,
            "runs": runs.filter(|name| !name.is_empty()).collect::<Vec<_>>(),
            "layers": plan.layers.len(),
            "quantisation": quantisation,
            "matrices": members(&model, &plan),
            "prunable_weights": prunable,
            "pruned_weights": pruned,
            "model_weights": all,
            "mask_bytes": masks,
            "permuted_matrices": reach.map(|of| of.permuted),
            "warnings": advice,
            "memory": found.memory,
            "waiting": found.waiting,
            "operations": {
                "pruning": found.pruning,
                "solving": found.solving,
                "evaluation": found.evaluation,
            },
            "estimated_seconds": time.ok().map(|time| time.as_secs_f64()),
        });
        println!("{report}");
        return fine(&mut shared);
    }
    let named = format!("{} ({} layers)", show(recipe.model.reference().0), plan.layers.len());
    println!("\n{}", labelled("model", &named));
    if let Some(quantisation) = &quantisation {
        println!("{}", labelled("weights", quantisation));
    }
    matrices(&model, &plan);
    if let Some(reach) = reach {
        println!("{}", labelled("permute", &reach.to_string()));
    }
    if let Some(readers) = recipe.output.format.readers() {
        println!("{}", labelled("format", &readers));
    }
    if let Some(bytes) = masks {
        let masks = format!("{} in {MASKS}", ByteSize(bytes).display().si());
        println!("{}", labelled("masks", &masks));
    }
    let memory = format!(
        "about {} at the peak, beside the checkpoint's own pages: {} for the layers, and \
         {} of hidden states, which beyond executor.memory wait in a scratch file",
        scaled(found.memory + found.waiting, "B"),
        scaled(found.memory, "B"),
        scaled(found.waiting, "B")
    );
    let work = format!(
        "about {} of matrix products to prune, {} to measure perplexity",
        scaled(found.pruning, "FLOP"),
        scaled(found.evaluation, "FLOP")
    );
    if !recipe.mask.init.zeros {
        let fraction = |of: usize| 100.0 * pruned as f64 / of.max(1) as f64;
        let sparsity = format!(
            "{:.1}% of the {prunable} weights above, {:.1}% of all {all} weights of the model",
            fraction(prunable),
            fraction(all)
        );
        println!("{}", labelled("sparsity", &sparsity));
    }
    let unknown = |problem| format!("unknown: the time cannot be measured here: {problem}");
    let mut time = time.map_or_else(unknown, on_this_machine);
    if runs.len() > 1 {
        time += &format!(", for the first of the {} runs", runs.len());
    }
    for (label, text) in [("memory", memory), ("work", work), ("takes", time)] {
        println!("{}", labelled(label, &text));
    }
    fine(&mut shared)
}

/// Prints the values of a recipe with their sources.
fn values(loaded: &Loaded, settings: &[Setting]) {
    let lines = settings.iter().map(|Setting { key, value, source, .. }| {
        let swept = loaded.point.settings.iter().any(|(swept, _)| key == swept);
        let swept = if swept { ", swept" } else { "" };
        (format!("{key} = {value}"), format!("# {source}{swept}"))
    });
    println!("{}", commented(&lines.collect::<Vec<_>>()));
}

/// The pruned matrices with their rules.
fn members(model: &Model<'_, Cpu>, plan: &Plan) -> Vec<Value> {
    let groups = plan.layers.iter().zip(&model.decoder.layers).enumerate();
    let groups = groups
        .flat_map(|(index, (groups, layer))| groups.iter().map(move |group| (index, layer, group)));
    groups
        .flat_map(|(index, layer, group)| {
            group.members.iter().map(move |member| {
                let linear = member.of(layer);
                json!({
                    "tensor": linear.weight,
                    "layer": index,
                    "group": group.name,
                    "shape": [linear.dims.rows, linear.dims.columns],
                    "pattern": plan.what(index, *member),
                    "ratio": member.rule.ratio,
                })
            })
        })
        .collect()
}

/// A large number with its unit.
pub(super) fn scaled(number: f64, unit: &str) -> String {
    match number {
        n if n < 1e9 => format!("{:.0} M{unit}", n / 1e6),
        n if n < 1e12 => format!("{:.1} G{unit}", n / 1e9),
        n => format!("{:.1} T{unit}", n / 1e12),
    }
}

/// Prints the groups, and which layers' matrices are in them and how they are pruned.
fn matrices(model: &Model<'_, Cpu>, plan: &Plan) {
    let mut groups: Vec<&str> = Vec::new();
    let mut found: BTreeMap<(usize, usize, String), Places> = BTreeMap::new();
    let mut orders: BTreeMap<(usize, String), usize> = BTreeMap::new();
    let mut left: BTreeMap<String, Places> = BTreeMap::new();
    for (index, layer) in model.decoder.layers.iter().enumerate() {
        let mut pruned = BTreeSet::new();
        for group in &plan.layers[index] {
            let known = groups.iter().position(|name| *name == group.name);
            let place = known.unwrap_or_else(|| {
                groups.push(&group.name);
                groups.len() - 1
            });
            for (order, member) in group.members.iter().enumerate() {
                let linear = member.of(layer);
                let rule = member.rule;
                let line = format!(
                    "{} {}×{}, {:.1}% {}{}",
                    in_all_layers(linear, index),
                    linear.dims.rows,
                    linear.dims.columns,
                    100.0 * rule.ratio,
                    plan.what(index, *member),
                    rule.scope.map_or_else(String::new, |scope| format!(", scope {scope}"))
                );
                // The matrices of all experts are at the place of the first one's.
                let order = *orders.entry((place, line.clone())).or_insert(order);
                found.entry((place, order, line)).or_default().add(index, linear);
                pruned.insert(&linear.weight);
            }
        }
        let parts = Part::ALL.iter().flat_map(|part| layer.projections(*part));
        for linear in parts.filter(|linear| !pruned.contains(&linear.weight)) {
            left.entry(in_all_layers(linear, index)).or_default().add(index, linear);
        }
    }
    for (place, name) in groups.iter().enumerate() {
        println!("pruned    {name}");
        for ((_, _, line), places) in found.iter().filter(|((of, ..), _)| *of == place) {
            println!("{}", wrapped("  ", "    ", &format!("{line}; {places}")));
        }
    }
    if !left.is_empty() {
        println!("left as they are");
        for (name, places) in left {
            println!("{}", wrapped("  ", "    ", &format!("{name}; {places}")));
        }
    }
}

/// The layers, and the experts if there are any, that have a matrix.
#[derive(Default)]
struct Places {
    layers: BTreeSet<usize>,
    experts: BTreeSet<usize>,
}

impl Places {
    fn add(&mut self, layer: usize, of: &Projection) {
        self.layers.insert(layer);
        self.experts.extend(of.expert);
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&ranges("layer", &self.layers))?;
        if self.experts.is_empty() {
            return Ok(());
        }
        write!(f, "; {}", ranges("expert", &self.experts))
    }
}

/// The name of a weight's module, with `*` in place of its layer and of its expert.
fn in_all_layers(of: &Projection, layer: usize) -> String {
    let name = of.weight.strip_suffix(".weight").unwrap_or(&of.weight);
    let name = name.replacen(&format!(".{layer}."), ".*.", 1);
    match of.expert {
        Some(expert) => name.replacen(&format!(".experts.{expert}."), ".experts.*.", 1),
        None => name,
    }
}

/// Numbers as ranges: `layers 0-3, 5`.
fn ranges(noun: &str, of: &BTreeSet<usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in of {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let shown = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    let plural = if of.len() == 1 { "" } else { "s" };
    format!("{noun}{plural} {}", shown.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use barber_metric::Dims;

    use super::*;
    use crate::family::Role;

    #[test]
    fn numbers_have_units() {
        let shown = [4.2e6, 1.25e10, 3e12].map(|number| scaled(number, "B"));
        assert_eq!(shown, ["4 MB", "12.5 GB", "3.0 TB"]);
    }

    #[test]
    fn layers_are_shown_as_ranges() {
        assert_eq!(ranges("layer", &[0, 1, 2, 5, 7, 8].into()), "layers 0-2, 5, 7-8");
        assert_eq!(ranges("expert", &[3].into()), "expert 3");
        let of = |weight: &str, expert| Projection {
            name: String::new(),
            role: Role::Up,
            expert,
            weight: weight.into(),
            bias: None,
            dims: Dims { rows: 1, columns: 1 },
        };
        let dense = of("model.layers.3.mlp.up_proj.weight", None);
        assert_eq!(in_all_layers(&dense, 3), "model.layers.*.mlp.up_proj");
        let expert = of("model.layers.3.mlp.experts.3.up_proj.weight", Some(3));
        assert_eq!(in_all_layers(&expert, 3), "model.layers.*.mlp.experts.*.up_proj");
    }
}
