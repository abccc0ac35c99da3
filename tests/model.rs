//! Random requests, kills and restarts against a ckptd that keeps everything in two maps: after each step both must say the same,
//! and the mounts must give the same bytes.
//!
//! A round is one daemon and a fixed number of steps, all of it by one seed. `TEST_MODEL_SECONDS` says how long rounds are begun (default 30);
//! `TEST_MODEL_SEED` replays the one round of that seed, which a failure prints with its steps.

#![cfg(test)]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::corpus::{Random, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::files::{file_bytes, regular_files, xattr};
use support::place::mounts_at;
use support::ran::wait_until;
use support::site::{Page, Site};

const STEPS: u32 = 40;
const SECONDS: u64 = 30;
const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

type Tree = BTreeMap<String, Arc<Vec<u8>>>;

/// What the naive ckptd knows of a checkpoint.
#[derive(Clone)]
struct Checkpoint {
    name: String,
    /// `None` once it has failed.
    tree: Option<Tree>,
    /// The page that is missing at the site, and what it should be.
    missing: Option<(String, Arc<Vec<u8>>)>,
    /// The site has it: it can be evicted.
    fetched: bool,
    evicted: bool,
}

/// What it knows of a job: checkpoints by id, each with its directory where there are several.
#[derive(Clone)]
struct Job {
    target: PathBuf,
    checkpoints: Vec<(String, String)>,
    attached: bool,
}

/// Both of them, and where things come from.
struct Round {
    random: Random,
    daemon: Daemon,
    site: Site,
    checkpoints: BTreeMap<String, Checkpoint>,
    jobs: BTreeMap<String, Job>,
    /// Bytes that come again and again.
    pool: Vec<Arc<Vec<u8>>>,
    count: u32,
    /// Checkpoint digests by what they are of.
    digests: HashMap<String, String>,
}

#[test]
fn the_daemon_and_the_naive_one_say_the_same() {
    if let Ok(seed) = std::env::var("TEST_MODEL_SEED") {
        return Round::begin(seed.parse().unwrap()).play();
    }
    let seconds = std::env::var("TEST_MODEL_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let until = Instant::now() + Duration::from_secs(seconds);
    for seed in seed().. {
        Round::begin(seed).play();
        if Instant::now() > until {
            break;
        }
    }
}

impl Round {
    fn begin(seed: u64) -> Self {
        eprintln!("TEST_MODEL_SEED={seed}");
        let mut random = Random::new(seed);
        let sizes = [700, 70_000, 300 << 10, 1 << 20, 5 << 20];
        let pool = sizes.iter().map(|size| Arc::new(random.bytes(*size))).collect();
        Self {
            random,
            daemon: Daemon::start_with(&[LOOPBACK]),
            site: Site::open(),
            checkpoints: BTreeMap::new(),
            jobs: BTreeMap::new(),
            pool,
            count: 0,
            digests: HashMap::new(),
        }
    }

    fn play(mut self) {
        for step in 0..STEPS {
            let what = self.step();
            eprintln!("{step:3} {what}");
            self.compare();
        }
        self.clear();
    }

    fn step(&mut self) -> String {
        match self.random.below(100) {
            0..12 => self.capture(),
            12..20 => self.upload(),
            20..30 => self.create(),
            30..33 => self.create_in_vain(),
            33..36 => self.retry(),
            36..48 => self.attach(),
            48..52 => self.attach_while_it_fills(),
            52..56 => self.reserve(),
            56..60 => self.attach_again(),
            60..66 => self.detach(),
            66..69 => self.rename(),
            69..72 => self.evict(),
            72..84 => self.remove(),
            84..88 => self.restart(),
            88..93 => self.kill(),
            93..96 => self.kill_while_it_fills(),
            96..98 => self.kill_in_a_capture(),
            _ => self.ask_for_nothing(),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).unwrap()
    }

    /// An id or a job that nobody has had.
    fn fresh(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}{}", self.count)
    }

    /// Few names, so that some are borne twice.
    fn name(&mut self) -> String {
        format!("name {}", self.below(6))
    }

    fn some_checkpoint(&mut self) -> Option<String> {
        let at = self.below(self.checkpoints.len().max(1));
        self.checkpoints.keys().nth(at).cloned()
    }

    fn some_job(&mut self) -> Option<String> {
        let at = self.below(self.jobs.len().max(1));
        self.jobs.keys().nth(at).cloned()
    }

    fn content(&mut self) -> Arc<Vec<u8>> {
        let (one, other) = (self.below(self.pool.len()), self.below(self.pool.len()));
        match self.random.below(4) {
            0 => self.pool[one].clone(),
            1 => Arc::new([self.pool[one].as_slice(), self.pool[other].as_slice()].concat()),
            2 => {
                let mut bytes = self.pool[one].as_ref().clone();
                let at = self.below(bytes.len());
                bytes[at] ^= 1;
                Arc::new(bytes)
            }
            _ => {
                let length = self.below(200_000);
                Arc::new(self.random.bytes(length))
            }
        }
    }

    fn tree(&mut self) -> Tree {
        let paths = ["w.bin", "a/w.bin", "a/b/c d", "ü", "config.json", "deep/er/and/deeper/x"];
        let count = 1 + self.below(paths.len());
        (0..count).map(|at| (paths[at].to_owned(), self.content())).collect()
    }

    fn keep(&mut self, id: &str, name: &str, tree: Tree, fetched: bool) {
        let checkpoint = Checkpoint { name: name.to_owned(), tree: Some(tree), missing: None, fetched, evicted: false };
        self.checkpoints.insert(id.to_owned(), checkpoint);
    }

    /// A directory with these files.
    fn directory(&self, id: &str, tree: &Tree) -> PathBuf {
        let root = self.daemon.place().dir(&format!("source-{id}"));
        for (path, bytes) in tree {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes.as_slice()).unwrap();
        }
        root
    }

    fn capture(&mut self) -> String {
        let (id, name, tree) = (self.fresh("c"), self.name(), self.tree());
        let from = self.directory(&id, &tree);
        self.daemon.ctl(&["capture", "maker", "--from", text(&from), "--name", &name, "--id", &id]).ok();
        fs::remove_dir_all(from).unwrap();
        self.keep(&id, &name, tree, false);
        format!("captured {id} as `{name}`")
    }

    fn upload(&mut self) -> String {
        let (id, name, tree) = (self.fresh("c"), self.name(), self.tree());
        let from = self.directory(&id, &tree);
        self.daemon.ctl(&["upload", &name, text(&from), "--id", &id]).ok();
        fs::remove_dir_all(from).unwrap();
        self.keep(&id, &name, tree, false);
        format!("uploaded {id} as `{name}`")
    }

    fn create(&mut self) -> String {
        let (id, name, bytes) = (self.fresh("c"), self.name(), self.content());
        let page = match self.random.below(4) {
            0 => Page::Whole(bytes.clone()),
            1 => Page::Unsized(bytes.clone()),
            _ => Page::Ranged(bytes.clone()),
        };
        let url = self.site.put(&format!("/{id}/w.bin"), page);
        self.daemon.ctl(&["create", &name, "--type", "web", "--uri", &url, "--id", &id, "--wait"]).ok();
        self.keep(&id, &name, Tree::from([("w.bin".to_owned(), bytes)]), true);
        format!("created {id} as `{name}`")
    }

    fn create_in_vain(&mut self) -> String {
        let (id, name, bytes) = (self.fresh("c"), self.name(), self.content());
        let path = format!("/{id}/w.bin");
        let url = self.site.put(&path, Page::Status(404));
        let ran = self.daemon.ctl(&["create", &name, "--type", "web", "--uri", &url, "--id", &id, "--wait"]);
        ran.refused(&[3], &["404"]);
        let checkpoint =
            Checkpoint { name: name.clone(), tree: None, missing: Some((path, bytes)), fetched: true, evicted: false };
        self.checkpoints.insert(id.clone(), checkpoint);
        format!("failed to create {id} as `{name}`")
    }

    fn retry(&mut self) -> String {
        let failed = self.checkpoints.iter().find_map(|(id, known)| Some((id.clone(), known.missing.clone()?)));
        let Some((id, (path, bytes))) = failed else { return "nothing to retry".into() };
        self.site.put(&path, Page::Ranged(bytes.clone()));
        self.daemon.ctl(&["retry", &id]).ok();
        let name = self.checkpoints[&id].name.clone();
        self.keep(&id, &name, Tree::from([("w.bin".to_owned(), bytes)]), true);
        self.wait_ready(&id);
        format!("retried {id}")
    }

    fn wait_ready(&self, id: &str) {
        wait_until(&format!("{id} is ready"), LIMIT, || self.daemon.json(&["get", id])["state"] == "ready");
    }

    /// One to three checkpoints that a job may have together, with their directories; or one that nobody can have.
    fn some_checkpoints(&mut self) -> Vec<(String, String)> {
        let count = 1 + self.below(3);
        let chosen: BTreeSet<String> = (0..count).filter_map(|_| self.some_checkpoint()).collect();
        chosen.into_iter().map(|id| (id.clone(), self.checkpoints[&id].name.clone())).collect()
    }

    fn attach(&mut self) -> String {
        let chosen = self.some_checkpoints();
        let ids: Vec<_> = chosen.iter().map(|(id, _)| id.as_str()).collect();
        if ids.is_empty() {
            return "nothing to attach".into();
        }
        let job = self.fresh("j");
        let target = self.daemon.place().dir(&format!("at-{job}"));
        let ran = self.daemon.attach_at(&job, &ids, &target);
        self.come_back(&chosen);
        let names: BTreeSet<_> = chosen.iter().map(|(_, name)| name).collect();
        if chosen.iter().any(|(id, _)| self.checkpoints[id].tree.is_none()) {
            ran.refused(&[4], &["failed"]);
            return format!("refused {ids:?} to {job}: one has failed");
        }
        if names.len() < chosen.len() {
            ran.refused(&[2], &[]);
            return format!("refused {ids:?} to {job}: two have one name");
        }
        ran.ok();
        let said = format!("attached {ids:?} for {job}");
        self.jobs.insert(job, Job { target, checkpoints: chosen, attached: true });
        said
    }

    /// Read before it is here; then the daemon is killed, or the job goes away, or neither.
    fn attach_while_it_fills(&mut self) -> String {
        let (id, name, job) = (self.fresh("c"), self.name(), self.fresh("j"));
        let length = (9 << 20) + self.below(5 << 20);
        let bytes = Arc::new(self.random.bytes(length));
        let url = self.site.put(&format!("/{id}/w.bin"), Page::Ranged(bytes.clone()));
        self.site.limit(12 * MIB);
        self.daemon.ctl(&["create", &name, "--type", "web", "--uri", &url, "--id", &id]).ok();
        let target = self.daemon.place().dir(&format!("at-{job}"));
        self.daemon.ctl(&["attach", &job, &id, "--lazy", "--at", text(&target)]).ok();
        self.keep(&id, &name, Tree::from([("w.bin".to_owned(), bytes.clone())]), true);
        let held = vec![(id.clone(), name)];
        self.jobs.insert(job.clone(), Job { target: target.clone(), checkpoints: held, attached: true });
        let file = target.join("w.bin");
        (0..2).for_each(|_| self.compare_range(&file, &bytes));
        let what = self.below(3);
        match what {
            0 => {
                self.daemon.kill9();
                self.daemon.restart();
                (0..2).for_each(|_| self.compare_range(&file, &bytes));
            }
            1 => {
                self.daemon.ctl(&["release", &job]).ok();
                self.jobs.remove(&job);
            }
            _ => (0..2).for_each(|_| self.compare_range(&file, &bytes)),
        }
        self.site.limit(0);
        self.wait_ready(&id);
        format!("{job} read {id} while it filled; {}", ["killed it", "released the job", "went on"][what])
    }

    /// Also of what is not ready; then a later attach takes what was reserved.
    fn reserve(&mut self) -> String {
        let Some(id) = self.some_checkpoint() else { return "nothing to reserve".into() };
        let job = self.fresh("j");
        self.daemon.ctl(&["reserve", &job, &id]).ok();
        let name = self.checkpoints[&id].name.clone();
        let target = self.daemon.place().dir(&format!("at-{job}"));
        let ready = self.checkpoints[&id].tree.is_some();
        if ready {
            self.daemon.attach_at(&job, &[], &target).ok();
        } else {
            self.daemon.attach_at(&job, &[], &target).refused(&[4], &["failed"]);
        }
        let said = format!("reserved {id} for {job}, attached: {ready}");
        let held = vec![(id, name)];
        self.come_back(&held);
        self.jobs.insert(job, Job { target, checkpoints: held, attached: ready });
        said
    }

    /// What a job has had, or has: either way the answer is the same.
    fn attach_again(&mut self) -> String {
        let Some(job) = self.some_job() else { return "no job to attach again".into() };
        let known = self.jobs[&job].clone();
        if known.checkpoints.iter().any(|(id, _)| self.checkpoints[id].tree.is_none()) {
            return format!("{job} cannot attach: what it holds has failed");
        }
        let ids: Vec<_> = known.checkpoints.iter().map(|(id, _)| id.as_str()).collect();
        let ids = if self.random.below(2) == 0 { &ids[..] } else { &[] };
        self.daemon.attach_at(&job, ids, &known.target).ok();
        assert_eq!(mounts_at(&known.target).len(), 1, "views are not stacked");
        self.jobs.get_mut(&job).unwrap().attached = true;
        format!("attached {ids:?} for {job} again")
    }

    fn detach(&mut self) -> String {
        let Some(job) = self.some_job() else { return "no job to detach".into() };
        let target = self.jobs[&job].target.clone();
        if self.random.below(2) == 0 {
            self.daemon.ctl(&["release", &job]).ok();
            self.jobs.remove(&job);
        } else {
            self.daemon.ctl(&["detach", &job]).ok();
            self.jobs.get_mut(&job).unwrap().attached = false;
        }
        assert!(mounts_at(&target).is_empty(), "{job} still sees something");
        format!("detached {job}, kept: {}", self.jobs.contains_key(&job))
    }

    fn rename(&mut self) -> String {
        let (Some(id), name) = (self.some_checkpoint(), self.name()) else { return "nothing to rename".into() };
        self.daemon.ctl(&["rename", &id, &name]).ok();
        self.checkpoints.get_mut(&id).unwrap().name.clone_from(&name);
        format!("renamed {id} to `{name}`")
    }

    fn remove(&mut self) -> String {
        let Some(id) = self.some_checkpoint() else { return "nothing to remove".into() };
        let holds = |job: &Job| job.checkpoints.iter().any(|(held, _)| *held == id);
        let holder = self.jobs.iter().find(|(_, job)| holds(job)).map(|(name, _)| name.clone());
        let ran = self.daemon.ctl(&["remove", &id, "--yes"]);
        match holder {
            Some(holder) => {
                ran.refused(&[4], &[&holder]);
                format!("refused to remove {id}: {holder} holds it")
            }
            None => {
                ran.ok();
                self.checkpoints.remove(&id);
                format!("removed {id}")
            }
        }
    }

    /// Also what has to stay.
    fn evict(&mut self) -> String {
        let Some(id) = self.some_checkpoint() else { return "nothing to evict".into() };
        let held = self.jobs.values().any(|job| job.checkpoints.iter().any(|(held, _)| *held == id));
        let ran = self.daemon.ctl(&["evict", &id, "--force"]);
        let known = self.checkpoints.get_mut(&id).unwrap();
        if held || known.tree.is_none() || !known.fetched {
            ran.refused(&[4], &[]);
            return format!("refused to evict {id}");
        }
        ran.ok();
        known.evicted = true;
        format!("evicted {id}")
    }

    /// What is asked for is filled again, whatever else becomes of the request.
    fn come_back(&mut self, wanted: &[(String, String)]) {
        for (id, _) in wanted {
            if std::mem::take(&mut self.checkpoints.get_mut(id).unwrap().evicted) {
                self.wait_ready(id);
            }
        }
    }

    fn restart(&mut self) -> String {
        self.daemon.stop();
        self.daemon.restart();
        "stopped and started it".into()
    }

    fn kill(&mut self) -> String {
        self.daemon.kill9();
        self.daemon.restart();
        "killed and started it".into()
    }

    fn kill_while_it_fills(&mut self) -> String {
        let (id, name) = (self.fresh("c"), self.name());
        let length = (9 << 20) + self.below(5 << 20);
        let bytes = Arc::new(self.random.bytes(length));
        let url = self.site.put(&format!("/{id}/w.bin"), Page::Ranged(bytes.clone()));
        self.site.limit(12 * MIB);
        self.daemon.ctl(&["create", &name, "--type", "web", "--uri", &url, "--id", &id]).ok();
        let some = self.random.below(5 * MIB);
        let mut sent = 0;
        self.site.take_sent();
        wait_until("some of it is sent", LIMIT, || {
            sent += self.site.take_sent();
            sent >= some
        });
        self.daemon.kill9();
        self.site.limit(0);
        self.daemon.restart();
        self.keep(&id, &name, Tree::from([("w.bin".to_owned(), bytes)]), true);
        self.wait_ready(&id);
        format!("killed it while {id} filled")
    }

    fn kill_in_a_capture(&mut self) -> String {
        let (id, name, tree) = (self.fresh("c"), self.name(), self.tree());
        let from = self.directory(&id, &tree);
        let args = ["capture", "maker", "--from", text(&from), "--name", &name, "--id", &id];
        let mut capture = self.daemon.ctl_command();
        let mut capture = capture.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // A random moment is what is tested here, not something awaited.
        std::thread::sleep(Duration::from_millis(self.random.below(60)));
        self.daemon.kill9();
        capture.kill().unwrap();
        capture.wait().unwrap();
        self.daemon.restart();
        // Asking again with the same id is answered as if nothing had happened.
        self.daemon.ctl(&args).ok();
        fs::remove_dir_all(from).unwrap();
        self.keep(&id, &name, tree, false);
        format!("killed it while {id} was captured")
    }

    fn ask_for_nothing(&mut self) -> String {
        let target = self.daemon.place().dir("nowhere");
        for args in [&["get", "nobody"][..], &["remove", "nobody", "--yes"], &["rename", "nobody", "x"]] {
            self.daemon.ctl(args).refused(&[3], &["nobody"]);
        }
        self.daemon.attach_at("j", &["nobody"], &target).refused(&[3], &["nobody"]);
        self.daemon.ctl(&["detach", "j"]).refused(&[3], &["j"]);
        "asked for what is not there".into()
    }

    fn compare(&mut self) {
        self.compare_lists();
        self.compare_usage();
        let name = self.name();
        let bearers: Vec<_> = self.checkpoints.iter().filter(|(_, known)| known.name == name).collect();
        let ran = self.daemon.ctl(&["get", &name]);
        match bearers[..] {
            [] => drop(ran.refused(&[3], &[&name])),
            [_] => drop(ran.ok()),
            _ => drop(ran.refused(&[2], &bearers.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>())),
        }
        for job in self.jobs.clone().into_values() {
            self.compare_view(&job);
        }
    }

    fn compare_lists(&mut self) {
        let rows = self.daemon.rows("list");
        let ids: BTreeSet<_> = rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(ids, self.checkpoints.keys().cloned().collect());
        for row in &rows {
            let known = &self.checkpoints[row["id"].as_str().unwrap()];
            assert_eq!(row["name"].as_str(), Some(known.name.as_str()), "{row}");
            let Some(tree) = &known.tree else {
                assert_eq!(row["state"], "failed", "{row}");
                assert_eq!(row["error"]["exit_code"], 3, "{row}");
                continue;
            };
            assert_eq!(row["state"], if known.evicted { "evicted" } else { "ready" }, "{row}");
            assert_eq!(row["files"].as_u64(), Some(tree.len() as u64), "{row}");
            assert_eq!(row["logical_bytes"].as_u64(), Some(logical(tree)), "{row}");
            let digest = row["digest"].as_str().unwrap().to_owned();
            let before = self.digests.entry(signature(tree)).or_insert_with(|| digest.clone());
            assert_eq!(*before, digest, "equal trees have equal digests: {row}");
        }
        let distinct: BTreeSet<_> = self.digests.values().collect();
        assert_eq!(distinct.len(), self.digests.len(), "different trees have different digests");

        let rows = self.daemon.rows("jobs");
        let names: BTreeSet<_> = rows.iter().map(|row| row["job"].as_str().unwrap().to_owned()).collect();
        assert_eq!(names, self.jobs.keys().cloned().collect());
        for row in &rows {
            let known = &self.jobs[row["job"].as_str().unwrap()];
            assert_eq!(row["state"] == "attached", known.attached, "{row}");
            let held = row["checkpoints"].as_array().unwrap().iter().map(|held| held["id"].as_str().unwrap());
            assert!(held.eq(known.checkpoints.iter().map(|(id, _)| id)), "{row}");
        }
    }

    fn compare_usage(&self) {
        let usage = self.daemon.json(&["usage"]);
        let trees = || self.checkpoints.values().filter_map(|known| known.tree.as_ref());
        assert_eq!(usage["logical_bytes"].as_u64(), Some(trees().map(logical).sum()), "{usage}");
        let distinct: BTreeMap<_, _> = trees()
            .flat_map(BTreeMap::values)
            .map(|bytes| (blake3::hash(bytes).to_hex(), bytes.len() as u64))
            .collect();
        let unique = usage["unique_bytes"].as_u64().unwrap();
        assert!(unique <= distinct.values().sum(), "{usage}");
    }

    /// Looks through a job's mount: names, sizes, digests, and a few ranges.
    fn compare_view(&mut self, job: &Job) {
        if !job.attached {
            return assert!(mounts_at(&job.target).is_empty(), "{} is still mounted", job.target.display());
        }
        for (id, directory) in &job.checkpoints {
            let root = if job.checkpoints.len() == 1 { job.target.clone() } else { job.target.join(directory) };
            let tree = self.checkpoints[id].tree.clone().unwrap();
            let paths: BTreeSet<_> = regular_files(&root).into_iter().collect();
            assert_eq!(paths, tree.keys().map(|path| root.join(path)).collect());
            let at = self.below(tree.len());
            let (path, bytes) = tree.iter().nth(at).unwrap();
            let path = root.join(path);
            assert_eq!(xattr(&path, "user.ckptd.digest"), blake3::hash(bytes).to_hex().to_string());
            self.compare_range(&path, bytes);
        }
    }

    fn compare_range(&mut self, path: &Path, bytes: &[u8]) {
        let file = File::open(path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
        let start = self.below(bytes.len() + 1);
        let length = self.below(bytes.len() - start + 1);
        let mut found = vec![0; length];
        file.read_exact_at(&mut found, start as u64).unwrap();
        assert!(found == bytes[start..start + length], "{} at {start}, {length} bytes", path.display());
    }

    /// With everything gone nothing is left.
    fn clear(mut self) {
        wait_until("the figures are those of the disk", LIMIT, || {
            let said = self.daemon.json(&["usage"])["physical_bytes"].as_u64();
            said == Some(file_bytes(&self.daemon.state().join("blobs")))
        });
        for job in std::mem::take(&mut self.jobs).into_keys() {
            self.daemon.ctl(&["release", &job]).ok();
        }
        for id in std::mem::take(&mut self.checkpoints).into_keys() {
            self.daemon.ctl(&["remove", &id, "--yes"]).ok();
        }
        self.compare();
        wait_until("the store is empty", LIMIT, || {
            ["blobs", "filling"].iter().all(|part| regular_files(&self.daemon.state().join(part)).is_empty())
        });
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn logical(tree: &Tree) -> u64 {
    tree.values().map(|bytes| bytes.len() as u64).sum()
}

fn signature(tree: &Tree) -> String {
    tree.iter().map(|(path, bytes)| format!("{path} {}\n", blake3::hash(bytes).to_hex())).collect()
}
