//! Zip archives, PyTorch's among them: members are found by the central directory, as every reader does.
//!
//! ```text
//! (local header  name  extra  member's bytes)*  central directory  [zip64 record  zip64 locator]  end record  comment
//! ```
//! Local headers are read for large members only, to learn where their bytes begin; PyTorch pads its extra field so
//! that they begin at a multiple of 64. Members that overlap, or reach into the directory, make the file opaque. So
//! does an archive that does not begin with a local header (self-extracting, or several archives in a row).

use super::read::{Input, ReadAt, Slice, array_at, fill, u16_in, u32_in, u64_in};
use super::{Cut, Layout, REGION_MIN_BYTES, Region};
use crate::limits;

const LOCAL_MAGIC: u32 = 0x0403_4b50;
const ENTRY_MAGIC: u32 = 0x0201_4b50;
const END_MAGIC: u32 = 0x0605_4b50;
const END64_MAGIC: u32 = 0x0606_4b50;
const LOCATOR64_MAGIC: u32 = 0x0706_4b50;

const LOCAL_BYTES: usize = 30;
const ENTRY_BYTES: usize = 46;
const END_BYTES: usize = 22;
const END64_BYTES: usize = 56;
const LOCATOR64_BYTES: usize = 20;

/// The end record may be followed by a comment of this length.
const COMMENT_MAX: usize = 0xFFFF;

/// Between the directory and the end record: the zip64 record and its locator, with room for extensions. A directory that
/// ends further off is another archive's.
const ENDS_MAX: u64 = 4096;

/// Extra field with the 64-bit sizes.
const EXTRA_ZIP64: u16 = 1;

/// In a 32-bit field: see the zip64 extra field or record.
const IN_ZIP64: u64 = 0xFFFF_FFFF;

/// Cuts of all large members; `None` if it is not a sound archive. `archives` is how many levels of archives inside
/// archives may still be looked into.
pub(super) fn pieces(bytes: &dyn ReadAt, size: u64, archives: u32) -> Option<Vec<Region>> {
    let archives = archives.checked_sub(1)?;
    if u32::from_le_bytes(array_at(bytes, 0)?) != LOCAL_MAGIC {
        return None;
    }
    let directory = Directory::find(bytes, size)?;
    let mut pieces = Vec::new();
    for member in directory.large_members(bytes)? {
        let start = member.data_start(bytes)?;
        start.checked_add(member.len).filter(|end| *end <= directory.start)?;
        member_pieces(bytes, &member, start, archives, &mut pieces)?;
    }
    Some(pieces)
}

/// Cuts of one member, whose bytes begin at `start`.
fn member_pieces(
    bytes: &dyn ReadAt,
    member: &Member,
    start: u64,
    archives: u32,
    pieces: &mut Vec<Region>,
) -> Option<()> {
    let len = member.len;
    match member.content {
        Content::Storage => pieces.push(Region { start, len, cut: Cut::Steps }),
        Content::Packed => pieces.push(Region { start, len, cut: Cut::Content }),
        Content::Stored => {
            let inner = Layout::read_nested(&Slice { bytes, start, len }, len, archives);
            pieces.extend(inner.regions.iter().map(|region| Region { start: start + region.start, ..*region }));
        }
    }
    (pieces.len() <= 2 * limits::LAYOUT_PIECES).then_some(())
}

/// Where the central directory is.
struct Directory {
    start: u64,
    len: u64,
    entries: u64,
}

impl Directory {
    fn find(bytes: &dyn ReadAt, size: u64) -> Option<Self> {
        let (at, end) = end_record(bytes, size)?;
        let mut found = Self {
            start: u64::from(u32_in(&end, 16)?),
            len: u64::from(u32_in(&end, 12)?),
            entries: u64::from(u16_in(&end, 10)?),
        };
        if found.entries == 0xFFFF || found.len == IN_ZIP64 || found.start == IN_ZIP64 {
            found = Self::find_zip64(bytes, at)?;
        }
        let behind = at.checked_sub(found.start.checked_add(found.len)?)?;
        let bounded = found.len <= limits::LAYOUT_HEADER_BYTES && found.entries <= limits::LAYOUT_PIECES as u64;
        (behind <= ENDS_MAX && bounded).then_some(found)
    }

    fn find_zip64(bytes: &dyn ReadAt, end_at: u64) -> Option<Self> {
        let locator: [u8; LOCATOR64_BYTES] = array_at(bytes, end_at.checked_sub(LOCATOR64_BYTES as u64)?)?;
        if u32_in(&locator, 0)? != LOCATOR64_MAGIC {
            return None;
        }
        let record: [u8; END64_BYTES] = array_at(bytes, u64_in(&locator, 8)?)?;
        if u32_in(&record, 0)? != END64_MAGIC {
            return None;
        }
        Some(Self { start: u64_in(&record, 48)?, len: u64_in(&record, 40)?, entries: u64_in(&record, 32)? })
    }

    /// Members of [`REGION_MIN_BYTES`] or more. Together they must fit before the directory, which ends the work on
    /// archives that claim the same bytes many times before their local headers are read.
    fn large_members(&self, bytes: &dyn ReadAt) -> Option<Vec<Member>> {
        let mut input = Input::new(bytes, self.start, self.start + self.len);
        let (mut members, mut total) = (Vec::new(), 0_u64);
        let (mut name, mut extra) = (Vec::new(), Vec::new());
        for _ in 0..self.entries {
            let member = Member::read(&mut input, &mut name, &mut extra)?;
            if member.len >= REGION_MIN_BYTES {
                total = total.checked_add(member.len).filter(|total| *total <= self.start)?;
                members.push(member);
            }
        }
        Some(members)
    }
}

/// Offset and bytes of the end record: the last that is followed by exactly the comment it announces.
fn end_record(bytes: &dyn ReadAt, size: u64) -> Option<(u64, [u8; END_BYTES])> {
    let mut tail = vec![0; usize::try_from(size).unwrap_or(usize::MAX).min(END_BYTES + COMMENT_MAX)];
    let tail_start = size - tail.len() as u64;
    fill(bytes, tail_start, &mut tail)?;
    let ends = |at: &usize| {
        u32_in(&tail, *at) == Some(END_MAGIC)
            && u16_in(&tail, at + 20).is_some_and(|comment| at + END_BYTES + usize::from(comment) == tail.len())
    };
    let at = (0..tail.len().checked_sub(END_BYTES - 1)?).rev().find(ends)?;
    Some((tail_start + at as u64, tail.get(at..)?.first_chunk().copied()?))
}

/// What is known about a member's bytes.
enum Content {
    /// A tensor storage of PyTorch.
    Storage,
    /// As they are, of whatever format.
    Stored,
    /// Compressed or encrypted.
    Packed,
}

struct Member {
    content: Content,
    /// Offset of its local header.
    local: u64,
    /// Bytes it takes in the archive.
    len: u64,
}

impl Member {
    /// Reads the next entry of the directory; `name` and `extra` are buffers to use again.
    fn read(input: &mut Input<'_>, name: &mut Vec<u8>, extra: &mut Vec<u8>) -> Option<Self> {
        let entry: [u8; ENTRY_BYTES] = input.array()?;
        if u32_in(&entry, 0)? != ENTRY_MAGIC {
            return None;
        }
        input.short(u16_in(&entry, 28)?, name)?;
        input.short(u16_in(&entry, 30)?, extra)?;
        input.skip(u64::from(u16_in(&entry, 32)?))?;
        let [unpacked, len, local] = [24, 20, 42].map(|at| u32_in(&entry, at).map(u64::from));
        let mut sizes = [unpacked?, len?, local?];
        widen(&mut sizes, extra)?;
        let [unpacked, len, local] = sizes;
        let encrypted = u16_in(&entry, 8)? & 1 != 0;
        let stored = u16_in(&entry, 10)? == 0 && unpacked == len && !encrypted;
        let content = match stored {
            true if is_storage(name) => Content::Storage,
            true => Content::Stored,
            false => Content::Packed,
        };
        Some(Self { content, local, len })
    }

    /// Where its bytes begin, by its local header.
    fn data_start(&self, bytes: &dyn ReadAt) -> Option<u64> {
        let header: [u8; LOCAL_BYTES] = array_at(bytes, self.local)?;
        if u32_in(&header, 0)? != LOCAL_MAGIC {
            return None;
        }
        let names = u64::from(u16_in(&header, 26)?) + u64::from(u16_in(&header, 28)?);
        self.local.checked_add(LOCAL_BYTES as u64 + names)
    }
}

/// Takes what does not fit in 32 bits from the zip64 extra field, which has those values alone, in this order.
fn widen(sizes: &mut [u64; 3], extra: &[u8]) -> Option<()> {
    if !sizes.contains(&IN_ZIP64) {
        return Some(());
    }
    let mut field = zip64_field(extra)?;
    for size in sizes.iter_mut().filter(|size| **size == IN_ZIP64) {
        let (value, rest) = field.split_first_chunk()?;
        (*size, field) = (u64::from_le_bytes(*value), rest);
    }
    Some(())
}

fn zip64_field(mut extra: &[u8]) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16_in(extra, 2)?);
        let field = extra.get(4..4 + len)?;
        if u16_in(extra, 0)? == EXTRA_ZIP64 {
            return Some(field);
        }
        extra = extra.get(4 + len..)?;
    }
}

/// PyTorch keeps a tensor's bytes in `<archive>/data/<number>`, TorchScript's constants in `<archive>/constants/<number>`.
fn is_storage(name: &[u8]) -> bool {
    let mut parts = name.rsplit(|byte| *byte == b'/');
    let number = parts.next().is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit));
    number && matches!(parts.next(), Some(b"data" | b"constants")) && parts.next().is_some()
}
