//! Reads that wait, and who waits: a reader that is killed is let go.
//!
//! A thread whose read is in the daemon's hands is held by the kernel until the read is answered, SIGKILL or not. (Buffered reads and
//! page faults wait for their pages instead, which a kill ends. For `O_DIRECT` the kernel waits for the request itself, without telling us of
//! the kill: what it asks for asynchronously is never interrupted, and `fuser` answers FUSE_INTERRUPT with ENOSYS, after which there are
//! none.) So the answers to reads that wait are kept here, and while one has waited for [`GRACE`] its asker is looked at every
//! [`TICK`]; one that is going away is answered with EINTR, which nobody gets to see, and what was to answer it is dropped.
//!
//! Who is going away:
//! * a thread with SIGKILL pending: its whole program ends;
//! * one that is gone or going, if its read came through the page cache: nobody waits for the request, and whoever wants
//!   the same page asks for himself;
//! * one that is gone or going, if its read was `O_DIRECT`, once its whole program is: a thread may hand reads to the kernel (`io_submit`) and
//!   leave them to others of its program.
//!
//! **Read-ahead that is partly here** is answered with that error too when it is looked at first: the kernel then asks again for the page that
//! somebody reads, alone, and what is here is not kept waiting by what is next to it. Before that it is left to come, which it mostly does.
//!
//! At most [`LOOKS`] reads are looked at in a tick, the others in the next ones. One thread does it for all sessions; it is started by the first
//! read that waits and ends when none has for [`IDLE`]. Readers that this process cannot see in `/proc` wait as before.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Bound;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::panics::guarded;

/// How long a read waits before anybody looks at who asked: most are answered before.
const GRACE: Duration = Duration::from_millis(200);

/// Time between looks: a killed reader is gone soon enough for whoever starts the job again.
const TICK: Duration = Duration::from_millis(200);

/// Reads looked at in one tick: 10 us each, so 5 % of a processor at most. Ten thousand are seen within 2 s.
const LOOKS: usize = 1024;

/// How long the thread stays when nothing waits.
const IDLE: Duration = Duration::from_secs(2);

/// `PF_EXITING` of the flags in `/proc/<pid>/stat`.
const EXITING: u64 = 0x4;

/// SIGKILL in the set of pending signals there.
const SIGKILL: u64 = 1 << 8;

/// Who asked for a read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    /// Its thread, as this process numbers it; 0 where it cannot be seen.
    pub(super) thread: u32,
    /// Whether it reads past the page cache.
    pub(super) direct: bool,
    /// Whether the kernel has asked for more than anybody reads, and part of it is here.
    pub(super) read_ahead: bool,
}

/// The reads that wait, with what answers them.
pub(super) struct Waits<R>(Arc<Shared<R>>);

struct Shared<R> {
    /// Says EINTR.
    interrupt: fn(R),
    table: Mutex<Table<R>>,
    begun: Condvar,
}

struct Table<R> {
    waiting: BTreeMap<u64, Waiting<R>>,
    next: u64,
    /// The last that was looked at.
    looked: u64,
    watched: bool,
    /// The watching thread waits to be told of the first.
    asleep: bool,
}

struct Waiting<R> {
    asker: Asker,
    since: Instant,
    /// Its process, once it was looked at.
    program: Option<u32>,
    reply: R,
    given_up: Option<Box<dyn FnOnce() + Send>>,
}

/// The right to answer one read. Dropping it drops the answer, which then says that something went wrong.
pub(super) struct Turn<R> {
    shared: Arc<Shared<R>>,
    id: u64,
}

/// What `/proc` says of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Alive,
    Killed,
    /// Dead, dying or not there.
    Leaving,
}

impl<R: Send + 'static> Waits<R> {
    /// None yet; `interrupt` answers EINTR.
    pub(super) fn new(interrupt: fn(R)) -> Self {
        let table = Table { waiting: BTreeMap::new(), next: 1, looked: 0, watched: false, asleep: false };
        Self(Arc::new(Shared { interrupt, table: Mutex::new(table), begun: Condvar::new() }))
    }

    /// Keeps `reply` until it is taken or its asker goes away. Returns at once.
    pub(super) fn begin(&self, asker: Asker, reply: R) -> Turn<R> {
        let mut table = self.0.lock();
        let id = table.next;
        table.next += 1;
        let since = Instant::now();
        table.waiting.insert(id, Waiting { asker, since, program: None, reply, given_up: None });
        if !table.watched {
            table.watched = self.start();
        } else if table.asleep {
            table.asleep = false;
            self.0.begun.notify_one();
        }
        drop(table);
        Turn { shared: self.0.clone(), id }
    }

    /// Has `then` run if the asker of the read goes away before it is answered.
    pub(super) fn on_giving_up(&self, id: u64, then: impl FnOnce() + Send + 'static) {
        if let Some(waiting) = self.0.lock().waiting.get_mut(&id) {
            waiting.given_up = Some(Box::new(then));
        }
    }

    fn start(&self) -> bool {
        let shared = self.0.clone();
        let started = thread::Builder::new().name("ckptd-waits".to_owned()).spawn(move || shared.watch());
        if let Err(error) = &started {
            tracing::warn!(%error, "reads that wait are not watched: killed readers may stay until they are answered");
        }
        started.is_ok()
    }
}

impl<R> Clone for Waits<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Turn<R> {
    /// Which read it is.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// What answers the read; `None` if its asker went away.
    pub(super) fn take(self) -> Option<R> {
        self.shared.lock().waiting.remove(&self.id).map(|waiting| waiting.reply)
    }
}

impl<R> Drop for Turn<R> {
    fn drop(&mut self) {
        let left = self.shared.lock().waiting.remove(&self.id);
        drop(left);
    }
}

impl<R> Shared<R> {
    fn lock(&self) -> MutexGuard<'_, Table<R>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        while self.wait_for_one() {
            thread::sleep(TICK);
            // What it ended is one look: the next begins behind the read that it was about, or without it.
            let _ = guarded("a look at those who wait", || {
                self.look(Instant::now());
                Ok(())
            });
        }
    }

    /// Whether something waits; false after a while in which nothing did, when the thread is no longer counted.
    fn wait_for_one(&self) -> bool {
        let mut table = self.lock();
        if !table.waiting.is_empty() {
            return true;
        }
        table.asleep = true;
        let wait = self.begun.wait_timeout_while(table, IDLE, |table| table.waiting.is_empty());
        let (mut table, _) = wait.unwrap_or_else(PoisonError::into_inner);
        table.asleep = false;
        table.watched = !table.waiting.is_empty();
        table.watched
    }

    /// Looks at the askers of reads that have waited long enough, and answers those that go away.
    fn look(&self, now: Instant) {
        let due = self.lock().due(now);
        let mut threads = HashMap::new();
        let mut programs = HashMap::new();
        for (id, asker, mut program) in due {
            if asker.read_ahead {
                self.give_up(id);
                continue;
            }
            let seen = *threads.entry(asker.thread).or_insert_with(|| thread_state(asker.thread));
            if asker.direct && program.is_none() && seen != Seen::Leaving {
                program = program_of(asker.thread);
                if let (Some(program), Some(waiting)) = (program, self.lock().waiting.get_mut(&id)) {
                    waiting.program = Some(program);
                }
            }
            let leaves = match (seen, program) {
                (Seen::Alive, _) => false,
                (Seen::Killed, _) => true,
                (Seen::Leaving, _) if !asker.direct => true,
                (Seen::Leaving, None) => false,
                (Seen::Leaving, Some(program)) => *programs.entry(program).or_insert_with(|| program_leaves(program)),
            };
            if leaves {
                self.give_up(id);
            }
        }
    }

    fn give_up(&self, id: u64) {
        let Some(waiting) = self.lock().waiting.remove(&id) else { return };
        tracing::debug!(asker = ?waiting.asker, "a read that waited is given up");
        (self.interrupt)(waiting.reply);
        if let Some(given_up) = waiting.given_up {
            given_up();
        }
    }
}

impl<R> Table<R> {
    /// The next reads to look at, round and round: those that were begun before `now` less [`GRACE`].
    fn due(&mut self, now: Instant) -> Vec<(u64, Asker, Option<u32>)> {
        let long = |(_, waiting): &(&u64, &Waiting<R>)| {
            let is_of_use = waiting.asker.thread != 0 || waiting.asker.read_ahead;
            is_of_use && now.saturating_duration_since(waiting.since) >= GRACE
        };
        let behind = self.waiting.range((Bound::Excluded(self.looked), Bound::Unbounded));
        let around: Vec<_> = behind.chain(self.waiting.range(..=self.looked)).take(LOOKS).collect();
        self.looked = around.last().map_or(0, |(id, _)| **id);
        around.into_iter().filter(long).map(|(id, waiting)| (*id, waiting.asker, waiting.program)).collect()
    }
}

fn thread_state(thread: u32) -> Seen {
    stat_of(&format!("/proc/{thread}/stat"))
}

fn stat_of(path: &str) -> Seen {
    match fs::read_to_string(path) {
        Ok(text) => read_stat(&text),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Seen::Leaving,
            _ => Seen::Alive,
        },
    }
}

/// Reads a line of `/proc/<pid>/stat` (`proc_pid_stat(5)`): state is its field 3, flags 9, pending signals 31.
fn read_stat(line: &str) -> Seen {
    let Some((_, rest)) = line.rsplit_once(") ") else { return Seen::Alive };
    let fields: Vec<&str> = rest.split(' ').collect();
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    if number(31) & SIGKILL != 0 {
        Seen::Killed
    } else if number(9) & EXITING != 0 || matches!(fields[0], "Z" | "X") {
        Seen::Leaving
    } else {
        Seen::Alive
    }
}

/// The process that a thread is of.
fn program_of(thread: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Tgid:")).and_then(|number| number.trim().parse().ok())
}

/// Whether no thread of a process goes on.
fn program_leaves(program: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{program}/task")) else { return true };
    threads.flatten().all(|thread| stat_of(&format!("{}/stat", thread.path().display())) != Seen::Alive)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;

    /// Sends its number when it is interrupted, and its negative when it is dropped otherwise.
    struct Answer(i32, Sender<i32>);

    impl Answer {
        fn interrupt(mut self) {
            let _ = self.1.send(self.0);
            self.0 = 0;
        }
    }

    impl Drop for Answer {
        fn drop(&mut self) {
            if self.0 != 0 {
                let _ = self.1.send(-self.0);
            }
        }
    }

    fn waits() -> (Waits<Answer>, Sender<i32>, Receiver<i32>) {
        let (say, said) = mpsc::channel();
        let waits = Waits::new(Answer::interrupt);
        // The tests look themselves.
        waits.0.lock().watched = true;
        (waits, say, said)
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    fn asker(child: &Child, direct: bool) -> Asker {
        Asker { thread: child.id(), direct, read_ahead: false }
    }

    fn later() -> Instant {
        Instant::now() + GRACE
    }

    #[test]
    fn read_ahead_that_is_partly_here_is_asked_for_again_by_the_page() {
        let (waits, say, said) = waits();
        let ahead = |thread| Asker { thread, direct: false, read_ahead: true };
        let _turns =
            [waits.begin(ahead(std::process::id()), Answer(1, say.clone())), waits.begin(ahead(0), Answer(2, say))];
        waits.0.look(Instant::now());
        assert!(said.try_recv().is_err(), "it may come soon");
        waits.0.look(later());
        assert_eq!((said.try_recv(), said.try_recv()), (Ok(1), Ok(2)));
    }

    #[test]
    fn who_is_gone_is_let_go_and_who_lives_waits_on() {
        let (waits, say, said) = waits();
        let (mut gone, mut alive) = (sleeper(), sleeper());
        let turns =
            [waits.begin(asker(&gone, true), Answer(1, say.clone())), waits.begin(asker(&alive, true), Answer(2, say))];
        let told = say_when_given_up(&waits, &turns[0]);
        waits.0.look(Instant::now());
        waits.0.look(later());
        assert!(said.try_recv().is_err(), "both live");
        gone.kill().unwrap();
        gone.wait().unwrap();
        waits.0.look(later());
        assert_eq!((said.try_recv(), told.try_recv()), (Ok(1), Ok(())));
        let [first, second] = turns;
        assert!(first.take().is_none());
        assert!(second.take().is_some());
        alive.kill().unwrap();
        alive.wait().unwrap();
    }

    fn say_when_given_up(waits: &Waits<Answer>, turn: &Turn<Answer>) -> Receiver<()> {
        let (say, said) = mpsc::channel();
        waits.on_giving_up(turn.id(), move || say.send(()).unwrap());
        said
    }

    #[test]
    fn a_thread_that_ended_before_it_was_looked_at_counts_only_where_nobody_can_wait() {
        let (waits, say, said) = waits();
        let mut gone = sleeper();
        let (direct, cached) = (asker(&gone, true), asker(&gone, false));
        gone.kill().unwrap();
        gone.wait().unwrap();
        let turns = [waits.begin(direct, Answer(1, say.clone())), waits.begin(cached, Answer(2, say))];
        waits.0.look(later());
        assert_eq!((said.try_recv(), said.try_recv().is_err()), (Ok(2), true));
        drop(turns);
        assert_eq!(said.try_recv(), Ok(-1), "a dropped turn drops its answer");
    }

    #[test]
    fn all_are_looked_at_in_turn() {
        let (waits, say, _said) = waits();
        let me = Asker { thread: std::process::id(), direct: true, read_ahead: false };
        let number = |n: usize| i32::try_from(n).unwrap();
        let turns: Vec<_> = (1..=LOOKS * 2 + 10).map(|n| waits.begin(me, Answer(number(n), say.clone()))).collect();
        let mut seen: Vec<u64> = Vec::new();
        for _ in 0..3 {
            let due = waits.0.lock().due(later());
            assert_eq!(due.len(), LOOKS);
            seen.extend(due.iter().map(|(id, ..)| *id));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), turns.len());
        assert!(waits.0.lock().due(Instant::now()).is_empty(), "none has waited long");
    }

    #[test]
    fn the_watching_thread_ends_with_its_work() {
        let (say, said) = mpsc::channel();
        let waits = Waits::new(Answer::interrupt);
        let mut gone = sleeper();
        let turn = waits.begin(asker(&gone, false), Answer(1, say));
        gone.kill().unwrap();
        gone.wait().unwrap();
        assert_eq!(said.recv_timeout(Duration::from_secs(5)), Ok(1));
        drop(turn);
        assert!(waits.0.lock().watched);
    }

    #[test]
    fn a_panic_in_a_look_leaves_the_others_their_answers() {
        let (say, said) = mpsc::channel();
        let waits = Waits::new(|answer: Answer| match answer.0 {
            1 => panic!("on purpose"),
            _ => answer.interrupt(),
        });
        let mut gone = sleeper();
        let turns = [1, 2].map(|number| waits.begin(asker(&gone, false), Answer(number, say.clone())));
        gone.kill().unwrap();
        gone.wait().unwrap();
        let mut heard = [said.recv_timeout(Duration::from_secs(5)), said.recv_timeout(Duration::from_secs(5))];
        heard.sort_by_key(|number| number.unwrap_or(0));
        assert_eq!(heard, [Ok(-1), Ok(2)]);
        drop(turns);
    }

    #[test]
    fn a_line_of_stat_is_read_whatever_its_program_is_called() {
        let line = |state: &str, flags: u64, signals: u64| {
            let zeros = "0 ".repeat(21);
            format!("12 (a) b) (c) {state} 1 1 1 0 -1 {flags} {zeros}{signals} 0 0\n")
        };
        assert_eq!(read_stat(&line("S", 0x40_0000, 0)), Seen::Alive);
        assert_eq!(read_stat(&line("D", 0x40_0000, SIGKILL | 2)), Seen::Killed);
        assert_eq!(read_stat(&line("D", 0x40_0000, 1 << 14)), Seen::Alive);
        assert_eq!(read_stat(&line("D", 0x40_0004, 0)), Seen::Leaving);
        assert_eq!(read_stat(&line("Z", 0, 0)), Seen::Leaving);
        assert_eq!(read_stat(""), Seen::Alive);
        assert_eq!(thread_state(std::process::id()), Seen::Alive);
        assert_eq!(program_of(std::process::id()), Some(std::process::id()));
        assert!(!program_leaves(std::process::id()));
    }
}
