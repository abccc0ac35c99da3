//! Shared extents: equal ranges of different files kept once by the filesystem itself (XFS, btrfs), and the copies that stand in for them.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{Disk, remove_file};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::DISK_BLOCK_BYTES;

/// Bytes copied at a time where extents cannot be shared.
const COPY_BYTES: usize = 1 << 20;

nix::ioctl_write_ptr!(
    /// `FICLONERANGE` of `linux/fs.h`.
    ficlonerange, 0x94, 13, FileCloneRange
);
nix::ioctl_readwrite_bad!(
    /// `FIDEDUPERANGE` of `linux/fs.h`, whose number is made of the size without destinations.
    fideduperange, nix::request_code_readwrite!(0x94, 54, std::mem::offset_of!(FileDedupeRange, dest_fd)), FileDedupeRange
);

#[repr(C)]
#[derive(Debug)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// `file_dedupe_range` with exactly one destination.
#[repr(C)]
#[derive(Debug)]
struct FileDedupeRange {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
    dest_fd: i64,
    dest_offset: u64,
    bytes_deduped: u64,
    status: i32,
    reserved: u32,
}

/// Bytes moved per `FIDEDUPERANGE`: filesystems cap a call at 16 MiB.
const DEDUPE_BYTES: u64 = 16 << 20;

impl Disk {
    /// Lets `range` of a blob share the extents of the equal bytes at `home_start` of its home, verified equal by the kernel.
    /// Offsets must be congruent to the disk block. Returns the bytes shared; fewer than asked is no error, as the blob has bytes of its own then.
    ///
    /// # Errors
    /// That the blob or its home cannot be opened, and `EIO`.
    pub fn share(&self, digest: &Digest, range: Range<u64>, home: &Digest, home_start: u64) -> Result<u64> {
        self.check_healthy()?;
        let (file, path) = self.open_to_change(digest)?;
        let home_file = self.open_blob(home)?;
        let start = range.start.next_multiple_of(DISK_BLOCK_BYTES);
        let end = range.end / DISK_BLOCK_BYTES * DISK_BLOCK_BYTES;
        let shift = start - range.start;
        share_range(&home_file, home_start + shift, &file, start..end)
            .map_err(|error| Error::io("sharing extents of", &path, error))
    }

    /// Opens a sealed blob that is to be made whole.
    ///
    /// # Errors
    /// Poisoned store, the I/O error.
    pub fn open_sealed(&self, digest: &Digest) -> Result<SealedFile> {
        self.check_healthy()?;
        let (file, path) = self.open_to_change(digest)?;
        Ok(SealedFile { file, path })
    }
}

/// Which file it is, whatever its name: of one that is open, no other has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// That of an open file.
    ///
    /// # Errors
    /// The I/O error.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::from(&metadata))
    }
}

impl From<&fs::Metadata> for FileId {
    fn from(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// A sealed blob that is being made whole: the file that was opened, whatever bears its name by now.
#[derive(Debug)]
pub struct SealedFile {
    file: File,
    path: PathBuf,
}

impl SealedFile {
    /// Brings the bytes of `range` back from `home_start` of its home: shared extents where possible, else copied. Not durable
    /// before [`SealedFile::flush`].
    ///
    /// # Errors
    /// The I/O error; the blob still reads right through its row, since the range is still borrowed.
    pub fn bring_home(&self, disk: &Disk, range: Range<u64>, home: &Digest, home_start: u64) -> Result<()> {
        disk.check_room(range.end - range.start)?;
        let home_file = disk.open_blob(home)?;
        if disk.reflink && range.start % DISK_BLOCK_BYTES == home_start % DISK_BLOCK_BYTES {
            let start = range.start.next_multiple_of(DISK_BLOCK_BYTES);
            let end = range.end / DISK_BLOCK_BYTES * DISK_BLOCK_BYTES;
            let call = FileCloneRange {
                src_fd: i64::from(home_file.as_raw_fd()),
                src_offset: home_start + (start - range.start),
                src_length: end.saturating_sub(start),
                dest_offset: start,
            };
            // SAFETY: `call` is a valid `file_clone_range`, alive during the call; both descriptors are open.
            if start < end && unsafe { ficlonerange(self.file.as_raw_fd(), &raw const call) }.is_ok() {
                return Ok(());
            }
        }
        copy_range(&home_file, home_start, &self.file, range).map_err(|error| Error::io("hydrating", &self.path, error))
    }

    /// Whether it is what bears its name still. Another that takes its place is renamed before its rows are written, so whoever asks this in a
    /// transaction of the catalog, and is told yes, writes rows of this file.
    pub fn bears_its_name(&self) -> bool {
        let named = fs::metadata(&self.path).map(|metadata| FileId::from(&metadata));
        matches!((self.id(), named), (Ok(own), Ok(named)) if own == named)
    }

    /// Which file it is.
    ///
    /// # Errors
    /// The I/O error.
    pub fn id(&self) -> Result<FileId> {
        FileId::of(&self.file).map_err(|error| Error::io("examining", &self.path, error))
    }

    /// Makes it durable; the bytes it occupies now.
    ///
    /// # Errors
    /// The I/O error, after which the disk is poisoned.
    pub fn flush(&self, disk: &Disk) -> Result<u64> {
        disk.sync_file(&self.file, &self.path)?;
        let metadata = self.file.metadata().map_err(|error| Error::io("examining", &self.path, error))?;
        Ok(metadata.blocks() * 512)
    }
}

/// Has whole blocks of `to` share the extents of the equal bytes of `from`; how many do, from the first on.
fn share_range(from: &File, from_start: u64, to: &File, range: Range<u64>) -> io::Result<u64> {
    let mut done = 0;
    while range.start + done < range.end {
        let mut call = FileDedupeRange {
            src_offset: from_start + done,
            src_length: DEDUPE_BYTES.min(range.end - range.start - done),
            dest_count: 1,
            reserved1: 0,
            reserved2: 0,
            dest_fd: i64::from(to.as_raw_fd()),
            dest_offset: range.start + done,
            bytes_deduped: 0,
            status: 0,
            reserved: 0,
        };
        // SAFETY: `call` is a valid `file_dedupe_range` with one destination, alive during the call; both descriptors are open.
        match unsafe { fideduperange(from.as_raw_fd(), &raw mut call) } {
            Ok(_) if call.status == 0 && call.bytes_deduped > 0 => done += call.bytes_deduped,
            Ok(_) => break,
            Err(Errno::EIO) => return Err(Errno::EIO.into()),
            Err(errno) => {
                tracing::debug!(%errno, "extents are not shared");
                break;
            }
        }
    }
    Ok(done)
}

/// Copies `range.len()` bytes from `from` at `from_start` to the same-length `range` of `to`.
fn copy_range(from: &File, from_start: u64, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        let piece = &mut buffer[..want];
        from.read_exact_at(piece, from_start + (at - range.start))?;
        to.write_all_at(piece, at)?;
        at += want as u64;
    }
    Ok(())
}

/// One block of the disk.
const PROBE_BYTES: usize = 4096;

/// Tries to share one block between two small files, as [`Disk::share`] does: some filesystems clone and do not compare.
pub(super) fn probe_reflink(root: &Path) -> Result<bool> {
    let (from, to) = (root.join("filling/.probe-a"), root.join("filling/.probe-b"));
    let probe = || -> io::Result<bool> {
        for path in [&from, &to] {
            fs::write(path, [1_u8; PROBE_BYTES])?;
        }
        let source = File::open(&from)?;
        let target = fs::OpenOptions::new().read(true).write(true).open(&to)?;
        Ok(share_range(&source, 0, &target, 0..DISK_BLOCK_BYTES)? > 0)
    };
    let outcome = probe().map_err(|error| Error::io("probing", root, error));
    remove_file(&from)?;
    remove_file(&to)?;
    outcome
}

/// Clones the whole of `source` into the empty file `target` on the same filesystem; `false` where that is not possible.
pub fn clone_file(source: BorrowedFd<'_>, target: &File, size: u64) -> bool {
    if size == 0 {
        return false;
    }
    let call = FileCloneRange { src_fd: i64::from(source.as_raw_fd()), src_offset: 0, src_length: 0, dest_offset: 0 };
    // SAFETY: `call` is a valid `file_clone_range`, alive during the call; both descriptors are open.
    unsafe { ficlonerange(target.as_raw_fd(), &raw const call) }.is_ok()
}
