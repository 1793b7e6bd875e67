//! Requests whose replies come to one subscription of the client's, told apart by the last token of their subject.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::mpsc;

use super::{client::Client, codec::Message};

/// The number of the standing subscription that replies come to.
const SID: u64 = 0;

/// Sends requests, and gets replies from the task that drives the connection. Cheap to clone.
#[derive(Clone)]
pub struct Requests(Arc<Shared>);

struct Shared {
    client: Client,
    prefix: String,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, mpsc::Sender<Message>>>,
}

/// The replies to one request. Dropping them gives up those that have not come.
pub struct Replies {
    requests: Requests,
    token: u64,
    replies: mpsc::Receiver<Message>,
}

impl Requests {
    /// A client for requests alone, whose replies come below `inbox`.
    pub fn new(options: super::ConnectOptions, inbox: &str) -> Requests {
        let prefix = format!("{inbox}.{:032x}.", rand::random::<u128>());
        let client = Client::new(options, vec![format!("{prefix}*")]);
        Requests(Arc::new(Shared { client, prefix, next: AtomicU64::new(1), waiting: Mutex::default() }))
    }

    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// Sends a request for at most so many replies. `None` while there is no connection.
    pub fn send(&self, subject: &str, payload: &[u8], replies_max: usize) -> Option<Replies> {
        let token = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (sender, replies) = mpsc::channel(replies_max);
        self.waiting().insert(token, sender);
        let replies = Replies { requests: self.clone(), token, replies };
        let reply = format!("{}{token}", self.0.prefix);
        self.0.client.publish(subject, &reply, payload).then_some(replies)
    }

    /// Hands a message over to its request. A request that has been given up needs none; one that gets more than it
    /// asked for is at its end.
    pub fn deliver(&self, message: Message) {
        let token = message.subject.strip_prefix(self.0.prefix.as_bytes());
        let token = token.and_then(|token| str::from_utf8(token).ok()?.parse().ok());
        let (SID, Some(token)) = (message.sid, token) else { return };
        let mut waiting = self.waiting();
        if waiting.get(&token).is_some_and(|waiting| waiting.try_send(message).is_err()) {
            waiting.remove(&token);
        }
    }

    /// Ends every request that waits: its replies would have come on a connection that is gone.
    pub fn end_all(&self) {
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Message>>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replies {
    /// The next reply; `None` when no more can come.
    pub async fn next(&mut self) -> Option<Message> {
        self.replies.recv().await
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.requests.waiting().remove(&self.token);
    }
}
