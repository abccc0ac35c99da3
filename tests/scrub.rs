//! What rots at rest is found, put right where there is another copy, and never given to a reader where there is none.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use support::corpus::{Tensors, random_file, seed};
use support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use support::files::{assert_same_file, b3sum, regular_files};
use support::ran::{run, run_for, wait_until};
use support::rot::{blob_of, flip};
use support::site::{Page, Site};
use support::steady::Readers;

const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
/// Within the first tensor of a file of theirs.
const SPOT: u64 = 3 * MIB;
/// So that the scrubs by hand are the only ones.
const BY_HAND: (&str, &str) = ("CKPTD_SCRUB__RATE", "0");

#[test]
fn rot_is_put_right_from_the_copy_that_another_checkpoint_has() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH, BY_HAND]);
    let (base, tuned) = two_alike(&daemon);
    daemon.attach("job", "tuned");
    wait_until("the borrowed bytes are back", LIMIT, || {
        daemon.json(&["usage"])["duplicate_bytes"].as_u64().is_some_and(|bytes| bytes > 4 * MIB)
    });
    let clean = scrub(&daemon, &[]);
    assert_eq!((&clean["healed"], &clean["lost"], &clean["files"]), (&0.into(), &0.into(), &2.into()), "{clean}");
    assert_eq!(clean["bytes"], clean["total_bytes"], "{clean}");

    let theirs = base.parent().unwrap().to_str().unwrap();
    daemon.ctl(&["upload", "theirs", theirs, "--owner", "team"]).ok();
    flip(&blob_of(&daemon, &base), SPOT);
    let healed = scrub(&daemon, &["base"]);
    assert_eq!((&healed["healed"], &healed["lost"], &healed["files"]), (&1.into(), &0.into(), &1.into()), "{healed}");
    // That somebody else has the same is for operators to know.
    assert!(told_to(&daemon, "team", "BYTES_ROTTEN").is_empty());
    let told = told(&daemon);
    for name in ["base", "theirs"] {
        let words = format!("`model.safetensors` of `{name}`");
        assert!(told.len() == 2 && told.iter().any(|message| message.contains(&words)), "{told:?}");
    }
    assert_same_file(&base, &blob_of(&daemon, &base));
    let target = daemon.attach("reader", "base");
    assert_eq!(b3sum(&target.join("model.safetensors")), b3sum(&base));

    // The copy itself, from what it is a copy of.
    flip(&blob_of(&daemon, &tuned), SPOT);
    assert_eq!(scrub(&daemon, &[])["healed"], 1);
    assert_same_file(&tuned, &blob_of(&daemon, &tuned));
    assert!(!regular_files(&daemon.state().join("quarantine")).is_empty(), "what was found is kept");
}

#[test]
fn what_is_lost_is_an_error_for_readers_until_a_retry_fetches_it() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH, BY_HAND]);
    let source = daemon.place().dir("source");
    for name in ["one", "two"] {
        random_file(&source.join(name), seed() ^ name.len() as u64 ^ u64::from(name.as_bytes()[0]), 2 * MIB);
    }
    daemon.capture("m", &source);
    let target = daemon.attach("job", "m");
    let open = File::open(target.join("one")).unwrap();
    flip(&blob_of(&daemon, &source.join("one")), MIB);

    let ran = daemon.ctl(&["scrub", "--full-rate", "--wait"]);
    assert_eq!(ran.code, Some(6), "{ran}");
    assert!(told(&daemon).iter().any(|message| message.contains("`one` of `m`") && message.contains("lost")));
    let record = daemon.json(&["get", "m"]);
    assert_eq!((&record["state"], &record["error"]["reason"]), (&"ready".into(), &"BYTES_ROTTEN".into()), "{record}");
    let mut byte = [0];
    let refused = open.read_exact_at(&mut byte, MIB).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EIO), "who has it open");
    assert!(fs::read(target.join("one")).is_err(), "who opens it");
    assert_same_file(&source.join("two"), &target.join("two"));
    drop(open);

    daemon.ctl(&["retry", "m"]).ok();
    wait_until("it is whole again", LIMIT, || {
        let record = daemon.json(&["get", "m"]);
        assert_ne!(record["state"], "failed", "{record}");
        record["state"] == "ready" && record["error"].is_null()
    });
    assert_same_file(&source.join("one"), &blob_of(&daemon, &source.join("one")));
    assert_same_file(&source.join("one"), &target.join("one"));
    assert_eq!(scrub(&daemon, &[])["lost"], 0);
}

#[test]
fn what_its_source_has_still_comes_back_without_a_retry() {
    let site = Site::open();
    let daemon = Daemon::start_with(&[LOOPBACK, NO_PASSTHROUGH, BY_HAND]);
    let (file, moved) = (daemon.place().join("w.bin"), daemon.place().join("moved.bin"));
    random_file(&file, seed(), 3 * MIB);
    random_file(&moved, seed() + 1, 3 * MIB);
    let page = |file: &Path| Page::Ranged(fs::read(file).unwrap().into());
    for (name, file) in [("web", &file), ("moved", &moved)] {
        let url = site.put(&format!("/{name}.bin"), page(file));
        daemon.ctl(&["create", name, "--type", "web", "--uri", &url, "--owner", "alice", "--wait"]).ok();
    }
    // The second is another by now.
    site.put("/moved.bin", page(&file));
    flip(&blob_of(&daemon, &file), MIB);
    flip(&blob_of(&daemon, &moved), MIB);
    assert_eq!(daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(6));
    wait_until("it is right again", LIMIT, || {
        let record = daemon.json(&["get", "web"]);
        assert_ne!(record["state"], "failed", "{record}");
        record["state"] == "ready" && record["error"].is_null()
    });
    assert_same_file(&file, &blob_of(&daemon, &file));
    let target = daemon.place().dir("at");
    daemon.ctl(&["attach", "job", "web", "--owner", "alice", "--at", target.to_str().unwrap()]).ok();
    let shown: Vec<_> = regular_files(&target);
    assert!(shown.len() == 1 && b3sum(&shown[0]) == b3sum(&file), "{shown:?}");
    // What is right of the other goes on being served, and a person decides.
    wait_until("it was asked for", LIMIT, || daemon.stderr().contains("do not come back"));
    let record = daemon.json(&["get", "moved"]);
    assert_eq!((&record["state"], &record["error"]["reason"]), (&"ready".into(), &"BYTES_ROTTEN".into()), "{record}");
    assert!(told_to(&daemon, "alice", "BYTES_ROTTEN").iter().all(|message| message.contains("lost")));
    assert_eq!(told_to(&daemon, "alice", "BYTES_ROTTEN").len(), 2);
}

#[test]
fn a_copy_that_was_made_of_rotten_bytes_is_found_with_them() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH, BY_HAND]);
    let (base, _) = two_alike(&daemon);
    flip(&blob_of(&daemon, &base), SPOT);
    daemon.attach("job", "tuned");
    wait_until("the borrowed bytes are back", LIMIT, || {
        daemon.json(&["usage"])["duplicate_bytes"].as_u64().is_some_and(|bytes| bytes > 4 * MIB)
    });
    let ran = daemon.ctl(&["--json", "scrub", "base", "--full-rate", "--wait"]);
    assert_eq!(ran.code, Some(6), "{ran}");
    let told = ran.json();
    assert_eq!((&told["lost"], &told["files"]), (&2.into(), &2.into()), "{told}");
    assert_eq!(told["bytes"], told["total_bytes"], "{told}");
    for name in ["base", "tuned"] {
        assert_eq!(daemon.json(&["get", name])["error"]["reason"], "BYTES_ROTTEN");
    }
}

#[test]
fn a_blob_that_can_neither_be_put_right_nor_lost_does_not_keep_others_from_being_read() {
    let daemon = Daemon::start_with(&[BY_HAND]);
    let source = daemon.place().dir("source");
    let files = ["one", "two", "three"].map(|name| source.join(name));
    (0..).zip(&files).for_each(|(index, file)| random_file(file, seed() + index, MIB));
    daemon.capture("m", &source);
    flip(&blob_of(&daemon, &files[1]), MIB / 2);
    let in_the_way = daemon.state().join("quarantine").join(b3sum(&files[1]));
    fs::create_dir(&in_the_way).unwrap();
    for _ in 0..2 {
        let ran =
            daemon.ctl(&["--json", "scrub", "--full-rate", "--wait"]).refused(&[7], &["1 file could not be read"]);
        let told = ran.json();
        assert_eq!((&told["files"], &told["unread"], &told["lost"]), (&3.into(), &1.into(), &0.into()), "{told}");
    }
    fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(scrub_lost(&daemon), 1);
}

#[test]
fn a_scrub_of_one_checkpoint_is_not_answered_by_that_of_another() {
    let mut daemon = Daemon::start_with(&[("CKPTD_SCRUB__RATE", "4194304")]);
    for (name, mib) in [("slow", 48), ("quick", 1)] {
        let source = daemon.place().dir(name);
        random_file(&source.join("w.bin"), seed() + mib, mib * MIB);
        daemon.capture(name, &source);
    }
    let began = daemon.json(&["scrub", "slow"]);
    assert_eq!(daemon.json(&["scrub", "slow"])["started_at"], began["started_at"], "the same is that one");
    daemon.ctl(&["scrub", "quick"]).refused(&[4], &["another checkpoint"]);
    let quick = daemon.json(&["scrub", "quick", "--full-rate", "--wait"]);
    assert_eq!((&quick["files"], &quick["bytes"]), (&1.into(), &MIB.into()), "{quick}");

    daemon.ctl(&["scrub", "slow"]).ok();
    let mut waits = daemon.ctl_command();
    let waits = thread::spawn(move || run_for(waits.args(["scrub", "slow", "--wait"]), LIMIT));
    wait_until("it reads", LIMIT, || daemon.json(&["status"])["scrub"]["bytes"].as_u64() > Some(0));
    daemon.stop();
    assert_eq!(waits.join().unwrap().code, Some(7), "it was cut short");
}

#[test]
fn a_damaged_manifest_is_found_and_never_served() {
    let site = Site::open();
    let daemon = Daemon::start_with(&[LOOPBACK, BY_HAND]);
    let (file, source) = (daemon.place().join("w.bin"), daemon.place().dir("source"));
    random_file(&file, seed(), MIB);
    random_file(&source.join("x.bin"), seed() + 1, MIB);
    let url = site.put("/w.bin", Page::Ranged(fs::read(&file).unwrap().into()));
    daemon.ctl(&["create", "web", "--type", "web", "--uri", &url, "--wait"]).ok();
    daemon.capture("captured", &source);
    for name in ["web", "captured"] {
        let digest = daemon.json(&["get", name])["digest"].as_str().unwrap().to_owned();
        damage_manifest(&daemon, &digest);
        daemon.ctl(&["attach", "job", name]).refused(&[6], &["damaged"]);
    }
    assert_eq!(daemon.ctl(&["scrub", "captured", "--full-rate", "--wait"]).code, Some(6));
    let kinds = |kind: &str| daemon.rows("events").into_iter().filter(|event| event["kind"] == kind).count();
    assert_eq!(kinds("MANIFEST_DAMAGED"), 1);
    assert_eq!(scrub_lost(&daemon), 2);
    assert_eq!(kinds("MANIFEST_DAMAGED"), 2, "one is told once");
    assert_eq!(daemon.json(&["get", "captured"])["error"]["reason"], "MANIFEST_DAMAGED");
    wait_until("what can be fetched again is right", LIMIT, || daemon.json(&["get", "web"])["error"].is_null());
    daemon.ctl(&["retry", "captured"]).ok();
    wait_until("the other is right", LIMIT, || daemon.json(&["get", "captured"])["error"].is_null());
    assert_eq!(scrub(&daemon, &[])["lost"], 0);
    let target = daemon.attach("job", "captured");
    assert_same_file(&source.join("x.bin"), &target.join("x.bin"));
}

#[test]
fn a_scrub_is_taken_up_where_a_dead_daemon_left_it() {
    // After the seventh, eight seconds' worth.
    const FILES: u64 = 24;
    let mut daemon = Daemon::start_with(&[("CKPTD_SCRUB__RATE", "4194304")]);
    let source = daemon.place().dir("source");
    (0..FILES).for_each(|index| random_file(&source.join(format!("f{index}")), seed() + index, 2 * MIB));
    daemon.capture("m", &source);
    daemon.ctl(&["scrub"]).ok();
    wait_until("some of it is noted", LIMIT, || daemon.json(&["status"])["scrub"]["files"].as_u64() >= Some(7));
    daemon.kill9();
    daemon.restart();
    let mut last = Value::Null;
    wait_until("the rest is read", LIMIT, || {
        last = daemon.json(&["status"])["scrub"].clone();
        last["running"] == false
    });
    let files = last["files"].as_u64().unwrap();
    assert!(last["by_hand"] == false && files > 0 && files < FILES, "{last}");
}

#[test]
fn a_scrub_by_hand_takes_the_place_of_the_usual_one_in_the_middle_of_a_large_file() {
    let mut daemon = Daemon::start_with(&[("CKPTD_SCRUB__RATE", "1048576")]);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 64 * MIB);
    daemon.capture("m", &source);
    daemon.kill9();
    // As if it had last been read long ago.
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    assert_eq!(catalog.execute("UPDATE blobs SET verified_ms = 0", []).unwrap(), 1);
    drop(catalog);
    daemon.restart();
    wait_until("the usual one is in the file", LIMIT, || {
        let usual = daemon.json(&["status"])["scrub"].clone();
        usual["running"] == true && usual["by_hand"] == false && usual["bytes"].as_u64() >= Some(MIB)
    });
    let ran = run_for(daemon.ctl_command().args(["--json", "scrub", "--full-rate", "--wait"]), LIMIT);
    let told = ran.ok().json();
    assert!(told["by_hand"] == true && told["stopped"] == false && told["running"] == false, "{told}");
    assert_eq!((&told["files"], &told["bytes"]), (&1.into(), &(64 * MIB).into()), "{told}");
}

#[test]
fn whoever_scrubs_lets_everybody_else_go_first() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH, ("CKPTD_SCRUB__RATE", "524288")]);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 16 * MIB);
    daemon.capture("m", &source);
    let bytes = Arc::new(fs::read(source.join("w.bin")).unwrap());
    let readers = Readers::start(&daemon.attach("job", "m").join("w.bin"), &bytes);
    daemon.ctl(&["scrub"]).ok();
    wait_until("it reads", LIMIT, || daemon.json(&["status"])["scrub"]["bytes"].as_u64() > Some(0));
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.server())).unwrap().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    let nice: Vec<String> = stats
        .filter(|stat| stat.contains("(scrub)"))
        // The 19th field of all, the 17th after the name.
        .map(|stat| stat.rsplit(") ").next().unwrap().split(' ').nth(16).unwrap().to_owned())
        .collect();
    // Those that it starts bear its name.
    assert!(!nice.is_empty() && nice.iter().all(|nice| nice == "19"), "{nice:?}");
    readers.go_on("a scrub");
    assert_eq!(daemon.json(&["status"])["scrub"]["running"], true);
}

/// Two fine-tunes of one base, the second of which borrows from the first.
fn two_alike(daemon: &Daemon) -> (PathBuf, PathBuf) {
    let tensors = Tensors::new(seed(), 4, 4 << 20);
    let files = ["base", "tuned"].map(|name| daemon.place().join(name).join("model.safetensors"));
    tensors.write_safetensors(&files[0]);
    tensors.fine_tuned(3).write_safetensors(&files[1]);
    for name in ["base", "tuned"] {
        daemon.capture(name, &daemon.place().join(name));
    }
    files.into()
}

fn scrub(daemon: &Daemon, more: &[&str]) -> Value {
    daemon.json(&[&["scrub", "--full-rate", "--wait"], more].concat())
}

fn told(daemon: &Daemon) -> Vec<String> {
    let events = daemon.rows("events").into_iter().filter(|event| event["kind"] == "BYTES_ROTTEN");
    events.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

/// Messages of the events of this kind that an owner sees.
fn told_to(daemon: &Daemon, owner: &str, kind: &str) -> Vec<String> {
    let seen = run(daemon.ctl_command().args(["--as", owner, "--json", "events"])).ok().json();
    let events = seen["events"].as_array().unwrap().iter().filter(|event| event["kind"] == kind);
    events.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

fn scrub_lost(daemon: &Daemon) -> u64 {
    let ran = daemon.ctl(&["--json", "scrub", "--full-rate", "--wait"]);
    assert_eq!(ran.code, Some(6), "{ran}");
    ran.json()["lost"].as_u64().unwrap()
}

/// Changes one byte of a list of files in the catalog.
fn damage_manifest(daemon: &Daemon, digest: &str) {
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    catalog.busy_timeout(LIMIT).unwrap();
    let mut encoded: Vec<u8> =
        catalog.query_row("SELECT encoded FROM manifests WHERE digest = unhex(?)", [digest], |row| row.get(0)).unwrap();
    *encoded.last_mut().unwrap() ^= 1;
    let changed = catalog
        .execute("UPDATE manifests SET encoded = ? WHERE digest = unhex(?)", rusqlite::params![encoded, digest])
        .unwrap();
    assert_eq!(changed, 1);
}
