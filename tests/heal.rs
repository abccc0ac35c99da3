//! What is lost of a checkpoint is fetched, and nothing else; while that goes on, and when it fails, what is right of it stays.

#![cfg(test)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::corpus::{random_file, seed};
use support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use support::files::assert_same_file;
use support::ran::wait_until;
use support::rot::{blob_of, flip};
use support::site::{Page, Site};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Bytes a second of a source that gives its listing, and nothing whole besides.
const HELD: u64 = 16 << 10;
/// So that the scrubs by hand are the only ones.
const BY_HAND: (&str, &str) = ("CKPTD_SCRUB__RATE", "0");
const INDEX: &str =
    "<html><title>Directory listing for /</title><li><a href=\"a.bin\">a</a><li><a href=\"b.bin\">b</a></html>";

/// A checkpoint of two files from a site, which a job has at a path, and of which the second rots.
struct Story {
    site: Site,
    daemon: Daemon,
    files: [PathBuf; 2],
    at: PathBuf,
}

impl Story {
    fn new() -> Self {
        let (site, daemon) = (Site::open(), Daemon::start_kept(&[LOOPBACK, NO_PASSTHROUGH, BY_HAND]));
        let files = ["a.bin", "b.bin"].map(|name| daemon.place().join(name));
        for (file, (mib, salt)) in files.iter().zip([(24, 1), (3, 2)]) {
            random_file(file, seed() + salt, mib * MIB);
            site.put(&format!("/m/{}", file.file_name().unwrap().to_str().unwrap()), page(file));
        }
        let url = site.put("/m/", Page::Html(INDEX.as_bytes().to_vec().into()));
        daemon.ctl(&["create", "m", "--type", "web", "--uri", &url, "--wait"]).ok();
        let at = daemon.attach("job", "m");
        Self { site, daemon, files, at }
    }

    /// Lets a byte of the second file rot, and has it found.
    fn rot(&self) {
        self.site.take_sent();
        flip(&blob_of(&self.daemon, &self.files[1]), MIB);
        assert_eq!(self.daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(6));
    }

    fn record(&self) -> serde_json::Value {
        self.daemon.json(&["get", "m"])
    }

    fn until(&self, what: &str, mut is_so: impl FnMut(&serde_json::Value) -> bool) {
        wait_until(what, LIMIT, || {
            let record = self.record();
            assert_ne!(record["state"], "failed", "{record}");
            is_so(&record)
        });
    }

    /// Another daemon in the place of the one that is there.
    fn kill(&self) {
        self.daemon.replace();
    }

    /// The job, and whoever comes now, reads what is right.
    fn the_rest_is_served(&self, to: &str) {
        assert_same_file(&self.files[0], &self.at.join("a.bin"));
        assert!(fs::read(self.at.join("b.bin")).is_err(), "what is lost is an error");
        assert_same_file(&self.files[0], &self.daemon.attach(to, "m").join("a.bin"));
    }
}

#[test]
fn only_what_is_lost_is_fetched_and_jobs_keep_the_rest_meanwhile() {
    let story = Story::new();
    story.site.limit(HELD);
    story.rot();
    story.until("it is being mended", |record| record["state"] == "filling");
    assert_eq!(story.record()["error"]["reason"], "BYTES_ROTTEN");
    story.kill();
    assert_same_file(&story.files[0], &story.at.join("a.bin"));
    story.site.limit(0);
    story.until("it is whole", |record| record["state"] == "ready" && record["error"].is_null());
    assert_same_file(&story.files[1], &story.at.join("b.bin"));
    assert_same_file(&story.files[1], &story.daemon.attach("next", "m").join("b.bin"));
    let sent = story.site.take_sent();
    assert!(sent < 12 * MIB, "{sent} bytes were sent for 3 MiB that were lost, twice begun");
}

#[test]
fn a_source_that_has_moved_on_costs_nothing_of_what_is_right() {
    let story = Story::new();
    // It is asked for its listing first, and is as it was then.
    story.site.limit(HELD);
    story.rot();
    story.until("it is being mended", |record| record["state"] == "filling");
    story.site.put("/m/b.bin", page(&story.files[0]));
    story.kill();
    story.site.limit(0);
    let is_as_before = |record: &serde_json::Value| {
        let why = record["error"]["message"].as_str().unwrap_or_default();
        record["state"] == "ready" && record["error"]["reason"] == "BYTES_ROTTEN" && why.contains("again failed")
    };
    story.until("it is given up", is_as_before);
    story.the_rest_is_served("second");
    // What a start clears away is nothing that is right.
    story.kill();
    story.the_rest_is_served("third");
    story.site.put("/m/b.bin", page(&story.files[1]));
    story.site.take_sent();
    story.daemon.ctl(&["retry", "m", "--wait"]).ok();
    assert!(story.record()["error"].is_null());
    assert_same_file(&story.files[1], &story.daemon.attach("fourth", "m").join("b.bin"));
    let sent = story.site.take_sent();
    assert!(sent < 6 * MIB, "{sent} bytes were sent for 3 MiB that were lost");
}

#[test]
fn a_capture_whose_directory_is_gone_keeps_what_is_right_over_a_retry() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH, BY_HAND]);
    let source = daemon.place().dir("source");
    for (name, salt) in [("one", 1), ("two", 2)] {
        random_file(&source.join(name), seed() + salt, 2 * MIB);
    }
    let right = daemon.place().join("right");
    fs::copy(source.join("two"), &right).unwrap();
    daemon.capture("m", &source);
    flip(&blob_of(&daemon, &source.join("one")), MIB);
    assert_eq!(daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(6));
    fs::remove_dir_all(&source).unwrap();
    daemon.ctl(&["retry", "m", "--wait"]).refused(&[6], &["again failed"]);
    let record = daemon.json(&["get", "m"]);
    assert_eq!((&record["state"], &record["error"]["reason"]), (&"ready".into(), &"BYTES_ROTTEN".into()), "{record}");
    assert_same_file(&right, &daemon.attach("job", "m").join("two"));
}

fn page(file: &Path) -> Page {
    Page::Ranged(fs::read(file).unwrap().into())
}
