//! What is known of the events: who published what and what became of it, and what was taken out of the stream on
//! purpose. Written while it happens; the checker reads it afterwards.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tidegate::{
    event::{Epoch, EventId},
    subject::{Filter, Subject},
};

/// Names one event, from its payload: its number among all that were published.
pub type Token = usize;

/// Time since the run began.
pub type Moment = Duration;

/// One event that somebody tried to publish, perhaps several times under one message id.
#[derive(Clone, Debug)]
pub struct Publication {
    pub subject: Subject,
    /// When its first attempt began.
    pub begun: Moment,
    pub ttl: Option<Duration>,
    pub outcome: Outcome,
    /// When that was known.
    pub settled: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It may have been stored, or may yet be.
    Uncertain,
    /// It was acknowledged.
    Stored(EventId),
    /// It was not, and never will be: every attempt was refused with certainty.
    Refused,
}

/// One incarnation of the stream.
#[derive(Clone, Debug)]
pub struct Incarnation {
    pub epoch: Epoch,
    /// The highest that the sequence of its oldest kept event ever was.
    pub first: u64,
    /// What it was, and when that was noted.
    pub firsts: Vec<(Moment, u64)>,
}

impl Incarnation {
    pub fn new(epoch: Epoch, first: u64) -> Incarnation {
        Incarnation { epoch, first, firsts: vec![] }
    }
}

/// The removal of all events of some subjects, between these two times.
#[derive(Clone, Debug)]
pub struct Removal {
    pub filter: Filter,
    pub begun: Moment,
    pub ended: Moment,
}

/// Everything that is known.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    pub publications: Vec<Publication>,
    /// In their order.
    pub incarnations: Vec<Incarnation>,
    pub removals: Vec<Removal>,
}

impl Truth {
    /// The acknowledged events of each incarnation, by sequence.
    pub fn stored(&self) -> HashMap<Epoch, Vec<(u64, Token)>> {
        let mut stored: HashMap<Epoch, Vec<(u64, Token)>> = HashMap::new();
        for (token, publication) in self.publications.iter().enumerate() {
            if let Outcome::Stored(EventId { epoch, sequence }) = publication.outcome {
                stored.entry(epoch).or_default().push((sequence, token));
            }
        }
        stored.values_mut().for_each(|events| events.sort_unstable());
        stored
    }
}

/// The book that everyone writes in.
pub struct Ledger {
    began: Instant,
    truth: Mutex<Truth>,
}

/// What an acknowledgement without an epoch was about: where the stream stood when its request was sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Era(usize);

impl Ledger {
    pub fn begin() -> Ledger {
        Ledger { began: Instant::now(), truth: Mutex::default() }
    }

    pub fn now(&self) -> Moment {
        self.began.elapsed()
    }

    /// Notes that an event is about to be published.
    pub fn publish(&self, subject: &Subject, ttl: Option<Duration>) -> Token {
        let begun = self.now();
        let publications = &mut self.truth().publications;
        let (outcome, settled) = (Outcome::Uncertain, Moment::MAX);
        publications.push(Publication { subject: subject.clone(), begun, ttl, outcome, settled });
        publications.len() - 1
    }

    pub fn settle(&self, token: Token, outcome: Outcome) {
        let settled = self.now();
        let publication = &mut self.truth().publications[token];
        (publication.outcome, publication.settled) = (outcome, settled);
    }

    /// Notes a stream that was made.
    pub fn made(&self, epoch: Epoch) {
        self.truth().incarnations.push(Incarnation::new(epoch, 1));
    }

    /// Notes that a stream is about to be deleted: from here to [`Ledger::made`], no acknowledgement is of any epoch.
    pub fn unmade(&self) {
        self.truth().incarnations.push(Incarnation::new(Epoch::from_seed(0), 0));
    }

    /// Notes the sequence of the oldest kept event of a stream.
    pub fn oldest_kept(&self, epoch: Epoch, sequence: u64) {
        let noted = self.now();
        let mut truth = self.truth();
        let known = truth.incarnations.iter_mut().find(|known| known.epoch == epoch);
        if let Some(known) = known.filter(|known| known.first < sequence) {
            known.first = sequence;
            known.firsts.push((noted, sequence));
        }
    }

    pub fn era(&self) -> Era {
        Era(self.truth().incarnations.len())
    }

    /// The id of an event that was acknowledged, now, with this sequence: if the stream is the one that it was.
    pub fn identify(&self, sent_in: Era, sequence: u64) -> Outcome {
        let truth = self.truth();
        match truth.incarnations.last() {
            Some(last) if sent_in.0 == truth.incarnations.len() && last.first > 0 => {
                Outcome::Stored(EventId { epoch: last.epoch, sequence })
            }
            _ => Outcome::Uncertain,
        }
    }

    pub fn removed(&self, filter: Filter, begun: Moment) {
        let ended = self.now();
        self.truth().removals.push(Removal { filter, begun, ended });
    }

    /// How many events were acknowledged so far, of how many.
    pub fn count(&self) -> (usize, usize) {
        let truth = self.truth();
        let stored = truth.publications.iter().filter(|p| matches!(p.outcome, Outcome::Stored(_))).count();
        (stored, truth.publications.len())
    }

    pub fn read(&self) -> Truth {
        let mut truth = self.truth().clone();
        truth.incarnations.retain(|incarnation| incarnation.first > 0);
        truth
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().expect("no panic happens while the ledger is held")
    }
}
