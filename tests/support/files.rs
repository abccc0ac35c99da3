//! Looking at files: sizes on disk, extended attributes, trees compared.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ran::shell;

/// Compares two trees byte for byte, links by their targets; the test fails with the first differences.
pub(crate) fn assert_same_tree(expected: &Path, found: &Path) {
    let ran = shell("diff -r --no-dereference \"$1\" \"$2\" 2>&1 | head -n 8", &[expected, found]);
    assert!(ran.stdout.is_empty(), "{} differs from {}:\n{}", found.display(), expected.display(), ran.stdout);
    let (expected_count, found_count) = (walk(expected).len(), walk(found).len());
    assert_eq!(expected_count, found_count, "entries below {}", found.display());
}

/// Compares a mounted checkpoint with the tree that it is to be, byte for byte, and what it says of its files with the bytes that are read.
pub(crate) fn assert_mounted(expected: &Path, mounted: &Path) {
    assert_same_tree(expected, mounted);
    assert_digests(mounted);
}

/// Fails unless each file of a mounted checkpoint has the digest that it says.
pub(crate) fn assert_digests(mounted: &Path) {
    let files = regular_files(mounted);
    assert!(!files.is_empty(), "no file is shown below {}", mounted.display());
    for file in files {
        assert_eq!(xattr(&file, "user.ckptd.digest"), b3sum(&file), "{}", file.display());
    }
}

/// Compares one file byte for byte.
pub(crate) fn assert_same_file(expected: &Path, found: &Path) {
    shell("cmp \"$1\" \"$2\"", &[expected, found]).ok();
}

/// Every path below `root`, sorted, the root left out. What vanishes meanwhile may be missing.
pub(crate) fn walk(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        let listed = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound && directory != root => continue,
            listed => listed.unwrap_or_else(|error| panic!("listing {}: {error}", directory.display())),
        };
        for entry in listed {
            let entry = entry.unwrap();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => panic!("examining {}: {error}", entry.path().display()),
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// Regular files below `root`, sorted.
pub(crate) fn regular_files(root: &Path) -> Vec<PathBuf> {
    walk(root).into_iter().filter(|path| path.symlink_metadata().is_ok_and(|found| found.is_file())).collect()
}

/// Bytes that `path` and what is below it occupy, as `du` counts them, everything written out before. What vanishes meanwhile counts nothing.
pub(crate) fn disk_bytes(path: &Path) -> u64 {
    shell("sync -f \"$1\"", &[path]).ok();
    occupied(path)
}

/// Bytes on disk of all regular files below `path`, without directories, as they are this moment.
pub(crate) fn file_bytes(path: &Path) -> u64 {
    let found = regular_files(path).into_iter().filter_map(|file| file.metadata().ok());
    found.map(|meta| meta.blocks() * 512).sum()
}

fn occupied(path: &Path) -> u64 {
    let Ok(meta) = path.symlink_metadata() else { return 0 };
    let below: u64 = match fs::read_dir(path) {
        Ok(entries) if meta.is_dir() => entries.flatten().map(|entry| occupied(&entry.path())).sum(),
        _ => 0,
    };
    meta.blocks() * 512 + below
}

/// The digest of a file as `b3sum` prints it.
pub(crate) fn b3sum(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|error| panic!("opening {}: {error}", path.display()));
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
        if read == 0 {
            return hasher.finalize().to_hex().to_string();
        }
        hasher.update(&buffer[..read]);
    }
}

/// An extended attribute as text.
pub(crate) fn xattr(path: &Path, name: &str) -> String {
    let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let c_name = CString::new(name).unwrap();
    let mut value = vec![0_u8; 4096];
    // SAFETY: both strings end in NUL and outlive the call; the buffer is as long as stated.
    let length = unsafe { libc::getxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let length = usize::try_from(length)
        .unwrap_or_else(|_| panic!("{name} of {}: {}", path.display(), std::io::Error::last_os_error()));
    value.truncate(length);
    String::from_utf8(value).unwrap()
}
