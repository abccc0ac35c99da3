//! Digesting and chunking a file as it fills.
//!
//! The sealer reads behind the frontier into a buffer of its own. It does not map the file: a mapped page that the disk cannot
//! deliver is a signal that ends the daemon, a read that fails is an error; and mapped bytes count as the daemon's memory, which
//! is bounded. One more copy out of the page cache costs a tenth of the digesting. Its chunks are digested on one thread, the whole on another where one does not keep up.
//!
//! Chunking needs the layout, and the layout needs the header. Files of this host are looked at before they are copied. Of others, the
//! sealer looks as soon as there is something, and again while the header goes on beyond what is here; a zip keeps its directory at the end, so it is chunked in a second pass when all is here.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};

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
const WINDOW_BYTES: usize = 256 << 10;

/// How far behind what is here its digests may be without a thread of their own.
const LAG_BYTES: u64 = 64 << 20;

/// Bytes at the beginning that hold every header we parse, save zip's: more is not waited for.
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
        let mut chunker = Chunker::new(Layout::read(&Here::new(filling, size), size));
        pass(filling, size, |window| chunker.push(window, &mut |chunk| chunks.push(row(chunk))))?;
        chunker.finish(&mut |chunk| chunks.push(row(chunk)));
    }
    Ok(Digested { digest: digester.finish(), chunks })
}

/// Shows every window to `each` and to the digests of the whole. Where they fall behind ([`LAG_BYTES`]), or there is another digest to verify, those have a thread of
/// their own: one after the other they would take as long as the fastest sources. Where they keep up, the window is in this core's cache, and no wake is needed.
fn side_by_side(
    filling: &Filling,
    size: u64,
    digests: (Digester, Verifier),
    mut each: impl FnMut(&[u8]),
) -> Result<(Digester, Verifier)> {
    let ended = || Error::internal("the thread that digests a file ended early");
    let (is_light, digests, waiting) = (digests.1.is_empty(), Mutex::new(digests), AtomicUsize::new(0));
    let digest = |window: &[u8]| {
        let (digester, verifier) = &mut *digests.lock().unwrap_or_else(PoisonError::into_inner);
        digester.update(window);
        verifier.update(window);
    };
    std::thread::scope(|scope| {
        let (sender, windows) = sync_channel::<(Arc<Vec<u8>>, usize)>(1);
        let digesting = std::thread::Builder::new()
            .name("digester".to_owned())
            .spawn_scoped(scope, || {
                for (window, length) in windows {
                    digest(&window[..length]);
                    waiting.fetch_sub(1, Ordering::Release);
                }
            })
            .map_err(|error| Error::unavailable("NO_THREAD", "starting a thread that digests").because(error))?;
        // One that is read, one that waits, one that is digested.
        let mut buffers: [Arc<Vec<u8>>; 3] = std::array::from_fn(|_| Arc::new(vec![0; WINDOW_BYTES]));
        let passed = each_range(filling, size, |range, frontier| {
            buffers.rotate_left(1);
            let length = usize::try_from(range.end - range.start).unwrap_or(WINDOW_BYTES);
            filling.read_exact_at(&mut Arc::make_mut(&mut buffers[0])[..length], range.start)?;
            // In their order: not before those that wait.
            if is_light && frontier - range.end <= LAG_BYTES && waiting.load(Ordering::Acquire) == 0 {
                digest(&buffers[0][..length]);
            } else {
                waiting.fetch_add(1, Ordering::Relaxed);
                sender.send((buffers[0].clone(), length)).map_err(|_| ended())?;
            }
            each(&buffers[0][..length]);
            Ok(())
        });
        drop(sender);
        passed.and(digesting.join().map_err(|_| ended()))
    })?;
    Ok(digests.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The layout, if the beginning of the file tells it, as soon as all that it is read from is here. A zip's is at its end, which is waited for only
/// where that is near.
fn layout_of_beginning(filling: &Filling, size: u64) -> Result<Option<Layout>> {
    let enough = size.min(HEADER_BYTES);
    let mut wanted = 1;
    loop {
        let until = filling.wait_beyond(enough.min(wanted).saturating_sub(1))?;
        let is_zip = begins_as_zip(filling, until)?;
        if is_zip && until < size && size > HEADER_BYTES {
            return Ok(None);
        }
        let here = Here::new(filling, until);
        if until >= enough {
            return Ok(Some(Layout::read(&here, size)));
        }
        if is_zip {
            wanted = enough;
            continue;
        }
        let layout = Layout::read(&here, size);
        if !here.fell_short.get() {
            return Ok(Some(layout));
        }
        // All of it is read anew each time: twice as much is waited for, and twice the work is the most.
        wanted = until * 2;
    }
}

fn begins_as_zip(filling: &Filling, until: u64) -> Result<bool> {
    let mut magic = [0; 2];
    if until < magic.len() as u64 {
        return Ok(false);
    }
    filling.read_exact_at(&mut magic, 0)?;
    Ok(&magic == b"PK")
}

fn pass(filling: &Filling, size: u64, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; WINDOW_BYTES];
    each_range(filling, size, |range, _| {
        let window = &mut buffer[..usize::try_from(range.end - range.start).unwrap_or(WINDOW_BYTES)];
        filling.read_exact_at(window, range.start)?;
        each(window);
        Ok(())
    })
}

/// Gives every range of [`WINDOW_BYTES`] in order, once it is here, and how far all is.
fn each_range(filling: &Filling, size: u64, mut each: impl FnMut(Range<u64>, u64) -> Result<()>) -> Result<()> {
    let mut at = 0;
    while at < size {
        let frontier = filling.wait_beyond(at)?;
        while at < frontier {
            filling.check_wanted()?;
            let end = frontier.min(at + WINDOW_BYTES as u64);
            each(at..end, frontier)?;
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
    /// Whether one did.
    fell_short: Cell<bool>,
}

impl<'a> Here<'a> {
    fn new(filling: &'a Filling, until: u64) -> Self {
        Self { filling, until, fell_short: Cell::new(false) }
    }
}

impl ReadAt for Here<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        let want = usize::try_from(self.until.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 && !buffer.is_empty() {
            self.fell_short.set(true);
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        std::os::unix::fs::FileExt::read_at(self.filling.file(), &mut buffer[..want], offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::limits::UNIT_BYTES;
    use crate::store::filling::UnitMap;

    /// A safetensors file whose header takes more than `header` bytes, of tensors that are regions of their own.
    fn safetensors(header: usize) -> Vec<u8> {
        const TENSOR_BYTES: usize = 300 << 10;
        let tensor = |at: usize| {
            let (start, end) = (at * TENSOR_BYTES, (at + 1) * TENSOR_BYTES);
            format!(r#""t{at}":{{"dtype":"U8","shape":[{TENSOR_BYTES}],"data_offsets":[{start},{end}]}}"#)
        };
        let (first, last) = (tensor(0), tensor(1));
        let json = format!("{{{first},{}{last}}}", " ".repeat(header));
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend((0..2 * TENSOR_BYTES).map(|at| u8::try_from(at % 253).unwrap_or(0)));
        bytes
    }

    fn opaque(len: usize) -> Vec<u8> {
        (0..len).map(|at| u8::try_from(at % 253).unwrap_or(0)).collect()
    }

    /// Fills unit by unit while `follow` follows; what it finds, and the layout that it cut by.
    fn filled_slowly(bytes: &[u8]) -> (Digested, Option<Layout>) {
        let place = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::open(&place.path().join("state")).unwrap());
        disk.begin_flight("f").unwrap();
        let size = bytes.len() as u64;
        let filling = Filling::open(disk, "f", 1, UnitMap::new(size)).unwrap();
        let path = EntryPath::new(*b"weights").unwrap();
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| follow(&filling, &path, &Expected::default(), LayoutFrom::Filling).unwrap());
            let looker = scope.spawn(|| layout_of_beginning(&filling, size).unwrap());
            for (unit, part) in (0..).zip(bytes.chunks(usize::try_from(UNIT_BYTES).unwrap())) {
                filling.write_at(part, unit * UNIT_BYTES).unwrap();
                filling.complete(unit);
                std::thread::yield_now();
            }
            (follower.join().unwrap(), looker.join().unwrap())
        })
    }

    #[test]
    fn a_header_is_read_as_far_as_it_goes_however_the_file_comes() {
        for bytes in [safetensors(0), safetensors(5 << 20), safetensors(21 << 20), opaque(9 << 20)] {
            let size = bytes.len() as u64;
            let whole = Layout::read(&bytes, size);
            let mut chunker = Chunker::new(whole.clone());
            let mut chunks = Vec::new();
            chunker.push(&bytes, &mut |chunk| chunks.push(row(chunk)));
            chunker.finish(&mut |chunk| chunks.push(row(chunk)));
            let (digested, layout) = filled_slowly(&bytes);
            assert_eq!(layout.unwrap(), whole);
            assert_eq!((digested.digest, digested.chunks), (Digest::of(&bytes), chunks), "{size} bytes");
        }
    }

    #[test]
    fn what_is_not_here_of_a_header_is_waited_for() {
        let bytes = safetensors(5 << 20);
        let size = bytes.len() as u64;
        let place = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::open(&place.path().join("state")).unwrap());
        disk.begin_flight("f").unwrap();
        let filling = Filling::open(disk, "f", 1, UnitMap::new(size)).unwrap();
        filling.write_at(&bytes, 0).unwrap();
        let early = Here::new(&filling, UNIT_BYTES);
        assert_ne!(Layout::read(&early, size), Layout::read(&bytes, size));
        assert!(early.fell_short.get());
        let enough = Here::new(&filling, 2 * UNIT_BYTES);
        assert_eq!(Layout::read(&enough, size), Layout::read(&bytes, size));
        assert!(!enough.fell_short.get());
    }
}
