//! The main job from outside: bytes come in, jobs see exactly them, read-only, and they go when they are removed.

#![cfg(test)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::Pid;
use serde_json::Value;

use support::corpus::{Random, Tensors, odd_names, odd_tree, random_file, seed};
use support::daemon::{CKPTD, Daemon, LOOPBACK, NO_PASSTHROUGH, clean};
use support::files::{assert_same_file, assert_same_tree, b3sum, disk_bytes, regular_files, walk, xattr};
use support::place::{Place, mounts, mounts_at};
use support::ran::{run, run_for, shell, wait_for, wait_until};
use support::site::{Page, Site};

const MIB: u64 = 1 << 20;

#[test]
fn an_odd_tree_comes_back_byte_for_byte_and_cannot_be_written() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    odd_tree(&source, seed());
    odd_names(&source);
    daemon.capture("odd", &source);
    let target = daemon.attach("job", "odd");
    assert_same_tree(&source, &target);
    assert_modes_are_plain(&source, &target);
    assert_attributes_tell_the_digest(&source, &target);
    assert_writes_are_refused(&target);
    assert_the_mount_tells_what_it_is(&source, &target);
}

#[test]
fn an_odd_tree_comes_back_through_the_daemon_alone_too() {
    let daemon = Daemon::start_with(&[NO_PASSTHROUGH]);
    let source = daemon.place().dir("source");
    odd_tree(&source, seed());
    odd_names(&source);
    daemon.capture("odd", &source);
    let target = daemon.attach("job", "odd");
    assert_same_tree(&source, &target);
    let big = target.join("a b/ü/%41+#/w.bin");
    assert_eq!(xattr(&big, "user.ckptd.state"), "daemon");
}

#[test]
fn a_directory_and_a_file_are_uploaded() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    odd_tree(&source, seed());
    odd_names(&source);
    daemon.ctl(&["upload", "tree", source.to_str().unwrap()]).ok();
    let file = daemon.place().join("weights.bin");
    random_file(&file, seed(), 5 * MIB + 1);
    daemon.ctl(&["upload", "single", file.to_str().unwrap()]).ok();

    assert_same_tree(&source, &daemon.attach("job-tree", "tree"));
    let target = daemon.attach("job-single", "single");
    assert_eq!(walk(&target), [target.join("weights.bin")]);
    assert_same_file(&file, &target.join("weights.bin"));
}

#[test]
fn the_same_tree_has_the_same_digest_however_it_came() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    Tensors::new(seed(), 3, 1 << 20).write_safetensors(&source.join("sub/model.safetensors"));
    let captured = daemon.capture("captured", &source);
    daemon.ctl(&["upload", "uploaded", source.to_str().unwrap()]).ok();
    let uploaded = daemon.json(&["get", "uploaded"]);
    assert_eq!(captured["digest"], uploaded["digest"]);
    assert_eq!(captured["digest"].as_str().map(str::len), Some(64));
}

#[test]
fn a_file_of_the_web_comes_whole_with_and_without_ranges_and_after_a_redirect() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(21 * 1024 * 1024 + 7));
    let expected = blake3::hash(&bytes).to_hex().to_string();
    let ranged = site.put("/ranged/w.bin", Page::Ranged(Arc::clone(&bytes)));
    let pages = [
        ("ranged", ranged.clone()),
        ("whole", site.put("/whole/w.bin", Page::Whole(Arc::clone(&bytes)))),
        ("unsized", site.put("/unsized/w.bin", Page::Unsized(Arc::clone(&bytes)))),
        ("moved", site.put("/moved/w.bin", Page::Moved(ranged))),
    ];
    for (name, url) in pages {
        daemon.ctl(&["create", name, "--type", "web", "--uri", &url, "--wait"]).ok();
        let record = daemon.json(&["get", name]);
        assert_eq!(record["logical_bytes"], bytes.len(), "{record}");
        let target = daemon.attach(name, name);
        assert_eq!(walk(&target), [target.join("w.bin")]);
        assert_eq!(b3sum(&target.join("w.bin")), expected, "{name}");
    }
}

#[test]
fn json_has_the_keys_that_scripts_rely_on() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    fs::write(source.join("config.json"), "{}").unwrap();
    let record = daemon.capture("k", &source);
    let target = daemon.attach("job", "k");

    let checkpoint_keys = "id name owner public state digest revision source files logical_bytes unique_bytes physical_bytes fill error created_at";
    has_keys(&record, checkpoint_keys);
    has_keys(&record["source"], "type uri");
    assert_eq!((record["files"].as_u64(), record["logical_bytes"].as_u64()), (Some(1), Some(2)));
    let created = record["created_at"].as_str().unwrap();
    assert!(chrono::DateTime::parse_from_rfc3339(created).is_ok() && created.ends_with('Z'), "{created}");

    let list = daemon.rows("list");
    assert_eq!(list.len(), 1);
    has_keys(&list[0], checkpoint_keys);

    let jobs = daemon.rows("jobs");
    let job = jobs.iter().find(|row| row["job"] == "job").expect("the job is listed");
    has_keys(job, "job target checkpoints env state terms");
    has_keys(&job["checkpoints"][0], "id name path digest");
    assert_eq!((job["state"].as_str(), job["target"].as_str()), (Some("attached"), target.to_str()));
    assert_eq!(job["env"]["ML_CHECKPOINT_PATH"].as_str(), target.to_str());

    has_keys(
        &daemon.json(&["usage"]),
        "logical_bytes unique_bytes physical_bytes duplicate_bytes capacity_bytes free_bytes owners",
    );
    let status = daemon.json(&["status"]);
    has_keys(&status, "pid version uptime_s features sessions attachments");
    has_keys(&status["features"], "passthrough resend");
    assert_eq!(status["pid"], daemon.pid());
}

#[test]
fn watching_ends_when_the_checkpoint_is_ready() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(16 * MIB);
    let url = site.put("/w.bin", Page::Ranged(Arc::new(Random::new(seed()).bytes(24 << 20))));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    let watched = run_for(daemon.ctl_command().args(["watch", "w"]), Duration::from_secs(60)).ok();
    assert!(!watched.stdout.is_empty() || !watched.stderr.is_empty(), "watching says something");
    assert_eq!(daemon.json(&["get", "w"])["state"], "ready");
    run_for(daemon.ctl_command().args(["watch", "w"]), Duration::from_secs(20)).ok();
}

#[test]
fn removal_waits_for_the_jobs_and_gives_the_space_back() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 48 * MIB);
    let before = disk_bytes(daemon.state());
    daemon.capture("k", &source);
    assert!(disk_bytes(daemon.state()) > before + 47 * MIB);
    let target = daemon.attach("holder", "k");

    daemon.ctl(&["remove", "k", "--yes"]).refused(&[4], &["holder"]);
    assert_same_tree(&source, &target);
    daemon.ctl(&["detach", "holder"]).ok();
    daemon.ctl(&["remove", "k", "--yes"]).refused(&[4], &["holder"]);
    daemon.ctl(&["release", "holder"]).ok();
    daemon.ctl(&["remove", "k"]).refused(&[2], &["--yes"]);
    daemon.ctl(&["remove", "k", "--yes"]).ok();

    daemon.ctl(&["get", "k"]).refused(&[3], &["k"]);
    daemon.wait_empty("blobs");
    let left = disk_bytes(daemon.state()).saturating_sub(before);
    assert!(left < 8 * MIB, "{left} bytes are left");
}

#[test]
fn removal_keeps_what_another_checkpoint_shares() {
    let daemon = Daemon::start();
    let base = Tensors::new(seed(), 6, 4 << 20);
    let (a, b) = (daemon.place().dir("a"), daemon.place().dir("b"));
    base.write_safetensors(&a.join("model.safetensors"));
    base.fine_tuned(2).write_safetensors(&b.join("model.safetensors"));
    daemon.capture("a", &a);
    daemon.capture("b", &b);
    daemon.ctl(&["remove", "a", "--yes"]).ok();
    assert_same_tree(&b, &daemon.attach("job", "b"));
}

/// Two quickstarts at a time could not tell whose mounts are left.
static QUICKSTART: Mutex<()> = Mutex::new(());

#[test]
fn quickstart_on_a_directory_leaves_nothing_mounted() {
    let place = Place::new();
    let source = place.dir("model");
    Tensors::new(seed(), 5, 2 << 20).write_safetensors(&source.join("model.safetensors"));
    fs::write(source.join("config.json"), "{}").unwrap();
    let target = place.dir("at");
    quickstart(&place, &[source.to_str().unwrap(), "--at", target.to_str().unwrap(), "--exit"]);
    assert!(mounts_at(&target).is_empty());
    assert!(walk(&target).is_empty());
}

#[test]
fn quickstart_without_a_source_makes_one_and_says_so() {
    let place = Place::new();
    let target = place.dir("at");
    let said = quickstart(&place, &["--at", target.to_str().unwrap(), "--exit"]);
    assert!(said.contains("safetensors"), "{said}");
}

#[test]
fn quickstart_on_an_archive_shows_what_is_in_it() {
    let place = Place::new();
    let source = place.dir("model");
    let model = Tensors::new(seed(), 5, 8 << 20);
    for name in ["model.safetensors", "copy.safetensors"] {
        model.write_safetensors(&source.join(name));
    }
    let archive = place.join("model.tar");
    shell("tar -cf \"$2\" -C \"$1\" .", &[&source, &archive]).ok();
    let target = place.dir("at");
    let said = quickstart(&place, &[archive.to_str().unwrap(), "--at", target.to_str().unwrap(), "--exit"]);
    let files = regular_files(&source);
    let bytes = files.iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_table(&said, 2, bytes);
    assert!(row(&said, "dedup").contains(" kept, "), "a tensor occurs twice\n{said}");
    assert!(said.contains(&format!("model.tar is at {}", target.display())), "{said}");
}

/// It is on a configuration of its own: an address to listen on, and that is taken, is nothing to it.
#[test]
fn quickstart_on_a_url_shows_what_is_there() {
    let (place, site) = (Place::new(), Site::open());
    let bytes = Arc::new(Random::new(seed()).bytes(40 << 20));
    let url = site.put("/models/w.bin?signature=secret", Page::Ranged(Arc::clone(&bytes)));
    let taken = url.strip_prefix("http://").and_then(|rest| rest.split('/').next()).unwrap();
    let (http, tls) = (format!("\"{taken}\""), format!("[\"{taken}\"]"));
    let environment = [LOOPBACK, ("CKPTD_HTTP__LISTEN", &http), ("CKPTD_TLS__LISTEN", &tls), ("HF_TOKEN", "hf_secret")];
    let target = place.dir("at");
    let args = [url.as_str(), "--at", target.to_str().unwrap(), "--exit"];
    let said = quickstart_with(&place, &environment, &args);
    assert_table(&said, 1, bytes.len() as u64);
    assert_eq!(row(&said, "dedup"), "nothing occurs twice", "{said}");
    assert!(said.contains(&format!("w.bin is at {}", target.display())) && !said.contains("secret"), "{said}");
}

/// A person sees a bar that grows, and afterwards the table alone.
#[test]
fn quickstart_shows_a_bar_on_a_terminal_and_takes_it_away() {
    let (place, site) = (Place::new(), Site::open());
    let bytes = Arc::new(Random::new(seed()).bytes(96 << 20));
    let url = site.put("/w.bin", Page::Ranged(bytes));
    site.limit(24 << 20);
    let _alone = QUICKSTART.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // `script` runs it on a terminal of its own, whose output it copies.
    let mut command = clean("script");
    let quickstart = format!("{CKPTD} quickstart {url} --at {} --exit", place.join("at").display());
    command.args(["--quiet", "--return", "--flush", "--command", &quickstart, "/dev/null"]);
    command.env("TMPDIR", place.dir("tmp")).env("TERM", "xterm").envs([LOOPBACK]);
    let said = run(&mut command).ok().stdout;
    let drawn: Vec<_> = said.split(['\r', '\n']).filter(|line| line.contains("w.bin: downloading [")).collect();
    let shares: std::collections::BTreeSet<_> = drawn.iter().map(|line| line.matches('=').count()).collect();
    assert!(shares.len() > 2, "a bar that grows\n{said}");
    assert!(drawn.iter().any(|line| line.contains(" of 96.00 MiB, ") && line.contains("/s, ")), "{said}");
    let last = drawn.last().and_then(|line| said.rfind(line)).unwrap();
    assert!(said[last..].contains("\u{1b}[2K"), "the bar is taken away\n{said}");
    // What a line shows in the end is what follows the last clearing of it.
    let shown: Vec<_> = said.lines().filter_map(|line| line.rsplit("\u{1b}[2K").next()).collect();
    assert!(row(&shown.join("\n"), "files").starts_with("1, every one"), "{said}");
}

/// The rows of the table of what was more than 32 MiB.
fn assert_table(said: &str, files: u64, bytes: u64) {
    assert_eq!(row(said, "files"), format!("{files}, every one as its digest says"), "{said}");
    assert_eq!(row(said, "bytes"), ckptd::units::show_bytes(bytes), "{said}");
    let in_unit = |name: &str, unit: &str| {
        let figure = row(said, name).strip_suffix(unit).and_then(|figure| figure.trim().parse::<f64>().ok());
        assert!(figure.is_some_and(|figure| figure >= 0.0), "{name} in {unit}\n{said}");
    };
    in_unit("ready after", " s");
    in_unit("time to attach", " ms");
    for name in ["read through the mount", "read of the blobs themselves"] {
        assert!(row(said, name).ends_with("iB/s"), "{name}\n{said}");
    }
}

/// What the table says of `name`.
fn row<'a>(said: &'a str, name: &str) -> &'a str {
    let found = said.lines().find_map(|line| line.trim_start().strip_prefix(name).filter(|rest| rest.starts_with(' ')));
    found.unwrap_or_else(|| panic!("the table has no row `{name}`\n{said}")).trim()
}

#[test]
fn quickstart_serves_until_it_is_interrupted_and_leaves_nothing() {
    let _alone = QUICKSTART.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let place = Place::new();
    let source = place.dir("model");
    Tensors::new(seed(), 3, 1 << 20).write_safetensors(&source.join("model.safetensors"));
    let (target, output) = (place.join("a/b"), place.join("output"));
    let before = mounts_elsewhere();
    let out = fs::File::create(&output).unwrap();
    let mut command = clean(CKPTD);
    command.arg("quickstart").arg(&source).arg("--at").arg(&target).env("TMPDIR", place.dir("tmp"));
    command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
    let mut child = Ended(command.spawn().unwrap());
    let said = || fs::read_to_string(&output).unwrap();
    wait_until("it says that it serves", Duration::from_secs(120), || {
        assert!(child.0.try_wait().unwrap().is_none(), "it ended\n{}", said());
        said().contains("serving until Ctrl-C")
    });
    assert_eq!(mounts_at(&target).len(), 1);
    assert!(fs::read_dir(place.join("tmp")).unwrap().next().is_some(), "its own directory is somewhere else");
    assert_same_tree(&source, &target);
    kill(Pid::from_raw(i32::try_from(child.0.id()).unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(wait_for(&mut child.0, Duration::from_secs(60)), Some(0), "{}", said());
    assert_no_mount_is_left(&place, &before, &said());
    assert!(walk(&place.join("tmp")).is_empty() && !place.join("a").exists(), "{:?}", walk(place.path()));
}

/// A child that ends with the test, also with one that fails.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn quickstart(place: &Place, args: &[&str]) -> String {
    quickstart_with(place, &[], args)
}

fn quickstart_with(place: &Place, environment: &[(&str, &str)], args: &[&str]) -> String {
    let _alone = QUICKSTART.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let before = mounts_elsewhere();
    let mut command = clean(CKPTD);
    command.arg("quickstart").args(args).env("TMPDIR", place.dir("tmp")).envs(environment.iter().copied());
    let ran = run(&mut command).ok();
    assert_no_mount_is_left(place, &before, &ran.to_string());
    assert!(walk(&place.join("tmp")).is_empty(), "left in the temporary directory\n{ran}");
    ran.stdout + &ran.stderr
}

/// A quickstart mounts below its own place, where nothing may be left, and nowhere else.
fn assert_no_mount_is_left(place: &Place, before: &[PathBuf], said: &str) {
    let own: Vec<_> = mounts().into_iter().filter(|mount| mount.target.starts_with(place.path())).collect();
    assert!(own.is_empty(), "{own:?} are left\n{said}");
    let elsewhere: Vec<_> = mounts_elsewhere().into_iter().filter(|target| !before.contains(target)).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?} are new\n{said}");
}

/// Targets of ckptd that are not below a directory for temporary files, as those of other tests are.
fn mounts_elsewhere() -> Vec<PathBuf> {
    let temporary = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
    let ours = mounts().into_iter().filter(|mount| mount.source.contains("ckptd") || mount.kind.contains("ckptd"));
    let targets = ours.map(|mount| mount.target);
    targets.filter(|target| !temporary.iter().any(|directory| target.starts_with(directory))).collect()
}

#[test]
fn every_program_explains_itself() {
    let ctl = env!("CARGO_BIN_EXE_ckptctl");
    for (program, verbs) in [
        (CKPTD, vec!["serve", "quickstart", "check-config"]),
        (
            ctl,
            "create upload capture get list watch remove attach detach jobs reserve release usage status"
                .split(' ')
                .collect(),
        ),
    ] {
        let help = run(clean(program).arg("--help")).ok();
        for verb in verbs {
            assert!(help.stdout.contains(verb), "`{verb}` expected\n{help}");
            run(clean(program).args([verb, "--help"])).ok();
        }
        run(clean(program).arg("no-such-verb")).refused(&[2], &["no-such-verb"]);
    }
}

fn has_keys(value: &Value, keys: &str) {
    for key in keys.split(' ') {
        assert!(value.get(key).is_some(), "the key `{key}` is missing: {value}");
    }
}

fn assert_modes_are_plain(source: &Path, target: &Path) {
    for path in walk(source) {
        let there = target.join(path.strip_prefix(source).unwrap());
        let (was, is) = (path.symlink_metadata().unwrap(), there.symlink_metadata().unwrap());
        assert_eq!((is.uid(), is.gid()), (0, 0), "{}", there.display());
        let expected = match () {
            () if was.is_symlink() => continue,
            () if was.is_dir() || was.mode() & 0o111 != 0 => 0o555,
            () => 0o444,
        };
        assert_eq!(is.mode() & 0o7777, expected, "mode of {}", there.display());
    }
}

fn assert_attributes_tell_the_digest(source: &Path, target: &Path) {
    let files = regular_files(source);
    let sample = files.iter().filter(|path| !path.starts_with(source.join("deep"))).chain(files.iter().take(20));
    for path in sample {
        let there = target.join(path.strip_prefix(source).unwrap());
        assert_eq!(xattr(&there, "user.ckptd.digest"), b3sum(path), "{}", there.display());
        assert!(!xattr(&there, "user.ckptd.checkpoint").is_empty());
        assert!(matches!(xattr(&there, "user.ckptd.state").as_str(), "passthrough" | "daemon"));
    }
}

fn assert_writes_are_refused(target: &Path) {
    let attempts: [(&str, std::io::Result<()>); 6] = [
        ("creating", fs::write(target.join("new"), b"x")),
        ("opening", fs::OpenOptions::new().write(true).open(target.join("one")).map(drop)),
        ("removing", fs::remove_file(target.join("one"))),
        ("renaming", fs::rename(target.join("one"), target.join("two"))),
        ("making a directory", fs::create_dir(target.join("directory"))),
        ("linking", std::os::unix::fs::symlink("x", target.join("x"))),
    ];
    for (doing, result) in attempts {
        let error = result.expect_err(doing);
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{doing}: {error}");
    }
}

fn assert_the_mount_tells_what_it_is(source: &Path, target: &Path) {
    let found = mounts_at(target);
    assert_eq!(found.len(), 1, "{found:?}");
    let mount = &found[0];
    assert!(mount.source == "ckptd" || mount.kind.ends_with("ckptd"), "{mount:?}");
    let options: Vec<_> = mount.options.split(',').collect();
    assert!(["ro", "nosuid", "nodev"].iter().all(|option| options.contains(option)), "{mount:?}");

    let files = regular_files(source);
    let logical: u64 = files.iter().map(|path| path.metadata().unwrap().len()).sum();
    let stat = statvfs(target).unwrap();
    assert!(stat.flags().contains(FsFlags::ST_RDONLY));
    let told = stat.blocks() * stat.fragment_size();
    assert!(told >= logical && told < logical + 2 * MIB, "statfs tells {told} bytes of {logical}");
    assert!(stat.files() >= files.len() as u64, "statfs tells {} files of {}", stat.files(), files.len());
}
