//! Which ranges of a new file are borrowed: a pure function over its chunks and their known homes.

use std::ops::Range;

use crate::catalog::blobs::{ChunkRow, Home};
use crate::limits::{BORROW_MIN_BYTES, DISK_BLOCK_BYTES};

/// A maximal range of a file whose bytes lie in one piece in one home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First byte in the file.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// Where the same bytes are.
    pub(super) home: Home,
}

impl Run {
    /// Whether the filesystem could share the extents: equal position within a disk block.
    pub(super) fn is_congruent(&self) -> bool {
        self.start % DISK_BLOCK_BYTES == self.home.start % DISK_BLOCK_BYTES
    }
}

/// Joins adjacent chunks with adjacent homes and keeps the runs that are worth a hole. Chunks in order of offset.
pub(super) fn borrowable(chunks: &[(ChunkRow, Option<Home>)]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (chunk, home) in chunks {
        let Some(home) = *home else { continue };
        match runs.last_mut() {
            Some(run)
                if run.home.blob == home.blob
                    && run.start + run.len == chunk.start
                    && run.home.start + run.len == home.start =>
            {
                run.len += chunk.len;
            }
            _ => runs.push(Run { start: chunk.start, len: chunk.len, home }),
        }
    }
    runs.retain(|run| run.len >= BORROW_MIN_BYTES);
    runs
}

/// Whether a chunk has a byte in one of `ranges`, which are in order and do not overlap.
pub(super) fn reaches_into(chunk: &ChunkRow, ranges: &[Range<u64>]) -> bool {
    let next = ranges.partition_point(|range| range.end <= chunk.start);
    ranges.get(next).is_some_and(|range| range.start < chunk.start + chunk.len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    const MIB: u64 = 1 << 20;

    fn chunk(start: u64, len: u64, home: Option<(i64, u64)>) -> (ChunkRow, Option<Home>) {
        let row = ChunkRow { digest: Digest::of(&start.to_le_bytes()), start, len };
        (row, home.map(|(blob, start)| Home { blob, start }))
    }

    #[test]
    fn adjacent_chunks_with_adjacent_homes_are_one_run() {
        let chunks = [
            chunk(0, 40, None),
            chunk(40, MIB, Some((1, 0))),
            chunk(40 + MIB, MIB, Some((1, MIB))),
            chunk(40 + 2 * MIB, MIB, Some((1, 9 * MIB))),
            chunk(40 + 3 * MIB, MIB, Some((2, 10 * MIB))),
        ];
        let runs = borrowable(&chunks);
        let shape: Vec<_> = runs.iter().map(|run| (run.start, run.len, run.home.blob, run.home.start)).collect();
        assert_eq!(shape, [(40, 2 * MIB, 1, 0), (40 + 2 * MIB, MIB, 1, 9 * MIB), (40 + 3 * MIB, MIB, 2, 10 * MIB)]);
        assert!(!runs[0].is_congruent());
    }

    #[test]
    fn a_chunk_reaches_into_what_it_has_a_byte_of() {
        let ranges = [10..20, 30..40];
        for (start, len, reaches) in
            [(0, 10, false), (0, 11, true), (19, 1, true), (20, 10, false), (20, 11, true), (40, 9, false)]
        {
            assert_eq!(reaches_into(&chunk(start, len, None).0, &ranges), reaches, "{start}+{len}");
        }
        assert!(!reaches_into(&chunk(0, 9, None).0, &[]));
    }

    #[test]
    fn short_runs_are_left_alone() {
        assert!(borrowable(&[chunk(0, BORROW_MIN_BYTES - 1, Some((1, 0)))]).is_empty());
    }
}
