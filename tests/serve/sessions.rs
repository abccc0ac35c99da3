//! What sessions leave behind, and what they do not.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use ckptd::serve::{Stopped, probe, release_sessions_dir, stale_mounts, unmount_stale};

use super::fixture::{Ground, can_mount, mounts_below};

/// Set for the process that [`a_killed_session_is_stale_and_removed`] starts: where to serve until it is killed.
const SERVE_UNTIL_KILLED: &str = "CKPTD_TEST_SERVE_UNTIL_KILLED";

#[test]
fn the_kernel_s_offer_is_found_without_a_mount() {
    if !can_mount() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let features = probe(&place.path().join("scratch")).unwrap();
    assert!(features.passthrough && features.resend && features.no_opendir && features.open_tree, "{features:?}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn a_stopped_session_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut served = ground.serve("a", |_| {});
    let place = served.at("");
    assert_eq!(release_sessions_dir(&ground.sessions()).unwrap_err().reason(), "SESSIONS_REMAIN");
    assert_eq!(served.stop(), Stopped::Ended);
    assert!(!place.exists());
    assert_eq!(std::sync::Arc::strong_count(&served.content), 1, "a thread still has the content");
    release_sessions_dir(&ground.sessions()).unwrap();
    assert!(mounts_below(ground.root()).is_empty());
}

#[test]
fn a_dropped_session_goes_on_serving() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut served = ground.serve("a", |config| config.passthrough = false);
    let file = served.at("deep/er/config.json");
    drop(served.session.take());
    assert_eq!(fs::read_to_string(file).unwrap(), "a");
    assert!(stale_mounts(ground.root()).unwrap().is_empty());
    assert!(unmount_stale(ground.root()).unwrap().is_empty());
}

#[test]
fn a_place_that_is_taken_is_refused() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let config = ckptd::serve::SessionConfig::new(ground.sessions().join("a"), "b", ground.buffers.clone());
    let tree = std::sync::Arc::new(ckptd::manifest::Tree::new(served.manifest.clone()));
    let again = ckptd::serve::Session::start(config, tree, served.content.clone());
    assert_eq!(again.err().unwrap().reason(), "SESSION_MOUNTED");
}

#[test]
fn sessions_do_not_spread_to_namespaces_that_follow_the_host() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    // A host whose mounts are shared, as systemd makes them.
    let none: Option<&str> = None;
    let shared = ground.directory("shared");
    let mount = |flags| nix::mount::mount(Some("other"), &shared, Some("tmpfs"), flags, none).unwrap();
    mount(nix::mount::MsFlags::empty());
    mount(nix::mount::MsFlags::MS_SHARED);
    let sessions = shared.join("sessions");
    ckptd::serve::prepare_sessions_dir(&sessions).unwrap();
    ckptd::serve::prepare_sessions_dir(&sessions).unwrap();
    assert_eq!(mounts_below(&sessions).len(), 1, "prepared twice, mounted once");
    let mut follower = Command::new("unshare")
        .args(["-m", "--propagation", "slave", "sh", "-c", "echo ready; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(follower.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let served = ground.serve("a", |config| config.mountpoint = sessions.join("a"));
    assert!(served.at("run.sh").exists());
    let theirs = fs::read_to_string(format!("/proc/{}/mountinfo", follower.id())).unwrap();
    follower.kill().unwrap();
    follower.wait().unwrap();
    assert!(theirs.contains(sessions.to_str().unwrap()));
    assert!(!theirs.contains(sessions.join("a").to_str().unwrap()), "{theirs}");
}

/// Not a test of its own: the process that is killed in the next one.
#[test]
fn serve_until_killed() {
    let Ok(root) = std::env::var(SERVE_UNTIL_KILLED) else { return };
    let root = Path::new(&root);
    let source = root.join("source");
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    let ground = Ground::new();
    let _served = ground.serve_directory("a", source, |config| config.mountpoint = root.join("sessions/a"));
    fs::write(root.join("ready"), "").unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_session_is_stale_and_removed() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let live = ground.serve("live", |_| {});
    let mut doomed = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "serve::sessions::serve_until_killed"])
        .env(SERVE_UNTIL_KILLED, ground.root())
        .env("TMPDIR", ground.root())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    super::fixture::wait_for("the other process to serve", || ground.path("ready").exists());
    let stale = ground.path("sessions/a");
    assert_eq!(fs::read_to_string(stale.join("file")).unwrap(), "x");
    assert!(stale_mounts(ground.root()).unwrap().is_empty());
    doomed.kill().unwrap();
    doomed.wait().unwrap();
    assert_eq!(fs::read(stale.join("other")).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    let found: Vec<_> = stale_mounts(ground.root()).unwrap().into_iter().map(|mount| mount.target).collect();
    assert_eq!(found, std::slice::from_ref(&stale));
    assert_eq!(unmount_stale(ground.root()).unwrap(), std::slice::from_ref(&stale));
    assert!(!mounts_below(ground.root()).contains(&stale));
    assert!(live.at("run.sh").exists());
}

/// Set for the process that [`idle_sessions_take_little_memory`] starts, so that it has the allocator to itself.
const MEASURE_IDLE: &str = "CKPTD_TEST_MEASURE_IDLE";

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Not a test of its own: the process that the next one starts.
#[test]
fn measure_idle_sessions() {
    if std::env::var_os(MEASURE_IDLE).is_none() {
        return;
    }
    let ground = Ground::new();
    let source = ground.directory("source");
    fs::write(source.join("file"), "x").unwrap();
    let before = resident_kib();
    let served: Vec<_> = (0..60).map(|n| ground.serve_directory(&n.to_string(), source.clone(), |_| {})).collect();
    for one in &served {
        assert_eq!(fs::read_to_string(one.at("file")).unwrap(), "x");
    }
    let grown = resident_kib() - before;
    assert!(grown < 30 << 10, "60 idle sessions take {grown} KiB");
}

#[test]
fn idle_sessions_take_little_memory() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let measured = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "serve::sessions::measure_idle_sessions"])
        .env(MEASURE_IDLE, "1")
        .env("TMPDIR", ground.root())
        .output()
        .unwrap();
    assert!(measured.status.success(), "{}", String::from_utf8_lossy(&measured.stdout));
}
