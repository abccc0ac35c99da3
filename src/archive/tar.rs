//! Members of a tar.
//!
//! Read here rather than by the `tar` crate: that takes names of any claimed length into memory and passes over the sparse files of
//! pax archives, whose bytes would come out wrong without a word.
//!
//! Sizes of pax headers go over those of ustar headers. Sparse files are given with their holes as zeros, in all four forms that GNU
//! tar writes. Where dialects disagree on whether bytes follow (links and directories with a size), the archive is refused.

use bytes::Bytes;

use super::input::{Input, PIECE_BYTES, count, truncated};
use super::pax::{self, Extended};
use super::sink::Sink;
use super::tar_header::{BLOCK_BYTES, Header, SparseMap, check_pieces, more_gnu_sparse};
use super::{Given, Passed, Span, damaged, refused, unsupported};
use crate::error::Result;
use crate::limits;
use crate::names::show_bytes;
use crate::pieces::length_of;

/// Reads everything up to the end mark, and what follows it for the compression's sake. `is_plain` says whether there is none.
pub(super) fn read(input: &mut Input, sink: &mut Sink, is_plain: bool) -> Result<()> {
    read_all(Reading { input, sink, is_plain, at: 0 })
}

/// The same of a plain one behind what was `given`, where `input` is.
pub(super) fn go_on(input: &mut Input, sink: &mut Sink, given: Given) -> Result<()> {
    let mut reading = Reading { input, sink, is_plain: true, at: 0 };
    reading.rest(&given)?;
    reading.at = reading.input.position();
    drop(given);
    read_all(reading)
}

fn read_all(mut reading: Reading) -> Result<()> {
    let mut extended = Extended::default();
    while let Some(header) = reading.header()? {
        let size = header.size()?;
        match header.kind() {
            b'x' | b'X' => extended.add(&reading.extension(size)?)?,
            b'g' => pax::check_global(&reading.extension(size)?)?,
            b'L' => extended = Extended { path: Some(reading.long_name(size)?), any: true, ..extended },
            b'K' => extended = Extended { link: Some(reading.long_name(size)?), any: true, ..extended },
            b'V' => reading.skip(size)?,
            _ => {
                reading.member(&header, std::mem::take(&mut extended))?;
                reading.at = reading.input.position();
                if reading.is_plain {
                    reading.sink.passed(Passed::Member(reading.input.position()));
                }
            }
        }
    }
    if extended.any {
        return Err(damaged("its last header says more of a member that does not follow"));
    }
    reading.input.drain()
}

struct Reading<'r, 'a> {
    input: &'r mut Input<'a>,
    sink: &'r mut Sink,
    is_plain: bool,
    /// Where the last member ended.
    at: u64,
}

impl Reading<'_, '_> {
    /// What is left of the last member that was given, up to the next header.
    fn rest(&mut self, given: &Given) -> Result<()> {
        given.members.iter().try_for_each(|member| self.sink.given(member))?;
        if let Some(last) = given.members.last().filter(|_| given.left > 0) {
            self.plain_bytes(given.left, last.span.bytes_at)?;
            self.input.pieces(last.span.end.saturating_sub(self.input.position()), |_| Ok(()))?;
            self.sink.passed(Passed::Member(self.input.position()));
        }
        Ok(())
    }

    /// The next header; `None` at the end mark.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut block = [0; BLOCK_BYTES];
        match self.input.fill(&mut block)? {
            0 => Err(damaged("it is truncated: its end mark is missing")),
            BLOCK_BYTES if block == [0; BLOCK_BYTES] => Ok(None),
            BLOCK_BYTES => Header::new(block).map(Some),
            _ => Err(truncated()),
        }
    }

    fn member(&mut self, header: &Header, mut extended: Extended) -> Result<()> {
        let name = extended.take_path().unwrap_or_else(|| header.name());
        let size = extended.size.map_or_else(|| header.size(), Ok)?;
        let shown = || show_bytes(&name[..name.len().min(limits::ENTRY_PATH_BYTES)]);
        let link = || extended.link.clone().unwrap_or_else(|| header.link());
        let empty = |what: &str| match size {
            0 => Ok(()),
            _ => Err(unsupported(format!("the {what} `{}` has {size} bytes of its own", shown()))),
        };
        self.place(size, false);
        match header.kind() {
            b'0' | 0 | b'7' if name.ends_with(b"/") => empty("directory").and_then(|()| self.sink.directory(&name)),
            b'0' | 0 | b'7' if extended.sparse.is_there() => self.pax_sparse(&name, header, extended, size),
            b'0' | 0 | b'7' => self.file(&name, header, size),
            b'S' => self.gnu_sparse(&name, header, size),
            b'1' => empty("hard link").and_then(|()| self.sink.same_as(&name, &link())),
            b'2' => empty("symbolic link").and_then(|()| self.sink.symlink(&name, &link())),
            b'5' => empty("directory").and_then(|()| self.sink.directory(&name)),
            // Of an incremental dump: what follows names what was in it.
            b'D' => {
                self.skip(size)?;
                self.place(0, false);
                self.sink.directory(&name)
            }
            b'3' | b'4' => Err(refused(format!("`{}` is a device", shown()))),
            b'6' => Err(refused(format!("`{}` is a FIFO", shown()))),
            b'M' => Err(unsupported(format!("`{}` continues from another volume", shown()))),
            other => Err(unsupported(format!("`{}` is of the type `{}`", shown(), other.escape_ascii()))),
        }
    }

    /// Says of the next member that `stored` bytes of it come now.
    fn place(&mut self, stored: u64, plain: bool) {
        let bytes_at = self.input.position();
        let padded = stored.checked_next_multiple_of(count(BLOCK_BYTES)).unwrap_or(stored);
        if self.is_plain {
            self.sink.place(Span { at: self.at, bytes_at, end: bytes_at.saturating_add(padded), plain });
        }
    }

    fn file(&mut self, name: &[u8], header: &Header, size: u64) -> Result<()> {
        self.place(size, true);
        self.sink.file(name, Some(size), header.executable())?;
        self.plain_bytes(size, self.input.position())?;
        self.pad(size)
    }

    fn gnu_sparse(&mut self, name: &[u8], header: &Header, stored: u64) -> Result<()> {
        let mut map = SparseMap::new();
        let (size, mut more) = header.gnu_sparse(&mut map)?;
        while more {
            let mut block = [0; BLOCK_BYTES];
            self.input.fill_all(&mut block)?;
            more = more_gnu_sparse(&block, &mut map)?;
        }
        self.sparse(name, header, size, &map, stored)?;
        self.pad(stored)
    }

    fn pax_sparse(&mut self, name: &[u8], header: &Header, extended: Extended, stored: u64) -> Result<()> {
        let size = extended.sparse.size.ok_or_else(|| damaged("a sparse file is without its size"))?;
        let (map, map_bytes) =
            if extended.sparse.map_in_data { self.map_in_data(stored)? } else { (extended.sparse.map, 0) };
        self.sparse(name, header, size, &map, stored - map_bytes)?;
        self.pad(stored)
    }

    /// A map that precedes the bytes: decimal lines, their number first, padded to a whole block. Returns what it took of `stored`.
    fn map_in_data(&mut self, stored: u64) -> Result<(SparseMap, u64)> {
        let mut lines = Lines { block: [0; BLOCK_BYTES], at: BLOCK_BYTES, taken: 0, stored };
        let pieces = lines.number(self.input)?;
        check_pieces(pieces)?;
        let mut map = SparseMap::new();
        for _ in 0..pieces {
            map.push((lines.number(self.input)?, lines.number(self.input)?));
        }
        Ok((map, lines.taken))
    }

    /// A file of `size` bytes of which `stored` are here, where `map` says; the rest is zeros.
    fn sparse(&mut self, name: &[u8], header: &Header, size: u64, map: &SparseMap, stored: u64) -> Result<()> {
        let bad = || damaged(format!("the map of the sparse file `{}` does not fit its bytes", show_bytes(name)));
        let mut end = 0;
        let mut total = 0_u64;
        for (offset, length) in map.iter().copied().filter(|(_, length)| *length > 0) {
            let after = offset.checked_add(length).filter(|after| offset >= end && *after <= size).ok_or_else(bad)?;
            total += length;
            end = after;
        }
        if total != stored {
            return Err(bad());
        }
        self.place(stored, false);
        self.sink.file(name, Some(size), header.executable())?;
        let mut at = 0;
        for (offset, length) in map.iter().copied().filter(|(_, length)| *length > 0) {
            self.zeros(offset - at)?;
            self.bytes(length)?;
            at = offset + length;
        }
        self.zeros(size - at)
    }

    fn bytes(&mut self, length: u64) -> Result<()> {
        self.input.pieces(length, |piece| self.sink.bytes(piece))
    }

    /// The next bytes of a file whose bytes begin at `bytes_at` of the tar.
    fn plain_bytes(&mut self, length: u64, bytes_at: u64) -> Result<()> {
        let mut at = self.input.position();
        self.input.pieces(length, |piece| {
            at += length_of(&piece);
            self.sink.bytes(piece)?;
            if self.is_plain {
                self.sink.passed(Passed::Within { at, bytes_at });
            }
            Ok(())
        })
    }

    fn zeros(&mut self, length: u64) -> Result<()> {
        let mut left = length;
        let zeros = Bytes::from(vec![0; usize::try_from(length).unwrap_or(PIECE_BYTES).min(PIECE_BYTES)]);
        while left > 0 {
            let piece = zeros.slice(..usize::try_from(left).unwrap_or(usize::MAX).min(zeros.len()));
            left -= count(piece.len());
            self.input.meter().give(count(piece.len()))?;
            self.sink.bytes(vec![piece])?;
        }
        Ok(())
    }

    /// The bytes of a header that extends another.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > limits::ARCHIVE_HEADER_BYTES {
            return Err(unsupported(format!("it has an extended header of {size} bytes")));
        }
        let mut bytes = Vec::new();
        self.input.pieces(size, |piece| {
            piece.iter().for_each(|run| bytes.extend_from_slice(run));
            Ok(())
        })?;
        self.pad(size)?;
        Ok(bytes)
    }

    /// A name too long for its field, with a NUL at its end.
    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.extension(size)?;
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        Ok(name)
    }

    fn skip(&mut self, size: u64) -> Result<()> {
        self.input.pieces(size, |_| Ok(()))?;
        self.pad(size)
    }

    /// Skips to the end of the block in which `size` bytes ended.
    fn pad(&mut self, size: u64) -> Result<()> {
        let over = usize::try_from(size % count(BLOCK_BYTES)).unwrap_or(0);
        let mut padding = [0; BLOCK_BYTES];
        if over == 0 { Ok(()) } else { self.input.fill_all(&mut padding[over..]) }
    }
}

/// Decimal lines in whole blocks.
struct Lines {
    block: [u8; BLOCK_BYTES],
    at: usize,
    taken: u64,
    stored: u64,
}

impl Lines {
    fn number(&mut self, input: &mut Input) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK_BYTES {
                self.next_block(input)?;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => return pax::decimal(&digits),
                _ if digits.len() < 20 => digits.push(byte),
                _ => return pax::decimal(&digits).and_then(|_| Err(damaged("the map of a sparse file has no lines"))),
            }
        }
    }

    fn next_block(&mut self, input: &mut Input) -> Result<()> {
        self.taken += count(BLOCK_BYTES);
        if self.taken > self.stored {
            return Err(damaged("the map of a sparse file is longer than the file"));
        }
        self.at = 0;
        input.fill_all(&mut self.block)
    }
}
