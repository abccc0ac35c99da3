//! Reading everything back through the mount: digests against what the mount states, and the speed against the blobs themselves.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::cli::progress::Progress;
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// Below this many bytes a rate says nothing.
const MEASURED_FROM_BYTES: u64 = 32 << 20;

/// What reading back found.
pub(super) struct Verified {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) mount_bytes_per_s: Option<u64>,
    pub(super) blob_bytes_per_s: Option<u64>,
}

/// Checks every file below `root` against its attribute `user.ckptd.digest`, then times a second reading of mount and blobs. Blocks.
pub(super) fn verify(root: &Path, state_dir: &Path) -> Result<Verified> {
    let mut files = Vec::new();
    list(root, &mut files)?;
    let bytes = files.iter().map(|file| file.size).sum();
    let mut progress = Progress::on_stderr();
    let mut buffer = vec![0; READ_BYTES];
    let mut done = 0;
    for file in &files {
        let mut digester = Digester::new();
        read(&file.path, &mut buffer, |piece| {
            digester.update(piece);
            done += piece.len() as u64;
            progress.transfer("the mount", "checking", done, bytes);
        })?;
        if digester.finish() != file.digest {
            return Err(Error::corrupt(
                "DIGEST_MISMATCH",
                format!("{} does not have the bytes its digest says", file.path.display()),
            ));
        }
    }
    drop(progress);
    let blob = |file: &Found| {
        let hex = file.digest.to_hex();
        state_dir.join("blobs").join(&hex[..2]).join(hex)
    };
    Ok(Verified {
        files: files.len() as u64,
        bytes,
        mount_bytes_per_s: rate(&files, bytes, &mut buffer, |file| file.path.clone())?,
        blob_bytes_per_s: rate(&files, bytes, &mut buffer, blob)?,
    })
}

struct Found {
    path: PathBuf,
    size: u64,
    digest: Digest,
}

fn list(directory: &Path, files: &mut Vec<Found>) -> Result<()> {
    let entries = std::fs::read_dir(directory).map_err(|error| Error::io("listing", directory, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("listing", directory, error))?;
        let path = entry.path();
        let metadata = std::fs::symlink_metadata(&path).map_err(|error| Error::io("examining", &path, error))?;
        if metadata.is_dir() {
            list(&path, files)?;
        } else if metadata.is_file() {
            let digest = stated_digest(&path)?;
            files.push(Found { path, size: metadata.len(), digest });
        }
    }
    Ok(())
}

fn stated_digest(path: &Path) -> Result<Digest> {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::internal(format!("the path {} has a NUL byte", path.display())))?;
    let mut value = [0_u8; 64];
    // SAFETY: both names are NUL-terminated, and the kernel writes at most `value.len()` bytes to the live buffer.
    let length =
        unsafe { libc::getxattr(name.as_ptr(), c"user.ckptd.digest".as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    if length < 0 {
        return Err(Error::io("asking for the digest of", path, std::io::Error::last_os_error()));
    }
    let length = usize::try_from(length).unwrap_or(0).min(value.len());
    String::from_utf8_lossy(&value[..length]).parse()
}

fn read(path: &Path, buffer: &mut [u8], mut each: impl FnMut(&[u8])) -> Result<()> {
    let failed = |error| Error::io("reading", path, error);
    let mut file = File::open(path).map_err(failed)?;
    loop {
        match file.read(buffer).map_err(failed)? {
            0 => return Ok(()),
            length => each(&buffer[..length]),
        }
    }
}

fn rate(files: &[Found], bytes: u64, buffer: &mut [u8], path: impl Fn(&Found) -> PathBuf) -> Result<Option<u64>> {
    if bytes < MEASURED_FROM_BYTES {
        return Ok(None);
    }
    let began = Instant::now();
    for file in files {
        read(&path(file), buffer, |_| {})?;
    }
    let micros = began.elapsed().as_micros().max(1);
    Ok(u64::try_from(u128::from(bytes) * 1_000_000 / micros).ok())
}
