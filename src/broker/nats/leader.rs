//! Requests to the stream's leader, whose word is final: what the stream is, what it holds, what comes next. Raw JSON,
//! so that settings that this gateway does not know survive when it mends others.
//!
//! A leader that stood still while another was elected answers for a moment as if it still were it. Its word is not
//! taken: a leader is believed for as long as no other can have been elected since its followers heard from it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    api::{Api, RequestError, code},
    coalesce::Coalesced,
    epoch::{AtAnchor, Finding, Identity, Seen},
    message::Stored,
    requirements::Mismatch,
};
use crate::{
    broker::{Bounds, Recognition, Stock},
    event::{Epoch, Event},
    position::Witness,
};

/// An answer that takes longer may be of a stream that was made anew meanwhile. (Making one takes longer than this.)
const SLOW: Duration = Duration::from_millis(50);
/// While a cluster makes a stream, and while it elects a leader, questions about it are not answered: they are asked again after this
/// time, or after several times what the last answer took.
const INFO_SILENCE: Duration = Duration::from_secs(1);
const ROUND_TRIPS: u32 = 4;
/// How long it is said that a mirror answers, after it did last.
const MIRROR_REMEMBERED: Duration = Duration::from_secs(60);
/// What to do about a mirror that answers in the stream's place.
pub(super) const MIRROR_MEND: &str =
    "reads take longer; switch its mirror_direct off (nats stream edit), or mirror from another account";
/// How long a follower waits for word from its leader, at least, before it has another one elected (server/raft.go).
const ELECTION: Duration = Duration::from_secs(4);
/// A leader that has contacted its followers within this time is not about to be deposed; and a follower that has answered
/// within this time knows its leader. (A leader that stood still, or was cut off, does not notice at once that it
/// has been deposed, and answers as if it had not been.)
const FRESH: Duration = Duration::from_secs(2);
/// After how long a leader is asked again that may have been deposed: it soon knows.
const DEPOSED_PAUSE: Duration = Duration::from_millis(100);

/// The clocks of a cluster's servers are not further apart: what is stored by one after another was leader for longer than
/// this has a later time.
const CLOCKS_APART: Duration = Duration::from_secs(10);
/// A leader that knows of less than is proven, for so long, has lost it. (One that was just elected may have yet to apply it.)
const BEHIND: Duration = Duration::from_secs(3);

/// What the stream's leader says of the stream.
#[derive(Debug)]
pub(super) struct Info {
    pub bounds: Bounds,
    pub created: Timestamp,
    pub config: Value,
    messages: u64,
    bytes: u64,
    /// No replica can take itself for the leader but the one that said this.
    is_undisputed: bool,
}

impl Info {
    pub fn identity(&self) -> Identity {
        Identity::new(self.created, self.bounds.last, self.bounds.time)
    }

    /// How many messages after the first are gone.
    pub fn gone_singly(&self) -> u64 {
        (self.bounds.last + 1).saturating_sub(self.bounds.first).saturating_sub(self.messages)
    }

    pub fn stock(&self) -> Stock {
        // A stream that refuses what is too much drops nothing. Without a limit, these are -1.
        let drops = self.config["discard"] != "new";
        let limit = |name: &str| self.config[name].as_u64().filter(|_| drops);
        Stock { events: self.messages, bytes: self.bytes, events_max: limit("max_msgs"), bytes_max: limit("max_bytes") }
    }

    fn seen(&self) -> Seen {
        let Bounds { last, time, .. } = self.bounds;
        Seen { created: self.created, last, last_time: time, at_anchor: AtAnchor::Unasked }
    }

    /// Of a stream that was made then and keeps nothing.
    #[cfg(test)]
    pub fn made_at(created: &str) -> Info {
        let state = json!({ "messages": 0, "first_seq": 0, "last_seq": 0 });
        let (bounds, created) = bounds(json!({ "created": created, "state": state })).unwrap();
        Info { bounds, created, config: json!({}), messages: 0, bytes: 0, is_undisputed: true }
    }
}

/// The stream's leader. Cheap to clone.
#[derive(Clone)]
pub(super) struct Leader(Arc<Shared>);

struct Shared {
    api: Api,
    stream: String,
    info: Coalesced<Result<Arc<Info>, RequestError>>,
    known: Arc<LeaderState>,
}

/// When a request was sent, and what was known then.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    at: Instant,
    known: Identity,
}

/// The last answer of the leader.
pub(super) struct LeaderState {
    present: Mutex<Identity>,
    /// Since when the leader has known of less than is proven.
    behind: Mutex<Option<Instant>>,
    /// Why the last question about the stream failed, if it did.
    trouble: Mutex<Option<String>>,
    /// What is wrong with the stream's settings, if anything is.
    mismatch: Mutex<Option<String>>,
    pub resyncs: watch::Sender<u64>,
    /// Whether word of changes would be heard.
    is_told: AtomicBool,
    /// How often the stream was said to have changed, or may have been said to.
    changes: AtomicU64,
    /// The value of `changes` when the STREAM.INFO request behind `present` was sent.
    present_as_of: AtomicU64,
    /// When the last question was sent, if its answer was undisputed.
    undisputed: Mutex<Option<Instant>>,
    round_trip_micros: AtomicU64,
    /// How long an answer about the stream is waited for, in milliseconds.
    silence_millis: AtomicU64,
    /// The mirror that answered last in the stream's place, and when.
    mirror: Mutex<Option<(String, Instant)>>,
}

impl LeaderState {
    pub fn new(info: &Info) -> LeaderState {
        LeaderState {
            present: Mutex::new(info.identity()),
            behind: Mutex::new(None),
            trouble: Mutex::new(None),
            mismatch: Mutex::new(None),
            resyncs: watch::Sender::new(0),
            is_told: AtomicBool::new(false),
            changes: AtomicU64::new(0),
            present_as_of: AtomicU64::new(0),
            undisputed: Mutex::new(None),
            round_trip_micros: AtomicU64::new(0),
            silence_millis: AtomicU64::new(INFO_SILENCE.as_millis() as u64),
            mirror: Mutex::new(None),
        }
    }

    /// Says that live hints may have been lost.
    pub fn resync(&self) {
        self.resyncs.send_modify(|count| *count += 1);
    }

    /// Says that the stream changed, or may have, and may be another one.
    pub fn change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.resync();
    }

    /// Says whether word of changes is heard from now on.
    pub fn set_told(&self, is_told: bool) {
        self.is_told.store(is_told, Ordering::Release);
    }

    /// The incarnation of the stream that the last answer told of.
    pub fn present(&self) -> Identity {
        *self.lock_present()
    }

    /// Takes note of a mirror of the stream that answered in its place, and logs it once.
    pub fn saw_mirror(&self, name: &str) {
        let mut mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        if mirror.as_ref().is_none_or(|(known, _)| known != name) {
            tracing::warn!(mirror = name, "ignored a reply of a mirror of the stream: {MIRROR_MEND}");
        }
        *mirror = Some((name.to_owned(), Instant::now()));
    }

    /// The mirror that has answered lately in the stream's place.
    pub fn mirror(&self) -> Option<String> {
        let mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        mirror.as_ref().filter(|(_, at)| at.elapsed() < MIRROR_REMEMBERED).map(|(name, _)| name.clone())
    }

    /// How long an answer about the stream is waited for: longer, where servers are far away.
    fn silence(&self) -> Duration {
        Duration::from_millis(self.silence_millis.load(Ordering::Relaxed))
    }

    fn set_silence(&self, silence: Duration) {
        self.silence_millis.store(silence.max(INFO_SILENCE).as_millis() as u64, Ordering::Relaxed);
    }

    /// What the last question about the stream took.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_micros.load(Ordering::Relaxed))
    }

    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn mismatch(&self) -> Option<String> {
        self.mismatch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of what does not fit (any more), and logs it once.
    pub fn judge(&self, mismatches: &[Mismatch]) {
        let now =
            (!mismatches.is_empty()).then(|| mismatches.iter().map(Mismatch::to_string).collect::<Vec<_>>().join("; "));
        let mut mismatch = self.mismatch.lock().unwrap_or_else(PoisonError::into_inner);
        if *mismatch != now {
            match &now {
                Some(now) => {
                    tracing::error!(mismatch = %now, "the stream configuration no longer meets the requirements")
                }
                None => tracing::info!("the stream configuration meets the requirements again"),
            }
            *mismatch = now;
        }
    }

    /// Takes over what the leader says, which was asked when `before` was known and this many changes had been told of.
    ///
    /// # Errors
    /// When that can't be judged yet.
    pub fn learn(
        &self,
        mut before: Identity,
        seen: &Seen,
        is_undisputed: bool,
        as_of: u64,
    ) -> Result<(), RequestError> {
        let is_behind = before.is_ahead_of(seen);
        {
            let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
            match is_behind {
                true if !is_undisputed || behind.get_or_insert_with(Instant::now).elapsed() < BEHIND => {
                    return Err(RequestError::Behind);
                }
                true | false => *behind = None,
            }
        }
        let finding = before.learn(seen);
        let mut present = self.lock_present();
        match finding {
            // What was stored meanwhile counts.
            Finding::Same if present.epoch == before.epoch => before.keep_newest_of(&present),
            Finding::Same => {}
            Finding::Recreated | Finding::Rewound => {}
        }
        *present = before;
        drop(present);
        self.present_as_of.store(as_of, Ordering::Release);
        match finding {
            Finding::Same => {}
            Finding::Recreated => tracing::warn!(epoch = %before.epoch, "the stream was recreated"),
            Finding::Rewound => tracing::warn!(
                last = seen.last,
                "the stream lost its newest messages; its sequences begin again at an earlier number"
            ),
        }
        if finding != Finding::Same {
            self.resync();
        }
        Ok(())
    }

    fn note(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Whether the stream may have changed without notice since the last answer.
    fn is_doubtful(&self) -> bool {
        let is_settled = self.present_as_of.load(Ordering::Acquire) == self.changes.load(Ordering::Acquire);
        !is_settled || !self.is_told.load(Ordering::Acquire)
    }

    /// Takes note of an event that came live.
    pub fn see(&self, epoch: Epoch, event: &Event) {
        self.lock_present().see(epoch, event.sequence, event.time);
    }

    /// Takes note of an event that was stored.
    fn reach(&self, epoch: Epoch, sequence: u64) {
        self.lock_present().reach(epoch, sequence);
    }

    fn lock_undisputed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.undisputed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_present(&self) -> MutexGuard<'_, Identity> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leader {
    /// Of a stream that is known to be there, in this state.
    pub fn new(api: Api, stream: String, info: &Info) -> Leader {
        let known = Arc::new(LeaderState::new(info));
        let info = Coalesced::start({
            let (api, stream, known) = (api.clone(), stream.clone(), known.clone());
            move || {
                let (api, stream, known) = (api.clone(), stream.clone(), known.clone());
                async move {
                    let asked = Instant::now();
                    let answer = ask_and_learn(&api, &stream, &known).await.map(Arc::new);
                    known.note(answer.as_ref().err().map(RequestError::to_string));
                    let is_undisputed = answer.as_ref().is_ok_and(|info| info.is_undisputed);
                    *known.lock_undisputed() = is_undisputed.then_some(asked);
                    answer
                }
            }
        });
        Leader(Arc::new(Shared { api, stream, info, known }))
    }

    /// The stream as it is now: asked after this call began, though perhaps together with others.
    ///
    /// Requests of one connection are handled in order. So this is also the round trip that proves that the server has
    /// seen all that was sent before.
    pub async fn info(&self) -> Result<Arc<Info>, RequestError> {
        let join = || async { self.0.info.get().await.unwrap_or(Err(RequestError::NotConnected)) };
        insist(self.0.api.timeout, join).await
    }

    /// The stored message that `query` finds, if there is one.
    ///
    /// # Errors
    /// [`RequestError::Deposed`] if there is none where it was looked for, and that may not have been the leader. (What
    /// a former leader finds is there, and nothing that matches lies before it.)
    pub async fn get(&self, query: Value) -> Result<Option<Stored>, RequestError> {
        let subject = format!("$JS.API.STREAM.MSG.GET.{}", self.0.stream);
        for is_last_try in [false, true] {
            let undisputed = *self.0.known.lock_undisputed();
            match self.0.api.ask(&subject, &query).await {
                Ok(mut answer) => {
                    return serde_json::from_value(answer["message"].take())
                        .map(Some)
                        .map_err(|error| RequestError::Garbled(format!("a stored message: {error}")));
                }
                Err(RequestError::Refused(refusal)) if refusal.err_code == code::NO_MESSAGE => {
                    if undisputed.is_some_and(|asked| asked.elapsed() < ELECTION - FRESH) {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
            if !is_last_try {
                self.info().await?;
            }
        }
        Err(RequestError::Deposed)
    }

    /// The first stored message on `filter` at `sequence` or after.
    pub async fn next(&self, sequence: u64, filter: &str) -> Result<Option<Stored>, RequestError> {
        self.get(json!({ "seq": sequence, "next_by_subj": filter })).await
    }

    /// Whether the stream is the one in which that event was stored, as far as can be told. If the event is gone, what was
    /// stored later tells: it comes after it.
    pub async fn recognize(&self, witness: Witness) -> Result<Recognition, RequestError> {
        // Shared with all that ask at the time.
        if self.info().await?.bounds.last < witness.sequence {
            return Ok(Recognition::Beyond);
        }
        let judge = |is_same: bool| if is_same { Recognition::Same } else { Recognition::Another };
        if let Some(stored) = self.get(json!({ "seq": witness.sequence })).await? {
            let time = stored.time().ok_or_else(|| RequestError::Garbled("a message without a time".into()))?;
            return Ok(judge(witness.is_of(time)));
        }
        let Ok(later) = witness.time().checked_add(CLOCKS_APART) else { return Ok(Recognition::Same) };
        let later = json!({ "start_time": later.to_string(), "next_by_subj": ">" });
        Ok(judge(self.get(later).await?.is_none_or(|found| found.sequence > witness.sequence)))
    }

    /// See [`LeaderState::present`].
    pub fn epoch(&self) -> Epoch {
        self.0.known.present().epoch
    }

    /// To be taken before a request is sent whose answer does not say of which incarnation it is.
    pub fn sending(&self) -> Sent {
        Sent { at: Instant::now(), known: self.0.known.present() }
    }

    /// The epoch of the stream that sent this reply, or `None` if the stream may have been recreated in between. Asks the leader
    /// unless advisories are subscribed, no change is pending, and the reply took less than [`SLOW`].
    pub async fn epoch_of_reply(&self, sending: Sent) -> Option<Epoch> {
        match !self.0.known.is_doubtful() && sending.at.elapsed() < SLOW {
            true => (self.epoch() == sending.known.epoch).then_some(sending.known.epoch),
            false => self.ask_leader(sending).await,
        }
    }

    /// The same for a request that stored an event, with this sequence. The word of a change can come late in a cluster,
    /// or not at all: a stream that counts anew is another one.
    pub async fn epoch_of_ack(&self, sending: Sent, sequence: u64) -> Option<Epoch> {
        let epoch = match sequence > sending.known.last {
            true => self.epoch_of_reply(sending).await?,
            false => self.ask_leader(sending).await?,
        };
        self.0.known.reach(epoch, sequence);
        Some(epoch)
    }

    async fn ask_leader(&self, sending: Sent) -> Option<Epoch> {
        // Boxed: few answers need it, and all would make room for it.
        let now = Box::pin(self.info()).await.ok()?.bounds.epoch;
        (now == sending.known.epoch).then_some(now)
    }

    pub fn known(&self) -> &Arc<LeaderState> {
        &self.0.known
    }
}

/// The same as [`Leader::info`], without sharing the request.
pub(super) async fn info_of(api: &Api, stream: &str) -> Result<Info, RequestError> {
    let tries = AtomicU64::new(0);
    let ask = || {
        let longer = 1 << tries.fetch_add(1, Ordering::Relaxed).min(4);
        ask_for_info(api, stream, INFO_SILENCE * longer)
    };
    insist(api.timeout, ask).await
}

/// Asks again until an undisputed leader answers, for about as long as a request may take.
async fn insist<T, F>(limit: Duration, ask: impl Fn() -> F) -> Result<T, RequestError>
where
    F: Future<Output = Result<T, RequestError>>,
{
    let until = Instant::now() + limit;
    loop {
        match ask().await {
            Err(RequestError::Silent(_)) if Instant::now() < until => {}
            Err(RequestError::Deposed | RequestError::Behind) if Instant::now() < until => {
                tokio::time::sleep(DEPOSED_PAUSE).await
            }
            answer => return answer,
        }
    }
}

/// Asks the leader what the stream is, and which incarnation that is by what is known.
async fn ask_and_learn(api: &Api, stream: &str, known: &LeaderState) -> Result<Info, RequestError> {
    let (before, as_of, asked) = (known.present(), known.changes.load(Ordering::Acquire), Instant::now());
    let mut info = match ask_for_info(api, stream, known.silence()).await {
        Err(error @ RequestError::Silent(_)) => {
            known.set_silence((known.silence() * 2).min(api.timeout));
            return Err(error);
        }
        info => info?,
    };
    known.set_silence(ROUND_TRIPS * asked.elapsed());
    known.round_trip_micros.store(asked.elapsed().as_micros() as u64, Ordering::Relaxed);
    let mut seen = info.seen();
    if let Some(sequence) = before.sequence_to_check(&seen, known.is_doubtful()) {
        let body = json!({ "seq": sequence });
        seen.at_anchor = match api.ask(&format!("$JS.API.STREAM.MSG.GET.{stream}"), &body).await {
            Ok(answer) => {
                let time = answer["message"]["time"].as_str().and_then(|time| time.parse().ok());
                AtAnchor::Stored(time.ok_or_else(|| RequestError::Garbled("a message without a time".into()))?)
            }
            Err(RequestError::Refused(refusal)) if refusal.err_code == code::NO_MESSAGE => AtAnchor::Nothing,
            Err(error) => return Err(error),
        };
    }
    known.learn(before, &seen, info.is_undisputed, as_of)?;
    info.bounds.epoch = known.present().epoch;
    Ok(info)
}

async fn ask_for_info(api: &Api, stream: &str, silence: Duration) -> Result<Info, RequestError> {
    let limit = api.timeout.min(silence);
    let mut answer = api.ask_within(limit, &format!("$JS.API.STREAM.INFO.{stream}"), &Value::Null).await?;
    let config = answer["config"].take();
    let standing = standing(&answer["cluster"]["replicas"]);
    let [messages, bytes] = ["messages", "bytes"].map(|name| answer["state"][name].as_u64().unwrap_or_default());
    let (bounds, created) = bounds(answer)?;
    match standing {
        Standing::Deposed => Err(RequestError::Deposed),
        standing => {
            let is_undisputed = standing == Standing::Undisputed;
            Ok(Info { bounds, created, config, messages, bytes, is_undisputed })
        }
    }
}

/// How certain it is that a reply comes from the stream's leader.
#[derive(Debug, PartialEq)]
enum Standing {
    Undisputed,
    /// It is the leader, but another replica may not know.
    Leader,
    /// Others may have elected another leader.
    Deposed,
}

/// Judges by when it heard from the others last.
fn standing(replicas: &Value) -> Standing {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Replica {
        /// Nanoseconds since it was heard from.
        active: u64,
        /// It has no connection to the rest of the cluster.
        offline: bool,
    }
    // There are none beside a stream with one replica, nor where there is no cluster.
    let replicas: Vec<Replica> = Deserialize::deserialize(replicas).unwrap_or_default();
    let is_fresh = |replica: &&Replica| !replica.offline && Duration::from_nanos(replica.active) <= FRESH;
    let fresh = replicas.iter().filter(is_fresh).count();
    let offline = replicas.iter().filter(|replica| replica.offline).count();
    match replicas.len() {
        others if fresh + offline == others && 2 * fresh >= others => Standing::Undisputed,
        others if 2 * fresh >= others => Standing::Leader,
        _ => Standing::Deposed,
    }
}

/// What the stream holds, and when it was made.
fn bounds(answer: Value) -> Result<(Bounds, Timestamp), RequestError> {
    #[derive(Deserialize)]
    struct Answer {
        created: String,
        state: State,
    }
    #[derive(Deserialize)]
    struct State {
        messages: u64,
        first_seq: u64,
        last_seq: u64,
        #[serde(default)]
        last_ts: String,
    }
    let Answer { created, state } = serde_json::from_value(answer)
        .map_err(|error| RequestError::Garbled(format!("the stream's state: {error}")))?;
    let created: Timestamp =
        created.parse().map_err(|error| RequestError::Garbled(format!("the stream's time of creation: {error}")))?;
    let first = if state.messages == 0 { state.last_seq.saturating_add(1) } else { state.first_seq.max(1) };
    let epoch = Epoch::from_seed(created.as_nanosecond() as u64);
    // A stream that has never kept anything tells of the year 1.
    let time = state.last_ts.parse().ok().filter(|time| *time > Timestamp::UNIX_EPOCH && state.last_seq > 0);
    Ok((Bounds { epoch, first, last: state.last_seq, time }, created))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_whom_no_majority_has_answered_may_have_been_deposed() {
        let (fresh, stale) = (json!({ "active": 1_900_000_000 }), json!({ "active": 2_100_000_000_u64 }));
        let offline = json!({ "active": 5_000_000, "offline": true });
        for (replicas, wanted) in [
            (json!(null), Standing::Undisputed),
            (json!([fresh, fresh]), Standing::Undisputed),
            (json!([fresh, offline]), Standing::Undisputed),
            (json!([fresh, stale]), Standing::Leader),
            (json!([fresh, fresh, stale, stale]), Standing::Leader),
            (json!([stale, stale]), Standing::Deposed),
            (json!([stale, offline]), Standing::Deposed),
            (json!([offline, offline]), Standing::Deposed),
            (json!([fresh, stale, offline, offline]), Standing::Deposed),
        ] {
            assert_eq!(standing(&replicas), wanted, "{replicas}");
        }
    }

    #[test]
    fn a_stream_that_keeps_nothing_begins_after_its_last() {
        for (messages, first_seq, last_seq, first) in [(0, 0, 0, 1), (0, 8, 7, 8), (0, 1, 7, 8), (2, 6, 7, 6)] {
            let state = json!({ "messages": messages, "first_seq": first_seq, "last_seq": last_seq });
            let answer = json!({ "created": "2026-01-02T03:04:05.000000001Z", "state": state });
            let (bounds, _) = bounds(answer).unwrap();
            assert_eq!((bounds.first, bounds.last), (first, last_seq));
        }
    }
}
