//! One NumPy array: magic, version, header length, header (a Python literal, not read), array.

use super::read::{ReadAt, array_at, u16_in, u32_in};
use super::{Cut, Region};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The header and the array; `None` if it is no large array.
pub(super) fn pieces(bytes: &dyn ReadAt, size: u64) -> Option<Vec<Region>> {
    let head: [u8; 12] = array_at(bytes, 0)?;
    if !head.starts_with(MAGIC) {
        return None;
    }
    let data = match head[6] {
        1 => 10 + u64::from(u16_in(&head, 8)?),
        2 | 3 => 12 + u64::from(u32_in(&head, 8)?),
        _ => return None,
    };
    let array = Region::of_tensor(&(data..size))?;
    Some(vec![Region { start: 0, len: data, cut: Cut::Content }, array])
}
