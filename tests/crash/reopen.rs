//! A daemon on what a crash has left: it starts, serves what was ready, brings in what was arriving, waits for who was sending, and keeps nothing else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::disk::Image;
use crate::law::{Law, Promise, Promises, Rot, blob_path};
use crate::story::Story;
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::{assert_same_tree, regular_files};
use crate::support::place::Place;
use crate::support::ran::{wait_until, wait_until_told};

const LIMIT: Duration = Duration::from_secs(180);

/// Starts one on `image` and looks at everything; with `clear`, also removes everything in the end.
pub(crate) fn reopen(story: &Arc<Story>, image: &Image, promises: &Promises, clear: bool) {
    let place = Place::new();
    let state = place.join("state");
    image.write_to(&state);
    let mut daemon = Daemon::start_on(state.clone(), &[LOOPBACK]);
    if is_rotten(story, image) {
        // All is read, though it may take another pass where what is lost comes again meanwhile.
        wait_until("rot is found", LIMIT, || {
            matches!(daemon.ctl(&["scrub", "--full-rate", "--wait"]).code, Some(0 | 6))
        });
    }
    let mut settled = Promises::new();
    for row in daemon.rows("list") {
        let name = row["name"].as_str().unwrap();
        let promise = promises.get(name).unwrap_or_else(|| panic!("nobody asked for `{name}`: {row}"));
        assert_ne!(*promise, Promise::Gone, "`{name}` is back: {row}");
        read_back(story, &daemon, name);
        settled.insert(name.to_owned(), Promise::Ready);
    }
    for (name, promise) in promises {
        let listed = settled.contains_key(name);
        assert!(listed || *promise != Promise::Ready, "`{name}` was ready and is not there");
    }
    if clear {
        // Ours, and the one of the story.
        for row in daemon.rows("jobs") {
            daemon.ctl(&["release", row["job"].as_str().unwrap()]).ok();
        }
        for (name, promise) in &mut settled {
            daemon.ctl(&["remove", name, "--yes"]).ok();
            *promise = Promise::Gone;
        }
    }
    wait_until("nothing is half done", LIMIT, || {
        regular_files(&state.join("filling")).is_empty() && unneeded_blobs(&state) == 0
    });
    let left = regular_files(&state.join("blobs"));
    assert!(!clear || left.is_empty(), "nothing is needed, and this is kept: {left:?}");
    daemon.stop();
    if let Err(fault) = Law::new(story.truth.clone()).check_settled(&Image::of(&state), &settled) {
        panic!("after all is done: {fault}");
    }
}

/// Whether bytes are wrong, or were and are away.
fn is_rotten(story: &Story, image: &Image) -> bool {
    let is_there = |rot: &Rot| image.files.get(&blob_path(&rot.blob)).is_some_and(|file| rot.is_in(file));
    story.truth.rots.iter().any(is_there) || image.files.keys().any(|path| path.starts_with("quarantine/"))
}

/// Blobs that are to go and are not gone yet, by the catalog.
fn unneeded_blobs(state: &Path) -> i64 {
    let catalog = Connection::open_with_flags(state.join("catalog.db"), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    catalog
        .query_row(
            "SELECT COUNT(*) FROM blobs WHERE state = 'doomed' OR (names = 0 AND id NOT IN (SELECT home FROM borrows))",
            [],
            |row| row.get(0),
        )
        .unwrap()
}

/// Compares it with its source through a mount, once it is here.
fn read_back(story: &Story, daemon: &Daemon, name: &str) {
    let tree = story.sources.place.join(if name == "a2" { "a" } else { name });
    let mut tries = 0;
    let mut is_asked_for = false;
    wait_until_told(LIMIT, || {
        let record = daemon.json(&["get", name]);
        if record["state"] == "evicted" {
            daemon.ctl(&["prefetch", name]).ok();
        }
        if record["state"] == "filling" && record["source"]["type"] == "upload" {
            // Its sender comes back, and goes on from what is durable.
            let id = record["id"].as_str().unwrap();
            daemon.ctl(&["upload", name, tree.to_str().unwrap(), "--id", id]).ok();
        }
        if record["state"] == "failed" {
            tries += 1;
            assert!(tries < 3, "`{name}` fails again and again: {record}");
            daemon.ctl(&["retry", name]).ok();
        }
        let is_damaged = !record["error"].is_null();
        if record["state"] == "ready" && is_damaged && !is_asked_for {
            // Where it begins by itself meanwhile, it is refused.
            is_asked_for = daemon.ctl(&["retry", name]).code == Some(0);
        }
        let is_whole = record["state"] == "ready" && !is_damaged;
        if is_whole { Ok(()) } else { Err(format!("`{name}` is not whole: {record}")) }
    });
    let target = daemon.attach(name, name);
    assert_same_tree(&tree, &target);
    daemon.ctl(&["detach", name]).ok();
}
