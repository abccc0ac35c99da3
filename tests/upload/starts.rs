//! What survives the daemon: kills and starts in the middle of an upload.

use super::*;

/// That `m` is what comes of an upload of `source` that nothing disturbs.
fn assert_as_undisturbed(daemon: &Daemon, source: &Path) {
    assert_arrived(daemon, source);
    daemon.ctl(&["upload", "undisturbed", source.to_str().unwrap()]).ok();
    let told = |name: &str| ["digest", "revision"].map(|key| daemon.json(&["get", name])[key].clone());
    assert_eq!(told("m"), told("undisturbed"));
}

#[test]
fn with_a_daemon_that_was_killed_and_started_again_a_tree_goes_on() {
    let mut daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let client = stalled(&daemon, &way, &source, &[], 50 * MIB);
    let id = daemon.rows("list")[0]["id"].clone();
    // The file that was under way is none that is recorded yet.
    wait_recorded(&daemon, 40 * MIB);
    wait_until("no more gets through", LIMIT, || way.passed() >= 60 * MIB);
    let before = way.passed();
    daemon.kill9();
    daemon.restart();
    let ran = client.ended().ok();
    assert!(ran.stderr.contains("going on with the upload") && !ran.stderr.contains("sent again"), "{ran}");
    let again = way.passed() - before;
    assert!(again <= size - 40 * MIB + MIB, "{again} bytes of {size} were sent after 40 MiB were durable\n{ran}");
    assert_eq!(daemon.json(&["get", "m"])["id"], id);
    assert_as_undisturbed(&daemon, &source);
}

#[test]
fn with_a_daemon_that_was_killed_and_started_again_one_large_file_goes_on() {
    let mut daemon = Daemon::start();
    let source = daemon.place().dir("large").join("w.bin");
    let size = 200 * MIB + 5;
    random_file(&source, seed(), size);
    let way = Way::to(&daemon, &[Break::Stall(150 * MIB), Break::Cut(30 * MIB)]);
    let client = stalled(&daemon, &way, &source, &[], 130 * MIB);
    wait_recorded(&daemon, 128 * MIB);
    wait_until("no more gets through", LIMIT, || way.passed() >= 150 * MIB);
    let before = way.passed();
    daemon.kill9();
    daemon.restart();
    let ran = client.ended().ok();
    assert!(way.is_mended(), "{ran}");
    let again = way.passed() - before;
    assert!(
        again <= size - 128 * MIB + IN_FLIGHT,
        "{again} bytes of {size} were sent after 128 MiB were durable\n{ran}"
    );
    assert_as_undisturbed(&daemon, source.parent().unwrap());
}

#[test]
fn the_same_command_goes_on_after_its_client_and_the_daemon_were_killed() {
    let mut daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(115 * MIB)]);
    stalled(&daemon, &way, &source, &["--id", ID], 105 * MIB).kill();
    wait_recorded(&daemon, 104 * MIB);
    for _ in 0..2 {
        daemon.kill9();
        daemon.restart();
        let kept = daemon.recorded_bytes("m");
        assert!(kept >= 104 * MIB && daemon.json(&["get", ID])["state"] == "filling");
        wait_until("it is filling from there", LIMIT, || daemon.bytes_done("m") == kept);
        let missing = daemon.json(&["estimate", ID])["missing_bytes"].as_u64();
        assert_eq!(missing, Some(size - kept));
    }
    let before = way.passed();
    let ran = run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert!(ran.stderr.contains("going on with the upload"), "{ran}");
    let again = way.passed() - before;
    assert!(again <= size - 104 * MIB + MIB, "{again} bytes of {size} were sent after 104 MiB were durable\n{ran}");
    assert_as_undisturbed(&daemon, &source);
    daemon.wait_empty("filling");
}

#[test]
fn one_archive_begins_anew_after_a_restart_and_is_sent_by_itself() {
    let mut daemon = Daemon::start();
    let (tree, _) = tree(&daemon);
    let archive = daemon.place().dir("archive").join("m.tar");
    support::ran::shell("tar -cf \"$1\" -C \"$2\" .", &[&archive, &tree]).ok();
    let way = Way::to(&daemon, &[Break::Stall(90 * MIB)]);
    let client = way.spawn(&upload(&archive, &[]));
    wait_until("much of it has passed", LIMIT, || way.passed() >= 89 * MIB);
    daemon.kill9();
    daemon.restart();
    let ran = client.ended().ok();
    assert!(ran.stderr.contains("at entry 0, byte 0"), "{ran}");
    assert_arrived(&daemon, &tree);
}

#[test]
fn one_zip_goes_on_after_a_restart() {
    let mut daemon = Daemon::start();
    let (tree, _) = tree(&daemon);
    let archive = daemon.place().dir("archive").join("m.zip");
    support::ran::shell("cd \"$2\" && zip -0 -q -r -y \"$1\" .", &[&archive, &tree]).ok();
    let way = Way::to(&daemon, &[Break::Stall(90 * MIB)]);
    let client = way.spawn(&upload(&archive, &[]));
    wait_until("it begins", LIMIT, || !daemon.rows("list").is_empty());
    wait_recorded(&daemon, 70 * MIB);
    daemon.kill9();
    daemon.restart();
    let ran = client.ended().ok();
    assert!(!ran.stderr.contains("at entry 0, byte 0"), "{ran}");
    assert!(way.passed() < 160 * MIB, "{} bytes passed for 121 MiB", way.passed());
    assert_arrived(&daemon, &tree);
}

#[test]
fn a_tree_that_changed_while_the_daemon_was_away_is_refused_and_nothing_stays() {
    let mut daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    for (path, named) in [("e.bin", "e.bin changed"), ("d/05", "changed since")] {
        let way = Way::to(&daemon, &[Break::Stall(115 * MIB)]);
        let client = stalled(&daemon, &way, &source, &[], 105 * MIB);
        wait_recorded(&daemon, 104 * MIB);
        daemon.kill9();
        fs::File::options().append(true).open(source.join(path)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        daemon.restart();
        client.ended().refused(&[4], &[named, "upload it again"]);
        wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    }
}

#[test]
fn what_a_dead_daemon_has_left_goes_after_the_idle_time_and_nothing_of_it_stays() {
    let mut daemon = Daemon::start_with(&[("CKPTD_HTTP__UPLOAD_IDLE_S", "30")]);
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(115 * MIB)]);
    stalled(&daemon, &way, &source, &["--owner", "alice"], 105 * MIB).kill();
    wait_recorded(&daemon, 104 * MIB);
    daemon.kill9();
    daemon.restart();
    assert_eq!(daemon.rows("list").len(), 1, "it waits from the start on");
    wait_until("it expires", LIMIT, || nothing_is_left(&daemon));
    wait_until("its owner is told", LIMIT, || {
        run(daemon.ctl_command().args(["--as", "alice", "events"])).ok().stdout.contains("UPLOAD_EXPIRED")
    });
    ["filling", "blobs"].iter().for_each(|directory| daemon.wait_empty(directory));
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    let rows = |table: &str| -> i64 {
        catalog.query_row(&format!("SELECT COUNT(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    };
    wait_until("no row is left", LIMIT, || ["uploads", "sent", "fills", "blobs"].iter().all(|table| rows(table) == 0));
}
