//! A job that does not wait: what it reads is right, what is missing comes first, and what cannot come fails alone.

#![cfg(test)]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use support::corpus::{Random, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::faults::{Fault, Faults};
use support::files::{b3sum, xattr};
use support::place::mounts_at;
use support::ran::{run, wait_until};
use support::site::{Page, Site};
use support::waiting::waiting_requests;
use support::way::Way;

const MIB: u64 = 1 << 20;
const UNIT: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(180);

/// Rate at which a listing comes at once and a unit takes minutes, and yet no stream is silent for so long that it is given up.
const HELD: u64 = 16 << 10;

/// Streams of one flight while nobody waits for a unit.
const STREAMS_WHILE_READ: u64 = 4;

/// What a source gives, and a daemon that may ask it.
struct Scene {
    daemon: Daemon,
    site: Site,
    bytes: Arc<Vec<u8>>,
}

impl Scene {
    /// A file of `mib` MiB at `/w.bin`, given at `rate` bytes a second.
    fn new(mib: usize, rate: u64) -> Self {
        Self::with(mib, rate, &[LOOPBACK])
    }

    fn with(mib: usize, rate: u64, env: &[(&'static str, &str)]) -> Self {
        let daemon = Daemon::start_with(env);
        let site = Site::open();
        site.limit(rate);
        let bytes = Arc::new(Random::new(seed()).bytes((mib << 20) - 7));
        Self { daemon, site, bytes }
    }

    fn put(&self, page: impl FnOnce(Arc<Vec<u8>>) -> Page) -> String {
        self.site.put("/w.bin", page(Arc::clone(&self.bytes)))
    }

    fn create(&self, url: &str) {
        self.daemon.ctl(&["create", "w", "--type", "web", "--uri", url]).ok();
    }

    /// Waits until it is known what there will be of a checkpoint.
    fn wait_listed(&self, checkpoint: &str) {
        wait_until("the listing is known", LIMIT, || {
            self.daemon.json(&["get", checkpoint])["fill"]["bytes_total"].as_u64() > Some(0)
        });
    }

    /// Creates and attaches for `job` without waiting; where the file is seen.
    fn attach(&self, job: &str) -> PathBuf {
        let target = self.daemon.place().dir(&format!("at-{job}"));
        run(self.daemon.ctl_command().args(["attach", job, "w", "--lazy", "--at"]).arg(&target)).ok();
        target.join("w.bin")
    }

    fn assert_read(&self, file: &Path, offset: u64, length: usize) {
        let mut found = vec![0; length];
        File::open(file).unwrap().read_exact_at(&mut found, offset).unwrap();
        let from = usize::try_from(offset).unwrap();
        assert!(found == self.bytes[from..from + length], "{length} bytes at {offset} differ");
    }

    fn digest(&self) -> String {
        blake3::hash(&self.bytes).to_hex().to_string()
    }
}

#[test]
fn the_end_of_a_file_is_read_long_before_its_middle_is_here() {
    let scene = Scene::new(200, HELD);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    scene.site.limit(8 * MIB);
    scene.assert_read(&file, 199 * MIB, 1000);
    scene.assert_read(&file, 100 * MIB - 9, 20);
    let done = scene.daemon.bytes_done("w");
    assert!(done < 100 * MIB, "{done} bytes had to come first");
    assert!(xattr(&file, "user.ckptd.state").starts_with("filling "));
    assert_eq!(file.metadata().unwrap().len(), scene.bytes.len() as u64);
    let early = File::open(&file).unwrap();
    scene.site.limit(0);
    scene.daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(b3sum(&file), scene.digest());
    drop(early);
    wait_until("the kernel reads the file itself", LIMIT, || xattr(&file, "user.ckptd.state") == "passthrough");
    assert_eq!(xattr(&file, "user.ckptd.digest"), scene.digest());
    assert_eq!(scene.daemon.json(&["jobs"])["jobs"][0]["checkpoints"][0]["digest"].as_str().unwrap().len(), 64);
    assert!(scene.site.take_sent() < scene.bytes.len() as u64 + 64 * MIB, "units came more than once");
}

#[test]
fn many_jobs_that_start_together_cost_the_source_one() {
    const JOBS: usize = 16;
    let scene = Scene::new(64, HELD);
    scene.site.narrow();
    let url = scene.put(Page::Ranged);
    scene.create(&url);
    let attached = AtomicUsize::new(0);
    thread::scope(|scope| {
        let _lifted = Lifted(&scene.site, 48 * MIB);
        for job in 0..JOBS {
            let (scene, attached) = (&scene, &attached);
            scope.spawn(move || {
                let file = scene.attach(&format!("job-{job}"));
                attached.fetch_add(1, Ordering::Relaxed);
                assert_eq!(b3sum(&file), scene.digest());
            });
        }
        wait_until("all are attached", LIMIT, || attached.load(Ordering::Relaxed) == JOBS);
    });
    let sent = scene.site.take_sent();
    // A stream that was begun before anybody read ends early once somebody does: what was in its socket by then is lost.
    let in_sockets = STREAMS_WHILE_READ * MIB;
    assert!(sent <= scene.bytes.len() as u64 * 101 / 100 + in_sockets, "{sent} bytes were sent");
}

#[test]
fn a_source_without_ranges_is_waited_for_and_the_answer_says_so() {
    let scene = Scene::new(24, HELD);
    scene.create(&scene.put(Page::Whole));
    scene.wait_listed("w");
    let target = scene.daemon.place().dir("at");
    let way = Way::to(&scene.daemon, &[]);
    let client = way.spawn(&["attach", "job", "w", "--lazy", "--at", target.to_str().unwrap()]);
    wait_until("it says that it waits", LIMIT, || client.stderr().contains("a source that cannot be read before"));
    scene.site.limit(0);
    let ran = client.ended().ok();
    assert!(
        ran.stderr.contains("waited until all bytes were here") && ran.stderr.contains("no ranges"),
        "{}",
        ran.stderr
    );
    assert_eq!(scene.daemon.json(&["get", "w"])["state"], "ready");
    assert_eq!(b3sum(&target.join("w.bin")), scene.digest());
}

#[test]
fn a_failure_for_good_costs_the_missing_bytes_alone_and_retry_heals_in_place() {
    let scene = Scene::with(96, HELD, &[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "1")]);
    let url = scene.put(Page::Ranged);
    scene.create(&url);
    let file = scene.attach("job");
    scene.site.limit(16 * MIB);
    scene.assert_read(&file, 0, 1000);
    let open = File::open(&file).unwrap();
    scene.site.put("/w.bin", Page::Status(403));
    let mut byte = [0];
    let missing = (0..24).rev().map(|unit| unit * UNIT).find(|at| open.read_exact_at(&mut byte, *at).is_err());
    let missing = missing.expect("some unit never came");
    wait_until("the record says so", LIMIT, || scene.daemon.json(&["get", "w"])["state"] == "failed");
    let error = open.read_exact_at(&mut byte, missing + 5).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
    scene.assert_read(&file, 1000, 5000);
    let before = mounts_at(file.parent().unwrap());
    scene.put(Page::Ranged);
    scene.site.limit(0);
    scene.daemon.ctl(&["retry", "w"]).ok();
    scene.daemon.wait_state("w", "ready", LIMIT);
    open.read_exact_at(&mut byte, missing + 5).unwrap();
    assert_eq!(b3sum(&file), scene.digest());
    let after = mounts_at(file.parent().unwrap());
    assert_eq!(format!("{before:?}"), format!("{after:?}"), "something was mounted anew");
}

#[test]
fn what_jobs_were_shown_is_not_replaced_under_them() {
    // More than the ranges that are under way at once: some are asked for after the change.
    let scene = Scene::with(160, HELD, &[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "1")]);
    let url = scene.put(Page::Ranged);
    scene.create(&url);
    let file = scene.attach("job");
    scene.site.limit(16 * MIB);
    scene.assert_read(&file, 0, 4096);
    let other = Arc::new(Random::new(seed() + 1).bytes(scene.bytes.len()));
    scene.site.put("/w.bin", Page::Ranged(other));
    wait_until("the change is noticed", LIMIT, || scene.daemon.json(&["get", "w"])["state"] == "failed");
    scene.daemon.ctl(&["retry", "w"]);
    wait_until("the change is noticed again", LIMIT, || {
        scene.daemon.json(&["get", "w"])["error"]["reason"] == "SOURCE_CHANGED"
    });
    scene.assert_read(&file, 0, 4096);
    let mut found = vec![0; 64 << 10];
    let open = File::open(&file).unwrap();
    for at in (0..scene.bytes.len() as u64 - 64 * 1024).step_by(64 << 10) {
        if open.read_exact_at(&mut found, at).is_ok() {
            let from = usize::try_from(at).unwrap();
            assert!(found == scene.bytes[from..from + found.len()], "bytes of another revision at {at}");
        }
    }
    drop(open);
    scene.daemon.ctl(&["release", "job"]).ok();
    scene.site.limit(0);
    wait_until("nothing of it is open, and the new is taken", LIMIT, || {
        scene.daemon.ctl(&["retry", "w"]).ok();
        scene.daemon.json(&["get", "w"])["state"] == "ready"
    });
}

#[test]
fn readers_that_are_killed_while_they_wait_go_away_at_once() {
    // Only a kill ends a reader.
    let scene = Scene::new(64, HELD);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    let read = |flags: &str, skip: u64| -> Child {
        let path = file.display();
        Command::new("dd")
            .args([&format!("if={path}"), "of=/dev/null", "bs=4096", "count=1", &format!("skip={skip}")])
            .args(flags.split_whitespace())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut readers = [read("", 15_000), read("", 9_000), read("iflag=nonblock", 12_000)];
    for reader in &mut readers {
        let stack = format!("/proc/{}/wchan", reader.id());
        wait_until("the reader waits", LIMIT, || {
            std::fs::read_to_string(&stack).is_ok_and(|place| place.contains("folio") || place.contains("fuse"))
        });
        reader.kill().unwrap();
        wait_until("the killed reader is gone", Duration::from_secs(5), || reader.try_wait().unwrap().is_some());
    }
    scene.site.limit(0);
    assert_eq!(b3sum(&file), scene.digest());
}

#[test]
fn a_killed_reader_past_the_page_cache_is_let_go_and_the_others_wait_on() {
    let scene = Scene::new(64, HELD);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    let waiting = waiting_requests(scene.daemon.place(), &file);
    let dd = |skip: u64| {
        let args = ["iflag=direct", "of=/dev/null", "bs=2M", "count=1", &format!("skip={skip}")];
        Command::new("dd").arg(format!("if={}", file.display())).args(args).stderr(Stdio::null()).spawn().unwrap()
    };
    let (living, bytes) = (file.clone(), scene.bytes.clone());
    let survivor = thread::spawn(move || {
        let open = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(living).unwrap();
        let mut found = vec![0; 8192];
        let start = found.as_ptr().align_offset(4096);
        open.read_exact_at(&mut found[start..start + 4096], 62 * MIB).unwrap();
        assert!(found[start..start + 4096] == bytes[62 << 20..(62 << 20) + 4096]);
    });
    let mut killed: Vec<Child> = [20, 25, 31].into_iter().map(dd).collect();
    wait_until("all wait", LIMIT, || waiting() == 7);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(waiting(), 7, "who lives is not touched");
    killed.iter_mut().for_each(|reader| reader.kill().unwrap());
    wait_until("the killed readers are gone", Duration::from_secs(10), || {
        killed.iter_mut().all(|reader| reader.try_wait().unwrap().is_some())
    });
    wait_until("nothing of them is left in the kernel", LIMIT, || waiting() == 1);
    assert!(!survivor.is_finished());
    scene.site.limit(0);
    survivor.join().unwrap();
    assert_eq!(b3sum(&file), scene.digest());
    let watchers = || threads_named(scene.daemon.pid(), "ckptd-waits");
    wait_until("nobody watches where nothing waits", LIMIT, || watchers() == 0);
}

fn threads_named(pid: u32, name: &str) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks.filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|is| is.trim() == name)).count()
}

#[test]
fn ten_thousand_waiting_reads_cost_little_and_all_are_answered() {
    const READS: usize = 10_000;
    let scene = Scene::new(128, HELD);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    let waiting = waiting_requests(scene.daemon.place(), &file);
    let before = resident(scene.daemon.pid());
    let right = AtomicUsize::new(0);
    let open = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&file).unwrap();
    thread::scope(|scope| {
        let _lifted = Lifted(&scene.site, 0);
        for read in 0..READS {
            let (open, right, bytes) = (&open, &right, &scene.bytes);
            let one = move || {
                let at = usize::try_from(64 * MIB).unwrap() + (read * 6151 % 16_000) * 4096;
                let mut found = vec![0; 8192];
                let start = found.as_ptr().align_offset(4096);
                open.read_exact_at(&mut found[start..start + 4096], at as u64).unwrap();
                right.fetch_add(usize::from(found[start..start + 4096] == bytes[at..at + 4096]), Ordering::Relaxed);
            };
            thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, one).unwrap();
        }
        wait_until("all wait", LIMIT, || waiting() >= READS);
        let after = resident(scene.daemon.pid());
        assert!(after < before + 64 * MIB, "the daemon grew from {before} to {after} bytes");
        scene.daemon.json(&["status"]);
    });
    assert_eq!(right.load(Ordering::Relaxed), READS);
}

#[test]
fn what_is_here_is_read_at_once_however_many_reads_wait() {
    const READS: usize = 100;
    let scene = Scene::new(96, 4 * MIB);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    scene.assert_read(&file, 0, 10);
    // Of the last units none is here, and one would take minutes from now on.
    scene.site.limit(MIB / 32);
    let open = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&file).unwrap();
    let waiting = waiting_requests(scene.daemon.place(), &file);
    let (open, bytes) = (Arc::new(open), &scene.bytes);
    let read = |open: &File, at: u64| {
        let mut found = vec![0; 8192];
        let start = found.as_ptr().align_offset(4096);
        open.read_exact_at(&mut found[start..start + 4096], at).unwrap();
        let from = usize::try_from(at).unwrap();
        assert!(found[start..start + 4096] == bytes[from..from + 4096], "wrong bytes at {at}");
    };
    thread::scope(|scope| {
        let _lifted = Lifted(&scene.site, 0);
        for number in 0..READS as u64 {
            let (open, read) = (open.clone(), &read);
            // In four units, half a minute behind where each begins: its first bytes are read as soon as they are here.
            scope.spawn(move || read(&open, 81 * MIB + number / 25 * 4 * MIB + number % 25 * (64 << 10)));
        }
        wait_until("all wait", LIMIT, || waiting() >= READS);
        // Past the page cache, and through it: nobody has read these before.
        read(&open, 3 * MIB);
        scene.assert_read(&file, 2 * MIB, 1000);
        assert!(waiting() >= READS, "those who waited were answered first");
    });
}

/// Gives the source another limit at its end, so that a test which fails does not wait for those who wait for it.
struct Lifted<'a>(&'a Site, u64);

impl Drop for Lifted<'_> {
    fn drop(&mut self) {
        self.0.limit(self.1);
    }
}

#[test]
fn a_killed_daemon_shows_the_same_again_and_goes_on() {
    let mut scene = Scene::new(96, 16 * MIB);
    scene.site.narrow();
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    scene.assert_read(&file, 60 * MIB, 1000);
    wait_until("units are durable", LIMIT, || scene.daemon.recorded_bytes("w") > 32 * MIB);
    scene.daemon.kill9();
    scene.site.limit(HELD);
    scene.site.take_sent();
    scene.daemon.restart();
    let waiting = waiting_requests(scene.daemon.place(), &file);
    thread::scope(|scope| {
        let _lifted = Lifted(&scene.site, 0);
        let reader = scope.spawn(|| scene.assert_read(&file, 95 * MIB, 1000));
        // It need not where the daemon was killed late.
        wait_until("the reader waits", LIMIT, || waiting() > 0 || reader.is_finished());
    });
    scene.daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(b3sum(&file), scene.digest());
    assert!(scene.site.take_sent() < 80 * MIB, "what was durable came again");
}

#[test]
fn a_faltering_network_delays_readers_and_harms_none() {
    let scene = Scene::new(96, 64 * MIB);
    let url = scene.put(Page::Ranged);
    let port = url.rsplit(':').next().unwrap().split('/').next().unwrap().parse().unwrap();
    let proxy = Faults::before(port);
    scene.create(&proxy.url("/w.bin"));
    let file = scene.attach("job");
    let mut random = Random::new(seed());
    for read in 0..60 {
        let fault = match read {
            0 => Fault::Reset(MIB),
            10 => Fault::Truncate(3 * MIB),
            20 => Fault::Status(503, ""),
            30 => Fault::Status(429, "Retry-After: 1"),
            40 => Fault::Reset(10),
            _ => Fault::Truncate(u64::MAX),
        };
        if read % 10 == 0 {
            proxy.spoil("GET /w.bin", fault, 1);
        }
        let at = random.below(scene.bytes.len() as u64 - 100_000);
        scene.assert_read(&file, at, 100_000);
    }
    assert_eq!(b3sum(&file), scene.digest());
    scene.daemon.wait_state("w", "ready", LIMIT);
}

#[test]
fn a_mapped_file_waits_like_a_read_one() {
    let scene = Scene::new(64, 16 * MIB);
    scene.create(&scene.put(Page::Ranged));
    let open = File::open(scene.attach("job")).unwrap();
    assert!(open.as_raw_fd() > 0);
    // SAFETY: nothing changes a file of a checkpoint.
    let map = unsafe { memmap2::Mmap::map(&open) }.unwrap();
    for at in [63 << 20, 5, 31 << 20] {
        assert_eq!(map[at], scene.bytes[at]);
    }
}

#[test]
fn a_read_that_waits_is_answered_by_the_successor_of_a_killed_daemon() {
    let daemon = Daemon::start_kept(&[LOOPBACK]);
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(96 << 20));
    let scene = Scene { daemon, site, bytes };
    scene.site.limit(2 * MIB);
    scene.create(&scene.put(Page::Ranged));
    let file = scene.attach("job");
    let open = File::open(&file).unwrap();
    let before = mounts_at(file.parent().unwrap());
    let waiting: Vec<_> = (0..6)
        .map(|read| {
            let (open, bytes) = (open.try_clone().unwrap(), Arc::clone(&scene.bytes));
            thread::spawn(move || {
                let at = (90 - read * 13) << 20;
                let mut found = vec![0; 10_000];
                open.read_exact_at(&mut found, at as u64).unwrap();
                assert!(found == bytes[at..at + 10_000], "wrong bytes at {at}");
            })
        })
        .collect();
    for _ in 0..2 {
        thread::sleep(Duration::from_millis(700));
        nix::sys::signal::kill(scene.daemon.server(), nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_until("a successor answers", LIMIT, || scene.daemon.ctl(&["status"]).code == Some(0));
    }
    scene.site.limit(0);
    waiting.into_iter().for_each(|read| read.join().unwrap());
    scene.daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(b3sum(&file), scene.digest());
    assert_eq!(format!("{before:?}"), format!("{:?}", mounts_at(file.parent().unwrap())));
}

#[test]
fn an_estimate_is_made_from_what_the_source_gave_before_and_kept_beside_its_outcome() {
    let scene = Scene::new(32, 32 * MIB);
    let url = scene.put(Page::Ranged);
    scene.create(&url);
    scene.daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(scene.daemon.json(&["estimate", "w"])["missing_bytes"], 0);
    let other = scene.site.put("/other.bin", Page::Ranged(Arc::new(Random::new(seed() + 1).bytes(64 << 20))));
    scene.site.limit(HELD);
    scene.daemon.ctl(&["create", "other", "--type", "web", "--uri", &other]).ok();
    scene.wait_listed("other");
    let estimate = scene.daemon.json(&["estimate", "other"]);
    let rate = estimate["rate_bytes_per_s"].as_u64().unwrap();
    assert!((4 * MIB..512 * MIB).contains(&rate), "{estimate}");
    assert!(estimate["missing_bytes"].as_u64().unwrap() <= 64 * MIB, "{estimate}");
    assert!(estimate["expected_s"].as_f64().is_some_and(|seconds| seconds < 60.0), "{estimate}");
    assert!(estimate["from"].as_str().unwrap().starts_with("web 127.0.0.1:"), "{estimate}");
    scene.site.limit(0);
    scene.daemon.wait_state("other", "ready", LIMIT);
    let kept = scene.daemon.json(&["status"])["estimates"].clone();
    assert!(kept[0]["expected_s"].is_f64() && kept[0]["took_s"].is_f64(), "{kept}");
}

#[test]
fn prefetching_starts_what_is_not_here_and_brings_what_is_into_memory() {
    let scene = Scene::new(24, 0);
    scene.create(&scene.put(Page::Ranged));
    let target = scene.daemon.place().dir("at");
    let record = scene.daemon.json(&["prefetch", "w", "--memory"]);
    assert_eq!(record["state"], "ready");
    let blob = scene.daemon.state().join(format!("blobs/{}/{}", &scene.digest()[..2], scene.digest()));
    drop_from_memory(&blob);
    assert!(bytes_in_memory(&blob) < MIB, "the test could not bring them out of memory");
    let ran = scene.daemon.ctl(&["prefetch", "w", "--memory"]).ok();
    assert!(ran.stderr.contains("24.00 MiB are in the page cache"), "{}", ran.stderr);
    assert!(bytes_in_memory(&blob) >= scene.bytes.len() as u64);
    scene.daemon.attach_at("job", &["w"], &target).ok();
    assert_eq!(b3sum(&target.join("w.bin")), scene.digest());
}

#[test]
fn what_was_read_first_comes_first_the_next_time() {
    let scene = Scene::new(240, 0);
    let url = scene.put(Page::Ranged);
    scene.create(&url);
    scene.daemon.wait_state("w", "ready", LIMIT);
    scene.daemon.ctl(&["remove", "w", "--yes"]).ok();
    // Read through the daemon while it arrives: the middle, then somewhere before the end.
    scene.site.limit(HELD);
    scene.create(&url);
    let file = scene.attach("first");
    scene.site.limit(16 * MIB);
    for at in [200 * MIB, 171 * MIB] {
        scene.assert_read(&file, at, 1000);
    }
    scene.daemon.ctl(&["release", "first"]).ok();
    scene.daemon.ctl(&["remove", "w", "--yes"]).ok();
    // An order counts once somebody reads.
    scene.site.limit(HELD);
    scene.create(&url);
    let file = scene.attach("second");
    scene.site.limit(16 * MIB);
    wait_until("the first units are here", LIMIT, || scene.daemon.bytes_done("w") >= 44 * MIB);
    // A unit would take half a minute from now on.
    scene.site.limit(MIB / 8);
    let began = std::time::Instant::now();
    for at in [200 * MIB, 171 * MIB] {
        scene.assert_read(&file, at, 1000);
    }
    assert!(began.elapsed() < Duration::from_secs(8), "what was read first did not come first");
    scene.site.limit(0);
}

/// Resident bytes of a process.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn drop_from_memory(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Bytes of a file that are in the page cache, in whole pages.
fn bytes_in_memory(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    // SAFETY: nothing changes a blob.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let mut pages = vec![0_u8; map.len().div_ceil(4096)];
    // SAFETY: the mapping is of that length, and there is a byte for each of its pages.
    let asked = unsafe { nix::libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    assert_eq!(asked, 0);
    pages.iter().filter(|page| **page & 1 != 0).count() as u64 * 4096
}
