//! `barber metrics`.

use serde_json::{Value, json};

use super::Error;

/// Lists the metrics that a recipe's pipeline can use, with their parameters and what they need.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

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
    println!(
        "Metrics for a recipe's [[metric]] stages; each works on the scores of the one before."
    );
    for (name, plugin) in metrics {
        println!("\n{name}\n    {}\n    needs: {}", plugin.help, plugin.needs());
        for parameter in plugin.parameters() {
            println!("    {} = {}   # {}", parameter.name, parameter.default, parameter.help);
        }
    }
    Ok(())
}
