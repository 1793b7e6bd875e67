//! The doubts: every occasion on which live hints may have been lost without notice.

use std::{sync::atomic::Ordering, time::Duration};

use async_nats::{Client, Subscriber};
use futures_util::StreamExt;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};

use super::{leader::Leader, stream::Fitness};

/// A cluster's other servers learn of a new subscription, and a new leader of all that was stored, a little later than
/// this gateway does. So a second doubt follows the first.
const SECOND_DOUBT: Duration = Duration::from_millis(500);
/// How often it is looked at whether the connection of advisories was made again, and some may be missing.
const LOOK: Duration = Duration::from_secs(1);
/// How often the leader is asked whether the stream is there, the same, and as it must be.
const ASK: Duration = Duration::from_secs(5);

/// Moves the doubts for as long as it runs.
pub(super) async fn watch(
    leader: Leader,
    fitness: Fitness,
    mut line: watch::Receiver<u64>,
    mut advisories: Subscriber,
) {
    let client = leader.requests().client.clone();
    let mut connections = connections_of(&client);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked = Instant::now();
    let mut second_doubt: Option<Instant> = None;
    loop {
        let second = async {
            match second_doubt {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        // Cancellation: each of these waits without taking anything before it is ready.
        tokio::select! {
            connected = line.changed() => {
                if connected.is_err() {
                    return;
                }
                leader.known().doubt();
                second_doubt = Some(Instant::now() + SECOND_DOUBT);
            }
            advisory = advisories.next() => {
                let Some(advisory) = advisory else { return };
                tracing::info!(advisory = %advisory.subject, "the stream changed");
                leader.known().change();
                second_doubt = Some(Instant::now() + SECOND_DOUBT);
                asked = Instant::now() - ASK;
            }
            () = second => {
                second_doubt = None;
                leader.known().doubt();
            }
            _ = look.tick() => {}
        }
        if connections_of(&client) != connections {
            // Only after a round trip has the server seen the subscription that was made again.
            connections = connections_of(&client);
            let _ = leader.info().await;
            asked = Instant::now();
            leader.known().doubt();
            second_doubt = Some(Instant::now() + SECOND_DOUBT);
        } else if asked.elapsed() >= ASK {
            // Learns of trouble and of another incarnation by itself.
            if let Ok(info) = leader.info().await {
                leader.known().judge(&fitness.misfits(&info.config));
            }
            asked = Instant::now();
        }
    }
}

fn connections_of(client: &Client) -> u64 {
    client.statistics().connects.load(Ordering::Relaxed)
}
