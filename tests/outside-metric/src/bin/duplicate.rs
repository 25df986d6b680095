//! A binary that links a second metric of a name that is taken: every use of metrics is an error.

use barber_metric::{MetricPlugin, inventory};
use outside_metric::RowMagnitude;

inventory::submit! { MetricPlugin::of::<RowMagnitude>("magnitude", "another magnitude") }

fn main() -> std::process::ExitCode {
    llm_barber::cli::main()
}
