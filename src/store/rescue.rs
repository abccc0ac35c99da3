//! What is right of a home whose bytes rotted, brought into those that borrow it before its file goes.
//!
//! A borrower gets all that it lacks of the home, or nothing: where a range that it lacks is among the rotten ones, or the disk has no room, it is lost with
//! the home. Chunks are digested before they are copied. What is in no chunk any more is copied as it is, and found out when the borrower is read
//! again, which whoever loses the home has done.
//!
//! Order, as of hydration: bytes into the borrower, `fdatasync`, rows marked filled. A crash after that leaves copies of a home that the next scrub
//! finds to be rotten again. Borrowers are held from before their rows are read until what they have is their own, so that nobody gives the copies up.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::Store;
use super::read::Hold;
use super::verify::Rot;
use crate::catalog::blobs::{self, BlobRow, Borrow, ChunkRow};
use crate::catalog::{retention, scrubs};
use crate::digest::Digest;
use crate::error::Result;

impl Store {
    /// Brings what others lack and `home` has right into them; those that got theirs are held by what is returned. Blocks.
    ///
    /// # Errors
    /// Poisoned store, those of the catalog. One that cannot be brought anything is none: it is left as it was.
    pub(super) fn bring_to_borrowers(&self, home: &BlobRow, rotten: &[Rot]) -> Result<Vec<Hold>> {
        let rotten: Vec<&Rot> = rotten.iter().filter(|rot| rot.holder.id == home.id).collect();
        // Of a home that is not there nothing is right.
        let Ok(file) = self.disk().open_blob(&home.digest) else { return Ok(Vec::new()) };
        let id = home.id;
        let mut held = Vec::new();
        for borrower in self.catalog().read_blocking(move |tx| scrubs::in_need_of(tx, id))? {
            let hold = self.hold(borrower.digest);
            match self.bring_to(&borrower, home, &file, &rotten) {
                Ok(true) => held.push(hold),
                Ok(false) => {}
                Err(error) => {
                    self.disk().check_healthy()?;
                    let error = error.report();
                    tracing::warn!(blob = %borrower.digest, home = %home.digest, error, "what is right of a home is not kept");
                }
            }
        }
        Ok(held)
    }

    /// Whether the borrower has all that it lacked of its home now.
    fn bring_to(&self, borrower: &BlobRow, home: &BlobRow, from: &File, rotten: &[&Rot]) -> Result<bool> {
        let disk = self.disk();
        let file = disk.open_sealed(&borrower.digest)?;
        let (blob, of) = (*borrower, *home);
        let needed = self.catalog().read_blocking(move |tx| scrubs::needed(tx, &blob, &of))?;
        let is_right = |(borrow, chunks): &(Borrow, Vec<ChunkRow>)| {
            may_be_right(borrow, chunks, rotten) && chunks.iter().all(|chunk| has(from, chunk))
        };
        if needed.is_empty() || !needed.iter().all(is_right) {
            return Ok(false);
        }
        disk.check_room(needed.iter().map(|(borrow, _)| borrow.len).sum())?;
        for (borrow, _) in &needed {
            file.bring_home(disk, borrow.start..borrow.start + borrow.len, &home.digest, borrow.home_start)?;
        }
        let stored = file.flush(disk)?;
        let starts: Vec<u64> = needed.iter().map(|(borrow, _)| borrow.start).collect();
        let id = file.id()?;
        let is_brought = self.catalog().write_blocking(move |tx| {
            if !file.bears_its_name() || scrubs::needed(tx, &blob, &of)? != needed {
                return Ok(false);
            }
            retention::keep_duplicates(tx, blob.id, &starts)?;
            blobs::set_stored_bytes(tx, blob.id, stored).map(|()| true)
        })?;
        if is_brought {
            // Who reads the borrower already knows it as its rows were.
            self.holds.set_brought(&borrower.digest, id, &home.digest);
        }
        Ok(is_brought)
    }
}

/// Whether nothing is known against a range, before its chunks are read: rot that is somewhere in the file is not in a chunk that is right.
fn may_be_right(borrow: &Borrow, chunks: &[ChunkRow], rotten: &[&Rot]) -> bool {
    let range = borrow.home_start..borrow.home_start + borrow.len;
    rotten.iter().all(|rot| match rot.digest {
        Some(_) => rot.holder_start >= range.end || rot.holder_start + rot.len <= range.start,
        None => are_all_of(chunks, &range),
    })
}

/// Whether chunks, in order of offset, leave nothing out of `range`.
fn are_all_of(chunks: &[ChunkRow], range: &Range<u64>) -> bool {
    let end = chunks
        .iter()
        .fold(range.start, |end, chunk| if chunk.start <= end { end.max(chunk.start + chunk.len) } else { end });
    end >= range.end
}

fn has(file: &File, chunk: &ChunkRow) -> bool {
    let mut bytes = vec![0; usize::try_from(chunk.len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, chunk.start).is_ok() && Digest::of(&bytes) == chunk.digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rot_that_is_somewhere_is_not_in_what_chunks_cover() {
        let blob = BlobRow { id: 1, digest: Digest::of(b"home"), size: 100 };
        let rot = |start, len, digest| Rot {
            start,
            len,
            digest,
            holder: blob,
            holder_start: start,
            verified_ms: 0,
            home: None,
        };
        let chunk = |start, len| ChunkRow { digest: Digest::of(b"chunk"), start, len };
        let borrow = Borrow { start: 0, len: 20, home: blob.digest, home_start: 40, filled: false };
        let here = Some(Digest::of(b"right"));
        for (rot, chunks, may_be) in [
            (rot(0, 40, here), vec![], true),
            (rot(0, 41, here), vec![], false),
            (rot(60, 1, here), vec![], true),
            (rot(59, 1, here), vec![chunk(40, 20)], false),
            (rot(0, 100, None), vec![chunk(40, 20)], true),
            (rot(0, 100, None), vec![chunk(40, 10), chunk(50, 10)], true),
            (rot(0, 100, None), vec![chunk(40, 10), chunk(51, 9)], false),
            (rot(0, 100, None), vec![chunk(40, 19)], false),
            (rot(0, 100, None), vec![], false),
        ] {
            assert_eq!(may_be_right(&borrow, &chunks, &[&rot]), may_be, "{rot:?} {chunks:?}");
        }
    }
}
