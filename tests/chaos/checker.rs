//! Holds what a client saw against what is known: each acknowledged event once, in order, or named in a gap.
//!
//! A client's *place* is the last id that it was given: for each of its filters, a sequence. Whatever moves the place
//! says that every event in between that matches was delivered; so an acknowledged one that was not is lost, unless it
//! was taken out on purpose before the client was told: its time to live was over, or its subject was purged. (A purge of
//! the whole stream, its limits, and its deletion excuse nothing: they must be told, as gaps.)
//!
//! A client that wants a part is owed that part: what passes its sieve; of each subject the last of an interval, whatever it is that
//! came before.
//!
//! What it can't see: a TTL or a purge of one subject excuses what was lost before it, where the client was told after.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    time::Duration,
};

use tidegate::{
    event::{Epoch, EventId},
    position::{Position, Tag},
    subject::{Filter, Subject},
};

use crate::{
    clients::Wants,
    ledger::{Moment, Outcome, Token, Truth},
};

/// How much later than it happens it may be noted that something was dropped.
const NOTED: Duration = Duration::from_secs(1);

/// What one client saw, in the order in which it saw it.
#[derive(Clone, Debug)]
pub struct Log {
    pub name: String,
    /// None of them covers another.
    pub filters: Vec<Filter>,
    pub wants: Wants,
    pub begins: Begins,
    pub entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    Now,
    First,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub at: Moment,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    /// A stream was opened, with this `Last-Event-ID`.
    Opened {
        last_event_id: Option<Position>,
        by: &'static str,
    },
    Position(Position),
    Event(Position, Token),
    Gap {
        requested: String,
        resumed: Position,
        reason: String,
    },
    Ended,
    /// Something that no client should see.
    Nonsense(String),
}

/// A promise that was not kept, and the entry that shows it.
#[derive(Clone, Debug)]
pub struct Violation {
    pub entry: usize,
    pub what: String,
}

/// What is known, arranged to be searched.
pub struct Checker<'t> {
    truth: &'t Truth,
    stored: HashMap<Epoch, Vec<(u64, Token)>>,
    /// The events that a sequence was seen to be, by the client that saw it first.
    seen: HashMap<EventId, Token>,
    /// The sequence of an event, and when somebody first said so.
    placed: HashMap<(Epoch, Token), (u64, Moment)>,
}

impl<'t> Checker<'t> {
    pub fn new(truth: &'t Truth) -> Checker<'t> {
        let stored = truth.stored();
        let (mut seen, mut placed) = (HashMap::new(), HashMap::new());
        for (epoch, events) in &stored {
            for (sequence, token) in events {
                seen.insert(EventId { epoch: *epoch, sequence: *sequence }, *token);
                placed.insert((*epoch, *token), (*sequence, truth.publications[*token].settled));
            }
        }
        Checker { truth, stored, seen, placed }
    }

    /// Acknowledgements that can't all be true.
    pub fn contradictions(&self) -> Vec<String> {
        let events = self.stored.iter().flat_map(|(epoch, events)| events.windows(2).map(move |pair| (epoch, pair)));
        let twice = events.filter(|(_, pair)| pair[0].0 == pair[1].0);
        twice.map(|(epoch, pair)| format!("{epoch}-{} was given to two events: {pair:?}", pair[0].0)).collect()
    }

    /// Everything that is wrong with what a client saw. `complete`: it was waited for, so it must have seen all.
    pub fn judge(&mut self, log: &Log, complete: bool) -> Vec<Violation> {
        let tags = log.filters.iter().map(Tag::of).collect();
        let (delivered, named) = (HashSet::new(), vec![]);
        let last = self.last_of_each(log.wants);
        let mut case = Case { checker: self, log, tags, place: None, delivered, named, last, entry: 0, found: vec![] };
        for (number, entry) in log.entries.iter().enumerate() {
            case.entry = number;
            case.consider(entry);
        }
        if complete {
            case.end();
        }
        case.found
    }

    /// Where a client wants the last event of each subject in an interval: the last one of all, of what it wants.
    fn last_of_each(&self, wants: Wants) -> HashMap<(Epoch, Subject), u64> {
        let mut last = HashMap::new();
        if wants.every.is_some() {
            for (id, token) in self.seen.iter().filter(|(_, token)| wants.passes(**token)) {
                let Some(publication) = self.truth.publications.get(*token) else { continue };
                let known = last.entry((id.epoch, publication.subject.clone())).or_insert(0);
                *known = id.sequence.max(*known);
            }
        }
        last
    }

    /// The last event that a filter matches, if it is of the last incarnation.
    pub fn last_of(&self, filter: &Filter) -> Option<EventId> {
        let epoch = self.truth.incarnations.last()?.epoch;
        let events = self.stored.get(&epoch)?.iter().rev();
        let mut matching = events.filter(|(_, token)| filter.matches(&self.truth.publications[*token].subject));
        matching.next().map(|(sequence, _)| EventId { epoch, sequence: *sequence })
    }

    /// Whether an event may rightly have been stored twice, the second time before `at`: of what a stream does not keep
    /// any more, JetStream forgets the message id when a server starts anew.
    fn was_forgotten(&self, epoch: Epoch, token: Token, first: u64, at: Moment) -> bool {
        let incarnation = self.truth.incarnations.iter().find(|incarnation| incarnation.epoch == epoch);
        let firsts = incarnation.map_or(&[][..], |incarnation| &incarnation.firsts);
        let dropped = firsts.iter().any(|(noted, oldest)| first < *oldest && *noted <= at.saturating_add(NOTED));
        dropped || self.was_removed(token, at)
    }

    fn age(&self, epoch: Epoch) -> Option<usize> {
        self.truth.incarnations.iter().position(|incarnation| incarnation.epoch == epoch)
    }

    fn first_of(&self, epoch: Epoch) -> u64 {
        self.age(epoch).map_or(0, |age| self.truth.incarnations[age].first)
    }

    /// The acknowledged events after one sequence, up to and including another.
    fn between(&self, epoch: Epoch, after: u64, to: u64) -> &[(u64, Token)] {
        let events = self.stored.get(&epoch).map_or(&[][..], |events| events);
        let from = events.partition_point(|(sequence, _)| *sequence <= after);
        let to = events.partition_point(|(sequence, _)| *sequence <= to);
        &events[from..to.max(from)]
    }

    /// Whether an event was taken out on purpose, or may have been, before `told`.
    fn was_removed(&self, token: Token, told: Moment) -> bool {
        let publication = &self.truth.publications[token];
        let expired = publication.ttl.is_some_and(|ttl| told >= publication.begun + ttl);
        expired
            || self.truth.removals.iter().any(|removal| {
                removal.filter.matches(&publication.subject)
                    && publication.begun <= removal.ended
                    && told >= removal.begun
            })
    }
}

/// One client, while it is being judged.
struct Case<'c, 't> {
    checker: &'c mut Checker<'t>,
    log: &'c Log,
    tags: Vec<Tag>,
    place: Option<Position>,
    delivered: HashSet<EventId>,
    /// What gaps have named: of one filter, from one sequence (excluded) to another.
    named: Vec<(Epoch, Filter, u64, u64)>,
    /// See [`Checker::last_of_each`].
    last: HashMap<(Epoch, Subject), u64>,
    entry: usize,
    found: Vec<Violation>,
}

impl Case<'_, '_> {
    fn consider(&mut self, entry: &Entry) {
        match &entry.what {
            What::Opened { .. } | What::Ended => {}
            What::Nonsense(what) => self.complain(format!("nonsense: {what}")),
            What::Position(to) => self.moved(to, entry.at),
            What::Event(to, token) => {
                self.deliver(to, *token, entry.at);
                self.moved(to, entry.at);
            }
            What::Gap { requested, resumed, reason } => self.gap(requested, resumed, reason, entry.at),
        }
    }

    /// Whether this event was ever published, matches, comes in its turn, and is what its id says.
    fn deliver(&mut self, to: &Position, token: Token, at: Moment) {
        let Some(publication) = self.checker.truth.publications.get(token) else {
            return self.complain(format!("never published: {to}, event {token}"));
        };
        if publication.outcome == Outcome::Refused {
            self.complain(format!("published, but refused with certainty: {to}, event {token}"));
        }
        let Some(sequence) = self.sequence_in(to, &publication.subject) else {
            return self.complain(format!("{to}, event {token} on {} does not match", publication.subject));
        };
        let id = EventId { epoch: to.epoch, sequence };
        if !self.log.wants.passes(token) {
            self.complain(format!("{id}, event {token}, is none of those that were wanted"));
        }
        if !self.delivered.insert(id) {
            self.complain(format!("repeated: {id}"));
        }
        let place = self.place.as_ref().filter(|place| place.epoch == to.epoch);
        let before = place.and_then(|place| self.sequence_in(place, &publication.subject));
        if let Some(before) = before.filter(|before| *before >= sequence) {
            self.complain(format!("{id} comes after {before}: it goes back"));
        }
        let known = *self.checker.seen.entry(id).or_insert(token);
        if known != token {
            self.complain(format!("{id} is event {token} here, and event {known} elsewhere"));
        }
        let (placed, since) = *self.checker.placed.entry((id.epoch, token)).or_insert((sequence, at));
        let (first, second_at) = if placed < sequence { (placed, at) } else { (sequence, since) };
        if placed != sequence && !self.checker.was_forgotten(id.epoch, token, first, second_at) {
            self.complain(format!(
                "event {token} has the sequence {sequence} here, and {placed} elsewhere, since {since:.3?}"
            ));
        }
    }

    /// Where the furthest of the filters that match a subject stands: on an event of it, its sequence.
    fn sequence_in(&self, position: &Position, subject: &Subject) -> Option<u64> {
        let matching = self.log.filters.iter().zip(&self.tags).filter(|(filter, _)| filter.matches(subject));
        matching.map(|(_, tag)| position.of(*tag)).max()
    }

    /// The client is at `to` now, and was told that it has had everything up to there.
    fn moved(&mut self, to: &Position, told: Moment) {
        if self.checker.age(to.epoch).is_none() {
            return self.complain(format!("{to} is of no stream that there was"));
        }
        match (self.place.clone(), self.log.begins) {
            (Some(place), _) if place.epoch != to.epoch => {
                self.complain(format!("{to} is of another stream than {place}, and no gap says so"));
            }
            (Some(place), _) => {
                if self.goes_back(&place, to) {
                    self.complain(format!("{to} goes back behind {place}"));
                }
                self.owed(&place, |tag| to.of(tag), told);
            }
            (None, Begins::Now) => {}
            // What the stream's limits had dropped is not among the first.
            (None, Begins::First) => {
                let dropped = self.checker.first_of(to.epoch) - 1;
                self.owed(&EventId { epoch: to.epoch, sequence: dropped }.into(), |tag| to.of(tag), told);
                self.name(to.epoch, |_| 0, |tag| to.of(tag).min(dropped));
            }
        }
        self.place = Some(to.clone());
    }

    fn gap(&mut self, requested: &str, resumed: &Position, reason: &str, told: Moment) {
        let Some(place) = self.place.replace(resumed.clone()) else {
            return self.complain("a gap, for one that asked for nothing".into());
        };
        let (Ok(requested), Some(age)) = (requested.parse::<Position>(), self.checker.age(resumed.epoch)) else {
            return self.complain(format!("a gap between ids that are none: {requested:?}, {resumed}"));
        };
        if requested.epoch != place.epoch {
            self.complain(format!("a gap after {requested}, for a client at {place}"));
        }
        // A node may not have been as far as its client: then it names more than is missing. What it does not name is
        // owed as ever.
        match reason {
            "expired" if resumed.epoch != place.epoch => {
                self.complain(format!("expired into another stream: {resumed}"));
            }
            "expired" => {
                if self.goes_back(&place, resumed) {
                    self.complain(format!("{resumed} goes back behind {place}"));
                }
                self.owed(&place, |tag| requested.of(tag).min(resumed.of(tag)), told);
                // What was dropped is excused; what was kept is owed.
                let dropped = self.checker.first_of(place.epoch) - 1;
                if self.tags.iter().all(|tag| place.of(*tag) >= dropped) {
                    self.complain(format!("a gap after {place}, though nothing was dropped after it"));
                }
                self.name(place.epoch, |tag| requested.of(tag), |tag| resumed.of(tag).min(dropped));
                self.owed(&place, |tag| resumed.of(tag), told);
            }
            "recreated" if Some(age) > self.checker.age(place.epoch) => {
                self.owed(&place, |tag| requested.of(tag), told);
                let dropped = self.checker.first_of(resumed.epoch) - 1;
                self.name(resumed.epoch, |_| 0, |tag| resumed.of(tag).min(dropped));
                self.owed(&EventId { epoch: resumed.epoch, sequence: 0 }.into(), |tag| resumed.of(tag), told);
            }
            "recreated" => self.complain(format!("{resumed} is not of a later stream than {place}")),
            other => self.complain(format!("a gap for no reason that there was: {other}")),
        }
    }

    /// Notes what a gap has named: for each filter, the events after one sequence, up to another.
    fn name(&mut self, epoch: Epoch, from: impl Fn(Tag) -> u64, to: impl Fn(Tag) -> u64) {
        for (filter, tag) in self.log.filters.iter().zip(&self.tags) {
            self.named.push((epoch, filter.clone(), from(*tag), to(*tag)));
        }
    }

    /// Whether a client is told that it has had less than it was told before. (Of a quiet filter among several an id may
    /// say less than the one before it. What comes twice because of that is found as such.)
    fn goes_back(&self, place: &Position, to: &Position) -> bool {
        self.tags.len() == 1 && to.of(self.tags[0]) < place.of(self.tags[0])
    }

    /// Complains about acknowledged events after `place`, up to where each filter stands now, that were there to be
    /// delivered and were not.
    fn owed(&mut self, place: &Position, to: impl Fn(Tag) -> u64, told: Moment) {
        let checker = &*self.checker;
        let epoch = place.epoch;
        let mut lost = vec![];
        for (filter, tag) in self.log.filters.iter().zip(&self.tags) {
            let events = checker.between(epoch, place.of(*tag), to(*tag)).iter().copied();
            lost.extend(events.filter(|(sequence, token)| {
                let subject = &checker.truth.publications[*token].subject;
                // Where the last event of an interval is wanted, one that something newer follows may be left out.
                let is_followed = self.last.get(&(epoch, subject.clone())).is_some_and(|last| last > sequence);
                filter.matches(subject)
                    && self.log.wants.passes(*token)
                    && !is_followed
                    && !self.delivered.contains(&EventId { epoch, sequence: *sequence })
                    && !checker.was_removed(*token, told)
                    && !self.is_named(epoch, *sequence, &checker.truth.publications[*token].subject)
            }));
        }
        if let [(first, token), ..] = &lost[..] {
            let publication = &checker.truth.publications[*token];
            let what = format!(
                "lost: {} events after {place}, the first of them {first}: event {token} on {}, published at {:.3?}, told \
                 to be none at {told:.3?}",
                lost.len(),
                publication.subject,
                publication.begun,
            );
            self.complain(what);
        }
    }

    /// Whether a gap has named an event, of whichever filter: it is not owed by another either.
    fn is_named(&self, epoch: Epoch, sequence: u64, subject: &Subject) -> bool {
        self.named.iter().any(|(of, filter, from, to)| {
            *of == epoch && (*from + 1..=*to).contains(&sequence) && filter.matches(subject)
        })
    }

    /// The client had all the time that it needed.
    fn end(&mut self) {
        self.entry = self.log.entries.len();
        let Some(last) =
            self.log.filters.iter().filter_map(|filter| self.checker.last_of(filter)).max_by_key(|id| id.sequence)
        else {
            return;
        };
        match self.place.clone() {
            Some(place) if place.epoch == last.epoch => self.owed(&place, |_| u64::MAX, Moment::MAX),
            place => self.complain(format!("at the end it is at {place:?}, far from {last}")),
        }
    }

    fn complain(&mut self, what: String) {
        self.found.push(Violation { entry: self.entry, what });
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Opened { last_event_id: Some(id), by } => write!(f, "-- opened by {by}, after {id}"),
            What::Opened { last_event_id: None, by } => write!(f, "-- opened by {by}"),
            What::Position(id) => write!(f, "{id} (position)"),
            What::Event(id, token) => write!(f, "{id} event {token}"),
            What::Gap { requested, resumed, reason } => write!(f, "{resumed} GAP after {requested}: {reason}"),
            What::Ended => write!(f, "-- ended"),
            What::Nonsense(what) => write!(f, "?? {what}"),
        }
    }
}

#[cfg(test)]
mod tests;
