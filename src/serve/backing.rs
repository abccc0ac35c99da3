//! The kernel's table of backing files of one connection.
//!
//! Numbers are kept raw rather than in `fuser::BackingId`: they belong to the connection, not to this process,
//! and a successor goes on with them.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::open_files::Backings;
use crate::error::{Error, Kind, Result};

mod control {
    /// `FUSE_DEV_IOC_MAGIC`.
    const MAGIC: u8 = 229;
    /// `FUSE_DEV_IOC_BACKING_CLOSE`.
    const BACKING_CLOSE: u8 = 2;
    nix::ioctl_write_ptr!(close_backing, MAGIC, BACKING_CLOSE, u32);
}

/// Backing files of the connection behind a `/dev/fuse` descriptor.
pub(super) struct DeviceBackings(pub(super) Arc<OwnedFd>);

impl Backings for DeviceBackings {
    fn register(&self, file: BorrowedFd<'_>) -> Result<u32> {
        fuser::BackingId::create_raw(&self.0, file).map_err(|error| {
            let doing = "giving a file of the store to the kernel";
            match error.raw_os_error() {
                Some(libc::ELOOP) => Error::new(Kind::Unsupported, "STORE_STACKED", doing)
                    .remedy("put the state directory on a file system that is not an overlay"),
                Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
                    Error::new(Kind::Unsupported, "NO_PASSTHROUGH", doing)
                        .remedy("run ckptd with CAP_SYS_ADMIN, or set serve.passthrough to never")
                }
                _ => Error::new(Kind::Unavailable, "PASSTHROUGH_FAILED", doing),
            }
            .because(error)
        })
    }

    fn withdraw(&self, backing: u32) {
        // SAFETY: the descriptor is open as long as `self`, and the number is read during the call only.
        let withdrawn = unsafe { control::close_backing(self.0.as_raw_fd(), &raw const backing) };
        if let Err(errno) = withdrawn {
            // The connection is gone, and its table with it.
            tracing::debug!(backing, %errno, "a backing file could not be taken back");
        }
    }
}
