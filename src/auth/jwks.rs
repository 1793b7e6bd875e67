//! The keys that an identity provider publishes at a URL, kept fresh by one task.
//!
//! What has been read stays in use until something better is: while the endpoint is down, or answers nonsense, tokens are
//! verified with the keys that it had. Tokens with an unknown `kid` have it read early, all of them together at most
//! once in `auth.jwt.jwks_refresh_min`.

use std::{io::Read, sync::Arc, time::Duration};

use jsonwebtoken::Validation;
use rand::RngExt;
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};
use ureq::tls::{RootCerts, TlsConfig};

use super::key::{self, Key};
use crate::{
    config::Jwt,
    metrics::Metrics,
    shutdown::{Ending, Tasks},
};

/// A handle to the keys behind a URL, which are read as long as it is kept.
pub(super) struct RemoteKeys {
    known: watch::Receiver<Known>,
    wanted: Arc<Notify>,
    timeout: Duration,
    _reader: Ending,
}

/// What is known of the set.
#[derive(Clone)]
pub(super) struct Known {
    pub keys: Arc<[Key]>,
    /// Whether the last read failed.
    pub failed: bool,
    /// Before this it is not read again.
    not_before: Instant,
}

impl RemoteKeys {
    /// Begins to read, and waits for the first outcome.
    pub(super) async fn start(config: &Jwt, rules: Validation, metrics: Arc<Metrics>, tasks: &Tasks) -> RemoteKeys {
        let nothing = Known { keys: Arc::new([]), failed: true, not_before: Instant::now() };
        let (sender, mut known) = watch::channel(nothing);
        let wanted = Arc::new(Notify::new());
        let reader = Reader { config: config.clone(), rules, metrics, wanted: wanted.clone(), known: sender };
        let _reader = tasks.spawn_ending(reader.run());
        let _ = known.changed().await;
        RemoteKeys { known, wanted, timeout: config.jwks_timeout, _reader }
    }

    /// What is known now.
    pub(super) fn known(&self) -> Known {
        self.known.borrow().clone()
    }

    /// The same after one more read, if it is time for one.
    pub(super) async fn refreshed(&self) -> Known {
        let mut known = self.known.clone();
        if known.borrow_and_update().not_before <= Instant::now() {
            self.wanted.notify_one();
            let _ = tokio::time::timeout(self.timeout, known.changed()).await;
        }
        known.borrow().clone()
    }
}

/// The task that reads.
struct Reader {
    config: Jwt,
    rules: Validation,
    metrics: Arc<Metrics>,
    wanted: Arc<Notify>,
    known: watch::Sender<Known>,
}

impl Reader {
    async fn run(self) {
        let Jwt { jwks_refresh, jwks_refresh_min, .. } = self.config;
        loop {
            let read = self.read().await;
            let outcome = if read.is_ok() { "read" } else { "failed" };
            self.metrics.jwks_reads.with_label_values(&[outcome]).inc();
            let failed = read.is_err();
            self.known.send_modify(|known| {
                *known = Known {
                    keys: read.unwrap_or_else(|error| {
                        // Without the URL, which may carry a password.
                        tracing::warn!(error, "could not fetch auth.jwt.jwks_url; using the keys fetched before");
                        known.keys.clone()
                    }),
                    failed,
                    not_before: Instant::now() + jwks_refresh_min,
                }
            });
            tokio::time::sleep(jwks_refresh_min).await;
            // After a failure at once; else not all nodes together.
            let rest = if failed { Duration::ZERO } else { jwks_refresh.saturating_sub(jwks_refresh_min) };
            let rest = rest.mul_f64(rand::rng().random_range(0.75..=1.0));
            let _ = tokio::time::timeout(rest, self.wanted.notified()).await;
        }
    }

    /// Reads on a thread of its own, which is not waited for when the gateway ends.
    async fn read(&self) -> Result<Arc<[Key]>, String> {
        let (sender, outcome) = oneshot::channel();
        let config = self.config.clone();
        let thread = std::thread::Builder::new().name("jwks".into());
        thread.spawn(move || drop(sender.send(fetch(&config)))).map_err(|error| error.to_string())?;
        let text = outcome.await.map_err(|_| "its thread ended")?.map_err(|error| error.to_string())?;
        let keys = key::from_jwks(&text, self.config.jwks_keys, &self.rules).map_err(|error| error.to_string())?;
        Ok(keys.into())
    }
}

fn fetch(config: &Jwt) -> Result<Vec<u8>, ureq::Error> {
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
    let agent = ureq::Agent::config_builder().timeout_global(Some(config.jwks_timeout)).tls_config(tls).build();
    let response = ureq::Agent::from(agent).get(&config.jwks_url).call()?;
    let mut text = vec![];
    response.into_body().into_with_config().limit(config.jwks_bytes as u64).reader().read_to_end(&mut text)?;
    Ok(text)
}
