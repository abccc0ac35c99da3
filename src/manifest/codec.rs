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
