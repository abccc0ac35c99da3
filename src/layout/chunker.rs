//! A file's bytes in, its chunks out.
//!
//! Nothing is copied: cuts are searched and digests taken in the caller's windows, and between windows the state is a
//! digester and a few numbers. The chunks do not depend on how the bytes were divided into windows.

use super::gear::Gear;
use super::{Cut, Layout, Region};
use crate::digest::{Digest, Digester};
use crate::limits;

/// A range of a file and the digest of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Length in bytes, at least 1 and at most [`limits::CHUNK_MAX_BYTES`].
    pub len: u64,
    /// Digest of the bytes.
    pub digest: Digest,
}

/// Cuts one file by its layout.
///
/// The chunks tile the bytes that were pushed, whatever the layout says: bytes beyond it are cut as opaque, and a file that
/// ends early ends its last chunk.
pub struct Chunker {
    cutter: Cutter,
    digester: Digester,
}

impl Chunker {
    /// A chunker at the beginning of a file laid out as `layout`.
    pub fn new(layout: Layout) -> Self {
        Self { cutter: Cutter::new(layout), digester: Digester::new() }
    }

    /// Takes the next bytes of the file and emits the chunks that end in them, in order. CPU-bound; does not block.
    pub fn push(&mut self, mut bytes: &[u8], emit: &mut impl FnMut(Chunk)) {
        while !bytes.is_empty() {
            let (taken, ends) = self.cutter.advance(bytes);
            self.digester.update(&bytes[..taken]);
            if ends {
                self.end_chunk(emit);
            }
            bytes = &bytes[taken..];
        }
    }

    /// Emits the last chunk, if one was begun. After the whole of a file of the layout's size there is none.
    pub fn finish(mut self, emit: &mut impl FnMut(Chunk)) {
        self.end_chunk(emit);
    }

    fn end_chunk(&mut self, emit: &mut impl FnMut(Chunk)) {
        if let Some((offset, len)) = self.cutter.end_chunk() {
            emit(Chunk { offset, len, digest: self.digester.finish() });
            self.digester.reset();
        }
    }
}

/// A [`Chunker`] that takes the digest of the whole file too. Its first chunk, which is all of most small files, is digested once for both.
pub struct FileDigester {
    cutter: Cutter,
    whole: Digester,
    /// Of the present chunk, unless it is the first.
    chunk: Digester,
}

impl FileDigester {
    /// At the beginning of a file laid out as `layout`.
    pub fn new(layout: Layout) -> Self {
        Self { cutter: Cutter::new(layout), whole: Digester::new(), chunk: Digester::new() }
    }

    /// As [`Chunker::push`].
    pub fn push(&mut self, mut bytes: &[u8], emit: &mut impl FnMut(Chunk)) {
        while !bytes.is_empty() {
            let is_first = self.cutter.chunk_start == 0;
            let (taken, ends) = self.cutter.advance(bytes);
            let (now, later) = bytes.split_at(taken);
            self.whole.update(now);
            if !is_first {
                self.chunk.update(now);
            }
            if ends {
                self.end_chunk(emit);
            }
            bytes = later;
        }
    }

    /// As [`Chunker::finish`]; the digest of all that was pushed.
    pub fn finish(mut self, emit: &mut impl FnMut(Chunk)) -> Digest {
        self.end_chunk(emit);
        self.whole.finish()
    }

    fn end_chunk(&mut self, emit: &mut impl FnMut(Chunk)) {
        if let Some((offset, len)) = self.cutter.end_chunk() {
            let digest = if offset == 0 { self.whole.finish() } else { self.chunk.finish() };
            emit(Chunk { offset, len, digest });
            self.chunk.reset();
        }
    }
}

/// Where the chunks of a file end.
struct Cutter {
    regions: std::vec::IntoIter<Region>,
    region: Region,
    /// Offset of the next byte.
    at: u64,
    /// Offset of the present chunk's first byte.
    chunk_start: u64,
    gear: Gear,
}

impl Cutter {
    fn new(layout: Layout) -> Self {
        let mut regions = layout.regions.into_iter();
        let region = regions.next().unwrap_or(BEYOND);
        Self { regions, region, at: 0, chunk_start: 0, gear: Gear::default() }
    }

    /// Takes bytes up to the end of the present chunk or region, or all; how many, and whether the chunk ends behind them.
    fn advance(&mut self, bytes: &[u8]) -> (usize, bool) {
        let left = usize::try_from(self.region.end() - self.at).unwrap_or(usize::MAX);
        let within = &bytes[..bytes.len().min(left)];
        let cut = match self.region.cut {
            Cut::Steps => self.step(within),
            Cut::Content => self.gear.find(within),
        };
        let taken = cut.unwrap_or(within.len());
        self.at += taken as u64;
        let region_ends = self.at == self.region.end();
        if region_ends {
            self.gear.restart();
            self.region = self.regions.next().unwrap_or(Region { start: self.at, ..BEYOND });
        }
        (taken, cut.is_some() || region_ends)
    }

    /// How many of `within` the present step takes, if it ends in them.
    fn step(&self, within: &[u8]) -> Option<usize> {
        let end = self.chunk_start + step_bytes(self.region.end() - self.chunk_start);
        usize::try_from(end - self.at).ok().filter(|left| *left <= within.len())
    }

    /// Begins the next chunk; offset and length of the one before, if it has bytes.
    fn end_chunk(&mut self) -> Option<(u64, u64)> {
        let (offset, len) = (self.chunk_start, self.at - self.chunk_start);
        self.chunk_start = self.at;
        (len > 0).then_some((offset, len))
    }
}

/// What follows the last region: as far as bytes come.
const BEYOND: Region = Region { start: 0, len: u64::MAX, cut: Cut::Content };

/// Length of a step where `left` bytes of the region are left. The last two are made alike where the last would
/// be too short to be entered in the chunk table.
fn step_bytes(left: u64) -> u64 {
    const MAX: u64 = limits::CHUNK_MAX_BYTES;
    if left <= MAX {
        left
    } else if left < MAX + limits::CHUNK_MIN_RECORDED_BYTES {
        left / 2 / limits::DISK_BLOCK_BYTES * limits::DISK_BLOCK_BYTES
    } else {
        MAX
    }
}
