//! The read-ahead of the disk that the store is on.
//!
//! With passthrough the kernel reads blobs itself, and how much it reads at a time, for a page fault as for a read, is a property of
//! the whole disk. Its default of 128 KiB is made for spinning disks and small files: weights come in at a fraction of what the disk gives,
//! in small folios that are slow to map. So it is raised to what weights want, and never lowered. It stays raised after the
//! daemon: jobs go on reading.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Raises the read-ahead of the disk below `opened` to `bytes`. Returns what it was and what it is, in KiB.
///
/// # Errors
/// The disk has none that could be set, or it cannot be written: a sentence.
pub(super) fn raise(opened: &File, bytes: u64) -> Result<(u64, u64), String> {
    let device = opened.metadata().map_err(|error| error.to_string())?.dev();
    let knob = knob_of(device).ok_or("its disk has no queue of its own")?;
    let text = std::fs::read_to_string(&knob).map_err(|error| format!("reading {}: {error}", knob.display()))?;
    let before: u64 = text.trim().parse().map_err(|_| format!("{} holds no number", knob.display()))?;
    let wanted = bytes >> 10;
    if before >= wanted {
        return Ok((before, before));
    }
    std::fs::write(&knob, wanted.to_string()).map_err(|error| format!("writing {}: {error}", knob.display()))?;
    Ok((before, wanted))
}

/// A partition's queue is its disk's.
fn knob_of(device: u64) -> Option<PathBuf> {
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let device = Path::new(&device).canonicalize().ok()?;
    [device.join("queue/read_ahead_kb"), device.parent()?.join("queue/read_ahead_kb")]
        .into_iter()
        .find(|knob| knob.exists())
}
