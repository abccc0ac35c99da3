//! Bytes by offset, and a bounded, buffered way through the structure at the head or tail of a file.
//!
//! [`Input`] is how every format is read here: it never goes beyond the end it was given, holds 64 KiB, and
//! allocates nothing by a length that the file claims.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Buffer of an [`Input`].
const BUFFER_BYTES: usize = 64 << 10;

/// Bytes that can be read at any offset.
pub trait ReadAt {
    /// Reads some bytes at `offset` into `buf` and tells how many; 0 only at the end.
    ///
    /// # Errors
    /// Whatever the medium says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or(&[]);
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl ReadAt for &[u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buf)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.as_slice().read_at(offset, buf)
    }
}

/// A range of other bytes, as if it were a file of its own.
pub(super) struct Slice<'a> {
    pub(super) bytes: &'a dyn ReadAt,
    pub(super) start: u64,
    pub(super) len: u64,
}

impl ReadAt for Slice<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let count = left.min(buf.len());
        self.bytes.read_at(self.start.saturating_add(offset), &mut buf[..count])
    }
}

/// Other bytes, of which no more than a budget can be read: archives hold many headers.
pub(super) struct Metered<'a> {
    bytes: &'a dyn ReadAt,
    left: Cell<u64>,
}

impl<'a> Metered<'a> {
    pub(super) fn new(bytes: &'a dyn ReadAt, budget: u64) -> Self {
        Self { bytes, left: Cell::new(budget) }
    }
}

impl ReadAt for Metered<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get().checked_sub(buf.len() as u64).ok_or(io::ErrorKind::QuotaExceeded)?;
        self.left.set(left);
        self.bytes.read_at(offset, buf)
    }
}

/// Fills `buf` from `offset`, or `None` if the bytes end before or cannot be read.
pub(super) fn fill(bytes: &dyn ReadAt, mut offset: u64, mut buf: &mut [u8]) -> Option<()> {
    while !buf.is_empty() {
        let count = read_some(bytes, offset, buf).ok().filter(|count| *count > 0)?;
        offset = offset.checked_add(count as u64)?;
        buf = buf.get_mut(count..)?;
    }
    Some(())
}

/// One read, begun again if a signal interrupts it.
fn read_some(bytes: &dyn ReadAt, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match bytes.read_at(offset, buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// The `N` bytes at `offset`.
pub(super) fn array_at<const N: usize>(bytes: &dyn ReadAt, offset: u64) -> Option<[u8; N]> {
    let mut array = [0; N];
    fill(bytes, offset, &mut array)?;
    Some(array)
}

/// Little-endian integer in a fixed-size record.
pub(super) fn u16_in(record: &[u8], at: usize) -> Option<u16> {
    record.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

/// Little-endian integer in a fixed-size record.
pub(super) fn u32_in(record: &[u8], at: usize) -> Option<u32> {
    record.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// Little-endian integer in a fixed-size record.
pub(super) fn u64_in(record: &[u8], at: usize) -> Option<u64> {
    record.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

/// Reads forwards from one offset, never past another.
pub(super) struct Input<'a> {
    bytes: &'a dyn ReadAt,
    /// Offset of the first byte that is not yet in the buffer.
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl<'a> Input<'a> {
    /// Reads `bytes` in `start..end`.
    pub(super) fn new(bytes: &'a dyn ReadAt, start: u64, end: u64) -> Self {
        Self { bytes, next: start, end, buffer: Vec::new(), used: 0 }
    }

    /// Offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.next - self.held() as u64
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut array = [0; N];
        self.fill(&mut array)?;
        Some(array)
    }

    /// The next four bytes as a little-endian integer.
    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes as a little-endian integer.
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next `count` bytes into `buf`, replacing what is there; 64 KiB at most, by the type.
    pub(super) fn short(&mut self, count: u16, buf: &mut Vec<u8>) -> Option<()> {
        buf.resize(usize::from(count), 0);
        self.fill(buf)
    }

    /// Leaves out `count` bytes, which must be there by the bounds.
    pub(super) fn skip(&mut self, count: u64) -> Option<()> {
        let target = self.offset().checked_add(count).filter(|target| *target <= self.end)?;
        if target <= self.next {
            self.used = self.buffer.len() - usize::try_from(self.next - target).ok()?;
        } else {
            self.next = target;
            self.buffer.clear();
            self.used = 0;
        }
        Some(())
    }

    fn held(&self) -> usize {
        self.buffer.len() - self.used
    }

    fn fill(&mut self, mut buf: &mut [u8]) -> Option<()> {
        while !buf.is_empty() {
            let count = self.take(buf).ok().filter(|count| *count > 0)?;
            buf = &mut buf[count..];
        }
        Some(())
    }

    fn take(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.held() == 0 {
            self.refill()?;
        }
        let count = self.held().min(buf.len());
        buf[..count].copy_from_slice(&self.buffer[self.used..self.used + count]);
        self.used += count;
        Ok(count)
    }

    fn refill(&mut self) -> io::Result<()> {
        let left = usize::try_from(self.end.saturating_sub(self.next)).unwrap_or(usize::MAX);
        self.used = 0;
        self.buffer.resize(left.min(BUFFER_BYTES), 0);
        let read = read_some(self.bytes, self.next, &mut self.buffer);
        let count = *read.as_ref().unwrap_or(&0);
        self.buffer.truncate(count);
        self.next += self.buffer.len() as u64;
        read.map(|_| ())
    }
}

impl io::Read for Input<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.take(buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_never_passes_its_end_and_keeps_its_place() {
        let bytes: Vec<u8> = (0..200_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let mut input = Input::new(&bytes, 10, 150_000);
        assert_eq!(input.array::<2>(), Some([10, 11]));
        assert_eq!(input.offset(), 12);
        input.skip(100).unwrap();
        assert_eq!((input.offset(), input.array::<1>().unwrap()[0]), (112, 112));
        input.skip(100_000).unwrap();
        assert_eq!(input.offset(), 100_113);
        assert_eq!(u64::from(input.array::<1>().unwrap()[0]), 100_113 & 0xFF);
        assert!(input.skip(u64::MAX).is_none() && input.skip(49_887).is_none());
        input.skip(49_886).unwrap();
        assert!(input.array::<1>().is_none());
    }

    #[test]
    fn a_file_shorter_than_promised_is_no_panic() {
        let bytes = b"abc".to_vec();
        let mut input = Input::new(&bytes, 0, 1 << 40);
        assert!(input.u64().is_none());
    }

    #[test]
    fn a_slice_shows_its_range_only() {
        let bytes = b"0123456789".to_vec();
        let slice = Slice { bytes: &bytes, start: 3, len: 4 };
        let mut buf = [0; 10];
        assert_eq!(slice.read_at(1, &mut buf).unwrap(), 3);
        assert_eq!(&buf[..3], b"456");
        assert_eq!(slice.read_at(9, &mut buf).unwrap(), 0);
    }
}
