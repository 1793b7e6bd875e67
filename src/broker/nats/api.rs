//! Requests to JetStream that are answered by one message of JSON, over a connection of async-nats: nothing that other
//! publishers chose comes over it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_nats::{Client, HeaderMap, StatusCode, connection::State};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;

use super::inbox::{Expected, Inbox};
use crate::broker::BrokerError;

/// JetStream's own numbers for its errors (`err_code`).
pub(super) mod code {
    pub const TEMPORARILY_UNAVAILABLE: u64 = 10008;
    pub const NO_MESSAGE: u64 = 10037;
    pub const NOT_ENABLED_FOR_ACCOUNT: u64 = 10039;
    pub const SUBJECTS_OVERLAP: u64 = 10065;
    pub const INSUFFICIENT_STORAGE: u64 = 10047;
    pub const STREAM_NAME_IN_USE: u64 = 10058;
    pub const STREAM_NOT_FOUND: u64 = 10059;
    pub const WRONG_LAST_SEQUENCE: u64 = 10071;
    pub const NOT_ENABLED: u64 = 10076;
    pub const DUPLICATE_IN_PROCESS: u64 = 10158;
    pub const WRONG_LAST_SEQUENCE_IN_PROCESS: u64 = 10164;
}

/// Why a request to JetStream brought no answer of the kind that was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum RequestError {
    #[error("not connected")]
    NotConnected,
    #[error("nothing answers there: JetStream is off, or the stream has no leader")]
    NoResponders,
    #[error("no answer in {0:?}: overloaded, or the user lacks the permission")]
    Silent(Duration),
    #[error("{} ({})", .0.description, .0.err_code)]
    Refused(Refusal),
    #[error("the server that answered may have been deposed as the stream's leader")]
    Deposed,
    #[error("the stream's leader knows of less than is stored")]
    Behind,
    #[error("{0}, a mirror of the stream, answered in its place")]
    Mirror(String),
    #[error("garbled: {0}")]
    Garbled(String),
}

/// An error as JetStream words it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Refusal {
    #[serde(default)]
    pub err_code: u64,
    #[serde(default)]
    pub description: String,
}

impl From<RequestError> for BrokerError {
    fn from(error: RequestError) -> BrokerError {
        match error {
            RequestError::Garbled(what) => BrokerError::Protocol(what),
            other => BrokerError::Unavailable(other.to_string()),
        }
    }
}

/// One connection for requests, with their replies in one inbox.
pub(super) struct Requests {
    pub client: Client,
    inbox: Inbox,
}

impl Requests {
    pub async fn new(client: Client) -> Result<Requests, RequestError> {
        let inbox = Inbox::open(&client).await.map_err(|error| RequestError::Garbled(error.to_string()))?;
        Ok(Requests { client, inbox })
    }

    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Whether replies are still handed over.
    pub fn is_listening(&self) -> bool {
        self.inbox.is_open()
    }

    /// A reply subject, and the reply that comes there.
    pub fn expect(&self) -> Expected {
        self.inbox.expect()
    }

    /// One JetStream API request, answered by JSON.
    pub async fn ask(&self, limit: Duration, subject: &str, body: &Value) -> Result<Value, RequestError> {
        // Not connected: async-nats would keep the request and send it when the answer is not wanted any more.
        if !self.is_connected() {
            return Err(RequestError::NotConnected);
        }
        let body = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        let mut reply = self.expect();
        let (subject, to) = (subject.to_owned(), reply.subject.clone());
        let sent = self.client.publish_with_reply_and_headers(subject, to, HeaderMap::new(), body);
        let sent = tokio::time::timeout(limit, sent).await.map_err(|_| RequestError::NotConnected)?;
        sent.map_err(|_| RequestError::NotConnected)?;
        let message = reply.within(limit).await.ok_or(RequestError::Silent(limit))?;
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(RequestError::NoResponders);
        }
        let mut answer: Value =
            serde_json::from_slice(&message.payload).map_err(|error| RequestError::Garbled(error.to_string()))?;
        match answer.get_mut("error").map(Value::take) {
            None | Some(Value::Null) => Ok(answer),
            Some(error) => Err(serde_json::from_value(error)
                .map_or_else(|error| RequestError::Garbled(error.to_string()), RequestError::Refused)),
        }
    }
}

/// Requests by whichever connection there is now: one that fails is replaced by another (see `supervise`).
#[derive(Clone)]
pub(super) struct Api {
    current: Arc<Mutex<Option<Arc<Requests>>>>,
    /// When a server has closed the connection last because a message was too large.
    too_large: Arc<Mutex<Option<Instant>>>,
    pub timeout: Duration,
}

impl Api {
    pub fn new(requests: Requests, timeout: Duration) -> Api {
        Api { current: Arc::new(Mutex::new(Some(Arc::new(requests)))), too_large: Arc::default(), timeout }
    }

    /// The connection, if there is one.
    pub fn current(&self) -> Option<Arc<Requests>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note that a server has closed the connection because a message was too large.
    pub fn saw_too_large(&self) {
        *self.too_large.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// How much the server takes, if a message of so many bytes that was sent then is likely to have been too large: its
    /// limit may be lowered while it runs, and the client learns of it only with the next connection.
    pub fn limit_below(&self, bytes: usize, sent: Instant) -> Option<usize> {
        let at = (*self.too_large.lock().unwrap_or_else(PoisonError::into_inner))?;
        let limit = self.current()?.client.max_payload();
        (at >= sent && bytes > limit).then_some(limit)
    }

    pub fn replace(&self, requests: Option<Arc<Requests>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = requests;
    }

    /// See [`Requests::ask`].
    pub async fn ask(&self, subject: &str, body: &Value) -> Result<Value, RequestError> {
        self.ask_within(self.timeout, subject, body).await
    }

    pub async fn ask_within(&self, limit: Duration, subject: &str, body: &Value) -> Result<Value, RequestError> {
        let requests = self.current().ok_or(RequestError::NotConnected)?;
        requests.ask(limit, subject, body).await
    }
}
