//! Under `ckptd keeper` jobs do not notice that the daemon is killed, restarted, or hangs.

#![cfg(test)]

// The trap is in debug builds alone.
#[cfg(debug_assertions)]
mod panics;
#[path = "../support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::corpus::{Random, Tensors, random_file, seed};
use support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use support::files::{assert_same_tree, xattr};
use support::memory::ShortOfMemory;
use support::place::mounts_at;
use support::ran::{run, shell, wait_for, wait_until};
use support::site::{Page, Site};
use support::still::Still;
use support::waiting::waiting_requests;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);
const KILLS: u32 = 5;

/// A thread that uses a served file in every way until it is told to stop, and fails at the first wrong byte or error.
struct Reader {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Reader {
    fn of(served: PathBuf, source: PathBuf) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let thread = thread::spawn(move || {
            let expected = fs::read(&source).unwrap();
            let held = File::open(&served).unwrap();
            // SAFETY: nobody writes to a served checkpoint.
            let mapped = unsafe { memmap2::Mmap::map(&held) }.unwrap();
            let mut random = Random::new(seed());
            let mut buffer = vec![0; 70_000];
            while !stopped.load(Ordering::Relaxed) {
                let at = usize::try_from(random.below(expected.len() as u64 - 70_000)).unwrap();
                held.read_exact_at(&mut buffer, at as u64).unwrap();
                assert_eq!(buffer, expected[at..at + 70_000], "pread at {at}");
                assert_eq!(mapped[at..at + 5000], expected[at..at + 5000], "mapped at {at}");
                File::open(&served).unwrap().read_exact_at(&mut buffer[..10], at as u64).unwrap();
                assert_eq!(buffer[..10], expected[at..at + 10], "reopened at {at}");
                assert_eq!(fs::metadata(&served).unwrap().size(), expected.len() as u64);
                assert!(fs::read_dir(served.parent().unwrap()).unwrap().count() >= 2);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, rounds, thread }
    }

    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until("the reader goes on", LIMIT, || {
            self.thread.is_finished() || self.rounds.load(Ordering::Relaxed) > before + 1
        });
        assert!(!self.thread.is_finished(), "the reader has failed");
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// A kept daemon with a checkpoint `k` that the jobs `one` and `two` see.
fn kept(env: &[(&'static str, &str)]) -> (Daemon, PathBuf, [PathBuf; 2]) {
    let daemon = Daemon::start_kept(env);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 24 * MIB);
    fs::write(source.join("small"), "small").unwrap();
    daemon.capture("k", &source);
    let targets = [daemon.attach("one", "k"), daemon.attach("two", "k")];
    (daemon, source, targets)
}

fn kill_and_wait(daemon: &Daemon, signal: Signal) -> Pid {
    let before = daemon.server();
    kill(before, signal).unwrap();
    daemon.successor(before)
}

fn mount_lines(at: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(at.to_str().unwrap())).map(str::to_owned).collect()
}

fn has_event(daemon: &Daemon, kind: &str, words: &str) -> bool {
    let events = daemon.ctl(&["events"]).ok().stdout;
    events.lines().any(|line| line.contains(kind) && line.contains(words))
}

fn readers_go_on(env: &[(&'static str, &str)], how: &str) {
    let (daemon, source, targets) = kept(env);
    let before = (daemon.json(&["jobs"]), mount_lines(daemon.place().path()));
    let readers = targets.each_ref().map(|at| Reader::of(at.join("w.bin"), source.join("w.bin")));
    readers.iter().for_each(Reader::goes_on);
    for _ in 0..KILLS {
        kill_and_wait(&daemon, Signal::SIGKILL);
        readers.iter().for_each(Reader::goes_on);
    }
    assert_eq!((daemon.json(&["jobs"]), mount_lines(daemon.place().path())), before);
    let status = daemon.json(&["status"]);
    assert_eq!((status["holder"].as_str(), status["restarts"].as_u64()), (Some("keeper"), Some(KILLS.into())), "{how}");
    readers.into_iter().for_each(Reader::end);
    assert!(has_event(&daemon, "DAEMON_RESTARTED", "SIGKILL"));
    assert!(has_event(&daemon, "RECONCILED", "1 sessions went on; 2 views were left as they were"));
    assert!(!has_event(&daemon, "ATTACHMENT_", ""));
    for (job, at) in ["one", "two"].iter().zip(&targets) {
        assert_same_tree(&source, at);
        daemon.ctl(&["detach", job]).ok();
        assert!(mounts_at(at).is_empty());
    }
    assert_eq!(daemon.json(&["status"])["sessions"], 0);
    wait_until("nothing of the session is left", LIMIT, || {
        fs::read_dir(daemon.place().join("run/ledgers")).unwrap().count() == 0
    });
}

/// A runtime directory without room: what a successor would have to know of an open file cannot be noted.
#[test]
fn what_cannot_be_noted_is_read_by_the_daemon_and_by_its_successor() {
    // More than the slots that a ledger has from the beginning.
    const FILES: usize = 1200;
    let daemon = Daemon::start_kept(&[]);
    let source = daemon.place().dir("source");
    for file in 0..FILES {
        fs::write(source.join(format!("f{file:04}")), format!("{file} ").repeat(2000)).unwrap();
    }
    daemon.capture("k", &source);
    let ledgers = daemon.place().join("run/ledgers");
    shell("mount -t tmpfs -o size=64k tmpfs \"$1\"", &[&ledgers]).ok();
    let at = daemon.attach("job", "k");
    let (first, last) = (at.join("f0000"), at.join(format!("f{:04}", FILES - 1)));
    let offered = xattr(&first, "user.ckptd.state");
    let mut full = File::create(ledgers.join("full")).unwrap();
    fs::remove_file(ledgers.join("full")).unwrap();
    while full.write_all(&[0; 4096]).is_ok() {}

    let held = [&first, &last].map(|path| File::open(path).unwrap());
    assert_eq!(xattr(&first, "user.ckptd.state"), offered, "there is room for the first");
    assert_eq!(xattr(&last, "user.ckptd.state"), "daemon");
    assert_same_tree(&source, &at);
    kill_and_wait(&daemon, Signal::SIGKILL);
    // An open in another mode than that of whoever has it open would be an error.
    assert_same_tree(&source, &at);
    drop(full);
    assert_same_tree(&source, &at);
    for (open, path) in held.iter().zip([&first, &last]) {
        let expected = fs::read(source.join(path.file_name().unwrap())).unwrap();
        let mut found = vec![0; expected.len()];
        open.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "{}", path.display());
    }
    drop(held);
    daemon.ctl(&["detach", "job"]).ok();
}

#[test]
fn readers_of_what_the_kernel_reads_itself_see_nothing_of_a_kill() {
    readers_go_on(&[], "passthrough");
}

#[test]
fn readers_of_what_the_daemon_reads_see_nothing_of_a_kill() {
    readers_go_on(&[NO_PASSTHROUGH], "daemon");
}

#[test]
fn a_read_in_the_daemon_s_hands_is_answered_by_its_successor() {
    let (daemon, source, [at, _]) = kept(&[NO_PASSTHROUGH]);
    let server = daemon.server();
    // A daemon that takes nothing any more: what is asked of it now is answered by another.
    kill(server, Signal::SIGSTOP).unwrap();
    let (say, said) = mpsc::channel();
    let path = at.join("w.bin");
    thread::spawn(move || say.send(fs::read(path)).unwrap());
    assert!(said.recv_timeout(Duration::from_millis(300)).is_err(), "nobody answers a stopped daemon's readers");
    kill(server, Signal::SIGKILL).unwrap();
    let read = said.recv_timeout(LIMIT).expect("the successor answers").unwrap();
    assert_eq!(read, fs::read(source.join("w.bin")).unwrap());
}

#[test]
fn a_restart_that_is_asked_for_and_a_hang_are_not_seen() {
    let (daemon, source, [at, _]) = kept(&[("CKPTD_KEEPER_WATCHDOG_MS", "10000")]);
    let reader = Reader::of(at.join("w.bin"), source.join("w.bin"));
    reader.goes_on();
    let before = daemon.server();
    kill(Pid::from_raw(i32::try_from(daemon.pid()).unwrap()), Signal::SIGHUP).unwrap();
    daemon.successor(before);
    reader.goes_on();
    assert!(has_event(&daemon, "DAEMON_RESTARTED", "a restart was asked for"));
    kill_and_wait(&daemon, Signal::SIGSTOP);
    reader.goes_on();
    assert!(has_event(&daemon, "DAEMON_RESTARTED", "no sign of life"));
    reader.end();
}

#[test]
fn a_session_whose_threads_fail_is_answered_by_a_successor() {
    let (daemon, source, targets) = kept(&[NO_PASSTHROUGH]);
    let readers = targets.each_ref().map(|at| Reader::of(at.join("w.bin"), source.join("w.bin")));
    readers.iter().for_each(Reader::goes_on);
    let before = daemon.server();
    // Each of them gets EIO for what it asks the kernel for next.
    let mut spoiling = Command::new("strace");
    spoiling.args(["-f", "-o", "/dev/null", "-P", "/dev/fuse", "-e", "trace=read", "-e", "inject=read:error=EIO"]);
    let mut spoiler = spoiling.arg("-p").arg(before.to_string()).stderr(Stdio::null()).spawn().unwrap();
    daemon.successor(before);
    assert_eq!(wait_for(&mut spoiler, LIMIT), Some(0), "it ends with whom it spoils");
    readers.iter().for_each(Reader::goes_on);
    readers.into_iter().for_each(Reader::end);
    wait_until("it is told", LIMIT, || has_event(&daemon, "DAEMON_RESTARTED", "SIGABRT"));
}

#[test]
fn a_ledger_of_a_newer_version_stops_the_start_and_touches_nothing() {
    let (daemon, _, [at, _]) = kept(&[]);
    let before = mount_lines(daemon.place().path());
    let held = File::open(at.join("w.bin")).unwrap();
    let ledgers = daemon.place().join("run/ledgers");
    let ledger = fs::read_dir(ledgers).unwrap().next().unwrap().unwrap().path();
    let file = File::options().write(true).open(&ledger).unwrap();
    file.write_all_at(&9_u32.to_le_bytes(), 16).unwrap();
    let server = daemon.server();
    kill(server, Signal::SIGKILL).unwrap();
    wait_until("three starts were refused", LIMIT, || daemon.stderr().matches("left by a newer ckptd").count() >= 3);
    assert_eq!(mount_lines(daemon.place().path()), before);
    held.read_exact_at(&mut [0; 100], MIB).unwrap();
    file.write_all_at(&1_u32.to_le_bytes(), 16).unwrap();
    daemon.successor(server);
    assert_eq!(mount_lines(daemon.place().path()), before);
    assert!(has_event(&daemon, "DAEMON_RESTARTED", "in a row at its start"));
}

#[test]
fn a_catalog_of_a_newer_version_stops_the_start_and_touches_nothing() {
    let (daemon, source, [at, _]) = kept(&[]);
    let before = mount_lines(daemon.place().path());
    let held = File::open(at.join("w.bin")).unwrap();
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    let version: i64 = catalog.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    let set = |version: i64| catalog.pragma_update(None, "user_version", version).unwrap();
    set(version + 1);
    let server = daemon.server();
    kill(server, Signal::SIGKILL).unwrap();
    let words = format!("the catalog is of version {}", version + 1);
    wait_until("three starts were refused", LIMIT, || daemon.stderr().matches(&words).count() >= 3);
    assert_eq!(mount_lines(daemon.place().path()), before);
    held.read_exact_at(&mut [0; 100], MIB).unwrap();
    set(version);
    daemon.successor(server);
    assert_eq!(mount_lines(daemon.place().path()), before);
    assert_same_tree(&source, &at);
}

#[test]
fn a_damaged_ledger_costs_the_views_of_its_own_session_and_foreign_mounts_are_left_alone() {
    let (daemon, source, [at, _]) = kept(&[]);
    let (other, foreign) = (daemon.place().dir("other"), daemon.place().dir("run/foreign"));
    fs::write(other.join("small"), "of the other").unwrap();
    let id = daemon.capture("other", &other)["id"].as_str().unwrap().to_owned();
    let third = daemon.attach("three", "other");
    nix::mount::mount(Some("none"), &foreign, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    let before = (mount_lines(&at), mount_lines(&foreign));
    let mut ledgers = fs::read_dir(daemon.place().join("run/ledgers")).unwrap().map(|entry| entry.unwrap().path());
    let tells_of_it = |path: &PathBuf| fs::read(path).unwrap().windows(id.len()).any(|part| part == id.as_bytes());
    let ledger = ledgers.find(tells_of_it).expect("the session has a ledger");
    let byte = [fs::read(&ledger).unwrap()[100] ^ 1];
    File::options().write(true).open(&ledger).unwrap().write_all_at(&byte, 100).unwrap();
    kill_and_wait(&daemon, Signal::SIGKILL);
    let words = "1 sessions went on; 2 views were left as they were, 1 made again, 0 lost; 1 descriptors";
    assert!(has_event(&daemon, "RECONCILED", words), "{}", daemon.ctl(&["events"]).ok().stdout);
    assert!(daemon.json(&["status"])["reconciled"].as_str().unwrap().contains(words));
    assert!(has_event(&daemon, "ATTACHMENT_REPLACED", "three"));
    assert_eq!((mount_lines(&at), mount_lines(&foreign)), before);
    assert_same_tree(&source, &at);
    assert_same_tree(&other, &third);
}

#[test]
fn a_file_that_a_released_job_has_open_stays_right_over_starts_though_its_checkpoint_is_gone() {
    let daemon = Daemon::start_kept(&[]);
    let base = Tensors::new(seed(), 4, 4 << 20);
    let [of_x, of_y] = ["x", "y"].map(|name| daemon.place().dir(name).join("model.safetensors"));
    base.write_safetensors(&of_x);
    base.fine_tuned(1).write_safetensors(&of_y);
    for (name, file) in [("x", &of_x), ("y", &of_y)] {
        daemon.capture(name, file.parent().unwrap());
    }
    let file = daemon.attach("job", "x").join("model.safetensors");
    assert_eq!(xattr(&file, "user.ckptd.state"), "passthrough");
    let (open, expected) = (File::open(&file).unwrap(), fs::read(&of_x).unwrap());
    daemon.ctl(&["release", "job"]).ok();
    daemon.ctl(&["remove", "x", "--yes"]).ok();
    let fill = daemon.place().dir("fill");
    for round in 0..2 {
        kill_and_wait(&daemon, Signal::SIGKILL);
        // Removals take turns with what a start sweeps, which is done when a few have come and gone.
        for number in 0..3 {
            fs::write(fill.join("w.bin"), format!("{round} {number}")).unwrap();
            daemon.capture("fill", &fill);
            daemon.ctl(&["remove", "fill", "--yes"]).ok();
        }
        let mut now = vec![0; expected.len()];
        open.read_exact_at(&mut now, 0).unwrap();
        assert!(now == expected, "start {round} punched what the job reads");
    }
    assert_same_tree(of_y.parent().unwrap(), &daemon.attach("other", "y"));
    assert!(daemon.stderr().contains("until the host boots"));
}

/// The kernel itself ends the daemon, in the middle of an ingest, with locks held and threads in system calls.
#[test]
fn readers_see_nothing_of_a_kill_for_want_of_memory() {
    let (daemon, source, targets) = kept(&[]);
    let readers = targets.each_ref().map(|at| Reader::of(at.join("w.bin"), source.join("w.bin")));
    let jobs = daemon.json(&["jobs"]);
    let more = daemon.place().dir("more");
    random_file(&more.join("w.bin"), seed() + 1, 64 * MIB);
    for round in 1..=3 {
        let group = ShortOfMemory::new();
        let before = daemon.server();
        group.take(before);
        // Nothing need come of it: it may be this call that takes the last page.
        let name = format!("m{round}");
        daemon.ctl(&["capture", "maker", "--from", more.to_str().unwrap(), "--name", &name]);
        daemon.successor(before);
        assert_eq!(group.killed(), 1, "{}", daemon.stderr_tail());
        readers.iter().for_each(Reader::goes_on);
    }
    readers.into_iter().for_each(Reader::end);
    assert_eq!(daemon.json(&["jobs"]), jobs);
    assert!(has_event(&daemon, "DAEMON_RESTARTED", "SIGKILL"));
    // What could be begun goes on and is whole.
    daemon.capture("last", &more);
    assert_same_tree(&more, &daemon.attach("three", "last"));
}

/// Who is to be killed for memory last.
#[test]
fn a_keeper_and_its_daemon_are_the_last_to_be_killed_for_memory() {
    let (daemon, _, _) = kept(&[]);
    let score = |pid: String| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    let refused = daemon.stderr().contains("its oom_score_adj stays as it is");
    assert_eq!(refused, !has_capability(CAP_SYS_RESOURCE), "{}", daemon.stderr_tail());
    let expected = if refused { score("self".to_owned()) } else { "-900".to_owned() };
    let successor = kill_and_wait(&daemon, Signal::SIGKILL);
    let found = [daemon.pid().to_string(), successor.to_string()].map(score);
    assert_eq!(found, [expected.clone(), expected]);
}

/// Without it, nobody makes himself a lesser victim: `linux/capability.h`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

fn has_capability(capability: u64) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap() & capability != 0
}

#[test]
fn a_keeper_ends_with_its_daemon() {
    let (mut daemon, _, _) = kept(&[]);
    let server = daemon.server();
    daemon.stop();
    assert!(kill(server, None).is_err(), "the daemon is still there");
}

#[test]
fn without_a_holder_views_are_made_again_and_it_is_said() {
    let mut daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), MIB);
    daemon.capture("k", &source);
    let at = daemon.attach("one", "k");
    daemon.kill9();
    daemon.restart();
    assert_same_tree(&source, &at);
    assert_eq!(daemon.json(&["status"])["holder"], "none");
    assert!(has_event(&daemon, "ATTACHMENT_REPLACED", "one"));
}

#[test]
fn a_view_that_cannot_be_made_again_is_said_to_be_lost() {
    let mut daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), MIB);
    daemon.capture("k", &source);
    let (gone, stays) = (daemon.attach("one", "k"), daemon.attach("two", "k"));
    daemon.kill9();
    nix::mount::umount2(&gone, nix::mount::MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir(&gone).unwrap();
    fs::write(&gone, "a file where the directory was").unwrap();
    daemon.restart();
    assert!(has_event(&daemon, "ATTACHMENT_LOST", "one"));
    assert!(!has_event(&daemon, "ATTACHMENT_LOST", "two"));
    assert_same_tree(&source, &stays);
}

#[test]
fn without_resend_what_a_dead_daemon_had_taken_ends_with_it() {
    let daemon = Daemon::start_kept(&[LOOPBACK, ("CKPTD_SERVE__RESEND", r#""never""#)]);
    assert_eq!(daemon.json(&["status"])["features"]["resend"], false);
    let site = Site::open();
    site.limit(MIB / 4);
    let bytes = Arc::new(Random::new(seed()).bytes(64 << 20));
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    let target = daemon.place().dir("at");
    daemon.ctl(&["attach", "job", "w", "--lazy", "--at", target.to_str().unwrap()]).ok();
    let file = target.join("w.bin");
    let waiting = waiting_requests(daemon.place(), &file);
    let read = |flags: i32, at: usize| {
        let (say, said) = mpsc::channel();
        let (path, bytes) = (file.clone(), bytes.clone());
        thread::spawn(move || {
            let open = File::options().read(true).custom_flags(flags).open(path).unwrap();
            let mut found = vec![0; 8192];
            let start = found.as_ptr().align_offset(4096);
            let read = open.read_exact_at(&mut found[start..start + 4096], at as u64);
            let same = found[start..start + 4096] == bytes[at..at + 4096];
            say.send(read.map(|()| same).map_err(|error| error.raw_os_error())).unwrap();
        });
        said
    };
    let (direct, cached) = (read(nix::libc::O_DIRECT, 50 << 20), read(0, 40 << 20));
    wait_until("both are in the daemon's hands", LIMIT, || waiting() >= 2);
    let server = daemon.server();
    let keeper = Still::of(Pid::from_raw(i32::try_from(daemon.pid()).unwrap()));
    kill(server, Signal::SIGKILL).unwrap();
    // There is no successor yet that could answer.
    let ended = direct.recv_timeout(LIMIT).expect("the read ends with the daemon");
    assert_eq!(ended, Err(Some(nix::libc::ECONNABORTED)));
    drop(keeper);
    daemon.successor(server);
    site.limit(0);
    assert_eq!(cached.recv_timeout(LIMIT).expect("the kernel asked again"), Ok(true));
    daemon.wait_state("w", "ready", LIMIT);
    assert!(fs::read(&file).unwrap() == *bytes);
    assert!(!has_event(&daemon, "ATTACHMENT_", ""));
}

#[test]
fn an_upload_that_is_under_way_is_kept_when_the_daemon_is_drained_and_goes_on_with_the_next() {
    let (daemon, _, _) = kept(&[]);
    let source = daemon.place().dir("large");
    File::create(source.join("w.bin")).unwrap().set_len(2 << 30).unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(|| run(daemon.ctl_command().args(["upload", "large"]).arg(&source)));
        let mut came = 0;
        wait_until("it is under way", LIMIT, || {
            assert!(!sending.is_finished(), "{:?}", daemon.stderr_tail());
            let rows = daemon.rows("list");
            let row = rows.iter().find(|row| row["name"] == "large");
            came = row.and_then(|row| row["fill"]["bytes_done"].as_u64()).unwrap_or(0);
            came > 30 * MIB
        });
        daemon.ctl(&["drain"]).ok();
        let recorded = daemon.recorded_bytes("large");
        assert!(recorded + 4 * MIB > came && recorded < 2 << 30, "{recorded} bytes are recorded, {came} had come");
        daemon.ctl(&["upload", "large", source.to_str().unwrap()]).refused(&[7], &["drained"]);
        assert_eq!(daemon.json(&["get", "large"])["state"], "filling");
        kill_and_wait(&daemon, Signal::SIGKILL);
        let ran = sending.join().unwrap().ok();
        for words in ["receiving an upload", "drained", "going on with the upload"] {
            assert!(ran.stderr.contains(words), "`{words}` expected\n{ran}");
        }
        assert!(!ran.stderr.contains("sent again"), "{ran}");
    });
    assert_eq!(daemon.json(&["get", "large"])["state"], "ready");
}

#[test]
fn what_is_fetched_when_the_daemon_is_drained_pauses_and_goes_on_with_the_next() {
    let daemon = Daemon::start_kept(&[LOOPBACK]);
    let site = Site::open();
    site.limit(8 * MIB);
    let bytes = Arc::new(Random::new(seed()).bytes(120 << 20));
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    wait_until("more than half is here", LIMIT, || daemon.bytes_done("w") > 64 * MIB);
    daemon.ctl(&["drain"]).ok();
    // What was in the pipes then is counted when the pipes break.
    wait_until("the source is left alone", LIMIT, || {
        site.take_sent();
        thread::sleep(Duration::from_millis(300));
        site.take_sent() == 0
    });
    assert_eq!(daemon.json(&["get", "w"])["state"], "filling");
    site.limit(0);
    kill_and_wait(&daemon, Signal::SIGKILL);
    daemon.wait_state("w", "ready", LIMIT);
    let again = site.take_sent();
    // What was begun is begun again: a unit of each stream.
    assert!(again < 96 * MIB, "{again} of 120 MiB were sent after 64 MiB were here");
    assert!(fs::read(daemon.attach("job", "w").join("w.bin")).unwrap() == *bytes);
}

#[test]
fn a_drained_daemon_takes_no_work_and_keeps_what_is_mounted() {
    let (daemon, source, [at, _]) = kept(&[]);
    daemon.ctl(&["drain"]).ok();
    assert_eq!(daemon.json(&["status"])["draining"], true);
    let target = daemon.place().dir("new");
    daemon.attach_at("three", &["k"], &target).refused(&[7], &["takes no new work"]);
    daemon.ctl(&["create", "x", "--type", "web", "--uri", "https://example.invalid/x"]).refused(&[7], &["drained"]);
    for verb in [vec!["reserve", "four", "k"], vec!["prefetch", "k"], vec!["retry", "k"]] {
        daemon.ctl(&verb).refused(&[7], &["takes no new work", "restarted"]);
    }
    assert_same_tree(&source, &at);
    kill_and_wait(&daemon, Signal::SIGKILL);
    assert_eq!(daemon.json(&["status"])["draining"], false);
    daemon.attach_at("three", &["k"], &target).ok();
}
