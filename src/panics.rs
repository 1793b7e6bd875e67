//! Panics, counted and logged: each is a defect. What panicked is made anew by its owner (a connection to NATS by its
//! supervisor), or the process ends.

use std::{
    panic::{AssertUnwindSafe, PanicHookInfo},
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::FutureExt;

use crate::backoff::Backoff;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Counts and logs panics from now on, in every thread of this process.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let otherwise = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            tracing::error!(place = place(panic), why = why(panic), "a task panicked");
            otherwise(panic);
        }));
    });
}

/// Runs a task that a part of this process depends on, and begins it anew when it panics. `begin` must not rely on anything
/// that the task may have left half-done.
pub async fn restarted<F: Future<Output = ()>>(mut begin: impl FnMut() -> F) {
    let mut backoff = Backoff::default();
    while AssertUnwindSafe(begin()).catch_unwind().await.is_err() {
        backoff.wait().await;
    }
}

/// How many there have been since they are counted.
pub fn count() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

fn place(panic: &PanicHookInfo) -> String {
    panic.location().map_or_else(String::new, ToString::to_string)
}

fn why<'p>(panic: &'p PanicHookInfo) -> &'p str {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(|text| &**text)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_panics_is_begun_anew() {
        let mut tries = 0;
        let begin = || {
            tries += 1;
            let panics = tries < 4;
            async move {
                tokio::task::yield_now().await;
                assert!(!panics, "a test wants it");
            }
        };
        restarted(begin).await;
        assert_eq!(tries, 4);
    }

    #[test]
    fn a_panic_in_any_thread_is_counted() {
        watch();
        let before = count();
        let panics = || panic!("a test wants it");
        assert!(std::thread::spawn(panics).join().is_err());
        assert!(count() > before);
    }
}
