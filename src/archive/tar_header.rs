//! One header block of a tar: v7, POSIX (ustar, pax) and GNU.

use super::input::count;
use super::{damaged, unsupported};
use crate::error::Result;
use crate::limits;

/// Headers and padding come in blocks.
pub(super) const BLOCK_BYTES: usize = 512;

/// Bytes of GNU's entry in a map of a sparse file: offset and length.
const SPARSE_ENTRY_BYTES: usize = 24;

/// Pieces of a sparse file that have bytes: offset and length.
pub(super) type SparseMap = Vec<(u64, u64)>;

/// A header block whose sum is right.
pub(super) struct Header([u8; BLOCK_BYTES]);

/// Whether `start` begins a tar: a header, or the end mark of one without members.
pub(super) fn begins_tar(start: &[u8]) -> bool {
    <[u8; BLOCK_BYTES]>::try_from(start).is_ok_and(|block| block == [0; BLOCK_BYTES] || Header::new(block).is_ok())
}

impl Header {
    /// Checks the sum.
    pub(super) fn new(block: [u8; BLOCK_BYTES]) -> Result<Self> {
        let stated = number(&block[148..156]);
        let summed = |of: fn(u8) -> i64| -> i64 {
            block.iter().enumerate().map(|(at, byte)| of(if (148..156).contains(&at) { b' ' } else { *byte })).sum()
        };
        // Some old programs summed signed bytes.
        let sums = [summed(i64::from), summed(|byte| i64::from(i8::from_ne_bytes([byte])))];
        match stated {
            Some(stated) if sums.iter().any(|sum| u64::try_from(*sum) == Ok(stated)) => Ok(Self(block)),
            _ => Err(damaged("a member's header has a wrong sum, or it is not a tar")),
        }
    }

    /// The type flag.
    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// Name, with the prefix where the dialect has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match &self.0[257..263] {
            b"ustar\0" if &self.0[508..512] == b"tar\0" => text(&self.0[345..476]),
            b"ustar\0" => text(&self.0[345..500]),
            _ => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// Target of a link.
    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    /// Stored bytes that follow.
    pub(super) fn size(&self) -> Result<u64> {
        number(&self.0[124..136]).ok_or_else(|| damaged(format!("the size of {} is not a number", self.shown())))
    }

    /// Whether any executable bit is set. A mode that is no number has none.
    pub(super) fn executable(&self) -> bool {
        number(&self.0[100..108]).is_some_and(|mode| mode & 0o111 != 0)
    }

    /// The name for people.
    pub(super) fn shown(&self) -> String {
        format!("`{}`", crate::names::show_bytes(&self.name()))
    }

    /// The size with its holes and the first pieces of GNU's sparse file, and whether blocks with more of them follow.
    pub(super) fn gnu_sparse(&self, map: &mut SparseMap) -> Result<(u64, bool)> {
        if &self.0[257..265] != b"ustar  \0" {
            return Err(unsupported(format!("{} is sparse in a way of its own", self.shown())));
        }
        let size = number(&self.0[483..495]).ok_or_else(|| damaged("the size of a sparse file is not a number"))?;
        push_sparse(&self.0[386..482], map)?;
        Ok((size, self.0[482] != 0))
    }
}

/// Pieces in a block that continues GNU's map of a sparse file, and whether one more follows.
pub(super) fn more_gnu_sparse(block: &[u8; BLOCK_BYTES], map: &mut SparseMap) -> Result<bool> {
    push_sparse(&block[..504], map)?;
    Ok(block[504] != 0)
}

fn push_sparse(entries: &[u8], map: &mut SparseMap) -> Result<()> {
    for entry in entries.chunks_exact(SPARSE_ENTRY_BYTES) {
        let (offset, length) = entry.split_at(12);
        if offset[0] == 0 && length[0] == 0 {
            break;
        }
        let (Some(offset), Some(length)) = (number(offset), number(length)) else {
            return Err(damaged("the map of a sparse file has a number that is none"));
        };
        map.push((offset, length));
        check_pieces(count(map.len()))?;
    }
    Ok(())
}

/// Refuses a map that is too long.
pub(super) fn check_pieces(pieces: u64) -> Result<()> {
    if pieces > count(limits::ARCHIVE_SPARSE_PIECES) {
        return Err(unsupported(format!("a sparse file has more than {} pieces", limits::ARCHIVE_SPARSE_PIECES)));
    }
    Ok(())
}

/// A field up to its NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal, or in GNU's binary form with the highest bit set. An empty field is 0.
fn number(field: &[u8]) -> Option<u64> {
    if let Some(first @ 0x80..) = field.first().copied() {
        // The rest of the first byte belongs to the number; 0xff begins a negative one.
        let high = u64::from(first & 0x7f);
        return field[1..]
            .iter()
            .try_fold(high, |value, byte| (value >> 56 == 0).then(|| value << 8 | u64::from(*byte)));
    }
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0_u64, |value, digit| {
        matches!(digit, b'0'..=b'7').then(|| value.checked_mul(8)?.checked_add(u64::from(digit - b'0')))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(8_589_934_591));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(8_589_934_592));
        for bad in [
            b"12345678".as_slice(),
            b"-1\0",
            b"1 2\0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x81\0\0\0\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_block_with_a_wrong_sum_is_no_header() {
        assert!(begins_tar(&[0; BLOCK_BYTES]));
        assert!(!begins_tar(&[b'a'; BLOCK_BYTES]));
        assert!(!begins_tar(&[0; 100]));
    }
}
