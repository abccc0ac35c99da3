//! The bytes of an archive as they come: in runs of any length, which are handed on as they are where nothing has to be decoded.

use std::io::{self, BufRead, Read};

use bytes::{Buf as _, Bytes};

use super::input::{Meter, count};
use crate::layout::ReadAt;

/// Bytes read from a file at a time.
const READ_BYTES: usize = 128 << 10;

/// A stream of bytes in runs.
pub trait Runs {
    /// The next bytes; none at the end, and from then on.
    ///
    /// # Errors
    /// What the stream fails with; an [`Error`](crate::error::Error) inside reaches who takes the members as it is.
    fn next_run(&mut self) -> io::Result<Bytes>;
}

/// Reads runs, as they are or byte by byte, and counts them as they are taken.
pub(super) struct Reader<'a> {
    runs: Box<dyn Runs + 'a>,
    present: Bytes,
    meter: Meter,
}

impl<'a> Reader<'a> {
    pub(super) fn new(runs: Box<dyn Runs + 'a>, meter: Meter) -> Self {
        Self { runs, present: Bytes::new(), meter }
    }

    /// What counts the bytes that are taken.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The first bytes, which stay: as many as `length`, fewer only where there are no more.
    pub(super) fn start(&mut self, length: usize) -> io::Result<&[u8]> {
        while self.present.len() < length {
            let run = self.next()?;
            if run.is_empty() {
                break;
            }
            self.present = if self.present.is_empty() { run } else { [&*self.present, &*run].concat().into() };
        }
        Ok(&self.present[..length.min(self.present.len())])
    }

    /// The next bytes, `most` at most, as they came; none only at the end.
    pub(super) fn run(&mut self, most: usize) -> io::Result<Bytes> {
        let most = self.fill_buf()?.len().min(most);
        Ok(self.present.split_to(most))
    }

    fn next(&mut self) -> io::Result<Bytes> {
        loop {
            match self.runs.next_run() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                run => return run.inspect(|run| self.meter.take(run.len())),
            }
        }
    }
}

impl BufRead for Reader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.present.is_empty() {
            self.present = self.next()?;
        }
        Ok(&self.present)
    }

    fn consume(&mut self, length: usize) {
        self.present.advance(length);
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.len().min(buffer.len());
        self.present.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// A range of what is read at offsets.
pub(super) struct FileRange<'a> {
    bytes: &'a (dyn ReadAt + Send),
    at: u64,
    end: u64,
    /// What is read into next.
    buffer: Vec<u8>,
}

impl<'a> FileRange<'a> {
    /// `length` bytes from `start`, or up to the end.
    pub(super) fn new(bytes: &'a (dyn ReadAt + Send), start: u64, length: u64) -> Self {
        Self { bytes, at: start, end: start.saturating_add(length), buffer: Vec::new() }
    }
}

impl Runs for FileRange<'_> {
    fn next_run(&mut self) -> io::Result<Bytes> {
        let most = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(READ_BYTES);
        if most == 0 {
            return Ok(Bytes::new());
        }
        self.buffer.resize(most, 0);
        let length = self.bytes.read_at(self.at, &mut self.buffer)?;
        self.at += count(length);
        if length < most / 2 {
            // A source gives as much as it has: the buffer is for the next run as well.
            return Ok(Bytes::copy_from_slice(&self.buffer[..length]));
        }
        self.buffer.truncate(length);
        Ok(std::mem::take(&mut self.buffer).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interrupted before each run.
    struct Given(Vec<&'static [u8]>, bool);

    impl Runs for Given {
        fn next_run(&mut self) -> io::Result<Bytes> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(if self.0.is_empty() { Bytes::new() } else { Bytes::from_static(self.0.remove(0)) })
        }
    }

    fn reader(runs: &[&'static [u8]]) -> Reader<'static> {
        Reader::new(Box::new(Given(runs.to_vec(), false)), Meter::default())
    }

    #[test]
    fn what_was_looked_at_first_is_read_all_the_same() {
        let mut reader = reader(&[b"ab", b"c", b"defg", b"h"]);
        assert_eq!(reader.start(4).unwrap(), b"abcd");
        assert_eq!(reader.run(3).unwrap(), b"abc"[..]);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"defgh");
        assert!(reader.run(1).unwrap().is_empty());
        assert!(reader.start(1).unwrap().is_empty());
    }

    #[test]
    fn a_run_is_handed_on_as_it_came() {
        static RUN: &[u8] = &[7; 1000];
        let mut reader = reader(&[RUN]);
        let [first, second] = [reader.run(10).unwrap(), reader.run(5000).unwrap()];
        assert_eq!((first.as_ptr(), first.len()), (RUN.as_ptr(), 10));
        assert_eq!((second.as_ptr(), second.len()), (RUN[10..].as_ptr(), 990));
    }

    #[test]
    fn a_range_ends_where_it_is_to_or_where_the_file_does() {
        let file: Vec<u8> = (0..3 * READ_BYTES + 5).map(|at| u8::try_from(at % 251).unwrap()).collect();
        for (start, length) in [(0, file.len()), (7, 10), (1, READ_BYTES), (READ_BYTES, usize::MAX), (file.len(), 3)] {
            let range = FileRange::new(&file, start as u64, length as u64);
            let mut read = Vec::new();
            Reader::new(Box::new(range), Meter::default()).read_to_end(&mut read).unwrap();
            assert_eq!(read, file[start..start.saturating_add(length).min(file.len())]);
        }
    }
}
