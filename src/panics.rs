//! Panics, counted and logged: each is a defect. What panicked is made anew by its owner (a connection to NATS by its
//! supervisor), or the process ends.

use std::{
    panic::PanicHookInfo,
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
};

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

    #[test]
    fn a_panic_in_any_thread_is_counted() {
        watch();
        let before = count();
        let panics = || panic!("a test wants it");
        assert!(std::thread::spawn(panics).join().is_err());
        assert!(count() > before);
    }
}
