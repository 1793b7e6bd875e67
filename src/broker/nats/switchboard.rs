//! Who listens to what, and what the server is yet to be told of it.
//!
//! Whoever begins or ends to listen leaves a word here; the line says it when it can, and says everything again on each
//! new connection. A ping behind a word proves, when its pong comes, that the server has taken it in: there is one ping
//! at a time, for all who wait by then.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::{Notify, oneshot, watch};

use super::{message, wire};
use crate::{
    broker::mailbox::{Mailbox, Received},
    config::NatsStream,
};

/// Words that a server that does not read may leave unsaid; whoever comes then is turned away.
const UNSAID_BYTES_MAX: usize = 8 * 1024 * 1024;

pub(super) struct Switchboard {
    names: NatsStream,
    /// Hints that may wait for one listener.
    room: usize,
    desk: Mutex<Desk>,
    word: Notify,
    connections: watch::Sender<u64>,
}

#[derive(Default)]
struct Desk {
    server: Server,
    listeners: HashMap<u64, Listener>,
    listeners_ever: u64,
    unsaid: Vec<u8>,
    /// Those whom the next ping is for; nobody, where it only asks whether the server is there.
    waiting: Option<Vec<oneshot::Sender<()>>>,
    /// Those whom the last ping is for, while its pong has not come.
    asked: Option<Vec<oneshot::Sender<()>>>,
}

#[derive(Default, PartialEq)]
enum Server {
    #[default]
    Away,
    /// It has let us in.
    There,
    /// It has taken in all subscriptions.
    Told,
}

struct Listener {
    subject: Box<str>,
    mailbox: Arc<Mailbox>,
}

/// Ends a listener's subscription when its hints are dropped.
pub(super) struct Listening {
    switchboard: Arc<Switchboard>,
    subscription: u64,
}

/// A listener's hints, and word that the server has taken in that there is one.
pub(super) type Begun = (Received<Listening>, oneshot::Receiver<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        let mut desk = self.switchboard.desk();
        desk.listeners.remove(&self.subscription);
        if desk.server != Server::Away {
            wire::unsubscribe(&mut desk.unsaid, self.subscription);
            self.switchboard.word.notify_one();
        }
    }
}

impl Switchboard {
    pub fn new(names: NatsStream, room: usize) -> Switchboard {
        Switchboard { names, room, desk: Mutex::default(), word: Notify::new(), connections: watch::Sender::new(0) }
    }

    /// Begins to listen; `None` while there is nobody to tell it to.
    pub fn listen(self: &Arc<Switchboard>, subject: String) -> Option<Begun> {
        let mut desk = self.desk();
        if desk.server == Server::Away || desk.unsaid.len() > UNSAID_BYTES_MAX {
            return None;
        }
        let (taken_in, is_taken_in) = oneshot::channel();
        desk.listeners_ever += 1;
        let subscription = desk.listeners_ever;
        wire::subscribe(&mut desk.unsaid, &subject, subscription);
        desk.waiting.get_or_insert_default().push(taken_in);
        let mailbox = Arc::new(Mailbox::new(self.room));
        desk.listeners.insert(subscription, Listener { subject: subject.into(), mailbox: mailbox.clone() });
        drop(desk);
        self.word.notify_one();
        Some((Received::new(mailbox, Listening { switchboard: self.clone(), subscription }), is_taken_in))
    }

    /// Puts a message into its listener's mailbox. One that has gone meanwhile needs none.
    pub fn deliver(&self, message: &wire::Message) {
        let mailbox = self.desk().listeners.get(&message.subscription).map(|listener| listener.mailbox.clone());
        if let Some(mailbox) = mailbox {
            mailbox.put(message::hint(message, &self.names));
        }
    }

    /// A server is there that knows of nobody: everything is to be said.
    pub fn connected(&self) {
        let mut desk = self.desk();
        let Desk { server, listeners, unsaid, waiting, .. } = &mut *desk;
        *server = Server::There;
        for (subscription, listener) in listeners {
            wire::subscribe(unsaid, &listener.subject, *subscription);
        }
        *waiting = Some(vec![]);
    }

    /// The server is gone, and with it what it was to be told. Those who wait for it are turned away.
    pub fn disconnected(&self) {
        let mut desk = self.desk();
        let Desk { listeners, listeners_ever, .. } = std::mem::take(&mut *desk);
        *desk = Desk { listeners, listeners_ever, ..Desk::default() };
    }

    /// Whether the server knows of all subscriptions that it was told of when it let us in.
    pub fn is_up(&self) -> bool {
        self.desk().server == Server::Told
    }

    /// How often that has come to be.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.subscribe()
    }

    /// Has a ping said.
    pub fn ping(&self) {
        self.desk().waiting.get_or_insert_default();
    }

    /// Answers the server's ping.
    pub fn answer_ping(&self) {
        self.desk().unsaid.extend_from_slice(wire::PONG);
        self.word.notify_one();
    }

    /// The server has taken in all that was said before the last ping.
    pub fn ponged(&self) {
        let mut desk = self.desk();
        for waiting in desk.asked.take().into_iter().flatten() {
            // Whoever has gone meanwhile needs no answer.
            let _ = waiting.send(());
        }
        if desk.waiting.is_some() {
            self.word.notify_one();
        }
        // The first ping came after all subscriptions.
        if desk.server == Server::There {
            desk.server = Server::Told;
            drop(desk);
            self.connections.send_modify(|count| *count += 1);
        }
    }

    /// Waits until there is something to say.
    pub async fn word(&self) {
        self.word.notified().await;
    }

    /// All that is to be said now.
    pub fn words(&self) -> Vec<u8> {
        let mut desk = self.desk();
        let mut words = std::mem::take(&mut desk.unsaid);
        if desk.asked.is_none()
            && let Some(waiting) = desk.waiting.take()
        {
            words.extend_from_slice(wire::PING);
            desk.asked = Some(waiting);
        }
        words
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().expect("no panic happens while the desk is held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switchboard() -> Arc<Switchboard> {
        let names = crate::config::Config::load(None, vec![]).unwrap().nats.stream;
        let switchboard = Arc::new(Switchboard::new(names, 1));
        switchboard.connected();
        assert_eq!(said(&switchboard), "PING\r\n");
        switchboard.ponged();
        switchboard
    }

    fn said(switchboard: &Switchboard) -> String {
        String::from_utf8(switchboard.words()).unwrap()
    }

    #[test]
    fn one_ping_at_a_time_is_for_all_who_wait_by_then() {
        let switchboard = switchboard();
        let [(_a, mut first), (_b, mut second)] = ["a", "b"].map(|subject| switchboard.listen(subject.into()).unwrap());
        assert_eq!(said(&switchboard), "SUB a 1\r\nSUB b 2\r\nPING\r\n");
        let (_c, mut third) = switchboard.listen("c".into()).unwrap();
        assert_eq!(said(&switchboard), "SUB c 3\r\n");

        switchboard.ponged();
        assert!(first.try_recv().is_ok() && second.try_recv().is_ok() && third.try_recv().is_err());
        assert_eq!(said(&switchboard), "PING\r\n");
        switchboard.ponged();
        assert!(third.try_recv().is_ok());
    }

    #[test]
    fn a_new_server_is_told_of_all_who_still_listen() {
        let switchboard = switchboard();
        let [(one, _), (other, waits)] = ["a", "b"].map(|subject| switchboard.listen(subject.into()).unwrap());
        assert!(switchboard.is_up());

        switchboard.disconnected();
        drop(one);
        assert!(switchboard.listen("c".into()).is_none() && !switchboard.is_up());
        assert!(waits.blocking_recv().is_err(), "the server that it waits for is gone");
        switchboard.connected();

        assert_eq!(said(&switchboard), "SUB b 2\r\nPING\r\n");
        assert!(!switchboard.is_up() && *switchboard.connections().borrow() == 1);
        switchboard.ponged();
        assert!(switchboard.is_up() && *switchboard.connections().borrow() == 2);
        drop(other);
        assert_eq!(said(&switchboard), "UNSUB 2\r\n");
    }
}
