//! Readers that go on and on, and notice everything: a wrong byte, an error, a pause.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::corpus::Random;
use super::ran::wait_until;

/// How much is read at a time.
const PIECE: usize = 64 << 10;

/// How long a reader may be without an answer.
const PATIENCE: Duration = Duration::from_secs(180);

/// Readers of one file, whose bytes are known: one that keeps it open, one that keeps it mapped, one that opens it again each time.
pub(crate) struct Readers {
    stop: Arc<AtomicBool>,
    readers: Vec<Arc<Progress>>,
}

/// What one reader has come to.
#[derive(Default)]
struct Progress {
    name: &'static str,
    reads: AtomicU64,
    longest_us: AtomicU64,
    fault: Mutex<Option<String>>,
}

impl Readers {
    /// Starts them, each with the file open.
    pub(crate) fn start(file: &Path, bytes: &Arc<Vec<u8>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let held = File::open(file).unwrap();
        let mapped = File::open(file).unwrap();
        // SAFETY: the file is immutable and keeps its length.
        let mapped = unsafe { memmap2::Mmap::map(&mapped) }.unwrap();
        let scratch = File::from(memfd_create("mapped", MFdFlags::MFD_CLOEXEC).unwrap());
        let path = file.to_owned();
        let acts: [(&'static str, Act); 3] = [
            ("a reader with the file open", Box::new(move |at, into| read_anew(&held, at, into))),
            ("a reader with the file mapped", Box::new(move |at, into| read_mapped(&mapped, &scratch, at, into))),
            ("a reader that opens the file again and again", Box::new(move |at, into| open_and_read(&path, at, into))),
        ];
        let readers = acts.into_iter().map(|(name, act)| run(name, act, Arc::clone(bytes), Arc::clone(&stop)));
        Self { readers: readers.collect(), stop }
    }

    /// Waits until each has read several times more; the test fails where one met an error or a wrong byte.
    pub(crate) fn go_on(&self, after: &str) {
        for reader in &self.readers {
            let before = reader.reads.load(Ordering::Relaxed);
            wait_until(&format!("{} goes on after {after}", reader.name), PATIENCE, || {
                let fault = reader.fault.lock().unwrap().clone();
                assert!(fault.is_none(), "after {after}, {}: {}", reader.name, fault.unwrap_or_default());
                reader.reads.load(Ordering::Relaxed) > before + 4
            });
        }
    }

    /// The longest that one was without an answer so far.
    pub(crate) fn longest(&self) -> Duration {
        let longest = self.readers.iter().map(|reader| reader.longest_us.load(Ordering::Relaxed)).max();
        Duration::from_micros(longest.unwrap_or(0))
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // Not awaited: where the test has failed, one may have to wait until its mount goes.
        self.stop.store(true, Ordering::Relaxed);
    }
}

type Act = Box<dyn FnMut(usize, &mut [u8]) -> std::io::Result<()> + Send>;

fn run(name: &'static str, mut act: Act, bytes: Arc<Vec<u8>>, stop: Arc<AtomicBool>) -> Arc<Progress> {
    let progress = Arc::new(Progress { name, ..Progress::default() });
    let seen = Arc::clone(&progress);
    thread::spawn(move || {
        let mut random = Random::new(1);
        let mut piece = vec![0; PIECE];
        while !stop.load(Ordering::Relaxed) {
            let at = usize::try_from(random.below((bytes.len() - PIECE) as u64)).unwrap();
            let began = Instant::now();
            let outcome = act(at, &mut piece);
            let took = u64::try_from(began.elapsed().as_micros()).unwrap();
            seen.longest_us.fetch_max(took, Ordering::Relaxed);
            let fault = match outcome {
                Err(error) => Some(format!("an error at {at}: {error}")),
                Ok(()) if piece != bytes[at..at + PIECE] => Some(format!("a wrong byte within {PIECE} bytes at {at}")),
                Ok(()) => None,
            };
            if let Some(fault) = fault {
                *seen.fault.lock().unwrap() = Some(fault);
                return;
            }
            seen.reads.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    });
    progress
}

/// Reads past what the kernel still has of the file.
fn read_anew(file: &File, at: usize, into: &mut [u8]) -> std::io::Result<()> {
    posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    file.read_exact_at(into, at as u64)
}

/// Lets the kernel touch the mapping, which then says EFAULT where touching it here would end the test with SIGBUS.
fn read_mapped(mapped: &memmap2::Mmap, scratch: &File, at: usize, into: &mut [u8]) -> std::io::Result<()> {
    scratch.write_all_at(&mapped[at..at + into.len()], 0)?;
    scratch.read_exact_at(into, 0)
}

fn open_and_read(path: &PathBuf, at: usize, into: &mut [u8]) -> std::io::Result<()> {
    path.metadata()?;
    read_anew(&File::open(path)?, at, into)
}
