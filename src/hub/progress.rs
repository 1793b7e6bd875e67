//! A client's progress, for `/debug/streams` and the log: written beside its cursor, without a lock.

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use smallvec::SmallVec;

use super::Selection;
use crate::{
    event::Epoch,
    position::{Position, Tag},
    subject::Filter,
};

/// Where a client stood when something was last written to it.
///
/// Its parts are written one by one: a reader in the moment in which a stream turns out to be recreated may see
/// places of the one with the epoch of the other.
pub struct Progress {
    epoch: AtomicU32,
    /// Most clients have one.
    places: SmallVec<[(Filter, AtomicU64); 1]>,
    pub selection: Selection,
    /// Events in a second that it wants at most.
    pub rate: Option<NonZeroU32>,
}

impl Progress {
    pub(super) fn new(
        epoch: Epoch,
        places: impl Iterator<Item = (Filter, u64)>,
        (selection, rate): (Selection, Option<NonZeroU32>),
    ) -> Progress {
        let places = places.map(|(filter, at)| (filter, at.into())).collect();
        Progress { epoch: epoch.number().into(), places, selection, rate }
    }

    pub(super) fn set(&self, epoch: Epoch, places: impl Iterator<Item = u64>) {
        self.epoch.store(epoch.number(), Relaxed);
        self.places.iter().zip(places).for_each(|((_, place), at)| place.store(at, Relaxed));
    }

    pub fn epoch(&self) -> Epoch {
        Epoch::of(self.epoch.load(Relaxed))
    }

    /// The filters that the client reads, and up to where it has each.
    pub fn places(&self) -> impl ExactSizeIterator<Item = (&Filter, u64)> {
        self.places.iter().map(|(filter, at)| (filter, at.load(Relaxed)))
    }

    /// The last id that the client was told, or one that says the same.
    pub fn position(&self) -> Position {
        let base = self.places().map(|(_, at)| at).min().unwrap_or(0);
        Position::new(self.epoch(), base, self.places().map(|(filter, at)| (Tag::of(filter), at)))
    }
}
