//! The ladder of retries: capped exponential delays with jitter, `Retry-After` honoured, final errors at once.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// Attempts without progress before a fetch is given up: about two minutes with the delays below.
pub const ATTEMPTS_DEFAULT: u32 = 9;

/// First delay.
const FIRST: Duration = Duration::from_millis(500);

/// Longest delay of our own.
const LONGEST: Duration = Duration::from_secs(30);

/// Longest `Retry-After` that is waited for; a source that wants more has refused.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

/// How long to wait after the `failed`-th failure in a row (from 1), or `None` when to give up. `jitter` in [0, 1) takes up to half off.
pub fn delay(failed: u32, attempts: u32, error: &Error, jitter: f64) -> Option<Duration> {
    if error.kind() != Kind::Unavailable || failed >= attempts {
        return None;
    }
    if let Some(asked) = error.retry_after() {
        return (asked <= LONGEST_ASKED).then_some(asked);
    }
    let full = FIRST.saturating_mul(1 << failed.saturating_sub(1).min(16)).min(LONGEST);
    Some(full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0))
}

/// Counts failures in a row; progress begins anew.
#[derive(Debug)]
pub(super) struct Ladder {
    failed: u32,
    attempts: u32,
}

impl Ladder {
    pub(super) fn new(attempts: u32) -> Self {
        Self { failed: 0, attempts }
    }

    pub(super) fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits for the next attempt.
    ///
    /// # Errors
    /// `error` itself when it is final or attempts are used up.
    pub(super) async fn wait(&mut self, error: Error) -> Result<()> {
        self.failed += 1;
        match delay(self.failed, self.attempts, &error, random()) {
            Some(delay) => {
                tracing::info!(error = %error.chain(), attempt = self.failed, delay_ms = delay.as_millis(), "will try again");
                tokio::time::sleep(delay).await;
                Ok(())
            }
            None if self.failed > 1 => Err(error.fact("attempts", self.failed)),
            None => Err(error),
        }
    }
}

/// Repeats `work` along the ladder.
///
/// # Errors
/// The last one.
pub(super) async fn until_it_works<T, F: Future<Output = Result<T>>>(
    attempts: u32,
    mut work: impl FnMut() -> F,
) -> Result<T> {
    let mut ladder = Ladder::new(attempts);
    loop {
        match work().await {
            Ok(value) => return Ok(value),
            Err(error) => ladder.wait(error).await?,
        }
    }
}

/// A number in [0, 1) that differs between processes and calls: enough to spread retries.
fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 40;
    f64::from(u32::try_from(bits).unwrap_or(0)) / f64::from(1_u32 << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ladder_is_capped_and_ends() {
        let error = Error::unavailable("X", "x");
        let steps: Vec<_> = (1..=9).map_while(|n| delay(n, 9, &error, 0.0)).map(|d| d.as_millis()).collect();
        assert_eq!(steps, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(delay(1, 9, &error, 1.0).unwrap().as_millis(), 250);
        assert_eq!(delay(4_000_000, u32::MAX, &error, 0.0).unwrap(), LONGEST);
    }

    #[test]
    fn final_errors_are_not_retried_and_retry_after_is_honoured() {
        assert_eq!(delay(1, 9, &Error::denied("X", "x"), 0.0), None);
        let asked = |s: u64| Error::unavailable("X", "x").fact("retry_after_s", s);
        assert_eq!(delay(1, 9, &asked(7), 0.9).unwrap().as_secs(), 7);
        assert_eq!(delay(1, 9, &asked(100_000), 0.0), None);
    }

    #[test]
    fn jitter_is_a_fraction() {
        for _ in 0..100 {
            assert!((0.0..1.0).contains(&random()));
        }
    }
}
