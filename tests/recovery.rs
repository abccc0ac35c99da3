//! Killed at any moment, the daemon comes back with everything it promised and nothing it did not.

#![cfg(test)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use support::corpus::{Random, Tensors, random_file, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::files::{assert_same_tree, b3sum, disk_bytes};
use support::place::mounts_at;
use support::ran::wait_until;
use support::site::{Page, Site};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn an_interrupted_ingest_resumes_from_its_durable_bytes() {
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(24 * MIB);
    let bytes = Arc::new(Random::new(seed()).bytes(96 << 20));
    let url = site.put("/w.bin", Page::Ranged(Arc::clone(&bytes)));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    wait_until("two thirds are here", LIMIT, || daemon.recorded_bytes("w") >= 64 * MIB);
    daemon.kill9();
    site.take_sent();
    site.limit(0);
    daemon.restart();
    daemon.wait_state("w", "ready", LIMIT);
    let again = site.take_sent();
    // Of the 64 MiB some units were in flight or not yet on disk: eight fetches of one unit each.
    assert!(again <= (96 - 64 + 32) * MIB, "{again} bytes were sent again");
    let target = daemon.attach("job", "w");
    assert_eq!(b3sum(&target.join("w.bin")), blake3::hash(&bytes).to_hex().to_string());
    daemon.wait_empty("filling");
}

/// A crash may take the names of files whose bytes are durable.
#[test]
fn an_ingest_whose_filling_files_are_gone_fetches_them_again() {
    for lazily in [false, true] {
        let mut daemon = Daemon::start_with(&[LOOPBACK]);
        let site = Site::open();
        site.limit(24 * MIB);
        let bytes = Arc::new(Random::new(seed()).bytes(48 << 20));
        let url = site.put("/w.bin", Page::Ranged(Arc::clone(&bytes)));
        daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
        let target = daemon.place().dir("at");
        if lazily {
            daemon.ctl(&["attach", "job", "w", "--lazy", "--at", target.to_str().unwrap()]).ok();
        }
        wait_until("some of it is here", LIMIT, || daemon.recorded_bytes("w") >= 24 * MIB);
        daemon.kill9();
        let filling = daemon.state().join("filling");
        fs::remove_dir_all(&filling).unwrap();
        fs::create_dir(&filling).unwrap();
        site.limit(0);
        daemon.restart();
        daemon.wait_state("w", "ready", LIMIT);
        if !lazily {
            daemon.ctl(&["attach", "job", "w", "--at", target.to_str().unwrap()]).ok();
        }
        assert_eq!(daemon.rows("jobs")[0]["state"], "attached");
        assert_eq!(b3sum(&target.join("w.bin")), blake3::hash(&bytes).to_hex().to_string());
    }
}

#[test]
fn an_ingest_whose_source_changed_meanwhile_mixes_nothing() {
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(16 * MIB);
    let url = site.put("/w.bin", Page::Ranged(Arc::new(Random::new(seed()).bytes(48 << 20))));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    wait_until("some of it is here", LIMIT, || daemon.recorded_bytes("w") >= 16 * MIB);
    daemon.kill9();
    site.limit(0);
    let changed = Arc::new(Random::new(seed() + 1).bytes(40 << 20));
    site.put("/w.bin", Page::Ranged(Arc::clone(&changed)));
    daemon.restart();
    wait_until("the ingest has ended", LIMIT, || {
        let state = daemon.json(&["get", "w"])["state"].clone();
        state == "ready" || state == "failed"
    });
    if daemon.json(&["get", "w"])["state"] == "failed" {
        return;
    }
    let target = daemon.attach("job", "w");
    assert_eq!(b3sum(&target.join("w.bin")), blake3::hash(&changed).to_hex().to_string());
}

#[test]
fn what_was_ready_before_the_kill_is_ready_after_it() {
    let mut daemon = Daemon::start();
    let (a, b) = (daemon.place().dir("a"), daemon.place().dir("b"));
    let base = Tensors::new(seed(), 6, 4 << 20);
    base.write_safetensors(&a.join("model.safetensors"));
    base.fine_tuned(1).write_safetensors(&b.join("model.safetensors"));
    let records = [daemon.capture("a", &a), daemon.capture("b", &b)];
    daemon.kill9();
    daemon.restart();
    for (record, source) in records.iter().zip([&a, &b]) {
        let name = record["name"].as_str().unwrap();
        let now = daemon.json(&["get", name]);
        for key in ["id", "digest", "files", "logical_bytes", "created_at", "state"] {
            assert_eq!(now[key], record[key], "{key} of {name}");
        }
        assert_same_tree(source, &daemon.attach(name, name));
    }
}

#[test]
fn views_are_back_where_they_were_after_a_kill() {
    let mut daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 9 * MIB);
    daemon.capture("k", &source);
    let targets = [daemon.attach("one", "k"), daemon.attach("two", "k")];
    for round in 0..3 {
        daemon.kill9();
        daemon.restart();
        for (job, target) in ["one", "two"].iter().zip(&targets) {
            wait_until(&format!("{job} sees its view in round {round}"), LIMIT, || {
                fs::read_dir(target).is_ok_and(|mut at| at.next().is_some())
            });
            assert_same_tree(&source, target);
            assert_eq!(mounts_at(target).len(), 1, "views are not stacked: {:?}", mounts_at(target));
        }
        let attached = daemon.rows("jobs").iter().filter(|row| row["state"] == "attached").count();
        assert_eq!(attached, 2);
    }
    daemon.ctl(&["detach", "one"]).ok();
    assert!(mounts_at(&targets[0]).is_empty());
}

#[test]
fn leases_outlive_the_daemon() {
    let mut daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), MIB);
    daemon.capture("k", &source);
    daemon.ctl(&["reserve", "waiting-job", "k"]).ok();
    daemon.kill9();
    daemon.restart();
    daemon.ctl(&["remove", "k", "--yes"]).refused(&[4], &["waiting-job"]);
    daemon.ctl(&["release", "waiting-job"]).ok();
    daemon.ctl(&["remove", "k", "--yes"]).ok();
}

#[test]
fn an_upload_that_was_cut_off_waits_for_its_sender_and_then_leaves_nothing() {
    let mut daemon = Daemon::start_with(&[("CKPTD_HTTP__UPLOAD_IDLE_S", "20")]);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 400 * MIB);
    let mut upload = daemon.ctl_command();
    upload.args(["upload", "cut"]).arg(&source).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut upload = upload.spawn().unwrap();
    wait_until("bytes arrive", LIMIT, || filled(&daemon) >= 8 * MIB);
    daemon.kill9();
    // It would wait for the daemon to come back, and go on.
    upload.kill().unwrap();
    upload.wait().unwrap();
    daemon.restart();
    assert_eq!(daemon.json(&["get", "cut"])["state"], "filling");
    wait_until("what arrived is gone", LIMIT, || filled(&daemon) == 0 && daemon.rows("list").is_empty());
    assert!(disk_bytes(daemon.state()) < 8 * MIB);
    daemon.ctl(&["upload", "whole", source.to_str().unwrap()]).ok();
    assert_same_tree(&source, &daemon.attach("job", "whole"));
}

#[test]
fn an_upload_whose_client_dies_and_does_not_come_back_leaves_nothing() {
    let daemon = Daemon::start_with(&[("CKPTD_HTTP__UPLOAD_IDLE_S", "1")]);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 400 * MIB);
    let mut upload = daemon.ctl_command();
    upload.args(["upload", "cut"]).arg(&source).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut upload = upload.spawn().unwrap();
    wait_until("bytes arrive", LIMIT, || filled(&daemon) >= 8 * MIB);
    upload.kill().unwrap();
    upload.wait().unwrap();
    wait_until("what arrived is gone", LIMIT, || {
        filled(&daemon) == 0 && daemon.rows("list").iter().all(|row| row["name"] != "cut")
    });
}

#[test]
fn killed_at_any_moment_of_a_capture_the_store_stays_whole() {
    let mut daemon = Daemon::start();
    let base = Tensors::new(seed(), 8, 4 << 20);
    let mut random = Random::new(seed());
    for round in 0..6 {
        let source = daemon.place().dir(&format!("source-{round}"));
        base.fine_tuned(round).write_safetensors(&source.join("model.safetensors"));
        let name = format!("k{round}");
        let mut capture = daemon.ctl_command();
        capture.args(["capture", "job", "--name", &name, "--from"]).arg(&source);
        let mut capture = capture.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // A random moment is what is tested here, not something awaited.
        std::thread::sleep(Duration::from_millis(random.below(120)));
        daemon.kill9();
        // It would wait for the daemon to come back.
        capture.kill().unwrap();
        capture.wait().unwrap();
        daemon.restart();
        settle(&daemon, &name, &source);
        assert_same_tree(&source, &daemon.attach(&name, &name));
    }
    for round in 0..6 {
        assert_same_tree(
            &daemon.place().join(&format!("source-{round}")),
            &daemon.place().join(&format!("at-k{round}")),
        );
    }
}

/// Brings the checkpoint to `ready`, whatever the kill left of it: nothing, a failed record, one that resumes.
fn settle(daemon: &Daemon, name: &str, source: &Path) {
    if daemon.rows("list").iter().all(|row| row["name"] != name) {
        daemon.capture(name, source);
        return;
    }
    if daemon.json(&["get", name])["state"] == "failed" {
        daemon.ctl(&["retry", name]).ok();
    }
    wait_until(&format!("{name} is ready"), LIMIT, || daemon.json(&["get", name])["state"] == "ready");
}

/// Bytes on disk of what is being filled.
fn filled(daemon: &Daemon) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = support::ran::shell("find \"$1\" -type f", &[&daemon.state().join("filling")]);
    files.stdout.lines().filter_map(|path| Path::new(path).metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

#[test]
fn what_two_ask_for_at_once_is_fetched_once_even_if_the_first_is_removed() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(24 * MIB);
    let bytes = Arc::new(Random::new(seed()).bytes(48 << 20));
    let url = site.put("/w.bin", Page::Ranged(Arc::clone(&bytes)));
    for name in ["first", "second"] {
        daemon.ctl(&["create", name, "--type", "web", "--uri", &url]).ok();
    }
    wait_until("bytes of both arrive", LIMIT, || daemon.bytes_done("first") > 0 && daemon.bytes_done("second") > 0);
    daemon.ctl(&["remove", "first", "--yes"]).ok();
    site.limit(0);
    daemon.wait_state("second", "ready", LIMIT);
    let sent = site.take_sent();
    assert!(sent < (50 << 20), "{sent} bytes were sent for 48 MiB");
    let target = daemon.attach("job", "second");
    assert_eq!(fs::read(target.join("w.bin")).unwrap(), *bytes);
}
