//! A job that did not wait, and a fill that ends or stands still elsewhere than in its own flight: at a restart, behind others, by a removal.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::corpus::{Random, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::faultfs::FaultFs;
use support::files::{b3sum, walk};
use support::ran::{run, wait_until};
use support::site::{Page, Site};
use support::waiting::waiting_requests;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// Rate at which a listing comes at once and a unit takes minutes.
const HELD: u64 = 16 << 10;

fn weights(mib: usize) -> Arc<Vec<u8>> {
    Arc::new(Random::new(seed()).bytes(mib << 20))
}

/// Creates `name` and attaches it for the job of that name without waiting; where its file is seen.
fn attach_lazily(daemon: &Daemon, name: &str, url: &str) -> PathBuf {
    daemon.ctl(&["create", name, "--type", "web", "--uri", url]).ok();
    let target = daemon.place().dir(&format!("at-{name}"));
    run(daemon.ctl_command().args(["attach", name, name, "--lazy", "--at"]).arg(&target)).ok();
    target.join(url.rsplit('/').next().unwrap())
}

/// Reads a byte in a thread of its own.
fn read_at(file: &Path, offset: u64) -> JoinHandle<io::Result<u8>> {
    let open = File::open(file).unwrap();
    thread::spawn(move || {
        let mut byte = [0];
        open.read_exact_at(&mut byte, offset).map(|()| byte[0])
    })
}

fn answer(reader: JoinHandle<io::Result<u8>>) -> io::Result<u8> {
    wait_until("the read is answered", LIMIT, || reader.is_finished());
    reader.join().unwrap()
}

/// Whether some units of what fills are durable.
fn something_is_durable(daemon: &Daemon) -> bool {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let catalog = rusqlite::Connection::open_with_flags(daemon.state().join("catalog.db"), flags).unwrap();
    let units: rusqlite::Result<Vec<u8>> =
        catalog.query_row("SELECT units FROM fills WHERE units NOT NULL", [], |row| row.get(0));
    units.is_ok_and(|units| units.iter().any(|byte| *byte != 0))
}

#[test]
fn a_session_that_cannot_be_taken_over_now_waits_alone_and_is_taken_over_later() {
    let daemon = Daemon::start_kept(&[LOOPBACK]);
    let (site, bytes) = (Site::open(), weights(64));
    site.limit(8 * MIB);
    let file = attach_lazily(&daemon, "w", &site.put("/w.bin", Page::Ranged(bytes.clone())));
    wait_until("some of it is durable", LIMIT, || something_is_durable(&daemon));
    site.limit(HELD);
    let source = daemon.place().dir("source");
    fs::write(source.join("well"), "well").unwrap();
    daemon.capture("well", &source);
    let well = File::open(daemon.attach("another", "well").join("well")).unwrap();
    let jobs = daemon.json(&["jobs"]);
    // Something that cannot be opened in the place of what fills.
    let fill = walk(daemon.state()).into_iter().map(|path| daemon.state().join(path));
    let is_fill = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == 64 * MIB);
    let fill = fill.into_iter().find(is_fill).unwrap();
    let faulty = FaultFs::mount(vec![("fill".to_owned(), vec![0; 64 << 20])]);
    faulty.shut("fill");
    let bound = Bound::over(&faulty.root().join("fill"), &fill);
    daemon.replace();
    assert!(has_event(&daemon, "SESSION_WAITS"));
    let mut found = [0; 4];
    well.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"well");
    assert_eq!(daemon.json(&["jobs"]), jobs, "an attachment has changed");
    drop(bound);
    wait_until("it is taken over", LIMIT, || has_event(&daemon, "SESSION_WENT_ON"));
    site.limit(0);
    // What fills met the same fault.
    if daemon.json(&["get", "w"])["state"] == "failed" {
        daemon.ctl(&["retry", "w"]).ok();
    }
    daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(b3sum(&file), blake3::hash(&bytes).to_hex().to_string());
}

/// A file mounted over another, until it is dropped.
struct Bound(PathBuf);

impl Bound {
    fn over(file: &Path, other: &Path) -> Self {
        mount(Some(file), other, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Self(other.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn has_event(daemon: &Daemon, kind: &str) -> bool {
    daemon.ctl(&["events"]).ok().stdout.contains(kind)
}

#[test]
fn a_read_that_waits_over_a_restart_ends_when_nothing_can_be_fetched_any_more() {
    let daemon = Daemon::start_kept(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "1")]);
    let (site, bytes) = (Site::open(), weights(64));
    site.limit(HELD);
    let url = site.put("/w.bin", Page::Ranged(bytes.clone()));
    // Two of the same bytes: neither may leave it to the other to say so.
    let files = ["w", "too"].map(|name| attach_lazily(&daemon, name, &url));
    let readers = files.each_ref().map(|file| {
        let waiting = waiting_requests(daemon.place(), file);
        let reader = read_at(file, 50 * MIB);
        wait_until("the reader waits", LIMIT, || waiting() > 0);
        reader
    });
    site.put("/w.bin", Page::Status(403));
    daemon.replace();
    ["w", "too"].iter().for_each(|name| daemon.wait_state(name, "failed", LIMIT));
    for reader in readers.into_iter().chain(files.each_ref().map(|file| read_at(file, 20 * MIB))) {
        assert_eq!(answer(reader).unwrap_err().raw_os_error(), Some(nix::libc::EIO));
    }
    site.limit(0);
    site.put("/w.bin", Page::Ranged(bytes.clone()));
    daemon.ctl(&["retry", "w"]).ok();
    daemon.wait_state("w", "ready", LIMIT);
    assert_eq!(b3sum(&files[0]), blake3::hash(&bytes).to_hex().to_string());
}

#[test]
fn what_is_here_is_read_up_to_its_edge_while_the_rest_stands_still() {
    const UNIT: usize = 4 << 20;
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let (site, bytes) = (Site::open(), weights(8));
    site.narrow();
    site.limit(2 * MIB);
    let file = attach_lazily(&daemon, "w", &site.put("/w.bin", Page::Ranged(bytes.clone())));
    wait_until("its first unit is here", LIMIT, || daemon.bytes_done("w") >= UNIT as u64);
    site.limit(HELD);
    let open = File::open(&file).unwrap();
    let reader = thread::spawn(move || {
        for piece in [4096, 128 << 10, 1 << 20] {
            let mut found = vec![0; piece];
            for at in (0..UNIT).step_by(piece) {
                open.read_exact_at(&mut found, at as u64).unwrap();
                assert!(found == bytes[at..at + piece], "wrong bytes at {at}");
            }
        }
        // SAFETY: nothing changes a file of a checkpoint.
        let map = unsafe { memmap2::Mmap::map(&open) }.unwrap();
        assert_eq!(map[UNIT - 5000..UNIT], bytes[UNIT - 5000..UNIT]);
    });
    wait_until("all that is here is read", LIMIT, || reader.is_finished());
    reader.join().unwrap();
    assert!(daemon.bytes_done("w") < 2 * UNIT as u64, "the rest has come meanwhile");
}

#[test]
fn what_a_job_reads_does_not_wait_for_what_nobody_reads() {
    /// As many as move bytes at a time.
    const OTHERS: usize = 8;
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let (slow, quick, bytes) = (Site::open(), Site::open(), weights(40));
    slow.limit(HELD);
    for other in 0..OTHERS {
        let url = slow.put(&format!("/{other}.bin"), Page::Ranged(bytes.clone()));
        daemon.ctl(&["create", &format!("other-{other}"), "--type", "web", "--uri", &url]).ok();
    }
    wait_until("the others are asked for", LIMIT, || slow.bodies() >= 4 * OTHERS as u64);
    let file = attach_lazily(&daemon, "read", &quick.put("/w.bin", Page::Ranged(bytes.clone())));
    assert_eq!(answer(read_at(&file, 30 * MIB)).unwrap(), bytes[30 << 20]);
    for other in 0..OTHERS {
        assert_eq!(daemon.json(&["get", &format!("other-{other}")])["state"], "filling");
    }
}

#[test]
fn a_small_file_that_a_job_reads_does_not_wait_for_streams_of_others() {
    /// Streams that the daemon has at a time, of all flights.
    const STREAMS: usize = 32;
    let daemon = Daemon::start_with(&[LOOPBACK]);
    // Each large enough to have all the streams that a file may have.
    let (slow, quick, bytes) = (Site::open(), Site::open(), weights(132));
    let mut index = "<html><title>Directory listing for /</title>".to_owned();
    for number in 0..8 {
        slow.put(&format!("/m/{number}.bin"), Page::Ranged(bytes.clone()));
        index.push_str(&format!("<li><a href=\"{number}.bin\">{number}.bin</a>"));
    }
    let url = slow.put("/m/", Page::Html(Arc::new(index.into_bytes())));
    slow.limit(HELD);
    daemon.ctl(&["create", "other", "--type", "web", "--uri", &url]).ok();
    let streams = || slow.asked().iter().filter(|(path, _)| path.ends_with(".bin")).count();
    wait_until("the other has all streams", LIMIT, || streams() >= STREAMS);
    let file =
        attach_lazily(&daemon, "small", &quick.put("/config.json", Page::Ranged(Arc::new(bytes[..2000].to_vec()))));
    // Long enough for the background to have taken it; else this shows less.
    thread::sleep(Duration::from_millis(500));
    let reader = read_at(&file, 1999);
    // Streams of the other are given up as stalled after 30 s, and begin again.
    wait_until("the read is answered", Duration::from_secs(20), || reader.is_finished());
    assert_eq!(answer(reader).unwrap(), bytes[1999]);
    assert_eq!(daemon.json(&["get", "other"])["state"], "filling");
}

#[test]
fn a_read_that_is_left_of_a_removed_checkpoint_ends() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(HELD);
    let file = attach_lazily(&daemon, "w", &site.put("/w.bin", Page::Ranged(weights(64))));
    let waiting = waiting_requests(daemon.place(), &file);
    let reader = read_at(&file, 50 * MIB);
    wait_until("the reader waits", LIMIT, || waiting() > 0);
    daemon.ctl(&["release", "w"]).ok();
    daemon.ctl(&["remove", "w", "--yes"]).ok();
    assert!(answer(reader).is_err());
}
