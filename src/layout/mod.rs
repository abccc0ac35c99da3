//! Where a file's bytes are cut into chunks, from the structure of the formats that checkpoints use.
//!
//! Two files share disk space where they have equal chunks, so a cut is worth most where equal bytes begin and end:
//! before and after every tensor. A [`Layout`] divides a file into [`Region`]s; a [`Chunker`] is given the file's
//! bytes in order and cuts each region by its [`Cut`]:
//!
//! | what | region | why |
//! |---|---|---|
//! | header of safetensors, GGUF, npy | its own, content-defined | a header 40 bytes longer then moves nothing behind it |
//! | tensor of 256 KiB or more | its own, fixed steps from its first byte | equal tensors meet in any order, file and format, with the fewest chunks and no search |
//! | PyTorch storage (`*/data/N`) | as a tensor | its bytes are the tensor's in safetensors |
//! | other stored zip member of 256 KiB or more | as the same bytes would be as a file of their own | an archive shares with what was packed |
//! | deflated or encrypted member of 256 KiB or more | its own, content-defined | nothing is known but where it begins |
//! | whatever lies between | one region per gap, content-defined | small tensors are cut together; an inserted one moves only its neighbours |
//! | anything else | the whole file, content-defined | |
//!
//! Formats are told by content, never by name. Headers are hostile input: every length is checked against the file
//! before it is followed, structure is streamed through a fixed buffer and bounded by
//! [`crate::limits::LAYOUT_HEADER_BYTES`], [`crate::limits::LAYOUT_READ_BYTES`] and [`crate::limits::LAYOUT_PIECES`], and whatever is damaged, overlaps or
//! cannot be read makes the file [`Format::Opaque`]. A wrong layout costs dedup, never bytes.
//!
//! Invariant of a layout: regions are ascending and not empty, and cover the file exactly.
//!
//! Cuts are private to the store, but equal files must be cut alike for years: [`CHUNKING_VERSION`] names the rules,
//! and golden vectors notice a change of them.

mod chunker;
mod gear;
mod gguf;
#[cfg(test)]
mod hostile;
mod npy;
mod read;
mod safetensors;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;
mod zip;

pub use chunker::{Chunk, Chunker, FileDigester};
pub use read::ReadAt;

use std::ops::Range;

use read::Metered;

/// Names the rules in this module. Chunks cut under another version are still right, but meet fewer equals.
pub const CHUNKING_VERSION: u32 = 2;

/// A tensor or member from this size on is its own region. Below it a borrowed range would be too short to be worth
/// its hole ([`crate::limits::BORROW_MIN_BYTES`]). Part of the chunking version.
pub const REGION_MIN_BYTES: u64 = 256 << 10;

/// How many zip archives inside one another are looked into.
const ARCHIVE_DEPTH: u32 = 2;

/// What a file turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A safetensors file.
    Safetensors,
    /// GGUF version 2 or 3, little-endian.
    Gguf,
    /// A zip archive: PyTorch, npz, or any other.
    Zip,
    /// One NumPy array.
    Npy,
    /// Anything else, and whatever is damaged.
    Opaque,
}

/// How a region is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Steps of [`crate::limits::CHUNK_MAX_BYTES`] from the region's first byte; the last two are alike where the last
    /// would be too short to be recorded.
    Steps,
    /// Where the content says, beginning anew at the region's first byte.
    Content,
}

/// A range of a file that is cut by one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Offset of the first byte.
    pub start: u64,
    /// Length in bytes, never 0 in a layout.
    pub len: u64,
    /// The rule.
    pub cut: Cut,
}

impl Region {
    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// The region of a tensor, if it is long enough to have one.
    fn of_tensor(range: &Range<u64>) -> Option<Self> {
        let len = range.end.checked_sub(range.start)?;
        (len >= REGION_MIN_BYTES).then_some(Self { start: range.start, len, cut: Cut::Steps })
    }
}

/// The regions of one file: see the module's page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    format: Format,
    size: u64,
    regions: Vec<Region>,
}

impl Layout {
    /// Reads the structure of a file of `size` bytes, all of which must be there: a zip archive has its directory at the
    /// end. Never fails; blocks on `bytes`.
    pub fn read(bytes: &dyn ReadAt, size: u64) -> Self {
        Self::read_within(bytes, size, crate::limits::LAYOUT_READ_BYTES)
    }

    /// The layout of a file about which nothing is known but its size.
    pub fn opaque(size: u64) -> Self {
        let whole = Region { start: 0, len: size, cut: Cut::Content };
        Self { format: Format::Opaque, size, regions: if size == 0 { vec![] } else { vec![whole] } }
    }

    /// What the file turned out to be.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Ascending, none empty, covering the file exactly.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read_within(bytes: &dyn ReadAt, size: u64, budget: u64) -> Self {
        Self::read_nested(&Metered::new(bytes, budget), size, ARCHIVE_DEPTH)
    }

    /// `archives`: how many levels of archives inside archives may be looked into.
    fn read_nested(bytes: &dyn ReadAt, size: u64, archives: u32) -> Self {
        let found = |format, pieces: Option<Vec<Region>>| Self::cover(format, size, pieces?);
        found(Format::Safetensors, safetensors::pieces(bytes, size))
            .or_else(|| found(Format::Gguf, gguf::pieces(bytes, size)))
            .or_else(|| found(Format::Npy, npy::pieces(bytes, size)))
            .or_else(|| found(Format::Zip, zip::pieces(bytes, size, archives)))
            .unwrap_or_else(|| Self::opaque(size))
    }

    /// Fills what the pieces leave open; `None` if they overlap or leave the file.
    fn cover(format: Format, size: u64, mut pieces: Vec<Region>) -> Option<Self> {
        pieces.retain(|piece| piece.len > 0);
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut regions = Vec::with_capacity(2 * pieces.len() + 1);
        let mut at = 0;
        let gap = |from: u64, to: u64| Region { start: from, len: to - from, cut: Cut::Content };
        for piece in pieces {
            if piece.start < at {
                return None;
            }
            if piece.start > at {
                regions.push(gap(at, piece.start));
            }
            at = piece.start.checked_add(piece.len).filter(|end| *end <= size)?;
            regions.push(piece);
        }
        if at < size {
            regions.push(gap(at, size));
        }
        Some(Self { format, size, regions })
    }
}

/// Sorts ranges and tells whether they are disjoint and none ends before it begins.
fn sort_disjoint(ranges: &mut [Range<u64>]) -> bool {
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let forwards = ranges.iter().all(|range| range.start <= range.end);
    forwards && ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
}
