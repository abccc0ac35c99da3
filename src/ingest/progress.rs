//! How far an ingest is: counters that anybody may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Time over which the rate is smoothed.
const RATE_SECONDS: f64 = 3.0;

/// Counters of one ingest. A checkpoint that waits for a flight follows the flight's counters.
#[derive(Debug, Default)]
pub struct Progress {
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
    files_done: AtomicU64,
    files_total: AtomicU64,
    rate: Mutex<Option<Rate>>,
    followed: Mutex<Option<Arc<Progress>>>,
}

#[derive(Debug)]
struct Rate {
    at: Instant,
    bytes: u64,
    bytes_per_s: f64,
}

/// A reading of the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes here.
    pub bytes_done: u64,
    /// Bytes of all files; 0 while unknown.
    pub bytes_total: u64,
    /// Smoothed over some seconds.
    pub rate_bytes_per_s: u64,
    /// Files sealed.
    pub files_done: u64,
    /// Files; 0 while unknown.
    pub files_total: u64,
}

impl Progress {
    /// Sets what is to come.
    pub fn expect(&self, bytes: u64, files: u64) {
        self.bytes_total.store(bytes, Ordering::Relaxed);
        self.files_total.store(files, Ordering::Relaxed);
    }

    /// Begins anew: what was counted is not kept.
    pub fn restart(&self) {
        self.bytes_done.store(0, Ordering::Relaxed);
        self.files_done.store(0, Ordering::Relaxed);
        *self.rate.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Counts bytes that were here before.
    pub fn resume(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that arrived.
    pub fn arrived(&self, bytes: u64) {
        let done = self.bytes_done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let now = Instant::now();
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = rate.as_mut() else {
            *rate = Some(Rate { at: now, bytes: done - bytes, bytes_per_s: 0.0 });
            return;
        };
        let seconds = now.duration_since(last.at).as_secs_f64();
        if seconds < 0.1 {
            return;
        }
        let present = to_f64(done.saturating_sub(last.bytes)) / seconds;
        let weight = if last.bytes_per_s == 0.0 { 1.0 } else { 1.0 - (-seconds / RATE_SECONDS).exp() };
        *last = Rate { at: now, bytes: done, bytes_per_s: last.bytes_per_s + weight * (present - last.bytes_per_s) };
    }

    /// Takes back bytes that were counted and turned out wrong.
    pub fn take_back(&self, bytes: u64) {
        let _ =
            self.bytes_done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |done| Some(done.saturating_sub(bytes)));
    }

    /// Counts a sealed file.
    pub fn sealed(&self) {
        self.files_done.fetch_add(1, Ordering::Relaxed);
    }

    /// From now on reads like `other`.
    pub fn follow(&self, other: Arc<Progress>) {
        *self.followed.lock().unwrap_or_else(PoisonError::into_inner) = Some(other);
    }

    /// The counters now.
    pub fn reading(&self) -> Reading {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(other) = followed {
            return other.reading();
        }
        let rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = rate.as_ref().map_or(0.0, |rate| rate.bytes_per_s);
        Reading {
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate is positive and far below 2^63"
            )]
            rate_bytes_per_s: rate as u64,
            files_done: self.files_done.load(Ordering::Relaxed),
            files_total: self.files_total.load(Ordering::Relaxed),
        }
    }
}

fn to_f64(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let value = bytes as f64;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_reads_like_its_leader() {
        let leader = Arc::new(Progress::default());
        let follower = Progress::default();
        follower.expect(1, 1);
        leader.expect(100, 2);
        follower.follow(leader.clone());
        leader.resume(40);
        leader.arrived(10);
        leader.sealed();
        let reading = follower.reading();
        assert_eq!((reading.bytes_done, reading.bytes_total, reading.files_done, reading.files_total), (50, 100, 1, 2));
    }
}
