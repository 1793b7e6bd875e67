//! Questions that may share one answer, as long as it was asked for after each of them came: a caller that comes while a
//! round is under way waits for the next. Ten thousand readers that ask at once cost two round trips.

use std::{future::Future, panic::AssertUnwindSafe};

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

/// Callers that may wait for one batch; further callers wait for the next one.
const WAITING_MAX: usize = 1024;

pub(super) struct Coalesced<T>(mpsc::Sender<oneshot::Sender<T>>);

impl<T: Clone + Send + 'static> Coalesced<T> {
    /// `ask` runs one round. Never two at a time, and none once this handle is dropped.
    pub fn start<A, F>(ask: A) -> Coalesced<T>
    where
        A: Fn() -> F + Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (sender, mut arriving) = mpsc::channel::<oneshot::Sender<T>>(WAITING_MAX);
        tokio::spawn(async move {
            while let Some(first) = arriving.recv().await {
                let mut batch = vec![first];
                while let Ok(next) = arriving.try_recv() {
                    batch.push(next);
                }
                // A batch that panics is counted like every panic; its waiting callers get an error.
                let Ok(answer) = AssertUnwindSafe(ask()).catch_unwind().await else { continue };
                for waiting in batch {
                    // A caller that has gone needs no answer.
                    let _ = waiting.send(answer.clone());
                }
            }
        });
        Coalesced(sender)
    }

    /// Waits for a round that begins after this call. `None` if the round came to nothing.
    pub async fn get(&self) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.0.send(sender).await.ok()?;
        answer.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Poll,
    };

    use tokio::sync::Semaphore;

    use super::*;

    /// Polls once.
    async fn waits(future: &mut (impl Future + Unpin)) -> bool {
        std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut *future).poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn whoever_comes_during_a_round_shares_the_next() {
        let (rounds, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let shared = Coalesced::start({
            let (rounds, gate) = (rounds.clone(), gate.clone());
            move || {
                let (round, gate) = (rounds.fetch_add(1, Ordering::SeqCst) + 1, gate.clone());
                async move {
                    gate.acquire().await.unwrap().forget();
                    round
                }
            }
        });

        let mut first = Box::pin(shared.get());
        assert!(waits(&mut first).await);
        while rounds.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let mut later: Vec<_> = (0..100).map(|_| Box::pin(shared.get())).collect();
        for waiting in &mut later {
            assert!(waits(waiting).await);
        }
        gate.add_permits(2);

        assert_eq!(first.await, Some(1));
        for waiting in later {
            assert_eq!(waiting.await, Some(2));
        }
    }
}
