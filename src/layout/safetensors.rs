//! safetensors: `u64` header length, JSON header, tensors.
//!
//! Only `data_offsets` is read, so that types unknown here are no obstacle. The format is told by its first nine bytes
//! and a header that parses: it has no magic. Tensors that overlap (several names for the same bytes) are not valid
//! safetensors and make the file opaque; bytes that no tensor claims do not matter.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::read::{Input, ReadAt, array_at};
use super::{Cut, Region, sort_disjoint};
use crate::limits;

const LENGTH_BYTES: u64 = 8;

/// The header and every large tensor; `None` if it is not sound safetensors.
pub(super) fn pieces(bytes: &dyn ReadAt, size: u64) -> Option<Vec<Region>> {
    let head: [u8; 9] = array_at(bytes, 0)?;
    let length = head.first_chunk().copied().map(u64::from_le_bytes)?;
    if head[8] != b'{' || length > limits::LAYOUT_HEADER_BYTES || length > size.checked_sub(LENGTH_BYTES)? {
        return None;
    }
    let data = LENGTH_BYTES + length;
    let header: Header = serde_json::from_reader(Input::new(bytes, LENGTH_BYTES, data)).ok()?;
    let mut tensors = header.0;
    if !sort_disjoint(&mut tensors) || tensors.last().is_some_and(|tensor| tensor.end > size - data) {
        return None;
    }
    let mut pieces = vec![Region { start: 0, len: data, cut: Cut::Content }];
    pieces.extend(
        tensors.iter().map(|tensor| tensor.start + data..tensor.end + data).filter_map(|t| Region::of_tensor(&t)),
    );
    Some(pieces)
}

/// Offsets of all tensors, relative to the end of the header.
struct Header(Vec<Range<u64>>);

#[derive(serde::Deserialize)]
#[serde(field_identifier)]
enum Key {
    #[serde(rename = "__metadata__")]
    Metadata,
    #[serde(other)]
    Tensor,
}

#[derive(serde::Deserialize)]
struct Tensor {
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = Vec::new();
        while let Some(key) = map.next_key()? {
            match key {
                Key::Metadata => {
                    map.next_value::<IgnoredAny>()?;
                }
                Key::Tensor if tensors.len() == limits::LAYOUT_PIECES => return Err(A::Error::custom("too many")),
                Key::Tensor => {
                    let (start, end) = map.next_value::<Tensor>()?.data_offsets;
                    tensors.push(start..end);
                }
            }
        }
        Ok(Header(tensors))
    }
}
