//! Bytes that come in order, in pieces that somebody else allocated.
//!
//! What is large is handed on as it came: of a tar that is not compressed the bytes of a file are never copied on their way through here.
//! What is small is put together, for the reasons that [`pieces`](crate::pieces) has.

use std::io::{self, Read};

use bytes::Bytes;

/// Bytes in order, each once.
pub trait Stream: Send {
    /// How many bytes there are in one piece, the next one being waited for where there are none; 0 at the end.
    ///
    /// # Errors
    /// What keeps the next piece from coming; an [`Error`](crate::error::Error) inside reaches who takes the members as it is.
    fn at_hand(&mut self) -> io::Result<usize>;

    /// The next bytes: at most as many as are [at hand](Stream::at_hand).
    fn take(&mut self, length: usize) -> Bytes;
}

/// Another stream behind bytes that were taken of it to look at.
pub(super) struct Begun<'a> {
    pub(super) start: Bytes,
    pub(super) rest: Box<dyn Stream + 'a>,
}

impl Stream for Begun<'_> {
    fn at_hand(&mut self) -> io::Result<usize> {
        if self.start.is_empty() { self.rest.at_hand() } else { Ok(self.start.len()) }
    }

    fn take(&mut self, length: usize) -> Bytes {
        if self.start.is_empty() { self.rest.take(length) } else { self.start.split_to(length.min(self.start.len())) }
    }
}

/// A stream whose bytes are copied out of it.
pub(super) struct Copied<'a>(pub(super) Box<dyn Stream + 'a>);

impl Read for Copied<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        copy(self.0.as_mut(), buffer)
    }
}

/// Copies what is at hand, as far as there is room; 0 at the end.
pub(super) fn copy(stream: &mut (dyn Stream + '_), buffer: &mut [u8]) -> io::Result<usize> {
    let length = stream.at_hand()?.min(buffer.len());
    buffer[..length].copy_from_slice(&stream.take(length));
    Ok(length)
}
