//! A panic in any task or thread of the daemon, at a moment of the test's choice: see `src/daemon/logging.rs`, which springs the trap.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use nix::unistd::Pid;

use crate::support::corpus::{Random, seed};
use crate::support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use crate::support::files::assert_same_tree;
use crate::support::place::Place;
use crate::support::ran::{run, wait_until};
use crate::support::server::free_port;
use crate::support::site::{Page, Site};
use crate::{LIMIT, MIB, Reader, has_event, mount_lines};

/// A daemon that can be made to panic, with a checkpoint `k` that `one` sees.
struct Trapped {
    daemon: Daemon,
    trap: PathBuf,
    source: PathBuf,
    at: PathBuf,
    port: u16,
    _place: Place,
}

impl Trapped {
    fn start(begin: fn(&[(&'static str, &str)]) -> Daemon) -> Self {
        let (place, port) = (Place::new(), free_port());
        let trap = place.join("trap");
        let listen = format!("\"127.0.0.1:{port}\"");
        let daemon = begin(&[
            ("TEST_PANIC_AT", trap.to_str().unwrap()),
            ("CKPTD_HTTP__LISTEN", &listen),
            LOOPBACK,
            NO_PASSTHROUGH,
        ]);
        let source = daemon.place().dir("source");
        crate::random_file(&source.join("w.bin"), seed(), 24 * MIB);
        fs::write(source.join("small"), "small").unwrap();
        daemon.capture("k", &source);
        let at = daemon.attach("one", "k");
        Self { daemon, trap, source, at, port, _place: place }
    }

    fn set(&self, words: &str) {
        let beside = self.trap.with_extension("new");
        fs::write(&beside, words).unwrap();
        fs::rename(beside, &self.trap).unwrap();
    }

    fn is_sprung(&self) -> bool {
        !self.trap.exists()
    }

    /// Has the daemon panic at `words` by doing `what`, over and over.
    fn spring(&self, words: &str, mut what: impl FnMut()) {
        self.set(words);
        wait_until(&format!("`{words}` panics"), LIMIT, || {
            what();
            self.is_sprung()
        });
    }

    /// Makes what went before long ago.
    fn forget(&self) {
        let _ = fs::remove_file(self.daemon.place().join("run/panicked"));
    }

    fn ask_by_http(&self) {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return };
        let mut answer = Vec::new();
        let _ = stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").and_then(|()| stream.read_to_end(&mut answer));
    }

    /// Something new, whatever comes of it.
    fn capture(&self, number: &mut u32) {
        *number += 1;
        let directory = self.daemon.place().dir(&format!("new-{number}"));
        fs::write(directory.join("f"), Random::new(u64::from(*number)).bytes(100_000)).unwrap();
        let name = format!("n{number}");
        run(self.daemon.ctl_command().args(["capture", "maker", "--name", &name, "--from"]).arg(directory));
    }

    fn pid_of_another(&self, before: Pid) -> Pid {
        self.daemon.successor(before)
    }
}

/// Every loop, every door, what fetches, what publishes, what answers readers: nobody notices that one of them panics.
#[test]
fn the_first_panic_of_any_task_is_not_seen_by_jobs() {
    let trapped = Trapped::start(Daemon::start_kept);
    let Trapped { daemon, source, at, .. } = &trapped;
    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(300 << 20));
    site.limit(16 * MIB);
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    let (other, mut is_asked_for) = (site.put("/more/w.bin", Page::Ranged(bytes.clone())), false);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    daemon.ctl(&["reserve", "leased", "k", "--expires", "1h"]).ok();
    let reader = Reader::of(at.join("w.bin"), source.join("w.bin"));
    reader.goes_on();
    let before = (daemon.json(&["jobs"]), mount_lines(daemon.place().path()));
    let (mut number, mut others) = (0, 1000);
    let read = |name: &str| {
        let _ = fs::metadata(at.join(name));
    };
    let ask = |verb: &[&str]| _ = daemon.ctl(verb);
    let mut told = 0;
    let traps: [(&str, &mut dyn FnMut()); 14] = [
        ("fuse operation=\"read\"", &mut || {}),
        ("fuse operation=\"open\"", &mut || {}),
        ("fuse operation=\"lookup\"", &mut || read("never looked up")),
        ("a connection by the socket", &mut || ask(&["status"])),
        ("a connection by HTTP", &mut || trapped.ask_by_http()),
        ("a call caller", &mut || ask(&["list"])),
        ("a command of the catalog", &mut || ask(&["list"])),
        ("a turn of the publisher", &mut || trapped.capture(&mut number)),
        ("a look at the watermark", &mut || trapped.capture(&mut others)),
        ("a look for rights that are over", &mut || ask(&["renew", "leased", "--expires", "2h"])),
        ("a sign of life", &mut || {}),
        ("a look for what is lost", &mut || ask(&["scrub"])),
        ("reading a blob again", &mut || ask(&["scrub"])),
        ("a stretch is fetched", &mut || {
            if !std::mem::replace(&mut is_asked_for, true) {
                ask(&["create", "more", "--type", "web", "--uri", &other]);
            }
        }),
    ];
    for (words, provoke) in traps {
        let server = daemon.server();
        trapped.forget();
        trapped.spring(words, provoke);
        trapped.pid_of_another(server);
        reader.goes_on();
        told += 1;
        assert_eq!(daemon.json(&["status"])["restarts"], told, "after {words}");
    }
    assert_eq!(mount_lines(daemon.place().path()), before.1);
    let of_one =
        |jobs: &serde_json::Value| jobs["jobs"].as_array().unwrap().iter().find(|job| job["job"] == "one").cloned();
    assert_eq!(of_one(&daemon.json(&["jobs"])), of_one(&before.0));
    assert!(daemon.rows("jobs").iter().any(|job| job["job"] == "leased"));
    site.limit(0);
    for (name, job) in [("w", "two"), ("more", "three")] {
        daemon.wait_state(name, "ready", LIMIT);
        assert!(fs::read(daemon.attach(job, name).join("w.bin")).unwrap() == *bytes);
    }
    reader.end();
    assert_same_tree(source, at);
    assert!(has_event(daemon, "DAEMON_RESTARTED", "SIGABRT"));
    assert!(!has_event(daemon, "ATTACHMENT_", ""));
}

#[test]
fn an_upload_goes_on_over_the_first_panic() {
    let trapped = Trapped::start(Daemon::start_kept);
    let daemon = &trapped.daemon;
    let large = daemon.place().dir("large");
    File::create(large.join("w.bin")).unwrap().set_len(1 << 30).unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(|| run(daemon.ctl_command().args(["upload", "large"]).arg(&large)));
        wait_until("it is under way", LIMIT, || {
            let rows = daemon.rows("list");
            let row = rows.iter().find(|row| row["name"] == "large");
            row.is_some_and(|row| row["fill"]["bytes_done"].as_u64() > Some(30 * MIB))
        });
        let server = daemon.server();
        trapped.spring("a call caller", || _ = daemon.ctl(&["list"]));
        trapped.pid_of_another(server);
        let ran = sending.join().unwrap().ok();
        assert!(ran.stderr.contains("going on with the upload") && !ran.stderr.contains("sent again"), "{ran}");
    });
    assert_eq!(daemon.json(&["get", "large"])["state"], "ready");
}

/// What panics again soon costs what it was in the middle of, and nobody else.
#[test]
fn a_panic_that_comes_again_ends_one_request_and_not_the_daemon() {
    let trapped = Trapped::start(Daemon::start_kept);
    let Trapped { daemon, source, at, .. } = &trapped;
    let reader = Reader::of(at.join("w.bin"), source.join("w.bin"));
    let server = daemon.server();
    trapped.spring("a connection by HTTP", || trapped.ask_by_http());
    let server = trapped.pid_of_another(server);
    reader.goes_on();
    reader.end();
    contained(&trapped, server);
    // A loop that it cannot be without ends it all the same.
    let mut number = 200;
    trapped.spring("a look at the watermark", || trapped.capture(&mut number));
    trapped.pid_of_another(server);
    assert_same_tree(source, at);
}

#[test]
fn where_nobody_holds_the_mounts_a_panic_ends_one_request() {
    let trapped = Trapped::start(Daemon::start_with);
    contained(&trapped, trapped.daemon.server());
    assert_same_tree(&trapped.source, &trapped.at);
}

fn contained(trapped: &Trapped, server: Pid) {
    let Trapped { daemon, at, .. } = trapped;
    // Past the page cache: where a page does not come the kernel asks again by itself.
    let file = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(at.join("small")).unwrap();
    trapped.set("fuse operation=\"read\"");
    let mut byte = [0];
    let error = file.read_exact_at(&mut byte, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
    assert!(trapped.is_sprung());
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(&byte, b"s");

    let mut number = 100;
    trapped.spring("a turn of the publisher", || trapped.capture(&mut number));
    trapped.spring("a command of the catalog", || _ = daemon.ctl(&["list"]));
    trapped.spring("a call caller", || _ = daemon.ctl(&["list"]));

    let site = Site::open();
    let bytes = Arc::new(Random::new(seed()).bytes(20 << 20));
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    trapped.set("a stretch is fetched");
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    daemon.wait_state("w", "ready", LIMIT);
    assert!(trapped.is_sprung());
    assert!(has_event(daemon, "INGEST_BEGUN_AGAIN", "a bug of ours"));
    assert!(fs::read(daemon.attach("two", "w").join("w.bin")).unwrap() == *bytes);
    assert_eq!(daemon.server(), server, "it is the same process all along");
}
