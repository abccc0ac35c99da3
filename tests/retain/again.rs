//! The return of what was evicted: the same bytes, or a clear word why not.

use std::fs;
use std::sync::Arc;

use super::*;
use crate::support::corpus::Random;
use crate::support::daemon::{LOCALHOST, LOOPBACK};
use crate::support::ran::wait_until_told;
use crate::support::site::{Page, Site};
use crate::support::standin::Standin;

const TOKEN: &str = "token=hf_secret_token";

/// Creates a checkpoint of a repository of the stand-in and waits for it.
fn hub_create(daemon: &Daemon, hub: &Standin, name: &str, repository: &str, more: &[&str]) {
    let endpoint = format!("endpoint={}", hub.url(""));
    let line = ["create", name, "--type", "huggingface", "--uri", repository, "--option", &endpoint, "--wait"];
    daemon.ctl(&[&line[..], more].concat()).ok();
}

/// Runs `evict` as soon as a job's files are closed: that takes a moment after its release.
fn evict_released(daemon: &Daemon, args: &[&str]) {
    let evict = [&["evict"], args].concat();
    wait_until("what was released may go", PATIENCE, || daemon.ctl(&evict).code == Some(0));
}

#[test]
fn every_way_to_want_it_has_it_filled_again() {
    let models = Models::new();
    let tree = models.tree("a", 8);
    let daemon = models.daemon(200, &[]);
    create(&daemon, "a").ok();
    let ready = |how: &str| {
        wait_until(&format!("it is ready after {how}"), PATIENCE, || states(&daemon, &["a"]) == ["ready"]);
    };
    let evict = || drop(daemon.ctl(&["evict", "a"]).ok());
    evict();
    daemon.ctl(&["prefetch", "a"]).ok();
    ready("prefetch");
    evict();
    daemon.ctl(&["reserve", "job", "a"]).ok();
    ready("reserve");
    assert_same_tree(&tree, &daemon.attach("job", "a"));
    daemon.ctl(&["evict", "a"]).refused(&[4], &["a job has a right"]);
    daemon.ctl(&["release", "job"]).ok();
    evict_released(&daemon, &["a"]);
    daemon.ctl(&["retry", "a"]).ok();
    ready("retry");
    evict();
    let target = daemon.place().dir("at-lazy");
    daemon.ctl(&["attach", "lazy", "a", "--lazy", "--at", target.to_str().unwrap()]).ok();
    assert_same_tree(&tree, &target);
    ready("a lazy attach");
    daemon.ctl(&["release", "lazy"]).ok();
    evict_released(&daemon, &["a"]);
    daemon.ctl(&["prefetch", "a", "--memory"]).ok();
    ready("prefetch into memory");
}

#[test]
fn a_source_that_has_moved_on_makes_no_other_checkpoint_of_it() {
    let models = Models::new();
    let tree = models.tree("a", 8);
    let daemon = models.daemon(200, &[]);
    create(&daemon, "a").ok();
    let before = record(&daemon, "a");
    daemon.ctl(&["evict", "a"]).ok();
    fs::write(tree.join("deep.bin"), b"something else").unwrap();
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["a"], &target).refused(&[4], &["moved on", before["revision"].as_str().unwrap()]);
    let failed = record(&daemon, "a");
    assert_eq!((&failed["state"], &failed["error"]["reason"]), (&"failed".into(), &"SOURCE_CHANGED".into()));
    for key in ["digest", "revision", "logical_bytes", "files"] {
        assert_eq!(failed[key], before[key], "{key}: {failed}");
    }
    assert!(failed["error"]["remedy"].as_str().unwrap().contains("create a new checkpoint"), "{failed}");

    fs::remove_dir_all(&tree).unwrap();
    daemon.ctl(&["retry", "a"]).ok();
    wait_until("it is said that it is gone", PATIENCE, || {
        let now = record(&daemon, "a");
        now["state"] == "failed" && now["error"]["reason"] == "SOURCE_GONE"
    });
    assert_eq!(record(&daemon, "a")["digest"], before["digest"]);
    assert!(daemon.rows("jobs").is_empty(), "nothing was attached");
}

#[test]
fn a_branch_that_moved_does_no_harm() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    hub_create(&daemon, &hub, "m", "acme/moving", &[]);
    let before = record(&daemon, "m");
    assert_eq!(before["revision"], "a".repeat(40));
    daemon.ctl(&["evict", "m"]).ok();
    hub_create(&daemon, &hub, "now", "acme/moving", &[]);
    assert_eq!(record(&daemon, "now")["revision"], "b".repeat(40), "the branch has moved");
    daemon.attach("job", "m");
    let after = record(&daemon, "m");
    for key in ["state", "digest", "revision", "source"] {
        assert_eq!(after[key], before[key], "{key}");
    }
}

#[test]
fn what_needs_a_secret_goes_by_force_alone_and_comes_back_with_it() {
    let (daemon, hub) = (Daemon::start_with(&[LOCALHOST]), Standin::start());
    hub_create(&daemon, &hub, "m", "acme/private", &["--credential", TOKEN]);
    let before = record(&daemon, "m");
    daemon.ctl(&["evict", "m"]).refused(&[4], &["secrets", "--force"]);
    daemon.ctl(&["evict", "--until", "900TB"]).ok();
    assert_eq!(states(&daemon, &["m"]), ["ready"]);
    daemon.ctl(&["evict", "m", "--force"]).ok();
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["m"], &target).refused(&[4], &["m"]);
    assert_eq!(states(&daemon, &["m"]), ["failed"]);
    daemon.ctl(&["retry", "m", "--credential", TOKEN]).ok();
    wait_until("it is back", PATIENCE, || states(&daemon, &["m"]) == ["ready"]);
    assert_eq!(record(&daemon, "m")["digest"], before["digest"]);
}

#[test]
fn a_source_that_is_down_for_a_while_is_asked_again_by_the_next_who_wants_it() {
    let mut daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "1")]);
    let (site, bytes) = (Site::open(), Arc::new(Random::new(seed()).bytes(5 << 20)));
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    daemon.ctl(&["create", "a", "--type", "web", "--uri", &url, "--wait"]).ok();
    daemon.ctl(&["evict", "a", "--force"]).ok();
    site.put("/w.bin", Page::Status(503));
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["a"], &target).refused(&[4], &["503"]);
    assert_eq!(states(&daemon, &["a"]), ["failed"]);
    site.put("/w.bin", Page::Ranged(bytes.clone()));
    assert_eq!(fs::read(daemon.attach("job", "a").join("w.bin")).unwrap(), *bytes);

    daemon.ctl(&["release", "job"]).ok();
    evict_released(&daemon, &["a", "--force"]);
    daemon.kill9();
    daemon.restart();
    assert_eq!(states(&daemon, &["a"]), ["evicted"], "it waits until somebody wants it");
    daemon.attach("job", "a");
}

#[test]
fn a_daemon_that_dies_while_it_evicts_leaves_what_can_be_read_or_filled_again() {
    let models = Models::new();
    let tree = models.0.dir("many");
    for number in 0..1500 {
        fs::write(tree.join(format!("f{number}")), format!("{number} of {}", seed()).repeat(40)).unwrap();
    }
    models.tree("a", 16);
    let mut daemon = models.daemon(300, &[]);
    for round in 0..4_u64 {
        if round == 0 {
            create(&daemon, "many").ok();
            create(&daemon, "a").ok();
        }
        evict_released(&daemon, &["many", "a", "--dry-run"]);
        let command = daemon.ctl_command().args(["evict", "many", "a"]).spawn();
        std::thread::sleep(Duration::from_millis(25 * (round + 1)));
        daemon.kill9();
        let _ = command.unwrap().wait();
        daemon.restart();
        for (name, tree) in [("many", &tree), ("a", &models.path("a"))] {
            let state = record(&daemon, name)["state"].clone();
            assert!(state == "ready" || state == "evicted", "{name} is {state}");
            assert_reads(&daemon, "job", name, tree);
        }
    }
    evict_released(&daemon, &["many", "a"]);
    // The rows go after the bytes.
    wait_until_told(PATIENCE, || {
        let (blobs, usage) = (regular_files(&daemon.state().join("blobs")), daemon.json(&["usage"]));
        let is_empty = blobs.is_empty() && usage["physical_bytes"] == 0 && usage["filling_bytes"] == 0;
        if is_empty { Ok(()) } else { Err(format!("{} blobs are left, and {usage}", blobs.len())) }
    });
}
