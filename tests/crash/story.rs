//! What the daemon does while it is recorded: everything that changes the state directory, a few times over.
//!
//! It is told in legs. A leg is one daemon from its start to its end; it begins with what an earlier one has left, two of them with what
//! a crash in the middle of an earlier one leaves.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::disk::{Disk, Image, Loss};
use crate::law::{self, Promise, Promises, Rot, Truth, blob_path};
use crate::support::corpus::{Random, Tensors, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::regular_files;
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::site::{Page, Site};
use crate::support::way::{Break, Way};
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
/// Bytes rot, and are put right from a copy, saved from a home that is lost, or fetched again; an ingest that failed is retried.
pub(crate) const MENDS: usize = 5;
/// The store fills: copies are given up, then a checkpoint.
pub(crate) const PRESSED: usize = 6;
/// A tree is sent; its sender and the daemon are killed in the middle of a large file.
pub(crate) const SENDS: usize = 7;

/// What a site has, as trees of files of so many MiB.
const FETCHED: &[(&str, &[(&str, usize)])] = &[
    ("w", &[("w.bin", 20)]),
    ("v", &[("v1.bin", 1), ("v2.bin", 5)]),
    ("r", &[("r1.bin", 5), ("r2.bin", 5)]),
    ("p", &[("p.bin", 6)]),
    ("x", &[("x.bin", 8)]),
    ("y", &[("y.bin", 6)]),
];
/// The large file of what is sent, and where on the way the sender stands still.
const SENT: usize = 26 * MIB;
const STALLED: u64 = 20 * MIB as u64;
/// What a source that gives out is asked, so that it is soon given up.
const FEW_ATTEMPTS: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "3");
/// From what is kept to the high watermark: `p` and `x` come to more, by half a MiB, and so does `y` after them, whatever goes for them.
const SLACK: usize = 14 * MIB - MIB / 2;

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
    /// Nobody else serves what is not captured or uploaded.
    site: Site,
}

impl Sources {
    /// All of them, and what there is at them.
    fn new() -> (Self, Truth) {
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
        // What is sent before the large file has no bytes that could be lost in its stead.
        fs::create_dir_all(place.join("u/a")).unwrap();
        fs::create_dir_all(place.join("u/z")).unwrap();
        for index in 0..10 {
            fs::write(place.join(&format!("u/a/{index}")), b"").unwrap();
            fs::write(place.join(&format!("u/z/{index}")), random.bytes(20_000 * (index + 1))).unwrap();
        }
        let large = Arc::new(random.bytes(SENT));
        fs::write(place.join("u/large"), large.as_slice()).unwrap();

        let site = Site::open();
        let mut truth = Truth::default();
        truth.filling.insert("large".into(), large);
        for (name, files) in FETCHED {
            fs::create_dir_all(place.join(name)).unwrap();
            for (file, mib) in *files {
                let bytes = Arc::new(random.bytes(mib * MIB));
                fs::write(place.join(name).join(file), bytes.as_slice()).unwrap();
                site.put(&format!("/{name}/{file}"), Page::Ranged(bytes.clone()));
                truth.filling.insert((*file).into(), bytes);
            }
            let links: String = files.iter().map(|(file, _)| format!("<li><a href=\"{file}\">{file}</a>")).collect();
            let index = format!("<html><title>Directory listing for /</title>{links}</html>");
            site.put(&format!("/{name}/"), Page::Html(index.into_bytes().into()));
        }
        for name in ["a", "b", "c", "u"].into_iter().chain(FETCHED.iter().map(|(name, _)| *name)) {
            truth.trees.insert(name.into(), digests(&place.join(name)));
        }
        truth.trees.insert("a2".into(), truth.trees["a"].clone());
        (Self { place, site }, truth)
    }

    /// Has one of [`FETCHED`] filled.
    fn create(&self, daemon: &Daemon, name: &str) {
        let url = self.site.url(&format!("/{name}/"));
        daemon.ctl(&["create", name, "--type", "web", "--uri", &url]).ok();
    }
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
        let (sources, mut truth) = Sources::new();
        let place = &sources.place;

        let mut kept_bytes = 0;
        let keeps = record(Leg::default().end(), &[], |daemon, marks| {
            kept_bytes = keep_and_share(daemon, marks, place);
        });
        let interrupted = record(keeps.end(), &[], |daemon, marks| {
            sources.site.limit(5 * MIB as u64);
            interrupt(daemon, marks, &sources);
        });
        sources.site.limit(0);
        let removes = record(interrupted.end(), &[], |daemon, marks| resume_and_remove(daemon, marks, place));
        let publishes = |act: &Act| matches!(act, Act::Rename { to, .. } if to.starts_with("blobs/"));
        let undoes = record(keeps.stopped_after(publishes), &[], |daemon, marks| {
            daemon.wait_state("a", "ready", LIMIT);
            marks.say("ready a");
            daemon.stop();
        });
        let unlinks = |act: &Act| matches!(act, Act::Unlink(path) if path.starts_with("blobs/"));
        let broken_off = removes.stopped_after(unlinks);
        let leaving = broken_off.1.iter().find(|(_, promise)| **promise == Promise::Leaving);
        let leaving = leaving.unwrap().0.clone();
        let finishes = record(broken_off, &[], |daemon, marks| {
            wait_until("it is gone", LIMIT, || daemon.rows("list").iter().all(|row| row["name"] != *leaving));
            marks.say(&format!("gone {leaving}"));
            wait_until("its bytes are back", LIMIT, || freed(daemon, "interrupted removals"));
            daemon.stop();
        });
        let mends =
            record(keeps.end(), &[FEW_ATTEMPTS], |daemon, marks| truth.rots = mend_and_retry(daemon, marks, &sources));
        let pressed = press_on(&keeps, kept_bytes, &sources);
        let sends = record(Leg::default().end(), &[], |daemon, marks| send(daemon, marks, place));
        let sent = record(sends.end(), &[], |daemon, marks| {
            daemon.ctl(&["upload", "u", place.join("u").to_str().unwrap(), "--id", "u"]).ok();
            marks.say("ready u");
            remove(daemon, marks, "u");
            daemon.stop();
        });
        let legs = vec![keeps, interrupted, removes, undoes, finishes, mends, pressed, sends, sent];
        Self { legs, truth: Arc::new(truth), sources }
    }
}

/// An upload that stands still in a large file for so long that what came of it is recorded, and the end of both who send and take.
fn send(daemon: &mut Daemon, marks: &mut Marks, place: &Place) {
    let way = Way::to(daemon, &[Break::Stall(STALLED)]);
    marks.say("begin u");
    let client = way.spawn(&["upload", "u", place.join("u").to_str().unwrap(), "--id", "u"]);
    wait_until("some of it is durable", LIMIT, || {
        daemon.rows("list").iter().any(|row| row["name"] == "u") && daemon.recorded_bytes("u") >= 12 * MIB as u64
    });
    client.kill();
    daemon.kill9();
}

/// Captures, an upload, bytes shared and made whole again for a job; bytes that it comes to.
fn keep_and_share(daemon: &mut Daemon, marks: &mut Marks, place: &Place) -> usize {
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
    let bytes = daemon.json(&["usage"])["physical_bytes"].as_u64().unwrap();
    daemon.stop();
    usize::try_from(bytes).unwrap()
}

/// A slow source, a job that reads what it sends, and the end in the middle.
fn interrupt(daemon: &mut Daemon, marks: &mut Marks, sources: &Sources) {
    marks.say("begin w");
    sources.create(daemon, "w");
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

/// Rot that a copy puts right; the copy given up; rot that costs the home, and not who borrows from it; rot that its source makes good; and a source
/// that gives out half-way. What rotted when.
fn mend_and_retry(daemon: &mut Daemon, marks: &mut Marks, sources: &Sources) -> Vec<Rot> {
    let of_a = sources.place.join("a/model.safetensors");
    let size = usize::try_from(fs::metadata(&of_a).unwrap().len()).unwrap();
    // In the last of four tensors of 2 MiB, which `b` has too.
    let shared = rot(daemon, marks, &of_a, size - MIB);
    assert_eq!(daemon.json(&["scrub", "--full-rate", "--wait"])["healed"], 1);

    marks.say("punch b");
    daemon.ctl(&["evict", "--until", "900TB"]).ok();
    assert_eq!(daemon.json(&["usage"])["duplicate_bytes"], 0);
    // In the second, which it has not.
    marks.say("lose a");
    let own = rot(daemon, marks, &of_a, size - 5 * MIB);
    assert_eq!(daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(6));
    daemon.ctl(&["retry", "a"]).ok();
    until_whole(daemon, "a");
    marks.say("ready a");

    marks.say("begin v");
    sources.create(daemon, "v");
    until_whole(daemon, "v");
    marks.say("ready v");
    marks.say("lose v");
    let fetched = rot(daemon, marks, &sources.place.join("v/v2.bin"), 3 * MIB);
    assert_eq!(daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(6));
    until_whole(daemon, "v");
    marks.say("ready v");

    let second = fs::read(sources.place.join("r/r2.bin")).unwrap();
    sources.site.put("/r/r2.bin", Page::Short(Arc::new(second.clone()), u64::MAX));
    marks.say("begin r");
    sources.create(daemon, "r");
    daemon.wait_state("r", "failed", LIMIT);
    sources.site.put("/r/r2.bin", Page::Ranged(second.into()));
    marks.say("retry r");
    daemon.ctl(&["retry", "r"]).ok();
    until_whole(daemon, "r");
    marks.say("ready r");
    daemon.stop();
    vec![shared, own, fetched]
}

/// Lets a byte of the blob that has a file's bytes rot.
fn rot(daemon: &Daemon, marks: &mut Marks, file: &Path, at: usize) -> Rot {
    let bytes = fs::read(file).unwrap();
    let blob = blake3::hash(&bytes).into();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    marks.rot(daemon.state(), &blob_path(&blob), at);
    Rot { blob, at, right: bytes[at], since_ms: i64::try_from(since.as_millis()).unwrap() }
}

fn until_whole(daemon: &Daemon, name: &str) {
    wait_until(&format!("`{name}` is whole"), LIMIT, || {
        let record = daemon.json(&["get", name]);
        assert_ne!(record["state"], "failed", "{record}");
        record["state"] == "ready" && record["error"].is_null()
    });
}

/// [`press`], in a store whose high watermark is not far from what it keeps.
fn press_on(keeps: &Leg, kept_bytes: usize, sources: &Sources) -> Leg {
    let high = kept_bytes + SLACK;
    let capacity = 2 * high;
    // In thousandths, as it is kept.
    let low = (high - 4 * MIB) * 1000 / capacity;
    let (capacity, low) = (capacity.to_string(), format!("0.{low:03}"));
    let watermarks = [
        ("CKPTD_STORE__CAPACITY", capacity.as_str()),
        ("CKPTD_STORE__HIGH_WATERMARK", "0.5"),
        ("CKPTD_STORE__LOW_WATERMARK", &low),
    ];
    record(keeps.end(), &watermarks, |daemon, marks| press(daemon, marks, sources))
}

/// More and more: above the high watermark copies that nobody reads go, and after them whatever was used longest ago.
fn press(daemon: &mut Daemon, marks: &mut Marks, sources: &Sources) {
    for (name, gives_up) in [("p", None), ("x", Some("copies")), ("y", Some("p"))] {
        if gives_up == Some("p") {
            marks.say("evict p");
        }
        marks.say(&format!("begin {name}"));
        sources.create(daemon, name);
        daemon.wait_state(name, "ready", LIMIT);
        match gives_up {
            Some("copies") => {
                wait_until("copies go", LIMIT, || daemon.json(&["usage"])["duplicate_bytes"] == 0);
                assert_eq!(daemon.json(&["get", "p"])["state"], "ready", "they do");
            }
            Some(other) => {
                wait_until("it goes", LIMIT, || daemon.json(&["get", other])["state"] == "evicted");
            }
            None => {}
        }
        marks.say(&format!("ready {name}"));
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
fn record(
    (begins_with, promises): (Image, Promises),
    more: &[(&'static str, &str)],
    play: impl FnOnce(&mut Daemon, &mut Marks),
) -> Leg {
    let place = Place::new();
    let state = place.join("state");
    begins_with.write_to(&state);
    let recorder = Recorder::new(place.path());
    let environment: Vec<_> =
        recorder.environment(&state).into_iter().chain([LOOPBACK]).chain(more.iter().copied()).collect();
    let mut daemon = Daemon::start_on(state.clone(), &environment);
    play(&mut daemon, &mut recorder.marks());
    let leg = Leg { begins_with, promises, acts: recorder.acts() };
    drop(daemon);
    let differences = leg.end().0.differences(&Image::of(&state));
    // What a killed daemon did last may have gone without a record.
    let killed = leg.acts.iter().any(|act| matches!(act, Act::Mark(mark) if mark == "begin w" || mark == "begin u"));
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
