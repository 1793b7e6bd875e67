//! A concurrent map of reader-counted entries. An entry may be removed once its last reader has left. Knows nothing of
//! feeds. `tests/reader_map.rs` tries every order of its steps (loom).
//!
//! Invariant: a reader finds the entry that it holds under that entry's key, unless the entry was removed on purpose.

use std::{collections::HashMap, hash::Hash};

use super::sync::{Arc, AtomicUsize, Mutex, Ordering};

pub struct ReaderMap<K, V>(Mutex<HashMap<K, Arc<V>>>);

/// Counts the readers of one entry.
#[derive(Default)]
pub struct Readers {
    now: AtomicUsize,
    /// How often the count has dropped to zero.
    generation: AtomicUsize,
}

/// How often the reader count of an entry had dropped to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(usize);

impl Readers {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count() > 0
    }

    pub fn count(&self) -> usize {
        self.now.load(Ordering::Acquire)
    }

    /// Removes one reader. Returns the new generation if it was the last reader.
    pub fn leave(&self) -> Option<Generation> {
        let was_last = self.now.fetch_sub(1, Ordering::AcqRel) == 1;
        was_last.then(|| Generation(self.generation.fetch_add(1, Ordering::AcqRel) + 1))
    }

    /// Whether there are readers, or were some after this generation began.
    pub fn any_since(&self, generation: Generation) -> bool {
        self.any() || self.generation.load(Ordering::Acquire) != generation.0
    }
}

impl<K: Hash + Eq + Clone, V: AsRef<Readers>> ReaderMap<K, V> {
    pub fn new() -> ReaderMap<K, V> {
        ReaderMap(Mutex::new(HashMap::new()))
    }

    /// The entry with this key, made if there is none, with one more reader.
    pub fn take(&self, key: &K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut entries = self.0.lock().expect(UNPOISONED);
        let entry = entries.entry(key.clone()).or_insert_with(|| Arc::new(make()));
        entry.as_ref().as_ref().now.fetch_add(1, Ordering::AcqRel);
        entry.clone()
    }

    /// Removes `entry`, unless `keep` says otherwise, which is asked while no reader can be added.
    pub fn remove(&self, key: &K, entry: &Arc<V>, keep: impl FnOnce(&V) -> bool) -> Removed {
        let mut entries = self.0.lock().expect(UNPOISONED);
        if keep(entry) {
            return Removed::No;
        }
        match entries.get(key).is_some_and(|known| Arc::ptr_eq(known, entry)) {
            true => entries.remove(key),
            false => return Removed::Before,
        };
        Removed::Now
    }

    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.0.lock().expect(UNPOISONED).get(key).cloned()
    }

    pub fn all(&self) -> Vec<Arc<V>> {
        self.0.lock().expect(UNPOISONED).values().cloned().collect()
    }
}

/// Whether an entry is removed, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    Now,
    Before,
    No,
}

const UNPOISONED: &str = "no panic happens while the map is locked";
