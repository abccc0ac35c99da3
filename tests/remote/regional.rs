//! Datastores: directories of loop-mounted file systems and a FUSE file system that hangs and fails, served where they are.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::corpus::{Random, odd_names, odd_tree, random_file, seed};
use crate::support::daemon::Daemon;
use crate::support::faultfs::FaultFs;
use crate::support::files::{
    assert_digests, assert_mounted, assert_same_tree, b3sum, disk_bytes, regular_files, xattr,
};
use crate::support::loopfs::LoopFs;
use crate::support::place::Place;
use crate::support::ran::{Ran, run, shell, wait_for, wait_until};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(180);
const MODELS: &str = "CKPTD_DATASTORES__MODELS__PATH";

fn daemon_with(datastore: &Path) -> Daemon {
    Daemon::start_with(&[(MODELS, datastore.to_str().unwrap())])
}

fn create_with(daemon: &Daemon, name: &str, path: &str, more: &[&str]) -> Ran {
    let path = format!("path={path}");
    let mut line = vec!["create", name, "--type", "regional", "--uri", "models", "--wait", "--option", &path];
    line.extend(more);
    daemon.ctl(&line)
}

fn create(daemon: &Daemon, name: &str, path: &str) -> Value {
    create_with(daemon, name, path, &[]).ok();
    daemon.json(&["get", name])
}

/// Messages of the events of this kind that name `file`.
fn events(daemon: &Daemon, kind: &str, file: &str) -> Vec<String> {
    let of_kind = daemon.rows("events").into_iter().filter(|event| event["kind"] == kind);
    let messages = of_kind.map(|event| event["message"].as_str().unwrap().to_owned());
    messages.filter(|message| message.contains(&format!("`{file}`"))).collect()
}

fn errno<T: std::fmt::Debug>(outcome: std::io::Result<T>) -> Option<i32> {
    outcome.unwrap_err().raw_os_error()
}

fn noise(number: u64, bytes: usize) -> Vec<u8> {
    Random::new(seed() ^ number).bytes(bytes)
}

#[test]
fn a_directory_of_a_datastore_is_served_where_it_is() {
    let store = LoopFs::ext4(160);
    let tree = store.dir("sub/dir");
    odd_tree(&tree, seed());
    odd_names(&tree);
    random_file(&tree.join("weights.bin"), seed(), 48 * MIB);
    let daemon = daemon_with(store.root());
    let before = disk_bytes(daemon.state());
    let record = create(&daemon, "here", "/sub/dir/");
    assert_eq!((&record["physical_bytes"], &record["unique_bytes"]), (&0.into(), &0.into()), "{record}");
    let files = regular_files(&tree);
    let logical: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
    assert_eq!((&record["files"], &record["logical_bytes"]), (&files.len().into(), &logical.into()));

    let at = daemon.attach("job", "here");
    assert_same_tree(&tree, &at);
    for file in files.iter().filter(|file| !file.starts_with(tree.join("deep"))) {
        let shown = at.join(file.strip_prefix(&tree).unwrap());
        assert_eq!(xattr(&shown, "user.ckptd.digest"), b3sum(file), "{}", shown.display());
        assert_eq!(xattr(&shown, "user.ckptd.state"), "daemon");
    }
    let taken = disk_bytes(daemon.state()) - before;
    assert!(taken < 12 * MIB, "{taken} bytes in the state directory for {logical} elsewhere");
    assert_eq!(errno(fs::write(at.join("one"), b"y")), Some(libc::EROFS));
    assert_eq!(errno(File::options().write(true).open(at.join("one"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(at.join("one"))), Some(libc::EROFS));

    fs::write(tree.join("new"), b"later").unwrap();
    assert!(!at.join("new").exists(), "the listing is that of the creation");
    fs::remove_file(tree.join("new")).unwrap();
    assert_eq!(events(&daemon, "SOURCE_CHANGED", "one"), [] as [&str; 0]);
}

#[test]
fn a_copy_and_a_view_of_the_same_tree_come_and_go_without_each_other() {
    let place = Place::new();
    let tree = place.dir("store/tree");
    odd_tree(&tree, seed());
    fs::remove_dir_all(tree.join("deep/1")).unwrap();
    let daemon = daemon_with(&place.join("store"));
    let view = create(&daemon, "view", "/tree");
    create_with(&daemon, "copy", "/tree", &["--option", "copy=true"]).ok();
    let copy = daemon.json(&["get", "copy"]);
    assert_eq!(view["digest"], copy["digest"], "one tree has one digest");
    assert!(copy["physical_bytes"].as_u64().unwrap() > 9 * MIB);
    assert_eq!(view["physical_bytes"], 0);
    assert_same_tree(&tree, &daemon.attach("of-copy", "copy"));
    daemon.ctl(&["release", "of-copy"]).ok();

    daemon.ctl(&["remove", "copy", "--yes"]).ok();
    // A busy disk may give them back after the answer.
    wait_until("its bytes are back", PATIENCE, || daemon.json(&["usage"])["physical_bytes"] == 0);
    assert_eq!(regular_files(&daemon.state().join("blobs")).len(), 0, "nothing names these blobs any more");
    assert_same_tree(&tree, &daemon.attach("of-view", "view"));

    create_with(&daemon, "copy", "/tree", &["--option", "copy=true"]).ok();
    daemon.ctl(&["release", "of-view"]).ok();
    daemon.ctl(&["remove", "view", "--yes"]).ok();
    assert_same_tree(&tree, &daemon.attach("again", "copy"));
    assert!(tree.join("one").exists(), "removing a view touches nothing in the datastore");
}

/// Changes a file in one way.
type Change = fn(&Path);

const CHANGES: &[(&str, Change)] = &[
    ("byte", |file| {
        let opened = File::options().write(true).open(file).unwrap();
        let modified = opened.metadata().unwrap().modified().unwrap();
        opened.write_all_at(b"!", 3 * MIB - 7).unwrap();
        opened.set_modified(modified).unwrap();
    }),
    ("shorter", |file| File::options().write(true).open(file).unwrap().set_len(MIB).unwrap()),
    ("longer", |file| File::options().write(true).open(file).unwrap().set_len(9 * MIB).unwrap()),
    ("replaced", |file| {
        let other = file.with_extension("other");
        fs::copy(file, &other).unwrap();
        fs::rename(&other, file).unwrap();
    }),
    ("removed", |file| fs::remove_file(file).unwrap()),
    ("directory", |file| {
        fs::remove_file(file).unwrap();
        fs::create_dir(file).unwrap();
    }),
    ("link", |file| {
        fs::rename(file, file.with_extension("real")).unwrap();
        symlink(file.with_extension("real"), file).unwrap();
    }),
    ("mode", |file| fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap()),
];

#[test]
fn what_changes_in_a_datastore_is_an_error_and_never_other_bytes() {
    let store = LoopFs::ext4(96);
    let tree = store.dir("tree");
    let names: Vec<_> = CHANGES.iter().map(|(name, _)| *name).chain(["calm"]).collect();
    for (number, name) in (0..).zip(&names) {
        fs::write(tree.join(name), noise(number, 3 << 20)).unwrap();
    }
    let daemon = daemon_with(store.root());
    create(&daemon, "w", "/tree");
    let at = daemon.attach("job", "w");
    // One is open already, another is not.
    let held: Vec<_> = CHANGES.iter().map(|(name, _)| File::open(at.join(name)).unwrap()).collect();
    for (name, change) in CHANGES {
        change(&tree.join(name));
    }
    for ((name, _), held) in CHANGES.iter().zip(&held) {
        for _ in 0..3 {
            assert_eq!(errno(held.read_at(&mut [0; 100], 5)), Some(libc::EIO), "{name}");
            assert_eq!(errno(fs::read(at.join(name))), Some(libc::EIO), "{name}");
        }
        let told = events(&daemon, "SOURCE_CHANGED", name);
        assert_eq!(told.len(), 1, "once for each change: {told:?}");
        assert!(told[0].contains("`models`"), "{told:?}");
    }
    assert!(fs::read(at.join("calm")).unwrap() == fs::read(tree.join("calm")).unwrap());
    // A second change of the same file is a second event.
    fs::remove_file(tree.join("byte")).unwrap();
    assert_eq!(errno(fs::read(at.join("byte"))), Some(libc::EIO));
    assert_eq!(events(&daemon, "SOURCE_CHANGED", "byte").len(), 2);
}

#[test]
fn pages_from_before_a_change_stay_right_and_others_fault() {
    let store = LoopFs::ext4(96);
    let bytes = noise(1, 32 << 20);
    fs::write(store.root().join("w.bin"), &bytes).unwrap();
    let daemon = daemon_with(store.root());
    // The root of a fresh ext4 holds `lost+found`.
    create(&daemon, "w", "/");
    let file = daemon.attach("job", "w").join("w.bin");
    let map = r"
import mmap, os, sys
m = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)
sys.stdout.buffer.write(m[:4096])
sys.stdout.flush()
m[int(sys.argv[2])]
";
    let touch =
        |offset: u64| Command::new("python3").args(["-c", map]).arg(&file).arg(offset.to_string()).output().unwrap();
    assert!(touch(0).stdout == bytes[..4096]);
    File::options().write(true).open(store.root().join("w.bin")).unwrap().write_all_at(b"!!!!", 30 * MIB).unwrap();
    let opened = File::open(&file).unwrap();
    let mut page = [0; 4096];
    opened.read_exact_at(&mut page, 0).unwrap();
    assert!(page == bytes[..4096], "a page from before the change");
    for offset in [30 * MIB, 20 * MIB] {
        assert_eq!(errno(opened.read_at(&mut page, offset)), Some(libc::EIO));
        let mapped = touch(offset);
        assert!(mapped.stdout == bytes[..4096]);
        assert_eq!(mapped.status.signal(), Some(libc::SIGBUS), "{mapped:?}");
    }
    assert_eq!(events(&daemon, "SOURCE_CHANGED", "w.bin").len(), 1);
}

#[test]
fn a_file_that_hangs_leaves_the_others_alone() {
    let files: Vec<_> = ["hung", "calm", "stale", "broken"]
        .iter()
        .zip(0..)
        .map(|(n, i)| ((*n).to_owned(), noise(i, 6 << 20)))
        .collect();
    let store = FaultFs::mount(files.clone());
    let daemon = daemon_with(store.root());
    create(&daemon, "w", "/");
    create(&daemon, "other", "/");
    let (at, other) = (daemon.attach("job", "w"), daemon.attach("job2", "other"));
    store.hang("hung");
    let (done, answers) = mpsc::channel();
    for number in 0..48_u64 {
        let (file, done) = (at.join("hung"), done.clone());
        thread::spawn(move || {
            let mut page = [0; 512];
            let read = File::open(file).and_then(|file| file.read_exact_at(&mut page, number * 120_000));
            let _ = done.send(read.map(|()| (number, page)));
        });
    }
    let (calm, reading) = mpsc::channel();
    let paths = [at.join("calm"), other.join("calm")];
    thread::spawn(move || paths.into_iter().for_each(|path| calm.send(fs::read(path)).unwrap()));
    for _ in 0..2 {
        assert!(reading.recv_timeout(PATIENCE).unwrap().unwrap() == files[1].1);
    }
    assert!(answers.try_recv().is_err(), "nobody answered these reads");
    assert_eq!(daemon.json(&["status"])["sessions"], 2);

    store.fail("stale", libc::ESTALE, 1);
    assert!(fs::read(at.join("stale")).unwrap() == files[2].1, "a fresh descriptor reads on");
    assert_eq!(events(&daemon, "SOURCE_UNREADABLE", "stale"), [] as [&str; 0]);
    store.fail("broken", libc::EIO, u32::MAX);
    for _ in 0..3 {
        assert_eq!(errno(fs::read(at.join("broken"))), Some(libc::EIO));
    }
    assert_eq!(events(&daemon, "SOURCE_UNREADABLE", "broken").len(), 1);
    store.fail("broken", 0, 0);
    assert!(fs::read(at.join("broken")).unwrap() == files[3].1, "it reads again when the server is well");

    store.freeze();
    let late = store.root().with_file_name("late");
    fs::create_dir(&late).unwrap();
    daemon.attach_at("job3", &["w"], &late).refused(&[7], &["`models`", "no answer"]);

    store.let_go();
    for _ in 0..48 {
        let (number, page) = answers.recv_timeout(PATIENCE).unwrap().unwrap();
        let from = usize::try_from(number * 120_000).unwrap();
        assert!(page == files[0].1[from..from + 512]);
    }
}

/// Threads of the daemon that wait for a FUSE file system.
fn held_up(daemon: &Daemon) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.server())).unwrap().flatten();
    let waits = |task: &fs::DirEntry| fs::read_to_string(task.path().join("stack")).unwrap_or_default();
    tasks.filter(|task| waits(task).contains("request_wait_answer")).count()
}

#[test]
fn a_datastore_that_does_not_answer_is_told_of_and_holds_up_few_threads() {
    let (store, place) = (FaultFs::mount(vec![("w".to_owned(), noise(1, 1 << 20))]), Place::new());
    fs::write(place.dir("other").join("x"), b"x").unwrap();
    let other = place.join("other");
    let daemon = Daemon::start_with(&[
        (MODELS, store.root().to_str().unwrap()),
        ("CKPTD_DATASTORES__OTHER__PATH", other.to_str().unwrap()),
        ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "3"),
        ("CKPTD_SOURCES__ATTEMPTS", "2"),
    ]);
    store.freeze();
    let names: Vec<_> = (0..12).map(|number| format!("w{number}")).collect();
    for name in &names[1..] {
        daemon.ctl(&["create", name, "--type", "regional", "--uri", "models"]).ok();
    }
    create_with(&daemon, "w0", "/", &[]).refused(&[7], &["listing the datastore `models`", "no answer within 3 s"]);
    for name in &names {
        daemon.wait_state(name, "failed", PATIENCE);
        assert_eq!(daemon.json(&["get", name])["error"]["reason"], "DATASTORE_SILENT");
        assert!((1..=4).contains(&held_up(&daemon)), "{} threads wait", held_up(&daemon));
    }
    daemon.ctl(&["create", "x", "--type", "regional", "--uri", "other", "--wait"]).ok();
    assert_eq!(fs::read(daemon.attach("job", "x").join("x")).unwrap(), b"x");

    store.let_go();
    wait_until("nothing is held up", PATIENCE, || held_up(&daemon) == 0);
    for name in &names {
        daemon.ctl(&["retry", name]).ok();
        daemon.wait_state(name, "ready", PATIENCE);
    }
    assert!(fs::read(daemon.attach("job2", "w11").join("w")).unwrap() == noise(1, 1 << 20));
}

#[test]
fn a_datastore_that_answers_again_is_listed_without_being_told_to() {
    let store = FaultFs::mount(vec![("w".to_owned(), noise(1, 1 << 20))]);
    let daemon =
        Daemon::start_with(&[(MODELS, store.root().to_str().unwrap()), ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "1")]);
    store.freeze();
    daemon.ctl(&["create", "w", "--type", "regional", "--uri", "models"]).ok();
    wait_until("it was given up once", PATIENCE, || daemon.stderr().contains("no answer within 1 s"));
    store.let_go();
    daemon.wait_state("w", "ready", PATIENCE);
}

#[test]
fn an_interrupted_ingest_keeps_the_digests_it_had_and_a_restart_serves_again() {
    let files: Vec<_> = (0..60).map(|number| (format!("f{number:02}"), noise(number, 512 << 10))).collect();
    let total = files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
    let store = FaultFs::mount(files.clone());
    let mut daemon = daemon_with(store.root());
    // Digests are recorded every second: half of them must take longer.
    store.slow_down(Duration::from_millis(100));
    daemon.ctl(&["create", "w", "--type", "regional", "--uri", "models"]).ok();
    wait_until("more than half is digested", PATIENCE, || daemon.bytes_done("w") > total / 2);
    daemon.kill9();
    store.slow_down(Duration::ZERO);
    store.take_bytes();
    daemon.restart();
    daemon.wait_state("w", "ready", PATIENCE);
    let again = store.take_bytes();
    assert!(again < total * 4 / 5, "{again} of {total} bytes were read again");

    let target = daemon.attach("job", "w");
    assert_digests(&target);
    daemon.kill9();
    daemon.restart();
    for (name, bytes) in &files {
        assert!(fs::read(target.join(name)).unwrap() == *bytes, "{name}");
    }
}

#[test]
fn a_copy_is_waited_for_and_the_answer_says_so() {
    let files: Vec<_> = (0..20).map(|number| (format!("f{number:02}"), noise(number, 256 << 10))).collect();
    let store = FaultFs::mount(files.clone());
    let daemon = daemon_with(store.root());
    store.hang("f19");
    daemon.ctl(&["create", "w", "--type", "regional", "--uri", "models", "--option", "copy=true"]).ok();
    let (target, stderr) = (daemon.place().dir("at"), daemon.place().join("stderr-of-attach"));
    let mut command = daemon.ctl_command();
    command.args(["attach", "job", "w", "--lazy", "--at"]).arg(&target).stdin(Stdio::null()).stdout(Stdio::null());
    let mut attaching = command.stderr(File::create(&stderr).unwrap()).spawn().unwrap();
    let said = || fs::read_to_string(&stderr).unwrap();
    wait_until("it says that it waits", PATIENCE, || said().contains("for all bytes of a source that cannot be read"));
    store.let_go();
    assert_eq!(wait_for(&mut attaching, PATIENCE), Some(0), "{}", said());
    let words = ["waited until all bytes were here", "its source is this host itself"];
    assert!(words.iter().all(|words| said().contains(words)), "{}", said());
    assert_eq!(daemon.json(&["get", "w"])["state"], "ready");
    for (name, bytes) in &files {
        assert!(fs::read(target.join(name)).unwrap() == *bytes, "{name}");
    }
}

#[test]
fn a_file_that_is_replaced_while_it_is_ingested_is_not_mixed() {
    let place = Place::new();
    let store = place.dir("store");
    let daemon = daemon_with(&store);
    for (name, option) in [("view", "copy=false"), ("copy", "copy=true")] {
        let tree = store.join(name);
        fs::create_dir(&tree).unwrap();
        // A hole takes no room and as long to read: a longer one, should it have been read before it was replaced.
        let in_time = [2, 8, 24].into_iter().any(|gib| replaced_in_time(&daemon, &place, &tree, name, option, gib));
        assert!(in_time, "{name} was read before it could be replaced");
        daemon.wait_state(name, "failed", PATIENCE);
        assert_eq!(daemon.json(&["get", name])["error"]["reason"], "SOURCE_CHANGED", "{name}");
    }
}

/// Creates `name` of one file of so many GiB and replaces that while it is read; nothing is left of `name` where it may have been too late.
fn replaced_in_time(daemon: &Daemon, place: &Place, tree: &Path, name: &str, option: &str, gib: u64) -> bool {
    let other = place.join(&format!("other-{name}"));
    for file in [&tree.join("w.bin"), &other] {
        File::create(file).unwrap().set_len(gib << 30).unwrap();
    }
    let path = format!("path=/{name}");
    let line = ["create", name, "--type", "regional", "--uri", "models", "--option", &path, "--option", option];
    daemon.ctl(&line).ok();
    wait_until("it is listed", PATIENCE, || {
        let record = daemon.json(&["get", name]);
        record["fill"]["bytes_total"].as_u64() > Some(0) || record["state"] != "filling" && record["state"] != "new"
    });
    fs::rename(&other, tree.join("w.bin")).unwrap();
    let record = daemon.json(&["get", name]);
    // It is looked at once more when all of it has been read.
    let is_still_read = record["fill"]["bytes_done"].as_u64() < record["fill"]["bytes_total"].as_u64();
    let is_in_time = is_still_read || record["state"] == "failed";
    if !is_in_time {
        daemon.ctl(&["remove", name, "--yes"]).ok();
    }
    is_in_time
}

#[test]
fn a_copy_that_is_killed_half_way_is_made_whole() {
    let place = Place::new();
    let tree = place.dir("store/tree");
    (0..24).for_each(|number| random_file(&tree.join(format!("{number}.bin")), seed() ^ number, 16 * MIB));
    let mut daemon = daemon_with(&place.join("store"));
    let line = ["create", "w", "--type", "regional", "--uri", "models", "--option", "path=/tree", "--option"];
    daemon.ctl(&[&line[..], &["copy=true"]].concat()).ok();
    wait_until("some is here", PATIENCE, || daemon.bytes_done("w") > 0);
    daemon.kill9();
    daemon.restart();
    daemon.wait_state("w", "ready", PATIENCE);
    assert_mounted(&tree, &daemon.attach("job", "w"));
}

#[test]
fn what_is_not_in_the_datastore_cannot_be_had() {
    let place = Place::new();
    let store = place.dir("store");
    fs::create_dir_all(store.join("in/empty")).unwrap();
    fs::create_dir_all(place.dir("outside")).unwrap();
    fs::write(place.join("outside/secret"), b"secret").unwrap();
    symlink("../outside", store.join("out")).unwrap();
    symlink(place.join("outside/secret"), store.join("secret")).unwrap();
    symlink("in", store.join("inner")).unwrap();
    let env = [
        (MODELS, store.to_str().unwrap()),
        ("CKPTD_DATASTORES__TEAMS__PATH", store.to_str().unwrap()),
        ("CKPTD_DATASTORES__TEAMS__OWNERS", r#"["team-a"]"#),
    ];
    let daemon = Daemon::start_with(&env);
    for path in ["/../outside", "../outside", "/in/../../outside", "in", "/./in"] {
        create_with(&daemon, "w", path, &[]).refused(&[2], &["absolute path"]);
    }
    for path in ["/out", "/secret", "/out/secret", "/inner", "/inner/empty"] {
        create_with(&daemon, "w", path, &[]).refused(&[2], &["symbolic link"]);
    }
    create_with(&daemon, "w", "/none", &[]).refused(&[3], &["none"]);
    create_with(&daemon, "w", "/in/empty", &[]).refused(&[2], &["no files"]);
    create_with(&daemon, "w", "/in", &["--option", "copy=perhaps"]).refused(&[2], &["copy=perhaps"]);

    let of = |owner: &str, datastore: &str| {
        daemon.ctl(&[
            "create", "w", "--type", "regional", "--uri", datastore, "--owner", owner, "--option", "path=/in", "--wait",
        ])
    };
    of("team-a", "nope").refused(&[3], &["no datastore `nope`", "use one of models, teams"]);
    let ran = of("team-b", "teams").refused(&[3], &["no datastore `teams`", "use one of models"]);
    assert!(!ran.stderr.contains("models, "), "{ran}");
    of("team-a", "teams").ok();

    let link_kept = create(&daemon, "all", "/");
    assert_eq!(link_kept["files"], 0, "{link_kept}");
    let at = daemon.attach("job-all", "all");
    assert_eq!(fs::read_link(at.join("out")).unwrap(), Path::new("../outside"));
    assert!(at.join("in/empty").is_dir());
}

#[test]
fn a_datastore_that_is_away_is_missed_and_found_again() {
    let place = Place::new();
    let store = place.dir("store");
    fs::write(store.join("calm"), noise(1, 3 << 20)).unwrap();
    let mut daemon = daemon_with(&store);
    create(&daemon, "w", "/");
    let at = daemon.attach("job", "w");
    fs::rename(&store, place.join("away")).unwrap();
    for mounted in [false, true] {
        if mounted {
            fs::create_dir(&store).unwrap();
        }
        let refused = daemon.attach_at("job2", &["w"], &place.dir("at2"));
        refused.refused(&[4], &["`models`", "mount it"]);
    }
    assert_eq!(errno(fs::read(at.join("calm"))), Some(libc::EIO));
    daemon.kill9();
    daemon.restart();
    assert_eq!(errno(fs::read(at.join("calm"))), Some(libc::EIO), "the view is there, its bytes are not");
    assert_eq!(events(&daemon, "SOURCE_CHANGED", "calm").len(), 2, "one for each life of the daemon");

    fs::remove_dir(&store).unwrap();
    fs::rename(place.join("away"), &store).unwrap();
    assert!(fs::read(at.join("calm")).unwrap() == noise(1, 3 << 20));
    daemon.attach("job3", "w");
}

#[test]
fn twenty_thousand_files_are_served_where_they_are() {
    let place = Place::new();
    let tree = place.dir("store/many");
    for number in 0..20_000 {
        let directory = tree.join(format!("{:03}", number / 100));
        if number % 100 == 0 {
            fs::create_dir(&directory).unwrap();
        }
        fs::write(directory.join(format!("n {number} %+#ü")), format!("{number}\n")).unwrap();
    }
    let daemon = daemon_with(&place.join("store"));
    let record = create(&daemon, "many", "/many");
    assert_eq!(record["files"], 20_000);
    assert_same_tree(&tree, &daemon.attach("job", "many"));
    shell("rm -r \"$1\"", &[&tree]).ok();
    let at = place.dir("at");
    daemon.attach_at("late", &["many"], &at).refused(&[4], &["/many"]);
}

#[test]
fn one_file_is_served_as_it_is_and_an_archive_is_extracted_into_a_copy() {
    let place = Place::new();
    let store = place.dir("store/a");
    let tree = place.dir("tree");
    fs::write(tree.join("weights"), noise(1, 300_000)).unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("-czf").arg(store.join("m.tar.gz")).arg(".")).ok();
    let daemon = daemon_with(&place.join("store"));
    create(&daemon, "file", "/a/m.tar.gz");
    assert_same_tree(&store, &daemon.attach("job", "file"));
    create_with(&daemon, "tree", "/a/m.tar.gz", &["--option", "copy=true"]).ok();
    assert_same_tree(&tree, &daemon.attach("job2", "tree"));
}
