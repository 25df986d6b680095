//! Barber's command line with the metric `row-magnitude` beside the built-in ones.

use outside_metric as _;

fn main() -> std::process::ExitCode {
    llm_barber::cli::main()
}
