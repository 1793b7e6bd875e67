//! The `tidegate` command: reads the command line, does what it says, and ends with a code that says how that went.

mod cli;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{
    arguments::{Arguments, Command, KeyCommand},
    commands,
    exit::{Exit, Failure},
    serve::serve,
};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let Arguments { command, settings } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // Help and version are what was asked for.
            return if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS };
        }
    };
    let done = match command {
        None => serve(settings),
        Some(Command::Check) => commands::check(&settings),
        Some(Command::Config) => commands::show_config(&settings),
        Some(Command::Key { command: KeyCommand::New { name, rights } }) => commands::make_key(name, rights.into()),
        Some(Command::Token { sub, rights, expires }) => commands::make_token(&settings, sub, rights.into(), expires),
        Some(Command::Man) => commands::man(),
        Some(Command::Completions { shell }) => commands::completions(shell),
    };
    done.unwrap_or_else(|Failure(exit, error)| {
        eprintln!("tidegate: {error}");
        exit.into()
    })
}
