//! What is told of a scrub.

use serde::Serialize;

use crate::control::wire;
use crate::units;

/// The answer of `scrub`, and the last one in `status`.
#[derive(Serialize)]
pub(in crate::cli) struct Scrub {
    running: bool,
    by_hand: bool,
    started_at: String,
    ended_at: Option<String>,
    took_ms: Option<u64>,
    files: u64,
    bytes: u64,
    total_bytes: u64,
    healed: u64,
    lost: u64,
    unread: u64,
    stopped: bool,
}

impl From<&wire::Scrub> for Scrub {
    fn from(scrub: &wire::Scrub) -> Self {
        Self {
            running: scrub.running,
            by_hand: scrub.by_hand,
            started_at: units::rfc3339(scrub.started_unix_ms),
            took_ms: u64::try_from(scrub.ended_unix_ms - scrub.started_unix_ms).ok(),
            ended_at: (scrub.ended_unix_ms > 0).then(|| units::rfc3339(scrub.ended_unix_ms)),
            files: scrub.files,
            bytes: scrub.bytes,
            total_bytes: scrub.total_bytes,
            healed: scrub.healed,
            lost: scrub.lost,
            unread: scrub.unread,
            stopped: scrub.stopped,
        }
    }
}
