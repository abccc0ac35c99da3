//! Content-defined cuts: a gear sum over the last bytes, 64 to 256 of them, cut where it is large.
//!
//! ```text
//! word   = the last four bytes, little-endian; word' = the four before them
//! sum    = 2 * (sum eight bytes before) + A * word + B * word'       (mod 2^32: a byte is gone after 64 to 256 more)
//! cut after the byte where            sum >= 2^32 - 2^11 (chance 2^-21)   from 256 KiB to 1 MiB of the chunk
//!                                     sum >= 2^32 - 2^14 (chance 2^-18)   from 1 MiB on
//! cut at 4 MiB in any case
//! ```
//! The two chances are `FastCDC`'s normalisation and keep most chunks near 1 MiB. Nothing is tested in the first
//! 256 KiB of a chunk, and the sum is computed only from 256 bytes before.
//!
//! The usual gear sum, `2 * sum + TABLE[byte]`, takes its steps one after the other, each with a look-up. Here eight sums go side by side, each over
//! every eighth place, and products take the table's part: so eight places are one step of a vector (`wide`), three to four times as fast as
//! four table sums beside one another (measured, with AVX2; as fast as those without). Zeros never cut.
//!
//! Our own and not the `fastcdc` crate: that one needs each chunk in one piece of memory, so that every window of the
//! caller that ends inside a chunk (each of them, at 1-4 MiB) would be copied; here the whole state is 56 bytes, and how the
//! bytes are divided among calls cannot matter. It also ends the risk of cuts that move with
//! a dependency's release, as they did in three of its last.

mod wide;

/// No cut before.
pub(super) const MIN_BYTES: u64 = 256 << 10;
/// From here on cuts are likelier.
pub(super) const USUAL_BYTES: u64 = 1 << 20;
/// Cut here at the latest.
pub(super) const MAX_BYTES: u64 = crate::limits::CHUNK_MAX_BYTES;

/// Bytes that a sum remembers: as many steps as it has bits.
const MEMORY_BYTES: u64 = (32 * LANES) as u64;

/// Sums that go side by side.
const LANES: usize = 8;

/// Factors of the two words: odd, and without a pattern.
const A: u32 = 0x9E37_79B1;
const B: u32 = 0xC2B2_AE3D;

/// Sums from here on cut.
const NEVER: u64 = 1 << 32;
const SELDOM: u64 = NEVER - (1 << 11);
const OFTEN: u64 = NEVER - (1 << 14);

/// The search for the end of one chunk after the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Gear {
    sums: Sums,
    /// Bytes of the chunk seen so far, less than [`MAX_BYTES`].
    seen: u64,
}

/// The sums at the last eight places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    /// Oldest first, from `oldest` on and around.
    lanes: [u32; LANES],
    oldest: usize,
    /// The last eight bytes, the last of them highest.
    last: u64,
}

impl Gear {
    /// Takes bytes up to the end of the chunk, or all of them if it does not end in them; how many, if it does.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            let (stage_end, from) = self.stage();
            let left = usize::try_from(stage_end - self.seen).unwrap_or(usize::MAX);
            let stage = &bytes[at..bytes.len().min(at.saturating_add(left))];
            if let Some(cut) = from.and_then(|from| self.sums.roll(stage, from)) {
                *self = Self::default();
                return Some(at + cut);
            }
            at += stage.len();
            self.seen += stage.len() as u64;
            if self.seen == MAX_BYTES {
                *self = Self::default();
                return Some(at);
            }
        }
        None
    }

    /// Forgets the chunk that was begun.
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }

    /// Where the present rule ends, and from which sum it cuts; `None` where nothing is summed.
    fn stage(&self) -> (u64, Option<u64>) {
        const SILENT: u64 = MIN_BYTES - MEMORY_BYTES;
        match self.seen {
            0..SILENT => (SILENT, None),
            SILENT..MIN_BYTES => (MIN_BYTES, Some(NEVER)),
            MIN_BYTES..USUAL_BYTES => (USUAL_BYTES, Some(SELDOM)),
            _ => (MAX_BYTES, Some(OFTEN)),
        }
    }
}

impl Sums {
    /// Sums `bytes` up to the first that brings the sum to `from`, and tells how many those are.
    fn roll(&mut self, bytes: &[u8], from: u64) -> Option<usize> {
        // What a stretch looks back at is then in `bytes` too.
        let mut at = bytes.len().min(LANES);
        if let Some(cut) = self.roll_singly(&bytes[..at], from) {
            return Some(cut);
        }
        while let Some(stretch) = bytes[at - at.min(LANES)..].first_chunk() {
            let (lanes, largest) = wide::sum(self.in_order(), stretch);
            if u64::from(largest) >= from {
                break;
            }
            at += wide::STRETCH_BYTES;
            let last = bytes[..at].last_chunk().map_or(self.last, |last| u64::from_le_bytes(*last));
            *self = Self { lanes, oldest: 0, last };
        }
        let cut = self.roll_singly(&bytes[at..], from)?;
        Some(at + cut)
    }

    fn roll_singly(&mut self, bytes: &[u8], from: u64) -> Option<usize> {
        bytes.iter().position(|byte| u64::from(self.add(*byte)) >= from).map(|at| at + 1)
    }

    /// The sum with one byte more.
    fn add(&mut self, byte: u8) -> u32 {
        self.last = (self.last >> 8) | (u64::from(byte) << 56);
        let sum = &mut self.lanes[self.oldest];
        *sum = next(*sum, self.last);
        self.oldest = (self.oldest + 1) % LANES;
        *sum
    }

    fn in_order(&self) -> [u32; LANES] {
        let mut lanes = self.lanes;
        lanes.rotate_left(self.oldest);
        lanes
    }
}

/// The sum eight bytes after `sum`, those eight being `bytes`, little-endian.
#[inline(always)]
fn next(sum: u32, bytes: u64) -> u32 {
    let (before, word) = (low(bytes), low(bytes >> 32));
    (sum << 1).wrapping_add(word.wrapping_mul(A)).wrapping_add(before.wrapping_mul(B))
}

/// The lower half.
#[inline(always)]
fn low(bytes: u64) -> u32 {
    u32::try_from(bytes & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::samples::noise;
    use super::*;

    #[test]
    fn sums_side_by_side_find_the_cuts_of_single_ones() {
        let bytes = noise(4, 40 * wide::STRETCH_BYTES + 77);
        for from in [NEVER, OFTEN, NEVER - (1 << 16), NEVER - (1 << 20), NEVER - (1 << 23)] {
            let (mut wide, mut single) = (Sums::default(), Sums::default());
            let mut at = 0;
            loop {
                let cut = wide.roll(&bytes[at..], from);
                assert_eq!(cut, single.roll_singly(&bytes[at..], from), "from {from} at {at}");
                assert_eq!((wide.in_order(), wide.last), (single.in_order(), single.last));
                let Some(cut) = cut else { break };
                at += cut;
            }
        }
    }

    #[test]
    fn a_sum_is_of_256_bytes_and_of_each_of_the_last_64() {
        let bytes = noise(7, 1000);
        let sum_of = |bytes: &[u8]| {
            let mut sums = Sums::default();
            bytes.iter().fold(0, |_, byte| sums.add(*byte))
        };
        let whole = sum_of(&bytes);
        assert_eq!(whole, sum_of(&bytes[1000 - 256..]));
        for at in 1000 - 64..1000 {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(whole, sum_of(&other), "byte {at}");
        }
    }

    #[test]
    fn what_never_changes_is_cut_at_the_longest() {
        let zeros = vec![0; 9 << 20];
        let mut gear = Gear::default();
        assert_eq!(gear.find(&zeros), Some(4 << 20));
        assert_eq!(gear.find(&zeros[..3 << 20]), None);
        assert_eq!(gear.find(&zeros), Some(1 << 20));
    }

    #[test]
    fn noise_is_cut_near_one_mebibyte() {
        assert_near_one_mebibyte(&noise(9, 64 << 20));
    }

    /// Weights are no noise: few values of their upper bytes, and the same ones again and again.
    #[test]
    fn weights_and_what_is_quantized_are_cut_near_one_mebibyte() {
        let noise = noise(10, 64 << 20);
        let halves = noise.chunks_exact(2).flat_map(|pair| [pair[0], 0x3c | (pair[1] & 0x83)]);
        assert_near_one_mebibyte(&halves.collect::<Vec<_>>());
        assert_near_one_mebibyte(&noise.iter().map(|byte| byte & 0x0f).collect::<Vec<_>>());
        let singles = noise.chunks_exact(4).flat_map(|word| [word[0], word[1], word[2] & 0x7f, 0x3d]);
        assert_near_one_mebibyte(&singles.collect::<Vec<_>>());
    }

    fn assert_near_one_mebibyte(bytes: &[u8]) {
        let (mut gear, mut at, mut cuts) = (Gear::default(), 0, Vec::new());
        while let Some(cut) = gear.find(&bytes[at..]) {
            at += cut;
            cuts.push(cut as u64);
        }
        let mean = at as u64 / cuts.len() as u64;
        assert!((900 << 10..1300 << 10).contains(&mean), "mean {mean}");
        assert!(cuts.iter().all(|cut| (MIN_BYTES..=MAX_BYTES).contains(cut)));
    }
}
