//! `barber metrics`.

use super::Error;

pub(super) fn run() -> Result<(), Error> {
    println!(
        "Metrics for a recipe's [[metric]] stages; each works on the scores of the one before."
    );
    for (name, plugin) in barber_metric::registered()? {
        println!("\n{name}\n    {}\n    needs: {}", plugin.help, plugin.needs());
        for parameter in plugin.parameters() {
            println!("    {} = {}   # {}", parameter.name, parameter.default, parameter.help);
        }
    }
    Ok(())
}
