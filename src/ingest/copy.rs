//! Large files of this host: extents shared where the filesystem can, else copied in the kernel, with the sealer close behind.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;

use super::fetch::{blocking, changed, filled, join_fill};
use super::flying::Bringing;
use super::plan::ToFill;
use super::progress::Progress;
use super::publish::GiveUp;
use super::seal;
use crate::error::{Error, Result};
use crate::limits::UNIT_BYTES;
use crate::source::File;
use crate::store::filling::{Filling, UnitMap};

/// Piece of a copy in the kernel.
const COPY_BYTES: usize = 8 << 20;

/// Piece of one that the kernel cannot make.
const BY_HAND_BYTES: usize = 256 << 10;

/// Copies and seals a large file that the source has opened here.
pub(super) async fn large_from_here(
    bringing: &Bringing,
    file: &Arc<ToFill>,
    entry: u32,
    opened: std::fs::File,
) -> Result<()> {
    let flying = &bringing.flying;
    let size = file.file.size.unwrap_or(0);
    let disk = flying.shared.store.disk().clone();
    let filling = Arc::new(Filling::open(disk, &flying.key, file.number, UnitMap::new(size))?);
    let _give_up = GiveUp(filling.clone());
    let layout =
        seal::LayoutFrom::File(opened.try_clone().map_err(|error| Error::io("reading", &*file.file.locator, error))?);
    let _core = flying.core().await?;
    let sealer = {
        let (filling, path, expected) = (filling.clone(), file.path.clone(), file.file.expected.clone());
        blocking(move || seal::follow(&filling, &path, &expected, layout))
    };
    let copier = {
        let (flying, filling, file) = (flying.clone(), filling.clone(), file.file.clone());
        blocking(move || {
            let copied = copy_here(&opened, &filling, &file, &flying.progress)
                .and_then(|()| flying.source.check_unchanged(&file, &opened))
                .and_then(|()| filling.flush().map(|_| ()));
            copied.inspect_err(|_| filling.give_up())
        })
    };
    let digested = join_fill(copier, sealer).await?;
    filled(bringing, file, entry, size, digested, true).await
}

/// Shares extents where the filesystem can, else copies in the kernel, unit by unit.
fn copy_here(from: &std::fs::File, filling: &Filling, file: &File, progress: &Progress) -> Result<()> {
    let size = file.size.unwrap_or(0);
    if crate::disk::clone_file(from.as_fd(), filling.file(), size) {
        let units = filling.units();
        (0..units.units()).for_each(|unit| _ = filling.complete(unit));
        progress.arrived(size);
        return Ok(());
    }
    let mut at = 0;
    while at < size {
        filling.check_wanted()?;
        let want = usize::try_from(size - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        filling.check_room(want as u64)?;
        copy_piece(from, filling.file(), at, want).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(&file.locator),
            _ => Error::io("copying", &*file.locator, error),
        })?;
        let end = at + want as u64;
        (at / UNIT_BYTES..end.div_ceil(UNIT_BYTES)).for_each(|unit| _ = filling.complete(unit));
        progress.arrived(want as u64);
        at = end;
    }
    Ok(())
}

fn copy_piece(from: &std::fs::File, to: &std::fs::File, at: u64, length: usize) -> std::io::Result<()> {
    let mut from_at = i64::try_from(at).map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
    let mut to_at = from_at;
    let mut left = length;
    while left > 0 {
        // SAFETY: both descriptors are open and both offsets are live locals for the time of the call.
        let copied = unsafe {
            libc::copy_file_range(from.as_raw_fd(), &raw mut from_at, to.as_raw_fd(), &raw mut to_at, left, 0)
        };
        match usize::try_from(copied) {
            Ok(0) => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
            Ok(copied) => left -= copied,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EXDEV | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                        let done = (length - left) as u64;
                        return copy_by_hand(from, to, at + done, left);
                    }
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}

fn copy_by_hand(from: &std::fs::File, to: &std::fs::File, at: u64, length: usize) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; length.min(BY_HAND_BYTES)];
    let mut done = 0;
    while done < length {
        let want = (length - done).min(buffer.len());
        from.read_exact_at(&mut buffer[..want], at + done as u64)?;
        to.write_all_at(&buffer[..want], at + done as u64)?;
        done += want;
    }
    Ok(())
}
