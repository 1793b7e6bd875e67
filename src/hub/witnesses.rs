//! Whether ids that clients present are of the stream as it is now: asked once for all clients that come with the same one.
//!
//! An id has the name of its stream, which stays when a stream loses its end and counts anew. A gateway that did not see
//! that happen tells by the witness of the id: the time at which an event was stored.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::OnceCell;

use super::{Hub, place::Place};
use crate::{
    broker::{BrokerError, Recognition},
    event::Epoch,
    position::Witness,
};

/// How many answers are kept.
const ANSWERS_MAX: usize = 256;
/// How long an answer holds: a stream may lose its end at any time.
const AGE_MAX: Duration = Duration::from_secs(5);
/// A leader whose stream ends before the event is asked again for so long: one that was just elected may not have applied all
/// that it has.
const LOST_AFTER: Duration = Duration::from_secs(3);
const LOST_PAUSE: Duration = Duration::from_millis(200);

/// The answers that were given lately, and those that are waited for.
#[derive(Default)]
pub(super) struct Witnesses(Mutex<VecDeque<Asked>>);

struct Asked {
    epoch: Epoch,
    witness: Witness,
    since: Instant,
    answer: Answer,
}

/// The first client asks; the others wait for its answer. If the question fails or is dropped, the next client asks.
type Answer = Arc<OnceCell<bool>>;

impl Witnesses {
    fn answer(&self, epoch: Epoch, witness: Witness) -> Answer {
        let now = Instant::now();
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.retain(|asked| now - asked.since < AGE_MAX);
        if let Some(known) = asked.iter().find(|asked| asked.witness == witness && asked.epoch == epoch) {
            return known.answer.clone();
        }
        let answer = Answer::default();
        asked.push_back(Asked { epoch, witness, since: now, answer: answer.clone() });
        if asked.len() > ANSWERS_MAX {
            asked.pop_front();
        }
        answer
    }
}

impl Hub {
    /// Whether an event is of this incarnation of the stream. Feeds that remember it answer without a question.
    pub(super) async fn is_of_stream(
        &self,
        epoch: Epoch,
        witness: Witness,
        places: &[Place],
    ) -> Result<bool, BrokerError> {
        let newest = self.0.broker.witness(epoch).filter(|newest| newest.sequence == witness.sequence);
        let remembered = || places.iter().find_map(|place| place.reader.feed.time_of(witness.sequence));
        if newest == Some(witness) || remembered().is_some_and(|time| witness.is_of(time)) {
            return Ok(true);
        }
        let ask = || async {
            let until = Instant::now() + LOST_AFTER;
            loop {
                let turn = self.0.history.acquire().await.expect("the semaphore is never closed");
                let recognition = self.0.broker.recognize(witness).await?;
                drop(turn);
                if recognition != Recognition::Beyond || Instant::now() >= until {
                    return Ok(recognition == Recognition::Same);
                }
                tokio::time::sleep(LOST_PAUSE).await;
            }
        };
        self.0.witnesses.answer(epoch, witness).get_or_try_init(ask).await.copied()
    }
}
