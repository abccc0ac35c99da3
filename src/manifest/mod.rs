//! The canonical tree of a checkpoint and its identity.
//!
//! A [`Manifest`] lists every entry below the root: path, kind, size, executable bit, file digest or symlink
//! target, and nothing else: no times, owners, source or chunking. Entries are in [`EntryPath`] order (a directory
//! right before what is below it) and every parent directory is there, so equal trees have equal bytes and the
//! digest of those bytes is the checkpoint digest, whatever the source was.
//!
//! Invariants, established by [`Manifest::new`] and checked again by [`Manifest::decode`]: strictly ascending
//! paths, parents present and directories, no entry below a file or symlink, counts and lengths within `limits`.

mod codec;
mod tree;

pub use codec::CODEC_VERSION;
pub use tree::{ROOT, Tree};

use crate::digest::Digest;
use crate::error::{Error, Result, TOO_MANY};
use crate::limits;
use crate::names::EntryPath;

/// What helps where two names cannot be in one tree.
const RENAME: &str = "rename one of them at the source, or give a path without them";

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Exact length in bytes.
        size: u64,
        /// Whether any executable bit was set.
        executable: bool,
        /// File digest.
        digest: Digest,
    },
    /// A symbolic link, kept verbatim and never followed here.
    Symlink {
        /// Target bytes, 1 to 4095, without NUL.
        target: Box<[u8]>,
    },
}

/// One entry of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is below the root.
    pub path: EntryPath,
    /// What it is.
    pub kind: EntryKind,
}

/// The canonical tree: see the module's page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
    logical_bytes: u64,
    files: u64,
}

impl Manifest {
    /// Makes the canonical tree of `entries`, in any order; missing parent directories are added, the root is implied.
    ///
    /// # Errors
    /// `DUPLICATE_ENTRY`, `NOT_A_DIRECTORY` (an entry below a file or symlink), `BAD_SYMLINK`, `TOO_MANY_ENTRIES`.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self> {
        entries.retain(|entry| !(entry.path.is_root() && entry.kind == EntryKind::Directory));
        add_missing_parents(&mut entries);
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        merge_equal_directories(&mut entries);
        Self::from_sorted(entries)
    }

    /// Checks entries that claim to be canonical already.
    fn from_sorted(entries: Vec<Entry>) -> Result<Self> {
        if entries.len() > limits::CHECKPOINT_ENTRIES {
            return Err(Error::new(
                crate::error::Kind::NoSpace,
                "TOO_MANY_ENTRIES",
                format!(
                    "the checkpoint has {} entries, at most {} are allowed",
                    entries.len(),
                    limits::CHECKPOINT_ENTRIES
                ),
            )
            .remedy(TOO_MANY));
        }
        let mut logical_bytes = 0_u64;
        let mut files = 0;
        let mut open: Vec<&EntryPath> = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            check_place(index.checked_sub(1).map(|i| &entries[i]), entry, &mut open)?;
            match &entry.kind {
                EntryKind::Directory => open.push(&entry.path),
                EntryKind::File { size, .. } => {
                    files += 1;
                    logical_bytes = logical_bytes.checked_add(*size).ok_or_else(|| {
                        Error::invalid("SIZE_OVERFLOW", "the sizes of the files add up to more than 2^64 bytes")
                    })?;
                }
                EntryKind::Symlink { target } => check_target(&entry.path, target)?,
            }
        }
        Ok(Self { entries, logical_bytes, files })
    }

    /// All entries below the root in canonical order. Entry `i` has inode `i + 2`; the root is inode 1.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sum of file sizes in bytes.
    pub fn logical_bytes(&self) -> u64 {
        self.logical_bytes
    }

    /// Number of regular files.
    pub fn files(&self) -> u64 {
        self.files
    }

    /// Canonical bytes; [`Manifest::decode`] is the inverse.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// Reads canonical bytes; anything not canonical is refused.
    ///
    /// # Errors
    /// Corrupt, `BAD_MANIFEST`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        codec::decode(bytes)
    }

    /// The checkpoint digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// Digest of the tree without its files' bytes: of the canonical encoding with every file digest zero. Inode numbers
    /// and attributes follow from it, also while the digests are not known yet.
    pub fn shape(&self) -> Digest {
        Digest::of(&codec::encode_shape(self))
    }
}

fn add_missing_parents(entries: &mut Vec<Entry>) {
    let mut known: std::collections::HashSet<EntryPath> = entries.iter().map(|entry| entry.path.clone()).collect();
    let mut missing = Vec::new();
    for entry in entries.iter() {
        let mut parent = entry.path.parent();
        while let Some(path) = parent.filter(|path| !path.is_root() && !known.contains(path)) {
            known.insert(path.clone());
            parent = path.parent();
            missing.push(Entry { path, kind: EntryKind::Directory });
        }
    }
    entries.append(&mut missing);
}

/// Several sources name a directory more than once (archives, object stores); that is one directory.
fn merge_equal_directories(entries: &mut Vec<Entry>) {
    entries.dedup_by(|later, earlier| {
        later.path == earlier.path && later.kind == EntryKind::Directory && earlier.kind == EntryKind::Directory
    });
}

fn check_place<'a>(before: Option<&'a Entry>, entry: &'a Entry, open: &mut Vec<&'a EntryPath>) -> Result<()> {
    if entry.path.is_root() {
        return Err(Error::invalid("BAD_ENTRY_PATH", "the root of a checkpoint must be a directory"));
    }
    if let Some(before) = before.filter(|before| before.path == entry.path) {
        let directories = [before, entry].map(|entry| entry.kind == EntryKind::Directory);
        let path = &entry.path;
        let message = match directories {
            [false, false] => format!("the path `{path}` occurs twice"),
            _ => format!("the path `{path}` occurs twice, as a directory and as what is none"),
        };
        return Err(Error::invalid("DUPLICATE_ENTRY", message).remedy(RENAME));
    }
    if before.is_some_and(|before| before.path > entry.path) {
        return Err(Error::invalid("BAD_MANIFEST", format!("the path `{}` is out of order", entry.path)));
    }
    let Some(parent) = entry.path.parent().filter(|parent| !parent.is_root()) else {
        open.clear();
        return Ok(());
    };
    while open.last().is_some_and(|directory| **directory != parent) {
        open.pop();
    }
    if open.is_empty() {
        return Err(Error::invalid(
            "NOT_A_DIRECTORY",
            format!("`{}` is below `{parent}`, which is not a directory", entry.path),
        )
        .remedy(RENAME));
    }
    Ok(())
}

fn check_target(path: &EntryPath, target: &[u8]) -> Result<()> {
    if target.is_empty() || target.len() > limits::ENTRY_PATH_BYTES || target.contains(&0) {
        return Err(Error::invalid(
            "BAD_SYMLINK",
            format!("the target of the symbolic link `{path}` is empty, too long or has a NUL byte"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> EntryPath {
        EntryPath::new(text.as_bytes()).unwrap()
    }

    fn file(at: &str, content: &[u8]) -> Entry {
        let kind = EntryKind::File { size: content.len() as u64, executable: false, digest: Digest::of(content) };
        Entry { path: path(at), kind }
    }

    fn sample() -> Vec<Entry> {
        vec![
            file("b/model.safetensors", b"weights"),
            Entry { path: path("link"), kind: EntryKind::Symlink { target: (*b"b/model.safetensors").into() } },
            Entry {
                path: path("run.sh"),
                kind: EntryKind::File { size: 2, executable: true, digest: Digest::of(b"#!") },
            },
            Entry { path: path("empty"), kind: EntryKind::Directory },
        ]
    }

    #[test]
    fn order_and_implied_parents_do_not_change_the_identity() {
        let forwards = Manifest::new(sample()).unwrap();
        let mut entries = sample();
        entries.reverse();
        entries.push(Entry { path: path("b"), kind: EntryKind::Directory });
        entries.push(Entry { path: EntryPath::root(), kind: EntryKind::Directory });
        let backwards = Manifest::new(entries).unwrap();
        assert_eq!(forwards, backwards);
        assert_eq!(forwards.digest(), backwards.digest());
        assert_eq!((forwards.files(), forwards.logical_bytes()), (2, 9));
    }

    #[test]
    fn golden_bytes_and_digest_stay_as_they_are() {
        let manifest = Manifest::new(sample()).unwrap();
        let bytes = manifest.encode();
        assert_eq!(&bytes[..17], b"ckptd-manifest-1\n");
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
        assert_eq!(manifest.digest().to_hex(), GOLDEN_SAMPLE);
        assert_eq!(Manifest::new(vec![]).unwrap().digest().to_hex(), GOLDEN_EMPTY);
    }

    const GOLDEN_SAMPLE: &str = "37c68e69f3fcecd5ed759ec26ce5eeeb7f73d1f23cc9cfa54fee261c04fbb144";
    const GOLDEN_EMPTY: &str = "9f99d528183d1fcec26753feae4998a654c23fb70adaef351ea194bc7fbfcc0d";

    #[test]
    fn a_shape_is_of_paths_kinds_and_sizes_and_not_of_bytes() {
        let shape = |entries| Manifest::new(entries).unwrap().shape();
        let before = shape(vec![file("a", b"123"), file("d/b", b"45")]);
        assert_eq!(before, shape(vec![file("a", b"xyz"), file("d/b", b"uv")]));
        assert_ne!(before, shape(vec![file("a", b"12"), file("d/b", b"345")]));
        assert_ne!(before, shape(vec![file("a", b"123"), file("d/c", b"45")]));
        assert_eq!(Manifest::new(sample()).unwrap().shape().to_hex(), GOLDEN_SHAPE);
    }

    const GOLDEN_SHAPE: &str = "4ad31a1cd59db75832899927adcf9be21be89daf390c2c6cecf1ed9eb3e80a00";

    #[test]
    fn impossible_trees_are_refused() {
        let below_a_file = vec![file("a", b"x"), file("a/b", b"y")];
        assert_eq!(Manifest::new(below_a_file).unwrap_err().reason(), "NOT_A_DIRECTORY");
        let twice = vec![file("a", b"x"), file("a", b"y")];
        assert_eq!(Manifest::new(twice).unwrap_err().reason(), "DUPLICATE_ENTRY");
        let both = vec![file("a", b"x"), Entry { path: path("a"), kind: EntryKind::Directory }];
        assert_eq!(Manifest::new(both).unwrap_err().reason(), "DUPLICATE_ENTRY");
    }

    #[test]
    fn damaged_bytes_are_refused_and_never_panic() {
        let bytes = Manifest::new(sample()).unwrap().encode();
        for cut in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(Manifest::decode(&longer).is_err());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            if let Ok(manifest) = Manifest::decode(&flipped) {
                assert_eq!(manifest.encode(), flipped, "flipped at {at}");
            }
        }
    }
}
