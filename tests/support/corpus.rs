//! Checkpoints made from a seed: safetensors, PyTorch-style zips, odd trees. Nothing in them compresses or repeats by chance.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::LazyLock;

/// Small reproducible randomness (xorshift64*), not for secrets.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Less than `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// The seed of this run: `TEST_SEED`, else fixed; printed once, so that a failure can be replayed.
pub(crate) fn seed() -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| {
        let seed = std::env::var("TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_260_711);
        eprintln!("TEST_SEED={seed}");
        seed
    });
    *SEED
}

/// Named tensors of 16-bit floats, kept as seeds so that large ones need no memory.
#[derive(Clone, Debug)]
pub(crate) struct Tensors {
    tensors: Vec<(String, u64)>,
    bytes_each: usize,
    note: String,
}

impl Tensors {
    /// `count` tensors of `bytes_each`.
    pub(crate) fn new(seed: u64, count: usize, bytes_each: usize) -> Self {
        let mut random = Random::new(seed);
        let tensors = (0..count).map(|index| (format!("model.layers.{index}.weight"), random.next())).collect();
        Self { tensors, bytes_each, note: String::new() }
    }

    /// The same with tensor `index` trained further and a header 40 bytes or so longer.
    pub(crate) fn fine_tuned(&self, index: usize) -> Self {
        let mut tuned = self.clone();
        tuned.tensors[index].1 ^= 0x5555_5555_5555_5555;
        tuned.note = format!("fine-tuned in tensor {index}, a longer header");
        tuned
    }

    /// The same with other values in tensor `index` alone, so that every other byte is where it was.
    pub(crate) fn trained_on(&self, index: usize) -> Self {
        let mut trained = self.clone();
        trained.tensors[index].1 ^= 0x3333_3333_3333_3333;
        trained
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        (self.tensors.len() * self.bytes_each) as u64
    }

    /// Bytes of one tensor.
    pub(crate) fn bytes_each(&self) -> u64 {
        self.bytes_each as u64
    }

    /// Writes them as one safetensors file.
    pub(crate) fn write_safetensors(&self, path: &Path) {
        let mut out = create(path);
        let header = self.safetensors_header();
        out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        out.write_all(&header).unwrap();
        for (_, seed) in &self.tensors {
            out.write_all(&Random::new(*seed).bytes(self.bytes_each)).unwrap();
        }
        out.flush().unwrap();
    }

    /// Writes them as PyTorch does: a zip of stored members, each tensor a member whose bytes begin at a multiple of 64.
    pub(crate) fn write_torch_zip(&self, path: &Path) {
        let mut zip = ZipWriter::new(path);
        zip.member("archive/data.pkl", b"\x80\x02}q\x00.");
        for (index, (_, seed)) in self.tensors.iter().enumerate() {
            zip.member(&format!("archive/data/{index}"), &Random::new(*seed).bytes(self.bytes_each));
        }
        zip.member("archive/version", b"3\n");
        zip.finish();
    }

    fn safetensors_header(&self) -> Vec<u8> {
        let mut table = serde_json::Map::new();
        table.insert("__metadata__".into(), serde_json::json!({ "format": "pt", "note": self.note }));
        for (index, (name, _)) in self.tensors.iter().enumerate() {
            let range = [index * self.bytes_each, (index + 1) * self.bytes_each];
            let tensor = serde_json::json!({ "dtype": "BF16", "shape": [self.bytes_each / 2], "data_offsets": range });
            table.insert(name.clone(), tensor);
        }
        let mut header = serde_json::to_vec(&table).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        header
    }
}

/// Writes stored members; each one's bytes begin at a multiple of 64, by an extra field, as PyTorch's own writer does.
struct ZipWriter {
    out: BufWriter<File>,
    offset: u64,
    directory: Vec<u8>,
    members: u16,
}

impl ZipWriter {
    fn new(path: &Path) -> Self {
        Self { out: create(path), offset: 0, directory: Vec::new(), members: 0 }
    }

    fn member(&mut self, name: &str, bytes: &[u8]) {
        let start = self.offset + 30 + name.len() as u64 + 4;
        let padding = usize::try_from(start.next_multiple_of(64) - start).unwrap();
        let mut extra = b"FB".to_vec();
        extra.extend_from_slice(&u16::try_from(padding).unwrap().to_le_bytes());
        extra.resize(4 + padding, b'Z');

        let size = u32::try_from(bytes.len()).unwrap();
        let mut common = Vec::new();
        for half in [0_u16, 0, 0, 0] {
            common.extend_from_slice(&half.to_le_bytes());
        }
        for word in [crc32(bytes), size, size] {
            common.extend_from_slice(&word.to_le_bytes());
        }
        common.extend_from_slice(&u16::try_from(name.len()).unwrap().to_le_bytes());

        let mut local = b"PK\x03\x04\x14\x00".to_vec();
        local.extend_from_slice(&common);
        local.extend_from_slice(&u16::try_from(extra.len()).unwrap().to_le_bytes());
        local.extend_from_slice(name.as_bytes());
        local.extend_from_slice(&extra);

        self.directory.extend_from_slice(b"PK\x01\x02\x14\x00\x14\x00");
        self.directory.extend_from_slice(&common);
        self.directory.extend_from_slice(&[0; 2 + 2 + 2 + 2 + 4]);
        self.directory.extend_from_slice(&u32::try_from(self.offset).unwrap().to_le_bytes());
        self.directory.extend_from_slice(name.as_bytes());

        self.out.write_all(&local).unwrap();
        self.out.write_all(bytes).unwrap();
        self.offset += (local.len() + bytes.len()) as u64;
        self.members += 1;
    }

    fn finish(mut self) {
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend_from_slice(&self.members.to_le_bytes());
        end.extend_from_slice(&self.members.to_le_bytes());
        end.extend_from_slice(&u32::try_from(self.directory.len()).unwrap().to_le_bytes());
        end.extend_from_slice(&u32::try_from(self.offset).unwrap().to_le_bytes());
        end.extend_from_slice(&[0, 0]);
        self.out.write_all(&self.directory).unwrap();
        self.out.write_all(&end).unwrap();
        self.out.flush().unwrap();
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut table = [0_u32; 256];
    for (index, slot) in (0_u32..).zip(table.iter_mut()) {
        *slot = (0..8).fold(index, |rest, _| if rest & 1 == 1 { 0xEDB8_8320 ^ (rest >> 1) } else { rest >> 1 });
    }
    !bytes.iter().fold(!0, |sum, byte| table[usize::from(sum.to_le_bytes()[0] ^ byte)] ^ (sum >> 8))
}

/// A tree with everything that is odd and allowed: spaces, umlauts, percent signs, empty files and directories, depth,
/// links (one dangling), equal files, a file of zeros, an executable, thousands of small files.
pub(crate) fn odd_tree(root: &Path, seed: u64) {
    let mut random = Random::new(seed);
    let odd = root.join("a b/ü/%41+#");
    fs::create_dir_all(&odd).unwrap();
    fs::create_dir_all(root.join("empty-dir")).unwrap();
    let deep = root.join("deep/1/2/3/4/5/6/7/8");
    fs::create_dir_all(&deep).unwrap();
    fs::write(odd.join("w.bin"), random.bytes(9_437_187)).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("one"), b"x").unwrap();
    fs::write(deep.join("leaf"), b"leaf").unwrap();
    fs::write(root.join("zeros"), vec![0; 4 << 20]).unwrap();
    fs::copy(root.join("zeros"), root.join("zeros2")).unwrap();
    symlink("a b/ü", root.join("link")).unwrap();
    symlink("not/here", root.join("dangling")).unwrap();
    fs::write(root.join("run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    for index in 0..3000 {
        fs::write(root.join(format!("deep/f{index}")), format!("{index}\n")).unwrap();
    }
}

/// Adds names that are bytes and no text, and the longest one.
pub(crate) fn odd_names(root: &Path) {
    let no_text = OsStr::from_bytes(b"caf\xe9\xff new\nline");
    fs::write(root.join(no_text), b"bytes").unwrap();
    symlink(no_text, root.join("link-to-bytes")).unwrap();
    fs::write(root.join("n".repeat(255)), b"a long name").unwrap();
}

/// One file of random bytes.
pub(crate) fn random_file(path: &Path, seed: u64, bytes: u64) {
    let mut out = create(path);
    let mut random = Random::new(seed);
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(1 << 20);
        out.write_all(&random.bytes(usize::try_from(piece).unwrap())).unwrap();
        left -= piece;
    }
    out.flush().unwrap();
}

fn create(path: &Path) -> BufWriter<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).unwrap();
    }
    let file = File::create(path).unwrap_or_else(|error| panic!("creating {}: {error}", path.display()));
    BufWriter::with_capacity(1 << 20, file)
}
