//! The life of a gateway process: start, reload, drain.

use std::process::ExitCode;

use tidegate::{
    config::{Config, Sources, advice},
    fd_limit,
    gateway::{Gateway, NOISE_OFF},
    log::Log,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    arguments::Settings,
    commands::say,
    exit::{Exit, Failure},
};

pub fn serve(settings: Settings) -> Result<ExitCode, Failure> {
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
            "try:\n  open http://{listen}/ in a browser, or\n  curl -N 'http://{listen}/events/demo?from=first'\n  curl -d hello http://{listen}/events/demo\n"
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

pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Failure(Exit::System, error.into()))
}
