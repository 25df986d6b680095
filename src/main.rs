//! The command `barber`.

use std::process::ExitCode;

fn main() -> ExitCode {
    llm_barber::cli::main()
}
