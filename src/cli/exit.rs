//! How the process ends: sysexits.h's codes, and which error has which.

use std::{error::Error, process::ExitCode};

use tidegate::{
    config::ConfigError,
    gateway::{Need, StartError},
    log::ParseError,
};

/// How the program ends, as sysexits.h numbers it.
#[derive(Clone, Copy)]
pub enum Exit {
    Usage = 64,
    NoInput = 66,
    Unavailable = 69,
    Software = 70,
    System = 71,
    Unfit = 76,
    NoPermission = 77,
    Config = 78,
    /// By a second signal.
    Interrupted = 130,
}

/// Why the program ends, and what it says of it.
pub struct Failure(pub Exit, pub Box<dyn Error>);

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        let exit = match &error {
            ConfigError::Unreadable { .. } => Exit::NoInput,
            ConfigError::Wrong { .. } | ConfigError::Rule(_) => Exit::Config,
        };
        Failure(exit, error.into())
    }
}

impl From<ParseError> for Failure {
    fn from(error: ParseError) -> Failure {
        Failure(Exit::Config, format!("log.filter: {error}").into())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        let exit = match error.need() {
            Need::Settings => Exit::Config,
            Need::File => Exit::NoInput,
            Need::Broker => Exit::Unavailable,
            Need::Machine => Exit::System,
            Need::Fitness => Exit::Unfit,
            Need::Permission => Exit::NoPermission,
        };
        Failure(exit, error.into())
    }
}
