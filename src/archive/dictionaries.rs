//! Memory for the dictionaries of compressed archives: claimed by what their first bytes say, before a decoder has it.
//!
//! Up to [`FREE_BYTES`] a dictionary is within what every extraction claims for itself. Larger ones share one bound, and wait for each other. A decoder
//! is held to what was claimed: where a later stream or frame of the same archive needs more than its beginning said, the archive is refused.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::input::Coding;
use super::unsupported;
use crate::error::{Error, Kind, Result};
use crate::limits;

/// A dictionary that need not be claimed: what `xz -6` and `zstd -19` use.
pub(super) const FREE_BYTES: u64 = 8 << 20;

const KIB: u64 = 1024;

/// The dictionaries of all archives that are read at a time; cheap to clone.
#[derive(Clone, Debug)]
pub struct Dictionaries {
    kib: Arc<Semaphore>,
    most_bytes: u64,
}

impl Default for Dictionaries {
    fn default() -> Self {
        Self::within(limits::ARCHIVE_DICTIONARY_BYTES)
    }
}

/// What a decoder may hold, until it is dropped.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) bytes: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Dictionaries {
    /// Dictionaries that take `bytes` together at most.
    pub fn within(bytes: u64) -> Self {
        let most_bytes = bytes.min(limits::ARCHIVE_DICTIONARY_BYTES);
        let kib = usize::try_from(bytes / KIB).unwrap_or(Semaphore::MAX_PERMITS).min(Semaphore::MAX_PERMITS);
        Self { kib: Arc::new(Semaphore::new(kib)), most_bytes }
    }

    /// Waits for the memory that an archive of this coding needs, which begins with `start`. Blocks; needs a runtime.
    ///
    /// # Errors
    /// `ARCHIVE_UNSUPPORTED` where it will never have so much.
    pub(super) fn claim(&self, coding: Coding, start: &[u8]) -> Result<Claimed> {
        let bytes = match coding {
            Coding::Plain | Coding::Deflate | Coding::Gzip | Coding::Bzip2 => 0,
            Coding::Xz => of_xz(start).unwrap_or(self.most_bytes),
            // Its decoder is held to a power of two.
            Coding::Zstd => {
                of_zstd(start).map_or(self.most_bytes, |bytes| bytes.checked_next_power_of_two().unwrap_or(u64::MAX))
            }
        };
        if bytes <= FREE_BYTES {
            return Ok(Claimed { bytes: FREE_BYTES, _permit: None });
        }
        if bytes > self.most_bytes {
            return Err(too_large(self.most_bytes.max(FREE_BYTES)));
        }
        let kib = u32::try_from(bytes.div_ceil(KIB)).unwrap_or(u32::MAX);
        let claimed = tokio::runtime::Handle::current().block_on(Arc::clone(&self.kib).acquire_many_owned(kib));
        let stopping = |_| Error::new(Kind::Cancelled, "STOPPING", "ckptd is stopping");
        Ok(Claimed { bytes, _permit: Some(claimed.map_err(stopping)?) })
    }
}

/// The error of an archive whose dictionary is larger than `most_bytes`: than there are, or than its beginning said.
pub(super) fn too_large(most_bytes: u64) -> Error {
    let mib = most_bytes >> 20;
    unsupported(format!("its dictionary takes more than {mib} MiB of memory"))
        .remedy("pack it again as one stream with a smaller window, or ask the operator to raise memory.budget")
}

/// The dictionary that the first block of an xz file has (`xz-file-format.txt`, sections 3.1 and 5.3.1); `None` where it does not say.
fn of_xz(start: &[u8]) -> Option<u64> {
    const LZMA2: u64 = 0x21;
    let mut rest = start.get(12..)?;
    let [size, flags, ..] = *rest else { return None };
    if size == 0 {
        // No block: an index follows.
        return Some(0);
    }
    rest = &rest[2..];
    for present in [flags & 0x40, flags & 0x80] {
        if present != 0 {
            variable(&mut rest)?;
        }
    }
    for _ in 0..=(flags & 3) {
        let (id, length) = (variable(&mut rest)?, usize::try_from(variable(&mut rest)?).ok()?);
        let properties = rest.get(..length)?;
        rest = &rest[length..];
        if id == LZMA2 {
            let bits = u32::from(*properties.first()? & 0x3f);
            return Some(if bits >= 40 { u64::from(u32::MAX) } else { u64::from(2 | (bits & 1)) << (bits / 2 + 11) });
        }
    }
    None
}

/// An integer of seven bits a byte, the lowest first.
fn variable(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for place in 0..9 {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The window that the first frame of Zstandard has that is not to be skipped (RFC 8878, sections 3.1.1.1 and 3.1.2); `None` where it does not say.
fn of_zstd(mut start: &[u8]) -> Option<u64> {
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, rest @ ..] = start {
        let (length, content) = rest.split_first_chunk::<4>()?;
        start = content.get(usize::try_from(u32::from_le_bytes(*length)).ok()?..)?;
    }
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = start else { return None };
    if descriptor & 0x20 == 0 {
        let window = *rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The whole content is its window.
    let id_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let (bytes, more) = match descriptor >> 6 {
        0 => (1, 0),
        1 => (2, 256),
        2 => (4, 0),
        _ => (8, 0),
    };
    let mut size = [0; 8];
    size[..bytes].copy_from_slice(rest.get(id_bytes..id_bytes + bytes)?);
    u64::from_le_bytes(size).checked_add(more)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn xz(level: u32) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), level);
        encoder.write_all(b"some bytes").unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(level: i32, window_log: Option<u32>, whole: bool) -> Vec<u8> {
        let bytes = vec![7; 100_000];
        if whole {
            return zstd::bulk::compress(&bytes, level).unwrap();
        }
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).unwrap();
        if let Some(log) = window_log {
            encoder.window_log(log).unwrap();
        }
        encoder.write_all(&bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn what_an_archive_will_need_is_in_its_first_bytes() {
        assert_eq!(of_xz(&xz(0)), Some(256 << 10));
        assert_eq!(of_xz(&xz(6)), Some(8 << 20));
        assert_eq!(of_xz(&xz(9)), Some(64 << 20));
        assert_eq!(of_zstd(&zstd(3, Some(21), false)), Some(2 << 20));
        assert_eq!(of_zstd(&zstd(3, Some(27), false)), Some(128 << 20));
        assert_eq!(of_zstd(&zstd(3, None, true)), Some(100_000));
        let skipped = [b"\x50\x2a\x4d\x18\x04\0\0\0abcd".as_slice(), &zstd(3, Some(21), false)].concat();
        assert_eq!(of_zstd(&skipped), Some(2 << 20));
        for unknown in [b"".as_slice(), &skipped[..9], &skipped[..12], &xz(6)[..13]] {
            assert_eq!((of_xz(unknown), of_zstd(unknown)), (None, None));
        }
    }

    #[tokio::test]
    async fn large_dictionaries_wait_for_each_other() {
        let dictionaries = Dictionaries::within(100 << 20);
        let claim = |archive: Vec<u8>, coding| {
            let own = dictionaries.clone();
            tokio::task::spawn_blocking(move || own.claim(coding, &archive))
        };
        let first = claim(xz(9), Coding::Xz).await.unwrap().unwrap();
        assert_eq!(first.bytes, 64 << 20);
        let mut second = claim(xz(9), Coding::Xz);
        assert_eq!(claim(xz(6), Coding::Xz).await.unwrap().unwrap().bytes, FREE_BYTES);
        assert!(!second.is_finished(), "two have what is enough for one");
        drop(first);
        assert_eq!((&mut second).await.unwrap().unwrap().bytes, 64 << 20);
        let refused = claim(zstd(3, Some(27), false), Coding::Zstd).await.unwrap().unwrap_err();
        assert!(refused.report().contains("more than 100 MiB"), "{}", refused.report());
    }
}
