//! Live hints: what the stream republishes, on one connection for all feeds.
//!
//! ```text
//! nats::Connection -> Router -> message::hint -> Feeds -> Mailbox -> the feed that subscribed
//! ```
//!
//! Feeds do not see reconnects. Once the server has handled all subscriptions again, every feed is asked to resync (see
//! `monitor`). A hint is held against what was asked for: one whose subject its feed's filter does not match, or whose
//! payload is not as long as it was stored, is a hint lost.
//!
//! # Which incarnation
//! No hint says of which incarnation of the stream it is, and one that was made anew counts anew. So word of changes
//! comes on the same connection, and whatever comes behind it is held until the stream's leader has been asked: that is
//! a *question*. There is another with each new connection, on which word may have been missed, and one when a hint's
//! sequence and time contradict those of another.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use super::{
    connector::Connector,
    feeds::{Feed, Feeds, Way},
    leader::LeaderState,
    message,
    provision::StartError,
    supervise::{self, Handler, Kept},
};
use crate::{
    broker::{
        BrokerError, Hint, Hints,
        mailbox::{Mailbox, Received},
    },
    config::{self, NatsStream},
    event::{Epoch, Event},
    memory::Memory,
    nats::{Client, Message, Subscription},
    subject::Filter,
};

/// Hints that may be held together; more of them are lost, and said to be.
const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The standing subscription to the stream's advisories. On each connection it is the first, so that no feed gets hints
/// of another incarnation before word of the change has come.
const ADVISORIES: u64 = 0;

/// The connection of live hints.
pub(super) struct Live {
    router: Arc<Router>,
    live_prefix: String,
    timeout: Duration,
    kept: Kept,
}

impl Live {
    pub async fn connect(
        connector: &Connector,
        settings: &config::Nats,
        known: Arc<LeaderState>,
        memory: &Memory,
    ) -> Result<Live, StartError> {
        let names = &settings.stream;
        let advisories = format!("$JS.EVENT.ADVISORY.STREAM.*.{}", names.name);
        let client = Client::new(connector.options("live"), vec![advisories]);
        let router =
            Arc::new(Router::new(names.clone(), settings.subscription_messages, memory, known, client.clone()));
        Ok(Live {
            kept: supervise::keep("live", connector, client, router.clone()).await?,
            router,
            live_prefix: names.live_prefix.clone(),
            timeout: settings.request_timeout,
        })
    }

    /// Hints on `filter`. When this returns, the server knows of it.
    pub async fn subscribe(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        let away = |why: &str| BrokerError::Unavailable(format!("live: {why}"));
        let subscribed = self.router.subscribe(filter, &self.live_prefix);
        let (hints, confirmed) = subscribed.ok_or_else(|| away("not connected"))?;
        match tokio::time::timeout(self.timeout, confirmed).await {
            Ok(Ok(())) => Ok(Box::pin(hints)),
            Ok(Err(_)) => Err(away("the connection broke")),
            Err(_) => Err(away("no answer in time")),
        }
    }

    pub fn router(&self) -> Arc<Router> {
        self.router.clone()
    }

    pub fn kept(&self) -> &Kept {
        &self.kept
    }
}

/// Which feed each message is for, and whether it is of the present incarnation.
pub(super) struct Router {
    names: NatsStream,
    /// Hints that may wait for one feed.
    room: usize,
    memory: Memory,
    known: Arc<LeaderState>,
    client: Client,
    state: Mutex<State>,
    questions: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// Whether the server has handled all subscriptions.
    is_ready: bool,
    feeds: Feeds,
    /// While there is a question.
    held: Option<Held>,
    newest: Option<Newest>,
}

/// Messages whose incarnation is in question.
#[derive(Default)]
struct Held {
    messages: Vec<Message>,
    bytes: usize,
    /// There were too many.
    are_lost: bool,
}

impl Held {
    fn keep(&mut self, message: Message) {
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

/// Ends a feed's subscription, or its part in one, when its hints are dropped.
pub(super) struct Subscribed {
    router: Arc<Router>,
    sid: u64,
    mailbox: Arc<Mailbox>,
    /// The one that it has alone.
    _own: Option<Subscription>,
}

impl Drop for Subscribed {
    fn drop(&mut self) {
        let removed = self.router.state().feeds.remove(self.sid, &self.mailbox);
        // Without the lock: a subscription tells the server of its end.
        drop(removed);
    }
}

/// A feed's hints, and word that the server has handled its subscription.
type Begun = (Received<Subscribed>, oneshot::Receiver<()>);

impl Router {
    fn new(names: NatsStream, room: usize, memory: &Memory, known: Arc<LeaderState>, client: Client) -> Router {
        let memory = memory.clone();
        Router { names, room, memory, known, client, state: Mutex::default(), questions: watch::Sender::new(0) }
    }

    /// `None` while there is no connection.
    fn subscribe(self: &Arc<Router>, filter: &Filter, live_prefix: &str) -> Option<Begun> {
        let mailbox = Arc::new(Mailbox::new(self.room, &self.memory));
        let feed = Feed { filter: filter.clone(), mailbox: mailbox.clone() };
        // Locked until the feed is known, so that no message comes for an unknown one.
        let mut state = self.state();
        let begin = |filter: &Filter| self.client.subscribe(self.client.new_sid(), format!("{live_prefix}{filter}"));
        let (sid, own, confirmed) = match state.feeds.way_for(filter) {
            Way::Own => {
                let (subscription, confirmed) = begin(filter)?;
                state.feeds.insert(subscription.sid(), feed);
                (subscription.sid(), Some(subscription), confirmed)
            }
            Way::Joined(sid) => {
                let confirmed = self.client.confirm()?;
                state.feeds.join(sid, feed);
                (sid, None, confirmed)
            }
            Way::Wider(wider) => {
                let (subscription, confirmed) = begin(&wider)?;
                let sid = subscription.sid();
                state.feeds.share(wider, feed, subscription);
                (sid, None, confirmed)
            }
        };
        drop(state);
        let subscribed = Subscribed { router: self.clone(), sid, mailbox: mailbox.clone(), _own: own };
        Some((Received::new(mailbox, subscribed), confirmed))
    }

    /// Puts a message into its feed's mailbox, unless it is to be held. A feed that has gone meanwhile needs none.
    fn hand_over(&self, state: &mut State, message: Message) {
        if let Some(held) = &mut state.held {
            return held.keep(message);
        }
        let Some(filter) = state.feeds.filter(message.sid) else { return };
        let hint = message::hint(&message, filter, &self.names, self.known.present());
        if let Hint::Stored { event, epoch, .. } = &hint {
            let this = Newest::of(*epoch, event);
            match &state.newest {
                Some(newest) if newest.contradicts(&this) => {
                    return self.question(state).keep(message);
                }
                Some(newest) if newest.epoch == this.epoch && newest.sequence >= this.sequence => {}
                Some(_) | None => {
                    state.newest = Some(this);
                    self.known.see(*epoch, event);
                }
            }
        }
        state.feeds.hand_over(message.sid, hint);
    }

    /// Asks which incarnation there is, and holds what comes until that is settled.
    fn question<'s>(&self, state: &'s mut State) -> &'s mut Held {
        self.questions.send_modify(|count| *count += 1);
        state.held.get_or_insert_default()
    }

    /// How many questions there have been: the last one is open as long as it has not been settled.
    pub fn questions(&self) -> watch::Receiver<u64> {
        self.questions.subscribe()
    }

    /// The leader was asked after `question` had come up, and what it said is known: whatever was held is of the
    /// present incarnation, or older.
    pub fn settle(&self, question: u64) {
        let mut state = self.state();
        if !state.is_ready || *self.questions.borrow() != question {
            return;
        }
        let Some(held) = state.held.take() else { return };
        state.newest = None;
        if held.are_lost {
            state.feeds.lose();
        }
        for message in held.messages {
            self.hand_over(&mut state, message);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic leaves behind is done away with when its connection is.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handler for Router {
    fn connected(&self) {
        self.state().held = Some(Held::default());
    }

    fn ready(&self) {
        let mut state = self.state();
        state.is_ready = true;
        self.question(&mut state);
    }

    fn message(&self, message: Message) {
        let mut state = self.state();
        match message.sid {
            ADVISORIES => {
                tracing::info!(advisory = %advisory(&message.payload), "the stream changed");
                self.question(&mut state);
            }
            _ => self.hand_over(&mut state, message),
        }
    }

    fn restored(&self) {
        self.question(&mut self.state());
    }

    fn permissions(&self) {
        self.known.set_told(self.client.is_standing_granted(ADVISORIES));
    }

    fn disconnected(&self) {
        let mut state = self.state();
        self.known.set_told(false);
        *state = State { feeds: std::mem::take(&mut state.feeds), ..State::default() };
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

    const ROOM: usize = 3;

    fn router() -> Arc<Router> {
        let settings = crate::config::Config::load(None, vec![]).unwrap().nats;
        let options = Connector::parse(&config::Nats { url: "nats://none".into(), ..settings.clone() }).unwrap();
        let client = Client::new(options.options("test"), vec![]);
        let router = Arc::new(Router::new(
            settings.stream,
            ROOM,
            &Memory::new(0),
            Arc::new(LeaderState::new(&stream(0))),
            client,
        ));
        router.connected();
        router.ready();
        router.settle(1);
        router
    }

    /// Hints on this filter, under the first number.
    fn subscribe(router: &Router, filter: &str) -> Received<()> {
        let (filter, mailbox) = (Filter::parse(filter).unwrap(), Arc::new(Mailbox::new(ROOM, &Memory::new(0))));
        router.state().feeds.insert(1, Feed { filter, mailbox: mailbox.clone() });
        Received::new(mailbox, ())
    }

    /// A stream that was made in this second.
    fn stream(second: u64) -> Info {
        Info::made_at(&format!("2026-01-02T03:04:{second:02}Z"))
    }

    /// An event that was stored in this second, for the first feed.
    fn stored(sequence: u64, second: u64) -> Message {
        let headers = format!(
            "NATS/1.0\r\nNats-Stream: EVENTS\r\nNats-Subject: events.a\r\nNats-Sequence: {sequence}\r\n\
             Nats-Time-Stamp: 2026-01-02T03:04:{second:02}Z\r\nNats-Last-Sequence: 1\r\n\r\n"
        );
        Message { sid: 1, subject: "live.a".into(), headers: headers.into(), payload: "x".into() }
    }

    fn change() -> Message {
        Message { sid: ADVISORIES, subject: "x".into(), headers: "".into(), payload: "{}".into() }
    }

    /// The sequences and incarnations of what has come; `None` for what was lost.
    fn heard(hints: &mut Received<()>) -> Vec<Option<(u64, Epoch)>> {
        let come = std::iter::from_fn(|| hints.next().now_or_never().flatten());
        let told = |hint| match hint {
            Hint::Stored { event, epoch, .. } => Some((event.sequence, epoch)),
            Hint::Lost => None,
        };
        come.map(told).collect()
    }

    fn learn(router: &Router, info: Info) {
        let seen = info.identity().as_seen();
        router.known.learn(router.known.present(), &seen, true, 0).unwrap();
    }

    #[test]
    fn what_comes_behind_word_of_a_change_is_held_until_the_leader_was_asked() {
        let (router, old, new) = (router(), stream(0).bounds.epoch, stream(20).bounds.epoch);
        let mut hints = subscribe(&router, "a");
        router.message(stored(5, 10));
        assert_eq!(heard(&mut hints), [Some((5, old))]);

        // Twice: the stream is deleted, and made.
        router.message(change());
        router.message(stored(6, 11));
        router.message(change());
        router.message(stored(7, 30));
        assert_eq!(*router.questions().borrow(), 3);
        router.settle(2);
        assert_eq!(heard(&mut hints), [], "asked too early");
        learn(&router, stream(20));
        router.settle(3);
        router.message(stored(8, 31));

        assert_eq!(heard(&mut hints), [None, Some((7, new)), Some((8, new))]);
    }

    #[test]
    fn a_stream_that_counts_anew_is_asked_about() {
        let (router, old, new) = (router(), stream(0).bounds.epoch, stream(20).bounds.epoch);
        let mut hints = subscribe(&router, "a");
        for repeated in [5, 5, 4] {
            router.message(stored(repeated, 5 + repeated));
        }
        assert_eq!(heard(&mut hints).len(), 3);
        assert_eq!(*router.questions().borrow(), 1);

        // The clock of another leader is fast.
        router.message(stored(4, 15));
        assert_eq!((heard(&mut hints), *router.questions().borrow()), (vec![], 2));
        router.settle(2);
        assert_eq!(heard(&mut hints), [Some((4, old))]);

        router.message(stored(2, 30));
        router.message(stored(3, 31));
        assert_eq!((heard(&mut hints), *router.questions().borrow()), (vec![], 3));
        learn(&router, stream(20));
        router.settle(3);
        assert_eq!(heard(&mut hints), [Some((2, new)), Some((3, new))]);
    }

    #[test]
    fn on_a_new_connection_hints_are_held_until_the_leader_was_asked_after_it() {
        let (router, old) = (router(), stream(0).bounds.epoch);
        let mut hints = subscribe(&router, "a");
        router.disconnected();
        router.connected();
        router.message(stored(5, 10));
        router.settle(1);
        assert_eq!(heard(&mut hints), [], "word may have been missed");
        router.ready();
        router.settle(2);
        assert_eq!(heard(&mut hints), [Some((5, old))]);
    }

    #[test]
    fn too_much_to_hold_is_lost_and_said_to_be() {
        let router = router();
        let mut hints = subscribe(&router, "a");
        router.message(change());
        let large = Message { payload: vec![0; HELD_BYTES_MAX].into(), ..stored(5, 10) };
        for message in [stored(4, 9), large, stored(6, 11)] {
            router.message(message);
        }
        router.settle(2);
        router.message(stored(7, 12));
        assert_eq!(heard(&mut hints), [None, Some((7, stream(0).bounds.epoch))]);
    }
}
