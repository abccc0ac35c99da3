//! Checkpoints that somebody sends by the transfer protocol: with the platform's own SDK, and with requests that it never makes.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::corpus::random_file;
use crate::support::daemon::Daemon;
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::ran::{run, shell, wait_for, wait_until};
use crate::support::server::{free_port, tool};

const ANY_PORT: (&str, &str) = ("CKPTD_HTTP__LISTEN", "0");

fn create(daemon: &Daemon, name: &str, options: &[&str]) -> Value {
    let record = daemon.json(&[&["create", name, "--type", "local", "--uri", "/x"], options].concat());
    assert_eq!(record["state"], "filling", "{record}");
    assert_eq!(daemon.json(&["get", name])["transfer"], record["transfer"]);
    record["transfer"].clone()
}

fn client(verb: &str, transfer: &Value) -> Command {
    let mut command = Command::new(tool("venv/bin/python"));
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/transfer.py"));
    command.arg(verb).arg(transfer["url"].as_str().unwrap()).env("TOKEN", transfer["token"].as_str().unwrap());
    command
}

fn send(daemon: &Daemon, name: &str, options: &[&str], path: &Path) {
    run(client("sdk", &create(daemon, name, options)).arg(path)).ok();
    daemon.wait_state(name, "ready", Duration::from_secs(30));
}

#[test]
fn the_sdk_sends_trees_files_and_archives() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let tree = daemon.place().dir("tree");
    fs::create_dir_all(tree.join("a b/ü%+#\nx")).unwrap();
    fs::create_dir(tree.join("empty")).unwrap();
    fs::write(tree.join("a b/ü%+#\nx/f"), b"f").unwrap();
    fs::write(tree.join("nothing"), b"").unwrap();
    random_file(&tree.join("w.bin"), 1, 20 << 20);
    fs::hard_link(tree.join("w.bin"), tree.join("same")).unwrap();
    symlink("w.bin", tree.join("link")).unwrap();
    (0..2000).for_each(|index| fs::write(tree.join(format!("empty-{index}")), format!("{index}")).unwrap());
    send(&daemon, "tree", &[], &tree);
    assert_same_tree(&tree, &daemon.attach("tree", "tree"));
    daemon.ctl(&["upload", "uploaded", tree.to_str().unwrap()]).ok();
    let digest = |name: &str| daemon.json(&["get", name])["digest"].clone();
    assert_eq!(digest("tree"), digest("uploaded"), "one tree has one digest, however it is sent");
    assert_mounted(&tree, &daemon.attach("uploaded", "uploaded"));

    let one = daemon.place().dir("one");
    fs::copy(tree.join("w.bin"), one.join("w.bin")).unwrap();
    send(&daemon, "one", &[], &one.join("w.bin"));
    assert_same_tree(&one, &daemon.attach("one", "one"));

    let packed = daemon.place().dir("packed");
    shell("tar -czf \"$2/tree.tar.gz\" -C \"$1\" .", &[&tree, &packed]).ok();
    let archive = packed.join("tree.tar.gz");
    send(&daemon, "extracted", &[], &archive);
    assert_same_tree(&tree, &daemon.attach("extracted", "extracted"));
    send(&daemon, "kept", &["--option", "extract=false"], &archive);
    assert_same_tree(&packed, &daemon.attach("kept", "kept"));
    send(&daemon, "beside", &[], &packed);
    assert_same_tree(&packed, &daemon.attach("beside", "beside"));
}

#[test]
fn the_sdk_gets_through_a_proxy_that_falters() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let tree = daemon.place().dir("tree");
    random_file(&tree.join("w.bin"), 1, 9 << 20);
    let mut transfer = create(&daemon, "tree", &[]);
    let port = transfer["url"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap();
    let proxy = Faults::before(port);
    transfer["url"] = proxy.url("").into();
    // Pieces by the first digit of where they begin: some are refused on the way, some arrive and the client is not told.
    proxy.spoil("bytes 0-", Fault::Reset(0), 1);
    proxy.spoil("bytes 1", Fault::Status(502, ""), 1);
    proxy.spoil("bytes 2", Fault::Status(503, ""), 1);
    proxy.spoil("bytes 3", Fault::Status(504, ""), 1);
    proxy.spoil("bytes 4", Fault::Truncate(0), 1);
    proxy.spoil("POST /finalize", Fault::Reset(0), 1);
    run(client("sdk", &transfer).arg(&tree)).ok();
    assert_eq!(proxy.faults_left(), 0, "all of them were met");
    daemon.wait_state("tree", "ready", Duration::from_secs(30));
    assert_same_tree(&tree, &daemon.attach("tree", "tree"));
}

#[test]
fn the_sdk_sends_twenty_thousand_files() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let tree = daemon.place().dir("tree");
    for directory in 0..20 {
        let below = daemon.place().dir(&format!("tree/{directory}"));
        (0..1000).for_each(|index| fs::write(below.join(format!("f{index}")), format!("{directory} {index}")).unwrap());
    }
    send(&daemon, "tree", &[], &tree);
    assert_eq!(daemon.json(&["get", "tree"])["files"], 20_000);
    assert_same_tree(&tree, &daemon.attach("tree", "tree"));
}

#[test]
fn what_the_sdk_never_does_changes_nothing_and_is_answered() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let (raw, bad) = (create(&daemon, "raw", &[]), create(&daemon, "bad", &[]));
    run(client("raw", &raw).env("OTHER", bad["token"].as_str().unwrap())).ok();
    assert_eq!(daemon.json(&["get", "bad"])["state"], "failed");
    daemon.ctl(&["retry", "bad"]).ok();
    assert_eq!(daemon.json(&["get", "bad"])["transfer"], bad);
    let mac = bad["token"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
    let found = run(Command::new("grep").args(["-rlaF", &mac]).arg(daemon.state()).arg(daemon.place().join("stderr")));
    assert_eq!(found.stdout, "", "the token is on disk");
    assert!(!daemon.ctl(&["events"]).ok().stdout.contains(&mac));
}

#[test]
fn a_record_says_how_much_has_been_sent() {
    const FILE: u64 = 9 << 20;
    const SENT: u64 = 6 << 20;
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let (tree, half) = (daemon.place().dir("tree"), daemon.place().join("half"));
    random_file(&tree.join("w.bin"), 1, FILE);
    shell(&format!("tar -cf - -C \"$1\" . | head -c {SENT} > \"$2\""), &[&tree, &half]).ok();
    let transfer = create(&daemon, "k", &[]);
    let (url, token) = (transfer["url"].as_str().unwrap(), transfer["token"].as_str().unwrap());
    let mut curl = Command::new("curl");
    curl.args(["-sSf", "-H", &format!("Authorization: Bearer {token}"), "-H"]);
    curl.arg(format!("Content-Range: bytes 0-{}/{FILE}", SENT - 1)).arg("-T").arg(&half);
    run(curl.arg(format!("{url}/upload"))).ok();
    wait_until("some of it is here", Duration::from_secs(30), || daemon.bytes_done("k") > 0);
    let done = daemon.bytes_done("k");
    assert!(done <= SENT, "{done} bytes of {SENT} that were sent");
}

#[test]
fn an_upload_that_is_left_expires() {
    let daemon = Daemon::start_with(&[ANY_PORT, ("CKPTD_HTTP__UPLOAD_IDLE_S", "3")]);
    run(&mut client("half", &create(&daemon, "left", &[]))).ok();
    wait_until("the upload expires", Duration::from_secs(20), || {
        daemon.ctl(&["events"]).ok().stdout.contains("UPLOAD_EXPIRED")
    });
    daemon.wait_empty("filling");
    run(&mut client("go-on", &daemon.json(&["get", "left"])["transfer"])).ok();
}

#[test]
fn an_upload_that_is_killed_in_its_middle_goes_on_and_is_forgotten_where_nobody_does() {
    let mut daemon = Daemon::start_with(&[ANY_PORT, ("CKPTD_HTTP__UPLOAD_IDLE_S", "5")]);
    run(&mut client("half", &create(&daemon, "k", &[]))).ok();
    run(&mut client("half", &create(&daemon, "left", &[]))).ok();
    let token = daemon.json(&["get", "k"])["transfer"]["token"].clone();
    daemon.kill9();
    daemon.restart();
    let transfer = daemon.json(&["get", "k"])["transfer"].clone();
    assert_eq!(transfer["token"], token);
    run(&mut client("rest", &transfer)).ok();
    assert_eq!(fs::read(daemon.attach("job", "k").join("a")).unwrap(), vec![b'a'; 300_000]);
    wait_until("the other expires", Duration::from_secs(20), || {
        daemon.ctl(&["events"]).ok().stdout.contains("UPLOAD_EXPIRED")
    });
    daemon.wait_empty("filling");
    assert_eq!(daemon.json(&["get", "left"])["state"], "filling", "it waits for another upload");
}

#[test]
fn what_was_all_sent_before_a_kill_ends_after_it() {
    let mut daemon = Daemon::start_with(&[ANY_PORT]);
    let digest = run(&mut client("all-but-the-end", &create(&daemon, "k", &[]))).ok().stdout;
    for _ in 0..3 {
        daemon.kill9();
        daemon.restart();
    }
    run(client("the-end", &daemon.json(&["get", "k"])["transfer"]).arg(digest.trim())).ok();
    let job = daemon.attach("job", "k");
    for number in 0..40 {
        assert_eq!(fs::read_to_string(job.join(format!("f{number}"))).unwrap(), number.to_string().repeat(50_000));
    }
}

#[test]
fn what_was_kept_in_another_boot_or_is_damaged_is_not_gone_on_with() {
    let mut daemon = Daemon::start_with(&[ANY_PORT]);
    run(&mut client("half", &create(&daemon, "k", &[]))).ok();
    let id = daemon.json(&["get", "k"])["id"].as_str().unwrap().to_owned();
    daemon.kill9();
    let kept = daemon.state().join("filling").join(id).join("0");
    let mut bytes = fs::read(&kept).unwrap();
    bytes[50] ^= 1;
    fs::write(&kept, bytes).unwrap();
    daemon.restart();
    daemon.wait_empty("filling");
    run(&mut client("go-on", &daemon.json(&["get", "k"])["transfer"])).ok();
    assert_eq!(daemon.json(&["get", "k"])["state"], "ready");
}

/// What the SDK sends while the daemon is ended again and again: once its client has seen another `step` bytes arrive, `end` ends it and begins another.
fn assert_sent_despite(step: u64, path: fn(&Path) -> PathBuf, end: fn(&mut Daemon)) {
    // The same port after each, so that its client finds another daemon there.
    let port = free_port().to_string();
    let mut daemon = Daemon::start_with(&[("CKPTD_HTTP__LISTEN", &port)]);
    let tree = daemon.place().dir("tree");
    (0..3).for_each(|number| random_file(&tree.join(format!("{number}.bin")), number, (40 << 20) + number));
    fs::create_dir_all(tree.join("small/empty")).unwrap();
    (0..3000).for_each(|number| fs::write(tree.join(format!("small/{number}")), format!("{number}")).unwrap());
    (0..40).for_each(|number| random_file(&tree.join(format!("small/m{number}")), 100 + number, 1 << 20));
    fs::hard_link(tree.join("0.bin"), tree.join("same")).unwrap();
    symlink("0.bin", tree.join("link")).unwrap();
    let sent = path(&tree);
    let mut sending = client("sdk", &create(&daemon, "k", &[])).arg(&sent).stderr(Stdio::inherit()).spawn().unwrap();
    let (mut ends, mut most) = (0, 0);
    loop {
        // All of it is more than any figure.
        wait_until("more of it is here", Duration::from_secs(120), || daemon.bytes_done("k") > most + step);
        most = daemon.bytes_done("k");
        if most == u64::MAX {
            break;
        }
        end(&mut daemon);
        ends += 1;
    }
    assert!(ends >= 2, "it was sent too quickly: {ends}");
    assert_eq!(wait_for(&mut sending, Duration::from_secs(60)), Some(0), "its client was told that it failed");
    let expected = if sent == tree { tree } else { daemon.place().dir("one") };
    if sent != expected {
        fs::hard_link(&sent, expected.join("0.bin")).unwrap();
    }
    assert_mounted(&expected, &daemon.attach("job", "k"));
    let events = daemon.ctl(&["events"]).ok().stdout;
    assert!(!events.contains("UPLOAD_REPLACED") && !events.contains("UPLOAD_EXPIRED"), "{events}");
    daemon.wait_empty("filling");
}

fn kill(daemon: &mut Daemon) {
    daemon.kill9();
    daemon.restart();
}

#[test]
fn the_sdk_sends_a_tree_while_the_daemon_is_killed_and_does_not_notice() {
    assert_sent_despite(25 << 20, Path::to_path_buf, kill);
}

#[test]
fn the_sdk_sends_one_file_while_the_daemon_is_killed_and_does_not_notice() {
    assert_sent_despite(9 << 20, |tree| tree.join("0.bin"), kill);
}

#[test]
fn the_sdk_sends_a_tree_while_the_daemon_is_drained_and_begun_again() {
    assert_sent_despite(60 << 20, Path::to_path_buf, |daemon| {
        daemon.ctl(&["drain"]).ok();
        daemon.stop();
        daemon.restart();
    });
}

#[test]
fn the_sdk_sends_a_file_that_is_kept_where_it_is_filled_while_the_daemon_is_killed_and_does_not_notice() {
    let port = free_port().to_string();
    let mut daemon = Daemon::start_with(&[("CKPTD_HTTP__LISTEN", &port)]);
    let tree = daemon.place().dir("tree");
    random_file(&tree.join("0.bin"), 1, 400 << 20);
    random_file(&tree.join("1.bin"), 2, 150 << 20);
    let transfer = create(&daemon, "k", &[]);
    let id = daemon.json(&["get", "k"])["id"].as_str().unwrap().to_owned();
    let tail = daemon.state().join("filling").join(id).join("0");
    // What tells of it begins with a digest, which a start takes away.
    let is_kept_there = || {
        let mut page = [0; 4096];
        File::open(&tail).and_then(|mut tail| tail.read_exact(&mut page)).is_ok() && {
            let word = page.windows(7).position(|word| word == b"stretch");
            word.is_some_and(|at| page[at - 34..at - 2] != [0; 32])
        }
    };
    let mut sending = client("sdk", &transfer).arg(&tree).stderr(Stdio::inherit()).spawn().unwrap();
    for _ in 0..3 {
        wait_until("something is kept where it is filled", Duration::from_secs(60), is_kept_there);
        let before = daemon.bytes_done("k");
        wait_until("more of it is here", Duration::from_secs(60), || {
            daemon.bytes_done("k").saturating_sub(before) > 20 << 20
        });
        assert!(daemon.bytes_done("k") < u64::MAX, "it was sent before the daemon was killed");
        kill(&mut daemon);
    }
    assert_eq!(wait_for(&mut sending, Duration::from_secs(120)), Some(0), "its client was told that it failed");
    assert_mounted(&tree, &daemon.attach("job", "k"));
    let events = daemon.ctl(&["events"]).ok().stdout;
    assert!(!events.contains("UPLOAD_REPLACED") && !events.contains("UPLOAD_EXPIRED"), "{events}");
    daemon.wait_empty("filling");
}

#[test]
fn the_sdk_sends_one_archive_while_the_daemon_is_killed_and_does_not_notice() {
    let port = free_port().to_string();
    let mut daemon = Daemon::start_with(&[("CKPTD_HTTP__LISTEN", &port)]);
    let (tree, packed) = (daemon.place().dir("tree"), daemon.place().dir("packed"));
    (0..6).for_each(|number| random_file(&tree.join(format!("{number}.bin")), number, 24 << 20));
    for (name, pack) in
        [("tree.tar.gz", "tar -c -C \"$1\" . | gzip -1 > \"$2\""), ("tree.zip", "cd \"$1\" && zip -0 -q -r \"$2\" .")]
    {
        let archive = packed.join(name);
        shell(pack, &[&tree, &archive]).ok();
        let mut sending = client("sdk", &create(&daemon, name, &[])).arg(&archive).spawn().unwrap();
        for until in [24 << 20, 80 << 20] {
            wait_until("some of it is here", Duration::from_secs(60), || daemon.recorded_bytes(name) > until);
            assert!(daemon.recorded_bytes(name) < u64::MAX, "it was sent before the daemon was killed");
            kill(&mut daemon);
        }
        assert_eq!(wait_for(&mut sending, Duration::from_secs(60)), Some(0), "its client was told that it failed");
        daemon.wait_state(name, "ready", Duration::from_secs(30));
        assert_mounted(&tree, &daemon.attach(name, name));
        daemon.wait_empty("filling");
    }
}

#[test]
fn a_first_piece_that_stalls_begins_no_upload_and_holds_nothing() {
    let daemon = Daemon::start_with(&[ANY_PORT, ("CKPTD_HTTP__UPLOAD_IDLE_S", "2")]);
    let transfer = create(&daemon, "k", &[]);
    run(&mut client("stalled", &transfer)).ok();
    assert_eq!(daemon.json(&["get", "k"])["state"], "filling", "it waits for an upload");
    let events = daemon.ctl(&["events"]).ok().stdout;
    assert!(!events.contains("UPLOAD_EXPIRED"), "none was begun: {events}");
    assert_eq!(fs::read_dir(daemon.state().join("filling")).unwrap().count(), 0);
    let port: u16 = transfer["url"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap();
    wait_until("no connection is held", Duration::from_secs(20), || held_connections(port) == 0);
    run(&mut client("go-on", &transfer)).ok();
    assert_eq!(daemon.json(&["get", "k"])["state"], "ready");
}

/// Connections to `port` of this host that are open at either end: listeners and what is only remembered do not count.
fn held_connections(port: u16) -> usize {
    let (table, end) = (fs::read_to_string("/proc/net/tcp").unwrap(), format!(":{port:04X}"));
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&end) && !["0A", "06"].contains(&row[3])).count()
}

#[test]
fn a_name_that_is_both_a_file_and_a_directory_is_refused_by_name() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    for (order, words) in
        [("below", "`weights/part1` is below `weights`"), ("above", "`weights` occurs twice, as a directory")]
    {
        let ran = run(client("clash", &create(&daemon, order, &[])).arg(order)).ok();
        assert!(ran.stdout.starts_with("422 ") && ran.stdout.contains(words), "{ran}");
        let record = daemon.json(&["get", order]);
        assert_eq!((&record["state"], &record["error"]["reason"]), (&json!("failed"), &json!("ARCHIVE_REFUSED")));
    }
    assert_eq!(fs::read_dir(daemon.state().join("filling")).unwrap().count(), 0);
}

#[test]
fn a_checkpoint_of_nothing_is_refused_however_it_is_sent() {
    let daemon = Daemon::start_with(&[ANY_PORT]);
    let nothing = daemon.place().dir("nothing");
    daemon.ctl(&["upload", "uploaded", nothing.to_str().unwrap()]).refused(&[2], &["no files and no directories"]);
    run(client("sdk", &create(&daemon, "sent", &[])).arg(&nothing));
    daemon.wait_state("sent", "failed", Duration::from_secs(30));
    assert_eq!(daemon.json(&["get", "sent"])["error"]["reason"], "EMPTY_SOURCE");
}

#[test]
fn a_drained_daemon_takes_no_uploads_and_its_successor_does() {
    let mut daemon = Daemon::start_with(&[ANY_PORT]);
    run(&mut client("half", &create(&daemon, "k", &[]))).ok();
    daemon.ctl(&["drain"]).ok();
    run(&mut client("drained", &daemon.json(&["get", "k"])["transfer"])).ok();
    assert_eq!(daemon.json(&["get", "k"])["state"], "filling", "it waits for its sender");
    daemon.stop();
    daemon.restart();
    run(&mut client("rest", &daemon.json(&["get", "k"])["transfer"])).ok();
    assert_eq!(daemon.json(&["get", "k"])["state"], "ready");
}
