//! Events kept by NATS JetStream: any number of gateways on one stream. The only module that knows async-nats.
//!
//! | module | is about |
//! |---|---|
//! | `entrance` | which servers there are, and how they let us in |
//! | `start` | the server's and the stream's fitness |
//! | `stream` | the stream's definition, and what breaks a promise |
//! | `leader` | requests whose answer is final, by the stream's leader |
//! | `read` | history: batches by any replica, proven by the leader |
//! | `snapshot` | the last event of every subject |
//! | `publish` | storing, and the meaning of the answer |
//! | `line` | hints of what was just stored: a connection that is always made again |
//! | `switchboard` | ...who listens to what, and what the server is yet to be told of it |
//! | `call` | ...one connection to one server |
//! | `servers` | ...which of them is next |
//! | `wire` | ...what is said there, as bytes |
//! | `doubts` | every occasion on which hints may have been lost, or be of another stream |
//! | `message`, `headers` | messages as events |
//!
//! Connections: one for history, whose answers hold up whatever else travels there, one for each thread that publishes,
//! one for live hints and word of the stream's changes, which is our own (see `line`), and one for all the rest.

mod batch;
mod call;
mod doubts;
mod entrance;
mod headers;
mod inbox;
mod leader;
mod line;
mod message;
mod publish;
mod read;
mod rounds;
mod servers;
mod snapshot;
mod start;
mod stream;
mod switchboard;
mod wire;

use std::sync::{Arc, Mutex, PoisonError, atomic::Ordering};

use async_nats::{Client, connection::State};
use async_trait::async_trait;
use tokio::{sync::watch, task::AbortHandle};

use self::{
    batch::Batches,
    entrance::Entrance,
    leader::{Leader, RequestError, Requests},
    line::Line,
    publish::Publisher,
    read::History,
    start::Need,
    stream::Fitness,
};
use super::{
    Acknowledgement, Bounds, Broker, BrokerError, Health, Hints, LastKnown, Link, Page, Publication, Publish,
    PublishError, Read, SnapshotPage, SnapshotRead,
};
use crate::{
    config,
    subject::{Filter, Subject},
};

pub use self::{
    start::{HEADER_BYTES, OLDEST, StartError},
    stream::Misfit,
};

/// A JetStream stream, as one gateway sees it. Its connections and tasks end when it is dropped.
pub struct Nats {
    leader: Leader,
    history: History,
    publisher: Publisher,
    line: Line,
    entrance: Arc<Entrance>,
    /// The connections of publishers that belong to threads.
    entries: Mutex<Vec<Client>>,
    settings: config::Nats,
    description: String,
    watch: AbortHandle,
}

impl Nats {
    /// Connects, makes or checks the stream, and begins to watch over it.
    ///
    /// # Errors
    /// When anything is in the way of the gateway's promises. After this, nothing that NATS does ends a gateway.
    pub async fn connect(
        settings: &config::Nats,
        history: &config::History,
        event_bytes: usize,
    ) -> Result<Nats, StartError> {
        let entrance = Arc::new(Entrance::parse(settings)?);
        let names = &settings.stream;
        let client = entrance.open("requests", None).await?;
        entrance.check_server(&client, event_bytes)?;
        let requests = Arc::new(requests(&client, settings).await?);
        let info = entrance.stream(&requests, names, event_bytes).await?;
        // A whole answer must fit: an overflow would break it off each time.
        let answer = history.page_events.max(batch::SUBJECTS_MAX).saturating_add(8);
        let page = entrance.open("history", Some(answer)).await?;
        let leader = Leader::new(requests, names.name.clone(), &info);
        let line = Line::open(entrance.clone(), settings, leader.known().clone()).await?;

        let fitness = Fitness::new(names.clone(), event_bytes);
        let watch = doubts::watch(leader.clone(), fitness, line.switchboard());
        let watch = tokio::spawn(watch).abort_handle();
        Ok(Nats {
            history: History {
                batches: Batches {
                    client: page,
                    stream: names.name.clone(),
                    prefix: names.prefix.clone(),
                    timeout: settings.request_timeout,
                },
                leader: leader.clone(),
                page_events: history.page_events,
                page_bytes: history.page_bytes,
            },
            publisher: Publisher {
                requests: leader.requests().clone(),
                leader: leader.clone(),
                stream: names.name.clone(),
                prefix: names.prefix.clone(),
                timeout: settings.publish_timeout,
            },
            description: describe(&client.server_info().version, &entrance.at, &names.name, &info),
            settings: settings.clone(),
            line,
            entrance,
            entries: Mutex::default(),
            leader,
            watch,
        })
    }
}

impl Nats {
    /// What [`Nats::connect`] would find, in a line for people. Changes nothing.
    ///
    /// # Errors
    /// The same.
    pub async fn look(settings: &config::Nats, event_bytes: usize) -> Result<String, StartError> {
        let (entrance, names) = (Entrance::parse(settings)?, &settings.stream);
        let client = entrance.open("check", None).await?;
        entrance.check_server(&client, event_bytes)?;
        let requests = requests(&client, settings).await?;
        let (version, at, stream) = (client.server_info().version, &entrance.at, &names.name);
        Ok(match entrance.need(&requests, names, event_bytes).await? {
            Need::Nothing(info) => describe(&version, at, stream, &info),
            Need::Making => format!("NATS {version} at {at}, where the stream {stream} will be made"),
            Need::Mending { misfit, .. } => {
                format!("NATS {version} at {at}, where the stream {stream} will be mended: {misfit}")
            }
        })
    }

    fn connections(&self) -> Vec<Client> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = [&self.leader.requests().client, &self.history.batches.client];
        shared.into_iter().chain(&*entries).cloned().collect()
    }
}

async fn requests(client: &Client, settings: &config::Nats) -> Result<Requests, StartError> {
    let silent = |error: RequestError| StartError::Silent { subject: "an inbox".into(), why: error.to_string() };
    Requests::new(client.clone(), settings.request_timeout).await.map_err(silent)
}

fn describe(version: &str, at: &str, stream: &str, info: &leader::Info) -> String {
    let storage = info.config["storage"].as_str().unwrap_or("file");
    let replicas = match info.config["num_replicas"].as_u64().unwrap_or(1) {
        1 => "1 replica".to_owned(),
        number => format!("{number} replicas"),
    };
    format!("NATS {version} at {at}, stream {stream} ({storage}, {replicas})")
}

#[async_trait]
impl Publish for Nats {
    async fn publish(&self, publication: Publication) -> Result<Acknowledgement, PublishError> {
        self.publisher.publish(publication).await
    }
}

#[async_trait]
impl Broker for Nats {
    async fn publisher(&self) -> Result<Option<Box<dyn Publish>>, BrokerError> {
        let away = |error: StartError| BrokerError::Unavailable(error.to_string());
        let client = self.entrance.open("publish", None).await.map_err(away)?;
        let requests = Requests::new(client.clone(), self.settings.request_timeout).await?;
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(client);
        Ok(Some(Box::new(Publisher { requests: Arc::new(requests), ..self.publisher.clone() })))
    }

    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        self.line.listen(filter).await
    }

    async fn read(&self, read: Read) -> Result<Page, BrokerError> {
        self.history.read(&read).await
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        self.history.snapshot(read).await
    }

    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        self.history.last(subjects).await
    }

    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        Ok(self.leader.info().await?.bounds)
    }

    fn doubts(&self) -> watch::Receiver<u64> {
        self.leader.known().doubts.subscribe()
    }

    fn health(&self) -> Health {
        let connected = |client: &Client| client.connection_state() == State::Connected;
        if !self.line.is_up() || !self.connections().iter().all(connected) {
            return Health::Away("not connected to NATS".into());
        }
        let (known, name) = (self.leader.known(), &self.settings.stream.name);
        match (known.trouble(), known.misfit()) {
            (Some(trouble), _) => Health::Away(format!("stream {name}: {trouble}")),
            (None, Some(misfit)) => Health::Unfit(format!("the stream {name} does not fit any more: {misfit}")),
            (None, None) => Health::Ready,
        }
    }

    fn link(&self) -> Link {
        let connects = |client: &Client| client.statistics().connects.load(Ordering::Relaxed);
        let connections = self.connections().iter().map(connects).sum::<u64>() + *self.line.connections().borrow();
        Link { connections, round_trip: self.leader.known().round_trip() }
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.watch.abort();
    }
}
