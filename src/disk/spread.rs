//! Where ext4 looks for the inodes of what is filled.
//!
//! A new file gets one of the block group of its directory, and a new directory one near its parent. ext4 goes over inodes that were deleted in
//! the last minutes one after the other there, holding the directory meanwhile, so a checkpoint of many files that comes soon after another
//! was removed would come slower the more went. A directory with the flag `T` has each directory that is made in it put into a group with room.
//! Other file systems need none of this.

use std::ffi::c_long;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

/// `FS_TOPDIR_FL` of `linux/fs.h`.
const TOPDIR: c_long = 0x0002_0000;

nix::ioctl_read!(
    /// `FS_IOC_GETFLAGS` of `linux/fs.h`.
    get_flags, b'f', 1, c_long
);
nix::ioctl_write_ptr!(
    /// `FS_IOC_SETFLAGS` of `linux/fs.h`.
    set_flags, b'f', 2, c_long
);

/// Has directories that are made in `directory` spread over the file system, where that is ext4. Nothing depends on it.
pub(super) fn spread_below(directory: &Path) {
    if let Err(error) = try_to_spread(directory) {
        tracing::debug!(path = %directory.display(), %error, "directories made there are not spread");
    }
}

fn try_to_spread(directory: &Path) -> std::io::Result<()> {
    let opened = File::open(directory)?;
    if fstatfs(&opened)?.filesystem_type() != EXT4_SUPER_MAGIC {
        return Ok(());
    }
    let mut flags: c_long = 0;
    // SAFETY: the kernel writes 4 bytes of `flags`, which outlives the call; the descriptor is open.
    unsafe { get_flags(opened.as_raw_fd(), &raw mut flags) }?;
    if flags & TOPDIR == 0 {
        flags |= TOPDIR;
        // SAFETY: the kernel reads 4 bytes of `flags`, which outlives the call; the descriptor is open.
        unsafe { set_flags(opened.as_raw_fd(), &raw const flags) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_ext4_gets_the_flag_and_another_is_left() {
        for place in ["/var/tmp", "/dev/shm"] {
            let directory = tempfile::tempdir_in(place).unwrap();
            spread_below(directory.path());
            spread_below(directory.path());
            let opened = File::open(directory.path()).unwrap();
            let is_ext4 = fstatfs(&opened).unwrap().filesystem_type() == EXT4_SUPER_MAGIC;
            let mut flags: c_long = 0;
            // SAFETY: as above.
            let asked = unsafe { get_flags(opened.as_raw_fd(), &raw mut flags) };
            assert_eq!(asked.is_ok() && flags & TOPDIR != 0, is_ext4, "{place}");
        }
    }
}
