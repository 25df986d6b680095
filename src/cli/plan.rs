//! `barber plan`: what a run takes on several devices.

use std::path::PathBuf;

use serde_json::json;

use super::{Error, check::scaled, columns::labelled, show, table::Table};
use crate::{
    recipe::load,
    run::{OnRanks, Outlook, Rates, Seconds},
};

/// Counts what a recipe's run takes on several devices, one for each rank: memory, what ranks send,
/// and the time at given rates. Of the model only config.json is read, of texts nothing.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber plan recipe.toml --ranks 1,8
  barber plan recipes/paper-wanda-50.toml --set model.path=benches/shapes/llama-3.1-70b")]
pub(super) struct Arguments {
    /// The recipe, a TOML file.
    pub(super) recipe: PathBuf,
    /// Overrides a value of the recipe, such as sparsity.ratio=0.6. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Numbers of ranks.
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,64",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    ranks: Vec<u16>,
    /// Operations a second of a device's matrix products, in f32.
    #[arg(long, value_name = "FLOP/s", default_value = "50e12", value_parser = positive)]
    rate: f64,
    /// Operations a second of matrix products of the cores that a rank has on its host.
    #[arg(long, value_name = "FLOP/s", default_value = "2e12", value_parser = positive)]
    host_rate: f64,
    /// Bytes a second that a rank sends to others.
    #[arg(long, value_name = "B/s", default_value = "25e9", value_parser = positive)]
    link: f64,
    /// Bytes a second that a rank reads of the weights.
    #[arg(long, value_name = "B/s", default_value = "2e9", value_parser = positive)]
    disk: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A positive number.
fn positive(text: &str) -> Result<f64, &'static str> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or("expected a number above 0, such as 25e9")
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let loaded = load(&arguments.recipe, &arguments.sets)?;
    let outlook = Outlook::new(&loaded)?;
    let &Arguments { rate: device, host_rate: host, link, disk, .. } = arguments;
    let rates = Rates { device, host, link, disk };
    let of = |ranks: &u16| outlook.on((*ranks).into(), rates);
    let found = arguments.ranks.iter().map(of).collect::<Result<Vec<OnRanks>, _>>()?;
    let Some(first) = found.first() else { return Ok(()) };
    if arguments.json {
        let ranks: Vec<_> = found.iter().map(described).collect();
        let report = json!({
            "weight_bytes": outlook.bytes,
            "not_counted": outlook.unknown,
            "operations": {
                "pruning": first.takes.pruning,
                "solving": first.takes.solving,
                "evaluation": first.takes.evaluation,
            },
            "ranks": ranks,
        });
        println!("{report}");
        return Ok(());
    }
    let recipe = &loaded.recipe;
    let layers = outlook.plan.layers.len();
    let bytes = scaled(outlook.bytes, "B");
    let model = format!("{} ({layers} layers, {bytes})", show(recipe.model.reference().0));
    println!("{}", labelled("model", &model));
    let takes = &first.takes;
    let work = format!(
        "about {} of matrix products to prune, {} to measure perplexity",
        scaled(takes.pruning, "FLOP"),
        scaled(takes.evaluation, "FLOP")
    );
    println!("{}", labelled("work", &work));
    if !outlook.unknown.is_empty() {
        let unknown = outlook.unknown.join(", ");
        let text = format!("{unknown}: set evaluate.segments to count a text; tasks never are");
        println!("{}", labelled("not counted", &text));
    }
    let row = |name: &str, of: &dyn Fn(&OnRanks) -> String| {
        std::iter::once(name.to_owned()).chain(found.iter().map(of)).collect::<Vec<_>>()
    };
    let seconds = |name: &str, of: fn(&Seconds) -> f64| row(name, &|on| time(of(&on.seconds)));
    let rows = vec![
        row("ranks", &|on| on.split.ranks.to_string()),
        row("of them with samples", &|on| on.split.busy().to_string()),
        row("memory of a rank", &|on| scaled(on.memory(), "B")),
        row("sent by a rank", &|on| scaled(on.sent().first, "B")),
        row("sent by all", &|on| scaled(on.sent().all, "B")),
        seconds("passes, split", |of| of.passes),
        seconds("measuring, split", |of| of.measuring),
        seconds("search for swaps", |of| of.search),
        seconds("masks and values", |of| of.masks),
        seconds("exchange", |of| of.exchange),
        seconds("weights read, written", |of| of.disk),
        seconds("time", Seconds::sum),
    ];
    println!("\n{}", Table::new("A run on several ranks, with a device each", rows));
    Ok(())
}

/// The JSON of a run on some ranks.
fn described(on: &OnRanks) -> serde_json::Value {
    let Seconds { passes, measuring, search, masks, exchange, disk } = on.seconds;
    json!({
        "ranks": on.split.ranks,
        "busy": on.split.busy(),
        "memory": on.memory(),
        "sent": { "first": on.sent().first, "all": on.sent().all },
        "operations": {
            "passes": on.takes.of_first.passes,
            "solving": on.takes.of_first.solving,
            "choosing": on.takes.of_first.choosing,
            "evaluation": on.takes.of_first.evaluation,
        },
        "seconds": {
            "passes": passes,
            "measuring": measuring,
            "search": search,
            "masks": masks,
            "exchange": exchange,
            "disk": disk,
            "all": on.seconds.sum(),
        },
    })
}

/// A time, with two digits.
fn time(seconds: f64) -> String {
    let (number, unit) = match seconds {
        s if s < 100.0 => (s, "s"),
        s if s < 6000.0 => (s / 60.0, "min"),
        s => (s / 3600.0, "h"),
    };
    let decimals = usize::from(number > 0.0 && number < 9.95);
    format!("{number:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_digits() {
        let found = [0.0, 0.26, 12.3, 540.0, 5_990.0, 7_000.0, 1e6].map(time);
        assert_eq!(found, ["0 s", "0.3 s", "12 s", "9.0 min", "100 min", "1.9 h", "278 h"]);
    }

    #[test]
    fn rates_are_positive() {
        assert_eq!(positive("25e9"), Ok(25e9));
        for wrong in ["0", "-1", "nan", "inf", "fast"] {
            assert!(positive(wrong).is_err(), "{wrong}");
        }
    }
}
