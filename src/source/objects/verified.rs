//! Bytes checked against a digest that came with them.
//!
//! A listing does not tell the digest of every object, and an answer does: its headers. Where one answer is a whole object, its bytes
//! are checked as they pass, and a wrong digest is found at their end, before the file is sealed.

use futures_util::stream;
use futures_util::{Stream, StreamExt as _};
use sha2::Digest as _;

use super::super::{ByteStream, Expected};
use crate::error::{Error, Result};

/// `bytes` of the object called `what`, and an error behind the last if they are not what is expected.
pub(super) fn verified(bytes: ByteStream, expected: Expected, what: String) -> ByteStream {
    let Some(check) = Check::of(expected) else { return bytes };
    Box::pin(checked(bytes, check, what))
}

fn checked(bytes: ByteStream, check: Check, what: String) -> impl Stream<Item = Result<bytes::Bytes>> {
    stream::try_unfold((bytes, Some(check), what), |(mut bytes, mut check, what)| async move {
        match bytes.next().await.transpose()? {
            Some(piece) => {
                if let Some(check) = &mut check {
                    check.update(&piece);
                }
                Ok(Some((piece, (bytes, check, what))))
            }
            None => check.take().map_or(Ok(()), |check| check.finish(&what)).map(|()| None),
        }
    })
}

/// The strongest digest that is stated: one is enough.
enum Check {
    Sha256(sha2::Sha256, [u8; 32]),
    Crc32c(u32, u32),
    Md5(md5::Md5, [u8; 16]),
}

impl Check {
    fn of(expected: Expected) -> Option<Self> {
        match expected {
            Expected { sha256: Some(stated), .. } => Some(Self::Sha256(sha2::Sha256::new(), stated)),
            Expected { crc32c: Some(stated), .. } => Some(Self::Crc32c(0, stated)),
            Expected { md5: Some(stated), .. } => Some(Self::Md5(md5::Md5::new(), stated)),
            _ => None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(state, _) => state.update(bytes),
            Self::Crc32c(state, _) => *state = crc32c::crc32c_append(*state, bytes),
            Self::Md5(state, _) => state.update(bytes),
        }
    }

    fn finish(self, what: &str) -> Result<()> {
        let (name, right) = match self {
            Self::Sha256(state, stated) => ("SHA-256", state.finalize()[..] == stated),
            Self::Crc32c(state, stated) => ("CRC-32C", state == stated),
            Self::Md5(state, stated) => ("MD5", state.finalize()[..] == stated),
        };
        if right {
            return Ok(());
        }
        let message = format!("reading {what}: the bytes that came do not have the {name} that the store states");
        Err(Error::corrupt("DIGEST_MISMATCH", message)
            .remedy("retry; if it stays so, the object is damaged at the source"))
    }
}
