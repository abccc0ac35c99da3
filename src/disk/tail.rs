//! The tail of an upload: what its sender was told has arrived, for as long as nothing else would bring it back.
//!
//! A sender who is told that a piece has arrived never sends it again. Between that and the transaction that records what became of it lie
//! queues in memory, a sealer and a batch; what a killed daemon had there would be gone. So each piece is in this file before its sender hears
//! of it, and stays until whoever takes the upload apart says that it is recorded.
//!
//! # Layout
//! A file in the flight's directory under a number that no other has ([`TAIL_NUMBER`]), a page and then a ring of [`TAIL_BYTES`]: byte `n` of the
//! upload is at `n` modulo its length. The page says for whom it is and in which boot it was made (written once), how far the bytes go
//! ([`Tail::append`]) and whether that is all, and, in two places by turns, a mark: what whoever reads wants to find again, and where
//! ([`Tail::mark`]).
//!
//! Bytes of a large file need not be written twice: once it is said so ([`Tail::set_aside`]), those of a [stretch](Stretch) are not in the ring but in the file that
//! they are bound for, where they belong, and are written there before whoever fills it comes to them. There is one stretch, which the page tells of. Another
//! takes its place, and the file may go, when the last mark is behind it. Whoever opens the tail has what is needed of it copied into the ring first: so it is of one
//! run of the daemon.
//!
//! # What survives
//! The page cache does, so nothing here is ever flushed: a tail outlives its daemon, and not the boot it was made in ([`Disk::open_tail`] finds none
//! then). The bytes of a piece are written before the end that includes them, and a mark and a stretch have digests. A write that a kill cuts off is one of a
//! piece that nobody was told of. Where the file of a stretch is gone that is needed still, there is no tail.
//!
//! # Limits
//! What is not recorded can be [`TAIL_BYTES`] at most; whoever appends waits for room. Space is taken as it is written, and never what is kept free. Where
//! it cannot be written, or is wanted no more ([`Tail::give_up`]), the upload goes on without it and does not outlive the daemon.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::Disk;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Bytes of an upload that may be recorded nowhere else: what comes between two recordings of a large file, what waits to be published of small
/// ones, and as much again while that is under way.
pub const TAIL_BYTES: u64 = 128 << 20;

/// Its number in the directory of its flight: others are counted from the time on.
pub const TAIL_NUMBER: u64 = 0;

/// Longest description of an upload, and longest mark.
pub const TAIL_WORD_BYTES: usize = 512;

/// Length of the digest of all: SHA-512.
pub const TAIL_DIGEST_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"ckptdtl2";

/// Of a tail that is as those are now, but has no stretch.
const MAGIC_1: &[u8; 8] = b"ckptdtl1";

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// The digest that a word begins with: of a word without there is none.
const WORD_HEAD_BYTES: usize = 32;

/// Begins what tells of a stretch.
const STRETCH: &[u8] = b"stretch";

/// Where the ring begins.
const PAGE_BYTES: u64 = 4096;

/// Where the end stands.
const END_AT: u64 = 1024;

/// Where the stretch stands.
const STRETCH_AT: u64 = 1280;

/// Where marks stand.
const MARKS_AT: [u64; 2] = [2048, 3072];

/// See the module's page. All of it blocks for as long as the page cache takes writes.
#[derive(Debug)]
pub struct Tail {
    disk: Arc<Disk>,
    file: File,
    path: PathBuf,
    marks: AtomicU64,
    aside: Mutex<Option<Arc<Aside>>>,
    given_up: AtomicBool,
}

/// Bytes of an upload that are in the file they are bound for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The first of them.
    pub from: u64,
    /// Behind the last that may be.
    pub until: u64,
    /// Where in the upload the file begins.
    pub begins_at: u64,
    /// Its number in the flight's directory.
    pub number: u64,
}

#[derive(Debug)]
struct Aside {
    stretch: Stretch,
    file: File,
}

/// What a tail says that an earlier run of the daemon has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailLeft {
    /// For whom it was made.
    pub about: Vec<u8>,
    /// How far the bytes go.
    pub end: u64,
    /// The digest of all, where all has come.
    pub ended: Option<[u8; TAIL_DIGEST_BYTES]>,
    /// The last mark and where it was made; 0 and nothing where there is none.
    pub mark: (u64, Vec<u8>),
}

impl Disk {
    /// Makes the tail of a flight whose directory is there and has none.
    ///
    /// # Errors
    /// The I/O error; internal for an `about` that is too long.
    pub fn make_tail(self: &Arc<Self>, flight: &str, about: &[u8]) -> Result<Tail> {
        self.check_healthy()?;
        let path = self.filling_path(flight, TAIL_NUMBER);
        let boot = super::boot_id()?;
        let mut page = word(&[MAGIC.as_slice(), boot.as_bytes()].concat(), about)?;
        page.resize(usize::try_from(MARKS_AT[0]).unwrap_or_default(), 0);
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = made.map_err(|error| Error::io("creating", &path, error))?;
        let tail = Tail::of(self, file, path, 0);
        tail.write(&page, 0)?;
        Ok(tail)
    }

    /// The tail of a flight as an earlier run of the daemon has left it; `None` where there is none, of this boot and whole.
    ///
    /// # Errors
    /// The I/O error; `NO_SPACE` where what is in the file of a stretch has no room in the ring.
    pub fn open_tail(self: &Arc<Self>, flight: &str) -> Result<Option<(Tail, TailLeft)>> {
        let path = self.filling_path(flight, TAIL_NUMBER);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| Error::io("opening", &path, error))?,
        };
        let mut page = vec![0; usize::try_from(PAGE_BYTES).unwrap_or_default()];
        let fault = |error| Error::io("reading", &path, error);
        let length = file.metadata().map_err(fault)?.len();
        if length < MARKS_AT[0] {
            return Ok(None);
        }
        let here = usize::try_from(length.min(PAGE_BYTES)).unwrap_or_default();
        file.read_exact_at(&mut page[..here], 0).map_err(fault)?;
        let boot = super::boot_id()?;
        let [key, key_1] = [MAGIC, MAGIC_1].map(|magic| [magic.as_slice(), boot.as_bytes()].concat());
        let (about, is_old) = match read_word(&page, &key) {
            Some(about) => (about, false),
            None => match read_word(&page, &key_1) {
                Some(about) => (about, true),
                None => return Ok(None),
            },
        };
        let digest = page[usize::try_from(END_AT).unwrap_or_default() + 16..].first_chunk().copied();
        let (end, ended) = (u64_at(&page, END_AT), digest.filter(|_| u64_at(&page, END_AT + 8) != 0));
        let marks = MARKS_AT.map(|at| read_mark(&page[usize::try_from(at).unwrap_or_default()..]));
        let mark = marks.into_iter().flatten().max_by_key(|(at, _)| *at).unwrap_or_default();
        // Which of the two places is older does not matter: the other has the later mark.
        let turn =
            u64::from(read_mark(&page[usize::try_from(MARKS_AT[0]).unwrap_or_default()..]).as_ref() == Some(&mark));
        let tail = Tail::of(self, file, path, turn);
        if is_old {
            // An earlier version does not read it any more: it may get a stretch.
            tail.write(&word(&key, &about)?, 0)?;
        }
        if let Some(stretch) = read_stretch(&page[usize::try_from(STRETCH_AT).unwrap_or_default()..])
            && !tail.take_in(&self.filling_path(flight, stretch.number), stretch, mark.0..end)?
        {
            return Ok(None);
        }
        Ok(Some((tail, TailLeft { about, end, ended, mark })))
    }
}

impl Tail {
    fn of(disk: &Arc<Disk>, file: File, path: PathBuf, marks: u64) -> Self {
        let (disk, marks, given_up) = (Arc::clone(disk), AtomicU64::new(marks), AtomicBool::new(false));
        Self { disk, file, path, marks, aside: Mutex::new(None), given_up }
    }

    /// Copies what is `needed` of a stretch from its file at `path` into the ring, and forgets it; whether it was there.
    fn take_in(&self, path: &Path, stretch: Stretch, needed: Range<u64>) -> Result<bool> {
        if needed.end > needed.start.saturating_add(TAIL_BYTES) {
            return Ok(false);
        }
        let (mut at, until) = (needed.start.max(stretch.from), needed.end.min(stretch.until));
        if at < until {
            let file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                opened => opened.map_err(|error| Error::io("opening", path, error))?,
            };
            let there = self.file.metadata().map_err(|error| Error::io("reading", &self.path, error))?.blocks() * 512;
            self.disk.check_room((until - at).min((PAGE_BYTES + TAIL_BYTES).saturating_sub(there)))?;
            let mut buffer = vec![0; usize::try_from(COPY_BYTES.min(until - at)).unwrap_or_default()];
            while at < until {
                let some = usize::try_from(until - at).unwrap_or(usize::MAX).min(buffer.len());
                match file.read_exact_at(&mut buffer[..some], at - stretch.begins_at) {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                    read => read.map_err(|error| Error::io("reading", path, error))?,
                }
                self.each_in_ring(at, some, |from, place| self.write(&buffer[from], place))?;
                at += some as u64;
            }
        }
        self.write(&[0; WORD_HEAD_BYTES], STRETCH_AT)?;
        Ok(true)
    }

    /// Shows where in the file each part of the `length` bytes from `at` on is in the ring.
    fn each_in_ring(
        &self,
        at: u64,
        length: usize,
        mut each: impl FnMut(Range<usize>, u64) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < length {
            let place = (at + done as u64) % TAIL_BYTES;
            let most = usize::try_from(TAIL_BYTES - place).unwrap_or(usize::MAX).min(length - done);
            each(done..done + most, PAGE_BYTES + place)?;
            done += most;
        }
        Ok(())
    }

    /// Adds the piece that begins at `at`, where the last one ended, and is `runs` together; its sender may be told of it then. Which bytes of it are set aside.
    ///
    /// # Errors
    /// `NO_SPACE`, the I/O error.
    pub fn append(&self, runs: &[Bytes], at: u64) -> Result<Range<u64>> {
        if self.given_up.load(Ordering::Relaxed) {
            return Ok(at..at);
        }
        self.disk.check_room(runs.iter().map(|run| run.len() as u64).sum())?;
        let aside = self.lock_aside().clone();
        let stretch = aside.as_ref().map_or(at..at, |aside| aside.stretch.from..aside.stretch.until);
        let mut end = at;
        for run in runs {
            let run_at = |at: u64| usize::try_from(at.clamp(end, end + run.len() as u64) - end).unwrap_or(run.len());
            let (from, until) = (run_at(stretch.start), run_at(stretch.end));
            for part in [0..from, until..run.len()] {
                let bytes = &run[part.clone()];
                self.each_in_ring(end + part.start as u64, bytes.len(), |some, place| self.write(&bytes[some], place))?;
            }
            if let Some(aside) = aside.as_ref().filter(|_| from < until) {
                let place = end + from as u64 - aside.stretch.begins_at;
                let written = aside.file.write_all_at(&run[from..until], place);
                written.map_err(|error| Error::io("writing bytes set aside from", &self.path, error))?;
            }
            end += run.len() as u64;
        }
        self.write(&end.to_le_bytes(), END_AT)?;
        let from = stretch.start.clamp(at, end);
        Ok(from..stretch.end.clamp(from, end))
    }

    /// The stretch that is set aside, if any.
    pub fn stretch(&self) -> Option<Stretch> {
        self.lock_aside().as_ref().map(|aside| aside.stretch)
    }

    /// From now on what is appended of `stretch` is written to the `file` it is bound for. The last mark is behind the stretch before.
    ///
    /// # Errors
    /// The I/O error.
    pub fn set_aside(&self, stretch: Stretch, file: File) -> Result<()> {
        let Stretch { from, until, begins_at, number } = stretch;
        let said = [from, until, begins_at, number].map(u64::to_le_bytes).concat();
        self.write(&word(STRETCH, &said)?, STRETCH_AT)?;
        let mut aside = self.lock_aside();
        let is_wanted = !self.given_up.load(Ordering::Relaxed);
        let before = std::mem::replace(&mut *aside, is_wanted.then(|| Arc::new(Aside { stretch, file })));
        drop(aside);
        // Not under the lock: where the file is nobody else's any more, that takes as long as to free it.
        drop(before);
        Ok(())
    }

    /// Lets go of the file of the stretch: nothing more is appended of it, and the last mark is behind it.
    pub fn end_aside(&self) {
        let before = self.lock_aside().take();
        drop(before);
    }

    fn lock_aside(&self) -> MutexGuard<'_, Option<Arc<Aside>>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that all has come, and has this digest.
    ///
    /// # Errors
    /// The I/O error.
    pub fn set_ended(&self, digest: &[u8; TAIL_DIGEST_BYTES]) -> Result<()> {
        self.write(&[1_u64.to_le_bytes().as_slice(), digest].concat(), END_AT + 8)
    }

    /// Keeps `mark`, which was made at byte `at`, in place of the one before the last.
    ///
    /// # Errors
    /// The I/O error; internal for a mark that is too long.
    pub fn mark(&self, at: u64, mark: &[u8]) -> Result<()> {
        let turn = self.marks.fetch_add(1, Ordering::Relaxed);
        let place = MARKS_AT[usize::from(turn % 2 == 1)];
        self.write(&word(&at.to_le_bytes(), mark)?, place)
    }

    /// Reads bytes from `at` on: those that are neither recorded nor older than the ring is long, nor set aside since it was opened.
    ///
    /// # Errors
    /// The I/O error.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        self.each_in_ring(at, buffer.len(), |some, place| {
            self.file.read_exact_at(&mut buffer[some], place).map_err(|error| Error::io("reading", &self.path, error))
        })
    }

    /// What is written to it from now on goes nowhere. Does not block.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Makes one that was given up none: nobody finds it any more, and it can be read still.
    pub fn remove(&self) {
        let is_own = match (self.file.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(own), Ok(there)) => own.ino() == there.ino(),
            // Gone, or of a file system that fails.
            _ => false,
        };
        if is_own && let Err(error) = super::remove_file(&self.path) {
            tracing::warn!(error = %error.report(), "a tail that is wanted no more stays until its flight ends");
        }
    }

    /// Gives back the space of one that was removed: it is not read any more.
    pub fn release(&self) {
        if let Err(error) = self.file.set_len(0) {
            tracing::warn!(path = %self.path.display(), %error, "a tail that is wanted no more keeps its space");
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        if self.given_up.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.file.write_all_at(bytes, at).map_err(|error| Error::io("writing", &self.path, error))
    }
}

/// `key` and `text` with their digest: 32 bytes of it, the text's length, both.
fn word(key: &[u8], text: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(text.len()).ok().filter(|_| text.len() <= TAIL_WORD_BYTES);
    let length = length.ok_or_else(|| Error::internal("a word of a tail is too long"))?;
    let said = [&length.to_le_bytes(), key, text].concat();
    Ok([Digest::of(&said).as_bytes().as_slice(), &said].concat())
}

/// The text that was written with `key`, if that is what `bytes` begin with.
fn read_word(bytes: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let (digest, said) = bytes.split_at_checked(WORD_HEAD_BYTES)?;
    let length = usize::from(u16::from_le_bytes(said.first_chunk().copied()?)).min(TAIL_WORD_BYTES);
    let said = said.get(..2 + key.len() + length)?;
    let text = said.get(2..)?.strip_prefix(key)?;
    (Digest::of(said).as_bytes().as_slice() == digest).then(|| text.to_vec())
}

fn read_stretch(place: &[u8]) -> Option<Stretch> {
    let said = read_word(place, STRETCH)?;
    let [from, until, begins_at, number] = [0, 8, 16, 24].map(|at| u64_at(&said, at));
    Some(Stretch { from, until, begins_at, number }).filter(|stretch| stretch.begins_at <= stretch.from)
}

fn read_mark(place: &[u8]) -> Option<(u64, Vec<u8>)> {
    let key: [u8; 8] = place.get(34..42)?.try_into().ok()?;
    read_word(place, &key).map(|mark| (u64::from_le_bytes(key), mark))
}

fn u64_at(page: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or_default();
    page.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(root: &Path) -> Arc<Disk> {
        let disk = Arc::new(Disk::open(root).unwrap());
        disk.begin_flight("f").unwrap();
        disk
    }

    fn runs<const N: usize>(runs: [&'static [u8]; N]) -> [Bytes; N] {
        runs.map(Bytes::from_static)
    }

    fn read(tail: &Tail, range: std::ops::Range<u64>) -> Vec<u8> {
        let mut buffer = vec![0; usize::try_from(range.end - range.start).unwrap()];
        tail.read(&mut buffer, range.start).unwrap();
        buffer
    }

    #[test]
    fn what_was_appended_and_marked_is_found_by_the_next_that_opens_it() {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        assert!(disk.open_tail("f").unwrap().is_none());
        let tail = disk.make_tail("f", b"for him").unwrap();
        let nothing = TailLeft { about: b"for him".to_vec(), end: 0, ended: None, mark: (0, Vec::new()) };
        assert_eq!(disk.open_tail("f").unwrap().unwrap().1, nothing);
        tail.append(&runs([b"abc", b"de"]), 0).unwrap();
        for at in [1, 3, 4] {
            tail.mark(at, format!("at {at}").as_bytes()).unwrap();
            tail.append(&runs([b"x"]), 4 + at).unwrap();
            let (again, left) = disk.open_tail("f").unwrap().unwrap();
            assert_eq!((left.end, left.mark), (5 + at, (at, format!("at {at}").into_bytes())));
            again.mark(at, format!("at {at}").as_bytes()).unwrap();
        }
        let (again, left) = disk.open_tail("f").unwrap().unwrap();
        assert_eq!((read(&again, 1..5).as_slice(), left.ended), (b"bcde".as_slice(), None));
        again.set_ended(&[7; 64]).unwrap();
        let left = disk.open_tail("f").unwrap().unwrap().1;
        assert_eq!((left.end, left.ended), (9, Some([7; 64])));
        assert!(disk.make_tail("f", b"another").is_err(), "one that is there is not another's");
        again.give_up();
        again.append(&runs([b"x"]), 9).unwrap();
        again.remove();
        assert!(disk.open_tail("f").unwrap().is_none());
        assert_eq!(read(&again, 1..5), b"bcde", "whoever reads it does so to the end");
        again.release();
        assert!(again.read(&mut [0], 1).is_err());
    }

    #[test]
    fn the_ring_goes_round() {
        let directory = tempfile::tempdir().unwrap();
        let tail = disk(directory.path()).make_tail("f", b"").unwrap();
        let at = 7 * TAIL_BYTES - 3;
        tail.append(&runs([b"ab", b"cdefg"]), at).unwrap();
        assert_eq!(read(&tail, at..at + 7), b"abcdefg");
        assert_eq!(read(&tail, at + 2..at + 5), b"cde");
    }

    /// The ring as far as it goes.
    fn ring(tail: &Tail) -> Vec<u8> {
        fs::read(&tail.path).unwrap()[usize::try_from(PAGE_BYTES).unwrap()..].to_vec()
    }

    #[test]
    fn a_stretch_is_in_the_file_it_is_bound_for_and_in_the_ring_for_who_opens_it() {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        let tail = disk.make_tail("f", b"").unwrap();
        assert!(tail.append(&runs([b"0123456789"]), 0).unwrap().is_empty());
        let stretch = Stretch { from: 10, until: 16, begins_at: 4, number: 7 };
        tail.set_aside(stretch, disk.open_filling("f", 7, 100).unwrap().0).unwrap();
        assert_eq!(tail.append(&runs([b"ab", b"cdefgh", b"ij"]), 10).unwrap(), 10..16);
        assert_eq!(tail.stretch(), Some(stretch));
        let bound_for = disk.filling_path("f", 7);
        assert_eq!(fs::read(&bound_for).unwrap()[..14], *b"\0\0\0\0\0\0abcdef\0\0");
        assert_eq!(ring(&tail), b"0123456789\0\0\0\0\0\0ghij", "nothing is written twice");
        tail.mark(11, b"").unwrap();

        let sealed = directory.path().join("sealed");
        fs::rename(&bound_for, &sealed).unwrap();
        assert!(disk.open_tail("f").unwrap().is_none(), "some of it is nowhere");
        fs::rename(&sealed, &bound_for).unwrap();
        let (again, left) = disk.open_tail("f").unwrap().unwrap();
        assert_eq!((left.end, again.stretch()), (20, None));
        assert_eq!(ring(&again), b"0123456789\0bcdefghij", "what is before the mark is not needed");
        fs::rename(&bound_for, &sealed).unwrap();
        let (last, _) = disk.open_tail("f").unwrap().expect("it is all in the ring");
        assert_eq!(read(&last, 11..20), b"bcdefghij");

        let stretch = Stretch { from: 20, until: 30, begins_at: 20, number: 8 };
        last.set_aside(stretch, disk.open_filling("f", 8, 100).unwrap().0).unwrap();
        let (after, _) = disk.open_tail("f").unwrap().unwrap();
        assert_eq!(
            after.append(&runs([b"x"]), 20).unwrap(),
            20..20,
            "of one that has not begun nothing is found later"
        );
        last.append(&runs([b"xyz"]), 20).unwrap();
        last.mark(30, b"").unwrap();
        last.end_aside();
        assert_eq!(last.append(&runs([b"z"]), 23).unwrap(), 23..23);
        last.give_up();
        assert_eq!(last.append(&runs([b"x"]), 24).unwrap(), 24..24);
    }

    #[test]
    fn what_an_earlier_version_kept_is_gone_on_with() {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        let tail = disk.make_tail("f", b"for him").unwrap();
        let boot = crate::disk::boot_id().unwrap();
        tail.write(&word(&[MAGIC_1.as_slice(), boot.as_bytes()].concat(), b"for him").unwrap(), 0).unwrap();
        for _ in 0..2 {
            assert_eq!(disk.open_tail("f").unwrap().unwrap().1.about, b"for him");
        }
        let page = fs::read(&tail.path).unwrap();
        assert!(page.windows(8).any(|word| word == MAGIC), "it is of this version now");
    }

    #[test]
    fn what_is_damaged_or_of_another_boot_is_none_and_a_torn_mark_is_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let disk = disk(directory.path());
        let tail = disk.make_tail("f", b"for him").unwrap();
        let (path, length) = (tail.path.clone(), PAGE_BYTES + 10);
        tail.append(&runs([b"0123456789"]), 0).unwrap();
        tail.mark(3, b"three").unwrap();
        tail.mark(7, b"seven").unwrap();
        let sound = fs::read(&path).unwrap();
        assert_eq!(sound.len() as u64, length);
        let left = |damage: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = sound.clone();
            damage(&mut bytes);
            fs::write(&path, bytes).unwrap();
            disk.open_tail("f").unwrap().map(|(_, left)| left)
        };
        assert!(left(&|bytes| bytes.truncate(2047)).is_none());
        for place in [0, 33, 36, 45, 80] {
            assert!(left(&|bytes| bytes[place] ^= 1).is_none(), "{place}");
        }
        let torn = usize::try_from(MARKS_AT[1]).unwrap() + 44;
        assert_eq!(left(&|bytes| bytes[torn] ^= 1).unwrap().mark, (3, b"three".to_vec()));
        assert_eq!(left(&|bytes| bytes.truncate(2048)).unwrap().mark, (0, Vec::new()));
        assert_eq!(left(&|_| {}).unwrap().mark, (7, b"seven".to_vec()));
    }
}
