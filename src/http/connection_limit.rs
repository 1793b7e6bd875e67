//! Permits for connections of the public listener. One more than there is room for waits a moment, as when all clients of
//! another node come at once. If it finds none it is not left without a word: its first request is refused, and it is closed.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::config;

/// More may wait than workers are to accept: they count with some delay.
const OVERSHOOT: usize = 16;
/// Connections of addresses that have too many, which are refused at the same time. More are closed at once, so that one
/// address can't take what others wait in.
const REFUSALS: usize = 64;
/// How long a connection waits for room.
const WAIT: Duration = Duration::from_secs(1);
/// How long one that found none may take to send its request.
pub const REFUSAL_WITHIN: Duration = Duration::from_secs(1);

/// Cheap to clone.
#[derive(Clone)]
pub struct ConnectionLimit {
    connections: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
}

/// What a connection is accepted for.
pub enum Entry {
    Served(OwnedSemaphorePermit),
    Refused(OwnedSemaphorePermit),
}

impl ConnectionLimit {
    pub fn new(limits: &config::Limits) -> ConnectionLimit {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        ConnectionLimit {
            connections: semaphore(limits.connections),
            waiting: semaphore(limits.waiting_connections() + OVERSHOOT),
            refusals: semaphore(REFUSALS),
        }
    }

    /// Lets one more connection in; `None` where too many wait.
    pub async fn enter(&self) -> Option<Entry> {
        if let Ok(permit) = self.connections.clone().try_acquire_owned() {
            return Some(Entry::Served(permit));
        }
        let waiting = self.waiting.clone().try_acquire_owned().ok()?;
        match timeout(WAIT, self.connections.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Some(Entry::Served(permit)),
            Ok(Err(_)) | Err(_) => Some(Entry::Refused(waiting)),
        }
    }

    /// Lets a connection in whose address has too many, to be refused; `None` where many are being refused.
    pub fn refuse(&self) -> Option<Entry> {
        self.refusals.clone().try_acquire_owned().ok().map(Entry::Refused)
    }

    pub fn is_full(&self) -> bool {
        self.connections.available_permits() == 0
    }
}
