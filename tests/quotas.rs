//! How much an owner may keep, and how large a checkpoint may be: refused before a byte is fetched where the size is known, while it arrives
//! where it is not.

#![cfg(test)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use support::corpus::{Random, random_file, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::files::regular_files;
use support::ran::{Ran, run, shell, wait_until};
use support::site::{Page, Site};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// Bytes that do not compress, other for every `number`.
fn noise(number: u64, mib: u64) -> Arc<Vec<u8>> {
    Arc::new(Random::new(seed() + number).bytes(usize::try_from(mib * MIB).unwrap()))
}

fn directory(daemon: &Daemon, name: &str, mib: u64) -> PathBuf {
    let source = daemon.place().dir(name);
    random_file(&source.join("w.bin"), seed() + mib, mib * MIB);
    source
}

/// A tar of zeros: small as it is, large when it is extracted.
fn archive(daemon: &Daemon, mib: u64) -> PathBuf {
    let source = daemon.place().dir("zeros");
    fs::write(source.join("z"), vec![0; usize::try_from(mib * MIB).unwrap()]).unwrap();
    let packed = daemon.place().dir("packed").join("zeros.tar.gz");
    shell("tar -czf \"$2\" -C \"$1\" z", &[&source, &packed]).ok();
    packed
}

fn json_for(daemon: &Daemon, owner: &str, args: &[&str]) -> Value {
    run(daemon.ctl_command().args(["--as", owner, "--json"]).args(args)).ok().json()
}

fn create(daemon: &Daemon, name: &str, owner: &str, url: &str) -> Ran {
    daemon.ctl(&["create", name, "--type", "web", "--uri", url, "--owner", owner, "--wait"])
}

/// Quota and charge of an owner, as it sees them itself.
fn charged(daemon: &Daemon, owner: &str) -> (u64, u64) {
    let own = &json_for(daemon, owner, &["usage"])["owners"][0];
    let all = daemon.json(&["usage"]);
    let of_all = all["owners"].as_array().unwrap().iter().find(|row| row["owner"] == owner);
    if let Some(of_all) = of_all {
        assert_eq!((&own["charged_bytes"], &own["quota_bytes"]), (&of_all["charged_bytes"], &of_all["quota_bytes"]));
    }
    (own["charged_bytes"].as_u64().unwrap(), own["quota_bytes"].as_u64().unwrap())
}

fn nothing_is_kept(daemon: &Daemon) {
    assert!(regular_files(&daemon.state().join("filling")).is_empty(), "something is left of what was refused");
}

#[test]
fn what_is_known_to_be_too_much_is_refused_before_a_byte_is_fetched_and_fits_after_a_removal() {
    let site = Site::open();
    let (first, second) = (site.put("/1", Page::Ranged(noise(1, 3))), site.put("/2", Page::Ranged(noise(2, 3))));
    let owners = format!("{{ \"small team\" = {}, big = 0 }}", 4 * MIB);
    let daemon =
        Daemon::start_with(&[LOOPBACK, ("CKPTD_QUOTAS__DEFAULT", "1000000"), ("CKPTD_QUOTAS__OWNERS", &owners)]);
    let owner = "small team";
    create(&daemon, "first", owner, &first).ok();
    assert_eq!(charged(&daemon, owner), (3 * MIB, 4 * MIB));
    site.take_sent();
    create(&daemon, "second", owner, &second).refused(
        &[5],
        &["`small team` keeps 3.00 MiB here and may keep 4.00 MiB, and 3.00 MiB more are needed", "remove checkpoints"],
    );
    // One is asked for to see whether the source has ranges.
    assert!(site.take_sent() <= 1, "bytes were fetched of what could not be kept");
    let failed = json_for(&daemon, owner, &["get", "second"]);
    assert_eq!((&failed["state"], &failed["error"]["reason"]), (&"failed".into(), &"QUOTA_EXCEEDED".into()));
    assert_eq!(charged(&daemon, owner), (3 * MIB, 4 * MIB), "what was refused counts");
    // Others have their own, or none.
    create(&daemon, "others", "somebody", &second).refused(&[5], &["`somebody` keeps 0 B here"]);
    create(&daemon, "others", "big", &second).ok();
    daemon.ctl(&["create", "public", "--type", "web", "--uri", &second, "--public", "--wait"]).ok();
    daemon.ctl(&["create", "hosts", "--type", "web", "--uri", &second, "--wait"]).ok();
    // Equal bytes count each time: else a quota would tell who has them.
    create(&daemon, "again", owner, &first).refused(&[5], &["3.00 MiB more"]);

    daemon.ctl(&["remove", "first", "--yes"]).ok();
    daemon.ctl(&["retry", failed["id"].as_str().unwrap()]).ok();
    daemon.wait_state(failed["id"].as_str().unwrap(), "ready", LIMIT);
    assert_eq!(charged(&daemon, owner), (3 * MIB, 4 * MIB));
    let shown = daemon.ctl(&["usage"]).ok().stdout;
    assert!(shown.contains("QUOTA") && shown.contains("3.00 MiB of 4.00 MiB"), "{shown}");
}

#[test]
fn of_many_that_begin_together_as_many_pass_as_fit() {
    let site = Site::open();
    let quota = (5 * MIB).to_string();
    let mut daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_QUOTAS__DEFAULT", &quota)]);
    site.limit(4 << 20);
    for number in 0..8 {
        let url = site.put(&format!("/{number}"), Page::Ranged(noise(number, 2)));
        daemon.ctl(&["create", &format!("c{number}"), "--type", "web", "--uri", &url, "--owner", "a"]).ok();
    }
    let decided = |daemon: &Daemon| {
        daemon.rows("list").iter().filter(|row| matches!(row["state"].as_str(), Some("ready" | "failed"))).count()
    };
    wait_until("six are refused while two still fill", LIMIT, || decided(&daemon) >= 6);
    assert!(charged(&daemon, "a").0 <= 5 * MIB);
    // What was admitted is not asked again.
    daemon.kill9();
    daemon.restart();
    site.limit(0);
    wait_until("all are decided", LIMIT, || decided(&daemon) == 8);
    let rows = daemon.rows("list");
    assert_eq!(rows.iter().filter(|row| row["state"] == "ready").count(), 2, "{rows:#?}");
    assert_eq!(charged(&daemon, "a").0, 4 * MIB);
    assert_eq!(regular_files(&daemon.state().join("blobs")).len(), 2);
}

#[test]
fn what_does_not_say_how_much_it_is_is_refused_while_it_arrives() {
    let site = Site::open();
    let quota = (3 * MIB).to_string();
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_QUOTAS__DEFAULT", &quota), ("CKPTD_HTTP__LISTEN", "0")]);
    let unsized_url = site.put("/unsized", Page::Unsized(noise(1, 16)));
    site.limit(2 << 20);
    create(&daemon, "unsized", "a", &unsized_url).refused(&[5], &["`a` keeps ", " and may keep "]);
    assert!(site.take_sent() < 8 * MIB, "it was fetched to its end");
    site.limit(0);
    let zeros = archive(&daemon, 8);
    let packed = site.put("/zeros.tar.gz", Page::Ranged(fs::read(&zeros).unwrap().into()));
    create(&daemon, "archive", "a", &packed).refused(&[5], &["`a` keeps ", " and may keep "]);
    let upload = |name: &str, from: &Path| daemon.ctl(&["upload", name, from.to_str().unwrap(), "--owner", "a"]);
    upload("sent", &directory(&daemon, "four", 4)).refused(&[5], &["may keep 3.00 MiB, and 4.00 MiB more"]);
    upload("sent", &zeros).refused(&[5], &["`a` keeps ", " and may keep "]);
    let from = directory(&daemon, "four", 4);
    let capture = ["capture", "job", "--from", from.to_str().unwrap(), "--name", "captured", "--owner", "a"];
    daemon.ctl(&capture).refused(&[5], &["`a` keeps ", " and may keep "]);
    transfer(&daemon, &from);
    assert_eq!(charged(&daemon, "a"), (0, 3 * MIB));
    nothing_is_kept(&daemon);
    // What fits still does, by each way.
    let two = site.put("/two", Page::Unsized(noise(3, 2)));
    create(&daemon, "fits", "a", &two).ok();
    assert_eq!(charged(&daemon, "a").0, 2 * MIB, "what was charged ahead is given back");
    upload("fits too", &directory(&daemon, "one", 1)).ok();
    assert_eq!(charged(&daemon, "a").0, 3 * MIB);
    upload("one byte", &directory(&daemon, "more", 1)).refused(&[5], &["`a` keeps ", " and may keep "]);
}

/// Sends a directory by the transfer protocol, which must be refused for good.
fn transfer(daemon: &Daemon, from: &Path) {
    let made = daemon.json(&["create", "local", "--type", "local", "--uri", "/x", "--owner", "a"]);
    let tar = daemon.place().join("sent.tar");
    shell("tar -cf \"$2\" -C \"$1\" .", &[from, &tar]).ok();
    let bytes = fs::metadata(&tar).unwrap().len();
    let (url, token) = (made["transfer"]["url"].as_str().unwrap(), made["transfer"]["token"].as_str().unwrap());
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-T", tar.to_str().unwrap(), "-H", &format!("Authorization: Bearer {token}"), "-H"]);
    curl.arg(format!("Content-Range: bytes 0-{}/{bytes}", bytes - 1)).args(["-w", "%{http_code}"]);
    // The piece itself is taken or refused; the record tells why in either case, and so does whatever is sent after it.
    run(curl.arg(format!("{url}/upload"))).ok();
    wait_until("the transfer was refused", LIMIT, || daemon.json(&["get", "local"])["state"] == "failed");
    assert_eq!(daemon.json(&["get", "local"])["error"]["reason"], "QUOTA_EXCEEDED");
    let mut again = Command::new("curl");
    again.args(["-sS", "-H", &format!("Authorization: Bearer {token}"), "-w", "%{http_code}"]);
    let answer = run(again.arg(format!("{url}/upload/status?upload_id=default"))).ok().stdout;
    assert!(answer.ends_with("507") && answer.contains("may keep 3.00 MiB"), "{answer}");
}

#[test]
fn what_stays_in_a_datastore_counts_nothing() {
    let elsewhere = support::place::Place::new();
    random_file(&elsewhere.dir("model").join("w.bin"), seed(), 2 * MIB);
    let path = format!("{:?}", elsewhere.path());
    let env = [("CKPTD_DATASTORES__D__PATH", path.as_str()), ("CKPTD_QUOTAS__DEFAULT", "1048576")];
    let daemon = Daemon::start_with(&env);
    let create = |name: &str, more: &[&str]| {
        let args =
            ["create", name, "--type", "regional", "--uri", "d", "--option", "path=/model", "--owner", "a", "--wait"];
        daemon.ctl(&[&args, more].concat())
    };
    create("in place", &[]).ok();
    assert_eq!(charged(&daemon, "a"), (0, MIB));
    create("copied", &["--option", "copy=true"]).refused(&[5], &["`a` keeps ", " and may keep "]);
}

#[test]
fn a_checkpoint_beyond_the_limit_is_refused_whichever_way_it_comes() {
    let site = Site::open();
    let elsewhere = support::place::Place::new();
    random_file(&elsewhere.dir("model").join("w.bin"), seed(), 5 * MIB);
    let (path, limit) = (format!("{:?}", elsewhere.path()), (4 * MIB).to_string());
    let env = [LOOPBACK, ("CKPTD_DATASTORES__D__PATH", path.as_str()), ("CKPTD_STORE__CHECKPOINT_LIMIT", &limit)];
    let daemon = Daemon::start_with(&env);
    let too_large = |ran: Ran| _ = ran.refused(&[5], &["the checkpoint has", "at most 4194304 bytes are allowed"]);
    let web = |name: &str, url: &str| daemon.ctl(&["create", name, "--type", "web", "--uri", url, "--wait"]);

    // Known before it is fetched: one file, a tree, in place.
    too_large(web("file", &site.put("/file", Page::Ranged(noise(1, 5)))));
    assert!(site.take_sent() <= 1);
    let index = "<html><title>Directory listing for /</title><li><a href=\"1\">1</a><li><a href=\"2\">2</a></html>";
    let tree = |below: &str, page: fn(Arc<Vec<u8>>) -> Page| {
        (1..3).for_each(|number| _ = site.put(&format!("{below}{number}"), page(noise(number, 3))));
        site.put(below, Page::Html(index.as_bytes().to_vec().into()))
    };
    too_large(web("tree", &tree("/sized/", Page::Ranged)));
    assert!(site.take_sent() < 4096, "more than the index was fetched");
    for copy in [&[][..], &["--option", "copy=true"]] {
        let args = ["create", "placed", "--type", "regional", "--uri", "d", "--option", "path=/model", "--wait"];
        too_large(daemon.ctl(&[&args, copy].concat()));
    }
    // Not known: each fits, together they do not.
    too_large(web("unsized tree", &tree("/unsized/", Page::Unsized)));
    too_large(web("unsized", &site.put("/unsized", Page::Unsized(noise(4, 5)))));
    let zeros = archive(&daemon, 8);
    too_large(web("archive", &site.put("/zeros.tar.gz", Page::Ranged(fs::read(&zeros).unwrap().into()))));
    // Sent, and captured.
    let from = directory(&daemon, "five", 5);
    too_large(daemon.ctl(&["upload", "sent", from.to_str().unwrap()]));
    too_large(daemon.ctl(&["upload", "sent", zeros.to_str().unwrap()]));
    too_large(daemon.ctl(&["capture", "job", "--from", from.to_str().unwrap()]));
    nothing_is_kept(&daemon);
    daemon.wait_empty("blobs");
    assert!(daemon.rows("list").iter().all(|row| row["state"] == "failed"));
    daemon.ctl(&["upload", "fits", directory(&daemon, "four", 4).to_str().unwrap()]).ok();
}
