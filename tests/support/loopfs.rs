//! A small file system of its own kind and size, in a file.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::place::Place;
use super::ran::shell;

/// A mounted image; unmounted and removed on drop.
#[derive(Debug)]
pub(crate) struct LoopFs {
    place: Place,
    root: PathBuf,
}

impl LoopFs {
    /// An ext4 of `mib` MiB.
    pub(crate) fn ext4(mib: u64) -> Self {
        Self::make(mib, "mkfs.ext4 -q -m 0 -F \"$1\"")
    }

    /// An XFS of `mib` MiB (300 at least) whose files can share extents.
    pub(crate) fn xfs(mib: u64) -> Self {
        Self::make(mib.max(320), "mkfs.xfs -q -m reflink=1 \"$1\"")
    }

    fn make(mib: u64, mkfs: &str) -> Self {
        let place = Place::new();
        let image = place.join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let root = place.dir("fs");
        // With `mount -o loop` the loop device goes with the mount.
        shell(&format!("{mkfs}; mount -o loop \"$1\" \"$2\""), &[&image, &root]).ok();
        Self { place, root }
    }

    /// Its root directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A new directory in it.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.root.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Bytes in use, shared extents counted once, everything written out before.
    pub(crate) fn used_bytes(&self) -> u64 {
        shell("sync -f \"$1\"", &[&self.root]).ok();
        self.used_now()
    }

    /// The same as it is this moment: bytes that are yet to be written out count, and files without a name.
    pub(crate) fn used_now(&self) -> u64 {
        let stat = statvfs(&self.root).unwrap();
        (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
    }
}
