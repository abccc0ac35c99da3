//! Eight gear sums side by side, over a stretch of bytes.

use super::{LANES, next};

/// Bytes summed between two looks at the largest; short, so that the stretch that holds a cut is soon summed again.
pub(super) const STRETCH_BYTES: usize = 512;

/// A stretch with the bytes before it that its first sums are of.
pub(super) type Stretch = [u8; LANES + STRETCH_BYTES];

/// The sums at the last eight places of the stretch, oldest first, `lanes` being those before it; and the largest of all in it.
pub(super) fn sum(lanes: [u32; LANES], stretch: &Stretch) -> ([u32; LANES], u32) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { avx2::sum(lanes, stretch) };
    }
    portable(lanes, stretch)
}

fn portable(mut lanes: [u32; LANES], stretch: &Stretch) -> ([u32; LANES], u32) {
    let mut largest = [0; LANES];
    for at in (0..STRETCH_BYTES).step_by(LANES) {
        for lane in 0..LANES {
            let Some(eight) = stretch[at + lane + 1..].first_chunk() else { break };
            lanes[lane] = next(lanes[lane], u64::from_le_bytes(*eight));
            largest[lane] = largest[lane].max(lanes[lane]);
        }
    }
    (lanes, largest.into_iter().fold(0, u32::max))
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm_set_epi64x, _mm256_add_epi8, _mm256_add_epi32, _mm256_broadcastsi128_si256, _mm256_extract_epi32,
        _mm256_max_epu32, _mm256_mullo_epi32, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_setr_epi8, _mm256_setr_epi32,
        _mm256_setzero_si256, _mm256_shuffle_epi8,
    };

    use super::super::{A, B, LANES};
    use super::Stretch;

    /// As [`super::portable`].
    #[target_feature(enable = "avx2")]
    pub(super) fn sum(lanes: [u32; LANES], stretch: &Stretch) -> ([u32; LANES], u32) {
        // Of sixteen bytes, the eight before the places and the eight at them: the words that end four before each place, and at it.
        let before = _mm256_setr_epi8(
            1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6, 4, 5, 6, 7, // the first four places
            5, 6, 7, 8, 6, 7, 8, 9, 7, 8, 9, 10, 8, 9, 10, 11,
        );
        let word = _mm256_add_epi8(before, _mm256_set1_epi8(4));
        let (a, b) = (_mm256_set1_epi32(A.cast_signed()), _mm256_set1_epi32(B.cast_signed()));
        let (mut sums, mut largest) = (loaded(lanes), _mm256_setzero_si256());
        let (eights, _) = stretch.as_chunks::<LANES>();
        for pair in eights.windows(2) {
            let (first, second) = (i64::from_le_bytes(pair[0]), i64::from_le_bytes(pair[1]));
            let bytes = _mm256_broadcastsi128_si256(_mm_set_epi64x(second, first));
            let words = _mm256_mullo_epi32(_mm256_shuffle_epi8(bytes, word), a);
            let befores = _mm256_mullo_epi32(_mm256_shuffle_epi8(bytes, before), b);
            sums = _mm256_add_epi32(_mm256_add_epi32(sums, sums), _mm256_add_epi32(words, befores));
            largest = _mm256_max_epu32(largest, sums);
        }
        (stored(sums), stored(largest).into_iter().fold(0, u32::max))
    }

    #[target_feature(enable = "avx2")]
    fn loaded(lanes: [u32; LANES]) -> __m256i {
        let [a, b, c, d, e, f, g, h] = lanes.map(u32::cast_signed);
        _mm256_setr_epi32(a, b, c, d, e, f, g, h)
    }

    #[target_feature(enable = "avx2")]
    fn stored(lanes: __m256i) -> [u32; LANES] {
        let lanes = [
            _mm256_extract_epi32::<0>(lanes),
            _mm256_extract_epi32::<1>(lanes),
            _mm256_extract_epi32::<2>(lanes),
            _mm256_extract_epi32::<3>(lanes),
            _mm256_extract_epi32::<4>(lanes),
            _mm256_extract_epi32::<5>(lanes),
            _mm256_extract_epi32::<6>(lanes),
            _mm256_extract_epi32::<7>(lanes),
        ];
        lanes.map(i32::cast_unsigned)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::samples::noise;
    use super::*;

    #[test]
    fn what_the_processor_does_is_what_is_written() {
        let bytes = noise(3, LANES + 20 * STRETCH_BYTES);
        let mut lanes = [7; LANES];
        for at in (0..20 * STRETCH_BYTES).step_by(STRETCH_BYTES) {
            let stretch = bytes[at..].first_chunk().unwrap();
            let expected = portable(lanes, stretch);
            assert_eq!(sum(lanes, stretch), expected);
            lanes = expected.0;
        }
    }
}
