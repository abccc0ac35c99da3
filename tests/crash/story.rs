//! What the daemon does while it is recorded: everything that changes the state directory, a few times over.
//!
//! It is told in legs. A leg is one daemon from its start to its end; it begins with what the one before had left, the last two with what
//! a crash in the middle of an earlier one leaves.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::disk::{Disk, Image, Loss};
use crate::law::{self, Promise, Promises, Truth};
use crate::support::corpus::{Random, Tensors, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::regular_files;
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::site::{Page, Site};
use crate::trace::{Act, Marks, Recorder};

const LIMIT: Duration = Duration::from_secs(180);
const MIB: usize = 1 << 20;

/// A file is filled, sealed, and shared; some are made whole again.
pub(crate) const KEEPS: usize = 0;
/// A source is slow; the daemon is killed.
pub(crate) const INTERRUPTED: usize = 1;
/// What was interrupted is finished; then removals.
pub(crate) const REMOVES: usize = 2;
/// The start after a crash between a blob's name and its row.
pub(crate) const UNDOES: usize = 3;
/// The start after a crash in a removal.
pub(crate) const FINISHES: usize = 4;

/// One daemon's life.
#[derive(Default)]
pub(crate) struct Leg {
    pub(crate) begins_with: Image,
    /// What had been promised before.
    pub(crate) promises: Promises,
    pub(crate) acts: Vec<Act>,
}

/// All of them, and the sources, which stay as they are.
pub(crate) struct Story {
    pub(crate) legs: Vec<Leg>,
    pub(crate) truth: Arc<Truth>,
    pub(crate) sources: Sources,
}

/// Where the checkpoints come from.
pub(crate) struct Sources {
    pub(crate) place: Place,
    /// Nobody else serves `w.bin`.
    pub(crate) _site: Site,
}

impl Story {
    /// The story of this process: told once for as long as anybody listens.
    pub(crate) fn told() -> Arc<Self> {
        static TOLD: Mutex<Weak<Story>> = Mutex::new(Weak::new());
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        told.upgrade().unwrap_or_else(|| {
            let story = Arc::new(Self::tell());
            *told = Arc::downgrade(&story);
            story
        })
    }

    fn tell() -> Self {
        let place = Place::new();
        let base = Tensors::new(seed(), 4, 2 * MIB);
        base.write_safetensors(&place.join("a/model.safetensors"));
        base.write_safetensors(&place.join("a/again/copy.safetensors"));
        base.fine_tuned(1).write_safetensors(&place.join("b/model.safetensors"));
        let mut random = Random::new(seed());
        fs::create_dir_all(place.join("c")).unwrap();
        for index in 0..24_usize {
            let bytes = random.bytes(700 * (index + 1));
            fs::write(place.join(&format!("a/f{index}")), &bytes).unwrap();
            if index % 8 == 0 {
                fs::write(place.join(&format!("a/again/f{index}")), &bytes).unwrap();
                fs::write(place.join(&format!("b/f{index}")), &bytes).unwrap();
            }
        }
        // So many that they are made durable together.
        fs::create_dir_all(place.join("a/many")).unwrap();
        for index in 0..200 {
            fs::write(place.join(&format!("a/many/{index}")), format!("file {index}\n")).unwrap();
        }
        fs::write(place.join("b/empty"), b"").unwrap();
        fs::write(place.join("c/sent"), random.bytes(5 * MIB)).unwrap();
        fs::write(place.join("c/sent-too"), random.bytes(MIB)).unwrap();
        fs::create_dir_all(place.join("w")).unwrap();
        fs::write(place.join("w/w.bin"), random.bytes(20 * MIB)).unwrap();

        let site = Site::open();
        let bytes = Arc::new(fs::read(place.join("w/w.bin")).unwrap());
        let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
        let mut truth = Truth::default();
        for (name, tree) in [("a", "a"), ("b", "b"), ("c", "c"), ("w", "w"), ("a2", "a")] {
            truth.trees.insert(name.into(), digests(&place.join(tree)));
        }
        truth.filling.insert("w.bin".into(), bytes);

        let keeps = record(Leg::default().end(), |daemon, marks| keep_and_share(daemon, marks, &place));
        let interrupted = record(keeps.end(), |daemon, marks| {
            site.limit(5 * MIB as u64);
            interrupt(daemon, marks, &url);
        });
        site.limit(0);
        let removes = record(interrupted.end(), |daemon, marks| resume_and_remove(daemon, marks, &place));
        let publishes = |act: &Act| matches!(act, Act::Rename { to, .. } if to.starts_with("blobs/"));
        let undoes = record(keeps.stopped_after(publishes), |daemon, marks| {
            daemon.wait_state("a", "ready", LIMIT);
            marks.say("ready a");
            daemon.stop();
        });
        let unlinks = |act: &Act| matches!(act, Act::Unlink(path) if path.starts_with("blobs/"));
        let broken_off = removes.stopped_after(unlinks);
        let leaving = broken_off.1.iter().find(|(_, promise)| **promise == Promise::Leaving);
        let leaving = leaving.unwrap().0.clone();
        let finishes = record(broken_off, |daemon, marks| {
            wait_until("it is gone", LIMIT, || daemon.rows("list").iter().all(|row| row["name"] != *leaving));
            marks.say(&format!("gone {leaving}"));
            wait_until("its bytes are back", LIMIT, || freed(daemon, "interrupted removals"));
            daemon.stop();
        });
        let legs = vec![keeps, interrupted, removes, undoes, finishes];
        Self { legs, truth: Arc::new(truth), sources: Sources { place, _site: site } }
    }
}

/// Captures, an upload, bytes shared and made whole again for a job.
fn keep_and_share(daemon: &mut Daemon, marks: &mut Marks, place: &Place) {
    for name in ["a", "b"] {
        marks.say(&format!("begin {name}"));
        daemon.capture(name, &place.join(name));
        marks.say(&format!("ready {name}"));
    }
    daemon.attach("job", "b");
    wait_until("the borrowed bytes are back", LIMIT, || {
        daemon.json(&["usage"])["duplicate_bytes"].as_u64().is_some_and(|bytes| bytes > 5 * MIB as u64)
    });
    daemon.ctl(&["detach", "job"]).ok();
    daemon.ctl(&["release", "job"]);
    marks.say("begin c");
    daemon.ctl(&["upload", "c", place.join("c").to_str().unwrap()]).ok();
    marks.say("ready c");
    daemon.stop();
}

/// A slow source, a job that reads what it sends, and the end in the middle.
fn interrupt(daemon: &mut Daemon, marks: &mut Marks, url: &str) {
    marks.say("begin w");
    daemon.ctl(&["create", "w", "--type", "web", "--uri", url]).ok();
    let target = daemon.place().dir("at-hasty");
    daemon.ctl(&["attach", "hasty", "w", "--lazy", "--at", target.to_str().unwrap()]).ok();
    let mut found = [0; 10];
    File::open(target.join("w.bin")).unwrap().read_exact_at(&mut found, 18 * MIB as u64).unwrap();
    wait_until("half of it is here", LIMIT, || daemon.recorded_bytes("w") >= 12 * MIB as u64);
    daemon.kill9();
}

/// The rest of it; then removals: of what others borrow from, of what comes again, of everything. Between them one is evicted and comes back.
fn resume_and_remove(daemon: &mut Daemon, marks: &mut Marks, place: &Place) {
    daemon.wait_state("w", "ready", LIMIT);
    marks.say("ready w");
    daemon.ctl(&["release", "hasty"]).ok();
    remove(daemon, marks, "a");
    marks.say("begin a2");
    daemon.capture("a2", &place.join("a"));
    marks.say("ready a2");
    marks.say("evict w");
    daemon.ctl(&["evict", "w", "--force"]).ok();
    daemon.ctl(&["prefetch", "w"]).ok();
    daemon.wait_state("w", "ready", LIMIT);
    marks.say("ready w");
    for name in ["b", "w", "c"] {
        remove(daemon, marks, name);
    }
    daemon.stop();
}

fn remove(daemon: &Daemon, marks: &mut Marks, name: &str) {
    marks.say(&format!("remove {name}"));
    daemon.ctl(&["remove", name, "--yes"]).ok();
    marks.say(&format!("gone {name}"));
    wait_until("its bytes are back", LIMIT, || freed(daemon, &format!("`{name}`")));
}

/// Whether an event says so of what these words are about.
fn freed(daemon: &Daemon, words: &str) -> bool {
    let about = |event: &serde_json::Value| event["message"].as_str().is_some_and(|message| message.contains(words));
    daemon.rows("events").iter().any(|event| event["kind"] == "SPACE_FREED" && about(event))
}

/// Runs a daemon on what it begins with and writes down what it does. `play` ends it.
fn record((begins_with, promises): (Image, Promises), play: impl FnOnce(&mut Daemon, &mut Marks)) -> Leg {
    let place = Place::new();
    let state = place.join("state");
    begins_with.write_to(&state);
    let recorder = Recorder::new(place.path());
    let environment: Vec<_> = recorder.environment(&state).into_iter().chain([LOOPBACK]).collect();
    let mut daemon = Daemon::start_on(state.clone(), &environment);
    play(&mut daemon, &mut recorder.marks());
    let leg = Leg { begins_with, promises, acts: recorder.acts() };
    drop(daemon);
    let differences = leg.end().0.differences(&Image::of(&state));
    // What a killed daemon did last may have gone without a record.
    let killed = leg.acts.iter().any(|act| matches!(act, Act::Mark(mark) if mark == "begin w"));
    assert!(differences.len() <= usize::from(killed), "the records do not tell everything: {differences:?}");
    leg
}

impl Leg {
    /// What it has left, and promised.
    fn end(&self) -> (Image, Promises) {
        self.stopped_after(|_| false)
    }

    /// The same after a kill at the first of such acts.
    fn stopped_after(&self, last: impl Fn(&Act) -> bool) -> (Image, Promises) {
        let mut disk = Disk::holding(&self.begins_with);
        let mut promises = self.promises.clone();
        for act in &self.acts {
            disk.apply(act);
            if let Act::Mark(remark) = act {
                law::note(&mut promises, remark);
            }
            if last(act) {
                break;
            }
        }
        (disk.image(Loss::Nothing), promises)
    }
}

fn digests(tree: &Path) -> BTreeSet<[u8; 32]> {
    regular_files(tree).iter().map(|path| blake3::hash(&fs::read(path).unwrap()).into()).collect()
}
