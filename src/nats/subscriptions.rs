//! The subscriptions of a client, and the commands that its connection has yet to write.
//!
//! SUB, UNSUB and PUB commands are queued here. The connection writes them, and replays all subscriptions after a
//! reconnect. A ping behind a command proves, when its pong comes, that the server has handled the command: there is one
//! ping at a time, for all that wait by then.
//!
//! A server may refuse a subscription, or drop one when permissions change, and says so by one `-ERR`. A refused
//! subscription is asked for again until it is granted: first one alone, so that a server is not told ten thousand times
//! what it refuses, then all others.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::codec;

/// Commands that a server that does not read may leave unwritten; more are turned away.
const OUTGOING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long to wait before a refused subscription is asked for again, and at most.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(8);

pub(super) struct Subscriptions {
    state: Mutex<State>,
    work: Notify,
}

#[derive(Default)]
struct State {
    /// The number of the connection that all this is about.
    connection: u64,
    server: Server,
    /// Subscribed first on each connection, in their order.
    standing: BTreeMap<u64, Box<str>>,
    subjects: HashMap<u64, Box<str>>,
    last_sid: u64,
    outgoing: Vec<u8>,
    /// What waits for the next ping; nothing, where it only asks whether the server is there.
    next_ping: Option<Ping>,
    /// What waits for the pong of the last ping, while it has not come.
    ping: Option<Ping>,
    refused: Refused,
}

#[derive(Default, Clone, Copy, PartialEq, Debug)]
enum Server {
    #[default]
    Away,
    /// It has let the client in.
    Connected,
    /// It has confirmed all subscriptions.
    Ready,
}

#[derive(Default)]
struct Ping {
    waiting: Vec<oneshot::Sender<()>>,
    /// Refused subscriptions that were asked for again before it.
    retried: Vec<u64>,
}

/// What the server does not let the client subscribe to.
#[derive(Default)]
struct Refused {
    /// The subjects of errors that came since the last pong.
    errors: HashSet<Box<str>>,
    /// Subscriptions that the server does not know of, by what was said at the last pong.
    sids: HashSet<u64>,
    retry: Option<(Instant, Duration)>,
}

/// What a pong tells.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Confirmed {
    /// All subscriptions of a new connection have been handled.
    pub ready: bool,
    /// Subscriptions that had been refused are there again: what was published meanwhile is missing.
    pub restored: bool,
}

impl Subscriptions {
    pub fn new(standing: Vec<String>) -> Subscriptions {
        let standing: BTreeMap<_, _> = (0..).zip(standing.into_iter().map(String::into_boxed_str)).collect();
        let last_sid = standing.len() as u64;
        Subscriptions { state: Mutex::new(State { standing, last_sid, ..State::default() }), work: Notify::new() }
    }

    pub fn new_sid(&self) -> u64 {
        let mut state = self.state();
        state.last_sid += 1;
        state.last_sid
    }

    /// Subscribes; resolves once the server has handled it. `None` while there is no server to be told.
    pub fn subscribe(&self, sid: u64, subject: String) -> Option<oneshot::Receiver<()>> {
        let mut state = self.state();
        if state.server == Server::Away || state.outgoing.len() > OUTGOING_BYTES_MAX {
            return None;
        }
        let (sender, confirmed) = oneshot::channel();
        codec::subscribe(&mut state.outgoing, &subject, sid);
        state.next_ping.get_or_insert_default().waiting.push(sender);
        state.subjects.insert(sid, subject.into());
        drop(state);
        self.work.notify_one();
        Some(confirmed)
    }

    /// Resolves once the server has handled what it was told before. `None` while there is no server to be told.
    pub fn confirm(&self) -> Option<oneshot::Receiver<()>> {
        let mut state = self.state();
        if state.server == Server::Away {
            return None;
        }
        let (sender, confirmed) = oneshot::channel();
        state.next_ping.get_or_insert_default().waiting.push(sender);
        drop(state);
        self.work.notify_one();
        Some(confirmed)
    }

    pub fn unsubscribe(&self, sid: u64) {
        let mut state = self.state();
        if state.subjects.remove(&sid).is_some() && state.server != Server::Away {
            codec::unsubscribe(&mut state.outgoing, sid);
            state.refused.sids.remove(&sid);
            self.work.notify_one();
        }
    }

    /// Whether there is a server to be told.
    pub fn publish(&self, subject: &str, reply: &str, payload: &[u8]) -> bool {
        let mut state = self.state();
        let is_possible = state.server == Server::Ready && state.outgoing.len() <= OUTGOING_BYTES_MAX;
        if is_possible {
            codec::publish(&mut state.outgoing, subject, reply, payload);
            self.work.notify_one();
        }
        is_possible
    }

    /// Connection number `connection` is the one that counts from now on.
    pub fn begin(&self, connection: u64) {
        let mut state = self.state();
        state.away();
        state.connection = connection;
    }

    /// A server has let the client in that knows of no subscription.
    pub fn connected(&self, connection: u64) {
        let mut state = self.state();
        if state.connection != connection {
            return;
        }
        let State { server, standing, subjects, outgoing, next_ping, refused, .. } = &mut *state;
        *server = Server::Connected;
        standing.iter().chain(&*subjects).for_each(|(sid, subject)| codec::subscribe(outgoing, subject, *sid));
        *next_ping = Some(Ping::default());
        *refused = Refused::default();
        self.work.notify_one();
    }

    /// The server is gone, and with it what it was to be told. What waits for it is turned away.
    pub fn disconnected(&self, connection: u64) {
        let mut state = self.state();
        if state.connection == connection {
            state.away();
        }
    }

    pub fn is_ready(&self) -> bool {
        self.state().server == Server::Ready
    }

    /// Asks whether the server is there, and asks again for what it has refused, if it is time.
    pub fn ping(&self) {
        let mut state = self.state();
        let State { standing, subjects, outgoing, next_ping, refused, .. } = &mut *state;
        let ping = next_ping.get_or_insert_default();
        if let Some((at, pause)) = refused.retry
            && at <= Instant::now()
        {
            refused.retry = Some((Instant::now() + pause, (2 * pause).min(RETRY_MAX)));
            let subject = |sid: &u64| standing.get(sid).or(subjects.get(sid));
            // Any of them: the one that is taken is likely to be another one next time.
            let probed = refused.sids.iter().find_map(|sid| Some((*sid, subject(sid)?)));
            if let Some((sid, subject)) = probed {
                codec::subscribe(outgoing, subject, sid);
                ping.retried.push(sid);
            }
        }
        self.work.notify_one();
    }

    pub fn answer_ping(&self) {
        self.state().outgoing.extend_from_slice(codec::PONG);
        self.work.notify_one();
    }

    /// Takes note of what the server complains of. Says whether it is a subscription.
    pub fn error(&self, text: &str) -> bool {
        let Some(subject) = refused_subject(text) else { return false };
        self.state().refused.errors.insert(subject.into());
        // Which subscriptions that were, the next pong settles.
        self.ping();
        true
    }

    /// The server has handled everything that was written before the last ping.
    pub fn ponged(&self) -> Confirmed {
        let mut state = self.state();
        let ping = state.ping.take().unwrap_or_default();
        for waiting in ping.waiting {
            // A caller that has gone needs no answer.
            let _ = waiting.send(());
        }
        if state.next_ping.is_some() {
            self.work.notify_one();
        }
        let restored = state.settle_refused(&ping.retried);
        let ready = state.server == Server::Connected;
        if ready {
            state.server = Server::Ready;
        }
        Confirmed { ready, restored }
    }

    /// A subject that the server does not let the client subscribe to, if there is one.
    pub fn refused(&self) -> Option<String> {
        let state = self.state();
        let sid = state.refused.sids.iter().min()?;
        state.standing.get(sid).or(state.subjects.get(sid)).map(|subject| subject.to_string())
    }

    /// Whether the server lets the client subscribe to a standing subject.
    pub fn is_standing_granted(&self, sid: u64) -> bool {
        let state = self.state();
        state.server == Server::Ready && !state.refused.sids.contains(&sid)
    }

    /// Waits until there is something to write.
    pub async fn work(&self) {
        self.work.notified().await;
    }

    /// Everything that is to be written now.
    pub fn outgoing(&self) -> Vec<u8> {
        let mut state = self.state();
        let mut outgoing = std::mem::take(&mut state.outgoing);
        if state.ping.is_none()
            && let Some(ping) = state.next_ping.take()
        {
            outgoing.extend_from_slice(codec::PING);
            state.ping = Some(ping);
        }
        outgoing
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic leaves behind is done away with when its connection is.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn away(&mut self) {
        let State { connection, standing, subjects, last_sid, .. } = std::mem::take(self);
        *self = State { connection, standing, subjects, last_sid, ..State::default() };
    }

    /// Holds errors that came before a pong against the subscriptions. Says whether some are granted again.
    fn settle_refused(&mut self, retried: &[u64]) -> bool {
        let errors = std::mem::take(&mut self.refused.errors);
        if !errors.is_empty() {
            let known = self.standing.iter().chain(&self.subjects);
            self.refused.sids.extend(known.filter(|(_, subject)| errors.contains(*subject)).map(|(sid, _)| *sid));
            self.refused.retry.get_or_insert((Instant::now() + RETRY, RETRY));
        }
        let is_granted = |sid: &u64| {
            self.standing.get(sid).or(self.subjects.get(sid)).is_some_and(|subject| !errors.contains(subject))
        };
        let granted: Vec<_> = retried.iter().filter(|sid| is_granted(sid)).copied().collect();
        let was_probe = !granted.is_empty() && retried.len() == 1;
        for sid in &granted {
            self.refused.sids.remove(sid);
        }
        if self.refused.sids.is_empty() {
            self.refused.retry = None;
        } else if was_probe {
            // The others may be granted as well.
            let State { standing, subjects, outgoing, next_ping, refused, .. } = self;
            let ping = next_ping.get_or_insert_default();
            for sid in &refused.sids {
                if let Some(subject) = standing.get(sid).or(subjects.get(sid)) {
                    codec::subscribe(outgoing, subject, *sid);
                    ping.retried.push(*sid);
                }
            }
        }
        !granted.is_empty()
    }
}

/// The subject in `Permissions Violation for Subscription to "a.b"`, and the like of it.
fn refused_subject(text: &str) -> Option<&str> {
    const BEFORE: &str = "permissions violation for subscription to \"";
    let at = text.to_ascii_lowercase().find(BEFORE)? + BEFORE.len();
    text[at..].split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Subscriptions {
        let subscriptions = Subscriptions::new(vec!["s".into()]);
        subscriptions.connected(0);
        assert_eq!(written(&subscriptions), "SUB s 0\r\nPING\r\n");
        assert_eq!(subscriptions.ponged(), Confirmed { ready: true, restored: false });
        subscriptions
    }

    fn subscribe(subscriptions: &Subscriptions, subject: &str) -> Option<(u64, oneshot::Receiver<()>)> {
        let sid = subscriptions.new_sid();
        Some((sid, subscriptions.subscribe(sid, subject.into())?))
    }

    fn written(subscriptions: &Subscriptions) -> String {
        String::from_utf8(subscriptions.outgoing()).unwrap()
    }

    #[test]
    fn one_ping_at_a_time_is_for_everyone_who_waits_by_then() {
        let subscriptions = ready();
        let [(_, mut first), (_, mut second)] = ["a", "b"].map(|subject| subscribe(&subscriptions, subject).unwrap());
        assert_eq!(written(&subscriptions), "SUB a 2\r\nSUB b 3\r\nPING\r\n");
        let (_, mut third) = subscribe(&subscriptions, "c").unwrap();
        assert_eq!(written(&subscriptions), "SUB c 4\r\n");

        subscriptions.ponged();
        assert!(first.try_recv().is_ok() && second.try_recv().is_ok() && third.try_recv().is_err());
        assert_eq!(written(&subscriptions), "PING\r\n");
        subscriptions.ponged();
        assert!(third.try_recv().is_ok());
    }

    #[test]
    fn a_new_server_is_told_of_all_subscriptions_that_are_left() {
        let subscriptions = ready();
        let [(one, _), (other, waits)] = ["a", "b"].map(|subject| subscribe(&subscriptions, subject).unwrap());

        subscriptions.disconnected(7);
        assert!(subscriptions.is_ready(), "another connection is gone");
        subscriptions.disconnected(0);
        subscriptions.unsubscribe(one);
        assert!(subscribe(&subscriptions, "c").is_none() && !subscriptions.is_ready());
        assert!(!subscriptions.publish("a", "b", b""));
        assert!(waits.blocking_recv().is_err(), "the server that it waits for is gone");
        subscriptions.connected(0);

        assert_eq!(written(&subscriptions), format!("SUB s 0\r\nSUB b {other}\r\nPING\r\n"));
        assert!(!subscriptions.is_ready());
        subscriptions.ponged();
        assert!(subscriptions.is_ready() && subscriptions.publish("a", "b", b"xy"));
        subscriptions.unsubscribe(other);
        assert_eq!(written(&subscriptions), format!("PUB a b 2\r\nxy\r\nUNSUB {other}\r\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_server_refuses_is_asked_for_again_until_it_is_granted() {
        let subscriptions = ready();
        let sids = ["a", "b", "c"].map(|subject| subscribe(&subscriptions, subject).unwrap().0);
        written(&subscriptions);
        subscriptions.ponged();
        assert_eq!(subscriptions.refused(), None);

        for subject in ["a", "b", "s"] {
            assert!(
                subscriptions.error(&format!("Permissions Violation for Subscription to \"{subject}\" (sid \"2\")"))
            );
        }
        assert!(!subscriptions.error("Permissions Violation for Publish to \"a\""));
        written(&subscriptions);
        assert_eq!(subscriptions.ponged(), Confirmed::default());
        assert!(subscriptions.refused().is_some() && !subscriptions.is_standing_granted(0));

        // One is asked for again, in vain, and then later.
        tokio::time::advance(RETRY).await;
        subscriptions.ping();
        let retried = written(&subscriptions);
        assert_eq!((retried.matches("SUB").count(), retried.matches("PING").count()), (1, 1), "{retried}");
        let subject = retried.split(' ').nth(1).unwrap();
        subscriptions.error(&format!("Permissions Violation for Subscription to \"{subject}\""));
        assert_eq!(subscriptions.ponged(), Confirmed::default());
        written(&subscriptions);
        subscriptions.ponged();
        subscriptions.ping();
        assert_eq!(written(&subscriptions), "PING\r\n");
        subscriptions.ponged();

        // One is granted, and then all.
        tokio::time::advance(RETRY).await;
        subscriptions.ping();
        assert_eq!(written(&subscriptions).matches("SUB").count(), 1);
        assert_eq!(subscriptions.ponged(), Confirmed { ready: false, restored: true });
        let others = written(&subscriptions);
        assert_eq!(others.matches("SUB").count(), 2, "{others}");
        assert!(!others.contains(&format!("SUB c {}", sids[2])), "it was never refused");
        assert_eq!(subscriptions.ponged(), Confirmed { ready: false, restored: true });
        assert_eq!(subscriptions.refused(), None);
        assert!(subscriptions.is_standing_granted(0));
    }
}
