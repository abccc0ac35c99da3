//! The bytes of an archive, decompressed, with a bound on what a few bytes may become.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use bytes::Bytes;
use liblzma::stream::{CONCATENATED, Stream};

use super::dictionaries::{Claimed, Dictionaries, too_large};
use super::runs::{FileRange, Reader};
use super::{damaged, tar_header};
use crate::error::{Error, Result};
use crate::layout::ReadAt;
use crate::limits::{ARCHIVE_RATIO, ARCHIVE_RATIO_FROM_BYTES};
use crate::pieces::{Pieces, length_of};

/// Bytes handed on at a time.
pub(super) const PIECE_BYTES: usize = 512 << 10;

/// What an xz decoder takes besides its dictionary.
const XZ_BESIDES_BYTES: u64 = 1 << 20;

/// How bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// Not at all.
    Plain,
    /// Raw deflate, inside zips.
    Deflate,
    /// gzip, several members in a row.
    Gzip,
    /// bzip2, several streams in a row.
    Bzip2,
    /// xz, several streams in a row.
    Xz,
    /// Zstandard, several frames in a row.
    Zstd,
}

impl Coding {
    /// What the first bytes say.
    pub(super) fn of_content(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some(Self::Bzip2),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Decodes with a dictionary of so many bytes at most.
    fn decode(self, reader: Reader<'_>, dictionary_bytes: u64) -> io::Result<Decoded<'_>> {
        Ok(Decoded::By(match self {
            Self::Plain => return Ok(Decoded::Plain(reader)),
            Self::Deflate => Box::new(flate2::bufread::DeflateDecoder::new(reader)),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(reader)),
            Self::Xz => {
                let stream = Stream::new_stream_decoder(dictionary_bytes + XZ_BESIDES_BYTES, CONCATENATED)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))
            }
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
                decoder.window_log_max(dictionary_bytes.next_power_of_two().ilog2())?;
                Box::new(decoder)
            }
        }))
    }
}

/// Bytes as they come, or what a decoder makes of them.
enum Decoded<'a> {
    Plain(Reader<'a>),
    By(Box<dyn Read + 'a>),
}

/// What an archive took from its file and what it gave for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter(Rc<Figures>);

#[derive(Debug, Default)]
struct Figures {
    taken: Cell<u64>,
    given: Cell<u64>,
}

impl Meter {
    /// Counts bytes taken.
    pub(super) fn take(&self, bytes: usize) {
        self.0.taken.set(self.0.taken.get().saturating_add(count(bytes)));
    }

    fn begin(&self, bytes: u64) {
        self.0.taken.set(self.0.taken.get().saturating_add(bytes));
        self.0.given.set(self.0.given.get().saturating_add(bytes));
    }

    /// Counts bytes given.
    ///
    /// # Errors
    /// `ARCHIVE_BOMB` once they are too many for what was taken.
    pub(super) fn give(&self, bytes: u64) -> Result<()> {
        let given = self.0.given.get().saturating_add(bytes);
        self.0.given.set(given);
        let taken = self.0.taken.get();
        if given <= ARCHIVE_RATIO_FROM_BYTES || given / ARCHIVE_RATIO <= taken {
            return Ok(());
        }
        Err(Error::invalid(
            "ARCHIVE_BOMB",
            format!("its first {taken} bytes give more than {given} bytes, over {ARCHIVE_RATIO} for each"),
        )
        .remedy("pack it again without what has no content"))
    }
}

/// Decompressed bytes.
pub(super) struct Input<'a> {
    bytes: Decoded<'a>,
    meter: Meter,
    claimed: Claimed,
    position: u64,
}

impl<'a> Input<'a> {
    /// All that `reader` reads.
    pub(super) fn whole(mut reader: Reader<'a>, coding: Coding, dictionaries: &Dictionaries) -> Result<Self> {
        let meter = reader.meter().clone();
        let claimed = dictionaries.claim(coding, start_of(&mut reader)?)?;
        let bytes = coding.decode(reader, claimed.bytes).map_err(fault)?;
        Ok(Self { bytes, meter, claimed, position: 0 })
    }

    /// `length` bytes of `bytes` from `start`.
    pub(super) fn range(
        bytes: &'a (dyn ReadAt + Send),
        start: u64,
        length: u64,
        coding: Coding,
        meter: Meter,
        dictionaries: &Dictionaries,
    ) -> Result<Self> {
        let range = Box::new(FileRange::new(bytes, start, length));
        Self::whole(Reader::new(range, meter), coding, dictionaries)
    }

    /// Says that the first byte is this one of something larger, as much of which was taken and given before.
    pub(super) fn begins_at(&mut self, position: u64) {
        self.position = position;
        self.meter.begin(position);
    }

    /// Which the next byte is.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// What was taken and given so far.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Fills `buffer` as far as there are bytes; returns how far.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut length = 0;
        while length < buffer.len() {
            let rest = &mut buffer[length..];
            let read = match &mut self.bytes {
                Decoded::Plain(reader) => reader.read(rest),
                Decoded::By(decoder) => decoder.read(rest),
            };
            match read {
                Ok(0) => break,
                Ok(more) => {
                    length += more;
                    self.give(more)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if claims_memory(&error) => return Err(too_large(self.claimed.bytes)),
                Err(error) => return Err(fault(error)),
            }
        }
        Ok(length)
    }

    fn give(&mut self, bytes: usize) -> Result<()> {
        self.position += count(bytes);
        self.meter.give(count(bytes))
    }

    /// Fills `buffer` wholly.
    ///
    /// # Errors
    /// `ARCHIVE_DAMAGED` where it ends before.
    pub(super) fn fill_all(&mut self, buffer: &mut [u8]) -> Result<()> {
        if self.fill(buffer)? < buffer.len() { Err(truncated()) } else { Ok(()) }
    }

    /// Up to `most` bytes, as they came where they are not compressed; none only at the end.
    pub(super) fn piece(&mut self, most: u64) -> Result<Vec<Bytes>> {
        let most = usize::try_from(most).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let mut piece = Pieces::default();
        while piece.len() < most {
            let run = match &mut self.bytes {
                Decoded::Plain(reader) => reader.run(most - piece.len()).map_err(fault)?,
                Decoded::By(_) => return self.decoded(most),
            };
            if run.is_empty() {
                break;
            }
            self.give(run.len())?;
            piece.push(run);
        }
        Ok(piece.take())
    }

    fn decoded(&mut self, most: usize) -> Result<Vec<Bytes>> {
        let mut buffer = vec![0; most];
        let length = self.fill(&mut buffer)?;
        buffer.truncate(length);
        Ok(if buffer.is_empty() { Vec::new() } else { vec![buffer.into()] })
    }

    /// Exactly `length` bytes, in pieces.
    ///
    /// # Errors
    /// `ARCHIVE_DAMAGED` where it ends before; what `each` says.
    pub(super) fn pieces(&mut self, length: u64, mut each: impl FnMut(Vec<Bytes>) -> Result<()>) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let piece = self.piece(left)?;
            if piece.is_empty() {
                return Err(truncated());
            }
            left -= length_of(&piece);
            each(piece)?;
        }
        Ok(())
    }

    /// Reads to the end: what checks the compression's own sums.
    pub(super) fn drain(&mut self) -> Result<()> {
        while !self.piece(u64::MAX)?.is_empty() {}
        Ok(())
    }
}

/// The first bytes, which stay: as many as tell what it is, fewer only where there are no more.
pub(super) fn start_of<'r>(reader: &'r mut Reader<'_>) -> Result<&'r [u8]> {
    reader.start(tar_header::BLOCK_BYTES).map_err(fault)
}

/// A length as a count of bytes.
pub(super) fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// It ends before its end.
pub(super) fn truncated() -> Error {
    damaged("it is truncated: it ends in the middle")
}

/// What a failed read means: the fault of who gives the bytes, the disk's or the archive's.
pub(super) fn fault(error: io::Error) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(given) => return given,
        Err(error) => error,
    };
    if error.raw_os_error().is_some() {
        Error::io("reading", "the archive", error)
    } else if error.kind() == io::ErrorKind::UnexpectedEof {
        truncated()
    } else {
        damaged("its compressed bytes cannot be read").because(error)
    }
}

/// Whether a decoder found a dictionary larger than it may hold. Zstandard's says it in words alone.
fn claims_memory(error: &io::Error) -> bool {
    let of_xz = error.get_ref().and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
    matches!(of_xz, Some(liblzma::stream::Error::MemLimit)) || error.to_string().contains("requires too much memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_from_little_is_a_bomb_and_zeros_alone_are_not() {
        let meter = Meter::default();
        meter.take(1000);
        assert!(meter.give(ARCHIVE_RATIO_FROM_BYTES).is_ok());
        assert_eq!(meter.give(1).unwrap_err().reason(), "ARCHIVE_BOMB");
        let fair = Meter::default();
        fair.take(2 << 20);
        assert!(fair.give(ARCHIVE_RATIO_FROM_BYTES + 1).is_ok());
    }
}
