//! A store that was left in the middle of everything, with the catalog as it was written when its schema was at version 5, is carried on.
//!
//! The fixture is what `.dump` showed after a kill. What was in the state directory besides is laid out from the rows: blobs without what they
//! borrow, files that fill with the units that were durable. Sources are at a host that there is not, so that their addresses stay: a proxy answers.

#![cfg(test)]

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use serde_json::Value;

use support::daemon::{Daemon, LOOPBACK};
use support::files::regular_files;
use support::place::Place;
use support::ran::{run, wait_until};
use support::site::{Page, Site};

const MIB: usize = 1 << 20;
const UNIT: usize = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(120);
const HOST: &str = "http://weights.example";
/// Stands in the fixture for the directory that jobs see checkpoints in.
const PLACE: &str = "@place@";

/// Bytes that the fixture has digests of: never changed.
fn bytes(of: u64, length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(of);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length / 8).flat_map(|_| next()).collect()
}

/// What there is at sources, and what was captured and uploaded, by path.
fn contents() -> HashMap<&'static str, Arc<Vec<u8>>> {
    let base = bytes(1, 8 * MIB);
    let tuned = [&base[..6 * MIB], &bytes(2, 2 * MIB)].concat();
    let all = [
        ("base/w", base),
        ("tuned/w", tuned),
        ("damaged/right.bin", bytes(3, MIB)),
        ("damaged/lost.bin", bytes(4, 2 * MIB)),
        ("arriving/w.bin", bytes(5, 20 * MIB)),
        ("half/one.bin", bytes(6, 5 * MIB)),
        ("half/two.bin", bytes(7, 5 * MIB)),
        ("gone/g.bin", bytes(8, MIB)),
        // Of nobody any more, and of nobody yet.
        ("doomed", bytes(9, MIB)),
        ("published", bytes(10, MIB)),
    ];
    all.into_iter().map(|(path, bytes)| (path, Arc::new(bytes))).collect()
}

/// Trees at the proxy.
const TREES: [&str; 4] = ["damaged", "arriving", "half", "gone"];

fn site_of(contents: &HashMap<&'static str, Arc<Vec<u8>>>) -> Site {
    let site = Site::open();
    for tree in TREES {
        let mut index = "<html><title>Directory listing for /</title>".to_owned();
        for (path, bytes) in contents.iter().filter(|(path, _)| path.starts_with(tree)) {
            site.put(&format!("{HOST}/{path}"), Page::Ranged(bytes.clone()));
            let name = path.rsplit('/').next().unwrap();
            index.push_str(&format!("<li><a href=\"{name}\">{name}</a>"));
        }
        site.put(&format!("{HOST}/{tree}/"), Page::Html(Arc::new(index.into_bytes())));
    }
    site
}

/// Lays out the state directory that the fixture is about, with jobs' directories below `place`; where units begin that were durable of what fills.
fn lay_out(state: &Path, place: &Path, contents: &HashMap<&'static str, Arc<Vec<u8>>>) -> Vec<u64> {
    let by_digest: HashMap<[u8; 32], &Arc<Vec<u8>>> =
        contents.values().map(|bytes| (blake3::hash(bytes).into(), bytes)).collect();
    fs::create_dir_all(state).unwrap();
    fs::write(state.join("version"), "ckptd-state 1\n").unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-5.sql");
    let dump = fs::read_to_string(fixture).unwrap().replace(PLACE, place.to_str().unwrap());
    let catalog = Connection::open(state.join("catalog.db")).unwrap();
    catalog.execute_batch(&dump).unwrap();
    let all = |query: &str| -> Vec<(i64, [u8; 32])> {
        let mut query = catalog.prepare(query).unwrap();
        query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect()
    };
    let put = |digest: &[u8; 32]| {
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = state.join("blobs").join(&hex[..2]).join(&hex);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, by_digest[digest].as_slice()).unwrap();
        File::options().write(true).open(path).unwrap()
    };
    // What is lost has no file.
    for (id, digest) in all("SELECT id, digest FROM blobs WHERE NOT (state = 'remnant' AND stored_bytes = 0)") {
        let file = put(&digest);
        let mut lacking = catalog.prepare("SELECT start, len FROM borrows WHERE blob = ? AND NOT filled").unwrap();
        let ranges = lacking.query_map([id], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        for range in ranges {
            let (start, length): (i64, i64) = range.unwrap();
            let zeros = vec![0; usize::try_from(length).unwrap()];
            file.write_all_at(&zeros, start.unsigned_abs()).unwrap();
        }
    }
    all("SELECT number, digest FROM publishing").iter().for_each(|(_, digest)| drop(put(digest)));
    let mut fills = catalog.prepare("SELECT flight, path, number, units FROM fills WHERE blob IS NULL").unwrap();
    let rows = fills.query_map([], |row| {
        let (flight, path): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
        Ok((flight, String::from_utf8(path).unwrap(), row.get::<_, i64>(2)?, row.get::<_, Option<Vec<u8>>>(3)?))
    });
    let mut here = Vec::new();
    for row in rows.unwrap() {
        let (flight, path, number, units) = row.unwrap();
        let whole = contents.iter().find(|(of, _)| of.ends_with(&format!("/{path}"))).unwrap().1;
        let directory = state.join("filling").join(flight);
        fs::create_dir_all(&directory).unwrap();
        let file = File::create(directory.join(number.to_string())).unwrap();
        file.set_len(whole.len() as u64).unwrap();
        let units = units.unwrap_or_default();
        for (unit, bytes) in whole.chunks(UNIT).enumerate() {
            if units.get(unit / 8).is_some_and(|byte| byte & (1 << (unit % 8)) != 0) {
                here.push((unit * UNIT) as u64);
                file.write_all_at(bytes, (unit * UNIT) as u64).unwrap();
            }
        }
    }
    here
}

fn start(site: &Site, state: PathBuf) -> Daemon {
    let proxy = site.url("");
    Daemon::start_on(
        state,
        &[LOOPBACK, ("HTTP_PROXY", proxy.as_str()), ("CKPTD_SCRUB__RATE", "0"), ("CKPTD_SOURCES__ATTEMPTS", "3")],
    )
}

fn until_whole(daemon: &Daemon, name: &str) {
    wait_until(&format!("`{name}` is whole"), LIMIT, || {
        let record = daemon.json(&["get", name]);
        record["state"] == "ready" && record["error"].is_null()
    });
}

#[test]
fn a_store_in_the_middle_of_everything_is_carried_on() {
    let (place, contents) = (Place::new(), contents());
    let site = site_of(&contents);
    let (reader, early) = (place.dir("at-reader"), place.dir("at-early"));
    let state = place.join("state");
    let here = lay_out(&state, place.path(), &contents);
    assert!(here.len() >= 2, "{here:?}");
    let daemon = start(&site, state.clone());
    let states = |of: &[&str]| -> Vec<String> {
        of.iter().map(|name| daemon.json(&["get", name])["state"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(states(&["base", "tuned", "half", "gone"]), ["ready", "ready", "failed", "evicted"]);
    // It goes on where it was, under the eyes of its job; what is lost of the other comes again.
    until_whole(&daemon, "arriving");
    until_whole(&daemon, "damaged");
    let asked = site.asked();
    let of = |path: &str| -> Vec<u64> {
        let path = format!("{HOST}/{path}");
        asked.iter().filter(|(of, _)| *of == path).map(|(_, from)| *from).collect()
    };
    assert!(!of("arriving/w.bin").iter().any(|from| here.contains(from)), "{:?} of {here:?}", of("arriving/w.bin"));
    assert!(of("damaged/right.bin").is_empty() && !of("damaged/lost.bin").is_empty());
    daemon.ctl(&["retry", "half"]).ok();
    until_whole(&daemon, "half");
    assert!(site.asked().iter().all(|(path, _)| !path.ends_with("one.bin")), "it was sealed already");

    let jobs = daemon.rows("jobs");
    let job = |name: &str| jobs.iter().find(|row| row["job"] == name).unwrap_or_else(|| panic!("{name}: {jobs:?}"));
    assert_eq!((&job("reader")["state"], &job("early")["state"]), (&"attached".into(), &"attached".into()));
    assert_eq!(job("later")["state"], "reserved");
    assert!(job("later")["expires_at"].is_string(), "{}", job("later"));
    assert_eq!(daemon.json(&["get", "base"])["pinned"], true);
    let assert_is = |path: &Path, of: &str| assert!(fs::read(path).unwrap() == *contents[of], "{of} differs");
    assert_is(&reader.join("w"), "base/w");
    assert_is(&early.join("w.bin"), "arriving/w.bin");
    for of in ["tuned/w", "damaged/right.bin", "damaged/lost.bin", "half/one.bin", "half/two.bin", "gone/g.bin"] {
        let (name, file) = of.split_once('/').unwrap();
        let owner = daemon.json(&["get", name])["owner"].as_str().unwrap_or_default().to_owned();
        let at = daemon.place().dir(&format!("at-{name}-{file}"));
        let mut attach = daemon.ctl_command();
        attach.args(["attach", &format!("look-{of}").replace('/', "-"), name, "--at"]).arg(&at);
        if !owner.is_empty() {
            attach.args(["--owner", &owner]);
        }
        run(&mut attach).ok();
        assert_is(&at.join(file), of);
    }
    let scrubbed = daemon.json(&["scrub", "--full-rate", "--wait"]);
    assert_eq!((&scrubbed["healed"], &scrubbed["lost"], &scrubbed["unread"]), (&0.into(), &0.into(), &0.into()));

    for row in jobs.iter().chain(&daemon.rows("jobs")) {
        daemon.ctl(&["release", row["job"].as_str().unwrap()]);
    }
    daemon.ctl(&["unpin", "base"]).ok();
    for row in daemon.rows("list") {
        daemon.ctl(&["remove", row["id"].as_str().unwrap(), "--yes"]).ok();
    }
    // The rows go after the bytes.
    wait_until("nothing is left, by the sums too", LIMIT, || {
        let usage: Value = daemon.json(&["usage"]);
        let is_nothing = ["physical_bytes", "unique_bytes", "duplicate_bytes"].iter().all(|key| usage[key] == 0);
        is_nothing && ["blobs", "filling"].iter().all(|part| regular_files(&state.join(part)).is_empty())
    });
}
