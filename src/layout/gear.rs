//! Content-defined cuts: a gear sum over the last 64 bytes, cut where it is small.
//!
//! ```text
//! sum = 2 * sum + GEAR[byte]          (mod 2^64: a byte is gone after 64 more)
//! cut after the byte where            sum < 2^43 (chance 2^-21)   from 256 KiB to 1 MiB of the chunk
//!                                     sum < 2^46 (chance 2^-18)   from 1 MiB on
//! cut at 4 MiB in any case
//! ```
//! The two chances are `FastCDC`'s normalisation and keep most chunks near 1 MiB. Nothing is tested in the first
//! 256 KiB of a chunk, and the sum is computed only from 64 bytes before.
//!
//! Our own and not the `fastcdc` crate: that one needs each chunk in one piece of memory, so that every window of the
//! caller that ends inside a chunk (each of them, at 1-4 MiB) would be copied; here the whole state is two numbers, and how the
//! bytes are divided among calls cannot matter. It also ends the risk of cuts that move with
//! a dependency's release, as they did in three of its last.

/// No cut before.
pub(super) const MIN_BYTES: u64 = 256 << 10;
/// From here on cuts are likelier.
pub(super) const USUAL_BYTES: u64 = 1 << 20;
/// Cut here at the latest.
pub(super) const MAX_BYTES: u64 = crate::limits::CHUNK_MAX_BYTES;

/// Bytes that a sum remembers.
const MEMORY: usize = 64;

/// Four lanes of these are summed side by side; short, so that the stretch that holds a cut is soon summed again.
const LANE_BYTES: usize = 2048;
const STRETCH_BYTES: usize = 4 * LANE_BYTES;

const NEVER: u64 = 0;
const SELDOM: u64 = 1 << (64 - 21);
const OFTEN: u64 = 1 << (64 - 18);

/// One 64-bit number per byte value.
static GEAR: [u64; 256] = gear_table();

/// `SplitMix64` from 0: good bits from a rule that can be written down.
const fn gear_table() -> [u64; 256] {
    let mut table = [0; 256];
    let mut state = 0_u64;
    let mut at = 0;
    while at < table.len() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        table[at] = mixed ^ (mixed >> 31);
        at += 1;
    }
    table
}

/// The search for the end of one chunk after the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Gear {
    sum: u64,
    /// Bytes of the chunk seen so far, less than [`MAX_BYTES`].
    seen: u64,
}

impl Gear {
    /// Takes bytes up to the end of the chunk, or all of them if it does not end in them; how many, if it does.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            let (stage_end, below) = self.stage();
            let left = usize::try_from(stage_end - self.seen).unwrap_or(usize::MAX);
            let stage = &bytes[at..bytes.len().min(at.saturating_add(left))];
            if let Some(cut) = below.and_then(|below| roll(&mut self.sum, stage, below)) {
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

    /// Where the present rule ends, and below which sum it cuts; `None` where nothing is summed.
    fn stage(&self) -> (u64, Option<u64>) {
        const SILENT: u64 = MIN_BYTES - MEMORY as u64;
        match self.seen {
            0..SILENT => (SILENT, None),
            SILENT..MIN_BYTES => (MIN_BYTES, Some(NEVER)),
            MIN_BYTES..USUAL_BYTES => (USUAL_BYTES, Some(SELDOM)),
            _ => (MAX_BYTES, Some(OFTEN)),
        }
    }
}

/// Sums `bytes` up to the first that brings the sum below `below`, and tells how many those are.
fn roll(sum: &mut u64, bytes: &[u8], below: u64) -> Option<usize> {
    let (stretches, rest) = bytes.as_chunks::<STRETCH_BYTES>();
    for (at, stretch) in stretches.iter().enumerate() {
        match roll_lanes(*sum, stretch, below) {
            Some(after) => *sum = after,
            None => return roll_singly(sum, stretch, below).map(|cut| at * STRETCH_BYTES + cut),
        }
    }
    roll_singly(sum, rest, below).map(|cut| bytes.len() - rest.len() + cut)
}

/// The sum after a stretch, or `None` if a cut is in it.
///
/// A sum needs no more than the 64 bytes before it, so the four quarters are summed side by side: one alone
/// waits for its own last addition most of the time (measured: twice as fast).
fn roll_lanes(sum: u64, stretch: &[u8; STRETCH_BYTES], below: u64) -> Option<u64> {
    let ([first, second, third, fourth], _) = stretch.as_chunks::<LANE_BYTES>() else { return None };
    let mut sums = [sum, memory_of(first), memory_of(second), memory_of(third)];
    for at in 0..LANE_BYTES {
        for (sum, lane) in sums.iter_mut().zip([first, second, third, fourth]) {
            *sum = add(*sum, lane[at]);
        }
        if sums.iter().any(|sum| *sum < below) {
            return None;
        }
    }
    Some(sums[3])
}

/// The sum after these bytes, whatever was before them.
fn memory_of(lane: &[u8; LANE_BYTES]) -> u64 {
    let (_, memory) = lane.as_slice().split_at(LANE_BYTES - MEMORY);
    memory.iter().fold(0, |sum, byte| add(sum, *byte))
}

fn roll_singly(sum: &mut u64, bytes: &[u8], below: u64) -> Option<usize> {
    let mut rolling = *sum;
    for (at, byte) in bytes.iter().enumerate() {
        rolling = add(rolling, *byte);
        if rolling < below {
            return Some(at + 1);
        }
    }
    *sum = rolling;
    None
}

#[inline(always)]
fn add(sum: u64, byte: u8) -> u64 {
    (sum << 1).wrapping_add(GEAR[usize::from(byte)])
}

#[cfg(test)]
mod tests {
    use super::super::samples::noise;
    use super::*;

    #[test]
    fn lanes_and_single_sums_find_the_same_cuts() {
        let bytes = noise(4, 40 * STRETCH_BYTES + 77);
        for below in [NEVER, OFTEN, 1 << 50, 1 << 52, 1 << 55] {
            let (mut in_lanes, mut single) = (12345, 12345);
            let mut at = 0;
            loop {
                let cut = roll(&mut in_lanes, &bytes[at..], below);
                assert_eq!(cut, roll_singly(&mut single, &bytes[at..], below), "below {below} from {at}");
                let Some(cut) = cut else { break };
                (in_lanes, single, at) = (0, 0, at + cut);
            }
            assert_eq!(in_lanes, single);
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
        let bytes = noise(9, 64 << 20);
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
