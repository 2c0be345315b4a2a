//! The outermost layer of a program: any error is one line on stderr and exit code 2, an interruption
//! 128 and its signal.

use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;

use clap::Parser;

/// Why a program ends early.
pub enum Failure {
    /// Something the user can put right.
    User(String),
    /// Standard output is gone.
    Output(io::Error),
    /// This signal came, and what was begun is cleaned up.
    #[allow(dead_code)] // most programs have nothing to clean up, and let the signal end them
    Interrupted(u8),
}

impl From<quantkv::Error> for Failure {
    fn from(error: quantkv::Error) -> Self {
        Failure::User(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

/// Parses the command line and runs the program.
pub fn main<Args: Parser>(run: fn(&Args) -> Result<(), Failure>) -> ExitCode {
    // A panic is a bug, but one of a library may be caught and become an error (the tokenizer's
    // is): then it must not have printed anything. RUST_BACKTRACE shows all.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        panic::set_hook(Box::new(|_| ()));
    }
    panic::catch_unwind(|| run_to_exit_code(run)).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().map(String::as_str).or(cause.downcast_ref::<&str>().copied());
        note("error", &format!("internal error: {} (RUST_BACKTRACE=1 shows where)", text.unwrap_or("unknown")));
        ExitCode::from(101)
    })
}

fn run_to_exit_code<Args: Parser>(run: fn(&Args) -> Result<(), Failure>) -> ExitCode {
    let result = match parse() {
        Ok(args) => run(&args),
        Err(Ok(help)) => write!(io::stdout(), "{help}").map_err(Failure::Output),
        Err(Err(message)) => Err(Failure::User(message)),
    };
    let message = match result {
        Ok(()) => return ExitCode::SUCCESS,
        // The reader has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Err(Failure::Output(error)) => format!("cannot write to standard output: {error}"),
        Err(Failure::Interrupted(signal)) => {
            note("error", "interrupted");
            return ExitCode::from(128 + signal);
        }
        Err(Failure::User(message)) => message,
    };
    note("error", &message);
    ExitCode::from(2)
}

/// One line on stderr, whatever the message holds.
pub fn note(kind: &str, message: &str) {
    let line: Vec<&str> = message.split_whitespace().collect();
    // Nowhere to complain to if stderr is closed.
    let _ = writeln!(io::stderr(), "{kind}: {}", line.join(" "));
}

/// Parses the command line. `Err` holds what to print: help and version for stdout (`Ok` inside),
/// or one line for stderr.
fn parse<Args: Parser>() -> Result<Args, Result<String, String>> {
    Args::try_parse().map_err(|error| {
        let text = error.render().to_string();
        if !error.use_stderr() {
            return Ok(text);
        }
        // clap's message, then usage and hints in paragraphs of their own.
        let message = text.split("\n\n").next().unwrap_or_default();
        let message = message.strip_prefix("error: ").unwrap_or(message);
        Err(message.split_whitespace().collect::<Vec<_>>().join(" "))
    })
}

/// A whole number above zero, for clap.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("expected a whole number".into()),
    }
}
