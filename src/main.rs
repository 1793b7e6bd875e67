//! The `tidegate` command: configuration, start, signal, drain. And two small ones that make keys and tokens.

use std::{error::Error, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};
use tidegate::{
    auth::{self, Grant, NewKey},
    config::{Config, Rights, parse_duration},
    gateway::{Gateway, NOISE_OFF, StartError},
    log,
    subject::Filter,
};
use tokio::signal::unix::{SignalKind, signal};

/// The configuration can't be used.
const EXIT_CONFIG: u8 = 78;
/// An address is taken, or the broker is away or does not fit.
const EXIT_START: u8 = 69;

/// Streams events from NATS to browsers, curl and anything else that speaks HTTP, exactly from where they left off.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// A file of settings; see src/config.default.toml for all of them
    #[arg(long, global = true, value_name = "FILE", env = "TIDEGATE_CONFIG")]
    config: Option<PathBuf>,
    /// Where clients connect [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where metrics and health are [default: 127.0.0.1:9090]
    #[arg(long, value_name = "ADDRESS")]
    admin_listen: Option<String>,
    /// The NATS servers to be a gateway of, as in nats://127.0.0.1:4222 [default: an embedded broker]
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
}

/// Without one, the gateway runs.
#[derive(Subcommand)]
enum Command {
    /// API keys for backends
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Prints a token for development, made with auth.jwt.secret
    Token {
        /// Who bears it
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
        /// Whose it is
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        None => serve(arguments),
        Some(Command::Key { command: KeyCommand::New { name, rights } }) => {
            println!("{}", NewKey::make(name, rights.into()));
            ExitCode::SUCCESS
        }
        Some(Command::Token { sub, rights, expires }) => {
            match make_token(arguments.config, &Grant { sub, rights: rights.into(), lifetime: expires }) {
                Ok(token) => {
                    println!("{token}");
                    ExitCode::SUCCESS
                }
                Err(error) => fail(EXIT_CONFIG, &*error),
            }
        }
    }
}

fn make_token(config: Option<PathBuf>, grant: &Grant) -> Result<String, Box<dyn Error>> {
    Ok(auth::mint(&Config::load(config, vec![])?.auth.jwt, grant)?)
}

fn serve(arguments: Arguments) -> ExitCode {
    let flags = [("listen", arguments.listen), ("admin_listen", arguments.admin_listen), ("nats.url", arguments.nats)];
    let flags = flags.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let config = match Config::load(arguments.config, flags) {
        Ok(config) => config,
        Err(error) => return fail(EXIT_CONFIG, &error),
    };
    if let Err(error) = log::start(&config.log, NOISE_OFF) {
        return fail(EXIT_CONFIG, &error);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(EXIT_START, &error),
    };
    runtime.block_on(run(config))
}

async fn run(config: Config) -> ExitCode {
    let gateway = match Gateway::start(config).await {
        Ok(gateway) => gateway,
        Err(error @ StartError::Auth(_)) => return fail(EXIT_CONFIG, &error),
        Err(error) => return fail(EXIT_START, &error),
    };
    greet(&gateway);
    wait_for_signal().await;
    tracing::info!("draining");
    gateway.drain().await;
    ExitCode::SUCCESS
}

fn greet(gateway: &Gateway) {
    let Gateway { listen, admin_listen, broker, access, is_open, .. } = gateway;
    println!(
        "tidegate {} listens on http://{listen} (metrics and health: http://{admin_listen})",
        env!("CARGO_PKG_VERSION")
    );
    println!("broker: {broker}");
    println!("access: {access}");
    if *is_open {
        println!("try:");
        println!("  curl -N 'http://{listen}/events/demo?from=first'");
        println!("  curl -d hello http://{listen}/events/demo");
    }
}

async fn wait_for_signal() {
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be handled");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

impl From<RightsArguments> for Rights {
    fn from(RightsArguments { subscribe, publish }: RightsArguments) -> Rights {
        Rights { subscribe, publish }
    }
}

fn lifetime(text: &str) -> Result<Duration, &'static str> {
    parse_duration(text).ok_or("this is no time such as 90s, 15m or 1h")
}

fn fail(code: u8, error: &dyn Error) -> ExitCode {
    eprintln!("tidegate: {error}");
    ExitCode::from(code)
}
