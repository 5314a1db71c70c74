//! The command line: sandboxes of one host, by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    roost_agent::cli::main()
}
