//! Scrubbing by hand, and what is told of it.

use super::caller::Caller;
use super::{Floors, wire};
use crate::error::{Error, Result};
use crate::retain::scrub::Report;

impl Floors {
    /// Has all blobs, or those of a checkpoint, read again.
    pub(super) async fn start_scrub(&self, request: wire::StartScrubRequest, caller: &Caller) -> Result<wire::Scrub> {
        self.admit()?;
        let scope = if request.checkpoint.is_empty() {
            None
        } else {
            let record = self.find(request.checkpoint, caller).await?;
            let stored = record.ready_manifest().filter(|_| record.in_place.is_none());
            Some(stored.ok_or_else(|| {
                Error::wrong_state("NOT_STORED", format!("the bytes of `{}` are not in the store", record.name))
                    .remedy("name one that is ready, or none")
            })?)
        };
        self.scrubber.begin(scope, request.full_rate).map(shown)
    }

    /// The scrub that goes on, or the last one; `None` where there was none since the start.
    pub(super) fn last_scrub(&self) -> Option<wire::Scrub> {
        let report = self.scrubber.report();
        (report.started_ms > 0).then(|| shown(report))
    }
}

fn shown(report: Report) -> wire::Scrub {
    wire::Scrub {
        running: report.running,
        by_hand: report.by_hand,
        started_unix_ms: report.started_ms,
        ended_unix_ms: report.ended_ms,
        files: report.blobs,
        bytes: report.bytes,
        total_bytes: report.total_bytes,
        healed: report.healed,
        lost: report.lost,
        stopped: report.stopped,
        unread: report.unread,
    }
}
