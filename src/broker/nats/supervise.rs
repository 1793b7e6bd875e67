//! Keeps every connection of this gateway: whatever stops is noticed, told by [`Status`], and made again.
//!
//! | connection | carries | is driven by |
//! |---|---|---|
//! | `live` | hints, and word of the stream's changes | [`crate::nats`], in a task of [`keep`] |
//! | `history` | pages and snapshots | the same |
//! | `leader` | requests to the stream's leader | async-nats, watched by [`keep_requests`] |
//! | `publish` | one for each thread that publishes | the same |
//!
//! What stops a connection: a task that panics, ends or hangs, a server that goes away or does not answer, a
//! subscription that the server refuses. A server that is silent is given up after four to five seconds.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::Event;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    api::{Api, RequestError, Requests},
    connector::Connector,
    provision::StartError,
};
use crate::{
    backoff::Backoff,
    nats::{self, Client, Message},
    panics,
};

/// How often a connection is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A task that has done nothing for so long hangs: it wakes once a second at least.
const HUNG: Duration = Duration::from_secs(3);
/// How long async-nats may take to write what is to be written.
const FLUSH: Duration = Duration::from_secs(2);
/// What lasted so long was good: if it ends, the next is made at once.
const STEADY: Duration = Duration::from_secs(5);
/// Events of async-nats that may wait. Where there is no room, the next look finds what they tell.
const EVENTS: usize = 64;
/// Different complaints of servers that are logged; more of them say nothing more.
const COMPLAINTS_MAX: usize = 100;

/// How one connection is, for readiness and metrics.
pub(crate) struct Status {
    pub connection: &'static str,
    /// What is wrong with it; nothing while it is up.
    trouble: Mutex<Option<String>>,
    /// How often it was made.
    made: watch::Sender<u64>,
    complaints: Mutex<HashSet<String>>,
    #[cfg(test)]
    fault: Mutex<Option<Fault>>,
}

/// What a test has the task of a connection do.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Panic,
    /// For ever.
    Wait,
    /// Its thread is held for longer than it takes to be replaced.
    Block,
}

impl Status {
    fn new(connection: &'static str) -> Arc<Status> {
        Arc::new(Status {
            connection,
            trouble: Mutex::new(Some("not connected yet".into())),
            made: watch::Sender::new(0),
            complaints: Mutex::default(),
            #[cfg(test)]
            fault: Mutex::default(),
        })
    }

    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn made(&self) -> u64 {
        *self.made.borrow()
    }

    fn set(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    fn up(&self) {
        self.set(None);
        self.made.send_modify(|made| *made += 1);
    }

    #[cfg(test)]
    pub fn strike_next(&self, fault: Fault) {
        *self.fault.lock().unwrap() = Some(fault);
    }

    #[cfg(test)]
    async fn strike(&self) {
        let fault = self.fault.lock().unwrap().take();
        match fault {
            None => {}
            Some(Fault::Panic) => panic!("a test wants it"),
            Some(Fault::Wait) => std::future::pending().await,
            Some(Fault::Block) => std::thread::sleep(Duration::from_secs(6)),
        }
    }

    /// Logs what a server complains of, once.
    fn complain(&self, complaint: &str) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        if complaints.len() == COMPLAINTS_MAX || !complaints.insert(complaint.to_owned()) {
            return;
        }
        let connection = self.connection;
        if is_refused_subscription(complaint) {
            tracing::warn!(
                connection,
                complaint,
                "NATS refuses a subscription, which is asked for again: let the gateway's user subscribe below \
                 nats.stream.live_prefix, to its inbox, and to the stream's advisories (nats/nats-server.conf has all \
                 that it needs)"
            );
        } else {
            tracing::warn!(connection, complaint, "NATS reported an error (-ERR)");
        }
    }
}

fn is_refused_subscription(complaint: &str) -> bool {
    complaint.to_ascii_lowercase().contains("permissions violation for subscription")
}

/// What happens on a connection of our own, for the part of the gateway that it is for.
pub(super) trait Handler: Send + Sync + 'static {
    /// There is a connection, on which nothing is subscribed yet.
    fn connected(&self) {}
    /// The server has handled all subscriptions.
    fn ready(&self) {}
    fn message(&self, message: Message);
    /// Messages were missed, because the server had refused subscriptions.
    fn restored(&self) {}
    /// The server refuses a subscription, or has handled everything that it was told.
    fn permissions(&self) {}
    fn disconnected(&self) {}
}

/// A connection that is kept for as long as this is.
pub(super) struct Kept {
    pub status: Arc<Status>,
    client: Option<Client>,
    task: AbortHandle,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kept {
    /// What is wrong with the connection, if anything is.
    pub fn trouble(&self) -> Option<String> {
        let Some(client) = &self.client else { return self.status.trouble() };
        match client.refused() {
            _ if client.idle() > HUNG => Some("its task hangs".into()),
            Some(subject) => Some(format!("NATS refuses the subscription to {subject}")),
            None if client.is_ready() => None,
            None => Some(self.status.trouble().unwrap_or_else(|| "not connected".into())),
        }
    }
}

/// Makes a connection of our own and keeps it.
///
/// # Errors
/// When no server lets it in.
pub(super) async fn keep(
    connection: &'static str,
    connector: &Connector,
    client: Client,
    handler: Arc<impl Handler>,
) -> Result<Kept, StartError> {
    let status = Status::new(connection);
    let driven = (client.clone(), status.clone(), handler);
    let timeout = connector.timeout;
    let task = tokio::spawn(panics::restarted(move || {
        let (client, status, handler) = driven.clone();
        keep_driven(client, status, handler, timeout)
    }));
    let kept = Kept { status, client: Some(client), task: task.abort_handle() };
    let mut made = kept.status.made.subscribe();
    let limit = connector.timeout + HUNG;
    let is_made = tokio::time::timeout(limit, made.wait_for(|made| *made > 0)).await;
    let why = || kept.status.trouble().unwrap_or_else(|| format!("no answer in {limit:?}"));
    match is_made {
        Ok(Ok(_)) => {}
        Ok(Err(_)) | Err(_) => return Err(StartError::Unreachable { at: connector.at.clone(), why: why() }),
    }
    Ok(kept)
}

/// Runs the task of a connection, and another one when it panics, ends or hangs.
async fn keep_driven(client: Client, status: Arc<Status>, handler: Arc<impl Handler>, timeout: Duration) {
    let mut backoff = Backoff::default();
    loop {
        let began = Instant::now();
        let mut driving = AbortOnDropHandle::new(tokio::spawn(drive(client.clone(), status.clone(), handler.clone())));
        let why = loop {
            tokio::select! {
                ended = &mut driving => break match ended {
                    Ok(()) => "its task has ended",
                    Err(_) => "its task panicked",
                },
                () = tokio::time::sleep(LOOK) => {
                    // While it connects, it may wait for a server.
                    let limit = if client.is_ready() { HUNG } else { HUNG + timeout };
                    if client.idle() > limit {
                        break "its task hangs";
                    }
                }
            }
        };
        driving.abort();
        status.set(Some(why.into()));
        handler.disconnected();
        tracing::error!(connection = status.connection, why, "replacing a failed NATS connection");
        if began.elapsed() > STEADY {
            backoff = Backoff::default();
        }
        backoff.wait().await;
    }
}

/// Drives a connection, and hands over what happens on it.
async fn drive(client: Client, status: Arc<Status>, handler: Arc<impl Handler>) {
    let mut connection = client.connection();
    handler.disconnected();
    loop {
        #[cfg(test)]
        status.strike().await;
        match connection.next().await {
            nats::Event::Connected(server) => {
                tracing::debug!(connection = status.connection, %server, "connected to NATS");
                handler.connected();
            }
            nats::Event::Ready => {
                if status.made() > 0 {
                    tracing::info!(connection = status.connection, "reconnected to NATS");
                }
                status.up();
                handler.ready();
                handler.permissions();
            }
            nats::Event::Message(message) => handler.message(message),
            nats::Event::Restored => {
                tracing::info!(connection = status.connection, "NATS granted subscriptions that were refused before");
                handler.permissions();
                handler.restored();
            }
            nats::Event::ServerError(complaint) => {
                status.complain(&complaint);
                handler.permissions();
            }
            nats::Event::Idle => handler.permissions(),
            nats::Event::Disconnected(why) => {
                status.set(Some(why.to_string()));
                handler.disconnected();
                tracing::warn!(connection = status.connection, %why, "disconnected from NATS");
            }
            nats::Event::Unreachable(why) => {
                status.set(Some(why.to_string()));
                tracing::debug!(connection = status.connection, %why, "could not connect to NATS, retrying");
            }
        }
    }
}

/// Opens a connection of async-nats for requests.
pub(super) async fn open_requests(
    connector: &Connector,
    purpose: &'static str,
) -> Result<(Requests, mpsc::Receiver<Event>), StartError> {
    let (sender, events) = mpsc::channel(EVENTS);
    let client = connector.open(purpose, sender).await?;
    let silent = |error: RequestError| StartError::Silent { subject: "an inbox".into(), why: error.to_string() };
    Ok((Requests::new(client).await.map_err(silent)?, events))
}

/// Keeps a connection for requests that was opened.
pub(super) fn keep_requests(
    connection: &'static str,
    connector: Arc<Connector>,
    (api, events): (Api, mpsc::Receiver<Event>),
    probe: String,
) -> Kept {
    let status = Status::new(connection);
    status.up();
    let watching = watch_requests(connector, api, status.clone(), events, probe);
    Kept { status, client: None, task: tokio::spawn(watching).abort_handle() }
}

/// Watches a connection for requests, and makes another when it fails: `probe` is a request that is answered on any.
async fn watch_requests(
    connector: Arc<Connector>,
    api: Api,
    status: Arc<Status>,
    mut events: mpsc::Receiver<Event>,
    probe: String,
) {
    let mut backoff = Backoff::default();
    loop {
        let began = Instant::now();
        if let Some(requests) = api.current() {
            let why = fails(&api, &requests, &mut events, &status).await;
            tracing::error!(connection = status.connection, why, "replacing a failed NATS connection");
            status.set(Some(why));
            api.replace(None);
        }
        if began.elapsed() > STEADY {
            backoff = Backoff::default();
        }
        backoff.wait().await;
        match reopen(&connector, &status, &probe).await {
            Ok((requests, more)) => {
                events = more;
                api.replace(Some(Arc::new(requests)));
                status.up();
                tracing::info!(connection = status.connection, "reconnected to NATS");
            }
            Err(why) => {
                tracing::debug!(connection = status.connection, why, "could not connect to NATS, retrying");
                status.set(Some(why));
            }
        }
    }
}

/// Another connection, whose requests are answered.
async fn reopen(
    connector: &Connector,
    status: &Status,
    probe: &str,
) -> Result<(Requests, mpsc::Receiver<Event>), String> {
    let opened = open_requests(connector, status.connection);
    let opened = tokio::time::timeout(connector.timeout + FLUSH, opened).await;
    let (requests, mut events) =
        opened.map_err(|_| "no answer in time".to_owned())?.map_err(|error| error.to_string())?;
    match requests.ask(FLUSH, probe, &serde_json::Value::Null).await {
        // That there is no stream, or no leader, is not the connection's fault.
        Ok(_) | Err(RequestError::Refused(_) | RequestError::NoResponders) => Ok((requests, events)),
        Err(error) => {
            let complaints = std::iter::from_fn(|| events.try_recv().ok());
            let refused = complaints.filter_map(complaint).find(|complaint| is_refused_subscription(complaint));
            Err(refused.unwrap_or_else(|| error.to_string()))
        }
    }
}

/// Resolves to why the connection can't be used any more. (One that async-nats makes again by itself can.)
async fn fails(api: &Api, requests: &Requests, events: &mut mpsc::Receiver<Event>, status: &Status) -> String {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_connected = true;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                None => return "its task has ended".into(),
                Some(event) => if let Some(complaint) = complaint(event) {
                    status.complain(&complaint);
                    if complaint.to_ascii_lowercase().contains("maximum payload") {
                        api.saw_too_large();
                    }
                    if is_refused_subscription(&complaint) {
                        return complaint;
                    }
                }
            },
            _ = look.tick() => {
                if !requests.is_listening() {
                    return "its replies are handed over no more".into();
                }
                let is_connected = requests.is_connected();
                if is_connected {
                    match tokio::time::timeout(FLUSH, requests.client.flush()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return "its task has ended".into(),
                        Err(_) if requests.is_connected() => return "its task hangs".into(),
                        Err(_) => {}
                    }
                }
                match (was_connected, is_connected) {
                    (true, false) => {
                        tracing::warn!(connection = status.connection, "disconnected from NATS");
                        status.set(Some("not connected".into()));
                    }
                    (false, true) => {
                        tracing::info!(connection = status.connection, "reconnected to NATS");
                        status.up();
                    }
                    (true, true) | (false, false) => {}
                }
                was_connected = is_connected;
            }
        }
    }
}

/// What a server complains of.
fn complaint(event: Event) -> Option<String> {
    match event {
        Event::ServerError(error) => Some(error.to_string().trim_start_matches("nats: ").trim_matches('\'').to_owned()),
        _ => None,
    }
}
