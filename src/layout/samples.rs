//! Files of every format, built by hand for the tests.
#![expect(clippy::cast_possible_truncation, reason = "lengths are of samples, or cut off on purpose")]

use super::{Chunk, Chunker, FileDigester, Layout};
use crate::digest::Digest;

/// `len` bytes that depend on `seed` alone.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 32)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(super) type Named = (String, Vec<u8>);

/// A model with large tensors of odd and even lengths and small ones between.
pub(super) fn model() -> Vec<Named> {
    let sizes = [300 << 10, 2 << 10, 256 << 10, 100, 9 << 20, 40_000, 700_001, 30 << 10, 30 << 10, (4 << 20) + 4096];
    (0..).zip(sizes).map(|(seed, len)| (format!("layers.{seed}.weight"), noise(seed, len))).collect()
}

/// A model of a few KiB more than two tensors can have.
pub(super) fn small_model() -> Vec<Named> {
    vec![("a".into(), noise(1, 256 << 10)), ("b".into(), noise(2, 100)), ("c".into(), noise(3, 300 << 10))]
}

pub(super) fn safetensors(tensors: &[Named], metadata: &str) -> Vec<u8> {
    let mut header = format!("{{\"__metadata__\":{{\"note\":\"{metadata}\"}}");
    let mut at = 0;
    for (name, bytes) in tensors {
        let end = at + bytes.len();
        header +=
            &format!(",\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{at},{end}]}}", bytes.len());
        at = end;
    }
    header.push('}');
    let parts = [with_length(header.as_bytes()), tensors.iter().flat_map(|(_, bytes)| bytes.clone()).collect()];
    parts.concat()
}

/// Eight bytes of length, then the bytes: a safetensors header, a GGUF string.
pub(super) fn with_length(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

pub(super) fn gguf_start(version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
    [b"GGUF".as_slice(), &version.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
}

/// A key, a type and the value's bytes.
pub(super) fn gguf_pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [with_length(key.as_bytes()), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
}

pub(super) fn gguf_array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), count.to_le_bytes().as_slice(), elements].concat()
}

pub(super) fn gguf_tensor(name: &str, len: usize, offset: u64) -> Vec<u8> {
    let mut bytes = with_length(name.as_bytes());
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    bytes.extend_from_slice(&(len as u64).to_le_bytes());
    bytes.extend_from_slice(&24_u32.to_le_bytes());
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes
}

pub(super) fn gguf(tensors: &[Named], alignment: u32) -> Vec<u8> {
    let step = alignment as usize;
    let words: Vec<u8> = ["", "<s>", "hello"].iter().flat_map(|word| with_length(word.as_bytes())).collect();
    let mut bytes = gguf_start(3, tensors.len() as u64, 5);
    bytes.extend(gguf_pair("general.architecture", 8, &with_length(b"llama")));
    bytes.extend(gguf_pair("tokenizer.ggml.tokens", 9, &gguf_array(8, 3, &words)));
    bytes.extend(gguf_pair("tokenizer.ggml.scores", 9, &gguf_array(6, 3, &[0; 12])));
    bytes.extend(gguf_pair("general.alignment", 4, &alignment.to_le_bytes()));
    bytes.extend(gguf_pair("rope.freq", 12, &[0; 8]));
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        bytes.extend(gguf_tensor(name, tensor.len(), data.len() as u64));
        data.extend_from_slice(tensor);
        data.resize(data.len().next_multiple_of(step), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(step), 0);
    bytes.extend(data);
    bytes
}

pub(super) fn npy(array: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1'".to_vec();
    bytes.resize(127, b' ');
    bytes.push(b'\n');
    bytes.extend_from_slice(array);
    bytes
}

/// What a zip member is like.
#[derive(Clone, Copy, Default)]
pub(super) struct Style {
    pub(super) method: u16,
    pub(super) flags: u16,
    /// Where members' bytes begin: at multiples of this.
    pub(super) align: usize,
    /// Sizes and offsets in zip64 fields only.
    pub(super) zip64: bool,
}

/// As PyTorch writes: stored, aligned to 64.
pub(super) const TORCH: Style = Style { method: 0, flags: 0, align: 64, zip64: true };

/// As any archiver writes: stored.
pub(super) const STORED: Style = Style { method: 0, flags: 0, align: 1, zip64: false };

pub(super) fn zip(members: &[Named], style: Style) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let local = file.len();
        let name_bytes = name.as_bytes();
        let padding = (local + 34 + name_bytes.len()).next_multiple_of(style.align) - local - 34 - name_bytes.len();
        let name_len = short(name_bytes.len());
        file.extend(
            [b"PK\x03\x04\x14\x00".as_slice(), &style.flags.to_le_bytes(), &style.method.to_le_bytes()].concat(),
        );
        file.extend([0; 8]);
        file.extend([word(bytes.len()), word(bytes.len())].concat());
        file.extend([name_len, short(4 + padding)].concat());
        file.extend([name_bytes, b"FB", &short(padding), &vec![b'Z'; padding]].concat());
        file.extend_from_slice(bytes);
        directory.extend(zip_entry(name, bytes.len() as u64, local as u64, style));
    }
    zip_end(file, &directory, members.len() as u64, style.zip64)
}

pub(super) fn zip_entry(name: &str, len: u64, local: u64, style: Style) -> Vec<u8> {
    let unpacked = if style.method == 0 { len } else { len + 1 };
    let mut extra = Vec::new();
    let mut fields = [0xFFFF_FFFF_u32; 3].map(u32::to_le_bytes);
    if style.zip64 {
        extra.extend([b"FB\x02\x00zz\x01\x00\x18\x00".as_slice(), &unpacked.to_le_bytes()].concat());
        extra.extend([len.to_le_bytes(), local.to_le_bytes()].concat());
    } else {
        fields = [unpacked, len, local].map(|field| (field as u32).to_le_bytes());
    }
    let mut entry = b"PK\x01\x02\x14\x00\x14\x00".to_vec();
    entry.extend([style.flags.to_le_bytes(), style.method.to_le_bytes()].concat());
    entry.extend([0; 8]);
    entry.extend([fields[1], fields[0]].concat());
    entry.extend([short(name.len()), short(extra.len()), short(3)].concat());
    entry.extend([0; 8]);
    entry.extend([&fields[2], name.as_bytes(), &extra, b"xyz"].concat());
    entry
}

pub(super) fn zip_end(mut file: Vec<u8>, directory: &[u8], entries: u64, zip64: bool) -> Vec<u8> {
    let start = file.len() as u64;
    let len = directory.len() as u64;
    file.extend_from_slice(directory);
    if zip64 {
        let record = file.len() as u64;
        file.extend(b"PK\x06\x06\x2c\x00\x00\x00\x00\x00\x00\x00\x1e\x03\x2d\x00\x00\x00\x00\x00\x00\x00\x00\x00");
        file.extend([entries, entries, len, start].map(u64::to_le_bytes).concat());
        file.extend([b"PK\x06\x07\0\0\0\0".as_slice(), &record.to_le_bytes(), &1_u32.to_le_bytes()].concat());
        file.extend(b"PK\x05\x06\0\0\0\0");
        file.extend([0xFF; 12]);
    } else {
        file.extend(b"PK\x05\x06\0\0\0\0");
        file.extend([short(entries as usize), short(entries as usize)].concat());
        file.extend([word(directory.len()), word(start as usize)].concat());
    }
    file.extend([short(7).as_slice(), b"comment"].concat());
    file
}

/// The model as PyTorch saves it.
pub(super) fn torch(tensors: &[Named]) -> Vec<u8> {
    let mut members = vec![("archive/data.pkl".to_owned(), noise(99, 3000))];
    members.extend((0..).zip(tensors).map(|(at, (_, bytes)): (u32, _)| (format!("archive/data/{at}"), bytes.clone())));
    members.push(("archive/version".to_owned(), b"3\n".to_vec()));
    zip(&members, TORCH)
}

fn short(value: usize) -> [u8; 2] {
    (value as u16).to_le_bytes()
}

fn word(value: usize) -> [u8; 4] {
    (value as u32).to_le_bytes()
}

/// The chunks of `bytes`, pushed in windows of these sizes over and over; they are the same where the whole is digested too.
pub(super) fn chunks_in_windows(bytes: &[u8], layout: Layout, windows: &[usize]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut chunks_and_whole = Vec::new();
    let mut whole = FileDigester::new(layout.clone());
    let mut chunker = Chunker::new(layout);
    let mut rest = bytes;
    let mut sizes = windows.iter().cycle();
    while !rest.is_empty() {
        let (window, after) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
        chunker.push(window, &mut |chunk| chunks.push(chunk));
        whole.push(window, &mut |chunk| chunks_and_whole.push(chunk));
        rest = after;
    }
    chunker.finish(&mut |chunk| chunks.push(chunk));
    assert_eq!(whole.finish(&mut |chunk| chunks_and_whole.push(chunk)), Digest::of(bytes));
    assert_eq!(chunks_and_whole, chunks);
    chunks
}

pub(super) fn chunks(bytes: &[u8]) -> Vec<Chunk> {
    chunks_in_windows(bytes, Layout::read(&bytes, bytes.len() as u64), &[1 << 20])
}
