//! How long to wait: before trying again what failed, and so that what began together does not stay together.

use std::time::Duration;

use rand::RngExt;

const FIRST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_secs(2);

/// Waits that double from 5 ms to 2 s, jittered.
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff(FIRST)
    }
}

impl Backoff {
    pub async fn wait(&mut self) {
        tokio::time::sleep(jittered(self.0)).await;
        self.0 = (self.0 * 2).min(LONGEST);
    }
}

/// A time between three and five quarters of `mean`.
pub fn jittered(mean: Duration) -> Duration {
    mean.mul_f64(rand::rng().random_range(0.75..1.25))
}
