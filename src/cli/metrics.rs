//! `barber metrics`.

use serde_json::{Value, json};

use super::{Error, columns::wrapped};

/// Lists the metrics that a recipe's pipeline can use, with their parameters and the statistics
/// that they need.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const HEAD: &str = "\
Metrics for [[metric]], whose scores choose the swaps of a rebuild, and for [[mask.metric]], whose \
scores choose the initial masks with mask.init = \"metric\". Each metric transforms the scores of \
the one before. Initial masks cannot use gradients, unless whole structures are removed.";

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let metrics = barber_metric::registered()?;
    if arguments.json {
        let metrics: Vec<Value> = metrics
            .iter()
            .map(|(name, plugin)| {
                let parameters = plugin.parameters().into_iter().map(|parameter| {
                    json!({
                        "name": parameter.name,
                        "default": parameter.default,
                        "help": parameter.help,
                    })
                });
                json!({
                    "name": name,
                    "help": plugin.help,
                    "needs": plugin.needs().to_string(),
                    "structures": plugin.structures(),
                    "parameters": parameters.collect::<Vec<_>>(),
                })
            })
            .collect();
        println!("{}", Value::Array(metrics));
        return Ok(());
    }
    println!("{}", wrapped("", "", HEAD));
    for (name, plugin) in metrics {
        println!(
            "\n{name}\n{}\n    needs: {}",
            wrapped("    ", "    ", plugin.help),
            plugin.needs()
        );
        if !plugin.structures().is_empty() {
            println!("    scores: {}, no single weights", plugin.structures().join(", "));
        }
        for parameter in plugin.parameters() {
            let value = format!("    {} = {}   # ", parameter.name, parameter.default);
            let rest = format!("{:1$}# ", "", value.chars().count() - 2);
            println!("{}", wrapped(&value, &rest, &parameter.help));
        }
    }
    Ok(())
}
