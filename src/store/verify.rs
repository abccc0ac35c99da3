//! Reading blobs again at rest: whether their bytes are right, and which are not.
//!
//! A blob's own bytes are at rest in it, and what it borrows at its homes; so its digest is taken of what a reader would be given. Pieces that were
//! not in page cache are dropped from it again: what jobs have there is not displaced. Nothing is locked; the blob is held, so that it
//! is not punched meanwhile.
//!
//! Where the digest is wrong, page cache is dropped and the blob is read once more, since memory rots too. Then the chunks of the blob and of
//! what it borrows tell which range is wrong. Pieces below `limits::CHUNK_MIN_RECORDED_BYTES` are in no chunk: where all chunks
//! are right, it is one of those, and which cannot be told; unless the blob is right when it is read a third time.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc;
use std::thread;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Store;
use super::read::{OpenBlob, Reader};
use crate::catalog::blobs::{self, BlobRow, Borrow, ChunkRow};
use crate::catalog::scrubs;
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};

/// Bytes read at a time.
const WINDOW_BYTES: usize = 1 << 20;

/// Windows read ahead of the digest.
const WINDOWS: usize = 4;

/// Size from which reading and digesting go on side by side.
const PIPED_FROM_BYTES: u64 = 8 << 20;

/// Asked after each piece of so many bytes, and may take its time to answer; `false` gives the blob up.
pub type Pace<'a> = &'a mut dyn FnMut(u64) -> bool;

/// What was found of a blob.
#[derive(Debug)]
pub enum Verdict {
    /// All bytes are right.
    Right,
    /// It was removed meanwhile.
    Gone,
    /// It was given up on the way.
    Stopped,
    /// Bytes are wrong.
    Rotten(Vec<Rot>),
}

/// A range whose bytes are wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rot {
    /// First byte in the file.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What the bytes should be; `None`: somewhere in this range, and it cannot be told where.
    pub(super) digest: Option<Digest>,
    /// The blob that has them, and where.
    pub(super) holder: BlobRow,
    pub(super) holder_start: u64,
    /// When that was last found right, as its row said before it was read.
    pub(super) verified_ms: i64,
    /// Where else they should be, if they are a copy.
    pub(super) home: Option<(Digest, u64)>,
}

impl Rot {
    /// Row of the blob that has the bytes.
    pub fn holder(&self) -> i64 {
        self.holder.id
    }
}

/// What reading came to.
enum Found {
    Digest(Digest),
    Unreadable,
    Stopped,
}

impl Store {
    /// Reads a blob again; see the module's page. Blocks.
    ///
    /// # Errors
    /// Those of the catalog; an I/O error that says nothing of the bytes.
    pub fn verify(&self, blob: &BlobRow, pace: Pace<'_>) -> Result<Verdict> {
        let Some((reader, borrows)) = self.reader_of(blob)? else { return Ok(Verdict::Gone) };
        let mut free = |_| true;
        let pace: [Pace<'_>; 2] = [pace, &mut free];
        for pace in pace {
            let found = match reader.open(&blob.digest, blob.size) {
                Ok(open) => {
                    let found = digest_of(&open, blob.size, pace)?;
                    if !matches!(&found, Found::Digest(digest) if *digest == blob.digest) {
                        open.files().for_each(forget_pages);
                    }
                    found
                }
                Err(error) if error.reason() == "BLOB_MISSING" => Found::Unreadable,
                Err(error) => return Err(error),
            };
            match found {
                Found::Stopped => return Ok(Verdict::Stopped),
                Found::Digest(digest) if digest == blob.digest => return Ok(Verdict::Right),
                Found::Digest(_) | Found::Unreadable => {}
            }
        }
        if self.reader_of(blob)?.is_none() {
            return Ok(Verdict::Gone);
        }
        self.locate(blob, &borrows, &reader)
    }

    /// A reader of one blob, which it holds, and what the blob borrows; `None` if its row is gone.
    pub(super) fn reader_of(&self, blob: &BlobRow) -> Result<Option<(Reader, Vec<Borrow>)>> {
        let reader = Reader::growing(self.disk().clone(), &self.holds);
        let hold = self.hold(blob.digest);
        let (id, digest) = (blob.id, blob.digest);
        let borrows = self.catalog().read_blocking(move |tx| match blobs::sealed(tx, &digest)? {
            Some(row) if row.id == id => blobs::borrows_of(tx, id).map(Some),
            _ => Ok(None),
        })?;
        let Some(borrows) = borrows else { return Ok(None) };
        reader.add(hold, vec![(*blob, borrows.clone())]);
        Ok(Some((reader, borrows)))
    }

    /// The ranges that are wrong; the whole blob where no chunk says which.
    pub(super) fn locate(&self, blob: &BlobRow, borrows: &[Borrow], reader: &Reader) -> Result<Verdict> {
        // Rows before the files that they are to be about.
        let known = self.known_ranges(*blob, borrows)?;
        let whole = self.whole(*blob)?;
        let open = match reader.open(&blob.digest, blob.size) {
            Ok(open) => open,
            Err(error) if error.reason() == "BLOB_MISSING" => {
                let missing = self.missing(whole, borrows)?;
                return missing.map(|missing| Verdict::Rotten(vec![Rot { len: blob.size, ..missing }])).ok_or(error);
            }
            Err(error) => return Err(error),
        };
        let mut rotten = Vec::new();
        let mut bytes = Vec::new();
        for known in known {
            bytes.resize(usize::try_from(known.len).unwrap_or(0), 0);
            let read = open.read_at(&mut bytes, known.start);
            if read.is_err() || Some(Digest::of(&bytes)) != known.digest {
                rotten.push(known);
            }
        }
        if !rotten.is_empty() {
            return Ok(Verdict::Rotten(rotten));
        }
        match digest_of(&open, blob.size, &mut |_| true)? {
            Found::Digest(digest) if digest == blob.digest => Ok(Verdict::Right),
            _ => Ok(Verdict::Rotten(vec![whole])),
        }
    }

    /// The blob whose file is not there: this one, or a home of it; `None` if they are all there by now.
    fn missing(&self, blob: Rot, borrows: &[Borrow]) -> Result<Option<Rot>> {
        // What cannot be looked at is not missing: nothing is given up for it.
        let is_missing = |rot: &Rot| {
            let path = self.disk().blob_path(&rot.holder.digest);
            path.try_exists().map(|is_there| !is_there).map_err(|error| Error::io("examining", path, error))
        };
        if is_missing(&blob)? {
            return Ok(Some(blob));
        }
        let homes: BTreeSet<Digest> =
            borrows.iter().filter(|borrow| !borrow.filled).map(|borrow| borrow.home).collect();
        for home in homes {
            let home = self.whole(self.catalog().read_blocking(move |tx| scrubs::row_of(tx, &home))?)?;
            if is_missing(&home)? {
                return Ok(Some(home));
            }
        }
        Ok(None)
    }

    /// Some of a blob, and it cannot be told what.
    pub(super) fn whole(&self, holder: BlobRow) -> Result<Rot> {
        let verified_ms = self.catalog().read_blocking(move |tx| scrubs::verified_ms(tx, holder.id))?;
        Ok(Rot { start: 0, len: holder.size, digest: None, holder, holder_start: 0, verified_ms, home: None })
    }

    /// Every range of a blob that is a chunk of its own or of what it borrows, as if it were rotten.
    fn known_ranges(&self, blob: BlobRow, borrows: &[Borrow]) -> Result<Vec<Rot>> {
        let borrows = borrows.to_vec();
        self.catalog().read_blocking(move |tx| {
            let own = scrubs::chunks_in(tx, blob.id, &(0..blob.size))?;
            let verified_ms = scrubs::verified_ms(tx, blob.id)?;
            let own_range = |chunk: &ChunkRow, start, home| Rot {
                start,
                len: chunk.len,
                digest: Some(chunk.digest),
                holder: blob,
                holder_start: start,
                verified_ms,
                home,
            };
            let mut known: Vec<Rot> = own.iter().map(|chunk| own_range(chunk, chunk.start, None)).collect();
            for borrow in borrows {
                let home = scrubs::row_of(tx, &borrow.home)?;
                let verified_ms = scrubs::verified_ms(tx, home.id)?;
                let lent = borrow.home_start..borrow.home_start + borrow.len;
                for chunk in scrubs::chunks_in(tx, home.id, &lent)? {
                    let start = borrow.start + (chunk.start - borrow.home_start);
                    known.push(if borrow.filled {
                        own_range(&chunk, start, Some((borrow.home, chunk.start)))
                    } else {
                        Rot { holder: home, holder_start: chunk.start, verified_ms, ..own_range(&chunk, start, None) }
                    });
                }
            }
            known.sort_by_key(|known| known.start);
            Ok(known)
        })
    }
}

fn digest_of(open: &OpenBlob, size: u64, pace: Pace<'_>) -> Result<Found> {
    // Without it the kernel brings in more than is read, and what it brought would look as if it had been there before.
    for file in open.files() {
        let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    }
    let mut digester = Digester::new();
    let mut take = |bytes: &[u8]| {
        digester.update(bytes);
        pace(bytes.len() as u64)
    };
    let read =
        if size < PIPED_FROM_BYTES { read_through(open, size, &mut take) } else { read_piped(open, size, &mut take) };
    match read {
        Ok(true) => Ok(Found::Digest(digester.finish())),
        Ok(false) => Ok(Found::Stopped),
        Err(error) if is_of_the_bytes(&error) => Ok(Found::Unreadable),
        Err(error) => Err(Error::io("reading the blob", open.digest().to_hex(), error)),
    }
}

/// Whether it says that the bytes cannot be had, rather than that we cannot have them now: the disk's error, or a file system's that finds its
/// own data (EBADMSG) or structure (EUCLEAN) damaged.
fn is_of_the_bytes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADMSG | libc::EUCLEAN))
        || error.kind() == io::ErrorKind::UnexpectedEof
}

/// Shows `take` everything in order, until it says no; whether it saw everything.
fn read_through(open: &OpenBlob, size: u64, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let mut window = vec![0; WINDOW_BYTES];
    let mut at = 0;
    while at < size {
        let length = read_window(open, &mut window, at, size)?;
        if !take(&window[..length]) {
            return Ok(false);
        }
        at += length as u64;
    }
    Ok(true)
}

/// [`read_through`], with the next windows read meanwhile.
fn read_piped(open: &OpenBlob, size: u64, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let (filled, to_take) = mpsc::sync_channel::<io::Result<(Vec<u8>, usize)>>(WINDOWS);
    let (taken, to_fill) = mpsc::sync_channel::<Vec<u8>>(WINDOWS);
    for _ in 0..WINDOWS {
        let _ = taken.send(vec![0; WINDOW_BYTES]);
    }
    // Both ends here go when it ends, however it does: whoever reads ahead waits for one or the other.
    thread::scope(move |scope| {
        scope.spawn(move || {
            let mut at = 0;
            while at < size {
                let Ok(mut window) = to_fill.recv() else { return };
                let read = read_window(open, &mut window, at, size).map(|length| (window, length));
                at += read.as_ref().map_or(size, |(_, length)| *length as u64);
                if filled.send(read).is_err() {
                    return;
                }
            }
        });
        while let Ok(read) = to_take.recv() {
            let (window, length) = read?;
            if !take(&window[..length]) {
                return Ok(false);
            }
            // Nobody fills any more at the end.
            let _ = taken.try_send(window);
        }
        Ok(true)
    })
}

/// Reads up to a window at `at` from one file, and leaves page cache as it was; the bytes read.
fn read_window(open: &OpenBlob, window: &mut [u8], at: u64, size: u64) -> io::Result<usize> {
    let (file, start, until) = open.piece(at, size).map_err(|error| io::Error::other(error.report()))?;
    let length = usize::try_from(until - at).unwrap_or(usize::MAX).min(window.len());
    let piece = &mut window[..length];
    let here = read_cached(file, piece, start)?;
    if here < length {
        file.read_exact_at(&mut piece[here..], start + here as u64)?;
    }
    if here == 0 {
        let (from, bytes) = (i64::try_from(start).unwrap_or(0), i64::try_from(length).unwrap_or(0));
        let _ = posix_fadvise(file.as_fd(), from, bytes, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
    Ok(length)
}

/// Reads what is in page cache of the beginning of `piece`; how much that is.
fn read_cached(file: &File, piece: &mut [u8], start: u64) -> io::Result<usize> {
    let vector = libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() };
    let offset = i64::try_from(start).map_err(io::Error::other)?;
    // SAFETY: the one vector describes `piece`, which outlives the call; the descriptor is open.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
    match usize::try_from(read) {
        Ok(read) => Ok(read),
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINTR)) => Ok(0),
            error => Err(error),
        },
    }
}

fn forget_pages(file: &File) {
    let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}
