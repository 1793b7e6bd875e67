//! The `tidegate` command: configuration, start, signal, drain.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use clap::Parser;
use tidegate::{
    config::Config,
    gateway::{Gateway, NOISE_OFF},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The configuration can't be used.
const EXIT_CONFIG: u8 = 78;
/// An address is taken, or the broker is away or does not fit.
const EXIT_START: u8 = 69;

/// Streams events from NATS to browsers, curl and anything else that speaks HTTP, exactly from where they left off.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A file of settings; see src/config.default.toml for all of them
    #[arg(long, value_name = "FILE", env = "TIDEGATE_CONFIG")]
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let flags = [("listen", arguments.listen), ("admin_listen", arguments.admin_listen), ("nats.url", arguments.nats)];
    let flags = flags.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let config = match Config::load(arguments.config, flags) {
        Ok(config) => config,
        Err(error) => return fail(EXIT_CONFIG, &error),
    };
    if let Err(error) = start_logging(&config.log.filter) {
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
        Err(error) => return fail(EXIT_START, &error),
    };
    greet(&gateway);
    wait_for_signal().await;
    tracing::info!("draining");
    gateway.drain().await;
    ExitCode::SUCCESS
}

fn greet(gateway: &Gateway) {
    let Gateway { listen, admin_listen, broker, .. } = gateway;
    println!(
        "tidegate {} listens on http://{listen} (metrics and health: http://{admin_listen})",
        env!("CARGO_PKG_VERSION")
    );
    println!("broker: {broker}");
    println!("try:");
    println!("  curl -N 'http://{listen}/events/demo?from=first'");
    println!("  curl -d hello http://{listen}/events/demo");
}

async fn wait_for_signal() {
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be handled");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

fn start_logging(filter: &str) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::try_new(filter)?.add_directive(NOISE_OFF.parse()?);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    eprintln!("tidegate: {error}");
    ExitCode::from(code)
}
