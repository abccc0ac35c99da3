//! Bytes of a source as they came, until they are digested and written.
//!
//! What comes in large pieces is kept as it came, uncopied. Small pieces are put together: a source that sends byte by byte must not
//! decide how much memory a megabyte takes, nor keep a buffer alive by each few bytes of it.

use std::io;

use bytes::Bytes;

use crate::error::Result;
use crate::layout::ReadAt;

/// Pieces from this length on are kept as they came.
const LARGE_BYTES: usize = 64 << 10;

/// Small ones are put together up to this length.
const TOGETHER_BYTES: usize = 128 << 10;

/// Longest window in which a whole is shown: two digests, the search for cuts and the write pass over each.
const WINDOW_BYTES: usize = 256 << 10;

/// Pieces in the order in which they came: see the module's page.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    kept: Vec<Bytes>,
    /// Small pieces behind all of `kept`.
    small: Vec<u8>,
    bytes: usize,
}

impl Pieces {
    /// Takes the next piece.
    pub(super) fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        if piece.len() >= LARGE_BYTES {
            self.end_small();
            self.kept.push(piece);
            return;
        }
        self.small.extend_from_slice(&piece);
        if self.small.len() >= TOGETHER_BYTES {
            self.end_small();
        }
    }

    fn end_small(&mut self) {
        if !self.small.is_empty() {
            self.kept.push(std::mem::take(&mut self.small).into());
        }
    }

    /// Bytes taken.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// What was taken, in order; nothing is left.
    pub(super) fn take(&mut self) -> Vec<Bytes> {
        self.end_small();
        self.bytes = 0;
        std::mem::take(&mut self.kept)
    }

    /// What was taken as one sequence of bytes.
    pub(super) fn whole(mut self) -> Whole {
        Whole(self.take())
    }
}

/// Bytes of these pieces together.
pub(super) fn length_of(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// Pieces that are read as one.
#[derive(Debug)]
pub(super) struct Whole(Vec<Bytes>);

impl Whole {
    /// Bytes in all.
    pub(super) fn size(&self) -> u64 {
        length_of(&self.0)
    }

    /// Shows all of it in order, uncopied, in windows that stay in the processor's second-level cache.
    pub(super) fn each_window(&self, each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.0.iter().flat_map(|piece| piece.chunks(WINDOW_BYTES)).try_for_each(each)
    }
}

impl From<Vec<u8>> for Whole {
    fn from(bytes: Vec<u8>) -> Self {
        Self(vec![bytes.into()])
    }
}

impl ReadAt for Whole {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut read = 0;
        for piece in &self.0 {
            let rest = piece.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(piece.len());
            let count = rest.len().min(buffer.len() - read);
            buffer[read..read + count].copy_from_slice(&rest[..count]);
            read += count;
            if read == buffer.len() {
                break;
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(lengths: &[usize]) -> (Pieces, Vec<u8>) {
        let mut pieces = Pieces::default();
        let mut all = Vec::new();
        for &length in lengths {
            let from = all.len();
            all.extend((from..from + length).map(|at| u8::try_from(at % 251).unwrap()));
            pieces.push(Bytes::copy_from_slice(&all[from..]));
        }
        (pieces, all)
    }

    #[test]
    fn what_was_pushed_is_read_at_any_offset() {
        for lengths in [&[][..], &[5], &[5, 5000, 0, 3, 70_000, 1], &[LARGE_BYTES, LARGE_BYTES], &[1; 3]] {
            let (pieces, all) = pushed(lengths);
            assert_eq!(pieces.len(), all.len());
            let whole = pieces.whole();
            for offset in [0, 1, 4, 5, 6, 4999, 5004, 5005, 75_007, all.len(), all.len() + 9] {
                for length in [0, 1, 7, 80_000] {
                    let mut buffer = vec![0; length];
                    let read = whole.read_at(offset as u64, &mut buffer).unwrap();
                    let rest = all.get(offset..).unwrap_or_default();
                    assert_eq!(buffer[..read], rest[..rest.len().min(length)], "{lengths:?} {offset} {length}");
                }
            }
        }
    }

    #[test]
    fn windows_show_all_of_it_in_order_and_none_is_long() {
        for lengths in [
            &[][..],
            &[5],
            &[WINDOW_BYTES],
            &[WINDOW_BYTES * 2 + 1],
            &[5, WINDOW_BYTES, 70_000],
            &[0, 5000, 1, WINDOW_BYTES * 3],
        ] {
            let (pieces, all) = pushed(lengths);
            let mut windows = Vec::new();
            let mut keep = |window: &[u8]| {
                windows.push(window.to_vec());
                Ok(())
            };
            pieces.whole().each_window(&mut keep).unwrap();
            assert_eq!(windows.concat(), all);
            assert!(windows.iter().all(|window| (1..=WINDOW_BYTES).contains(&window.len())), "{lengths:?}");
        }
    }

    #[test]
    fn small_pieces_are_put_together_and_large_ones_kept() {
        let (mut bytewise, all) = pushed(&[1; 200_000]);
        let pieces = bytewise.take();
        assert_eq!(pieces.concat(), all);
        assert_eq!(pieces.len(), 2, "a piece for each byte would take 32 times the memory");
        assert_eq!(bytewise.len(), 0);
        let (mut large, all) = pushed(&[3, 70_000, 70_001]);
        let pieces = large.take();
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [3, 70_000, 70_001]);
        assert_eq!(pieces.concat(), all);
    }
}
