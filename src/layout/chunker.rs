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
    regions: std::vec::IntoIter<Region>,
    region: Region,
    /// Offset of the next byte.
    at: u64,
    /// Offset of the present chunk's first byte.
    chunk_start: u64,
    digester: Digester,
    gear: Gear,
}

impl Chunker {
    /// A chunker at the beginning of a file laid out as `layout`.
    pub fn new(layout: Layout) -> Self {
        let mut regions = layout.regions.into_iter();
        let region = regions.next().unwrap_or(BEYOND);
        Self { regions, region, at: 0, chunk_start: 0, digester: Digester::new(), gear: Gear::default() }
    }

    /// Takes the next bytes of the file and emits the chunks that end in them, in order. CPU-bound; does not block.
    pub fn push(&mut self, mut bytes: &[u8], emit: &mut impl FnMut(Chunk)) {
        while !bytes.is_empty() {
            let left = usize::try_from(self.region.end() - self.at).unwrap_or(usize::MAX);
            let within = &bytes[..bytes.len().min(left)];
            let cut = match self.region.cut {
                Cut::Steps => self.step(within),
                Cut::Content => self.gear.find(within),
            };
            let taken = cut.unwrap_or(within.len());
            self.digester.update(&within[..taken]);
            self.at += taken as u64;
            let region_ends = self.at == self.region.end();
            if cut.is_some() || region_ends {
                self.end_chunk(emit);
            }
            if region_ends {
                self.gear.restart();
                self.region = self.regions.next().unwrap_or(Region { start: self.at, ..BEYOND });
            }
            bytes = &bytes[taken..];
        }
    }

    /// Emits the last chunk, if one was begun. After the whole of a file of the layout's size there is none.
    pub fn finish(mut self, emit: &mut impl FnMut(Chunk)) {
        self.end_chunk(emit);
    }

    /// How many of `within` the present step takes, if it ends in them.
    fn step(&self, within: &[u8]) -> Option<usize> {
        let end = self.chunk_start + step_bytes(self.region.end() - self.chunk_start);
        usize::try_from(end - self.at).ok().filter(|left| *left <= within.len())
    }

    fn end_chunk(&mut self, emit: &mut impl FnMut(Chunk)) {
        let len = self.at - self.chunk_start;
        if len > 0 {
            emit(Chunk { offset: self.chunk_start, len, digest: self.digester.finish() });
            self.digester.reset();
            self.chunk_start = self.at;
        }
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
