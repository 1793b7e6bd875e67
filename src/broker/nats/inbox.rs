//! Replies to requests: one subscription for all of them, told apart by their last token. (async-nats has the same
//! within, but hands over a request and waits for its reply in one step, and keeps those that were given up.)

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{Client, Message, SubscribeError};
use futures_util::StreamExt;
use tokio::{sync::oneshot, task::JoinHandle};

pub(super) struct Inbox {
    prefix: String,
    next: AtomicU64,
    waiting: Waiting,
    dispatch: JoinHandle<()>,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Message>>>>;

impl Inbox {
    pub async fn open(client: &Client) -> Result<Inbox, SubscribeError> {
        let prefix = format!("{}.", client.new_inbox());
        let waiting = Waiting::default();
        let mut replies = client.subscribe(format!("{prefix}*")).await?;
        let dispatch = tokio::spawn({
            let (waiting, prefix) = (waiting.clone(), prefix.clone());
            async move {
                while let Some(message) = replies.next().await {
                    let token = message.subject.strip_prefix(&*prefix).and_then(|token| token.parse().ok());
                    let waiting = token.and_then(|token| lock(&waiting).remove(&token));
                    if let Some(waiting) = waiting {
                        let _ = waiting.send(message);
                    }
                }
            }
        });
        Ok(Inbox { prefix, next: AtomicU64::new(1), waiting, dispatch })
    }

    /// Whether replies are handed over. They are not once the connection's task has ended, or the dispatch of replies has.
    pub fn is_open(&self) -> bool {
        !self.dispatch.is_finished()
    }

    /// Makes a reply subject and waits there. Dropping what is returned gives the reply up.
    pub fn expect(&self) -> Expected {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        lock(&self.waiting).insert(token, sender);
        let subject = [&*self.prefix, &token.to_string()].concat();
        Expected { subject, token, reply, waiting: self.waiting.clone() }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.dispatch.abort();
    }
}

pub(super) struct Expected {
    pub subject: String,
    token: u64,
    reply: oneshot::Receiver<Message>,
    waiting: Waiting,
}

impl Expected {
    /// `None` when there was no reply in time.
    pub async fn within(&mut self, limit: Duration) -> Option<Message> {
        tokio::time::timeout(limit, &mut self.reply).await.ok()?.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.token);
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Message>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
