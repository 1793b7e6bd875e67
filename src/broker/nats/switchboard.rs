//! Who listens to what, and what the server is yet to be told of it.
//!
//! Whoever begins or ends to listen leaves a word here; the line says it when it can, and says everything again on each
//! new connection. A ping behind a word proves, when its pong comes, that the server has taken it in: there is one ping
//! at a time, for all who wait by then.
//!
//! # Which incarnation
//! No hint says of which incarnation of the stream it is, and one that was made anew counts anew. So word of changes
//! comes on the same connection, and whatever comes behind it is held until the stream's leader has been asked: that is
//! a *question*. There is another with each new connection, on which word may have been missed, and one when a hint's
//! sequence and time contradict those of another.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::{Notify, oneshot, watch};

use super::{leader::Known, message, wire};
use crate::{
    broker::{
        Hint,
        mailbox::{Mailbox, Received},
    },
    config::NatsStream,
    event::{Epoch, Event},
};

/// Words that a server that does not read may leave unsaid; whoever comes then is turned away.
const UNSAID_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Hints that may be held together; more of them are lost, and said to be.
const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The subscription of the stream's advisories.
const ADVISORIES: u64 = 0;

pub(super) struct Switchboard {
    names: NatsStream,
    /// Hints that may wait for one listener.
    room: usize,
    known: Arc<Known>,
    desk: Mutex<Desk>,
    word: Notify,
    connections: watch::Sender<u64>,
    questions: watch::Sender<u64>,
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
    /// While there is a question.
    held: Option<Held>,
    newest: Option<Newest>,
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

/// Messages whose incarnation is in question.
#[derive(Default)]
struct Held {
    messages: Vec<wire::Message>,
    bytes: usize,
    /// There were too many.
    are_lost: bool,
}

impl Held {
    fn keep(&mut self, message: wire::Message) {
        self.bytes += message.headers.len() + message.payload.len();
        self.are_lost |= self.bytes > HELD_BYTES_MAX;
        match self.are_lost {
            true => self.messages = vec![],
            false => self.messages.push(message),
        }
    }
}

/// The event with the highest sequence that was told of.
#[derive(Clone, Copy)]
struct Newest {
    epoch: Epoch,
    sequence: u64,
    time: Timestamp,
}

impl Newest {
    fn of(epoch: Epoch, event: &Event) -> Newest {
        Newest { epoch, sequence: event.sequence, time: event.time }
    }

    /// Whether both can't be of one stream, which counts on as time passes. (Or the clocks of two leaders differ.)
    fn contradicts(&self, other: &Newest) -> bool {
        self.epoch == other.epoch && other.sequence <= self.sequence && other.time > self.time
    }
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
    pub fn new(names: NatsStream, room: usize, known: Arc<Known>) -> Switchboard {
        let (connections, questions) = (watch::Sender::new(0), watch::Sender::new(0));
        Switchboard { names, room, known, desk: Mutex::default(), word: Notify::new(), connections, questions }
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

    /// Takes a message that has come.
    pub fn deliver(&self, message: wire::Message) {
        let mut desk = self.desk();
        match message.subscription {
            ADVISORIES => {
                tracing::info!(advisory = %advisory(&message.payload), "the stream changed");
                self.question(&mut desk);
            }
            _ => self.hand_over(&mut desk, message),
        }
    }

    /// Puts a message into its listener's mailbox, unless it is to be held. One that has gone meanwhile needs none.
    fn hand_over(&self, desk: &mut Desk, message: wire::Message) {
        if let Some(held) = &mut desk.held {
            return held.keep(message);
        }
        let Some(listener) = desk.listeners.get(&message.subscription) else { return };
        let hint = message::hint(&message, &self.names, self.known.present());
        if let Hint::Stored { event, epoch, .. } = &hint {
            let this = Newest::of(*epoch, event);
            match &desk.newest {
                Some(newest) if newest.contradicts(&this) => {
                    return self.question(desk).keep(message);
                }
                Some(newest) if newest.epoch == this.epoch && newest.sequence >= this.sequence => {}
                Some(_) | None => desk.newest = Some(this),
            }
        }
        listener.mailbox.put(hint);
    }

    /// Asks which incarnation there is, and holds what comes until that is settled.
    fn question<'d>(&self, desk: &'d mut Desk) -> &'d mut Held {
        self.questions.send_modify(|count| *count += 1);
        desk.held.get_or_insert_default()
    }

    /// How many questions there have been: the last one is open as long as it has not been settled.
    pub fn questions(&self) -> watch::Receiver<u64> {
        self.questions.subscribe()
    }

    /// The leader was asked after `question` had come up, and what it said is known: whatever was held is of the
    /// present incarnation, or older.
    pub fn settle(&self, question: u64) {
        let mut desk = self.desk();
        if desk.server != Server::Told || *self.questions.borrow() != question {
            return;
        }
        let Some(held) = desk.held.take() else { return };
        desk.newest = None;
        if held.are_lost {
            desk.listeners.values().for_each(|listener| listener.mailbox.put(Hint::Lost));
        }
        for message in held.messages {
            self.hand_over(&mut desk, message);
        }
    }

    /// A server is there that knows of nobody: everything is to be said.
    pub fn connected(&self) {
        let mut desk = self.desk();
        let Desk { server, listeners, unsaid, waiting, held, .. } = &mut *desk;
        *server = Server::There;
        *held = Some(Held::default());
        // First, so that nobody is told of it later than of those whose hints it is about.
        wire::subscribe(unsaid, &format!("$JS.EVENT.ADVISORY.STREAM.*.{}", self.names.name), ADVISORIES);
        for (subscription, listener) in listeners {
            wire::subscribe(unsaid, &listener.subject, *subscription);
        }
        *waiting = Some(vec![]);
    }

    /// The server is gone, and with it what it was to be told. Those who wait for it are turned away.
    pub fn disconnected(&self) {
        let mut desk = self.desk();
        self.known.set_told(false);
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
            self.known.set_told(true);
            self.connections.send_modify(|count| *count += 1);
            self.question(&mut desk);
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

/// What an advisory is of, and what happened, where it says so.
fn advisory(payload: &[u8]) -> String {
    let payload: Value = serde_json::from_slice(payload).unwrap_or_default();
    let parts = ["type", "action"].map(|part| payload[part].as_str().unwrap_or_default());
    parts.join(" ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::{super::leader::Info, *};

    const ASKS_FOR_ADVISORIES: &str = "SUB $JS.EVENT.ADVISORY.STREAM.*.EVENTS 0\r\n";
    const ROOM: usize = 3;

    fn switchboard() -> Arc<Switchboard> {
        let names = crate::config::Config::load(None, vec![]).unwrap().nats.stream;
        let switchboard = Arc::new(Switchboard::new(names, ROOM, Arc::new(Known::new(&stream(0)))));
        switchboard.connected();
        assert_eq!(said(&switchboard), format!("{ASKS_FOR_ADVISORIES}PING\r\n"));
        switchboard.ponged();
        switchboard.settle(1);
        switchboard
    }

    /// A stream that was made in this second.
    fn stream(second: u64) -> Info {
        Info::made_at(&format!("2026-01-02T03:04:{second:02}Z"))
    }

    /// An event that was stored in this second, for the first who listens.
    fn stored(sequence: u64, second: u64) -> wire::Message {
        let headers = format!(
            "NATS/1.0\r\nNats-Stream: EVENTS\r\nNats-Subject: events.a\r\nNats-Sequence: {sequence}\r\n\
             Nats-Time-Stamp: 2026-01-02T03:04:{second:02}Z\r\nNats-Last-Sequence: 1\r\n\r\n"
        );
        wire::Message { subscription: 1, headers: headers.into(), payload: "x".into() }
    }

    fn change() -> wire::Message {
        wire::Message { subscription: ADVISORIES, headers: "".into(), payload: "{}".into() }
    }

    /// The sequences and incarnations of what has come; `None` for what was lost.
    fn heard(hints: &mut Received<Listening>) -> Vec<Option<(u64, Epoch)>> {
        let come = std::iter::from_fn(|| hints.next().now_or_never().flatten());
        let told = |hint| match hint {
            Hint::Stored { event, epoch, .. } => Some((event.sequence, epoch)),
            Hint::Lost => None,
        };
        come.map(told).collect()
    }

    fn learn(switchboard: &Switchboard, info: Info) {
        switchboard.known.learn(&Ok(Arc::new(info)), 0);
    }

    #[test]
    fn what_comes_behind_word_of_a_change_is_held_until_the_leader_was_asked() {
        let (switchboard, old, new) = (switchboard(), stream(0).bounds.epoch, stream(20).bounds.epoch);
        let (mut hints, _) = switchboard.listen("live.a".into()).unwrap();
        switchboard.deliver(stored(5, 10));
        assert_eq!(heard(&mut hints), [Some((5, old))]);

        // Twice: the stream is deleted, and made.
        switchboard.deliver(change());
        switchboard.deliver(stored(6, 11));
        switchboard.deliver(change());
        switchboard.deliver(stored(7, 30));
        assert_eq!(*switchboard.questions().borrow(), 3);
        switchboard.settle(2);
        assert_eq!(heard(&mut hints), [], "asked too early");
        learn(&switchboard, stream(20));
        switchboard.settle(3);
        switchboard.deliver(stored(8, 31));

        assert_eq!(heard(&mut hints), [None, Some((7, new)), Some((8, new))]);
    }

    #[test]
    fn a_stream_that_counts_anew_is_asked_about() {
        let (switchboard, old, new) = (switchboard(), stream(0).bounds.epoch, stream(20).bounds.epoch);
        let (mut hints, _) = switchboard.listen("live.a".into()).unwrap();
        for repeated in [5, 5, 4] {
            switchboard.deliver(stored(repeated, 5 + repeated));
        }
        assert_eq!(heard(&mut hints).len(), 3);
        assert_eq!(*switchboard.questions().borrow(), 1);

        // The clock of another leader is fast.
        switchboard.deliver(stored(4, 15));
        assert_eq!((heard(&mut hints), *switchboard.questions().borrow()), (vec![], 2));
        switchboard.settle(2);
        assert_eq!(heard(&mut hints), [Some((4, old))]);

        switchboard.deliver(stored(2, 30));
        switchboard.deliver(stored(3, 31));
        assert_eq!((heard(&mut hints), *switchboard.questions().borrow()), (vec![], 3));
        learn(&switchboard, stream(20));
        switchboard.settle(3);
        assert_eq!(heard(&mut hints), [Some((2, new)), Some((3, new))]);
    }

    #[test]
    fn on_a_new_connection_hints_are_held_until_the_leader_was_asked_after_it() {
        let (switchboard, old) = (switchboard(), stream(0).bounds.epoch);
        let (mut hints, _) = switchboard.listen("live.a".into()).unwrap();
        switchboard.disconnected();
        switchboard.connected();
        said(&switchboard);
        switchboard.deliver(stored(5, 10));
        switchboard.settle(1);
        assert_eq!(heard(&mut hints), [], "word may have been missed");
        switchboard.ponged();
        switchboard.settle(2);
        assert_eq!(heard(&mut hints), [Some((5, old))]);
    }

    #[test]
    fn too_much_to_hold_is_lost_and_said_to_be() {
        let switchboard = switchboard();
        let (mut hints, _) = switchboard.listen("live.a".into()).unwrap();
        switchboard.deliver(change());
        let large = wire::Message { payload: vec![0; HELD_BYTES_MAX].into(), ..stored(5, 10) };
        for message in [stored(4, 9), large, stored(6, 11)] {
            switchboard.deliver(message);
        }
        switchboard.settle(2);
        switchboard.deliver(stored(7, 12));
        assert_eq!(heard(&mut hints), [None, Some((7, stream(0).bounds.epoch))]);
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

        assert_eq!(said(&switchboard), format!("{ASKS_FOR_ADVISORIES}SUB b 2\r\nPING\r\n"));
        assert!(!switchboard.is_up() && *switchboard.connections().borrow() == 1);
        switchboard.ponged();
        assert!(switchboard.is_up() && *switchboard.connections().borrow() == 2);
        drop(other);
        assert_eq!(said(&switchboard), "UNSUB 2\r\n");
    }
}
