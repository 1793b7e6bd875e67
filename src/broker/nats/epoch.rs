//! Which incarnation of the stream this is: one state machine, fed with what the stream's leader says.
//!
//! The time at which a stream was made does not tell. It stays while sequences begin again: a memory stream whose server
//! restarted, a file stream that came back on an empty disk, an older copy of a store that was put back. And it changes on
//! a single server up to 2.14.0, at the restart after any edit, though nothing else does.
//!
//! So an incarnation is told by what was seen of it, the *anchor*: the last sequence that the leader told of or that came
//! live, and when that message was stored.
//!
//! | the leader says | then it is |
//! |---|---|
//! | a last sequence before the one that is proven | rewound: it has lost its end, and counts anew |
//! | another message at the anchor | rewound |
//! | another time of its making, and the anchor is what it was | the same |
//! | another time of its making | recreated |
//! | anything else | the same |

use jiff::Timestamp;

use crate::{event::Epoch, position::Witness};

/// What is known of the present incarnation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Identity {
    pub epoch: Epoch,
    /// When it was made, as the leader said last.
    pub created: Timestamp,
    /// What is stored from now on is stored after this.
    pub since: Timestamp,
    /// The last sequence that is proven to have been stored.
    pub last: u64,
    anchor: Option<Anchor>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Anchor {
    pub sequence: u64,
    pub time: Timestamp,
}

/// What an undisputed leader says of the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seen {
    pub created: Timestamp,
    pub last: u64,
    /// When the last message was stored.
    pub last_time: Option<Timestamp>,
    pub at_anchor: AtAnchor,
}

/// What is stored at the anchor's sequence, asked after the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum AtAnchor {
    /// There was no reason to ask, or no anchor.
    Unasked,
    /// Nothing (any more).
    Nothing,
    Stored(Timestamp),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Same,
    Recreated,
    Rewound,
}

impl Identity {
    pub fn new(created: Timestamp, last: u64, last_time: Option<Timestamp>) -> Identity {
        let anchor = last_time.filter(|_| last > 0).map(|time| Anchor { sequence: last, time });
        Identity { epoch: epoch_of(created), created, since: created, last, anchor }
    }

    /// Whether the leader knows of less than is proven, and nothing else tells that the stream counts anew: a leader that was
    /// just elected may not have applied all that it has.
    pub fn is_ahead_of(&self, seen: &Seen) -> bool {
        seen.created == self.created && seen.last < self.last && seen.at_anchor == AtAnchor::Unasked
    }

    /// The sequence whose message should be looked at before what the leader says is judged. `doubtful`: the stream may
    /// have changed without notice.
    pub fn sequence_to_check(&self, seen: &Seen, doubtful: bool) -> Option<u64> {
        let anchor = self.anchor.filter(|anchor| anchor.sequence <= seen.last)?;
        let is_told = seen.created == self.created && anchor.sequence == seen.last && seen.last_time.is_some();
        (seen.created != self.created || doubtful && !is_told).then_some(anchor.sequence)
    }

    /// The newest event that is known, if this is the incarnation with that epoch.
    pub fn witness(&self, epoch: Epoch) -> Option<Witness> {
        let anchor = self.anchor.filter(|_| self.epoch == epoch)?;
        Witness::new(anchor.sequence, anchor.time)
    }

    /// What a leader says of it.
    #[cfg(test)]
    pub fn as_seen(&self) -> Seen {
        let last_time = self.anchor.map(|anchor| anchor.time);
        Seen { created: self.created, last: self.last, last_time, at_anchor: AtAnchor::Unasked }
    }

    /// Takes over what the leader says, and says what that means.
    pub fn learn(&mut self, seen: &Seen) -> Finding {
        let finding = self.judge(seen);
        let last = match finding {
            Finding::Same => self.last.max(seen.last),
            Finding::Recreated | Finding::Rewound => seen.last,
        };
        let epoch = match finding {
            Finding::Same => self.epoch,
            Finding::Recreated => epoch_of(seen.created),
            Finding::Rewound => self.epoch.rewound(),
        };
        let since = match (finding, self.anchor) {
            (Finding::Rewound, Some(anchor)) => anchor.time,
            (Finding::Same, _) => self.since,
            (Finding::Rewound | Finding::Recreated, _) => seen.created,
        };
        let known = Identity::new(seen.created, seen.last, seen.last_time);
        // One that can't tell the time of its last message leaves the anchor where it was.
        let kept = self.anchor.filter(|_| finding == Finding::Same);
        *self = Identity { epoch, since, last, anchor: known.anchor.or(kept), ..known };
        finding
    }

    /// Takes note of an event that came live.
    pub fn see(&mut self, epoch: Epoch, sequence: u64, time: Timestamp) {
        if self.epoch == epoch && self.anchor.is_none_or(|anchor| anchor.sequence < sequence) {
            self.anchor = Some(Anchor { sequence, time });
            self.last = self.last.max(sequence);
        }
    }

    /// Takes note of an event that was stored.
    pub fn reach(&mut self, epoch: Epoch, sequence: u64) {
        if self.epoch == epoch {
            self.last = self.last.max(sequence);
        }
    }

    /// Takes over what another knows of the same incarnation.
    pub fn keep_newest_of(&mut self, other: &Identity) {
        self.last = self.last.max(other.last);
        if other.anchor.is_some_and(|other| self.anchor.is_none_or(|anchor| anchor.sequence < other.sequence)) {
            self.anchor = other.anchor;
        }
    }

    fn judge(&self, seen: &Seen) -> Finding {
        let is_same_at_anchor = self.anchor.and_then(|anchor| match seen.at_anchor {
            AtAnchor::Stored(time) => Some(time == anchor.time),
            AtAnchor::Nothing => None,
            AtAnchor::Unasked if anchor.sequence == seen.last => Some(seen.last_time? == anchor.time),
            AtAnchor::Unasked => None,
        });
        match (seen.created == self.created, is_same_at_anchor) {
            (false, Some(true)) if seen.last >= self.last => Finding::Same,
            (false, _) => Finding::Recreated,
            (true, _) if seen.last < self.last => Finding::Rewound,
            (true, Some(false)) => Finding::Rewound,
            (true, Some(true) | None) => Finding::Same,
        }
    }
}

fn epoch_of(created: Timestamp) -> Epoch {
    Epoch::from_seed(created.as_nanosecond() as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stream as its server has it, and how often it was not what it had been.
    #[derive(Clone, Debug)]
    struct Stream {
        created: i64,
        /// When each message was stored, but for those that are gone.
        stored: Vec<(i64, bool)>,
        incarnation: usize,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Store(usize),
        Remove(usize),
        /// It is deleted and made again.
        Recreate,
        /// Its server has forgotten all but so many, and goes on to count there.
        Lose(usize),
        /// Its server restarts after an edit: it says that it was made now.
        RenewCreated,
        /// The gateway asks, knowing that something may have changed or not knowing.
        Ask(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..5usize).prop_map(Step::Store),
            1 => (0..20usize).prop_map(Step::Remove),
            1 => Just(Step::Recreate),
            2 => (0..20usize).prop_map(Step::Lose),
            1 => Just(Step::RenewCreated),
            4 => any::<bool>().prop_map(Step::Ask),
        ]
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    impl Stream {
        fn ask(&self, identity: &Identity, doubtful: bool) -> Seen {
            let last = self.stored.len() as u64;
            let last_time = self.stored.last().map(|(time, _)| at(*time));
            let mut seen = Seen { created: at(self.created), last, last_time, at_anchor: AtAnchor::Unasked };
            if let Some(sequence) = identity.sequence_to_check(&seen, doubtful) {
                seen.at_anchor = match self.stored[sequence as usize - 1] {
                    (time, true) => AtAnchor::Stored(at(time)),
                    (_, false) => AtAnchor::Nothing,
                };
            }
            seen
        }
    }

    proptest! {
        /// Asked after each change, the machine is right unless the message at its anchor was removed meanwhile; and what it
        /// calls another incarnation always is one, or was made again.
        #[test]
        fn an_incarnation_is_told_by_what_was_seen_of_it(steps in prop::collection::vec(step(), 1..60)) {
            let mut clock = 1;
            let mut stream = Stream { created: 0, stored: vec![], incarnation: 0 };
            let mut identity = Identity::new(at(0), 0, None);
            let mut known = 0;
            let mut is_changed = false;
            for step in steps {
                clock += 1;
                match step {
                    Step::Store(count) => stream.stored.extend((0..count).map(|_| { clock += 1; (clock, true) })),
                    Step::Remove(index) => {
                        if let Some(stored) = stream.stored.get_mut(index) {
                            stored.1 = false;
                        }
                    }
                    Step::Recreate => {
                        stream = Stream { created: clock, stored: vec![], incarnation: stream.incarnation + 1 };
                        is_changed = true;
                    }
                    Step::Lose(kept) if kept < stream.stored.len() => {
                        stream.stored.truncate(kept);
                        stream.incarnation += 1;
                        is_changed = true;
                    }
                    Step::Lose(_) => {}
                    Step::RenewCreated => {
                        stream.created = clock;
                        is_changed = true;
                    }
                    Step::Ask(doubtful) => {
                        let before = identity;
                        let removed = before.anchor.is_some_and(|anchor| {
                            stream.stored.get(anchor.sequence as usize - 1).is_some_and(|stored| !stored.1)
                        });
                        let seen = stream.ask(&identity, doubtful || is_changed);
                        let finding = identity.learn(&seen);
                        prop_assert_eq!(before.epoch != identity.epoch, finding != Finding::Same);
                        if stream.incarnation == known {
                            // What was lost had never been seen, or there was nothing to know it by.
                            let is_unknown = before.anchor.is_none() || removed;
                            prop_assert!(finding == Finding::Same || is_unknown && finding == Finding::Recreated);
                        } else if before.last > 0 && !removed {
                            let lost_what_was_seen = finding != Finding::Same;
                            let kept_what_was_seen = before.anchor.is_some_and(|anchor| {
                                stream.stored.get(anchor.sequence as usize - 1).is_some_and(|stored| at(stored.0) == anchor.time)
                            });
                            prop_assert!(lost_what_was_seen != kept_what_was_seen, "{:?} {:?} {:?}", before, seen, finding);
                        }
                        known = stream.incarnation;
                        is_changed = false;
                    }
                }
            }
        }
    }

    #[test]
    fn a_stream_that_was_edited_and_restarted_is_the_same() {
        let mut identity = Identity::new(at(1), 7, Some(at(5)));
        let epoch = identity.epoch;
        let mut seen = Seen { created: at(9), last: 8, last_time: Some(at(6)), at_anchor: AtAnchor::Unasked };
        assert_eq!(identity.sequence_to_check(&seen, false), Some(7));
        seen.at_anchor = AtAnchor::Stored(at(5));
        assert_eq!((identity.learn(&seen), identity.epoch), (Finding::Same, epoch));
        // And goes on to be: its time of making is known now.
        let seen = Seen { last: 9, last_time: Some(at(7)), at_anchor: AtAnchor::Unasked, ..seen };
        assert_eq!((identity.sequence_to_check(&seen, false), identity.learn(&seen)), (None, Finding::Same));
    }

    #[test]
    fn a_stream_that_counts_anew_is_another_though_it_has_come_further() {
        let mut identity = Identity::new(at(1), 7, Some(at(5)));
        let epoch = identity.epoch;
        let mut seen = Seen { created: at(1), last: 9, last_time: Some(at(30)), at_anchor: AtAnchor::Unasked };
        assert_eq!(identity.sequence_to_check(&seen, true), Some(7));
        seen.at_anchor = AtAnchor::Stored(at(28));
        assert_eq!(identity.learn(&seen), Finding::Rewound);
        assert!(identity.epoch != epoch && identity.epoch.is_named(epoch), "its ids begin the same");
        identity.reach(epoch, 100);
        assert_eq!(identity.last, 9, "what was stored before says nothing of it");
    }
}
