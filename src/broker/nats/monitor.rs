//! The resync signal: every occasion on which live hints may have been lost without notice. On most of them the stream may also
//! have been made anew, which the leader is asked about before any more hints are believed.

use std::{sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use tokio::time::MissedTickBehavior;

use super::{leader::Leader, live::Router, requirements::Requirements};
use crate::backoff::Backoff;

/// A cluster's other servers learn of a new subscription, and a new leader of all that was stored, a little later than
/// this gateway does. So a second resync follows the first.
const SECOND_DOUBT: Duration = Duration::from_millis(500);
/// How often the leader is asked whether the stream is there, the same, and as it must be.
const ASK: Duration = Duration::from_secs(5);

/// Moves the resync signal and settles the router's questions for as long as it runs.
pub(super) async fn watch(leader: Leader, requirements: Arc<Requirements>, router: Arc<Router>) {
    let mut questions = router.questions();
    let mut ask = tokio::time::interval(ASK);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut second_doubt, mut asking) = (OptionFuture::default(), OptionFuture::default());
    loop {
        // Cancellation: each of these waits without taking anything before it is ready.
        tokio::select! {
            changed = questions.changed() => {
                if changed.is_err() {
                    return;
                }
                leader.known().change();
                second_doubt = Some(Box::pin(tokio::time::sleep(SECOND_DOUBT))).into();
            }
            Some(()) = &mut second_doubt => {
                second_doubt = None.into();
                leader.known().resync();
            }
            Some(()) = &mut asking => {
                asking = None.into();
                continue;
            }
            _ = ask.tick() => {}
        }
        // Anew: what was asked before is no answer to a question that came up since.
        let question = *questions.borrow();
        asking = Some(Box::pin(settle(&leader, &requirements, &router, question))).into();
    }
}

/// Asks the leader until it answers. It learns of trouble and of another incarnation by itself.
async fn settle(leader: &Leader, requirements: &Requirements, router: &Router, question: u64) {
    let mut backoff = Backoff::default();
    loop {
        if let Ok(info) = leader.info().await {
            leader.known().judge(&requirements.mismatches(&info.config));
            return router.settle(question);
        }
        backoff.wait().await;
    }
}
