//! Canonical bytes of a manifest.
//!
//! ```text
//! manifest  = "ckptd-manifest-1\n"  u64 entry count  entry*
//! entry     = kind  u16 path length  path  body
//! kind, body = 'd'
//!            | 'f' | 'x' (executable)   u64 size  32-byte file digest
//!            | 'l'                      u16 target length  target
//! ```
//! Integers are little-endian. Entries are in canonical order, without the root. There is exactly one encoding of
//! a tree, and the decoder refuses every other, so bytes and identity correspond one to one.

use super::{Entry, EntryKind, Manifest};
use crate::digest::{DIGEST_BYTES, Digest};
use crate::error::{Error, Result};
use crate::limits;
use crate::names::EntryPath;

/// Version in the first line; a change of the format changes it, and every checkpoint digest with it.
pub const CODEC_VERSION: u32 = 1;

const MAGIC: &[u8] = b"ckptd-manifest-1\n";

/// Shortest encoded entry: kind, length, one byte of path.
const ENTRY_MIN_BYTES: usize = 4;

pub(super) fn encode(manifest: &Manifest) -> Vec<u8> {
    encode_with(manifest, |digest| digest)
}

/// The encoding with every file digest zero.
pub(super) fn encode_shape(manifest: &Manifest) -> Vec<u8> {
    encode_with(manifest, |_| Digest::from_bytes([0; DIGEST_BYTES]))
}

fn encode_with(manifest: &Manifest, shown: fn(Digest) -> Digest) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAGIC.len() + 8 + manifest.entries.len() * 80);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&(manifest.entries.len() as u64).to_le_bytes());
    for entry in &manifest.entries {
        encode_entry(entry, shown, &mut out);
    }
    out
}

fn encode_entry(entry: &Entry, shown: fn(Digest) -> Digest, out: &mut Vec<u8>) {
    out.push(match entry.kind {
        EntryKind::Directory => b'd',
        EntryKind::File { executable: false, .. } => b'f',
        EntryKind::File { executable: true, .. } => b'x',
        EntryKind::Symlink { .. } => b'l',
    });
    encode_short(entry.path.as_bytes(), out);
    match &entry.kind {
        EntryKind::Directory => {}
        EntryKind::File { size, digest, .. } => {
            out.extend_from_slice(&size.to_le_bytes());
            out.extend_from_slice(shown(*digest).as_bytes());
        }
        EntryKind::Symlink { target } => encode_short(target, out),
    }
}

/// Paths and targets are at most 4095 bytes by construction, so their length fits.
fn encode_short(bytes: &[u8], out: &mut Vec<u8>) {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}

pub(super) fn decode(bytes: &[u8]) -> Result<Manifest> {
    let mut input = Input { rest: bytes };
    if input.take(MAGIC.len())? != MAGIC {
        return Err(bad("it does not begin with `ckptd-manifest-1`"));
    }
    let count = usize::try_from(input.u64()?).unwrap_or(usize::MAX);
    if count > limits::CHECKPOINT_ENTRIES || count > input.rest.len() / ENTRY_MIN_BYTES {
        return Err(bad("it claims more entries than it can hold"));
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(input.entry()?);
    }
    if !input.rest.is_empty() {
        return Err(bad("bytes follow the last entry"));
    }
    Manifest::from_sorted(entries).map_err(|error| bad("its tree is not canonical").because(error))
}

fn bad(why: &str) -> Error {
    Error::corrupt("BAD_MANIFEST", format!("the manifest is damaged: {why}"))
}

struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| bad("it ends early"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| bad("it ends early"))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn short(&mut self) -> Result<&'a [u8]> {
        let length = u16::from_le_bytes(self.array()?);
        self.take(usize::from(length))
    }

    fn entry(&mut self) -> Result<Entry> {
        let [kind] = self.array()?;
        let path = EntryPath::new(self.short()?).map_err(|error| bad("a path is not valid").because(error))?;
        let kind = match kind {
            b'd' => EntryKind::Directory,
            b'f' | b'x' => EntryKind::File {
                size: self.u64()?,
                executable: kind == b'x',
                digest: Digest::from_bytes(self.array::<DIGEST_BYTES>()?),
            },
            b'l' => EntryKind::Symlink { target: self.short()?.into() },
            _ => return Err(bad("an entry is of unknown kind")),
        };
        Ok(Entry { path, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Canonical bytes of entries that are encoded already, said to be `count`.
    fn encoded(count: u64, entries: &[Vec<u8>]) -> Vec<u8> {
        [MAGIC, &count.to_le_bytes(), &entries.concat()].concat()
    }

    fn short(bytes: &[u8]) -> Vec<u8> {
        [&u16::try_from(bytes.len()).unwrap().to_le_bytes(), bytes].concat()
    }

    fn directory(path: &[u8]) -> Vec<u8> {
        [b"d", short(path).as_slice()].concat()
    }

    fn link(path: &[u8], target: &[u8]) -> Vec<u8> {
        [b"l", short(path).as_slice(), &short(target)].concat()
    }

    fn file(path: &[u8], size: u64) -> Vec<u8> {
        [b"f", short(path).as_slice(), &size.to_le_bytes(), &[7; DIGEST_BYTES]].concat()
    }

    #[test]
    fn names_that_are_no_text_have_golden_bytes() {
        let golden: &[u8] = b"ckptd-manifest-1\n\x02\0\0\0\0\0\0\0d\x02\0a\xffl\x04\0a\xff/\xfe\x03\0..\x80";
        let entries = vec![
            Entry {
                path: EntryPath::new(*b"a\xff/\xfe").unwrap(),
                kind: EntryKind::Symlink { target: (*b"..\x80").into() },
            },
            Entry { path: EntryPath::new(*b"a\xff").unwrap(), kind: EntryKind::Directory },
        ];
        let manifest = Manifest::new(entries).unwrap();
        assert_eq!(manifest.encode(), golden);
        assert_eq!(decode(golden).unwrap(), manifest);
        assert_eq!(manifest.digest(), Digest::of(golden));
    }

    #[test]
    fn only_the_one_encoding_of_a_tree_is_read() {
        let good = encoded(3, &[directory(b"a"), file(b"a/f", 1), link(b"b", b"a")]);
        assert_eq!(decode(&good).unwrap().encode(), good);
        for (why, bytes) in [
            ("out of order", encoded(2, &[file(b"b", 1), file(b"a", 1)])),
            ("a directory after what is below it", encoded(2, &[file(b"a/f", 1), directory(b"a")])),
            ("the same path twice", encoded(2, &[file(b"a", 1), file(b"a", 1)])),
            ("the same directory twice", encoded(2, &[directory(b"a"), directory(b"a")])),
            ("no parent", encoded(1, &[file(b"a/f", 1)])),
            ("no parent but its namesake's", encoded(2, &[directory(b"a"), file(b"a.b/f", 1)])),
            ("a file as parent", encoded(2, &[file(b"a", 1), file(b"a/f", 1)])),
            ("a link as parent", encoded(2, &[link(b"a", b"b"), file(b"a/f", 1)])),
            ("the root", encoded(1, &[directory(b"")])),
            ("the root as a file", encoded(1, &[file(b"", 1)])),
            ("more entries than are there", encoded(2, &[file(b"a", 1)])),
            ("more entries than memory", encoded(u64::MAX, &[file(b"a", 1)])),
            ("fewer entries than are there", encoded(1, &[file(b"a", 1), file(b"b", 1)])),
            ("an unknown kind", encoded(1, &[[b"z", short(b"a").as_slice()].concat()])),
            ("a path that climbs", encoded(1, &[directory(b"..")])),
            ("a path with two slashes", encoded(2, &[directory(b"a"), file(b"a//f", 1)])),
            ("a path from the top", encoded(1, &[file(b"/a", 1)])),
            ("a link to nothing", encoded(1, &[link(b"a", b"")])),
            ("a link with a NUL", encoded(1, &[link(b"a", b"b\0")])),
            ("more bytes than there are", encoded(2, &[file(b"a", u64::MAX), file(b"b", 1)])),
            ("a path longer than the rest", encoded(1, &[b"d\xff\xffa".to_vec()])),
            ("another version", good.iter().map(|byte| if *byte == b'1' { b'2' } else { *byte }).collect()),
        ] {
            let refused = decode(&bytes).map(|manifest| manifest.entries).expect_err(why);
            assert_eq!(refused.reason(), "BAD_MANIFEST", "{why}");
        }
    }

    #[test]
    fn whatever_is_read_is_written_the_same() {
        let good = encoded(3, &[directory(b"a"), file(b"a/\xff", 1), link(b"b", b"a")]);
        let mut read = 0;
        for at in 0..good.len() {
            for value in 0..=u8::MAX {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(manifest) = decode(&bytes) {
                    assert_eq!(manifest.encode(), bytes, "byte {at} is {value}");
                    read += 1;
                }
            }
        }
        assert!(read > good.len(), "digests and sizes may be anything");
    }
}
