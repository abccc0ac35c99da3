//! What the daemon does while it is recorded: everything that changes the state directory, a few times over.
//!
//! It is told in legs. A leg is one daemon from its start to its end; it begins with what the one before had left.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::disk::{Disk, Image, Loss};
use crate::law::Truth;
use crate::support::corpus::{Random, Tensors, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::{regular_files, xattr};
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::site::{Page, Site};
use crate::trace::{Act, Marks, Recorder};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// One daemon's life.
pub(crate) struct Leg {
    pub(crate) begins_with: Image,
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

        let first = record(&Image::default(), |daemon, marks| keep_and_share(daemon, marks, &place));
        let second = record(&first.ends_with(), |daemon, marks| {
            site.limit(5 * MIB as u64);
            interrupt(daemon, marks, &url);
        });
        site.limit(0);
        let third = record(&second.ends_with(), |daemon, marks| resume_and_remove(daemon, marks, &place));
        Self { legs: vec![first, second, third], truth: Arc::new(truth), sources: Sources { place, _site: site } }
    }
}

/// Captures, an upload, bytes shared and made whole again for a job.
fn keep_and_share(daemon: &mut Daemon, marks: &mut Marks, place: &Place) {
    for name in ["a", "b"] {
        marks.say(&format!("begin {name}"));
        daemon.capture(name, &place.join(name));
        marks.say(&format!("ready {name}"));
    }
    let target = daemon.attach("job", "b");
    wait_until("the borrowed bytes are back", LIMIT, || {
        daemon.json(&["usage"])["duplicate_bytes"].as_u64().is_some_and(|bytes| bytes > 5 * MIB as u64)
    });
    assert_eq!(xattr(&target.join("f0"), "user.ckptd.state"), "passthrough");
    daemon.ctl(&["detach", "job"]).ok();
    daemon.ctl(&["release", "job"]);
    marks.say("begin c");
    daemon.ctl(&["upload", "c", place.join("c").to_str().unwrap()]).ok();
    marks.say("ready c");
    daemon.stop();
}

/// A slow source, and the end while it sends.
fn interrupt(daemon: &mut Daemon, marks: &mut Marks, url: &str) {
    marks.say("begin w");
    daemon.ctl(&["create", "w", "--type", "web", "--uri", url]).ok();
    wait_until("half of it is here", LIMIT, || daemon.bytes_done("w") >= 12 * MIB as u64);
    daemon.kill9();
}

/// The rest of it; then removals: of what others borrow from, of what comes again, of everything.
fn resume_and_remove(daemon: &mut Daemon, marks: &mut Marks, place: &Place) {
    daemon.wait_state("w", "ready", LIMIT);
    marks.say("ready w");
    remove(daemon, marks, "a");
    marks.say("begin a2");
    daemon.capture("a2", &place.join("a"));
    marks.say("ready a2");
    for name in ["b", "w", "c"] {
        remove(daemon, marks, name);
    }
    daemon.stop();
}

fn remove(daemon: &Daemon, marks: &mut Marks, name: &str) {
    marks.say(&format!("remove {name}"));
    daemon.ctl(&["remove", name, "--yes"]).ok();
    marks.say(&format!("gone {name}"));
}

/// Runs a daemon on `begins_with` and writes down what it does. `play` ends it.
fn record(begins_with: &Image, play: impl FnOnce(&mut Daemon, &mut Marks)) -> Leg {
    let place = Place::new();
    let state = place.join("state");
    begins_with.write_to(&state);
    let recorder = Recorder::new(place.path());
    let environment: Vec<_> = recorder.environment(&state).into_iter().chain([LOOPBACK]).collect();
    let mut daemon = Daemon::start_on(state.clone(), &environment);
    play(&mut daemon, &mut recorder.marks());
    let leg = Leg { begins_with: begins_with.clone(), acts: recorder.acts() };
    drop(daemon);
    let differences = leg.ends_with().differences(&Image::of(&state));
    // Of what a killed daemon did last, one thing on each of its threads may have gone without a record.
    let most = if leg.acts.iter().any(|act| matches!(act, Act::Mark(mark) if mark == "begin w")) { 1 } else { 0 };
    assert!(differences.len() <= most, "the records do not tell everything: {differences:?}");
    leg
}

impl Leg {
    fn ends_with(&self) -> Image {
        let mut disk = Disk::holding(&self.begins_with);
        self.acts.iter().for_each(|act| disk.apply(act));
        disk.image(Loss::Nothing)
    }
}

fn digests(tree: &Path) -> std::collections::BTreeSet<[u8; 32]> {
    regular_files(tree).iter().map(|path| blake3::hash(&fs::read(path).unwrap()).into()).collect()
}
