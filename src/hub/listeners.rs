//! The wakers of a feed's readers.

use std::{
    sync::{Mutex, MutexGuard},
    task::Waker,
};

/// In the order of their addresses.
#[derive(Default)]
pub(super) struct Listeners(Mutex<Vec<Waker>>);

impl Listeners {
    /// Wakes `listener` whenever there is something new from now on, as often as it was said.
    pub fn add(&self, listener: &Waker) {
        let mut listeners = self.lock();
        if listeners.is_empty() {
            // Most feeds have one.
            listeners.reserve_exact(1);
        }
        let at = listeners.partition_point(|known| known.data() < listener.data());
        listeners.insert(at, listener.clone());
    }

    pub fn remove(&self, listener: &Waker) {
        let mut listeners = self.lock();
        let at = listeners.partition_point(|known| known.data() < listener.data());
        if listeners.get(at).is_some_and(|known| known.data() == listener.data()) {
            listeners.remove(at);
        }
    }

    pub fn wake(&self) {
        self.lock().iter().for_each(Waker::wake_by_ref);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.0.lock().expect("no panic happens while listeners are held")
    }
}
