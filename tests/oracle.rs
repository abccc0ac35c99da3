//! What another owner has changes nothing for an owner: not what it is shown, told or asked for, nor the steps that its bytes take.
//!
//! One owner goes through its whole life on a host of its own and on one where another had the same bytes before; both are written down
//! and compared letter for letter.

#![cfg(test)]

#[path = "crash/trace.rs"]
#[expect(dead_code, reason = "the test of crashes uses the rest")]
mod trace;

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use support::corpus::{Random, Tensors, random_file, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::files::xattr;
use support::loopfs::LoopFs;
use support::place::Place;
use support::ran::run;
use support::site::{Page, Site};
use trace::{Act, Recorder};

const MIB: u64 = 1 << 20;
const TENSORS: usize = 6;
const TENSOR_BYTES: usize = 2 << 20;

/// What is brought in, by the same addresses on every host.
struct Corpus {
    site: Site,
    /// The very file that the other has, and one that shares most of its chunks.
    base: String,
    tuned: String,
    /// For all.
    public: String,
    /// Too much for the quota, and for the host.
    beyond_quota: String,
    beyond_host: String,
    directory: PathBuf,
    place: Place,
}

impl Corpus {
    fn new() -> Self {
        let place = Place::new();
        let tensors = Tensors::new(seed(), TENSORS, TENSOR_BYTES);
        tensors.write_safetensors(&place.join("base"));
        tensors.fine_tuned(2).write_safetensors(&place.join("tuned"));
        let directory = place.dir("directory");
        (0..40).for_each(|index| random_file(&directory.join(format!("f{index}")), seed() + index, 10_000 + index));
        tensors.write_torch_zip(&directory.join("pytorch_model.bin"));
        let site = Site::open();
        let page = |name: &str| Page::Ranged(fs::read(place.join(name)).unwrap().into());
        let noise = |mib: u64| Page::Ranged(Arc::new(Random::new(mib).bytes(usize::try_from(mib * MIB).unwrap())));
        Self {
            base: site.put("/base.safetensors", page("base")),
            tuned: site.put("/tuned.safetensors", page("tuned")),
            public: site.put("/public", noise(1)),
            beyond_quota: site.put("/beyond-quota", noise(41)),
            beyond_host: site.put("/beyond-host", noise(101)),
            site,
            directory,
            place,
        }
    }

    fn host(&self) -> Daemon {
        let owners = format!("{{ b = {} }}", 40 * MIB);
        let capacity = (100 * MIB).to_string();
        let bounds =
            [LOOPBACK, ("CKPTD_QUOTAS__OWNERS", owners.as_str()), ("CKPTD_STORE__CAPACITY", capacity.as_str())];
        let daemon = Daemon::start_with(&bounds);
        daemon.ctl(&["create", "everybody's", "--type", "web", "--uri", &self.public, "--public", "--wait"]).ok();
        daemon
    }

    /// The other has everything, and a job of its has read it.
    fn other_was_here(&self, daemon: &Daemon) {
        let create = |name: &str, url: &str| {
            daemon.ctl(&["create", name, "--type", "web", "--uri", url, "--owner", "a", "--wait"]).ok();
        };
        create("base", &self.base);
        create("tuned", &self.tuned);
        daemon.ctl(&["upload", "sent", self.directory.to_str().unwrap(), "--owner", "a"]).ok();
        let target = daemon.place().dir("others");
        daemon.ctl(&["attach", "others", "base", "--owner", "a", "--at", target.to_str().unwrap()]).ok();
        fs::read(target.join("base.safetensors")).unwrap();
        daemon.ctl(&["attach", "more", "everybody's", "--owner", "a"]).ok();
    }

    /// All that the owner `b` is shown, told and asked for, in a life of its own.
    fn life(&self, daemon: &Daemon) -> Vec<String> {
        let mut told = Told { daemon, corpus: self, lines: Vec::new() };
        let web = |name: &'static str, url: &'static str| ["create", name, "--type", "web", "--uri", url, "--wait"];
        let urls = [&self.beyond_quota, &self.base, &self.tuned, &self.beyond_host].map(|url| leak(url));
        let sent = self.directory.to_str().unwrap();
        told.ask(&web("quota", urls[0]));
        // Before it has fetched anything itself: whatever is known of the source is of another.
        told.ask(&["estimate", "quota"]);
        told.ask(&web("base", urls[1]));
        told.ask(&web("tuned", urls[2]));
        told.ask(&["upload", "sent", sent]);
        for verb in [&["get", "base"][..], &["get", "tuned"], &["get", "sent"], &["list"], &["usage"], &["status"]] {
            told.ask(verb);
        }
        told.ask(&["get", "everybody's"]);
        told.ask(&["prefetch", "tuned", "--memory"]);
        told.ask(&["estimate", "tuned"]);
        told.ask(&["remove", "base", "--yes"]);
        told.ask(&["remove", "sent", "--yes"]);
        told.ask(&["upload", "again", sent]);
        // It has one of the two still, and is told what goes.
        told.ask(&["upload", "once more", sent]);
        told.ask(&["remove", "again", "--yes"]);
        told.ask(&["remove", "once more", "--yes"]);
        told.ask(&["get", "quota"]);
        told.ask_for("c", &web("host", urls[3]));
        told.ask_for("c", &["get", "host"]);
        told.ask_for("c", &["events"]);
        told.ask(&["usage"]);
        told.ask(&["events"]);
        told.lines
    }
}

fn leak(text: &str) -> &'static str {
    text.to_owned().leak()
}

struct Told<'a> {
    daemon: &'a Daemon,
    corpus: &'a Corpus,
    lines: Vec<String>,
}

impl Told<'_> {
    fn ask(&mut self, args: &[&str]) {
        self.ask_for("b", args);
    }

    fn ask_for(&mut self, owner: &str, args: &[&str]) {
        self.corpus.site.take_sent();
        let ran = run(self.daemon.ctl_command().args(["--as", owner, "--json"]).args(args));
        let fetched = self.corpus.site.take_sent();
        let documents: Vec<_> = ran.stdout.lines().map(str::to_owned).collect();
        let documents = serde_json::from_str::<Value>(&documents.join("\n")).map_or_else(
            |_| ran.stdout.lines().map(|line| line.parse().unwrap_or(Value::Null)).collect(),
            |document| vec![document],
        );
        let shown: Vec<_> = documents.into_iter().map(|document| timeless(document).to_string()).collect();
        // Progress comes when it comes; the last line is the answer or the error.
        let said = if ran.code == Some(0) { "" } else { ran.stderr.lines().last().unwrap_or_default() };
        self.lines.push(format!("{args:?}: {:?}, {fetched} bytes fetched, {said} {}", ran.code, shown.join(" ")));
    }
}

/// A document without what no two runs have in common: ids and times. Those of events are of one owner, and hold its times.
fn timeless(document: Value) -> Value {
    const OF_A_RUN: &[&str] =
        &["id", "checkpoint", "created_at", "used_at", "at", "uptime_s", "rate_bytes_per_s", "took_ms", "fill"];
    match document {
        Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(key, value)| !OF_A_RUN.contains(&key.as_str()) || value.is_null());
            kept.map(|(key, value)| (key, timeless(value))).collect()
        }
        Value::Array(items) => items.into_iter().map(timeless).collect(),
        other => other,
    }
}

#[test]
fn an_owner_is_shown_and_told_the_same_whatever_another_has() {
    let corpus = Corpus::new();
    let alone = corpus.life(&corpus.host());
    let shared = corpus.host();
    corpus.other_was_here(&shared);
    let with_another = corpus.life(&shared);
    let differences: Vec<_> = alone.iter().zip(&with_another).filter(|(alone, shared)| alone != shared).collect();
    assert!(differences.is_empty() && alone.len() == with_another.len(), "{differences:#?}");
    // What is compared is there: bytes, refusals, figures.
    let whole = fs::metadata(corpus.place.join("base")).unwrap().len();
    // And one byte to see whether the source has ranges, and one to see that it has not changed meanwhile.
    let fetched = format!("{} bytes fetched", whole + 2);
    for words in [
        fetched.as_str(),
        "may keep 40.00 MiB",
        "this host has too little room for the checkpoint",
        "\"freed_bytes\":",
        "CHECKPOINT_FAILED",
        "CHECKPOINT_GONE",
        // Of the public one, which others use.
        "\"used_at\":null",
    ] {
        assert!(alone.iter().any(|line| line.contains(words)), "`{words}` is nowhere: {alone:#?}");
    }
}

#[test]
fn what_is_here_takes_the_same_steps_as_what_is_not() {
    let place = Place::new();
    let recorder = Recorder::new(place.path());
    let state = place.join("state");
    fs::create_dir(&state).unwrap();
    let daemon = Daemon::start_on(state.clone(), &recorder.environment(&state));
    let mut marks = recorder.marks();
    let mut bring = |name: &str, owner: &str, number: u64, bytes: u64| {
        let file = place.dir(name).join("w.bin");
        random_file(&file, seed() + number, bytes);
        marks.say(&format!("begin {name}"));
        daemon.ctl(&["upload", name, file.to_str().unwrap(), "--owner", owner]).ok();
        marks.say(&format!("ready {name}"));
    };
    // One file each: of several it is chance which are sealed together.
    for (kind, bytes) in [("small", 100_000), ("large", 9 * MIB)] {
        bring(&format!("{kind}, another's"), "a", 2 * bytes, bytes);
        bring(&format!("{kind}, known"), "b", 2 * bytes, bytes);
        bring(&format!("{kind}, fresh"), "b", 2 * bytes + 1, bytes);
    }
    let acts = recorder.acts();
    let syncs = |name: &str| {
        let at = |mark: String| acts.iter().position(|act| matches!(act, Act::Mark(said) if *said == mark)).unwrap();
        let between = &acts[at(format!("begin {name}"))..at(format!("ready {name}"))];
        // SQLite goes over its log when that has grown, whoever comes by then.
        let of_bringing = between.iter().filter(|act| !matches!(act, Act::Sync(path) if path == "catalog.db"));
        of_bringing.filter_map(Act::sync_kind).collect::<Vec<_>>()
    };
    for kind in ["small", "large"] {
        let fresh = syncs(&format!("{kind}, fresh"));
        assert!(fresh.contains(&"bytes that are filled") && fresh.contains(&"names of blobs"), "{fresh:?}");
        assert_eq!(syncs(&format!("{kind}, known")), fresh, "{kind}");
    }
}

#[test]
fn a_job_is_not_told_that_a_file_shares_its_bytes() {
    // Both fit as they come, 48 MiB each. Beside the 52 that are left of them there is too little room below the high watermark, which is at 90, to
    // copy back the 44 that are shared: it stays compact.
    let disk = LoopFs::ext4(300);
    let capacity = (100 * MIB).to_string();
    let daemon = Daemon::start_on(disk.dir("state"), &[("CKPTD_STORE__CAPACITY", capacity.as_str())]);
    let sources = Place::new();
    let tensors = Tensors::new(seed(), 12, 4 << 20);
    tensors.write_safetensors(&sources.join("base/model.safetensors"));
    tensors.fine_tuned(3).write_safetensors(&sources.join("tuned/model.safetensors"));
    for (name, owner) in [("base", "a"), ("tuned", "b")] {
        daemon.ctl(&["upload", name, sources.join(name).to_str().unwrap(), "--owner", owner]).ok();
    }
    let show = |name: &str, owner: &str| {
        let target = daemon.place().dir(&format!("at-{name}"));
        daemon.ctl(&["attach", name, name, "--owner", owner, "--at", target.to_str().unwrap()]).ok();
        target.join("model.safetensors")
    };
    let (whole, compact) = (show("base", "a"), show("tuned", "b"));
    let state = |file: &Path| xattr(file, "user.ckptd.state");
    // A job is in a mount namespace of its own.
    let state_in_a_job = |file: &Path| {
        let file = file.to_owned();
        let job = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let closed = xattr(&file, "user.ckptd.state");
            let open = fs::File::open(&file).unwrap();
            let told = (closed, xattr(&file, "user.ckptd.state"));
            drop(open);
            told
        });
        job.join().unwrap()
    };
    let (told_of_whole, told_of_compact) = (state_in_a_job(&whole), state_in_a_job(&compact));
    assert_eq!(told_of_whole, told_of_compact);
    assert_eq!(told_of_whole.0, state(&whole));
    assert_eq!(state(&compact), "daemon", "it is not compact, and shows nothing");
}
