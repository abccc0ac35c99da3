//! Headers that lie: the file is opaque, or sound as far as it goes; never a panic, never slow, never much memory.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::samples::{
    self, STORED, TORCH, gguf_array, gguf_pair, gguf_start, gguf_tensor, with_length, zip_end, zip_entry,
};
use super::*;
use crate::limits;

/// Reads the layout of a file that claims to be `size` long, and checks what must always hold.
fn read(bytes: &[u8], size: u64) -> Layout {
    let begun = Instant::now();
    let layout = Layout::read(&bytes, size);
    assert!(begun.elapsed() < Duration::from_secs(20), "took {:?}", begun.elapsed());
    let end = layout.regions().iter().fold(0, |at, region| {
        assert!(region.start == at && region.len > 0, "{region:?} at {at}");
        at + region.len
    });
    assert_eq!(end, size);
    layout
}

fn assert_opaque(what: &str, bytes: &[u8]) {
    let layout = read(bytes, bytes.len() as u64);
    assert_eq!(layout, Layout::opaque(bytes.len() as u64), "{what}");
}

/// A safetensors file with this header and 1 MiB of data.
fn tensors(header: &str) -> Vec<u8> {
    [with_length(header.as_bytes()), vec![7; 1 << 20]].concat()
}

fn with_claimed_length(length: u64, header: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), header, &[b' '; 1 << 20]].concat()
}

#[test]
fn lying_safetensors_are_opaque() {
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
    let deep_metadata = format!("{{\"__metadata__\":{}", "{\"a\":".repeat(1 << 18));
    let cases = [
        ("10 GB header", with_claimed_length(10_000_000_000, b"{")),
        ("header of 2^64 - 1", with_claimed_length(u64::MAX, b"{")),
        ("header over the limit", with_claimed_length(limits::LAYOUT_HEADER_BYTES + 1, b"{}")),
        ("header longer than the file", with_claimed_length((1 << 20) + 3, b"{}")),
        ("no JSON", tensors("{\"a\":")),
        ("no object", tensors("[]")),
        ("more behind the object", tensors("{} {}")),
        ("not UTF-8", with_claimed_length(4, b"{\"\xFF\"")),
        ("deep nesting", tensors(&deep)),
        ("deep metadata", tensors(&deep_metadata)),
        ("no offsets", tensors(r#"{"a":{"dtype":"F32"}}"#)),
        ("three offsets", tensors(r#"{"a":{"data_offsets":[0,1,2]}}"#)),
        ("negative", tensors(r#"{"a":{"data_offsets":[-1,300000]}}"#)),
        ("fractions", tensors(r#"{"a":{"data_offsets":[0.5,300000]}}"#)),
        ("over 64 bits", tensors(r#"{"a":{"data_offsets":[0,18446744073709551616]}}"#)),
        ("ends at 2^64 - 1", tensors(r#"{"a":{"data_offsets":[0,18446744073709551615]}}"#)),
        ("begins at 2^64 - 1", tensors(r#"{"a":{"data_offsets":[18446744073709551615,18446744073709551615]}}"#)),
        ("beyond the file", tensors(r#"{"a":{"data_offsets":[0,1048577]}}"#)),
        ("backwards", tensors(r#"{"a":{"data_offsets":[500000,100]}}"#)),
        ("tied", tensors(r#"{"a":{"data_offsets":[0,500000]},"b":{"data_offsets":[0,500000]}}"#)),
        ("overlap", tensors(r#"{"a":{"data_offsets":[0,500000]},"b":{"data_offsets":[499999,600000]}}"#)),
        ("small inside large", tensors(r#"{"a":{"data_offsets":[0,500000]},"b":{"data_offsets":[5,9]}}"#)),
    ];
    for (what, bytes) in cases {
        assert_opaque(what, &bytes);
    }
}

#[test]
fn odd_but_sound_safetensors_are_cut() {
    let unknown_type = r#"{"a":{"dtype":"F3_E1","shape":[9],"data_offsets":[8,500000],"new":{"x":[]}}}   "#;
    for header in [unknown_type, r#"{"e":{"data_offsets":[8,8]},"a":{"data_offsets":[8,500000]}}"#] {
        let bytes = tensors(header);
        let layout = read(&bytes, bytes.len() as u64);
        let steps: Vec<_> = layout.regions().iter().filter(|region| region.cut == Cut::Steps).collect();
        assert_eq!(steps.len(), 1, "{header}");
        assert_eq!((steps[0].start, steps[0].len), (8 + header.len() as u64 + 8, 499_992));
    }
}

#[test]
fn more_tensors_than_the_limit_are_opaque() {
    let one = |at: usize| format!("\"{at}\":{{\"data_offsets\":[0,0]}}");
    let all: Vec<String> = (0..=limits::LAYOUT_PIECES).map(one).collect();
    assert_opaque("tensors over the limit", &tensors(&format!("{{{}}}", all.join(","))));
    assert_eq!(read(&tensors(&format!("{{{}}}", all[1..].join(","))), 1 << 24).format(), Format::Safetensors);
}

#[test]
fn lying_gguf_is_opaque() {
    let huge = u64::MAX.to_le_bytes();
    let pair = |kind, value: &[u8]| [gguf_start(3, 0, 1), gguf_pair("k", kind, value), vec![0; 1 << 20]].concat();
    let nested = (0..10_000).fold(Vec::new(), |_, _| gguf_array(9, 1, &[])).repeat(10_000);
    let two = |a, b| [gguf_start(3, 2, 0), gguf_tensor("a", 9, a), gguf_tensor("b", 9, b), vec![0; 1 << 20]].concat();
    let aligned = |value: u32| {
        [gguf_start(3, 0, 1), gguf_pair("general.alignment", 4, &value.to_le_bytes()), vec![0; 1 << 20]].concat()
    };
    let cases = [
        ("tensor count", [gguf_start(3, u64::MAX, 0), vec![0; 1 << 20]].concat()),
        ("tensor count that the header cannot hold", [gguf_start(3, 1 << 18, 0), vec![0; 1 << 20]].concat()),
        ("pair count", [gguf_start(3, 0, u64::MAX), vec![0; 40 << 20]].concat()),
        ("key length", [gguf_start(3, 0, 1), huge.to_vec(), vec![0; 1 << 20]].concat()),
        ("string length", pair(8, &huge)),
        ("array length", pair(9, &gguf_array(5, u64::MAX, &[]))),
        ("array length that overflows", pair(9, &gguf_array(10, u64::MAX / 4, &[]))),
        ("array of so many strings", pair(9, &gguf_array(8, u64::MAX, &[]))),
        ("arrays in arrays", pair(9, &nested)),
        ("unknown type", pair(77, &[0; 8])),
        ("version 1", [gguf_start(1, 0, 0), vec![0; 1 << 20]].concat()),
        ("big-endian", [gguf_start(3_u32.swap_bytes(), 0, 0), vec![0; 1 << 20]].concat()),
        ("alignment 0", aligned(0)),
        ("alignment over the limit", aligned(u32::MAX)),
        ("offset beyond the file", two(0, 2 << 20)),
        ("offset of 2^64 - 1", two(0, u64::MAX)),
        ("two tensors in one place", two(64, 64)),
    ];
    for (what, bytes) in cases {
        assert_opaque(what, &bytes);
    }
}

/// An archive of one large member, whose directory is made by `entry` from the offset of that member.
fn archive(entries: u64, zip64: bool, entry: impl Fn(u64) -> Vec<u8>) -> Vec<u8> {
    let whole = samples::zip(&[("a/data/0".to_owned(), vec![7; 1 << 20])], STORED);
    let members = whole[..whole.len() - 4 - 46 - 8 - 3 - 22 - 3].to_vec();
    zip_end(members, &entry(0), entries, zip64)
}

#[test]
fn lying_zip_is_opaque() {
    let entry = |name: &str, len, local| zip_entry(name, len, local, TORCH);
    let honest = |local| entry("a/data/0", 1 << 20, local);
    let bytes = archive(1, true, honest);
    assert_eq!(read(&bytes, bytes.len() as u64).regions().len(), 3, "the honest one is cut");
    let truncated = |count: usize| bytes[..bytes.len() - count].to_vec();
    let cases = [
        ("count over the limit", archive(u64::MAX, true, honest)),
        ("more entries than there are", archive(2, true, honest)),
        ("65,535 entries and no zip64", archive(0xFFFF, false, honest)),
        ("no directory", archive(1, true, |_| vec![])),
        ("member of 2^64 - 1", archive(1, true, |local| entry("a/data/0", u64::MAX, local))),
        ("member longer than the archive", archive(1, true, |local| entry("a/data/0", 2 << 20, local))),
        ("member into the directory", archive(1, true, |local| entry("a/data/0", (1 << 20) + 9, local))),
        ("member at 2^64 - 1", archive(1, true, |_| entry("a/data/0", 1 << 20, u64::MAX))),
        ("member where none is", archive(1, true, |_| entry("a/data/0", 300_000, 500))),
        ("the same bytes twice", archive(2, true, |local| [honest(local), honest(local)].concat())),
        ("overlap", archive(2, true, |local| [entry("a", 300_000, local), entry("b", 300_000, local)].concat())),
        ("zip64 without its field", archive(1, true, |_| zip_entry("a", 0xFFFF_FFFF, 0, STORED))),
        ("no end record", truncated(7 + 22)),
        ("end record cut", truncated(1)),
        ("archives in a row", [bytes.clone(), bytes.clone()].concat()),
        ("bytes before", [b"#!/bin/sh\n".to_vec(), bytes.clone()].concat()),
        ("bytes behind", [bytes.clone(), b"\n".to_vec()].concat()),
        ("directory of 2^64 - 1", patched(&bytes, b"PK\x06\x06", 40, u64::MAX)),
        ("directory at 2^64 - 1", patched(&bytes, b"PK\x06\x06", 48, u64::MAX)),
        ("record at 2^64 - 1", patched(&bytes, b"PK\x06\x07", 8, u64::MAX)),
        ("record at 0", patched(&bytes, b"PK\x06\x07", 8, 0)),
    ];
    for (what, bytes) in cases {
        assert_opaque(what, &bytes);
    }
}

/// `bytes` with a number put `at` bytes behind where `magic` is last found.
fn patched(bytes: &[u8], magic: &[u8; 4], at: usize, number: u64) -> Vec<u8> {
    let place = bytes.windows(4).rposition(|window| window == magic).unwrap() + at;
    let mut bytes = bytes.to_vec();
    bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[test]
fn lying_npy_is_opaque() {
    let honest = samples::npy(&vec![7; 1 << 20]);
    let cases = [
        ("header longer than the file", [b"\x93NUMPY\x02\x00\xFF\xFF\xFF\xFF".to_vec(), vec![0; 1 << 20]].concat()),
        ("unknown version", [b"\x93NUMPY\x09\x00\x10\x00".to_vec(), vec![0; 1 << 20]].concat()),
        ("cut in the header", honest[..100].to_vec()),
        ("cut in the magic", honest[..5].to_vec()),
    ];
    for (what, bytes) in cases {
        assert_opaque(what, &bytes);
    }
}

#[test]
fn archives_are_looked_into_only_so_deep() {
    let model = samples::safetensors(&samples::small_model(), "");
    let steps = |bytes: &[u8]| {
        let layout = read(bytes, bytes.len() as u64);
        layout.regions().iter().filter(|region| region.cut == Cut::Steps).count()
    };
    let pack = |bytes: Vec<u8>| samples::zip(&[("inner".to_owned(), bytes)], STORED);
    let (once, twice) = (pack(model.clone()), pack(pack(model.clone())));
    assert_eq!([steps(&model), steps(&once), steps(&twice), steps(&pack(twice.clone()))], [2, 2, 2, 0]);
}

#[test]
fn headers_beyond_the_budget_are_not_looked_into() {
    let model = samples::safetensors(&samples::small_model(), &"x".repeat(10_000));
    let bytes = samples::zip(&["a", "b", "c"].map(|name| (name.to_owned(), model.clone())), STORED);
    let steps = |budget| {
        let layout = Layout::read_within(&bytes, bytes.len() as u64, budget);
        layout.regions().iter().filter(|region| region.cut == Cut::Steps).count()
    };
    assert_eq!([1 << 20, 80_000, 60_000].map(steps), [6, 2, 0]);
}

/// Reads nothing but errors.
struct Broken;

impl ReadAt for Broken {
    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::from_raw_os_error(libc::EIO))
    }
}

#[test]
fn what_cannot_be_read_is_opaque() {
    assert_eq!(Layout::read(&Broken, 1 << 40), Layout::opaque(1 << 40));
    assert_eq!(Layout::read(&Vec::new(), 1 << 40), Layout::opaque(1 << 40));
    assert_eq!(Layout::read(&Vec::new(), 0).regions(), []);
    assert_eq!(Layout::read(&vec![0; 100], u64::MAX).format(), Format::Opaque);
}

/// Small files of each format whose every structural byte is worth changing.
fn targets() -> Vec<Vec<u8>> {
    let model = samples::small_model();
    let npz = vec![("a.npy".to_owned(), samples::npy(&model[2].1))];
    vec![
        samples::safetensors(&model, "note"),
        samples::gguf(&model, 32),
        samples::torch(&model),
        samples::zip(&npz, STORED),
        samples::npy(&model[2].1),
    ]
}

#[test]
fn no_flipped_byte_of_a_header_or_directory_panics() {
    for mut bytes in targets() {
        let size = bytes.len();
        for at in (0..1000).chain(size - 1500..size) {
            for flip in [0x01, 0x80, 0xFF] {
                bytes[at] ^= flip;
                read(&bytes, size as u64);
                bytes[at] ^= flip;
            }
        }
    }
}

#[test]
fn no_truncation_panics() {
    for bytes in targets() {
        for size in (0..1000).chain(bytes.len() - 1500..bytes.len()) {
            read(&bytes[..size], size as u64);
            read(&bytes, size as u64);
            read(&bytes[..size], bytes.len() as u64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_damage_panics(
        which in 0_usize..5,
        wounds in prop::collection::vec((any::<bool>(), 0_usize..1500, prop_oneof![any::<u64>(), 0_u64..70_000, Just(u64::MAX)]), 1..6),
    ) {
        let mut bytes = targets().swap_remove(which);
        for (tail, at, value) in wounds {
            let place = if tail { bytes.len() - 8 - at } else { at };
            bytes[place..place + 8].copy_from_slice(&value.to_le_bytes());
        }
        read(&bytes, bytes.len() as u64);
    }

    #[test]
    fn no_noise_behind_a_magic_panics(magic in 0_usize..5, rest in prop::collection::vec(any::<u8>(), 0..300)) {
        let magic = [b"GGUF\x03\0\0\0".as_slice(), b"\x40\0\0\0\0\0\0\0{\"", b"PK\x03\x04", b"\x93NUMPY\x01\0", b""][magic];
        let bytes = [magic, &rest, b"PK\x05\x06\0\0\0\0\x01\0\x01\0\x2E\0\0\0\x04\0\0\0\0\0"].concat();
        read(&bytes, bytes.len() as u64);
    }
}
