//! Files and trees of the web: the index pages of every usual server, and whatever goes wrong on the way.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::buckets::{assert_comes_back_later, assert_kept_nowhere, reason};
use crate::support::corpus::{random_file, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree, b3sum, regular_files, xattr};
use crate::support::place::Place;
use crate::support::ran::{LIMIT, run, run_for, wait_until};
use crate::support::relay::{Break, Relay};
use crate::support::server::Server;
use crate::support::webserver::{apache, caddy, certificates, nginx, nginx_tls, python};

/// Short enough that a stall is over soon.
pub(crate) const SHORT_SILENCE: (&str, &str) = ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2");

pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// Names that a URL, a page or a listing might spoil.
pub(crate) const ODD_NAMES: &[&str] = &[
    "a b.bin",
    "100%.txt",
    "percent%20name",
    "a+b",
    "x#y",
    "q&r='s'",
    "semi;colon",
    "what?.txt",
    "quote\"s",
    "<tag>",
    "a:b",
    "dotted..name",
    "ü-ñ-漢.txt",
    "~tilde",
    "deep/er/fi le",
    "d#r/x",
];

/// A tree with all of them, an empty file and an empty directory.
pub(crate) fn odd_tree(place: &Place) -> PathBuf {
    let root = place.dir("tree");
    for name in ODD_NAMES {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name.repeat(100)).unwrap();
    }
    fs::write(root.join("empty"), "").unwrap();
    fs::create_dir(root.join("empty dir")).unwrap();
    random_file(&root.join("weights.bin"), seed(), 9 << 20);
    root
}

/// A tree of 60 MiB, whose large file is two thirds of it.
pub(crate) fn tree_to_kill(place: &Place) -> PathBuf {
    let tree = place.dir("tree");
    random_file(&tree.join("large.bin"), seed(), 40 << 20);
    fs::create_dir(tree.join("a b")).unwrap();
    (0..20_u64).for_each(|index| random_file(&tree.join(format!("a b/f{index:02}")), seed() + index, 1 << 20));
    tree
}

pub(crate) fn create(daemon: &Daemon, name: &str, url: &str) {
    create_within(daemon, name, url, LIMIT);
}

/// Fails the test where creating it takes longer than `limit`.
pub(crate) fn create_within(daemon: &Daemon, name: &str, url: &str, limit: Duration) {
    let mut command = daemon.ctl_command();
    run_for(command.args(["create", name, "--type", "web", "--uri", url, "--wait"]), limit).ok();
}

/// A file that differs in its bytes and, which is all that some servers tell of, in its time.
pub(crate) fn other_file(path: &Path, bytes: u64) {
    random_file(path, seed() + 1, bytes);
    let later = std::time::SystemTime::now() + Duration::from_secs(100);
    fs::File::options().write(true).open(path).unwrap().set_modified(later).unwrap();
}

/// Fails the test unless creating it fails for `reason`, which its record tells, or, where it is refused before there is one, in these words.
pub(crate) fn refused(daemon: &Daemon, name: &str, url: &str, reason: &str) {
    let ran = daemon.ctl(&["--json", "create", name, "--type", "web", "--uri", url, "--wait"]);
    let ran = ran.refused(&[2, 3, 4, 6, 7], &[]);
    let record = daemon.ctl(&["--json", "get", name]);
    assert!(format!("{ran}{record}").contains(reason), "{reason} expected\n{ran}\n{record}");
}

#[test]
fn a_file_comes_whole_through_resets_and_refusals() {
    let place = Place::new();
    let site = place.dir("site");
    let bytes: Vec<u8> = (0..9_000_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(site.join("weights.bin"), bytes).unwrap();
    let server = python(&site);
    let faults = Faults::before(server.port);
    faults.spoil("/weights.bin", Fault::Status(503, "Retry-After: 0"), 1);
    faults.spoil("/weights.bin", Fault::Reset(10 << 20), 1);
    let daemon = Daemon::start_with(&[LOOPBACK]);
    create(&daemon, "w", &faults.url("/weights.bin"));
    assert_eq!(faults.faults_left(), 0);
    assert_same_tree(&site, &daemon.attach("job", "w"));
    assert_comes_back_later(&faults, "/weights.bin", || {
        daemon.ctl(&["create", "later", "--type", "web", "--uri", &faults.url("/weights.bin?again"), "--wait"])
    });
}

#[test]
fn the_index_pages_of_every_server_are_the_tree_they_are_of() {
    let place = Place::new();
    let tree = odd_tree(&place);
    let root = tree.display();
    let formats = format!(
        "location /json/ {{ alias {root}/; autoindex_format json; }}\n\
         location /xml/ {{ alias {root}/; autoindex_format xml; }}\n\
         location /norange/ {{ alias {root}/; max_ranges 0; }}"
    );
    let servers = [nginx(&place, &tree, &formats), apache(&place, &tree), python(&tree), caddy(&place, &tree)];
    let [nginx, apache, python, caddy] = &servers;
    let daemon = Daemon::start_with(&[LOOPBACK]);
    for (name, url) in [
        ("nginx", nginx.url("/")),
        ("nginx-json", nginx.url("/json/")),
        ("nginx-xml", nginx.url("/xml/")),
        ("nginx-norange", nginx.url("/norange/")),
        ("apache", apache.url("/")),
        ("apache-fancy", apache.url("/fancy/")),
        ("python", python.url("/")),
        ("caddy", caddy.url("/")),
        ("caddy-html", caddy.url("/html/")),
    ] {
        create(&daemon, name, &url);
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
    let digests: Vec<_> = daemon.rows("list").iter().map(|row| row["digest"].clone()).collect();
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "one tree has one digest: {digests:?}");
    create(&daemon, "part", &nginx.url("/deep/"));
    assert_same_tree(&tree.join("deep"), &daemon.attach("part", "part"));
}

#[test]
fn a_tree_comes_whole_through_faults() {
    let place = Place::new();
    let tree = odd_tree(&place);
    let server = nginx(&place, &tree, "");
    let faults = Faults::before(server.port);
    for (words, fault) in [
        ("GET / ", Fault::Status(503, "Retry-After: 0")),
        ("GET /deep/ ", Fault::Reset(20)),
        ("GET /deep/er/ ", Fault::Stall(20)),
        ("HEAD /a%2Bb", Fault::Status(429, "Retry-After: 1")),
        ("HEAD /a%3Ab", Fault::Status(500, "")),
        ("GET /weights.bin", Fault::Status(500, "")),
        ("GET /weights.bin", Fault::Reset(5 << 20)),
        ("GET /weights.bin", Fault::Stall(1 << 20)),
        ("GET /weights.bin", Fault::Truncate(1 << 20)),
        ("GET /semi", Fault::Status(429, "Retry-After: 1")),
        ("GET /a%2Bb", Fault::Truncate(7)),
        ("GET /d%23r/x", Fault::Reset(0)),
    ] {
        faults.spoil(words, fault, 1);
    }
    let daemon = Daemon::start_with(&[LOOPBACK, SHORT_SILENCE]);
    create(&daemon, "w", &faults.url("/"));
    assert_eq!(faults.faults_left(), 0, "{:?}", faults.heads());
    assert_same_tree(&tree, &daemon.attach("job", "w"));
}

#[test]
fn a_tree_that_was_killed_goes_on_with_what_is_here() {
    let place = Place::new();
    let tree = tree_to_kill(&place);
    let server = nginx(&place, &tree, "");
    let faults = Faults::before(server.port);
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(8 << 20);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &faults.url("/")]).ok();
    wait_until("half is here", PATIENCE, || daemon.recorded_bytes("w") > 40 << 20);
    daemon.kill9();
    let before = faults.body_bytes();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", PATIENCE);
    assert_mounted(&tree, &daemon.attach("job", "w"));
    let after = faults.body_bytes() - before;
    assert!(after < 45 << 20, "{after} bytes were fetched again of 60 MiB, after {before}");
}

#[test]
fn a_protected_tree_that_was_killed_goes_on_with_what_is_here() {
    let place = Place::new();
    let made = certificates(&place, &[]);
    let tree = tree_to_kill(&place);
    let server = nginx_tls(&place, &tree, &made.join("good.pem"));
    let relay = Relay::before(server.port);
    let mut daemon =
        Daemon::start_with(&[LOOPBACK, SHORT_SILENCE, ("SSL_CERT_FILE", made.join("ca.pem").to_str().unwrap())]);
    // One of them meets the listing, the others what is listed.
    relay.break_at(&[Break::Reset(3000), Break::Reset(4 << 20), Break::Stall(1 << 20)]);
    relay.slow_down(8 << 20);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &format!("https://127.0.0.1:{}/", relay.port())]).ok();
    wait_until("half is here", PATIENCE, || daemon.recorded_bytes("w") > 40 << 20);
    daemon.kill9();
    wait_until("the connections have gone with the daemon", PATIENCE, || relay.open() == 0);
    assert_eq!(relay.breaks_left(), []);
    let before = relay.bytes();
    relay.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", PATIENCE);
    assert_mounted(&tree, &daemon.attach("job", "w"));
    let after = relay.bytes() - before;
    assert!(after < 45 << 20, "{after} bytes were fetched again of 60 MiB, after {before}");
}

#[test]
fn twenty_thousand_files_are_listed_and_fetched_in_reasonable_time() {
    let place = Place::new();
    let tree = place.dir("tree");
    for directory in 0..20 {
        let directory = place.dir(&format!("tree/d{directory}"));
        (0..1000).for_each(|file| fs::write(directory.join(format!("f{file}")), format!("{file}")).unwrap());
    }
    let server = nginx(&place, &tree, "");
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let began = Instant::now();
    create_within(&daemon, "w", &server.url("/"), Duration::from_secs(240));
    eprintln!("20,000 files in {:?}", began.elapsed());
    assert_eq!(regular_files(&daemon.attach("job", "w")).len(), 20_000);
}

/// Creates `name` of what is at `path`, some of which is here then; the rest comes slowly until the way is widened.
fn half_fetched(daemon: &Daemon, server: &Server, name: &str, path: &str) -> Faults {
    let faults = Faults::before(server.port);
    faults.slow_down(4 << 20);
    daemon.ctl(&["create", name, "--type", "web", "--uri", &faults.url(path)]).ok();
    wait_until("some is here", PATIENCE, || daemon.bytes_done(name) > 8 << 20);
    faults
}

#[test]
fn what_is_replaced_between_listing_and_reading_is_never_mixed() {
    let place = Place::new();
    let tree = place.dir("tree");
    let server = nginx(&place, &tree, "");
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    for (name, path) in [("file", "/weights.bin"), ("tree", "/")] {
        // More than what is asked for at once: nginx goes on sending the file that it has open.
        random_file(&tree.join("weights.bin"), seed(), 192 << 20);
        other_file(&place.join("other.bin"), 192 << 20);
        let faults = half_fetched(&daemon, &server, name, path);
        fs::rename(place.join("other.bin"), tree.join("weights.bin")).unwrap();
        faults.slow_down(0);
        daemon.wait_state(name, "failed", PATIENCE);
        let record = daemon.json(&["get", name]).to_string();
        assert!(record.contains("SOURCE_CHANGED"), "{record}");
        daemon.ctl(&["retry", name, "--wait"]).ok();
        assert_same_file(&tree.join("weights.bin"), &daemon.attach(name, name).join("weights.bin"));
    }
}

#[test]
fn what_is_written_over_while_all_of_it_is_being_sent_is_never_mixed() {
    let place = Place::new();
    let tree = place.dir("tree");
    let server = nginx(&place, &tree, "");
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    for (name, path) in [("file", "/weights.bin"), ("tree", "/")] {
        // Less than what is asked for at once: nginx has begun every range, and sends what it finds.
        let weights = tree.join("weights.bin");
        random_file(&weights, seed(), 96 << 20);
        let written = File::options().write(true).open(&weights).unwrap();
        let then = SystemTime::now() - Duration::from_secs(60);
        written.set_modified(then).unwrap();
        let before = fs::read(&weights).unwrap();
        other_file(&place.join("other.bin"), 96 << 20);
        let faults = half_fetched(&daemon, &server, name, path);
        written.write_all_at(&fs::read(place.join("other.bin")).unwrap(), 0).unwrap();
        faults.slow_down(0);
        daemon.wait_state(name, "failed", PATIENCE);
        assert_eq!(daemon.json(&["get", name])["error"]["reason"], "SOURCE_CHANGED");
        // What had come is of both, also when the source has again what it had.
        written.write_all_at(&before, 0).unwrap();
        written.set_modified(then).unwrap();
        daemon.ctl(&["retry", name, "--wait"]).ok();
        assert_same_file(&weights, &daemon.attach(name, name).join("weights.bin"));
    }
}

#[test]
fn a_small_file_that_is_written_over_while_it_comes_slowly_is_never_mixed() {
    let place = Place::new();
    let tree = place.dir("tree");
    let server = nginx(&place, &tree, "");
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "2")]);
    let small = tree.join("small.bin");
    random_file(&small, seed(), 3 << 20);
    let written = File::options().write(true).open(&small).unwrap();
    written.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    other_file(&place.join("other.bin"), 3 << 20);
    let faults = Faults::before(server.port);
    faults.slow_down(1 << 20);
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &faults.url("/small.bin")]).ok();
    let is_asked_for =
        || faults.heads().iter().any(|head| head.starts_with("GET /small.bin ") && !head.contains("bytes=0-0"));
    wait_until("it is asked for", PATIENCE, is_asked_for);
    written.write_all_at(&fs::read(place.join("other.bin")).unwrap(), 0).unwrap();
    daemon.wait_state("w", "failed", PATIENCE);
    assert_eq!(daemon.json(&["get", "w"])["error"]["reason"], "SOURCE_CHANGED");
    faults.slow_down(0);
    daemon.ctl(&["retry", "w", "--wait"]).ok();
    assert_same_file(&small, &daemon.attach("w", "w").join("small.bin"));
}

#[test]
fn what_cannot_be_a_tree_says_why() {
    let place = Place::new();
    let tree = odd_tree(&place);
    let dir = place.path().display();
    fs::create_dir(tree.join("app")).unwrap();
    fs::write(tree.join("app/index.html"), "<title>Shop</title><a href=https://example.org/>elsewhere</a>").unwrap();
    fs::write(place.join("passwords"), "u:{PLAIN}p@ss%word\n").unwrap();
    let elsewhere = python(&tree);
    let locations = format!(
        "location /away/ {{ return 302 {}; }}\n\
         location /auth/ {{ alias {}/; auth_basic x; auth_basic_user_file {dir}/passwords; }}\n\
         location /forbidden/ {{ return 403; }}\n\
         location /down/ {{ return 503; }}",
        elsewhere.url("/"),
        tree.join("deep").display()
    );
    let server = nginx(&place, &tree, &locations);
    let daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__ATTEMPTS", "1"), ("RUST_LOG", "debug")]);
    for (name, path, reason) in [
        ("app", "/app/", "NOT_AN_INDEX"),
        ("all", "/", "NOT_AN_INDEX"),
        ("empty", "/empty%20dir/", "EMPTY_SOURCE"),
        ("missing", "/missing/", "NO_SUCH_FILE"),
        ("missing-file", "/missing", "NO_SUCH_FILE"),
        ("away", "/away/", "BAD_REDIRECT"),
        ("auth", "/auth/", "CREDENTIALS_REQUIRED"),
        ("forbidden", "/forbidden/", "ACCESS_REFUSED"),
        ("down", "/down/", "SERVER_ERROR"),
        ("query", "/deep/?token=hush", "has no query"),
    ] {
        refused(&daemon, name, &server.url(path), reason);
    }
    let url = server.url("/auth/");
    let wrong = ["create", "wrong", "--type", "web", "--uri", &url, "--wait"];
    let wrong = [&wrong[..], &["--credential", "username=u", "--credential", "password=env:WRONG"]].concat();
    let ran = run(daemon.ctl_command().args(wrong).env("WRONG", "hush-hush"));
    ran.refused(&[2], &["not accepted"]);
    create(&daemon, "right", &url.replace("http://", "http://u:p%40ss%25word@"));
    assert_same_tree(&tree.join("deep"), &daemon.attach("right", "right"));
    assert_kept_nowhere(&daemon, &["hush-hush", "p@ss%word", "p%40ss%25word", "dTpwQHNzJXdvcmQ"]);
}

#[test]
fn a_name_that_is_both_a_file_and_a_directory_is_refused_by_name() {
    let place = Place::new();
    let tree = place.dir("tree");
    fs::create_dir_all(tree.join("store/weights")).unwrap();
    fs::write(tree.join("store/weights/part1"), "1").unwrap();
    fs::write(tree.join("store/fine"), "2").unwrap();
    fs::write(place.join("object"), "3").unwrap();
    // As a store of objects lists itself that has both `weights` and `weights/part1`.
    let page = |links: &[&str]| {
        let links: String = links.iter().map(|link| format!("<a href=\"{link}\">{link}</a>\n")).collect();
        fs::write(tree.join("store/index.html"), format!("<title>Index of /store/</title>\n{links}")).unwrap();
    };
    let object = place.join("object");
    let server = nginx(&place, &tree, &format!("location = /store/weights {{ alias {}; }}", object.display()));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    for (name, links, word, words) in [
        ("both", &["fine", "weights", "weights/"][..], "DUPLICATE_ENTRY", "`weights` occurs twice, as a directory"),
        ("below", &["fine", "weights", "weights/part1"], "NOT_A_DIRECTORY", "`weights/part1` is below `weights`"),
    ] {
        page(links);
        let ran = daemon.ctl(&["create", name, "--type", "web", "--uri", &server.url("/store/"), "--wait"]);
        ran.refused(&[2], &[words, "rename"]);
        assert_eq!(reason(&daemon, name), word);
    }
    page(&["fine", "weights/"]);
    create(&daemon, "directory", &server.url("/store/"));
    let at = daemon.attach("job", "directory");
    assert_eq!(fs::read(at.join("weights/part1")).unwrap(), b"1");
}

#[test]
fn a_slow_server_is_no_silent_one() {
    let place = Place::new();
    let tree = odd_tree(&place);
    fs::remove_file(tree.join("weights.bin")).unwrap();
    // All of it takes eight seconds: longer than the silence that is allowed.
    random_file(&tree.join("slow.bin"), seed(), 12 << 20);
    let server = nginx(&place, &tree, "location ~ slow { limit_rate 1500k; }");
    let silence = ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "5");
    let daemon = Daemon::start_with(&[LOOPBACK, silence, ("CKPTD_SOURCES__ATTEMPTS", "1")]);
    create(&daemon, "w", &server.url("/"));
    assert_same_tree(&tree, &daemon.attach("job", "w"));
}

#[test]
fn b3sum_says_of_the_mount_what_it_says_of_the_file() {
    let place = Place::new();
    let tree = place.dir("tree");
    random_file(&tree.join("weights.bin"), seed(), 5 << 20);
    let server = nginx(&place, &tree, "");
    let daemon = Daemon::start_with(&[LOOPBACK]);
    create(&daemon, "w", &server.url("/"));
    let mounted = daemon.attach("job", "w").join("weights.bin");
    let digest = b3sum(&tree.join("weights.bin"));
    assert_eq!(b3sum(&mounted), digest);
    assert_eq!(xattr(&mounted, "user.ckptd.digest"), digest);
}
