//! SHA-512 of what is sent, as far as it has come: the protocol states it of every byte, and nothing else that is done with one costs as much.
//!
//! On x86-64 our library needs half as much again as OpenSSL, which has it in the assembler of each processor. Building OpenSSL for one digest
//! would add minutes to every build, so the host's is used, where it has one ([`HOST`]): for whole blocks, from one state to the next. All else, the
//! beginning, the end and the form in which a state is kept, is our library's, so that a daemon goes on with what another has left on a host
//! that has no OpenSSL any more.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::LazyLock;

use sha2::digest::common::hazmat::{SerializableState as _, SerializedState};
use sha2::{Digest as _, Sha512};

use super::StreamDigest;
use crate::error::{Error, Result};

/// Bytes that are digested at a time.
const BLOCK_BYTES: usize = 128;

/// What is shorter goes the plain way: a state is turned into OpenSSL's and back for it.
const WORTH_BYTES: usize = 16 * BLOCK_BYTES;

/// The state's share of its kept form, which begins with it; the number of blocks follows.
const STATE_BYTES: usize = 64;

/// Where its kept form says how many bytes of the next block are there; those follow.
const PENDING_AT: usize = STATE_BYTES + size_of::<u128>();

/// OpenSSL 3, as distributions name it.
const LIBRARY: &str = "libcrypto.so.3";

/// OpenSSL's digest of whole blocks, where the host has it and it says the same as ours.
static HOST: LazyLock<Option<Blocks>> = LazyLock::new(|| match Blocks::of_host() {
    Ok(blocks) if blocks.is_right() => {
        tracing::debug!(LIBRARY, "SHA-512 is the host's");
        Some(blocks)
    }
    Ok(_) => {
        tracing::warn!(LIBRARY, "the host's SHA-512 does not say what ours does; our own is slower");
        None
    }
    Err(error) => {
        tracing::info!(LIBRARY, %error, "the host has no SHA-512; our own is slower");
        None
    }
});

/// See the module's page.
#[derive(Clone)]
pub(super) struct Digester {
    sha512: Sha512,
    blocks: Option<Blocks>,
}

impl Digester {
    pub(super) fn new() -> Self {
        Self::with(*HOST)
    }

    fn with(blocks: Option<Blocks>) -> Self {
        Self { sha512: Sha512::new(), blocks }
    }

    /// The one that was [kept](Digester::state).
    ///
    /// # Errors
    /// `UPLOAD_TAIL_DAMAGED` where `state` is none.
    pub(super) fn thaw(state: &[u8]) -> Result<Self> {
        let damaged = || Error::corrupt("UPLOAD_TAIL_DAMAGED", "the digest of an upload cannot be gone on with");
        let state = SerializedState::<Sha512>::try_from(state).map_err(|error| damaged().because(error))?;
        let sha512 = Sha512::deserialize(&state).map_err(|error| damaged().because(error))?;
        Ok(Self { sha512, ..Self::new() })
    }

    /// Its state, to be kept.
    pub(super) fn state(&self) -> Vec<u8> {
        self.sha512.serialize().to_vec()
    }

    /// The digest of all that came.
    pub(super) fn digest(&self) -> StreamDigest {
        self.sha512.clone().finalize().into()
    }

    /// Takes what comes next.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        let Some(blocks) = self.blocks.filter(|_| bytes.len() >= WORTH_BYTES) else {
            return self.sha512.update(bytes);
        };
        let pending = usize::from(self.sha512.serialize()[PENDING_AT]);
        let (before, rest) = bytes.split_at(BLOCK_BYTES.saturating_sub(pending) % BLOCK_BYTES);
        self.sha512.update(before);
        let (whole, end) = rest.as_chunks();
        if let Some(sha512) = self.after(blocks, whole) {
            self.sha512 = sha512;
            self.sha512.update(end);
        } else {
            self.sha512.update(rest);
        }
    }

    /// Our digest after these blocks; nothing where it is within another, or where that is refused.
    fn after(&self, blocks: Blocks, whole: &[[u8; BLOCK_BYTES]]) -> Option<Sha512> {
        let mut kept = self.sha512.serialize();
        if kept[PENDING_AT] != 0 {
            return None;
        }
        let (state, rest) = kept.split_first_chunk_mut::<STATE_BYTES>()?;
        let (words, _) = state.as_chunks_mut();
        let mut present = [0; 8];
        for (value, word) in present.iter_mut().zip(&*words) {
            *value = u64::from_le_bytes(*word);
        }
        blocks.take(&mut present, whole)?;
        for (word, value) in words.iter_mut().zip(present) {
            *word = value.to_le_bytes();
        }
        let (number, _) = rest.split_first_chunk_mut()?;
        *number = u128::from_le_bytes(*number).checked_add(whole.len() as u128)?.to_le_bytes();
        Sha512::deserialize(&kept).ok()
    }
}

/// `SHA512_CTX` of OpenSSL's `sha.h`, which has been the same since 0.9.8.
#[repr(C)]
struct Context {
    state: [u64; 8],
    bits_low: u64,
    bits_high: u64,
    block: [u64; 16],
    pending: c_uint,
    digest_bytes: c_uint,
}

/// `int SHA512_Update(SHA512_CTX *c, const void *data, size_t len)`.
type Update = unsafe extern "C" fn(*mut Context, *const c_void, usize) -> c_int;

/// A digest of whole blocks.
#[derive(Clone, Copy)]
struct Blocks(Update);

impl Blocks {
    fn of_host() -> std::result::Result<Self, libloading::Error> {
        // SAFETY: the host's own OpenSSL, of a version whose beginnings are known to be harmless in any program.
        let library = unsafe { libloading::Library::new(LIBRARY) }?;
        // SAFETY: the function has had this type in all versions of OpenSSL.
        let update = unsafe { *library.get::<Update>(b"SHA512_Update\0")? };
        // The function is there for as long as the program runs.
        std::mem::forget(library);
        Ok(Self(update))
    }

    /// Whether it says what ours does.
    fn is_right(self) -> bool {
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(3 * WORTH_BYTES + 1).collect();
        let mut digester = Digester::with(Some(self));
        digester.update(&bytes[..1]);
        digester.update(&bytes[1..]);
        digester.digest() == StreamDigest::from(Sha512::digest(&bytes))
    }

    /// Moves `state` on over these blocks; nothing where that is refused.
    fn take(self, state: &mut [u64; 8], whole: &[[u8; BLOCK_BYTES]]) -> Option<()> {
        let mut context =
            Context { state: *state, bits_low: 0, bits_high: 0, block: [0; 16], pending: 0, digest_bytes: 64 };
        let bytes = whole.as_flattened();
        // SAFETY: the context is a whole one at the beginning of a block, and so many bytes can be read.
        let done = unsafe { (self.0)(&raw mut context, bytes.as_ptr().cast(), bytes.len()) };
        *state = context.state;
        (done == 1).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Blocks that [`counting`] has taken.
    static TAKEN: AtomicUsize = AtomicUsize::new(0);

    /// Our library's in the place of the host's.
    unsafe extern "C" fn counting(context: *mut Context, bytes: *const c_void, length: usize) -> c_int {
        // SAFETY: as `Blocks::take` calls it.
        let (context, bytes) = unsafe { (&mut *context, std::slice::from_raw_parts(bytes.cast::<u8>(), length)) };
        let (blocks, rest) = bytes.as_chunks();
        assert!(context.pending == 0 && rest.is_empty());
        sha2::block_api::compress512(&mut context.state, blocks);
        TAKEN.fetch_add(blocks.len(), Ordering::Relaxed);
        1
    }

    /// Takes them in pieces of very different lengths.
    fn in_pieces(digester: &mut Digester, mut bytes: &[u8], mut length: usize) {
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(length.min(bytes.len()));
            digester.update(piece);
            bytes = rest;
            length = length * 7 % 9973 + 1;
        }
    }

    #[test]
    fn the_digest_is_the_same_whoever_takes_it_in_whatever_pieces_and_whoever_goes_on() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let digest = StreamDigest::from(Sha512::digest(&bytes));
        let sides = [None, Some(Blocks(counting)), *HOST];
        for (first, second) in (0..9).map(|pair| (pair / 3, pair % 3)) {
            for at in [0, 1, 127, 128, 129, WORTH_BYTES, 150_001, bytes.len()] {
                let mut digester = Digester::with(sides[first]);
                in_pieces(&mut digester, &bytes[..at], at + 1);
                let thawed = Digester::thaw(&digester.state()).unwrap();
                let mut digester = Digester { blocks: sides[second], ..thawed };
                in_pieces(&mut digester, &bytes[at..], 5000);
                assert_eq!(digester.digest(), digest, "{first} {second} {at}");
            }
        }
    }

    #[test]
    fn whole_blocks_are_taken_by_the_host_where_it_can() {
        let before = TAKEN.load(Ordering::Relaxed);
        let mut digester = Digester::with(Some(Blocks(counting)));
        digester.update(&[1; 1]);
        digester.update(&[1; 100 * BLOCK_BYTES]);
        assert!(TAKEN.load(Ordering::Relaxed) >= before + 99);
        assert_eq!(Blocks::of_host().is_ok(), HOST.is_some(), "it is there and not used");
    }

    #[test]
    fn a_state_that_is_none_is_refused() {
        let state = Digester::new().state();
        let error = Digester::thaw(&state[1..]).err().unwrap();
        assert_eq!(error.reason(), "UPLOAD_TAIL_DAMAGED");
    }

    #[test]
    fn a_digest_that_is_wrong_is_found_out() {
        unsafe extern "C" fn nothing(_: *mut Context, _: *const c_void, _: usize) -> c_int {
            1
        }
        unsafe extern "C" fn refuses(_: *mut Context, _: *const c_void, _: usize) -> c_int {
            0
        }
        assert!(!Blocks(nothing).is_right());
        assert!(Blocks(refuses).is_right(), "ours does what it would not");
    }
}
