//! Digesting and chunking a file as it fills.
//!
//! The sealer reads behind the frontier into a buffer of its own. It does not map the file: a mapped page that the disk cannot
//! deliver is a signal that ends the daemon, a read that fails is an error; and mapped bytes count as the daemon's memory, which
//! is bounded. One more copy out of the page cache costs a tenth of the digesting.
//!
//! Chunking needs the layout, and the layout needs the header. Files of this host are looked at before they are copied. Of others, the
//! sealer waits for the first `HEADER_BYTES`; a zip keeps its directory at the end, so it is chunked in a second pass when all is here.

use sha1::Digest as _;

use crate::catalog::blobs::ChunkRow;
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};
use crate::layout::{Chunk, Chunker, Layout, ReadAt};
use crate::limits::CHUNK_MIN_RECORDED_BYTES;
use crate::names::EntryPath;
use crate::source::Expected;
use crate::store::filling::Filling;

/// Bytes read at a time: stays in the second-level cache while two digests pass over it.
const WINDOW_BYTES: usize = 512 << 10;

/// Bytes at the beginning that hold every header we parse, save zip's.
const HEADER_BYTES: u64 = 64 << 20;

/// What sealing found out about a file's bytes.
#[derive(Debug)]
pub(super) struct Digested {
    pub(super) digest: Digest,
    pub(super) chunks: Vec<ChunkRow>,
}

/// Where the layout is read from.
pub(super) enum LayoutFrom {
    /// The source's own file, whole from the beginning.
    File(std::fs::File),
    /// What has been filled so far.
    Filling,
}

/// Digests, chunks and verifies bytes in memory.
pub(super) fn digest_small(bytes: &[u8], path: &EntryPath, expected: &Expected) -> Result<Digested> {
    let mut verifier = Verifier::new(expected, bytes.len() as u64);
    verifier.update(bytes);
    verifier.finish(path)?;
    let digest = Digest::of(bytes);
    let size = bytes.len() as u64;
    if size < CHUNK_MIN_RECORDED_BYTES {
        return Ok(Digested { digest, chunks: Vec::new() });
    }
    let mut chunks = Vec::new();
    let mut chunker = Chunker::new(Layout::read(&bytes, size));
    chunker.push(bytes, &mut |chunk| chunks.push(row(chunk)));
    chunker.finish(&mut |chunk| chunks.push(row(chunk)));
    Ok(Digested { digest, chunks })
}

/// Follows a file that fills to its end. Blocks.
pub(super) fn follow(filling: &Filling, path: &EntryPath, expected: &Expected, layout: LayoutFrom) -> Result<Digested> {
    let size = filling.units().size();
    let layout = match layout {
        LayoutFrom::File(file) => Some(Layout::read(&file, size)),
        LayoutFrom::Filling => layout_of_beginning(filling, size)?,
    };
    let mut chunks = Vec::new();
    let mut digester = Digester::new();
    let mut verifier = Verifier::new(expected, size);
    let mut chunker = layout.map(Chunker::new);
    pass(filling, size, |window| {
        digester.update(window);
        verifier.update(window);
        if let Some(chunker) = &mut chunker {
            chunker.push(window, &mut |chunk| chunks.push(row(chunk)));
        }
    })?;
    verifier.finish(path)?;
    let chunker = match chunker {
        Some(chunker) => chunker,
        None => {
            let mut chunker = Chunker::new(Layout::read(&Here { filling, until: size }, size));
            pass(filling, size, |window| chunker.push(window, &mut |chunk| chunks.push(row(chunk))))?;
            chunker
        }
    };
    chunker.finish(&mut |chunk| chunks.push(row(chunk)));
    Ok(Digested { digest: digester.finish(), chunks })
}

/// The layout, if the beginning of the file tells it.
fn layout_of_beginning(filling: &Filling, size: u64) -> Result<Option<Layout>> {
    let until = filling.wait_beyond(size.min(HEADER_BYTES).saturating_sub(1))?;
    if until < size {
        let mut magic = [0; 2];
        filling.read_exact_at(&mut magic, 0)?;
        if &magic == b"PK" {
            return Ok(None);
        }
    }
    Ok(Some(Layout::read(&Here { filling, until }, size)))
}

fn pass(filling: &Filling, size: u64, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; WINDOW_BYTES];
    let mut at = 0;
    while at < size {
        let frontier = filling.wait_beyond(at)?;
        while at < frontier {
            let want = usize::try_from(frontier - at).unwrap_or(WINDOW_BYTES).min(WINDOW_BYTES);
            filling.read_exact_at(&mut buffer[..want], at)?;
            each(&buffer[..want]);
            at += want as u64;
        }
    }
    Ok(())
}

fn row(chunk: Chunk) -> ChunkRow {
    ChunkRow { digest: chunk.digest, start: chunk.offset, len: chunk.len }
}

/// The beginning of a file that fills: reads beyond it fail.
struct Here<'a> {
    filling: &'a Filling,
    until: u64,
}

impl ReadAt for Here<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        let want = usize::try_from(self.until.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 && !buffer.is_empty() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        std::os::unix::fs::FileExt::read_at(self.filling.file(), &mut buffer[..want], offset)
    }
}

/// Checks the digests that the source states.
pub(super) struct Verifier {
    expected: Expected,
    sha256: Option<sha2::Sha256>,
    git_sha1: Option<sha1::Sha1>,
    md5: Option<md5::Md5>,
    crc32c: Option<u32>,
}

impl Verifier {
    /// For a file of `size` bytes.
    pub(super) fn new(expected: &Expected, size: u64) -> Self {
        Self {
            expected: expected.clone(),
            sha256: expected.sha256.map(|_| sha2::Sha256::new()),
            git_sha1: expected.git_sha1.map(|_| sha1::Sha1::new_with_prefix(format!("blob {size}\0"))),
            md5: expected.md5.map(|_| md5::Md5::new()),
            crc32c: expected.crc32c.map(|_| 0),
        }
    }

    /// The next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(bytes);
        }
        if let Some(sha1) = &mut self.git_sha1 {
            sha1.update(bytes);
        }
        if let Some(md5) = &mut self.md5 {
            md5.update(bytes);
        }
        if let Some(crc) = &mut self.crc32c {
            *crc = crc32c::crc32c_append(*crc, bytes);
        }
    }

    /// All bytes came.
    ///
    /// # Errors
    /// `DIGEST_MISMATCH`, naming `path`.
    pub(super) fn finish(self, path: &EntryPath) -> Result<()> {
        if let (Some(sha256), Some(expected)) = (self.sha256, self.expected.sha256) {
            compare(path, "SHA-256", &sha256.finalize(), &expected)?;
        }
        if let (Some(sha1), Some(expected)) = (self.git_sha1, self.expected.git_sha1) {
            compare(path, "git object id", &sha1.finalize(), &expected)?;
        }
        if let (Some(md5), Some(expected)) = (self.md5, self.expected.md5) {
            compare(path, "MD5", &md5.finalize(), &expected)?;
        }
        if let (Some(crc), Some(expected)) = (self.crc32c, self.expected.crc32c) {
            compare(path, "CRC-32C", &crc.to_be_bytes(), &expected.to_be_bytes())?;
        }
        Ok(())
    }
}

fn compare(path: &EntryPath, what: &str, found: &[u8], expected: &[u8]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Err(Error::corrupt(
        "DIGEST_MISMATCH",
        format!("`{path}` arrived with {what} {}, the source states {}", hex(found), hex(expected)),
    )
    .fact("path", path)
    .remedy("retry; if it stays so, the file is damaged at the source"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stated_digests_are_verified() {
        let path = EntryPath::new(*b"a").unwrap();
        let sha256 = sha2::Sha256::digest(b"hello").into();
        // git hash-object of a file with the bytes `hello`.
        let git: [u8; 20] = [
            0xb6, 0xfc, 0x4c, 0x62, 0x0b, 0x67, 0xd9, 0x5f, 0x95, 0x3a, 0x5c, 0x1c, 0x12, 0x30, 0xaa, 0xab, 0x5d, 0xb5,
            0xa1, 0xb0,
        ];
        let md5 = md5::Md5::digest(b"hello").into();
        // The check value of RFC 3720 is of other bytes; this is what `gsutil hash` prints for `hello`.
        let crc32c = Some(0x9a71_bb4c);
        let expected = Expected { sha256: Some(sha256), git_sha1: Some(git), md5: Some(md5), crc32c };
        assert!(digest_small(b"hello", &path, &expected).is_ok());
        assert_eq!(digest_small(b"hellO", &path, &expected).unwrap_err().reason(), "DIGEST_MISMATCH");
        for alone in [
            Expected { git_sha1: Some(git), ..Expected::default() },
            Expected { md5: Some(md5), ..Expected::default() },
            Expected { crc32c, ..Expected::default() },
        ] {
            assert!(digest_small(b"hello", &path, &alone).is_ok(), "{alone:?}");
            assert_eq!(digest_small(b"hellO", &path, &alone).unwrap_err().reason(), "DIGEST_MISMATCH");
        }
    }
}
