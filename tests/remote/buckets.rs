//! What the tests of object stores share: a tree of odd names, Python that fills buckets, and the search for secrets.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::corpus::random_file;
use crate::support::daemon::{Daemon, LOOPBACK, clean};
use crate::support::faults::{Fault, Faults};
use crate::support::files::assert_mounted;
use crate::support::ran::{Ran, run, wait_until};
use crate::support::server::tool;

/// Lets a stalled body be given up soon, and little be tried twice.
pub(crate) const HASTY: &[(&str, &str)] = &[LOOPBACK, ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2")];

/// [`HASTY`], and as many attempts as there may be: a store that asks to wait may do so for minutes.
pub(crate) const ENDURING: &[(&str, &str)] =
    &[LOOPBACK, ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2"), ("CKPTD_SOURCES__ATTEMPTS", "100")];

/// Size of the large file of [`tree`]: more than is asked for in one range, and several pieces when it is put.
pub(crate) const LARGE: u64 = 36 << 20;

/// Spoils the first answer for files of [`tree`], each in its way; `slash` is how the store's addresses have what stands before a name.
pub(super) fn spoil_files(faults: &Faults, slash: &str) {
    let faulty = [
        Fault::Status(503, "Retry-After: 0"),
        Fault::Status(429, "Retry-After: 1"),
        Fault::Reset(1),
        Fault::Truncate(2),
        Fault::Stall(0),
    ];
    for (number, fault) in faulty.into_iter().enumerate() {
        faults.spoil(&format!("{slash}{number}.json"), fault, 1);
    }
    faults.spoil("bytes=0-33554431", Fault::Reset(6 << 20), 1);
}

/// A tree of regular files with names that have to be encoded, empty files, small ones and two large ones.
pub(crate) fn tree(root: &Path) {
    let odd = root.join("a b/ü 漢字/%41+#?&=~");
    fs::create_dir_all(&odd).unwrap();
    fs::write(odd.join("plus+ %20 'quoted' (x)!*.bin"), b"odd").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join(" begins with a space"), b"space").unwrap();
    fs::create_dir_all(root.join("deep/1/2/3")).unwrap();
    for number in 0..40 {
        fs::write(root.join(format!("deep/1/2/3/{number}.json")), format!("{{\"n\": {number}}}")).unwrap();
    }
    random_file(&root.join("model/weights.bin"), 7, LARGE);
    random_file(&root.join("model/few.bin"), 8, 5 << 20);
}

/// Runs a program of Python with the libraries that fill buckets.
pub(crate) fn python(program: &str, arguments: &[&str]) -> Ran {
    run(clean(&tool("objects/bin/python").display().to_string()).arg("-c").arg(program).args(arguments)).ok()
}

/// Creates checkpoint `name` of `uri` with these options and credentials, and waits for it.
pub(crate) fn create(daemon: &Daemon, kind: &str, name: &str, uri: &str, more: &[&str]) -> Ran {
    let mut arguments = begin(kind, name, uri, more);
    arguments.push("--wait".to_owned());
    daemon.ctl(&arguments)
}

/// The same without waiting.
pub(crate) fn start(daemon: &Daemon, kind: &str, name: &str, uri: &str, more: &[&str]) {
    daemon.ctl(&begin(kind, name, uri, more)).ok();
}

fn begin(kind: &str, name: &str, uri: &str, more: &[&str]) -> Vec<String> {
    let mut arguments: Vec<String> = ["create", name, "--type", kind, "--uri", uri].map(str::to_owned).to_vec();
    for text in more {
        let (flag, text) = text.strip_prefix('@').map_or(("--option", *text), |secret| ("--credential", secret));
        arguments.extend([flag.to_owned(), text.to_owned()]);
    }
    arguments
}

/// The reason a checkpoint failed for.
pub(crate) fn reason(daemon: &Daemon, name: &str) -> String {
    let record: Value = daemon.json(&["get", name]);
    assert_eq!(record["state"], "failed", "{record}");
    record["error"]["reason"].as_str().unwrap_or_default().to_owned()
}

/// Waits until so many bytes of a checkpoint are here and recorded as such.
pub(crate) fn wait_bytes(daemon: &Daemon, name: &str, bytes: u64) {
    wait_until(&format!("{bytes} bytes of {name} are here"), Duration::from_secs(180), || {
        daemon.recorded_bytes(name) >= bytes
    });
}

/// Fails unless a server that answers the request of `words` by asking to come back in three seconds is left alone for as long.
pub(crate) fn assert_comes_back_later(faults: &Faults, words: &str, create: impl FnOnce() -> Ran) {
    faults.spoil(words, Fault::Status(429, "Retry-After: 3"), 1);
    let began = Instant::now();
    create().ok();
    let took = began.elapsed();
    assert_eq!(faults.faults_left(), 0, "nobody asked for `{words}`");
    assert!(took >= Duration::from_secs(3), "asked again after {took:?}");
}

/// Kills the daemon while it brings `uri`, which is `tree` of 48 MiB: it goes on with what is here.
pub(crate) fn assert_goes_on_after_a_kill(
    daemon: &mut Daemon,
    faults: &Faults,
    (kind, uri): (&str, &str),
    more: &[&str],
    tree: &Path,
) {
    let before = faults.body_bytes();
    faults.slow_down(6 << 20);
    start(daemon, kind, "resumed", uri, more);
    wait_bytes(daemon, "resumed", 28 << 20);
    daemon.kill9();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("resumed", "ready", Duration::from_secs(180));
    assert_mounted(tree, &daemon.attach("resumed", "resumed"));
    let bytes = faults.body_bytes() - before;
    assert!(bytes < 70 << 20, "{bytes} bytes were fetched for 48 MiB");
}

/// Begins to fetch a file of 48 MiB, whose two ranges both end early, and replaces it while its store asks to wait before they go on.
pub(crate) fn replace_midway(faults: &Faults, begin: impl FnOnce(), replace: impl FnOnce()) {
    let went_on = ["bytes=4194304-", "bytes=37748736-"];
    for (first, next) in ["bytes=0-33554431", "bytes=33554432-"].into_iter().zip(went_on) {
        faults.spoil(first, Fault::Truncate(6 << 20), 1);
        faults.spoil(next, Fault::Status(503, "Retry-After: 2"), 10_000);
    }
    let asked = faults.heads().len();
    begin();
    wait_until("both ranges have to wait", Duration::from_secs(180), || {
        let heads = faults.heads().split_off(asked);
        went_on.iter().all(|range| heads.iter().any(|head| head.contains(*range)))
    });
    replace();
    faults.spare();
}

/// Fails if any of `secrets` is in the state directory, in what the client shows, or in what the daemon wrote.
pub(crate) fn assert_kept_nowhere(daemon: &Daemon, secrets: &[&str]) {
    let mut shown = daemon.ctl(&["events"]).ok().stdout;
    shown += &daemon.ctl(&["--json", "list"]).ok().stdout;
    for row in daemon.rows("list") {
        shown += &daemon.ctl(&["--json", "get", row["id"].as_str().unwrap()]).ok().stdout;
    }
    shown += &daemon.stderr();
    for secret in secrets {
        assert!(!shown.contains(secret), "`{secret}` is shown:\n{shown}");
        let rows = run(clean("grep").args(["-rlF", secret]).arg(daemon.state()));
        assert_eq!(rows.stdout, "", "`{secret}` is in the state directory");
    }
}
