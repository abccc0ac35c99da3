//! The directory of a zip: found from the end of the file, walked a record at a time.

use std::io::Read as _;

use super::super::input::{self, Meter, count};
use super::super::runs::{FileRange, Reader};
use super::{Bytes, damaged, read_exact_at, show_bytes, unsupported};
use crate::error::{Error, Result};

/// The record at the end without its comment.
const END_BYTES: u64 = 22;

/// Where to look for it: the longest comment before the end.
const END_SEARCH_BYTES: u64 = END_BYTES + 0xffff;

/// The record that tells where the 64-bit end is.
const LOCATOR_BYTES: u64 = 20;

/// What the directory says of one member.
pub(super) struct Record {
    /// As stored, to be found again in the member's own header.
    pub(super) raw_name: Vec<u8>,
    pub(super) name: Vec<u8>,
    pub(super) encrypted: bool,
    pub(super) method: u16,
    pub(super) crc: u32,
    /// Bytes in the file.
    pub(super) stored: u64,
    pub(super) size: u64,
    /// Unix mode; 0 where the writer had none.
    pub(super) mode: u32,
    pub(super) header_at: u64,
}

impl Record {
    /// Whether the mode's type is `kind`; 0 where there is none.
    pub(super) fn is_type(&self, kind: u32) -> bool {
        self.mode & libc::S_IFMT == kind
    }

    /// The name for people.
    pub(super) fn shown(&self) -> String {
        show_bytes(&self.name)
    }
}

/// See the module's page.
pub(super) struct Directory<'a> {
    reader: Reader<'a>,
    start: u64,
    left: u64,
    seen: u64,
    end: End,
}

/// Where the directory is.
#[derive(Clone, Copy, Debug)]
struct End {
    start: u64,
    length: u64,
    records: u64,
    /// Sixteen bits count the records: more than 65535 wrap around.
    wraps: bool,
}

impl<'a> Directory<'a> {
    /// Finds it.
    ///
    /// # Errors
    /// `ARCHIVE_DAMAGED` where there is none; unsupported for split zips.
    pub(super) fn open(file: Bytes<'a>, size: u64) -> Result<Self> {
        let end = End::find(file, size)?;
        let range = Box::new(FileRange::new(file, end.start, end.length));
        let reader = Reader::new(range, Meter::default());
        Ok(Self { reader, start: end.start, left: end.length, seen: 0, end })
    }

    /// Where it begins in the file.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// The next record; `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        if self.left == 0 {
            let stated = if self.end.wraps { self.seen & 0xffff } else { self.seen };
            return if stated == self.end.records {
                Ok(None)
            } else {
                Err(damaged(format!("its directory has {} records and states {}", self.seen, self.end.records)))
            };
        }
        let mut fixed = [0; 46];
        self.take(&mut fixed)?;
        if !fixed.starts_with(b"PK\x01\x02") {
            return Err(damaged("its directory has a record that is none"));
        }
        let mut raw_name = vec![0; usize::from(u16_at(&fixed, 28))];
        let mut extra = vec![0; usize::from(u16_at(&fixed, 30))];
        let mut comment = vec![0; usize::from(u16_at(&fixed, 32))];
        self.take(&mut raw_name)?;
        self.take(&mut extra)?;
        self.take(&mut comment)?;
        self.seen += 1;
        record(&fixed, raw_name, &extra).map(Some)
    }

    fn take(&mut self, buffer: &mut [u8]) -> Result<()> {
        let beyond = || damaged("its directory ends in the middle of a record");
        self.left = self.left.checked_sub(count(buffer.len())).ok_or_else(beyond)?;
        self.reader.read_exact(buffer).map_err(input::fault)
    }
}

impl End {
    fn find(file: Bytes<'_>, size: u64) -> Result<Self> {
        let missing = || damaged("it has no directory at its end: it is truncated, or not a zip");
        let length = size.min(END_SEARCH_BYTES);
        let mut tail = vec![0; usize::try_from(length).unwrap_or(0)];
        read_exact_at(file, &mut tail, size - length)?;
        // Behind it come its comment and, where a writer fills blocks as bsdtar does into a pipe, zeros.
        let fits = |at: &usize| {
            let end = at + 22 + usize::from(u16_at(&tail, at + 20));
            tail[*at..].starts_with(b"PK\x05\x06")
                && tail.get(end..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
        };
        let last = tail.len().checked_sub(22).ok_or_else(missing)?;
        let at = (0..=last).rev().find(fits).ok_or_else(missing)?;
        let end = &tail[at..];
        let end_at = size - length + count(at);
        let found = match Self::find_64(file, end_at)? {
            Some(found) => found,
            None => {
                if [u16_at(end, 4), u16_at(end, 6)] != [0, 0] || u16_at(end, 8) != u16_at(end, 10) {
                    return Err(split());
                }
                Self {
                    start: u64::from(u32_at(end, 16)),
                    length: u64::from(u32_at(end, 12)),
                    records: u64::from(u16_at(end, 10)),
                    wraps: true,
                }
            }
        };
        match found.start.checked_add(found.length) {
            Some(until) if until <= end_at => Ok(found),
            _ => Err(damaged("its directory is not where its end says")),
        }
    }

    /// The same from the 64-bit records, if there are any before the end at `end_at`.
    fn find_64(file: Bytes<'_>, end_at: u64) -> Result<Option<Self>> {
        let Some(locator_at) = end_at.checked_sub(LOCATOR_BYTES) else { return Ok(None) };
        let mut locator = [0; 20];
        read_exact_at(file, &mut locator, locator_at)?;
        if !locator.starts_with(b"PK\x06\x07") {
            return Ok(None);
        }
        let mut end = [0; 56];
        let at = u64_at(&locator, 8);
        if at.checked_add(count(end.len())).is_none_or(|after| after > locator_at) {
            return Err(damaged("its 64-bit end is not where it says"));
        }
        read_exact_at(file, &mut end, at)?;
        if !end.starts_with(b"PK\x06\x06") {
            return Err(damaged("its 64-bit end is not where it says"));
        }
        if [u32_at(&end, 16), u32_at(&end, 20)] != [0, 0] || u64_at(&end, 24) != u64_at(&end, 32) {
            return Err(split());
        }
        Ok(Some(Self { start: u64_at(&end, 48), length: u64_at(&end, 40), records: u64_at(&end, 32), wraps: false }))
    }
}

fn split() -> Error {
    unsupported("it is one volume of a split zip")
}

fn record(fixed: &[u8], raw_name: Vec<u8>, extra: &[u8]) -> Result<Record> {
    let flags = u16_at(fixed, 8);
    let (stored, size, header_at) = (u32_at(fixed, 20), u32_at(fixed, 24), u32_at(fixed, 42));
    let mut wide = wide_fields(extra);
    let mut widen = |field: u32| match field {
        u32::MAX => wide.next().ok_or_else(|| damaged("a record of its directory lacks its 64-bit sizes")),
        _ => Ok(u64::from(field)),
    };
    // The order in the extra field is not the order in the record.
    let size = widen(size)?;
    let stored = widen(stored)?;
    let header_at = widen(header_at)?;
    let is_unix = matches!(fixed[5], 3 | 19);
    Ok(Record {
        name: decode(&raw_name),
        raw_name,
        // Bit 0: encrypted; 6: strongly; 13: names masked.
        encrypted: flags & (1 | 1 << 6 | 1 << 13) != 0,
        method: u16_at(fixed, 10),
        crc: u32_at(fixed, 16),
        stored,
        size,
        mode: if is_unix { u32_at(fixed, 38) >> 16 } else { 0 },
        header_at,
    })
}

/// The 64-bit fields of the extra field 1, in order.
fn wide_fields(extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut rest = extra;
    let mut found: &[u8] = &[];
    while rest.len() >= 4 {
        let (id, length) = (u16_at(rest, 0), usize::from(u16_at(rest, 2)));
        let Some(field) = rest.get(4..4 + length) else { break };
        if id == 1 {
            found = field;
            break;
        }
        rest = &rest[4 + length..];
    }
    found.chunks_exact(8).map(|field| u64_at(field, 0))
}

/// UTF-8 as it is, anything else from code page 437.
fn decode(raw: &[u8]) -> Vec<u8> {
    const HIGH: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";
    if std::str::from_utf8(raw).is_ok() {
        return raw.to_vec();
    }
    let decode = |byte: &u8| match byte.checked_sub(0x80) {
        None => char::from(*byte),
        Some(high) => HIGH.chars().nth(usize::from(high)).unwrap_or(char::REPLACEMENT_CHARACTER),
    };
    raw.iter().map(decode).collect::<String>().into_bytes()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_utf8_or_code_page_437() {
        assert_eq!(decode("ü/a".as_bytes()), "ü/a".as_bytes());
        assert_eq!(decode(b"\x81\xe1\xff"), "üß\u{a0}".as_bytes());
    }

    #[test]
    fn wide_fields_are_found_among_others() {
        let extra = [&[9, 9, 2, 0, 1, 2, 1, 0, 16, 0][..], &7_u64.to_le_bytes(), &8_u64.to_le_bytes()].concat();
        assert_eq!(wide_fields(&extra).collect::<Vec<_>>(), [7, 8]);
        assert_eq!(wide_fields(&[1, 0, 99, 0, 1]).count(), 0);
    }
}
