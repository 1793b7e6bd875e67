//! Where a stream ends by its client's wish: after so many events, at a place, at a time, or once it has caught up.

use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::time::Instant;

use super::slice::Slice;
use crate::position::Position;

/// What a client wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// After so many events.
    pub limit: Option<u64>,
    pub until: Option<Until>,
    /// Where nothing is there up to the end: how long to wait for a first event.
    pub wait: Duration,
}

/// The last place of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    /// What is stored when the request arrives.
    Now,
    Position(Position),
    /// What is stored at this time or before.
    Time(Timestamp),
}

/// Why a stream has ended by its client's wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    CaughtUp,
    Until,
    Limit,
}

impl Completed {
    pub fn as_str(self) -> &'static str {
        match self {
            Completed::CaughtUp => "caught-up",
            Completed::Until => "until",
            Completed::Limit => "limit",
        }
    }
}

/// How far a stream is from its end.
pub(super) struct Remaining {
    /// Events that may still be handed over.
    pub events: Option<u64>,
    pub bound: Bound,
    /// What reaching the bound is called.
    pub reason: Completed,
    pub has_delivered: bool,
    /// Until when a first event is waited for.
    pub wait_until: Option<Instant>,
    /// Everything up to the bound was stored when it was set: feeds may be asked to read up to there. What is still to come
    /// arrives by itself.
    pub is_stored: bool,
    /// When feeds were last asked to read up to the bound.
    pub asked_at: Option<Instant>,
}

pub(super) enum Bound {
    /// There is none, or none any more.
    Open,
    /// This sequence is the last.
    Sequence(u64),
    /// What is stored up to then, which is to come.
    Time(Timestamp),
    /// That time has come, and the leader is asked for the last sequence.
    Resolving(BoxFuture<'static, u64>),
}

/// How often feeds are asked again to read up to the bound.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Remaining {
    pub fn new(limit: Option<u64>, bound: Bound, reason: Completed, wait: Duration) -> Remaining {
        let wait_until = (!wait.is_zero()).then(|| Instant::now() + wait);
        Remaining { events: limit, bound, reason, has_delivered: false, wait_until, is_stored: true, asked_at: None }
    }

    /// The last sequence, where it is known.
    pub fn last(&self) -> Option<u64> {
        match self.bound {
            Bound::Sequence(last) => Some(last),
            Bound::Open | Bound::Time(_) | Bound::Resolving(_) => None,
        }
    }

    /// Whether an event comes after the end.
    pub fn is_beyond(&self, sequence: u64, stored: Option<Timestamp>) -> bool {
        match self.bound {
            Bound::Sequence(last) => sequence > last,
            Bound::Time(time) => stored.is_some_and(|stored| stored > time),
            Bound::Open | Bound::Resolving(_) => false,
        }
    }

    /// Takes away what comes after the end from what was taken after `position`. Returns whether there was such.
    pub fn cut(&mut self, slice: &mut Slice, position: u64) -> bool {
        let mut kept = 0;
        for found in &slice.blocks {
            if self.is_beyond(found.sequence, found.stored) || self.events == Some(0) {
                break;
            }
            if found.stored.is_some() {
                self.has_delivered = true;
                self.events = self.events.map(|events| events - 1);
            }
            kept += 1;
        }
        let Some(beyond) = slice.blocks.get(kept).map(|found| found.sequence) else { return false };
        if let Bound::Time(_) = self.bound {
            // Times grow with sequences.
            self.bound = Bound::Sequence(beyond - 1);
        }
        slice.reached = match self.events {
            Some(0) => slice.blocks[..kept].last().map_or(position.min(beyond - 1), |last| last.sequence),
            _ => beyond - 1,
        };
        slice.blocks.truncate(kept);
        true
    }

    /// When there is something to do, whatever happens until then.
    pub fn due(&self) -> Option<Instant> {
        // Each of these is over, or further away, once it was acted on: a time that stayed in the past would wake for ever.
        match self.bound {
            Bound::Time(time) => {
                let left = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
                Instant::now().checked_add(left)
            }
            Bound::Sequence(_) => self.asked_at.map(|at| at + ASK_AGAIN),
            Bound::Open => self.wait_until,
            Bound::Resolving(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_waits_for_its_first_event_is_woken_at_the_end_of_its_wait_and_not_before() {
        let wait = Duration::from_secs(300);
        let mut remaining = Remaining::new(None, Bound::Sequence(7), Completed::CaughtUp, wait);
        remaining.asked_at = Some(Instant::now());
        tokio::time::advance(Duration::from_secs(60)).await;
        remaining.bound = Bound::Open;
        assert_eq!(remaining.due(), remaining.wait_until);
        assert!(remaining.due().is_some_and(|due| due > Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_over_does_not_wake_a_stream_that_is_still_read_for() {
        let mut remaining = Remaining::new(None, Bound::Sequence(7), Completed::CaughtUp, Duration::from_millis(1));
        tokio::time::advance(Duration::from_secs(60)).await;
        remaining.asked_at = Some(Instant::now());
        assert_eq!(remaining.due(), Some(Instant::now() + ASK_AGAIN));
    }
}
