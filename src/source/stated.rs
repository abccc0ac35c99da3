//! Digests that a source states, and bytes held to them.

use std::sync::Arc;

use sha1::Digest as _;
use sha1::digest::common::hazmat::SerializableState as _;

use crate::error::{Error, Result};

/// What is expected of one file: what its source [`Stated`], if anything. A listing has millions of these; it is as large as a pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected(Option<Arc<Stated>>);

/// Digests stated by a source, all verified where present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stated {
    /// SHA-256 of the bytes (LFS, Hugging Face).
    pub sha256: Option<[u8; 32]>,
    /// SHA-1 of `blob <size>\0` and the bytes (git's object id of a plain file).
    pub git_sha1: Option<[u8; 20]>,
    /// MD5 of the bytes (`Content-MD5`, the ETag of an object put in one piece).
    pub md5: Option<[u8; 16]>,
    /// CRC-64/NVME of the bytes (S3).
    pub crc64nvme: Option<u64>,
    /// CRC-32C (Castagnoli) of the bytes (object stores).
    pub crc32c: Option<u32>,
    /// CRC-32 as zip and Ethernet have it (S3).
    pub crc32: Option<u32>,
}

impl Expected {
    /// Whether there is nothing to verify.
    pub const fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The digests.
    pub fn stated(&self) -> Stated {
        self.0.as_deref().cloned().unwrap_or_default()
    }
}

impl From<Stated> for Expected {
    fn from(stated: Stated) -> Self {
        Self((stated != Stated::default()).then(|| Arc::new(stated)))
    }
}

/// Takes the digests that are expected of one file, as its bytes come.
pub struct Verifier(Vec<(Taken, Vec<u8>)>);

/// A digest under way.
enum Taken {
    Sha256(sha2::Sha256),
    GitSha1(sha1::Sha1),
    Md5(md5::Md5),
    Crc64Nvme(crc64fast_nvme::Digest),
    Crc32c(u32),
    Crc32(crc32fast::Hasher),
}

impl Verifier {
    /// For a file of `size` bytes.
    pub fn new(expected: &Expected, size: u64) -> Self {
        let Stated { sha256, git_sha1, md5, crc64nvme, crc32c, crc32 } = expected.stated();
        let git = || sha1::Sha1::new_with_prefix(format!("blob {size}\0"));
        let all = [
            sha256.map(|stated| (Taken::Sha256(sha2::Sha256::new()), stated.to_vec())),
            git_sha1.map(|stated| (Taken::GitSha1(git()), stated.to_vec())),
            md5.map(|stated| (Taken::Md5(md5::Md5::new()), stated.to_vec())),
            crc64nvme.map(|stated| (Taken::Crc64Nvme(crc64fast_nvme::Digest::new()), stated.to_be_bytes().to_vec())),
            crc32c.map(|stated| (Taken::Crc32c(0), stated.to_be_bytes().to_vec())),
            crc32.map(|stated| (Taken::Crc32(crc32fast::Hasher::new()), stated.to_be_bytes().to_vec())),
        ];
        Self(all.into_iter().flatten().collect())
    }

    /// Whether there is nothing to verify.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for (taken, _) in &mut self.0 {
            match taken {
                Taken::Sha256(state) => state.update(bytes),
                Taken::GitSha1(state) => state.update(bytes),
                Taken::Md5(state) => state.update(bytes),
                Taken::Crc64Nvme(state) => state.write(bytes),
                Taken::Crc32c(state) => *state = crc32c::crc32c_append(*state, bytes),
                Taken::Crc32(state) => state.update(bytes),
            }
        }
    }

    /// The state as it is now, for [`Verifier::thaw`]; `None` where a digest has none that can be kept.
    pub fn freeze(&self) -> Option<Vec<u8>> {
        let mut all = Vec::new();
        for (taken, _) in &self.0 {
            let state = taken.freeze()?;
            all.push(u8::try_from(state.len()).ok()?);
            all.extend_from_slice(&state);
        }
        Some(all)
    }

    /// For the same file, from a state that [`Verifier::freeze`] gave; `None` where it is none.
    pub fn thaw(expected: &Expected, size: u64, state: &[u8]) -> Option<Self> {
        let mut verifier = Self::new(expected, size);
        let mut rest = state;
        for (taken, _) in &mut verifier.0 {
            let (length, behind) = rest.split_first()?;
            let (own, behind) = behind.split_at_checked(usize::from(*length))?;
            taken.thaw(own)?;
            rest = behind;
        }
        rest.is_empty().then_some(verifier)
    }

    /// All bytes of `what` came.
    ///
    /// # Errors
    /// `DIGEST_MISMATCH`, naming it.
    pub fn finish(self, what: &str) -> Result<()> {
        self.0.into_iter().try_for_each(|(taken, stated)| {
            let (name, found) = taken.finish();
            if found == stated {
                return Ok(());
            }
            let message = format!("`{what}` arrived with {name} {}, the source states {}", hex(&found), hex(&stated));
            Err(Error::corrupt("DIGEST_MISMATCH", message)
                .fact("path", what)
                .remedy("retry; if it stays so, the file is damaged at the source"))
        })
    }
}

impl Taken {
    fn freeze(&self) -> Option<Vec<u8>> {
        match self {
            Self::Sha256(state) => Some(state.serialize().to_vec()),
            Self::GitSha1(state) => Some(state.serialize().to_vec()),
            Self::Md5(state) => Some(state.serialize().to_vec()),
            Self::Crc64Nvme(_) => None,
            Self::Crc32c(state) => Some(state.to_be_bytes().to_vec()),
            Self::Crc32(state) => Some(state.clone().finalize().to_be_bytes().to_vec()),
        }
    }

    fn thaw(&mut self, state: &[u8]) -> Option<()> {
        match self {
            Self::Sha256(own) => *own = sha2::Sha256::deserialize(state.try_into().ok()?).ok()?,
            Self::GitSha1(own) => *own = sha1::Sha1::deserialize(state.try_into().ok()?).ok()?,
            Self::Md5(own) => *own = md5::Md5::deserialize(state.try_into().ok()?).ok()?,
            Self::Crc64Nvme(_) => return None,
            Self::Crc32c(own) => *own = u32::from_be_bytes(state.try_into().ok()?),
            Self::Crc32(own) => {
                *own = crc32fast::Hasher::new_with_initial(u32::from_be_bytes(state.try_into().ok()?));
            }
        }
        Some(())
    }

    /// Its name, and its bytes, the most significant first.
    fn finish(self) -> (&'static str, Vec<u8>) {
        match self {
            Self::Sha256(state) => ("SHA-256", state.finalize().to_vec()),
            Self::GitSha1(state) => ("git object id", state.finalize().to_vec()),
            Self::Md5(state) => ("MD5", state.finalize().to_vec()),
            Self::Crc64Nvme(state) => ("CRC-64/NVME", state.sum64().to_be_bytes().to_vec()),
            Self::Crc32c(state) => ("CRC-32C", state.to_be_bytes().to_vec()),
            Self::Crc32(state) => ("CRC-32", state.finalize().to_be_bytes().to_vec()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verify(expected: &Expected, bytes: &[u8]) -> Result<()> {
        let mut verifier = Verifier::new(expected, bytes.len() as u64);
        bytes.chunks(2).for_each(|piece| verifier.update(piece));
        verifier.finish("a")
    }

    /// `git hash-object` of a file with the bytes `hello`.
    const GIT_ID: [u8; 20] = [
        0xb6, 0xfc, 0x4c, 0x62, 0x0b, 0x67, 0xd9, 0x5f, 0x95, 0x3a, 0x5c, 0x1c, 0x12, 0x30, 0xaa, 0xab, 0x5d, 0xb5,
        0xa1, 0xb0,
    ];

    #[test]
    fn stated_digests_are_verified() {
        let sha256 = sha2::Sha256::digest(b"hello").into();
        let none = Expected::default();
        let stated = Stated::default();
        for alone in [
            Stated { sha256: Some(sha256), ..stated.clone() },
            Stated { git_sha1: Some(GIT_ID), ..stated.clone() },
            Stated { md5: Some(md5::Md5::digest(b"hello").into()), ..stated.clone() },
            // What `gsutil hash` prints for `hello`, and what zip keeps of it.
            Stated { crc32c: Some(0x9a71_bb4c), ..stated.clone() },
            Stated { crc32: Some(0x3610_a686), ..stated.clone() },
        ] {
            let alone = alone.into();
            verify(&alone, b"hello").unwrap();
            assert_eq!(verify(&alone, b"hellO").unwrap_err().reason(), "DIGEST_MISMATCH", "{alone:?}");
        }
        assert!(none.is_empty() && verify(&none, b"x").is_ok());
    }

    #[test]
    fn a_state_is_gone_on_with_by_whoever_has_it() {
        let check = Stated {
            sha256: Some(sha2::Sha256::digest(b"123456789").into()),
            md5: Some(md5::Md5::digest(b"123456789").into()),
            crc32c: Some(0xe306_9283),
            crc32: Some(0xcbf4_3926),
            ..Stated::default()
        };
        let git = Expected::from(Stated { git_sha1: Some(GIT_ID), ..Stated::default() });
        let expected = Expected::from(check);
        for (expected, bytes) in [(expected, b"123456789".as_slice()), (git, b"hello")] {
            for at in 0..=bytes.len() {
                let mut first = Verifier::new(&expected, bytes.len() as u64);
                first.update(&bytes[..at]);
                let state = first.freeze().unwrap();
                let mut second = Verifier::thaw(&expected, bytes.len() as u64, &state).unwrap();
                second.update(&bytes[at..]);
                second.finish("a").unwrap();
                assert!(Verifier::thaw(&expected, 9, &state[1..]).is_none());
                assert!(Verifier::thaw(&expected, 9, &[state.as_slice(), &[0]].concat()).is_none());
            }
        }
        let nvme = Expected::from(Stated { crc64nvme: Some(1), ..Stated::default() });
        assert!(Verifier::new(&nvme, 9).freeze().is_none());
    }

    #[test]
    fn checksums_are_those_of_their_names() {
        // The check values of the catalogue of parametrised CRC algorithms (reveng.sourceforge.io), all of these nine digits.
        let check = Stated {
            crc64nvme: Some(0xae8b_1486_0a79_9888),
            crc32c: Some(0xe306_9283),
            crc32: Some(0xcbf4_3926),
            ..Stated::default()
        };
        verify(&check.clone().into(), b"123456789").unwrap();
        let two = Stated { crc32: Some(0), ..check };
        assert!(verify(&two.into(), b"123456789").unwrap_err().to_string().contains("CRC-32 cbf43926"));
    }
}
