//! `barber metrics`.

use serde_json::{Value, json};

use super::{Error, columns::wrapped};

/// Lists the metrics that a recipe's pipeline can use, with their parameters and what they need.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const HEAD: &str = "\
Metrics for a recipe's [[metric]], by which rebuilds swap, and its [[mask.metric]], by which initial \
masks are chosen where mask.init is \"metric\"; each works on the scores of the one before. Initial \
masks know no gradients.";

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
        for parameter in plugin.parameters() {
            let value = format!("    {} = {}   # ", parameter.name, parameter.default);
            let rest = format!("{:1$}# ", "", value.chars().count() - 2);
            println!("{}", wrapped(&value, &rest, &parameter.help));
        }
    }
    Ok(())
}
