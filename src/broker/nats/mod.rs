//! Events kept by NATS JetStream: any number of gateways on one stream. The only module that knows async-nats.
//!
//! | module | is about |
//! |---|---|
//! | `connector` | which servers there are, and how they let us in |
//! | `supervise` | every connection is watched, and made again |
//! | `provision` | the server and the stream at start: checked, made, mended |
//! | `requirements` | the stream's definition, and what breaks a promise |
//! | `api`, `inbox` | requests that are answered by JSON, and their replies |
//! | `epoch` | which incarnation of the stream this is |
//! | `leader`, `coalesce` | requests whose answer is final, by the stream's leader |
//! | `history`, `batch` | pages: batches by any replica, proven by the leader |
//! | `snapshot` | the last event of every subject |
//! | `publish` | storing, and the meaning of the answer |
//! | `live`, `feeds` | hints of what was just stored, and which feeds they are for |
//! | `monitor` | every occasion on which hints may have been lost, or be of another stream |
//! | `message` | messages as events |
//!
//! Connections: one for history, whose answers hold up whatever else travels there, one for each thread that publishes,
//! one for live hints and word of the stream's changes, and one for requests to the leader.
//!
//! The seam: *whatever carries other people's headers and payloads (live hints, history, snapshots) goes through
//! [`crate::nats`]; whatever carries only ours or the server's JSON (publishing, the leader's answers, provisioning) goes
//! through async-nats.*

mod api;
mod batch;
mod coalesce;
mod connector;
mod epoch;
mod feeds;
mod history;
mod inbox;
mod leader;
mod live;
mod message;
mod monitor;
mod provision;
mod publish;
mod requirements;
mod snapshot;
mod supervise;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::{sync::watch, task::AbortHandle};

use self::{
    api::Api, batch::Batches, connector::Connector, history::History, leader::Leader, live::Live, provision::Plan,
    publish::Publisher, requirements::Requirements, supervise::Kept,
};
use super::{
    Acknowledgement, Bounds, Broker, BrokerError, ConnectionState, Gone, Health, Hints, LastKnown, Link, Page,
    Publication, Publish, PublishError, Read, Recognition, SnapshotPage, SnapshotRead, Stock,
};
use crate::{
    config,
    event::Epoch,
    memory::Memory,
    nats, panics,
    position::Witness,
    subject::{Filter, Subject},
};

#[cfg(test)]
pub(crate) use self::supervise::Fault;
pub use self::{
    provision::{HEADER_BYTES, OLDEST, StartError},
    requirements::Mismatch,
};

/// How often `check` reads a message to see which stream answers.
const LOOKS_FOR_MIRROR: usize = 16;

/// A JetStream stream, as one gateway sees it. Its connections and tasks end when it is dropped.
pub struct Nats {
    leader: Leader,
    history: History,
    publisher: Publisher,
    live: Live,
    connector: Arc<Connector>,
    to_leader: Kept,
    to_history: Kept,
    /// The connections of publishers that belong to threads.
    publishers: Mutex<Vec<Kept>>,
    settings: config::Nats,
    description: String,
    monitor: AbortHandle,
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
        memory: &Memory,
    ) -> Result<Nats, StartError> {
        let connector = Arc::new(Connector::parse(settings)?);
        let names = &settings.stream;
        let (requests, events) = supervise::open_requests(&connector, "leader").await?;
        connector.check_server(&requests.client, event_bytes)?;
        let version = requests.client.server_info().version;
        let api = Api::new(requests, settings.request_timeout);
        let info = connector.stream(&api, names, event_bytes).await?;
        let leader = Leader::new(api.clone(), names.name.clone(), &info);
        let to_leader = supervise::keep_requests("leader", connector.clone(), (api.clone(), events), probe(names));
        let pages = nats::Requests::new(connector.options("history"), connector::INBOX);
        let (client, handler) = (pages.client().clone(), Arc::new(pages.clone()));
        let to_history = supervise::keep("history", &connector, client, handler).await?;
        let live = Live::connect(&connector, settings, leader.known().clone(), memory).await?;

        let requirements = Requirements::new(names.clone(), event_bytes);
        let monitored = (leader.clone(), Arc::new(requirements), live.router());
        let monitor = panics::restarted(move || {
            let (leader, requirements, router) = monitored.clone();
            monitor::watch(leader, requirements, router)
        });
        let monitor = tokio::spawn(monitor).abort_handle();
        Ok(Nats {
            history: History {
                batches: Batches {
                    requests: pages,
                    known: leader.known().clone(),
                    // A whole answer must fit: an overflow would break it off each time.
                    replies_max: history.page_events.max(batch::SUBJECTS_MAX).saturating_add(8),
                    stream: names.name.clone(),
                    prefix: names.prefix.clone(),
                    timeout: settings.request_timeout,
                },
                leader: leader.clone(),
                page_events: history.page_events,
                page_bytes: history.page_bytes,
            },
            publisher: Publisher {
                api,
                leader: leader.clone(),
                stream: names.name.clone(),
                prefix: names.prefix.clone(),
                timeout: settings.publish_timeout,
            },
            description: describe(&version, &connector.at, &names.name, &info),
            settings: settings.clone(),
            live,
            connector,
            to_leader,
            to_history,
            publishers: Mutex::default(),
            leader,
            monitor,
        })
    }

    /// What [`Nats::connect`] would find, in a line for people. Changes nothing.
    ///
    /// # Errors
    /// The same.
    pub async fn look(settings: &config::Nats, event_bytes: usize) -> Result<String, StartError> {
        let (connector, names) = (Connector::parse(settings)?, &settings.stream);
        let (requests, _events) = supervise::open_requests(&connector, "check").await?;
        connector.check_server(&requests.client, event_bytes)?;
        let version = requests.client.server_info().version;
        let api = Api::new(requests, settings.request_timeout);
        let (at, stream) = (&connector.at, &names.name);
        Ok(match connector.plan(&api, names, event_bytes).await? {
            Plan::Nothing(info) => {
                let mirror = Nats::look_for_mirror(settings, &connector).await?;
                let warning = mirror.map(|name| format!("; {}", mirror_warning(&name))).unwrap_or_default();
                describe(&version, at, stream, &info) + &warning
            }
            Plan::Making => {
                connector.check_subjects(&api, names).await?;
                format!("NATS {version} at {at}, where the stream {stream} will be made")
            }
            Plan::Mending { mismatch, .. } => {
                format!("NATS {version} at {at}, where the stream {stream} will be mended: {mismatch}")
            }
        })
    }

    /// A mirror that answers in the stream's place, unless it has been lucky for some times.
    async fn look_for_mirror(settings: &config::Nats, connector: &Connector) -> Result<Option<String>, StartError> {
        let requests = nats::Requests::new(connector.options("check"), connector::INBOX);
        let (client, handler) = (requests.client().clone(), Arc::new(requests.clone()));
        let _kept = supervise::keep("history", connector, client, handler).await?;
        let subject = format!("$JS.API.DIRECT.GET.{}", settings.stream.name);
        let query = serde_json::json!({ "last_by_subj": format!("{}>", settings.stream.prefix) }).to_string();
        for _ in 0..LOOKS_FOR_MIRROR {
            let Some(mut replies) = requests.send(&subject, query.as_bytes(), 1) else { continue };
            let reply = tokio::time::timeout(settings.request_timeout, replies.next()).await;
            let Ok(Some(reply)) = reply else { return Ok(None) };
            let other = message::Delivered::of(&reply).and_then(|message| message.stream().map(str::to_owned));
            if let Some(other) = other.filter(|other| *other != settings.stream.name) {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    /// The connections by name, each with what is wrong with it, if anything is.
    fn connections(&self) -> Vec<ConnectionState> {
        let state = |kept: &Kept| ConnectionState { name: kept.status.connection, trouble: kept.trouble() };
        let mut leader = state(&self.to_leader);
        if leader.trouble.is_none() && !self.publisher.api.current().is_some_and(|requests| requests.is_connected()) {
            leader.trouble = Some("not connected".into());
        }
        let publishers = self.publishers();
        let broken = publishers.iter().map(state).find(|publisher| publisher.trouble.is_some());
        // Where no worker has a connection of its own, the leader's serves.
        let shared = leader.trouble.clone().filter(|_| publishers.is_empty());
        let publish = broken.unwrap_or(ConnectionState { name: "publish", trouble: shared });
        vec![state(self.live.kept()), state(&self.to_history), leader, publish]
    }

    #[cfg(test)]
    pub(crate) fn status(&self, connection: &str) -> Arc<supervise::Status> {
        let kept = [&self.to_leader, &self.to_history, self.live.kept()];
        kept.into_iter().find(|kept| kept.status.connection == connection).expect("there is one").status.clone()
    }

    fn publishers(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        self.publishers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is answered on any connection that is as it should be.
fn probe(names: &config::NatsStream) -> String {
    format!("$JS.API.STREAM.INFO.{}", names.name)
}

fn mirror_warning(name: &str) -> String {
    format!("the mirror {name} answers in the stream's place: {}", leader::MIRROR_MEND)
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
        let (requests, events) = supervise::open_requests(&self.connector, "publish").await.map_err(away)?;
        let api = Api::new(requests, self.settings.request_timeout);
        let probe = probe(&self.settings.stream);
        let kept = supervise::keep_requests("publish", self.connector.clone(), (api.clone(), events), probe);
        self.publishers().push(kept);
        Ok(Some(Box::new(Publisher { api, ..self.publisher.clone() })))
    }

    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        self.live.subscribe(filter).await
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

    fn witness(&self, epoch: Epoch) -> Option<Witness> {
        self.leader.known().present().witness(epoch)
    }

    async fn recognize(&self, witness: Witness) -> Result<Recognition, BrokerError> {
        Ok(self.leader.recognize(witness).await?)
    }

    async fn gone(&self) -> Result<Gone, BrokerError> {
        let info = self.leader.info().await?;
        Ok(Gone { first: info.bounds.first, singly: info.gone_singly() })
    }

    async fn stock(&self) -> Result<Stock, BrokerError> {
        Ok(self.leader.info().await?.stock())
    }

    fn resync_signal(&self) -> watch::Receiver<u64> {
        self.leader.known().resyncs.subscribe()
    }

    fn health(&self) -> Health {
        let troubled = |connection: ConnectionState| Some((connection.name, connection.trouble?));
        if let Some((name, trouble)) = self.connections().into_iter().find_map(troubled) {
            return Health::Away(format!("not connected to NATS for {name}: {trouble}"));
        }
        let (known, name) = (self.leader.known(), &self.settings.stream.name);
        match (known.trouble(), known.mismatch()) {
            (Some(trouble), _) => Health::Away(format!("stream {name}: {trouble}")),
            (None, Some(mismatch)) => Health::Unfit(format!("the stream {name} does not fit any more: {mismatch}")),
            (None, None) => Health::Ready,
        }
    }

    fn link(&self) -> Link {
        let publishers: u64 = self.publishers().iter().map(|kept| kept.status.made()).sum();
        let others = [&self.to_leader, &self.to_history, self.live.kept()].map(|kept| kept.status.made());
        let mut connections = self.connections();
        if let Some(leader) = connections.iter_mut().find(|connection| connection.name == "leader") {
            // What it is for is an answer of the stream's leader.
            leader.trouble = leader.trouble.take().or_else(|| self.leader.known().trouble());
        }
        Link {
            connections: publishers + others.iter().sum::<u64>(),
            round_trip: self.leader.known().round_trip(),
            states: connections,
            warning: self.leader.known().mirror().map(|name| mirror_warning(&name)),
        }
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.monitor.abort();
    }
}
