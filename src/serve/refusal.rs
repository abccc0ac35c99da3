//! Why a request of the kernel is refused, and the one table from that to an errno.

use crate::error::Error;

/// Why a request is refused.
#[derive(Debug)]
pub enum Refusal {
    /// Nothing of that inode or name is there.
    NoSuchEntry,
    /// A directory is needed.
    NotADirectory,
    /// A file is needed and this is a directory.
    IsADirectory,
    /// A symbolic link is needed.
    NotALink,
    /// A regular file is needed.
    NotAFile,
    /// No extended attribute of that name.
    NoSuchAttribute,
    /// The answer is longer than the asker has room for.
    TooLong,
    /// Nothing here can be written.
    ReadOnly,
    /// The operation does not exist here, and the kernel need not ask again.
    NotOffered,
    /// No device control here.
    NoControl,
    /// The kernel asked what it was told not to ask.
    BadRequest,
    /// The bytes that are here end before the file does.
    Truncated,
    /// The store could not.
    Failed(Error),
}

impl Refusal {
    /// What the reader sees.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSuchEntry => libc::ENOENT,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::NotALink | Self::NotAFile | Self::BadRequest => libc::EINVAL,
            Self::NoSuchAttribute => libc::ENODATA,
            Self::TooLong => libc::ERANGE,
            Self::ReadOnly => libc::EROFS,
            Self::NotOffered => libc::ENOSYS,
            Self::NoControl => libc::ENOTTY,
            Self::Truncated => libc::EIO,
            Self::Failed(error) => error.kind().errno(),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}
