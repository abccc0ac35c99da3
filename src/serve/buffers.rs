//! Buffers for answers to reads, shared by all sessions.
//!
//! A loop needs 1 MiB while it answers a read and nothing between reads. Were the buffer the thread's own, a hundred
//! sessions that have each been read once would keep some hundreds of MiB. So buffers are lent: as many exist as reads
//! are being answered, and [`KEPT`] stay for the next ones, last returned first, so that they are warm in the processor.

use std::sync::{Mutex, PoisonError};

/// Longest read that the kernel is told to ask for: 256 pages of 4 KiB, the kernel's default upper bound.
pub const READ_BYTES: u32 = 1 << 20;

/// Buffers kept between reads, 1 MiB each.
const KEPT: usize = 8;

/// The lent buffers of a process.
#[derive(Debug, Default)]
pub struct ReadBuffers(Mutex<Vec<Box<[u8]>>>);

impl ReadBuffers {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends `length` bytes, at most [`READ_BYTES`], to `work`; their content is arbitrary.
    pub fn lend<T>(&self, length: u32, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut buffer = self.take();
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        let answer = work(&mut buffer[..length]);
        self.put_back(buffer);
        answer
    }

    fn take(&self) -> Box<[u8]> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| vec![0; usize::try_from(READ_BYTES).unwrap_or(1 << 20)].into())
    }

    fn put_back(&self, buffer: Box<[u8]>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_are_lent_again() {
        let buffers = ReadBuffers::new();
        let first = buffers.lend(10, |buffer| {
            assert_eq!(buffer.len(), 10);
            buffer.as_ptr()
        });
        assert_eq!(buffers.lend(u32::MAX, |buffer| (buffer.as_ptr(), buffer.len())), (first, 1 << 20));
    }

    #[test]
    fn no_more_are_kept_than_the_bound() {
        fn nest(buffers: &ReadBuffers, depth: usize) {
            if depth > 0 {
                buffers.lend(1, |_| nest(buffers, depth - 1));
            }
        }
        let buffers = ReadBuffers::new();
        nest(&buffers, 2 * KEPT);
        assert_eq!(buffers.0.lock().unwrap().len(), KEPT);
    }
}
