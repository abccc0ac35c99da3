//! What is removed is gone at once, its bytes soon after, and nobody else notices.

#![cfg(test)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use support::corpus::{Tensors, seed};
use support::daemon::Daemon;
use support::files::regular_files;
use support::loopfs::LoopFs;
use support::ran::{run, wait_until};
use support::steady::Readers;

const LIMIT: Duration = Duration::from_secs(180);
const FILES: usize = 6000;

#[test]
fn a_wide_checkpoint_goes_while_others_are_read_and_brought_in() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("tensors");
    let file = source.join("model.safetensors");
    Tensors::new(seed(), 4, 2 << 20).write_safetensors(&file);
    daemon.capture("read", &source);
    let bytes = Arc::new(fs::read(&file).unwrap());
    let readers = Readers::start(&daemon.attach("job", "read").join("model.safetensors"), &bytes);
    let before = regular_files(&daemon.state().join("blobs")).len();
    daemon.capture("wide", &wide(&daemon.place().dir("wide")));
    let removed = daemon.json(&["remove", "wide", "--yes"]);
    daemon.ctl(&["get", "wide"]).refused(&[3], &["wide"]);
    daemon.capture("again", &source);
    wait_until("its bytes are back", LIMIT, || told_of(&daemon, "`wide`"));
    assert_eq!(regular_files(&daemon.state().join("blobs")).len(), before);
    let freeing = removed["freeing"].as_bool().unwrap();
    assert!(freeing || removed["freed_bytes"].as_u64().unwrap() >= 4096 * FILES as u64, "{removed}");
    readers.go_on("a removal");
}

#[test]
fn an_answer_that_nothing_more_is_freed_comes_when_it_is_so() {
    let daemon = Daemon::start();
    let source = wide_enough(&daemon.place().dir("small"));
    let blobs = daemon.state().join("blobs");
    // On a slow disk the answer may be that the rest follows.
    wait_until("a removal is over when it is answered", LIMIT, || {
        daemon.capture("small", &source);
        assert_eq!(regular_files(&blobs).len(), 3);
        let removed = daemon.json(&["remove", "small", "--yes"]);
        let left = regular_files(&blobs);
        let freeing = removed["freeing"].as_bool().unwrap();
        assert!(freeing || left.is_empty(), "{left:?} are left after {removed}");
        assert!(freeing || removed["freed_bytes"].as_u64() > Some(0), "{removed}");
        !freeing
    });
}

#[test]
fn a_start_finishes_what_a_dead_daemon_was_removing() {
    let mut daemon = Daemon::start();
    daemon.capture("wide", &wide(&daemon.place().dir("wide")));
    daemon.capture("kept", &wide_enough(&daemon.place().dir("kept")));
    daemon.stop();
    // What is there after the first step of a removal.
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    assert_eq!(catalog.execute("DELETE FROM checkpoints WHERE name = 'wide'", []).unwrap(), 1);
    drop(catalog);
    daemon.restart();
    wait_until("the bytes are back", LIMIT, || told_of(&daemon, "interrupted removals"));
    assert_eq!(regular_files(&daemon.state().join("blobs")).len(), 3);
    let usage = daemon.json(&["usage"]);
    assert_eq!(usage["remnant_bytes"], 0, "{usage}");
}

#[test]
fn an_owner_is_told_when_its_own_is_gone_and_not_what_others_keep() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    fs::write(source.join("w.bin"), vec![7; 100_000]).unwrap();
    for owner in ["alice", "bob"] {
        daemon.ctl(&["upload", "m", source.to_str().unwrap(), "--owner", owner]).ok();
    }
    let mut told = Vec::new();
    for owner in ["alice", "bob"] {
        run(daemon.ctl_command().args(["--as", owner, "remove", "m", "--yes"])).ok();
        let gone = || {
            let seen = run(daemon.ctl_command().args(["--as", owner, "--json", "events"])).ok().json();
            let events = seen["events"].as_array().unwrap().clone();
            assert!(events.iter().all(|event| event["kind"] != "SPACE_FREED"), "{seen}");
            let gone = events.into_iter().find(|event| event["kind"] == "CHECKPOINT_GONE");
            gone.map(|event| event["message"].as_str().unwrap().to_owned())
        };
        wait_until("the owner is told", LIMIT, || gone().is_some());
        told.push(gone().unwrap());
    }
    // The first gave nothing back, since the other had the same.
    assert!(told[0] == told[1] && told[0].contains("`m`") && told[0].contains("bytes"), "{told:?}");
}

#[test]
fn usage_says_where_every_byte_of_the_file_system_is() {
    const MIB: u64 = 1 << 20;
    let disk = LoopFs::ext4(200);
    let daemon = Daemon::start_on(disk.dir("state"), &[]);
    let (source, others) = (daemon.place().dir("source"), disk.root().join("somebody-elses"));
    support::corpus::random_file(&source.join("w.bin"), seed(), 20 * MIB);
    daemon.capture("m", &source);
    support::corpus::random_file(&others, seed() + 1, 10 * MIB);
    support::corpus::random_file(&daemon.state().join("quarantine/kept"), seed() + 2, 5 * MIB);
    support::files::disk_bytes(disk.root());
    let usage = daemon.json(&["usage"]);
    let bytes = |key: &str| usage[key].as_u64().unwrap_or_else(|| panic!("no {key}: {usage}"));
    let ours = ["physical_bytes", "filling_bytes", "quarantine_bytes", "scratch_bytes", "catalog_bytes"];
    let sum: u64 = ours.iter().chain(&["other_bytes", "free_bytes"]).map(|key| bytes(key)).sum();
    // The file system keeps some for itself.
    let stat = nix::sys::statvfs::statvfs(disk.root()).unwrap();
    let kept = (stat.blocks_free() - stat.blocks_available()) * stat.fragment_size();
    assert_eq!(sum + kept, bytes("filesystem_bytes"), "{usage}");
    for (key, least) in [("physical_bytes", 20), ("quarantine_bytes", 5), ("other_bytes", 10)] {
        // Beside the bytes themselves there are directories, and what the file system needs.
        assert!((least * MIB..(least + 4) * MIB).contains(&bytes(key)), "{key}: {usage}");
    }
}

fn told_of(daemon: &Daemon, words: &str) -> bool {
    let told = |event: &serde_json::Value| event["message"].as_str().is_some_and(|message| message.contains(words));
    daemon.rows("events").iter().any(|event| event["kind"] == "SPACE_FREED" && told(event))
}

fn wide(root: &Path) -> std::path::PathBuf {
    for index in 0..FILES {
        fs::write(root.join(format!("f{index}")), format!("{index}\n")).unwrap();
    }
    root.to_owned()
}

fn wide_enough(root: &Path) -> std::path::PathBuf {
    for index in 0..3 {
        fs::write(root.join(format!("f{index}")), format!("kept {index}\n")).unwrap();
    }
    root.to_owned()
}
