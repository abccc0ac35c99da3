//! Digesting and chunking a file as it fills.
//!
//! The sealer reads behind the frontier into a buffer of its own. It does not map the file: a mapped page that the disk cannot
//! deliver is a signal that ends the daemon, a read that fails is an error; and mapped bytes count as the daemon's memory, which
//! is bounded. One more copy out of the page cache costs a tenth of the digesting. Its chunks are digested on one thread, the whole on another.
//!
//! Chunking needs the layout, and the layout needs the header. Files of this host are looked at before they are copied. Of others, the
//! sealer waits for the first `HEADER_BYTES`; a zip keeps its directory at the end, so it is chunked in a second pass when all is here.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use crate::catalog::blobs::ChunkRow;
use crate::digest::{Digest, Digester};
use crate::error::{Error, Result};
use crate::layout::{Chunk, Chunker, FileDigester, Layout, ReadAt};
use crate::limits::CHUNK_MIN_RECORDED_BYTES;
use crate::names::EntryPath;
use crate::pieces::Whole;
use crate::source::{Expected, Verifier};
use crate::store::filling::Filling;

/// Bytes read at a time: stays in the second-level cache while it is cut and digested.
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

/// Digests, chunks and verifies a small file, and hands it to `write` window by window: each is in the processor's cache then.
pub(super) fn digest_small(
    whole: &Whole,
    path: &EntryPath,
    expected: &Expected,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Digested> {
    let size = whole.size();
    let mut verifier = Verifier::new(expected, size);
    let mut chunks = Vec::new();
    let digest = if size < CHUNK_MIN_RECORDED_BYTES {
        let mut digester = Digester::new();
        whole.each_window(&mut |window| {
            verifier.update(window);
            digester.update(window);
            write(window)
        })?;
        digester.finish()
    } else {
        let mut chunker = FileDigester::new(Layout::read(whole, size));
        whole.each_window(&mut |window| {
            verifier.update(window);
            chunker.push(window, &mut |chunk| chunks.push(row(chunk)));
            write(window)
        })?;
        chunker.finish(&mut |chunk| chunks.push(row(chunk)))
    };
    verifier.finish(&path.to_string())?;
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
    let mut verifier = Verifier::new(expected, size);
    let mut digester = Digester::new();
    if let Some(layout) = layout {
        let mut chunker = Chunker::new(layout);
        (digester, verifier) = side_by_side(filling, size, (digester, verifier), |window| {
            chunker.push(window, &mut |chunk| chunks.push(row(chunk)));
        })?;
        verifier.finish(&path.to_string())?;
        chunker.finish(&mut |chunk| chunks.push(row(chunk)));
    } else {
        pass(filling, size, |window| {
            digester.update(window);
            verifier.update(window);
        })?;
        verifier.finish(&path.to_string())?;
        let mut chunker = Chunker::new(Layout::read(&Here { filling, until: size }, size));
        pass(filling, size, |window| chunker.push(window, &mut |chunk| chunks.push(row(chunk))))?;
        chunker.finish(&mut |chunk| chunks.push(row(chunk)));
    }
    Ok(Digested { digest: digester.finish(), chunks })
}

/// Shows every window to `each` and, on a thread of its own, to the digests of the whole: one after the other they would take as long as the fastest
/// sources.
fn side_by_side(
    filling: &Filling,
    size: u64,
    (mut digester, mut verifier): (Digester, Verifier),
    mut each: impl FnMut(&[u8]),
) -> Result<(Digester, Verifier)> {
    let ended = || Error::internal("the thread that digests a file ended early");
    std::thread::scope(|scope| {
        let (sender, windows) = sync_channel::<(Arc<Vec<u8>>, usize)>(1);
        let digesting = std::thread::Builder::new()
            .name("digester".to_owned())
            .spawn_scoped(scope, move || {
                for (window, length) in windows {
                    digester.update(&window[..length]);
                    verifier.update(&window[..length]);
                }
                (digester, verifier)
            })
            .map_err(|error| Error::unavailable("NO_THREAD", "starting a thread that digests").because(error))?;
        // One that is read, one that waits, one that is digested.
        let mut buffers: [Arc<Vec<u8>>; 3] = std::array::from_fn(|_| Arc::new(vec![0; WINDOW_BYTES]));
        let passed = each_range(filling, size, |range| {
            buffers.rotate_left(1);
            let length = usize::try_from(range.end - range.start).unwrap_or(WINDOW_BYTES);
            filling.read_exact_at(&mut Arc::make_mut(&mut buffers[0])[..length], range.start)?;
            sender.send((buffers[0].clone(), length)).map_err(|_| ended())?;
            each(&buffers[0][..length]);
            Ok(())
        });
        drop(sender);
        let digested = digesting.join().map_err(|_| ended());
        passed.and(digested)
    })
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
    each_range(filling, size, |range| {
        let window = &mut buffer[..usize::try_from(range.end - range.start).unwrap_or(WINDOW_BYTES)];
        filling.read_exact_at(window, range.start)?;
        each(window);
        Ok(())
    })
}

/// Gives every range of [`WINDOW_BYTES`] in order, once it is here.
fn each_range(filling: &Filling, size: u64, mut each: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    let mut at = 0;
    while at < size {
        let frontier = filling.wait_beyond(at)?;
        while at < frontier {
            filling.check_wanted()?;
            let end = frontier.min(at + WINDOW_BYTES as u64);
            each(at..end)?;
            at = end;
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
