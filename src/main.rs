//! The `tidegate` command: configuration, start, signals, drain. And small ones that look at a configuration, and that
//! make keys and tokens.

use std::{
    error::Error,
    io::{ErrorKind, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use tidegate::{
    auth::{self, Grant, NewKey},
    config::{Config, ConfigError, Rights, Sources, advice, parse_duration},
    fd_limit,
    gateway::{Gateway, NOISE_OFF, Need, StartError},
    log::{Log, ParseError},
    subject::Filter,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How the program ends, as sysexits.h numbers it.
#[derive(Clone, Copy)]
enum Exit {
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

const AFTER_HELP: &str = "\
Without a command it runs the gateway; without --nats on a broker of its own, in memory.

Settings come from the file, the environment and flags, and the last one wins. They have the same names everywhere:
sse.heartbeat is TIDEGATE_SSE__HEARTBEAT and --set sse.heartbeat=5s. `tidegate config` prints them all.

Signals:
  TERM, INT  drain: not ready, then streams end one by one, then exit; once more: exit at once
  HUP        read the settings again: keys, policies, limits and what is logged; no stream notices

Exit codes:
    0  ended in order
   64  the command line is wrong
   66  a file that the settings name can't be read, or the file of settings itself
   69  NATS can't be reached, or has no JetStream
   70  a part that can't be made anew has ended: a defect
   71  an address is taken, or this machine has no more threads
   76  the NATS server or the stream does not fit
   77  NATS does not let the user in, or not do what is needed
   78  the settings can't be used
  130  a second signal cut the drain short";

/// Streams events from NATS to browsers, curl and anything else that speaks HTTP, exactly from where they left off.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
struct Settings {
    /// A file of settings (TOML); src/config.default.toml explains all of them
    #[arg(long, global = true, value_name = "FILE", env = "TIDEGATE_CONFIG")]
    config: Option<PathBuf>,
    /// Where clients connect [default: 127.0.0.1:8080]
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where metrics and health are [default: 127.0.0.1:9090]
    #[arg(long, global = true, value_name = "ADDRESS")]
    admin_listen: Option<String>,
    /// The NATS servers to be a gateway of, as in nats://127.0.0.1:4222 [default: an embedded broker]
    #[arg(long, global = true, value_name = "URL")]
    nats: Option<String>,
    /// Any setting, as in sse.heartbeat=5s; may be given several times
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
}

#[derive(Subcommand)]
enum Command {
    /// Says whether a gateway could start with these settings, by reading keys and asking NATS; changes nothing
    Check,
    /// Prints the settings that are in force and where each comes from, without secrets
    Config,
    /// API keys for backends
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Prints a token for development, made with auth.jwt.secret
    Token {
        /// The token's `sub`
        #[arg(long, value_name = "NAME")]
        sub: Option<String>,
        #[command(flatten)]
        rights: RightsArguments,
        /// How long it is good, as in 90s, 15m or 1h
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = lifetime)]
        expires: Duration,
    },
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Prints a new key, and what to put into the configuration for it
    New {
        /// Name of the key
        #[arg(long, default_value = "backend")]
        name: String,
        #[command(flatten)]
        rights: RightsArguments,
    },
}

#[derive(Args)]
struct RightsArguments {
    /// What it may read, as in orders.>; may be given several times
    #[arg(long, value_name = "FILTER", value_parser = Filter::parse)]
    subscribe: Vec<Filter>,
    /// What it may publish to; may be given several times
    #[arg(long, value_name = "FILTER", value_parser = Filter::parse)]
    publish: Vec<Filter>,
}

/// Why the program ends, and what it says of it.
struct Failure(Exit, Box<dyn Error>);

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
        Some(Command::Check) => check(&settings),
        Some(Command::Config) => show_config(&settings),
        Some(Command::Key { command: KeyCommand::New { name, rights } }) => {
            say(&format!("{}\n", NewKey::make(name, rights.into())))
        }
        Some(Command::Token { sub, rights, expires }) => {
            make_token(&settings, &Grant { sub, rights: rights.into(), lifetime: expires })
        }
    };
    done.unwrap_or_else(|Failure(exit, error)| {
        eprintln!("tidegate: {error}");
        exit.into()
    })
}

fn make_token(settings: &Settings, grant: &Grant) -> Result<ExitCode, Failure> {
    let token = auth::mint(&settings.read()?.config()?.auth.jwt, grant);
    say(&format!("{}\n", token.map_err(|error| Failure(Exit::Config, error.into()))?))
}

/// Prints to stdout. A reader that has seen enough (`| head`) may close it.
fn say(text: &str) -> Result<ExitCode, Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure(Exit::System, format!("stdout: {error}").into()))
        }
        Ok(()) | Err(_) => Ok(ExitCode::SUCCESS),
    }
}

fn show_config(settings: &Settings) -> Result<ExitCode, Failure> {
    let sources = settings.read()?;
    sources.config()?;
    say(&sources.to_string())
}

fn check(settings: &Settings) -> Result<ExitCode, Failure> {
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

fn serve(settings: Settings) -> Result<ExitCode, Failure> {
    let sources = settings.read()?;
    let mut config = sources.config_to_serve()?;
    let log = Log::start(&config.log, NOISE_OFF)?;
    provide_files(&mut config);
    runtime()?.block_on(run(config, Reloading { settings, began_with: sources, log }))
}

async fn run(config: Config, reloading: Reloading) -> Result<ExitCode, Failure> {
    let mut signals = Signals::new();
    // Of what can't be used, the error says enough.
    let advice = advice(&config, &reloading.began_with);
    let mut gateway = Gateway::start(config).await?;
    advice.iter().for_each(|advice| tracing::warn!("{advice}"));
    greet(&gateway)?;
    loop {
        // Cancellation: neither takes anything before it is ready.
        tokio::select! {
            told = signals.next() => match told {
                Told::Reload => reloading.reload(&gateway).await,
                Told::End => break,
            },
            () = gateway.failed() => return Err(Failure(Exit::Software, "the HTTP servers have ended".into())),
        }
    }
    tracing::info!("draining");
    tokio::select! {
        () = gateway.drain() => Ok(ExitCode::SUCCESS),
        () = signals.next_end() => {
            tracing::warn!("second signal: aborting the remaining connections");
            Ok(Exit::Interrupted.into())
        }
    }
}

fn greet(gateway: &Gateway) -> Result<ExitCode, Failure> {
    let Gateway { listen, admin_listen, broker, access, is_open, .. } = gateway;
    let version = env!("CARGO_PKG_VERSION");
    let how = match is_open {
        true => format!(
            "try:\n  curl -N 'http://{listen}/events/demo?from=first'\n  curl -d hello http://{listen}/events/demo\n"
        ),
        false => String::new(),
    };
    say(&format!(
        "tidegate {version} listens on http://{listen} (metrics and health: http://{admin_listen})\n\
         broker: {broker}\naccess: {access}\n{how}"
    ))
}

/// What signals ask for.
enum Told {
    Reload,
    End,
}

struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Signals {
        let of = |kind| signal(kind).expect("signals can be handled");
        Signals {
            hangup: of(SignalKind::hangup()),
            terminate: of(SignalKind::terminate()),
            interrupt: of(SignalKind::interrupt()),
        }
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            // Settings that were handed over before the end are read, and judged, before it.
            biased;
            _ = self.hangup.recv() => Told::Reload,
            _ = self.terminate.recv() => Told::End,
            _ = self.interrupt.recv() => Told::End,
        }
    }

    async fn next_end(&mut self) {
        while let Told::Reload = self.next().await {}
    }
}

/// What it takes to read the settings again.
struct Reloading {
    settings: Settings,
    began_with: Sources,
    log: Log,
}

impl Reloading {
    /// Takes over what may change. If anything is wrong, nothing does.
    async fn reload(&self, gateway: &Gateway) {
        match self.try_reload(gateway).await {
            Ok(()) => tracing::info!(access = gateway.access(), "reloaded the settings"),
            Err(Failure(_, error)) => tracing::error!("could not reload the settings: {error}"),
        }
    }

    async fn try_reload(&self, gateway: &Gateway) -> Result<(), Failure> {
        let sources = self.settings.read_settled().await?;
        let mut config = sources.config_to_serve()?;
        let selection = self.log.select(&config.log.filter)?;
        provide_files(&mut config);
        gateway.reload(&config).await?;
        advice(&config, &sources).iter().for_each(|advice| tracing::warn!("{advice}"));
        self.log.change(selection);
        let differs = self.began_with.differences(&sources);
        let fixed: Vec<_> = differs.into_iter().filter(|key| !Config::changes_while_it_runs(key)).collect();
        if !fixed.is_empty() {
            tracing::warn!("these settings change only with a restart: {}", fixed.join(", "));
        }
        Ok(())
    }
}

fn provide_files(config: &mut Config) {
    if let Some(too_few) = fd_limit::raise(config) {
        tracing::warn!("{too_few}");
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Failure(Exit::System, error.into()))
}

/// How long a file of settings stays as it is that nobody is writing, and how often that is looked at.
const SETTLED: Duration = Duration::from_millis(250);
const SETTLED_TRIES: usize = 40;

impl Settings {
    /// Reads a file that may just have been changed: not before it has stopped changing.
    async fn read_settled(&self) -> Result<Sources, ConfigError> {
        let text = || self.config.as_ref().map(std::fs::read).transpose().ok();
        for _ in 0..SETTLED_TRIES {
            let before = text();
            tokio::time::sleep(SETTLED).await;
            let sources = self.read();
            if before == text() {
                return sources;
            }
        }
        Err(ConfigError::Rule("the file of settings does not stop changing".into()))
    }

    fn read(&self) -> Result<Sources, ConfigError> {
        let named = [("listen", &self.listen), ("admin_listen", &self.admin_listen), ("nats.url", &self.nats)];
        let named = named.into_iter().filter_map(|(key, value)| Some((key, value.clone()?)));
        let set = self.set.iter().map(|(key, value)| (&**key, value.clone()));
        Sources::read(self.config.clone(), named.chain(set).collect())
    }
}

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

impl From<RightsArguments> for Rights {
    fn from(RightsArguments { subscribe, publish }: RightsArguments) -> Rights {
        Rights { subscribe, publish }
    }
}

fn setting(text: &str) -> Result<(String, String), &'static str> {
    let (key, value) =
        text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("write it as in sse.heartbeat=5s")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn lifetime(text: &str) -> Result<Duration, &'static str> {
    parse_duration(text).ok_or("this is no time such as 90s, 15m or 1h")
}
