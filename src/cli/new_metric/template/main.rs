//! Barber with the metric `{{name}}`.

use {{module}} as _;

fn main() -> std::process::ExitCode {
    llm_barber::cli::main()
}
