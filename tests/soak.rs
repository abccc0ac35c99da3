//! Readers of every kind, over checkpoints of every kind, while the daemon is killed at random moments.
//!
//! Four checkpoints: one whose file is whole (passthrough, where the kernel has it), one whose file is compact and stays so, one of a thousand small
//! files, and one that fills all the while. Fourteen readers: each of the three large files is read at random, in order, through a mapping, and opened
//! again and again (with a look at its size); the tree of small files is walked, and they are opened, read whole and closed.
//!
//! A hundred kills by default, which takes some minutes; `TEST_SOAK_KILLS` asks for more. A third of them come before the daemon answers: while it
//! starts, or takes sessions over. Every byte is checked; one error, wrong byte or
//! reader that does not come back, or waits for longer than the daemon was away, fails the test. Readers of what fills wait for the source besides:
//! see [`SOURCE_TAKES`]. The seed is printed.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::corpus::{Random, Tensors, seed};
use support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use support::files::{walk, xattr};
use support::ran::{run, wait_until};
use support::site::{Page, Site};

const MIB: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);
/// What a round of a reader may take besides the time without a daemon that falls into it, on a machine that does other things too: 0.4 s were seen
/// with that time in it.
const BESIDES: Duration = Duration::from_secs(2);
/// The same of what fills, whose source may have others before it.
const BESIDES_FILLING: Duration = Duration::from_secs(5);
/// Bytes a second that the source gives: a kill costs whatever unit is on its way.
const RATE: usize = 4 * MIB;
/// Bytes of a fill unit.
const UNIT: usize = 4 * MIB;
/// Units that a round of a reader of what fills may have fetched: two that it reads of, and as many that the kernel reads ahead of it.
const UNITS_A_ROUND: usize = 4;
/// Readers of what fills: each may have asked just before another.
const READERS_OF_FILLING: usize = 4;
/// Streams of the background: they stand still for readers, and what each has in its socket by then, a unit at most, is on the line before theirs.
const STREAMS_BEFORE: usize = 4;
/// What the source needs at its rate for all that can be before the units of one round, and for those: for so long a reader of what fills may wait
/// within one life of the daemon. Wanted units go to the head of the queue, so nothing else is before them. A kill costs the units on their way,
/// and what is wanted is asked for again in the next life: a life that is shorter than this may bring a reader nothing.
const SOURCE_TAKES: Duration =
    Duration::from_secs(((READERS_OF_FILLING * UNITS_A_ROUND + STREAMS_BEFORE) * UNIT / RATE) as u64);
/// Bytes that arrive for each kill, at most: a life and a half at that rate.
const PER_KILL: usize = 2 * RATE;
/// Kills that something fills through; in a longer run it is whole some time.
const FILLING_FOR: u64 = 100;

/// What all readers report to.
#[derive(Default)]
struct Ledger {
    stop: AtomicBool,
    rounds: Mutex<Vec<(&'static str, Arc<AtomicU64>)>>,
    longest: Mutex<Vec<(&'static str, Duration)>>,
    /// Rounds that took longer than is right where no daemon is missed.
    slow: Mutex<Vec<(&'static str, Range<Instant>)>>,
    faults: Mutex<Vec<String>>,
}

impl Ledger {
    /// Repeats `act` on a thread of its own until the end; it says what was wrong.
    fn reader(
        self: &Arc<Self>,
        name: &'static str,
        mut act: impl FnMut(&mut Random) -> Result<(), String> + Send + 'static,
    ) {
        let rounds = Arc::new(AtomicU64::new(0));
        self.rounds.lock().unwrap().push((name, Arc::clone(&rounds)));
        let ledger = Arc::clone(self);
        thread::spawn(move || {
            let mut random = Random::new(seed());
            let mut longest = Duration::ZERO;
            while !ledger.stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                if let Err(fault) = act(&mut random) {
                    ledger.faults.lock().unwrap().push(format!("{name}: {fault}"));
                    return;
                }
                let round = began..Instant::now();
                let took = round.end - round.start;
                longest = longest.max(took);
                if took >= BESIDES {
                    ledger.slow.lock().unwrap().push((name, round));
                }
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
            ledger.longest.lock().unwrap().push((name, longest));
        });
    }

    fn assert_well(&self) {
        let faults = self.faults.lock().unwrap();
        assert!(faults.is_empty(), "{faults:#?}");
    }

    /// Waits until each reader has come round once more, all of them at the same time.
    fn assert_alive(&self) {
        let rounds = self.rounds.lock().unwrap().clone();
        let before: Vec<_> = rounds.iter().map(|(_, rounds)| rounds.load(Ordering::Relaxed)).collect();
        for ((name, rounds), before) in rounds.into_iter().zip(before) {
            wait_until(&format!("{name} goes on"), LIMIT, || {
                self.assert_well();
                rounds.load(Ordering::Relaxed) > before
            });
        }
    }

    /// Ends all readers; how long each had to wait at most.
    fn end(&self) -> Vec<(&'static str, Duration)> {
        let readers = self.rounds.lock().unwrap().len();
        self.stop.store(true, Ordering::Relaxed);
        wait_until("all readers have ended", LIMIT, || {
            self.assert_well();
            self.longest.lock().unwrap().len() == readers
        });
        self.longest.lock().unwrap().clone()
    }

    /// The longest that somebody waited for what fills within one life of the daemon.
    fn longest_in_a_life(&self, away: &[Range<Instant>]) -> Duration {
        let slow = self.slow.lock().unwrap();
        let of_filling = slow.iter().filter(|(name, _)| name.starts_with("arriving"));
        of_filling.map(|(_, round)| longest_in_a_life(round, away)).max().unwrap_or_default()
    }

    /// That nobody waited for longer than there was no daemon; who reads what fills, in no life of it for longer than the source takes.
    fn assert_not_kept_waiting(&self, away: &[Range<Instant>]) {
        let slow = self.slow.lock().unwrap();
        for (name, round) in slow.iter() {
            if name.starts_with("arriving") {
                let waited = longest_in_a_life(round, away);
                assert!(
                    waited < SOURCE_TAKES + BESIDES_FILLING,
                    "{name}: {waited:?} in one life, for {SOURCE_TAKES:?} of the source"
                );
                continue;
            }
            let within =
                |away: &Range<Instant>| away.end.min(round.end).saturating_duration_since(away.start.max(round.start));
            let (took, away): (_, Duration) = (round.end - round.start, away.iter().map(within).sum());
            assert!(took < away + BESIDES, "{name}: {took:?}, in which there was no daemon for {away:?}");
        }
    }
}

/// The longest part of a round in which one daemon was there; `away` is in order.
fn longest_in_a_life(round: &Range<Instant>, away: &[Range<Instant>]) -> Duration {
    let (mut longest, mut since) = (Duration::ZERO, round.start);
    for away in away.iter().filter(|away| away.start < round.end && round.start < away.end) {
        longest = longest.max(away.start.saturating_duration_since(since));
        since = since.max(away.end);
    }
    longest.max(round.end.saturating_duration_since(since))
}

fn at_random(file: &File, bytes: &[u8], random: &mut Random) -> Result<(), String> {
    let length = usize::try_from(1 + random.below(200_000)).unwrap();
    let at = usize::try_from(random.below((bytes.len() - length) as u64)).unwrap();
    let mut found = vec![0; length];
    file.read_exact_at(&mut found, at as u64).map_err(|error| format!("reading at {at}: {error}"))?;
    if found == bytes[at..at + length] { Ok(()) } else { Err(format!("wrong bytes at {at}, length {length}")) }
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|error| format!("opening {}: {error}", path.display()))
}

/// Readers of one large file.
fn read_large(ledger: &Arc<Ledger>, names: [&'static str; 4], path: PathBuf, bytes: &Arc<Vec<u8>>) {
    let (held, own) = (open(&path).unwrap(), Arc::clone(bytes));
    ledger.reader(names[0], move |random| at_random(&held, &own, random));
    let (held, own, mut at) = (open(&path).unwrap(), Arc::clone(bytes), 0);
    ledger.reader(names[1], move |_| {
        let mut found = vec![0; MIB.min(own.len() - at)];
        held.read_exact_at(&mut found, at as u64).map_err(|error| format!("reading on at {at}: {error}"))?;
        let right = found == own[at..at + found.len()];
        at = if at + found.len() == own.len() { 0 } else { at + found.len() };
        if right { Ok(()) } else { Err(format!("wrong bytes before {at}")) }
    });
    // SAFETY: nothing changes a file of a checkpoint.
    let map = unsafe { memmap2::Mmap::map(&open(&path).unwrap()) }.unwrap();
    let own = Arc::clone(bytes);
    ledger.reader(names[2], move |random| {
        let at = usize::try_from(random.below((own.len() - 9000) as u64)).unwrap();
        if map[at..at + 9000] == own[at..at + 9000] { Ok(()) } else { Err(format!("wrong mapped bytes at {at}")) }
    });
    let own = Arc::clone(bytes);
    ledger.reader(names[3], move |random| {
        let size = fs::metadata(&path).map_err(|error| format!("looking at it: {error}"))?.len();
        if size != own.len() as u64 {
            return Err(format!("its size is {size}"));
        }
        at_random(&open(&path)?, &own, random)
    });
}

/// Walks a tree of small files and reads some of them.
fn read_many(ledger: &Arc<Ledger>, source: &Path, served: PathBuf) {
    let paths = walk(source);
    let expected: Vec<_> = paths.iter().map(|path| fs::read(source.join(path)).ok()).collect();
    let (count, root) = (paths.len(), served.clone());
    ledger.reader("find over small files", move |_| {
        let found = walk(&root).len();
        if found == count { Ok(()) } else { Err(format!("{found} of {count} entries")) }
    });
    ledger.reader("small files", move |random| {
        let at = usize::try_from(random.below(paths.len() as u64)).unwrap();
        let Some(expected) = &expected[at] else { return Ok(()) };
        let found = fs::read(served.join(&paths[at])).map_err(|error| format!("{}: {error}", paths[at].display()))?;
        if found == *expected { Ok(()) } else { Err(format!("{} differs", paths[at].display())) }
    });
}

fn soak(env: &[(&'static str, &str)], kills: u64) {
    let arriving = arriving_bytes(kills);
    // No room to copy back what one file has of another: the daemon reads that for its jobs until the end.
    let capacity = (arriving + 48 * MIB).to_string();
    let daemon = Daemon::start_kept(&[env, &[("CKPTD_STORE__CAPACITY", capacity.as_str())]].concat());
    let source = daemon.place().dir("source");
    let (base, tuned, many) = (source.join("base"), source.join("tuned"), source.join("many"));
    [&base, &tuned, &many].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let tensors = Tensors::new(seed(), 6, 4 * MIB);
    tensors.write_safetensors(&base.join("w"));
    tensors.fine_tuned(1).write_safetensors(&tuned.join("w"));
    for file in 0..1000 {
        let dir = many.join(format!("d{}", file % 10));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("f{file}")), format!("{file}").repeat(1 + file % 50)).unwrap();
    }
    for (name, dir) in [("base", &base), ("tuned", &tuned), ("many", &many)] {
        daemon.capture(name, dir);
    }
    let (site, arriving, early) = begin_to_arrive(&daemon, arriving);

    let ledger = Arc::new(Ledger::default());
    let (whole, compact) = (daemon.attach("one", "base").join("w"), daemon.attach("two", "tuned").join("w"));
    assert_states(&daemon, [&whole, &compact], &early, env.contains(&NO_PASSTHROUGH));
    let of_compact = compact.clone();
    let of_base = ["whole, random", "whole, in order", "whole, mapped", "whole, opened again"];
    read_large(&ledger, of_base, whole, &Arc::new(fs::read(base.join("w")).unwrap()));
    let of_tuned = ["compact, random", "compact, in order", "compact, mapped", "compact, opened again"];
    read_large(&ledger, of_tuned, compact, &Arc::new(fs::read(tuned.join("w")).unwrap()));
    read_many(&ledger, &many, daemon.attach("three", "many"));
    let of_arriving = ["arriving, random", "arriving, in order", "arriving, mapped", "arriving, opened again"];
    read_large(&ledger, of_arriving, early, &arriving);

    let jobs = daemon.json(&["jobs"]);
    let away = kill_again_and_again(&daemon, kills, &ledger);
    let state = daemon.json(&["get", "arriving"])["state"].clone();
    assert!(state == "filling" || kills > FILLING_FOR, "it was {state} before the last kill");
    site.limit(0);
    daemon.wait_state("arriving", "ready", LIMIT);
    ledger.assert_alive();
    let longest = ledger.end();
    let longest_away = away.iter().map(|away| away.end - away.start).max().unwrap_or_default();
    let in_a_life = ledger.longest_in_a_life(&away);
    let restarts = daemon.json(&["status"])["restarts"].as_u64().unwrap();
    println!(
        "{kills} kills, {restarts} restarts; away for {longest_away:?} at most; longest waits: {longest:?}; for what fills, in one life, {in_a_life:?} \
         of {SOURCE_TAKES:?}"
    );
    ledger.assert_not_kept_waiting(&away);
    assert_eq!(restarts, kills, "so many daemons were killed");
    let states = |jobs: &serde_json::Value| -> Vec<String> {
        let jobs = jobs["jobs"].as_array().unwrap();
        jobs.iter().map(|job| format!("{} {} {}", job["job"], job["target"], job["state"])).collect()
    };
    assert_eq!(states(&daemon.json(&["jobs"])), states(&jobs), "attachments changed");
    assert_eq!(xattr(&of_compact, "user.ckptd.state"), "daemon", "it was made whole");
    assert_eq!(daemon.json(&["usage"])["duplicate_bytes"], 0);
}

/// Bytes of what fills for as long as the kills go on.
fn arriving_bytes(kills: u64) -> usize {
    64 * MIB + PER_KILL * usize::try_from(kills.min(FILLING_FOR)).unwrap()
}

/// A checkpoint of one file of so many bytes, attached while it fills: its source, its bytes and where it is seen.
fn begin_to_arrive(daemon: &Daemon, bytes: usize) -> (Site, Arc<Vec<u8>>, PathBuf) {
    let site = Site::open();
    site.limit(RATE as u64);
    let bytes = Arc::new(Random::new(seed()).bytes(bytes));
    let url = site.put("/w", Page::Ranged(Arc::clone(&bytes)));
    daemon.ctl(&["create", "arriving", "--type", "web", "--uri", &url]).ok();
    let target = daemon.place().dir("early");
    run(daemon.ctl_command().args(["attach", "early", "arriving", "--lazy", "--at"]).arg(&target)).ok();
    (site, bytes, target.join("w"))
}

/// That each is served as its name says, before anything is made of it.
fn assert_states(daemon: &Daemon, whole: [&Path; 2], early: &Path, by_daemon: bool) {
    let expected = if by_daemon { "daemon" } else { "passthrough" };
    assert_eq!(xattr(whole[0], "user.ckptd.state"), expected);
    assert_eq!(xattr(whole[1], "user.ckptd.state"), "daemon");
    assert!(xattr(early, "user.ckptd.state").starts_with("filling"), "{:?}", daemon.stderr_tail());
}

/// Ends daemons in every stage of their lives; the times from a kill until one answered.
fn kill_again_and_again(daemon: &Daemon, kills: u64, ledger: &Ledger) -> Vec<Range<Instant>> {
    let mut random = Random::new(seed());
    let (mut away, mut since, mut last) = (Vec::new(), None, None);
    for round in 0..kills {
        if round % 3 == 2 {
            // The successor of the one that was killed just now, wherever in its start it is.
            thread::sleep(Duration::from_millis(random.below(150)));
            let mut young = None;
            wait_until("a successor begins", LIMIT, || {
                young = child_of(daemon).filter(|young| Some(*young) != last);
                young.is_some()
            });
            since.get_or_insert_with(Instant::now);
            last = young;
        } else {
            last = Some(back(daemon, &mut since, &mut away));
            // Longer than the keeper takes for a failed start: two of those in a row are a crash loop, which it slows down.
            thread::sleep(Duration::from_millis(1000 + random.below(600)));
            since = Some(Instant::now());
        }
        last.inspect(|last| kill(*last, Signal::SIGKILL).unwrap());
        ledger.assert_well();
        if round % 10 == 9 {
            back(daemon, &mut since, &mut away);
            ledger.assert_alive();
        }
    }
    back(daemon, &mut since, &mut away);
    away
}

/// The daemon that answers, once one does; until then it was away, if one was killed.
fn back(daemon: &Daemon, since: &mut Option<Instant>, away: &mut Vec<Range<Instant>>) -> Pid {
    let pid = server(daemon);
    away.extend(since.take().map(|since| since..Instant::now()));
    pid
}

/// The keeper's child, if there is one now.
fn child_of(daemon: &Daemon) -> Option<Pid> {
    let path = format!("/proc/{0}/task/{0}/children", daemon.pid());
    let child = fs::read_to_string(path).unwrap_or_default();
    child.split_whitespace().next().and_then(|child| child.parse().ok()).map(Pid::from_raw)
}

/// The daemon that answers, once one does.
fn server(daemon: &Daemon) -> Pid {
    let mut pid = None;
    wait_until("a daemon answers", LIMIT, || {
        let ran = daemon.ctl(&["--json", "status"]);
        pid = (ran.code == Some(0)).then(|| ran.json()["pid"].as_i64().unwrap());
        pid.is_some()
    });
    Pid::from_raw(i32::try_from(pid.unwrap()).unwrap())
}

fn kills() -> u64 {
    std::env::var("TEST_SOAK_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(100)
}

#[test]
fn nobody_notices_a_hundred_kills_where_the_kernel_reads() {
    soak(&[LOOPBACK], kills());
}

#[test]
fn nobody_notices_kills_where_the_daemon_reads() {
    soak(&[LOOPBACK, NO_PASSTHROUGH], kills() / 3);
}
