//! Repository chores: `cargo xtask tidy`.

use std::path::Path;
use std::process::ExitCode;

mod tidy;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tidy"] => report(tidy::run(repository_root())),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

const USAGE: &str = "\
Usage: cargo xtask tidy

  tidy   checks what the compiler does not: which crates may use which, file and
         function length, module docs, unsafe code, leftovers. Changes nothing.
";

/// The workspace's directory: this crate lives two levels below it.
fn repository_root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn report(outcome: anyhow::Result<tidy::Report>) -> ExitCode {
    match outcome {
        Ok(report) if report.problems.is_empty() => {
            println!("tidy: {} files in {} crates, nothing to say", report.files, report.crates);
            ExitCode::SUCCESS
        }
        Ok(report) => {
            for problem in &report.problems {
                eprintln!("tidy: {problem}");
            }
            eprintln!("tidy: {} problems", report.problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("tidy: {error:#}");
            ExitCode::FAILURE
        }
    }
}
