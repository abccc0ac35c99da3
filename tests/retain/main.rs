//! What goes when room is needed, what stays, and that what went comes back as it was.

#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod again;
mod full;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use support::corpus::{Tensors, random_file, seed};
use support::daemon::Daemon;
use support::files::{assert_same_tree, regular_files};
use support::place::Place;
use support::ran::{Ran, wait_until};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(180);
const MODELS: &str = "CKPTD_DATASTORES__MODELS__PATH";
const CAPACITY: &str = "CKPTD_STORE__CAPACITY";

/// A datastore of trees; checkpoints are copies of them, so that they can be fetched again.
struct Models(Place);

impl Models {
    fn new() -> Self {
        Self(Place::new())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A tree of two files, `mib` MiB in all, like no other.
    fn tree(&self, name: &str, mib: u64) -> PathBuf {
        let tree = self.0.dir(name);
        let own = name.bytes().fold(seed(), |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        random_file(&tree.join("w.bin"), own, (mib - 1) * MIB);
        random_file(&tree.join("deep.bin"), own ^ (1 << 40), MIB);
        tree
    }

    fn daemon(&self, capacity_mib: u64, more: &[(&'static str, &str)]) -> Daemon {
        let capacity = (capacity_mib * MIB).to_string();
        let mut env = vec![(MODELS, self.0.path().to_str().unwrap()), (CAPACITY, capacity.as_str())];
        env.extend(more);
        Daemon::start_with(&env)
    }
}

fn create(daemon: &Daemon, name: &str) -> Ran {
    let path = format!("path=/{name}");
    let line = ["create", name, "--type", "regional", "--uri", "models", "--option", &path, "--option", "copy=true"];
    daemon.ctl(&[&line[..], &["--wait"]].concat())
}

fn record(daemon: &Daemon, name: &str) -> Value {
    daemon.json(&["get", name])
}

fn states(daemon: &Daemon, names: &[&str]) -> Vec<String> {
    names.iter().map(|name| record(daemon, name)["state"].as_str().unwrap().to_owned()).collect()
}

fn events(daemon: &Daemon, kind: &str) -> Vec<String> {
    let of_kind = daemon.rows("events").into_iter().filter(|event| event["kind"] == kind);
    of_kind.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

fn assert_reads(daemon: &Daemon, job: &str, name: &str, tree: &Path) {
    assert_same_tree(tree, &daemon.attach(job, name));
    daemon.ctl(&["release", job]).ok();
}

#[test]
fn the_least_recently_used_makes_room_and_comes_back_as_it_was() {
    let models = Models::new();
    let trees: Vec<_> = ["a", "b", "c", "d"].iter().map(|name| models.tree(name, 24)).collect();
    let daemon = models.daemon(95, &[]);
    for name in ["a", "b", "c"] {
        create(&daemon, name).ok();
    }
    let before = record(&daemon, "b");
    assert_reads(&daemon, "job", "a", &trees[0]);
    create(&daemon, "d").ok();
    assert_eq!(states(&daemon, &["a", "b", "c", "d"]), ["ready", "evicted", "ready", "ready"]);
    let gone = record(&daemon, "b");
    for key in ["id", "digest", "revision", "logical_bytes", "files", "source"] {
        assert_eq!(gone[key], before[key], "{key}");
    }
    assert_eq!((&gone["physical_bytes"], &gone["unique_bytes"]), (&0.into(), &0.into()), "{gone}");
    let messages = events(&daemon, "CHECKPOINT_EVICTED");
    assert!(messages.len() == 1 && messages[0].contains("`b`") && messages[0].contains("24.00 MiB"), "{messages:?}");
    assert_eq!(events(&daemon, "SPACE_MADE").len(), 1);
    assert_eq!(daemon.json(&["estimate", "b"])["missing_bytes"], 24 * MIB);

    assert_reads(&daemon, "job", "b", &trees[1]);
    assert_eq!(record(&daemon, "b")["digest"], before["digest"]);
    assert_eq!(states(&daemon, &["a", "c", "d"]), ["ready", "evicted", "ready"], "c was not used since it came");
}

#[test]
fn above_the_high_watermark_the_store_is_brought_down_to_the_low_one() {
    let models = Models::new();
    let names = ["a", "b", "c", "d", "e"];
    names.iter().for_each(|name| drop(models.tree(name, 16)));
    let watermarks = [("CKPTD_STORE__HIGH_WATERMARK", "0.7"), ("CKPTD_STORE__LOW_WATERMARK", "0.5")];
    let daemon = models.daemon(100, &watermarks);
    for name in &names[..4] {
        create(&daemon, name).ok();
    }
    assert_eq!(states(&daemon, &names[..4]), ["ready"; 4], "64 of 100 MiB are below 70");
    // It is above 70 before all of it is here: two have to go whenever that is seen.
    create(&daemon, "e").ok();
    wait_until("the store is at its low watermark", PATIENCE, || {
        // The bytes follow the records.
        states(&daemon, &names) == ["evicted", "evicted", "ready", "ready", "ready"]
            && daemon.json(&["usage"])["physical_bytes"].as_u64().unwrap() <= 50 * MIB
    });
    assert_eq!(events(&daemon, "SPACE_LOW"), [] as [&str; 0]);
}

#[test]
fn what_jobs_have_what_is_pinned_and_what_was_sent_stays() {
    let models = Models::new();
    let trees: Vec<_> = ["leased", "pinned", "sent"].iter().map(|name| models.tree(name, 24)).collect();
    models.tree("more", 40);
    let daemon = models.daemon(96, &[]);
    create(&daemon, "leased").ok();
    daemon.ctl(&["reserve", "job", "leased"]).ok();
    create(&daemon, "pinned").ok();
    daemon.ctl(&["pin", "pinned"]).ok();
    daemon.ctl(&["upload", "sent", trees[2].to_str().unwrap()]).ok();
    let usage = daemon.json(&["usage"]);
    for key in ["leased_bytes", "pinned_bytes", "not_refetchable_bytes"] {
        assert!(usage[key].as_u64().is_some_and(|bytes| (24 * MIB..25 * MIB).contains(&bytes)), "{key}: {usage}");
    }

    let words = ["in use by jobs", "is pinned", "cannot be fetched again", "24.0"];
    create(&daemon, "more").refused(&[5], &words);
    assert_eq!(states(&daemon, &["leased", "pinned", "sent"]), ["ready"; 3]);
    for (name, words) in [("leased", "a job has a right"), ("pinned", "is pinned"), ("sent", "was sent or captured")] {
        daemon.ctl(&["evict", name, "--force"]).refused(&[4], &[words]);
    }
    daemon.ctl(&["unpin", "pinned"]).ok();
    daemon.ctl(&["retry", "more"]).ok();
    wait_until("it has room", PATIENCE, || states(&daemon, &["more"]) == ["ready"]);
    assert_eq!(states(&daemon, &["leased", "pinned", "sent"]), ["ready", "evicted", "ready"]);
    wait_until("it is said that nothing more can go", PATIENCE, || events(&daemon, "SPACE_LOW").len() == 1);
    assert_same_tree(&trees[0], &daemon.attach("job", "leased"));
    assert_reads(&daemon, "other", "sent", &trees[2]);
}

#[test]
fn an_upload_makes_room_for_itself() {
    let models = Models::new();
    let sent = models.tree("sent", 24);
    for name in ["a", "b", "c"] {
        models.tree(name, 24);
    }
    let daemon = models.daemon(90, &[]);
    for name in ["a", "b", "c"] {
        create(&daemon, name).ok();
    }
    daemon.ctl(&["upload", "sent", sent.to_str().unwrap()]).ok();
    assert_eq!(states(&daemon, &["b", "c", "sent"])[2], "ready");
    assert_eq!(states(&daemon, &["a"]), ["evicted"]);
    assert_reads(&daemon, "job", "sent", &sent);
}

#[test]
fn what_is_too_large_for_the_store_evicts_nothing() {
    let models = Models::new();
    models.tree("a", 24);
    models.tree("huge", 100);
    let daemon = models.daemon(96, &[]);
    create(&daemon, "a").ok();
    create(&daemon, "huge").refused(&[5], &["could be evicted, which is not enough"]);
    assert_eq!(states(&daemon, &["a"]), ["ready"]);
}

#[test]
fn an_operator_evicts_what_is_named_or_so_much_that_there_is_room() {
    let models = Models::new();
    for name in ["a", "b", "c"] {
        models.tree(name, 16);
    }
    let daemon = models.daemon(200, &[]);
    for name in ["a", "b", "c"] {
        create(&daemon, name).ok();
    }
    let shown = daemon.json(&["evict", "b", "--dry-run"]);
    assert_eq!((&shown["evicted"][0]["name"], &shown["dry_run"]), (&"b".into(), &true.into()), "{shown}");
    assert_eq!(states(&daemon, &["a", "b", "c"]), ["ready"; 3]);

    let evicted = daemon.json(&["evict", "b"]);
    assert!(evicted["freed_bytes"].as_u64().is_some_and(|bytes| bytes >= 16 * MIB), "{evicted}");
    daemon.ctl(&["evict", "b"]).ok();
    assert_eq!(states(&daemon, &["a", "b", "c"]), ["ready", "evicted", "ready"]);
    let enough = daemon.json(&["evict", "--until", "180MiB"]);
    assert_eq!((enough["evicted"].as_array().unwrap().len(), &enough["evicted"][0]["name"]), (1, &"a".into()));
    assert_eq!(enough["lacking_bytes"], 0);
    let short = daemon.json(&["evict", "--until", "2GiB"]);
    assert!(short["lacking_bytes"].as_u64().unwrap() > 0, "{short}");
    assert_eq!(states(&daemon, &["a", "b", "c"]), ["evicted"; 3]);
    wait_until("no blob is left", PATIENCE, || regular_files(&daemon.state().join("blobs")).is_empty());
    daemon.ctl(&["evict", "nobody"]).refused(&[3], &["nobody"]);
}

/// Checkpoints `x` and `y` of 16 MiB, of which `y` borrows 12.
fn create_related(models: &Models, daemon: &Daemon) {
    let base = Tensors::new(seed(), 4, 4 << 20);
    base.write_safetensors(&models.0.dir("x").join("model.safetensors"));
    base.fine_tuned(1).write_safetensors(&models.0.dir("y").join("model.safetensors"));
    for name in ["x", "y"] {
        create(daemon, name).ok();
    }
}

#[test]
fn what_a_served_fine_tune_borrows_from_stays_and_keeps_no_other_from_going() {
    let models = Models::new();
    for name in ["idle", "more"] {
        models.tree(name, 24);
    }
    let daemon = models.daemon(60, &[]);
    create_related(&models, &daemon);
    create(&daemon, "idle").ok();
    let at = daemon.attach("job", "y");
    let busy = ["files are open", "another checkpoint"];
    daemon.ctl(&["evict", "x"]).refused(&[4], &busy);
    let shown = daemon.json(&["evict", "--until", "20MiB", "--dry-run"]);
    assert_eq!(shown["evicted"][0]["name"], "idle", "{shown}");
    create(&daemon, "more").ok();
    assert_eq!(states(&daemon, &["x", "y", "idle", "more"]), ["ready", "ready", "evicted", "ready"]);
    assert_same_tree(&models.path("y"), &at);

    // A file that outlives its job's right.
    let open = std::fs::File::open(at.join("model.safetensors")).unwrap();
    daemon.ctl(&["release", "job"]).ok();
    for name in ["x", "y"] {
        daemon.ctl(&["evict", name]).refused(&[4], &busy);
    }
    drop(open);
    wait_until("it is closed", PATIENCE, || daemon.ctl(&["evict", "x"]).code == Some(0));
    assert_eq!(states(&daemon, &["x"]), ["evicted"]);
    assert_reads(&daemon, "again", "y", &models.path("y"));
}

fn duplicate_bytes(daemon: &Daemon) -> u64 {
    daemon.json(&["usage"])["duplicate_bytes"].as_u64().unwrap()
}

#[test]
fn what_is_read_is_made_whole_below_the_high_watermark_only() {
    let models = Models::new();
    let daemon = models.daemon(34, &[]);
    create_related(&models, &daemon);
    let at = daemon.attach("job", "y");
    wait_until("it is left as it is", PATIENCE, || daemon.stderr().contains("stay compact for want of space"));
    assert_eq!(duplicate_bytes(&daemon), 0);
    assert_same_tree(&models.path("y"), &at);
    assert_eq!(states(&daemon, &["x", "y"]), ["ready"; 2]);
}

#[test]
fn copies_that_nobody_reads_any_more_go_before_any_checkpoint() {
    let models = Models::new();
    models.tree("big", 32);
    let daemon = models.daemon(60, &[]);
    create_related(&models, &daemon);
    daemon.attach("job", "y");
    wait_until("it is whole", PATIENCE, || duplicate_bytes(&daemon) >= 12 * MIB);
    daemon.ctl(&["release", "job"]).ok();
    wait_until("its copies may go", PATIENCE, || {
        daemon.json(&["evict", "--until", "30MiB", "--dry-run"])["duplicate_bytes"].as_u64().unwrap() > 0
    });
    create(&daemon, "big").ok();
    assert_eq!((duplicate_bytes(&daemon), states(&daemon, &["x", "y"])), (0, vec!["ready".to_owned(); 2]));
    assert_eq!(events(&daemon, "CHECKPOINT_EVICTED"), [] as [&str; 0]);
    assert_reads(&daemon, "again", "y", &models.path("y"));
}
