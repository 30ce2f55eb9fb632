//! The `longsight` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    longsight::cli::main()
}
