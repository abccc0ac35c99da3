//! Threads that may be held up: they read what lies behind a network, a number of them for each datastore.
//!
//! A file system that does not answer holds whoever asks it in the kernel, where nothing reaches. So reads of a datastore are made by threads
//! of its own, at most [`THREADS`], and one file gets at most [`PER_FILE`] of them at a time ([`Lane`]): one that hangs leaves the rest
//! to the others. What waits is in order of asking; a read is behind at most one turn of every other file's.
//!
//! They are not the runtime's: those are given up when the daemon ends, and a read in their hands would then be answered with an error.
//! Threads start as they are needed and end when they have had nothing to do for [`IDLE`].

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::content::Resume;
use crate::error::{Error, Kind};

/// Threads of one datastore: what a network file system keeps busy, and several files that hang.
const THREADS: usize = 32;

/// Threads that one file holds at most: more than its read-ahead keeps busy.
const PER_FILE: usize = 4;

/// Reads that wait for one datastore: more threads than a host usually allows could have asked.
const WAITING: usize = 1 << 16;

/// How long a thread waits for something to do.
const IDLE: Duration = Duration::from_secs(10);

/// The threads of one datastore; cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Readers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Turn>,
    threads: usize,
    idle: usize,
}

/// One thing to do; told why not where it cannot be done.
struct Turn {
    work: Resume,
    lane: Option<Arc<Lane>>,
}

/// The reads of one file that are under way, and those that wait for them.
#[derive(Default)]
pub(super) struct Lane(Mutex<OfFile>);

#[derive(Default)]
struct OfFile {
    running: usize,
    waiting: VecDeque<Resume>,
}

impl Readers {
    /// Runs `work` when its turn in `lane` has come; returns at once.
    pub(super) fn read(&self, lane: &Arc<Lane>, work: Resume) {
        let mut file = lock(&lane.0);
        if file.running >= PER_FILE {
            if file.waiting.len() >= WAITING {
                drop(file);
                return work(Err(too_many()));
            }
            file.waiting.push_back(work);
            return;
        }
        file.running += 1;
        drop(file);
        self.submit(Turn { work, lane: Some(lane.clone()) });
    }

    /// Runs `work` that belongs to no file.
    pub(super) fn run(&self, work: impl FnOnce() + Send + 'static) {
        self.submit(Turn { work: Box::new(|_| work()), lane: None });
    }

    fn submit(&self, turn: Turn) {
        let mut queue = lock(&self.0.queue);
        if queue.waiting.len() >= WAITING {
            drop(queue);
            return self.refuse(turn, &too_many());
        }
        queue.waiting.push_back(turn);
        if queue.idle >= queue.waiting.len() || queue.threads >= THREADS {
            drop(queue);
            self.0.more.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let own = self.clone();
        let started = thread::Builder::new().name("ckptd-datastore".to_owned()).spawn(move || own.take_turns());
        if let Err(error) = started {
            self.note_unstarted(&error);
        }
    }

    /// A thread less than was counted. Where there is no other, what waits is told.
    fn note_unstarted(&self, error: &std::io::Error) {
        tracing::warn!(%error, "a thread that reads a datastore could not be started");
        let mut queue = lock(&self.0.queue);
        queue.threads -= 1;
        let given_up = if queue.threads == 0 { std::mem::take(&mut queue.waiting) } else { VecDeque::new() };
        drop(queue);
        for turn in given_up {
            let error = Error::new(Kind::Unavailable, "TOO_MANY_THREADS", "starting a thread that reads a datastore");
            self.refuse(turn, &error.remedy("raise the limit on tasks (TasksMax=)"));
        }
    }

    fn take_turns(&self) {
        while let Some(Turn { work, lane }) = self.next() {
            // Counted down also if the work panics; its own guard has answered then.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(Ok(()))));
            if let Some(lane) = lane {
                self.pass_on(lane);
            }
        }
    }

    /// The next turn; `None` after a while without one, when this thread is no longer counted.
    fn next(&self) -> Option<Turn> {
        let mut queue = lock(&self.0.queue);
        loop {
            if let Some(turn) = queue.waiting.pop_front() {
                return Some(turn);
            }
            queue.idle += 1;
            let (woken, waited) = self.0.more.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.waiting.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }

    /// Gives the place of a read that ended to the next of the same file.
    fn pass_on(&self, lane: Arc<Lane>) {
        let mut file = lock(&lane.0);
        match file.waiting.pop_front() {
            Some(work) => {
                drop(file);
                self.submit(Turn { work, lane: Some(lane) });
            }
            None => file.running -= 1,
        }
    }

    /// Answers without doing; those of the same file that wait are answered too, as nobody would pass on to them.
    fn refuse(&self, turn: Turn, error: &Error) {
        (turn.work)(Err(error.share()));
        let Some(lane) = turn.lane else { return };
        let mut file = lock(&lane.0);
        file.running -= 1;
        let given_up = if file.running == 0 { std::mem::take(&mut file.waiting) } else { VecDeque::new() };
        drop(file);
        given_up.into_iter().for_each(|work| work(Err(error.share())));
    }
}

fn too_many() -> Error {
    Error::unavailable("TOO_MANY_READS", format!("more than {WAITING} reads wait for one datastore"))
        .remedy("see why it does not answer")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::error::Result;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Work that says that it began and waits to be let go.
    fn held(began: &mpsc::Sender<usize>, number: usize) -> (Resume, mpsc::Sender<()>) {
        let (go, wait) = mpsc::channel();
        let began = began.clone();
        let work = move |_: Result<()>| {
            let _ = began.send(number);
            let _ = wait.recv();
        };
        (Box::new(work), go)
    }

    #[test]
    fn a_file_that_hangs_leaves_threads_to_the_others() {
        let (readers, hung) = (Readers::default(), Arc::new(Lane::default()));
        let (began, beginnings) = mpsc::channel();
        let gates: Vec<_> = (0..THREADS + 8)
            .map(|number| {
                let (work, go) = held(&began, number);
                readers.read(&hung, work);
                go
            })
            .collect();
        let first: Vec<_> = (0..PER_FILE).map(|_| beginnings.recv_timeout(PATIENCE).unwrap()).collect();
        assert!(first.iter().all(|number| *number < PER_FILE), "{first:?}");

        let (done, answers) = mpsc::channel();
        let other = Arc::new(Lane::default());
        for _ in 0..100 {
            let done = done.clone();
            readers.read(&other, Box::new(move |arrived| done.send(arrived.is_ok()).unwrap()));
        }
        (0..100).for_each(|_| assert!(answers.recv_timeout(PATIENCE).unwrap()));
        assert!(beginnings.try_recv().is_err(), "a file took more threads than it may");

        drop(gates);
        for _ in PER_FILE..THREADS + 8 {
            beginnings.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn a_panic_costs_no_thread_and_no_place() {
        let (readers, lane) = (Readers::default(), Arc::new(Lane::default()));
        for _ in 0..2 * PER_FILE {
            readers.read(&lane, Box::new(|_| panic!("on purpose")));
        }
        let (done, answer) = mpsc::channel();
        readers.read(&lane, Box::new(move |arrived| done.send(arrived.is_ok()).unwrap()));
        assert!(answer.recv_timeout(PATIENCE).unwrap());
    }
}
