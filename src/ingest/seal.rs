//! Digesting and chunking a file as it fills.
//!
//! The sealer reads behind the frontier into a buffer of its own. It does not map the file: a mapped page that the disk cannot
//! deliver is a signal that ends the daemon, a read that fails is an error; and mapped bytes count as the daemon's memory, which
//! is bounded. One more copy out of the page cache costs a tenth of the digesting.
//!
//! Chunking needs the layout, and the layout needs the header. Files of this host are looked at before they are copied. Of others, the
//! sealer waits for the first `HEADER_BYTES`; a zip keeps its directory at the end, so it is chunked in a second pass when all is here.

use crate::catalog::blobs::ChunkRow;
use crate::digest::{Digest, Digester};
use crate::error::Result;
use crate::layout::{Chunk, Chunker, Layout, ReadAt};
use crate::limits::CHUNK_MIN_RECORDED_BYTES;
use crate::names::EntryPath;
use crate::source::{Expected, Verifier};
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
    verifier.finish(&path.to_string())?;
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
    verifier.finish(&path.to_string())?;
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
            filling.check_wanted()?;
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
