//! What is kept for as long as somebody reads it, and a little longer: who takes, leaves and forgets what, on however
//! many threads. Knows nothing of feeds. `tests/shelf.rs` tries every order of its steps (loom).
//!
//! Invariant: whoever holds something as a reader finds the same under its name, unless it was forgotten on purpose.

use std::{collections::HashMap, hash::Hash};

use super::sync::{Arc, AtomicUsize, Mutex, Ordering};

/// Things by their names.
pub struct Shelf<K, V>(Mutex<HashMap<K, Arc<V>>>);

/// Counts the readers of one thing.
#[derive(Default)]
pub struct Readers {
    now: AtomicUsize,
    /// How often the last of them has left.
    desertions: AtomicUsize,
}

/// That the last reader has left, for the so many-eth time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desertion(usize);

impl Readers {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count() > 0
    }

    pub fn count(&self) -> usize {
        self.now.load(Ordering::Acquire)
    }

    /// One of them leaves. Says so if it was the last.
    pub fn leave(&self) -> Option<Desertion> {
        let was_last = self.now.fetch_sub(1, Ordering::AcqRel) == 1;
        was_last.then(|| Desertion(self.desertions.fetch_add(1, Ordering::AcqRel) + 1))
    }

    /// Whether somebody has read since then.
    pub fn any_since(&self, desertion: Desertion) -> bool {
        self.any() || self.desertions.load(Ordering::Acquire) != desertion.0
    }
}

impl<K: Hash + Eq + Clone, V: AsRef<Readers>> Shelf<K, V> {
    pub fn new() -> Shelf<K, V> {
        Shelf(Mutex::new(HashMap::new()))
    }

    /// What has this name, made if there is nothing, with one reader more.
    pub fn take(&self, name: &K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut things = self.0.lock().expect(UNPOISONED);
        let thing = things.entry(name.clone()).or_insert_with(|| Arc::new(make()));
        thing.as_ref().as_ref().now.fetch_add(1, Ordering::AcqRel);
        thing.clone()
    }

    /// Forgets `thing`, unless that is not to be, which is asked while no reader can come.
    pub fn forget(&self, name: &K, thing: &Arc<V>, unless: impl FnOnce(&V) -> bool) -> Forgotten {
        let mut things = self.0.lock().expect(UNPOISONED);
        if unless(thing) {
            return Forgotten::No;
        }
        match things.get(name).is_some_and(|known| Arc::ptr_eq(known, thing)) {
            true => things.remove(name),
            false => return Forgotten::Before,
        };
        Forgotten::Now
    }

    pub fn get(&self, name: &K) -> Option<Arc<V>> {
        self.0.lock().expect(UNPOISONED).get(name).cloned()
    }

    pub fn all(&self) -> Vec<Arc<V>> {
        self.0.lock().expect(UNPOISONED).values().cloned().collect()
    }
}

/// Whether something is forgotten, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    Now,
    Before,
    No,
}

const UNPOISONED: &str = "no panic happens while the shelf is held";
