//! A rate with a burst for each of many keys, in memory that is bounded.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    nanos::Nanos,
    state::{StateStore, keyed::ShrinkableKeyedStateStore},
};

use super::{Key, RetryAfter};

/// How often a full table is searched for keys that can be forgotten.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Rate {
    limiter: RateLimiter<Key, Table, DefaultClock>,
    /// Decides as the limiter does, and keeps nothing of it.
    preview: RateLimiter<Key, Preview, DefaultClock>,
    table: Table,
    burst: NonZeroU32,
    searched_at: Mutex<Instant>,
}

/// When each key's rate is wholly its own again, as governor has it.
#[derive(Clone)]
struct Table {
    times: Arc<Mutex<Times>>,
    keys_max: usize,
}

#[derive(Default)]
struct Times {
    known: HashMap<Key, Nanos>,
    /// The bucket that all keys share which are not tracked.
    others: Option<Nanos>,
}

impl Rate {
    pub(super) fn new(per_second: NonZeroU32, burst: NonZeroU32, keys_max: usize) -> Rate {
        let table = Table { times: Arc::default(), keys_max };
        let quota = Quota::per_second(per_second).allow_burst(burst);
        let limiter = RateLimiter::new(quota, table.clone(), DefaultClock::default());
        let preview = RateLimiter::new(quota, Preview(table.clone()), DefaultClock::default());
        Rate { limiter, preview, table, burst, searched_at: Mutex::new(Instant::now()) }
    }

    /// Whether one more of `key` would pass. Takes nothing.
    pub(super) fn allows(&self, key: &Key) -> Result<(), RetryAfter> {
        self.preview.check_key(key).map_err(|refusal| RetryAfter(refusal.wait_time_from(self.preview.clock().now())))
    }

    /// Takes `amount` of what `key` may have. More than a burst counts as a burst: it passes when nothing is owed.
    pub(super) fn check(&self, key: &Key, amount: usize) -> Result<(), RetryAfter> {
        self.make_room();
        let amount = u32::try_from(amount).unwrap_or(u32::MAX).min(self.burst.get());
        let Some(amount) = NonZeroU32::new(amount) else { return Ok(()) };
        let checked = self.limiter.check_key_n(key, amount).expect("no more than a burst");
        checked.map_err(|refusal| RetryAfter(refusal.wait_time_from(self.limiter.clock().now())))
    }

    /// Forgets, when the table is full, the keys that have what a new one has. Not at every call: it looks at all.
    fn make_room(&self) {
        if self.table.lock().known.len() < self.table.keys_max {
            return;
        }
        let mut searched_at = self.searched_at.lock().unwrap_or_else(PoisonError::into_inner);
        if searched_at.elapsed() >= SEARCH_INTERVAL {
            self.limiter.retain_recent();
            *searched_at = Instant::now();
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateStore for Table {
    type Key = Key;

    fn measure_and_replace<T, F, E>(&self, key: &Key, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let times = &mut *self.lock();
        let known = times.known.get(key).copied();
        if known.is_none() && times.known.len() >= self.keys_max {
            let (outcome, time) = decide(times.others)?;
            times.others = Some(time);
            return Ok(outcome);
        }
        let (outcome, time) = decide(known)?;
        times.known.insert(*key, time);
        Ok(outcome)
    }
}

/// The same table, of which nothing changes.
struct Preview(Table);

impl StateStore for Preview {
    type Key = Key;

    fn measure_and_replace<T, F, E>(&self, key: &Key, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let Table { times, keys_max } = &self.0;
        let times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let known = times.known.get(key).copied();
        let is_other = known.is_none() && times.known.len() >= *keys_max;
        Ok(decide(if is_other { times.others } else { known })?.0)
    }
}

impl ShrinkableKeyedStateStore<Key> for Table {
    fn retain_recent(&self, drop_below: Nanos) {
        self.lock().known.retain(|_, time| *time > drop_below);
    }

    fn len(&self) -> usize {
        self.lock().known.len()
    }

    fn is_empty(&self) -> bool {
        self.lock().known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Network;

    fn rate(per_second: u32, burst: u32, keys_max: usize) -> Rate {
        Rate::new(NonZeroU32::new(per_second).unwrap(), NonZeroU32::new(burst).unwrap(), keys_max)
    }

    fn address(number: u32) -> Key {
        Key::Network(Network(std::net::IpAddr::V4(number.into())))
    }

    #[test]
    fn a_burst_passes_and_then_the_wait_is_told() {
        let rate = rate(1, 3, 10);
        assert!((0..3).all(|_| rate.check(&address(1), 1).is_ok()));
        let Err(RetryAfter(wait)) = rate.check(&address(1), 1) else { panic!("a fourth is too many") };
        assert!(wait > Duration::from_millis(500) && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(rate.check(&address(2), 1), Ok(()), "others have their own");
    }

    #[test]
    fn a_look_at_a_rate_takes_nothing_of_it() {
        let rate = rate(1, 3, 10);
        assert!((0..10).all(|_| rate.allows(&address(1)).is_ok()));
        assert!((0..3).all(|_| rate.check(&address(1), 1).is_ok()));
        let Err(RetryAfter(wait)) = rate.allows(&address(1)) else { panic!("nothing is left") };
        assert!(wait > Duration::from_millis(500) && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(rate.allows(&address(2)), Ok(()), "others have their own");
    }

    #[test]
    fn more_than_a_burst_counts_as_a_burst() {
        let rate = rate(1, 10, 10);
        assert_eq!(rate.check(&address(1), usize::MAX), Ok(()));
        let Err(RetryAfter(wait)) = rate.check(&address(1), 10) else { panic!("nothing is left") };
        assert!(wait > Duration::from_secs(8), "{wait:?}");
    }

    #[test]
    fn a_million_addresses_take_bounded_memory_and_no_rate_from_those_that_were_there() {
        let rate = rate(1, 100, 1_000);
        assert_eq!(rate.check(&address(0), 50), Ok(()));
        let passed = (1..1_000_000).filter(|number| rate.check(&address(*number), 100).is_ok()).count();
        assert!(rate.table.lock().known.capacity() < 4_000);
        // The tracked addresses have buckets of their own; all others share one.
        assert!((999..1_200).contains(&passed), "{passed}");
        assert_eq!(rate.check(&address(0), 40), Ok(()), "a tracked address keeps its bucket");
    }

    #[test]
    fn whoever_has_used_nothing_of_late_makes_room() {
        let rate = rate(1_000_000, 1, 10);
        assert!((0..10).all(|number| rate.check(&address(number), 1).is_ok()));
        *rate.searched_at.lock().unwrap() -= SEARCH_INTERVAL;
        assert_eq!(rate.check(&address(11), 1), Ok(()));
        assert!(rate.table.lock().known.len() <= 2);
    }
}
