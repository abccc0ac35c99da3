//! GGUF version 2 and 3, little-endian: counts, key-value pairs, tensor descriptions, padding, tensors.
//!
//! A tensor's length depends on its quantisation, of which there are more every year; it is taken to reach to where the next
//! one begins. So nothing here needs to know types, and the padding behind a tensor (less than the
//! alignment) belongs to it. Two tensors at one offset make the file opaque.

use super::read::{Input, ReadAt, array_at, u32_in};
use super::{Cut, Region};
use crate::limits;

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: [u8; 17] = *b"general.alignment";
const ALIGNMENT_DEFAULT: u64 = 32;

/// Larger alignments than a huge page are nonsense.
const ALIGNMENT_MAX: u64 = 2 << 20;

/// llama.cpp has four dimensions at most; room for more.
const DIMENSIONS_MAX: u32 = 16;

/// Arrays inside arrays; nobody writes any.
const ARRAY_DEPTH: u32 = 4;

const TYPE_UINT32: u32 = 4;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// The header and every large tensor; `None` if it is not sound GGUF.
pub(super) fn pieces(bytes: &dyn ReadAt, size: u64) -> Option<Vec<Region>> {
    let head: [u8; 8] = array_at(bytes, 0)?;
    if !head.starts_with(&MAGIC) || !matches!(u32_in(&head, 4)?, 2 | 3) {
        return None;
    }
    let mut input = Input::new(bytes, 8, size.min(limits::LAYOUT_HEADER_BYTES));
    let tensors = usize::try_from(input.u64()?).ok().filter(|count| *count <= limits::LAYOUT_PIECES)?;
    let pairs = input.u64()?;
    let mut alignment = ALIGNMENT_DEFAULT;
    for _ in 0..pairs {
        if let Some(value) = skip_pair(&mut input)? {
            alignment = value;
        }
    }
    let mut starts = Vec::new();
    for _ in 0..tensors {
        starts.push(tensor_offset(&mut input)?);
    }
    let data = align(input.offset(), alignment)?;
    tensor_pieces(data, starts, size)
}

fn align(offset: u64, alignment: u64) -> Option<u64> {
    let sound = (1..=ALIGNMENT_MAX).contains(&alignment);
    if sound { offset.checked_next_multiple_of(alignment) } else { None }
}

fn tensor_pieces(data: u64, mut starts: Vec<u64>, size: u64) -> Option<Vec<Region>> {
    starts.sort_unstable();
    let data = data.min(size);
    let ascending = starts.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || starts.last().is_some_and(|last| *last > size - data) {
        return None;
    }
    let ends = starts.iter().skip(1).copied().chain([size - data]);
    let mut pieces = vec![Region { start: 0, len: data, cut: Cut::Content }];
    pieces.extend(starts.iter().zip(ends).filter_map(|(start, end)| Region::of_tensor(&(data + start..data + end))));
    Some(pieces)
}

/// Passes one key and value; the value if the key is the alignment's.
fn skip_pair(input: &mut Input<'_>) -> Option<Option<u64>> {
    let length = input.u64()?;
    let mut key = [0; ALIGNMENT_KEY.len()];
    if length == key.len() as u64 {
        key = input.array()?;
    } else {
        input.skip(length)?;
    }
    match input.u32()? {
        TYPE_UINT32 if key == ALIGNMENT_KEY => input.u32().map(|value| Some(u64::from(value))),
        kind => skip_value(input, kind, ARRAY_DEPTH).map(|()| None),
    }
}

fn skip_value(input: &mut Input<'_>, kind: u32, depth: u32) -> Option<()> {
    match kind {
        TYPE_STRING => skip_string(input),
        TYPE_ARRAY => skip_array(input, depth.checked_sub(1)?),
        _ => input.skip(scalar_bytes(kind)?),
    }
}

/// Every element of a string or array takes bytes of the header, which ends the loop whatever count was claimed.
fn skip_array(input: &mut Input<'_>, depth: u32) -> Option<()> {
    let kind = input.u32()?;
    let count = input.u64()?;
    match scalar_bytes(kind) {
        Some(bytes) => input.skip(count.checked_mul(bytes)?),
        None => (0..count).try_for_each(|_| skip_value(input, kind, depth)),
    }
}

fn skip_string(input: &mut Input<'_>) -> Option<()> {
    let length = input.u64()?;
    input.skip(length)
}

/// Bytes of a value of fixed length.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Passes one tensor description: name, dimensions, type; gives its offset in the data.
fn tensor_offset(input: &mut Input<'_>) -> Option<u64> {
    skip_string(input)?;
    let dimensions = input.u32().filter(|count| *count <= DIMENSIONS_MAX)?;
    input.skip(8 * u64::from(dimensions) + 4)?;
    input.u64()
}
