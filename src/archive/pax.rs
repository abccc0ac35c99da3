//! Extended headers of a tar: POSIX records and GNU long names, which say more of the member that follows.

use super::input::count;
use super::tar_header::{SparseMap, check_pieces};
use super::{damaged, unsupported};
use crate::error::Result;
use crate::names::show_bytes;

/// What extended headers said of the next member.
#[derive(Debug, Default)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) sparse: Sparse,
    /// Whether there was any.
    pub(super) any: bool,
}

/// GNU's records of a sparse file, versions 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) size: Option<u64>,
    pub(super) map: SparseMap,
    /// The map precedes the bytes (1.0) instead of being here.
    pub(super) map_in_data: bool,
    offset: Option<u64>,
    name: Option<Vec<u8>>,
}

impl Extended {
    /// The member's name, if said; that of a sparse file over the one kept for programs that do not know it.
    pub(super) fn take_path(&mut self) -> Option<Vec<u8>> {
        self.sparse.name.take().or_else(|| self.path.take())
    }

    /// Takes the records of one `x` header.
    pub(super) fn add(&mut self, records: &[u8]) -> Result<()> {
        self.any = true;
        each_record(records, |key, value| {
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(decimal(value)?),
                _ if key.starts_with(b"GNU.sparse.") => self.sparse.add(&key[11..], value)?,
                _ if key.starts_with(b"GNU.volume.") => return Err(unsupported("it is one volume of several")),
                b"SCHILY.realsize" => return Err(unsupported("it holds a sparse file in a way of its own")),
                _ => {}
            }
            Ok(())
        })
    }
}

impl Sparse {
    /// Whether the member is sparse.
    pub(super) fn is_there(&self) -> bool {
        self.size.is_some() || self.map_in_data || !self.map.is_empty() || self.name.is_some()
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"name" => self.name = Some(value.to_vec()),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(bad_map)?;
                self.push(offset, decimal(value)?)?;
            }
            b"map" if value.is_empty() => {}
            b"map" => {
                let mut numbers = value.split(|byte| *byte == b',').map(decimal);
                while let Some(offset) = numbers.next() {
                    self.push(offset?, numbers.next().ok_or_else(bad_map)??)?;
                }
            }
            b"major" => match value {
                b"0" => {}
                b"1" => self.map_in_data = true,
                _ => return Err(unsupported(format!("it holds a sparse file of version {}", show_bytes(value)))),
            },
            b"minor" | b"numblocks" => {
                decimal(value)?;
            }
            _ => return Err(unsupported(format!("it holds a sparse file with `{}`", show_bytes(key)))),
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, length: u64) -> Result<()> {
        self.map.push((offset, length));
        check_pieces(count(self.map.len()))
    }
}

/// Judges a `g` header, which speaks of all members: only what can be ignored may be in it.
pub(super) fn check_global(records: &[u8]) -> Result<()> {
    each_record(records, |key, _| {
        let matters = matches!(key, b"path" | b"linkpath" | b"size")
            || key.starts_with(b"GNU.")
            || key.starts_with(b"SCHILY.real");
        if matters {
            return Err(unsupported(format!("a global header sets `{}` of every member", show_bytes(key))));
        }
        Ok(())
    })
}

/// A decimal number and nothing else.
pub(super) fn decimal(text: &[u8]) -> Result<u64> {
    let number = std::str::from_utf8(text).ok().filter(|text| !text.starts_with('+'));
    number.and_then(|text| text.parse().ok()).ok_or_else(|| {
        damaged(format!("`{}` in an extended header is not a number", show_bytes(&text[..text.len().min(40)])))
    })
}

fn bad_map() -> crate::error::Error {
    damaged("the map of a sparse file is incomplete")
}

/// Records are `length key=value\n`, the length counting the whole.
fn each_record(mut records: &[u8], mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
    let bad = || damaged("an extended header has a record that is none");
    while !records.is_empty() && records[0] != 0 {
        let space = records.iter().take(20).position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length = usize::try_from(decimal(&records[..space])?).ok().filter(|length| *length <= records.len());
        let length = length.filter(|length| *length > space + 1).ok_or_else(bad)?;
        let (record, rest) = records.split_at(length);
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        each(&record[..equals], &record[equals + 1..])?;
        records = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of `pairs`, each with its length in front.
    fn records(pairs: &[(&str, &str)]) -> Vec<u8> {
        let record = |(key, value): &(&str, &str)| {
            let rest = format!(" {key}={value}\n");
            let length = (1..).find(|length| length.to_string().len() + rest.len() == *length).unwrap();
            format!("{length}{rest}")
        };
        pairs.iter().map(record).collect::<String>().into_bytes()
    }

    #[test]
    fn records_are_counted_not_searched() {
        let mut extended = Extended::default();
        extended.add(&records(&[("path", "a\nsize=1"), ("size", "8589934592"), ("unknown", "1 2")])).unwrap();
        assert_eq!(extended.path.as_deref(), Some(b"a\nsize=1".as_slice()));
        assert_eq!(extended.size, Some(8_589_934_592));
    }

    #[test]
    fn bad_records_are_damage() {
        for bad in [
            "x",
            "5 a=b",
            "99 a=b\n",
            "0 a=b\n",
            "4 a\n",
            "5 ab\n",
            "999999999999999999999 a=b\n",
            "9 size=x\n",
            "10 size=-1\n",
        ] {
            assert_eq!(Extended::default().add(bad.as_bytes()).unwrap_err().reason(), "ARCHIVE_DAMAGED", "{bad:?}");
        }
    }

    #[test]
    fn a_map_is_read_from_records() {
        let mut extended = Extended::default();
        let said = [("GNU.sparse.map", "0,5,9,1"), ("GNU.sparse.size", "10"), ("GNU.sparse.name", "n"), ("path", "p")];
        extended.add(&records(&said)).unwrap();
        assert_eq!(extended.sparse.map, [(0, 5), (9, 1)]);
        assert_eq!((extended.sparse.size, extended.take_path()), (Some(10), Some(b"n".to_vec())));
        for (key, value) in [
            ("GNU.sparse.map", "0,5,9"),
            ("GNU.sparse.major", "2"),
            ("GNU.sparse.numbytes", "1"),
            ("GNU.sparse.new", ""),
        ] {
            assert!(Extended::default().add(&records(&[(key, value)])).is_err(), "{key}");
        }
    }

    #[test]
    fn a_global_header_speaks_only_of_what_can_be_ignored() {
        assert!(check_global(&records(&[("comment", "0123abcd"), ("mtime", "1")])).is_ok());
        assert_eq!(check_global(&records(&[("size", "1")])).unwrap_err().reason(), "ARCHIVE_UNSUPPORTED");
    }
}
