//! How fast events are to go (`rate=`, of a stream or a batch): evenly, with as many at once as come in a tenth of a second.

use std::{num::NonZeroU32, time::Duration};

use tokio::time::Instant;

use crate::memory::SMALL_BYTES;

/// What a client that has waited may be handed at once is what it would have had in this time.
const BURST: Duration = Duration::from_millis(100);

/// By the generic cell rate algorithm (ITU-T I.371), in which one time is all that is remembered.
pub struct Pace {
    /// Events in a second.
    pub rate: NonZeroU32,
    /// When everything that was handed over was due.
    due: Instant,
}

impl Pace {
    /// At most so many events in a second.
    pub fn new(rate: NonZeroU32) -> Pace {
        let now = Instant::now();
        let mut pace = Pace { rate, due: now };
        // The first one need not wait.
        pace.due = now.checked_sub(pace.interval()).unwrap_or(now);
        pace
    }

    /// How many events are kept of those that were read, whose sizes these are: as many as come in a second, and small ones
    /// beyond that. A client that wants few holds little.
    pub fn keeps(&self, sizes: impl Iterator<Item = usize>) -> usize {
        let mut bytes = 0;
        let is_kept = |(number, size): &(usize, usize)| {
            bytes += size;
            *number < self.rate.get() as usize || bytes <= SMALL_BYTES
        };
        sizes.enumerate().take_while(is_kept).count()
    }

    /// How many events may be handed over now.
    pub fn allows(&self, now: Instant) -> usize {
        let (behind, burst) = (now.saturating_duration_since(self.due), BURST.max(self.interval()));
        (behind.min(burst).as_secs_f64() * f64::from(self.rate.get()) + 1e-6) as usize
    }

    /// So many have been handed over.
    pub fn take(&mut self, events: usize, now: Instant) {
        let earliest = now.checked_sub(BURST.max(self.interval())).unwrap_or(now);
        self.due = self.due.max(earliest) + self.interval() * u32::try_from(events).unwrap_or(u32::MAX);
    }

    /// So many of them came back.
    pub fn give_back(&mut self, events: u64) {
        let back = self.interval() * u32::try_from(events).unwrap_or(u32::MAX);
        self.due = self.due.checked_sub(back).unwrap_or(self.due);
    }

    /// When the next ones may be handed over: of many, some at once.
    pub fn next(&self) -> Instant {
        self.due + self.interval().max(BURST / 10)
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(1) / self.rate.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn no_more_come_than_were_asked_for_and_hardly_fewer() {
        for rate in [1, 7, 1_000, 1_000_000] {
            let mut pace = Pace::new(NonZeroU32::new(rate).unwrap());
            // What was not taken for long is not made up for.
            tokio::time::advance(Duration::from_secs(60)).await;
            let began = Instant::now();
            let mut taken = 0;
            while began.elapsed() < Duration::from_secs(10) {
                let allowed = pace.allows(Instant::now());
                pace.take(allowed, Instant::now());
                taken += allowed as u64;
                assert_eq!(pace.allows(Instant::now()), 0);
                tokio::time::sleep_until(pace.next()).await;
            }
            let burst = u64::from(rate / 10).max(1);
            let wanted = 10 * u64::from(rate);
            assert!((wanted * 98 / 100..=wanted + burst + 1).contains(&taken), "{rate}: {taken}");
        }
    }
}
