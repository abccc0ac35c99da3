//! What goes wrong is said once, clearly, with the right exit code; nothing half-made stays; the next attempt works.

#![cfg(test)]

mod support;

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::corpus::{Random, random_file, seed};
use support::daemon::{CKPTD, Daemon, LOOPBACK, clean, serve_command};
use support::files::{assert_same_tree, b3sum, disk_bytes, regular_files};
use support::loopfs::LoopFs;
use support::place::{Place, mounts_at};
use support::ran::{Ran, run, run_for, shell, wait_until};
use support::seccomp;
use support::site::{Page, Site};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// A daemon with one small checkpoint `k`, and the directory it was made of.
fn daemon_with_k() -> (Daemon, PathBuf) {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), MIB);
    daemon.capture("k", &source);
    (daemon, source)
}

#[test]
fn an_unknown_checkpoint_or_job_is_not_found() {
    let daemon = Daemon::start();
    let target = daemon.place().dir("at");
    for args in
        [&["get", "nope"][..], &["remove", "nope", "--yes"], &["rename", "nope", "x"], &["reserve", "j", "nope"]]
    {
        daemon.ctl(args).refused(&[3], &["nope"]);
    }
    for verb in ["retry", "pin", "unpin", "watch", "detach"] {
        daemon.ctl(&[verb, "nope"]).refused(&[3], &["nope"]);
    }
    daemon.attach_at("j", &["nope"], &target).refused(&[3], &["nope"]);
    assert!(mounts_at(&target).is_empty() && daemon.rows("jobs").is_empty());
}

#[test]
fn an_ambiguous_name_is_refused_with_the_ids() {
    let (daemon, source) = daemon_with_k();
    daemon.ctl(&["capture", "again", "--from", source.to_str().unwrap(), "--name", "k"]).ok();
    let rows = daemon.rows("list");
    let ids: Vec<_> = rows.iter().map(|row| row["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 2);
    daemon.ctl(&["get", "k"]).refused(&[2], &ids);
    daemon.ctl(&["remove", "k", "--yes"]).refused(&[2], &ids);
    daemon.ctl(&["get", ids[0]]).ok();
    daemon.ctl(&["remove", ids[1], "--yes"]).ok();
    daemon.ctl(&["get", "k"]).ok();
}

#[test]
fn a_target_that_will_not_do_is_refused_and_the_next_one_works() {
    let (daemon, source) = daemon_with_k();
    let place = daemon.place();
    let (file, missing, full, taken) =
        (place.join("file"), place.join("missing"), place.dir("full"), place.dir("taken"));
    fs::write(&file, "x").unwrap();
    fs::write(full.join("x"), "x").unwrap();
    daemon.attach_at("first", &["k"], &taken).ok();

    for (target, code) in [(&file, 2), (&missing, 3), (&full, 4), (&taken, 4)] {
        let refused = daemon.attach_at("job", &["k"], target).refused(&[code], &[target.to_str().unwrap()]);
        assert!(daemon.rows("jobs").iter().all(|row| row["job"] != "job" || row["state"] != "attached"), "{refused}");
    }
    assert_eq!(mounts_at(&taken).len(), 1, "nothing is mounted over the first job's view");
    assert!(!missing.exists(), "the daemon makes no directory that was not asked for");
    assert_eq!(fs::read(full.join("x")).unwrap(), b"x");
    daemon.attach_at("job", &["k"], Path::new("relative/path")).refused(&[3], &["relative/path"]);

    let good = place.dir("good");
    daemon.attach_at("job", &["k"], &good).ok();
    assert_same_tree(&source, &good);
}

#[test]
fn a_request_that_makes_no_sense_is_refused() {
    let daemon = Daemon::start();
    for (args, word) in [
        (&["create", "x", "--type", "no-such", "--uri", "https://example.org/x"][..], "no-such"),
        (&["create", "x", "--type", "web", "--uri", "not a url"], "not a url"),
        (&["create", "", "--type", "web", "--uri", "https://example.org/x"], "name"),
        (&["attach", "../job", "k", "--at", "/x"], "../job"),
    ] {
        daemon.ctl(args).refused(&[2], &[word]);
    }
    daemon
        .ctl(&["capture", "job", "--from", "/no/such/directory", "--name", "x"])
        .refused(&[3], &["/no/such/directory"]);
    assert!(daemon.rows("list").iter().all(|row| row["state"] != "ready"));
}

#[test]
fn a_private_network_is_out_of_reach_unless_the_operator_says_so() {
    let daemon = Daemon::start();
    let site = Site::open();
    let url = site.put("/w.bin", Page::Ranged(Arc::new(vec![1; 1000])));
    let ran = daemon.ctl(&["create", "x", "--type", "web", "--uri", &url, "--wait"]);
    ran.refused(&[2], &["127.0.0.1", "allow_networks"]);
    assert_eq!(site.bodies(), 0, "nothing was fetched");
}

#[test]
fn a_source_that_refuses_is_named_with_its_status() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    for (status, code) in [(404, 3), (401, 2), (403, 2)] {
        let url = site.put(&format!("/{status}/w.bin"), Page::Status(status));
        let name = format!("s{status}");
        daemon
            .ctl(&["create", &name, "--type", "web", "--uri", &url, "--wait"])
            .refused(&[code], &[&status.to_string()]);
        assert_nothing_half_made(&daemon, &name);
    }
    let bytes = Arc::new(Random::new(seed()).bytes(100_000));
    for status in [404, 401, 403] {
        site.put(&format!("/{status}/w.bin"), Page::Ranged(Arc::clone(&bytes)));
        let name = format!("s{status}");
        daemon.ctl(&["retry", &name, "--wait"]).ok();
        assert_holds(&daemon, &name, &bytes);
    }
}

#[test]
fn a_body_shorter_than_announced_is_fetched_again() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(9 << 20));
    let url = site.put("/w.bin", Page::Short(Arc::clone(&bytes), 2));
    daemon.ctl(&["create", "x", "--type", "web", "--uri", &url, "--wait"]).ok();
    assert_holds(&daemon, "x", &bytes);
}

#[test]
fn a_body_that_stays_short_is_given_up_by_name_and_a_retry_works_once_it_is_mended() {
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(9 << 20));
    let url = site.put("/w.bin", Page::Short(Arc::clone(&bytes), u64::MAX));
    daemon
        .ctl(&["create", "x", "--type", "web", "--uri", &url, "--wait"])
        .refused(&[7], &[&url, "the body is shorter than announced", "ask whoever serves it"]);
    let record = daemon.json(&["get", "x"]);
    assert_eq!((&record["state"], &record["error"]["reason"]), (&"failed".into(), &"BODY_TOO_SHORT".into()));
    assert_nothing_half_made(&daemon, "x");
    site.put("/w.bin", Page::Ranged(Arc::clone(&bytes)));
    daemon.ctl(&["retry", "x", "--wait"]).ok();
    assert_holds(&daemon, "x", &bytes);
}

#[test]
fn a_body_that_is_always_short_never_becomes_ready_and_can_be_removed() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(9 << 20));
    let url = site.put("/w.bin", Page::Short(bytes, u64::MAX));
    daemon.ctl(&["create", "x", "--type", "web", "--uri", &url]).ok();
    wait_until("the body was fetched more than once", Duration::from_secs(60), || site.bodies() >= 2);
    let record = daemon.json(&["get", "x"]);
    assert_ne!(record["state"], "ready", "{record}");
    let target = daemon.place().dir("at");
    let ran = run_for(daemon.ctl_command().args(["remove", "x", "--yes"]), Duration::from_secs(30));
    ran.ok();
    daemon.ctl(&["get", "x"]).refused(&[3], &["x"]);
    assert!(mounts_at(&target).is_empty());
    daemon.wait_empty("filling");
}

#[test]
fn a_checkpoint_larger_than_the_disk_is_refused_and_a_smaller_one_fits() {
    let disk = LoopFs::ext4(200);
    let daemon = Daemon::start_on(disk.dir("state"), &[]);
    let (big, small) = (daemon.place().dir("big"), daemon.place().dir("small"));
    random_file(&big.join("w.bin"), seed(), 250 * MIB);
    random_file(&small.join("w.bin"), seed() + 1, 8 * MIB);
    daemon.ctl(&["capture", "job", "--from", big.to_str().unwrap(), "--name", "big"]).refused(&[5], &[]);
    assert_nothing_half_made(&daemon, "big");
    daemon.capture("small", &small);
    assert_same_tree(&small, &daemon.attach("job", "small"));
    drop(daemon);
}

#[test]
fn a_disk_that_fills_stops_that_ingest_and_nothing_else() {
    let disk = LoopFs::ext4(200);
    let ballast = disk.root().join("ballast");
    shell("fallocate -l 70M \"$1\"", &[&ballast]).ok();
    let daemon = Daemon::start_on(disk.dir("state"), &[LOOPBACK]);
    let small = daemon.place().dir("small");
    random_file(&small.join("w.bin"), seed() + 1, 8 * MIB);
    daemon.capture("before", &small);
    let target = daemon.attach("reader", "before");
    let site = Site::open();
    // Its size is not stated, so that nobody can refuse it beforehand.
    let bytes = Arc::new(Random::new(seed()).bytes(80 << 20));
    let url = site.put("/w.bin", Page::Unsized(Arc::clone(&bytes)));
    daemon
        .ctl(&["create", "big", "--type", "web", "--uri", &url, "--wait"])
        .refused(&[5], &["`w.bin`", "the store has", "8.00 MiB is in use by jobs", "remove checkpoints; then retry"]);
    assert!(regular_files(&daemon.state().join("filling")).is_empty(), "what did not fit is in nobody's way");
    assert_same_tree(&small, &target);

    fs::remove_file(&ballast).unwrap();
    daemon.ctl(&["retry", "big", "--wait"]).ok();
    assert_holds(&daemon, "big", &bytes);
    assert_same_tree(&small, &target);

    let other = daemon.place().dir("other");
    random_file(&other.join("w.bin"), seed() + 2, 8 * MIB);
    daemon.capture("after", &other);
    assert_same_tree(&other, &daemon.attach("job", "after"));
    drop(daemon);
}

#[test]
fn a_store_over_its_capacity_takes_no_more() {
    let daemon = Daemon::start_with(&[("CKPTD_STORE__CAPACITY", "33554432")]);
    let (big, small) = (daemon.place().dir("big"), daemon.place().dir("small"));
    random_file(&big.join("w.bin"), seed(), 48 * MIB);
    random_file(&small.join("w.bin"), seed() + 1, 8 * MIB);
    daemon.ctl(&["capture", "job", "--from", big.to_str().unwrap(), "--name", "big"]).refused(&[5], &[]);
    assert!(disk_bytes(daemon.state()) < 32 * MIB);
    daemon.capture("small", &small);
}

#[test]
fn a_state_directory_of_a_newer_version_is_left_alone() {
    let (mut daemon, source) = daemon_with_k();
    daemon.stop();
    let version = daemon.state().join("version");
    let was = fs::read_to_string(&version).unwrap();
    let digits: String = was.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    let newer = was.replacen(&digits, &format!("{}", digits.parse::<u64>().unwrap() + 1000), 1);
    fs::write(&version, &newer).unwrap();
    serve_fails(&mut serve_command(daemon.state(), &daemon.place().join("run"))).refused(&[4], &["version"]);
    assert_eq!(fs::read_to_string(&version).unwrap(), newer);

    fs::write(&version, was).unwrap();
    daemon.restart();
    assert_same_tree(&source, &daemon.attach("job", "k"));
}

#[test]
fn a_state_directory_has_one_owner() {
    let (daemon, source) = daemon_with_k();
    let second = daemon.place().dir("second-run");
    serve_fails(&mut serve_command(daemon.state(), &second)).refused(&[4], &[daemon.state().to_str().unwrap()]);
    assert_same_tree(&source, &daemon.attach("job", "k"));
}

#[test]
fn a_socket_path_that_is_something_else_is_not_removed() {
    let (mut daemon, source) = daemon_with_k();
    daemon.stop();
    let socket = daemon.socket();
    let serve = || serve_fails(&mut serve_command(daemon.state(), socket.parent().unwrap()));
    fs::write(&socket, "precious").unwrap();
    serve().refused(&[4], &[socket.to_str().unwrap(), "not a socket", "remove it or give another --runtime-dir"]);
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    fs::remove_file(&socket).unwrap();

    let listening = UnixListener::bind(&socket).unwrap();
    serve().refused(&[4], &[socket.to_str().unwrap(), "another process listens", "stop it"]);
    assert!(UnixStream::connect(&socket).is_ok(), "who listens was not disturbed");
    // What is left where nobody listens any more is in nobody's way.
    drop(listening);
    assert!(socket.exists());
    daemon.restart();
    assert_same_tree(&source, &daemon.attach("job", "k"));
}

#[test]
fn a_configuration_with_problems_names_them_all() {
    let place = Place::new();
    let config = place.join("config.toml");
    fs::write(&config, "[store]\ncapacity = \"much\"\nsurprise = 1\n[serve]\npassthrough = \"sometimes\"\n").unwrap();
    run(clean(CKPTD).arg("check-config").arg("--config").arg(&config)).refused(&[2], &[]);
    serve_fails(serve_command(&place.dir("state"), &place.dir("run")).arg("--config").arg(&config)).refused(&[2], &[]);
    fs::write(&config, "[serve]\npassthrough = \"never\"\n").unwrap();
    run(clean(CKPTD).arg("check-config").arg("--config").arg(&config)).ok();
    serve_fails(serve_command(&place.dir("state"), &place.dir("run")).env("CKPTD_STORE__CAPASITY", "1"))
        .refused(&[2], &["capasity"]);
}

#[test]
fn without_root_it_says_that_it_needs_to_be() {
    let place = Place::new();
    // The build directory may be out of a stranger's reach.
    let program = place.join("ckptd");
    fs::copy(CKPTD, &program).unwrap();
    let (state, run_dir) = (place.dir("state"), place.dir("run"));
    shell("chown 65534:65534 \"$1\" \"$2\"", &[&state, &run_dir]).ok();
    let mut command = clean("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
    command.arg("serve").arg("--state-dir").arg(&state).arg("--runtime-dir").arg(&run_dir);
    serve_fails(&mut command).refused(&[2], &["root"]);
}

#[test]
fn without_the_fuse_device_it_says_so() {
    let place = Place::new();
    let (state, run_dir) = (place.dir("state"), place.dir("run"));
    // A /dev of its own, with everything but fuse.
    let script = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; \
                  mknod -m 666 /dev/urandom c 1 9; exec \"$@\"";
    let mut command = clean("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-euc", script, "sh", CKPTD, "serve"]);
    command.arg("--state-dir").arg(&state).arg("--runtime-dir").arg(&run_dir);
    serve_fails(&mut command).refused(&[2], &["/dev/fuse", "load the kernel module"]);
}

#[test]
fn a_client_without_a_daemon_says_where_it_looked() {
    let place = Place::new();
    let socket = format!("unix:{}", place.join("none.sock").display());
    let ran = run(clean(env!("CARGO_BIN_EXE_ckptctl")).args(["--endpoint", &socket, "list"]));
    ran.refused(&[7], &[place.join("none.sock").to_str().unwrap()]);
}

/// Runs a `serve` that is expected to end by itself soon.
fn serve_fails(command: &mut Command) -> Ran {
    run_for(command.stdin(Stdio::null()), Duration::from_secs(30))
}

/// The checkpoint is the file `w.bin` with these bytes.
fn assert_holds(daemon: &Daemon, name: &str, bytes: &[u8]) {
    let target = daemon.attach(&format!("reads-{name}"), name);
    assert_eq!(b3sum(&target.join("w.bin")), blake3::hash(bytes).to_hex().to_string(), "{name}");
}

/// A failed checkpoint may be listed as failed, with its error; there are no bytes that look whole.
fn assert_nothing_half_made(daemon: &Daemon, name: &str) {
    for row in daemon.rows("list").iter().filter(|row| row["name"] == name) {
        assert_eq!(row["state"], "failed", "{row}");
        assert!(row["error"].is_object() || row["error"].is_string(), "{row}");
    }
    daemon.wait_empty("blobs");
    let target = daemon.place().dir(&format!("not-{name}"));
    let refused =
        run_for(daemon.ctl_command().args(["attach", "early", name, "--at"]).arg(&target), Duration::from_secs(60));
    assert_ne!(refused.code, Some(0), "{refused}");
    assert!(mounts_at(&target).is_empty());
    daemon.ctl(&["release", "early"]);
}

#[test]
fn a_tree_whose_entries_have_no_room_in_memory_is_refused_and_one_that_fits_comes_again_and_again() {
    let daemon = Daemon::start_with(&[("CKPTD_MEMORY__BUDGET", "16777216")]);
    let source = daemon.place().dir("source");
    let fits = 16 * 1024;
    (0..fits).for_each(|index| fs::write(source.join(index.to_string()), "").unwrap());
    let packed = |name: &str| {
        let archive = daemon.place().join(name);
        run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&source).arg(".")).ok();
        archive
    };
    let fitting = packed("fits.tar");
    for name in ["one", "two"] {
        daemon.capture(name, &source);
        daemon.capture(&format!("{name}-packed"), &fitting);
    }
    fs::write(source.join("one-more"), "").unwrap();
    for (name, from) in [("more", &source), ("more-packed", &packed("more.tar"))] {
        let refused = daemon.ctl(&["capture", "j", "--name", name, "--from", from.to_str().unwrap()]);
        refused.refused(&[5], &["more than 16384 entries", "memory.budget"]);
        daemon.wait_state(name, "failed", Duration::from_secs(60));
    }
}

/// A tree that has nearly all the room for entries, of which the last comes slowly.
#[test]
fn trees_share_the_room_for_their_entries() {
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_MEMORY__BUDGET", "16777216")]);
    let place = daemon.place();
    let tree = |name: &str, files: usize| {
        let source = place.dir(name);
        (0..files).for_each(|index| fs::write(source.join(index.to_string()), "").unwrap());
        source
    };
    let packed = |source: &Path, last: &[&str]| {
        let archive = source.with_extension("tar");
        run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(source).arg("--sort=name").arg(".").args(last))
            .ok();
        archive
    };
    let large = tree("large", 16_000);
    random_file(&place.join("last"), seed(), 48 << 20);
    let large = packed(&large, &["-C", place.path().to_str().unwrap(), "last"]);
    let (other, small) = (tree("other", 1000), packed(&tree("small", 600), &[]));

    let site = Site::open();
    let url = site.put("/large.tar", Page::Ranged(fs::read(large).unwrap().into()));
    site.limit(16 << 20);
    daemon.ctl(&["create", "large", "--type", "web", "--uri", &url]).ok();
    wait_until("the last of it comes", LIMIT, || daemon.bytes_done("large") > 0);
    site.limit(256 << 10);
    let mut waiting = daemon.ctl_command();
    let from = other.to_str().unwrap();
    let mut waiting = waiting
        .args(["capture", "j", "--name", "other", "--from", from])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Of streams one goes beyond.
    daemon.capture("small", &small);
    wait_until("it is asked for", LIMIT, || daemon.rows("list").iter().any(|row| row["name"] == "other"));
    assert_eq!(daemon.json(&["get", "other"])["state"], "filling");
    assert!(waiting.try_wait().unwrap().is_none(), "there was room for it");
    site.limit(0);
    daemon.wait_state("large", "ready", LIMIT);
    assert!(waiting.wait().unwrap().success());
}

#[test]
fn a_system_call_that_a_filter_refuses_is_said_at_once_with_the_remedy() {
    let daemon = Daemon::start_without("serve", &[nix::libc::SYS_openat2]);
    let source = daemon.place().dir("source");
    fs::write(source.join("f"), "f").unwrap();
    let begun = Instant::now();
    let args = ["capture", "j", "--from", source.to_str().unwrap()];
    daemon.ctl(&args).refused(&[2], &["system call filter", "RestrictSUIDSGID= refuses openat2"]);
    assert!(begun.elapsed() < Duration::from_secs(20), "it was tried again and again");
}

#[test]
fn a_daemon_that_could_attach_nothing_does_not_start() {
    let place = Place::new();
    let mut command = serve_command(&place.dir("state"), &place.dir("run"));
    let mount = [nix::libc::SYS_open_tree, nix::libc::SYS_mount];
    seccomp::refuse(&mut command, &mount);
    run(&mut command).refused(&[2], &["preparing the sessions directory", "system call filter"]);
}
