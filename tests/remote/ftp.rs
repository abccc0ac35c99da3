//! Files and trees of FTP servers, plain and protected.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::buckets::assert_kept_nowhere;
use super::web::{
    ODD_NAMES, PATIENCE, SHORT_SILENCE, create, create_within, odd_tree, other_file, refused, tree_to_kill,
};
use crate::support::corpus::{random_file, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree, regular_files};
use crate::support::ftp_faults::{FtpFault, FtpFaults};
use crate::support::place::Place;
use crate::support::ran::{run, shell, wait_until};
use crate::support::relay::{Break, Relay};
use crate::support::server::{Server, free_ports};
use crate::support::webserver::{certificates, pyftpdlib, vsftpd};

const ONE_ATTEMPT: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "1");

/// Ports of data connections: a server tries some at random and gives up where too many are taken.
const PASSIVE_PORTS: u16 = 40;

#[test]
fn the_listings_of_every_server_are_the_tree_they_are_of() {
    let place = Place::new();
    // Its port is fixed, so its address is this process' own.
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let implicit_host = Ipv4Addr::new(127, a, b, c).to_string();
    let (tree, made) = (odd_tree(&place), certificates(&place, &[&implicit_host]));
    fs::write(tree.join(".hidden"), "seen").unwrap();
    let authority = made.join("ca.pem").display().to_string();
    let good = made.join("good.pem");
    let (facts, facts_tls) = (pyftpdlib(&tree, None), pyftpdlib(&tree, Some(&good)));
    let (lines, lines_tls) = (vsftpd(&place, &tree, None, ""), vsftpd(&place, &tree, Some(&good), ""));
    let own = format!("implicit_ssl=YES\nlisten_address={implicit_host}\nlisten_port=990");
    let implicit = vsftpd(&place, &tree, Some(&made.join(format!("{implicit_host}.pem"))), &own);
    // With its usual attempts: a server that is asked by many at once ends a connection now and then.
    let daemon = Daemon::start_with(&[LOOPBACK, ("SSL_CERT_FILE", &authority), ("RUST_LOG", "debug")]);
    let login = "u:p%40ss%3Aword@";
    let of_facts = [
        ("facts", format!("ftp://127.0.0.1:{}/", facts.port)),
        ("facts-login", format!("ftp://{login}127.0.0.1:{}/", facts.port)),
        ("facts-tls", format!("ftps://{login}localhost:{}/", facts_tls.port)),
    ];
    let of_lines = [
        ("lines", format!("ftp://127.0.0.1:{}/", lines.port)),
        ("lines-tls", format!("ftps://127.0.0.1:{}/", lines_tls.port)),
        ("implicit", format!("ftps://{implicit_host}:{}/", implicit.port)),
    ];
    thread::scope(|scope| {
        for (kind, server, trees) in [("facts", &facts, &of_facts), ("lines", &lines, &of_lines)] {
            let (daemon, tree) = (&daemon, &tree);
            scope.spawn(move || {
                for (name, url) in trees {
                    create(daemon, name, url);
                    assert_same_tree(tree, &daemon.attach(name, name));
                }
                each_file_comes_alone(daemon, kind, server, tree);
            });
        }
    });
    create(&daemon, "part", &format!("ftp://127.0.0.1:{}/%2Fdeep/", lines.port));
    assert_same_tree(&tree.join("deep"), &daemon.attach("part", "part"));
    assert_kept_nowhere(&daemon, &["p@ss:word", "p%40ss%3Aword"]);
}

fn each_file_comes_alone(daemon: &Daemon, kind: &str, server: &Server, tree: &Path) {
    for (number, name) in ODD_NAMES.iter().chain(&["weights.bin", "empty"]).enumerate() {
        let written = name.replace('%', "%25").replace('#', "%23").replace('?', "%3F").replace(' ', "%20");
        let checkpoint = format!("{kind}-{number}");
        create(daemon, &checkpoint, &format!("ftp://127.0.0.1:{}/{written}", server.port));
        let own = Path::new(name).file_name().unwrap();
        assert_same_file(&tree.join(name), &daemon.attach(&checkpoint, &checkpoint).join(own));
    }
}

#[test]
fn a_tree_comes_whole_through_faults() {
    let place = Place::new();
    let tree = odd_tree(&place);
    random_file(&tree.join("large.bin"), seed() + 1, 37 << 20);
    for (name, server) in [("facts", pyftpdlib(&tree, None)), ("lines", vsftpd(&place, &tree, None, ""))] {
        let faults = FtpFaults::before(server.port);
        for (words, fault) in [
            ("USER", FtpFault::Answer("421 too many connections")),
            ("CWD /deep", FtpFault::HangUp),
            ("PASV", FtpFault::Answer("425 no data connection now")),
            ("RETR /a b.bin", FtpFault::Answer("450 busy")),
            ("RETR /a+b", FtpFault::Reset(3)),
            ("RETR /x#y", FtpFault::Stall(3)),
            ("RETR /weights.bin", FtpFault::Reset(5 << 20)),
            ("RETR /weights.bin", FtpFault::HangUp),
            ("RETR /large.bin", FtpFault::Stall(7 << 20)),
        ] {
            faults.spoil(words, fault, 1);
        }
        let daemon = Daemon::start_with(&[LOOPBACK, SHORT_SILENCE]);
        create(&daemon, name, &faults.url("/"));
        assert_eq!(faults.faults_left(), 0, "{:?}", faults.commands());
        assert_same_tree(&tree, &daemon.attach("job", name));
    }
}

#[test]
fn an_archive_is_its_tree() {
    let place = Place::new();
    let (tree, site) = (odd_tree(&place), place.dir("site"));
    shell("cd \"$1\"; tar -cf - . | gzip > \"$2/a.tar.gz\"; zip -qr \"$2/b.zip\" .", &[&tree, &site]).ok();
    let server = pyftpdlib(&site, None);
    let daemon = Daemon::start_with(&[LOOPBACK, ONE_ATTEMPT]);
    for (name, path) in [("tar", "a.tar.gz"), ("zip", "b.zip")] {
        create(&daemon, name, &format!("ftp://127.0.0.1:{}/{path}", server.port));
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
}

#[test]
fn a_file_that_was_killed_goes_on_with_what_is_here() {
    let place = Place::new();
    let tree = place.dir("tree");
    random_file(&tree.join("large.bin"), seed(), 60 << 20);
    let server = vsftpd(&place, &tree, None, "");
    let faults = FtpFaults::before(server.port);
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(8 << 20);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &faults.url("/large.bin")]).ok();
    wait_until("half is here", PATIENCE, || daemon.recorded_bytes("w") > 32 << 20);
    daemon.kill9();
    let before = faults.data_bytes();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", PATIENCE);
    assert_mounted(&tree, &daemon.attach("job", "w"));
    let after = faults.data_bytes() - before;
    assert!(after < 45 << 20, "{after} bytes were fetched again of 60 MiB, after {before}");
    assert!(faults.commands().iter().any(|command| command.starts_with("REST ") && command != "REST 0"));
}

#[test]
fn a_tree_that_was_killed_goes_on_with_what_is_here() {
    let place = Place::new();
    let tree = tree_to_kill(&place);
    for (name, server) in [("facts", pyftpdlib(&tree, None)), ("lines", vsftpd(&place, &tree, None, ""))] {
        let faults = FtpFaults::before(server.port);
        let mut daemon = Daemon::start_with(&[LOOPBACK]);
        faults.slow_down(8 << 20);
        daemon.ctl(&["create", name, "--type", "web", "--uri", &faults.url("/")]).ok();
        wait_until("half is here", PATIENCE, || daemon.recorded_bytes(name) > 40 << 20);
        daemon.kill9();
        let before = faults.data_bytes();
        faults.slow_down(0);
        daemon.restart();
        daemon.wait_state(name, "ready", PATIENCE);
        assert_mounted(&tree, &daemon.attach("job", name));
        let after = faults.data_bytes() - before;
        assert!(after < 45 << 20, "{after} bytes were fetched again of 60 MiB, after {before}");
    }
}

/// vsftpd with TLS, and a relay to all its connections, those of data too, at another address.
fn relayed(place: &Place, tree: &Path, certificate: &Path) -> (Server, Relay) {
    let range = free_ports(PASSIVE_PORTS);
    let lines = format!("pasv_min_port={}\npasv_max_port={}", range.start, range.end - 1);
    let server = vsftpd(place, tree, Some(certificate), &lines);
    let relay = Relay::at(Ipv4Addr::new(127, 0, 0, 2), &[vec![server.port], range.collect()].concat());
    (server, relay)
}

#[test]
fn a_protected_file_comes_whole_through_breaks_and_goes_on_after_a_kill() {
    let place = Place::new();
    let made = certificates(&place, &["127.0.0.2"]);
    let authority = made.join("ca.pem").display().to_string();
    let tree = place.dir("tree");
    random_file(&tree.join("broken.bin"), seed(), 12 << 20);
    random_file(&tree.join("killed.bin"), seed() + 1, 60 << 20);
    let (server, relay) = relayed(&place, &tree, &made.join("127.0.0.2.pem"));
    let url = |name: &str| format!("ftps://127.0.0.2:{}/{name}", server.port);
    let mut daemon = Daemon::start_with(&[LOOPBACK, SHORT_SILENCE, ("SSL_CERT_FILE", &authority)]);
    relay.break_at(&[Break::Reset(500), Break::Reset(5 << 20), Break::Stall(1 << 20)]);
    create(&daemon, "broken", &url("broken.bin"));
    assert_eq!(relay.breaks_left(), []);
    assert_same_file(&tree.join("broken.bin"), &daemon.attach("broken", "broken").join("broken.bin"));

    relay.slow_down(8 << 20);
    daemon.ctl(&["create", "killed", "--type", "web", "--uri", &url("killed.bin")]).ok();
    wait_until("half is here", PATIENCE, || daemon.recorded_bytes("killed") > 32 << 20);
    daemon.kill9();
    wait_until("the connections have gone with the daemon", PATIENCE, || relay.open() == 0);
    let before = relay.bytes();
    relay.slow_down(0);
    daemon.restart();
    daemon.wait_state("killed", "ready", PATIENCE);
    fs::remove_file(tree.join("broken.bin")).unwrap();
    assert_mounted(&tree, &daemon.attach("killed", "killed"));
    let again = relay.bytes() - before;
    assert!(again < 45 << 20, "{again} bytes were fetched again of 60 MiB, after {before}");
}

#[test]
fn a_file_is_read_while_it_fills() {
    let place = Place::new();
    let tree = place.dir("tree");
    let source = tree.join("large.bin");
    random_file(&source, seed(), 160 << 20);
    let server = vsftpd(&place, &tree, None, "");
    let faults = FtpFaults::before(server.port);
    let daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(1 << 20);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &faults.url("/large.bin")]).ok();
    // By then the background has every connection that it may have, in ranges that take half a minute.
    wait_until("some is here", PATIENCE, || daemon.bytes_done("w") > 8 << 20);
    let target = place.dir("at");
    let ran = run(daemon.ctl_command().args(["attach", "job", "w", "--lazy", "--at"]).arg(&target)).ok();
    assert!(!ran.stderr.contains("waited"), "{}", ran.stderr);
    let (open, original) = (File::open(target.join("large.bin")).unwrap(), File::open(&source).unwrap());
    // Amid a unit: what is waited for comes by another connection.
    faults.spoil("RETR", FtpFault::Reset(1 << 20), 2);
    for at in [150 << 20, 3, 120 << 20] {
        let (mut found, mut expected) = ([0; 1000], [0; 1000]);
        open.read_exact_at(&mut found, at).unwrap();
        original.read_exact_at(&mut expected, at).unwrap();
        assert!(found == expected, "wrong bytes at {at}");
    }
    assert!(daemon.bytes_done("w") < 100 << 20, "most had to come first");
    faults.slow_down(0);
    daemon.wait_state("w", "ready", PATIENCE);
    assert_eq!(faults.faults_left(), 0, "{:?}", faults.commands());
    assert_same_tree(&tree, &target);
}

#[test]
fn what_is_replaced_between_listing_and_reading_is_never_mixed() {
    let place = Place::new();
    let tree = place.dir("tree");
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    for (kind, server) in [("facts", pyftpdlib(&tree, None)), ("lines", vsftpd(&place, &tree, None, ""))] {
        for (what, path) in [("file", "/weights.bin"), ("tree", "/")] {
            let name = &format!("{kind}-{what}");
            random_file(&tree.join("weights.bin"), seed(), 160 << 20);
            other_file(&place.join("other.bin"), 160 << 20);
            let faults = FtpFaults::before(server.port);
            faults.slow_down(4 << 20);
            daemon.ctl(&["create", name, "--type", "web", "--uri", &faults.url(path)]).ok();
            wait_until("some is here", PATIENCE, || daemon.bytes_done(name) > 8 << 20);
            fs::rename(place.join("other.bin"), tree.join("weights.bin")).unwrap();
            faults.slow_down(0);
            daemon.wait_state(name, "failed", PATIENCE);
            let record = daemon.json(&["get", name]).to_string();
            assert!(record.contains("SOURCE_CHANGED"), "{record}");
        }
    }
}

/// When a small file becomes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// It is listed, and not asked for yet.
    Before,
    /// Some of it has come; another takes its name.
    Replaced,
    /// Some of it has come; it is written over where it is.
    WrittenOver,
}

/// Bytes of a small file.
const SMALL: u64 = 4 << 20;

/// Brings the small file `file`, which meanwhile becomes another of `bytes`: by its time, or, where it has another length, by that alone.
fn bring_what_changes(
    daemon: &Daemon,
    faults: &FtpFaults,
    (name, path): (&str, &str),
    file: &Path,
    (when, bytes): (When, u64),
) {
    let other = file.parent().unwrap().with_file_name("other.bin");
    random_file(file, seed(), SMALL);
    other_file(&other, bytes);
    if bytes != SMALL {
        let then = file.metadata().unwrap().modified().unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(then).unwrap();
    }
    if when == When::Before {
        faults.spoil("RETR", FtpFault::Hold, 9);
    }
    faults.slow_down(1 << 20);
    let (asked, before) = (faults.commands().len(), faults.data_bytes());
    daemon.ctl(&["create", name, "--type", "web", "--uri", &faults.url(path)]).ok();
    wait_until("it is asked for, and some of it has come", PATIENCE, || {
        let is_asked = faults.commands().split_off(asked).iter().any(|command| command.starts_with("RETR"));
        is_asked && (when == When::Before || faults.data_bytes() > before + (512 << 10))
    });
    if when == When::WrittenOver {
        let written = File::options().write(true).open(file).unwrap();
        written.write_all_at(&fs::read(&other).unwrap(), 0).unwrap();
        written.set_modified(other.metadata().unwrap().modified().unwrap()).unwrap();
        fs::remove_file(other).unwrap();
    } else {
        fs::rename(other, file).unwrap();
    }
    assert!(faults.data_bytes() < before + (3 << 20), "it was changed too late");
    faults.slow_down(0);
    faults.spare();
}

#[test]
fn a_small_file_that_changes_between_listing_and_reading_is_never_mixed() {
    let place = Place::new();
    let tree = place.dir("tree");
    let weights = tree.join("weights.bin");
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    for (kind, server) in [("facts", pyftpdlib(&tree, None)), ("lines", vsftpd(&place, &tree, None, ""))] {
        let faults = FtpFaults::before(server.port);
        for (what, path) in [("file", "/weights.bin"), ("tree", "/")] {
            for (when, bytes) in [
                (When::Before, SMALL),
                (When::Before, SMALL - 1),
                (When::Before, SMALL + 1),
                (When::Replaced, SMALL),
                (When::WrittenOver, SMALL),
            ] {
                let name = &format!("{kind}-{what}-{when:?}-{bytes}");
                bring_what_changes(&daemon, &faults, (name, path), &weights, (when, bytes));
                daemon.wait_state(name, "failed", PATIENCE);
                assert_eq!(daemon.json(&["get", name])["error"]["reason"], "SOURCE_CHANGED", "{name}");
                daemon.ctl(&["attach", "nobody", name]).refused(&[4], &[name]);
                daemon.ctl(&["retry", name, "--wait"]).ok();
                assert_mounted(&tree, &daemon.attach(name, name));
            }
        }
    }
}

#[test]
fn what_is_refused_says_why() {
    let place = Place::new();
    let (tree, made) = (odd_tree(&place), certificates(&place, &[]));
    let authority = made.join("ca.pem").display().to_string();
    let plain = pyftpdlib(&tree, None);
    let expired = pyftpdlib(&tree, Some(&made.join("expired.pem")));
    let foreign = vsftpd(&place, &tree, Some(&made.join("foreign.pem")), "");
    let elsewhere = vsftpd(&place, &tree, Some(&made.join("elsewhere.pem")), "");
    let daemon = Daemon::start_with(&[LOOPBACK, ONE_ATTEMPT, ("SSL_CERT_FILE", &authority)]);
    let url = |scheme: &str, port: u16, path: &str| format!("{scheme}://127.0.0.1:{port}{path}");
    for (name, url, reason) in [
        ("wrong", format!("ftp://u:hush-hush@127.0.0.1:{}/", plain.port), "CREDENTIALS_REFUSED"),
        ("missing", url("ftp", plain.port, "/missing"), "NO_SUCH_FILE"),
        ("missing-tree", url("ftp", plain.port, "/missing/"), "NO_SUCH_FILE"),
        ("directory", url("ftp", plain.port, "/deep"), "NO_SUCH_FILE"),
        ("empty", url("ftp", plain.port, "/empty%20dir/"), "EMPTY_SOURCE"),
        ("newline", url("ftp", plain.port, "/a%0D%0AQUIT"), "FTP cannot carry"),
        ("query", url("ftp", plain.port, "/a?b"), "a query"),
        ("no-tls", url("ftps", plain.port, "/"), "COMMAND_NOT_KNOWN"),
        ("wants-tls", url("ftp", foreign.port, "/"), "CREDENTIALS_REQUIRED"),
        ("expired", url("ftps", expired.port, "/"), "CERTIFICATE_REFUSED"),
        ("foreign", url("ftps", foreign.port, "/"), "CERTIFICATE_REFUSED"),
        ("elsewhere", url("ftps", elsewhere.port, "/"), "CERTIFICATE_REFUSED"),
        ("nobody", "ftp://127.0.0.1:1/".to_owned(), "CONNECT_FAILED"),
    ] {
        refused(&daemon, name, &url, reason);
    }
    assert_kept_nowhere(&daemon, &["hush-hush"]);
    let strict = Daemon::start_with(&[ONE_ATTEMPT]);
    for (name, host) in [("address", "127.0.0.1"), ("name", "localhost"), ("mapped", "[::ffff:127.0.0.1]")] {
        refused(&strict, name, &format!("ftp://{host}:{}/", plain.port), "EGRESS_REFUSED");
    }
}

#[test]
fn twenty_thousand_files_are_listed_and_fetched_in_reasonable_time() {
    let place = Place::new();
    let tree = place.dir("tree");
    for directory in 0..20 {
        let directory = place.dir(&format!("tree/d{directory}"));
        (0..1000).for_each(|file| fs::write(directory.join(format!("f{file}")), format!("{file}")).unwrap());
    }
    let server = vsftpd(&place, &tree, None, "");
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let began = Instant::now();
    create_within(&daemon, "w", &format!("ftp://127.0.0.1:{}/", server.port), Duration::from_secs(360));
    eprintln!("20,000 files in {:?}", began.elapsed());
    assert_eq!(regular_files(&daemon.attach("job", "w")).len(), 20_000);
}
