//! Disks that rot.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::daemon::Daemon;
use super::files::b3sum;

/// What is wrong of a byte that rotted.
pub(crate) const ROT: u8 = 0x10;

/// Where the store has the bytes of a file.
pub(crate) fn blob_of(daemon: &Daemon, file: &Path) -> PathBuf {
    let digest = b3sum(file);
    daemon.state().join("blobs").join(&digest[..2]).join(digest)
}

/// Changes one byte, as a disk would: nobody is told.
pub(crate) fn flip(blob: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(blob).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ ROT], at).unwrap();
    file.sync_all().unwrap();
}
