//! What becomes of rotten bytes: kept for examination, then put right from a copy on this host, or else lost and said to be.
//!
//! **Healing** writes right bytes over wrong ones, in place, once their digest was checked. **Losing** comes in this order: what others borrow of the
//! file and is right is brought into them ([`rescue`](super::rescue)); the file leaves for `quarantine/` durably, unless another has taken its place; who
//! has it open through the daemon gets errors from now on; then the rows say so, of the blob and of the checkpoints that need it in one transaction. A
//! crash in between leaves a blob without a file, which the next scrub finds and loses. Wrong bytes are never given to a reader once they are known,
//! save what the kernel has: pages of its cache, and files that it was given for passthrough and that a job still has open.
//!
//! A **manifest** has no other copy: who has it open goes on with it, nobody else is shown the checkpoint.
//!
//! **Coming back** is an ingest: a retry of the checkpoint, which begins by itself where it can. A session that showed it goes on with the new file from
//! the next open; where the file was lost because of what it borrowed, the job must be attached anew, since a session's readers know from their
//! beginning what is borrowed.

use std::os::unix::fs::FileExt as _;

use rusqlite::Connection;

use super::Store;
use super::verify::{Rot, Verdict};
use crate::catalog::blobs::BlobRow;
use crate::catalog::checkpoints::{self, Failure};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::losses::{BYTES_ROTTEN, MANIFEST_DAMAGED};
use crate::catalog::scrubs::{self, NamedFile};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::units::now_unix_ms;

/// Events that one rotten blob may make: more checkpoints have the failure in their records.
const EVENTS: usize = 16;

impl Store {
    /// Puts rotten ranges of a blob right from other copies on this host, with an event; what is to be said of the blob then. Blocks.
    ///
    /// # Errors
    /// Poisoned store, the I/O error.
    pub fn heal(&self, blob: &BlobRow, rotten: &[Rot]) -> Result<Verdict> {
        for rot in rotten {
            let Some(bytes) = self.right_bytes(rot)? else { return Ok(Verdict::Rotten(rotten.to_vec())) };
            if let Err(error) = self.keep_what_is_there(rot) {
                tracing::warn!(blob = %rot.holder.digest, error = %error.report(), "what rotted is not kept");
            }
            self.disk().mend(&rot.holder.digest, rot.holder_start, &bytes)?;
        }
        let verdict = self.verify(blob, &mut |_| true)?;
        if matches!(verdict, Verdict::Right) {
            let (blob, rotten) = (*blob, rotten.to_vec());
            let what = "were not what they should be, and were put right";
            self.catalog().write_blocking(move |tx| tell(tx, &blob, &rotten, what, None))?;
        }
        Ok(verdict)
    }

    /// Gives rotten bytes up: their files leave for quarantine, and checkpoints that need them have a failure. Returns the blobs that have copies
    /// of them for their own now, which are to be read again. `None`: another file has the place of one that was rotten, or is about to, and the
    /// blob is to be read again itself. Blocks.
    ///
    /// # Errors
    /// Poisoned store, the I/O error.
    pub fn lose(&self, blob: &BlobRow, rotten: &[Rot]) -> Result<Option<Vec<BlobRow>>> {
        let mut holders: Vec<(BlobRow, i64)> = rotten.iter().map(|rot| (rot.holder, rot.verified_ms)).collect();
        holders.sort_unstable_by_key(|(holder, _)| holder.id);
        holders.dedup_by_key(|(holder, _)| holder.id);
        let mut copies = Vec::new();
        let mut is_all = true;
        for (holder, verified_ms) in holders {
            // Held until the rows say that what was brought is the borrowers' own.
            let _held = self.bring_to_borrowers(&holder, rotten)?;
            if !self.put_away(holder, verified_ms)? {
                is_all = false;
                continue;
            }
            self.holds.mark_lost(&holder.digest);
            let (read, ranges) = (blob.id, rotten.to_vec());
            // All of it or nothing: nobody looks again at what is lost already.
            let lost = self.catalog().write_blocking(move |tx| {
                let lost = scrubs::lose(tx, &holder)?;
                let failure = Failure::of(&rotted());
                for broken in &lost.broken {
                    let ranges = if broken.id == read { ranges.as_slice() } else { &[] };
                    let what = "are rotten and there is no other copy here: they are lost";
                    tell(tx, broken, ranges, what, Some(&failure))?;
                }
                Ok(lost)
            })?;
            copies.extend(lost.copies);
        }
        Ok(is_all.then_some(copies))
    }

    /// Takes a file out of sight, durably, if it is the one that was read; one that is gone already is out of sight.
    fn put_away(&self, holder: BlobRow, verified_ms: i64) -> Result<bool> {
        let disk = self.disk().clone();
        // Others wait for whoever writes: the disk is waited for afterwards.
        let is_away = self.catalog().write_blocking(move |tx| {
            if !scrubs::is_file_of(tx, &holder, verified_ms)? {
                return Ok(false);
            }
            match disk.quarantine(&holder.digest) {
                Err(error) if error.kind() != Kind::NotFound => Err(error),
                _ => Ok(true),
            }
        })?;
        if is_away {
            self.disk().sync_directories(std::iter::once(&holder.digest))?;
        }
        Ok(is_away)
    }

    /// Whether the manifest of a tree is what it should be. If not, ready checkpoints that have it have a failure, and each an event. Blocks.
    ///
    /// # Errors
    /// Those of the catalog.
    pub fn check_manifest(&self, tree: &Digest) -> Result<bool> {
        let tree = *tree;
        let read = self.catalog().read_blocking(move |tx| checkpoints::manifest(tx, &tree).map(drop));
        let error = match read {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == Kind::Corrupt => error,
            Err(error) => return Err(error),
        };
        tracing::error!(error = %error.report(), "a manifest is damaged");
        self.catalog().write_blocking(move |tx| {
            let known = |record: &checkpoints::Record| {
                record.failure.as_ref().is_some_and(|failure| failure.reason == MANIFEST_DAMAGED)
            };
            let failure = Failure::of(&undescribed());
            for record in checkpoints::ready_of(tx, &tree)?.into_iter().filter(|record| !known(record)) {
                scrubs::set_failure(tx, &record.id, &failure)?;
                let message = format!("the list of the files of `{}` is damaged in the catalog", record.name);
                let event = NewEvent { kind: MANIFEST_DAMAGED, checkpoint: record.id, message, ..Default::default() };
                events::record(tx, now_unix_ms(), &event)?;
            }
            Ok(())
        })?;
        Ok(false)
    }

    /// The bytes that should be there, from a copy whose digest is right.
    fn right_bytes(&self, rot: &Rot) -> Result<Option<Vec<u8>>> {
        let Some(wanted) = rot.digest else { return Ok(None) };
        let (holder, range) = (rot.holder.id, rot.holder_start..rot.holder_start + rot.len);
        let mut copies = self.catalog().read_blocking(move |tx| scrubs::copies_of(tx, holder, &range))?;
        copies.extend(rot.home);
        let mut bytes = vec![0; usize::try_from(rot.len).unwrap_or(0)];
        for (copy, start) in copies {
            let read = self.disk().open_blob(&copy).is_ok_and(|file| file.read_exact_at(&mut bytes, start).is_ok());
            if read && Digest::of(&bytes) == wanted {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    fn keep_what_is_there(&self, rot: &Rot) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(rot.len).unwrap_or(0)];
        let file = self.disk().open_blob(&rot.holder.digest)?;
        file.read_exact_at(&mut bytes, rot.holder_start)
            .map_err(|error| Error::io("reading", self.disk().blob_path(&rot.holder.digest), error))?;
        self.disk().keep_rotten(&rot.holder.digest, rot.holder_start, &bytes)
    }
}

/// Says in the events which file of which checkpoints it is about, and notes `failure` in their records. What was put right is the operator's
/// to know: that there was another copy would tell an owner that somebody else has the same.
fn tell(tx: &Connection, blob: &BlobRow, ranges: &[Rot], what: &str, failure: Option<&Failure>) -> Result<()> {
    let where_ = in_words(ranges, blob.size);
    let mut files = scrubs::files_of(tx, blob)?;
    if let Some(failure) = failure {
        files.iter().try_for_each(|file| scrubs::set_failure(tx, &file.id, failure))?;
    }
    if files.is_empty() {
        files.push(NamedFile { id: String::new(), name: blob.digest.to_hex(), path: "the blob".to_owned() });
    }
    for file in files.into_iter().take(EVENTS) {
        let message = format!("`{}` of `{}`: {where_} {what}", file.path, file.name);
        let (kind, operators_only) = (BYTES_ROTTEN, failure.is_none());
        let event = NewEvent { kind, checkpoint: file.id, message, operators_only, ..Default::default() };
        events::record(tx, now_unix_ms(), &event)?;
    }
    Ok(())
}

/// What a checkpoint fails with whose bytes are lost.
fn rotted() -> Error {
    Error::corrupt(BYTES_ROTTEN, "bytes of it rotted on this host's disk and are lost; the rest of it is right")
        .remedy("`ckptctl retry` fetches it again; see `ckptctl events` for the files")
}

/// What a checkpoint fails with whose manifest is damaged.
fn undescribed() -> Error {
    Error::corrupt(MANIFEST_DAMAGED, "the list of its files is damaged in the catalog of this host")
        .remedy("`ckptctl retry` fetches it again")
}

fn in_words(ranges: &[Rot], size: u64) -> String {
    match ranges {
        [] => format!("some of its {size} bytes"),
        [rot] if rot.digest.is_none() => format!("some of its {size} bytes"),
        [rot] => format!("{} bytes from {} on", rot.len, rot.start),
        [first, .., last] => {
            let bytes: u64 = ranges.iter().map(|rot| rot.len).sum();
            format!("{bytes} bytes in {} ranges between {} and {}", ranges.len(), first.start, last.start + last.len)
        }
    }
}

#[cfg(test)]
mod tests;
