//! Bringing sealed blobs into the page cache, ahead of a job that maps them.
//!
//! Pages that were left by writing are small; mapped reads of large ones are two to three times as fast. So what is clean and not mapped
//! is dropped first, and then read in order under a large read-ahead, which brings large pages in. Without POSIX_FADV_SEQUENTIAL: it doubles the
//! read-ahead, and the pages that came were smaller (mapped reads at 85 GB/s against 110 to 140, on ext4). The first reads are short: the kernel's
//! pages grow with each of its read-aheads, whose first is as long as what is asked for first, or a little longer (1.5 GiB are mapped by 781
//! faults so, by 1018 where the first read is of a MiB, and 768 would be the fewest). What is brought in is charged to the daemon's control group,
//! not to the job's. Memory that is not available is left alone: the rest stays on disk.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Store;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{EntryKind, Manifest};

/// Bytes read at a time: the kernel reads ahead of it by itself.
const WINDOW_BYTES: usize = 1 << 20;

/// Bytes of the first read, and how many times as long the next is, up to the window.
const FIRST_BYTES: usize = 4096;
const GROWTH: usize = 4;

/// Of the memory that the kernel calls available, what is left to others: a tenth.
const LEFT: u64 = 10;

impl Store {
    /// Reads the blobs of a manifest into the page cache, each once, as far as memory is available; returns the bytes brought in. Blocks.
    ///
    /// # Errors
    /// The I/O error.
    pub fn warm(&self, manifest: &Manifest) -> Result<u64> {
        let mut files: Vec<(Digest, u64)> = manifest
            .entries()
            .iter()
            .filter_map(|entry| match entry.kind {
                EntryKind::File { digest, size, .. } => Some((digest, size)),
                EntryKind::Directory | EntryKind::Symlink { .. } => None,
            })
            .collect();
        files.sort_unstable();
        files.dedup();
        let available = available_bytes()?;
        let mut room = available - available / LEFT;
        let mut brought = 0;
        for (digest, size) in files {
            if size > room {
                tracing::info!(brought, "memory is not available for all of a checkpoint");
                break;
            }
            let file = self.disk().open_blob(&digest)?;
            brought += read_through(&file).map_err(|error| Error::io("reading the blob", digest.to_hex(), error))?;
            room -= size;
        }
        Ok(brought)
    }
}

fn read_through(file: &File) -> std::io::Result<u64> {
    // Advice only: refusing it costs speed.
    let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let mut window = vec![0; WINDOW_BYTES];
    let (mut at, mut length) = (0, FIRST_BYTES);
    loop {
        match file.read_at(&mut window[..length], at)? {
            0 => return Ok(at),
            read => at += read as u64,
        }
        length = (length * GROWTH).min(WINDOW_BYTES);
    }
}

/// What the kernel calls available, in bytes.
fn available_bytes() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, error))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) * 1024)
}
