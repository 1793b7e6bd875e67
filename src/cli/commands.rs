//! Small commands: they look at settings, make keys and tokens, and print what packages need.

use std::{
    io::{ErrorKind, Write},
    process::ExitCode,
    time::Duration,
};

use clap::CommandFactory;
use clap_complete::Shell;
use tidegate::{
    auth::{self, Grant, NewKey},
    config::{Rights, advice},
    fd_limit,
    gateway::{Gateway, NOISE_OFF},
    log::Log,
};

use super::{
    arguments::{Arguments, Settings},
    exit::{Exit, Failure},
    serve::runtime,
};

/// Prints to stdout. A reader that has seen enough (`| head`) may close it.
pub fn say(text: &str) -> Result<ExitCode, Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure(Exit::System, format!("stdout: {error}").into()))
        }
        Ok(()) | Err(_) => Ok(ExitCode::SUCCESS),
    }
}

pub fn show_config(settings: &Settings) -> Result<ExitCode, Failure> {
    let sources = settings.read()?;
    sources.config()?;
    say(&sources.to_string())
}

pub fn check(settings: &Settings) -> Result<ExitCode, Failure> {
    let sources = settings.read()?;
    let mut config = sources.config_to_serve()?;
    let _log = Log::start(&config.log, NOISE_OFF)?;
    say("settings: they can be used\n")?;
    for advice in advice(&config, &sources) {
        say(&format!("warning: {advice}\n"))?;
    }
    match fd_limit::raise(&mut config) {
        Some(too_few) => say(&format!("open files: {too_few}\n"))?,
        None => say("open files: enough for limits.streams, limits.connections and admin.connections\n")?,
    };
    let [access, broker] = runtime()?.block_on(Gateway::check(&config))?;
    say(&format!("{access}\n{broker}\n"))
}

pub fn make_key(name: String, rights: Rights) -> Result<ExitCode, Failure> {
    say(&format!("{}\n", NewKey::make(name, rights)))
}

pub fn make_token(
    settings: &Settings,
    sub: Option<String>,
    rights: Rights,
    lifetime: Duration,
) -> Result<ExitCode, Failure> {
    let token = auth::mint(&settings.read()?.config()?.auth.jwt, &Grant { sub, rights, lifetime });
    say(&format!("{}\n", token.map_err(|error| Failure(Exit::Config, error.into()))?))
}

pub fn man() -> Result<ExitCode, Failure> {
    let mut page = vec![];
    clap_mangen::Man::new(Arguments::command()).render(&mut page).expect("writing to memory does not fail");
    say(&String::from_utf8_lossy(&page))
}

pub fn completions(shell: Shell) -> Result<ExitCode, Failure> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Arguments::command(), "tidegate", &mut script);
    say(&String::from_utf8_lossy(&script))
}
