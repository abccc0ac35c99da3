//! Archives behind an address: extracted while they arrive, whatever the server can and cannot do.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::corpus::{odd_tree, random_file, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::files::{assert_mounted, assert_same_tree, disk_bytes};
use crate::support::loopfs::LoopFs;
use crate::support::place::Place;
use crate::support::ran::{run, shell, wait_until};
use crate::support::site::{Page, Site};
use crate::support::webserver::nginx;

const PATIENCE: Duration = Duration::from_secs(180);

/// How a site gives bytes.
type Served = fn(Arc<Vec<u8>>) -> Page;

/// A tree with everything an archive can carry, and one file of several fill units.
fn tree(place: &Place) -> PathBuf {
    let tree = place.dir("tree");
    odd_tree(&tree, seed());
    (100..3000).for_each(|index| fs::remove_file(tree.join(format!("deep/f{index}"))).unwrap());
    random_file(&tree.join("weights.bin"), seed(), 11 << 20);
    tree
}

/// The program that packs with Python's standard library.
fn of_python() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/archives.py")
}

/// What Python's standard library makes of `tree`.
pub(super) fn packed(tree: &Path, kind: &str) -> Arc<Vec<u8>> {
    let out = tree.with_extension(kind);
    run(Command::new("python3").arg(of_python()).arg(kind).arg(tree).arg(&out)).ok();
    Arc::new(fs::read(out).unwrap())
}

/// The tree, and a folder with `a.tar.gz` and `b.zip` of it.
pub(super) fn two_archives(place: &Place) -> (PathBuf, PathBuf) {
    let (tree, folder) = (tree(place), place.dir("packed"));
    for (kind, name) in [("tar-gz", "a.tar.gz"), ("zip-deflated", "b.zip")] {
        fs::write(folder.join(name), &*packed(&tree, kind)).unwrap();
    }
    (tree, folder)
}

fn create(daemon: &Daemon, name: &str, url: &str) {
    daemon.ctl(&["create", name, "--uri", url, "--wait"]).ok();
}

#[test]
fn an_archive_is_its_tree_whatever_the_server_can_do() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree(&place);
    for (kind, name) in
        [("tar-pax", "a.tar"), ("tar-gz", "b.tar.gz"), ("zip-deflated", "c.zip"), ("zip-streamed", "d.zip")]
    {
        let bytes = packed(&tree, kind);
        let pages = [
            Page::Ranged(bytes.clone()),
            Page::Whole(bytes.clone()),
            Page::Unsized(bytes.clone()),
            Page::Short(bytes.clone(), 3),
        ];
        for (number, page) in pages.into_iter().enumerate() {
            let checkpoint = format!("{kind}-{number}");
            create(&daemon, &checkpoint, &site.put(&format!("/{number}/{name}"), page));
            let job = format!("job-{checkpoint}");
            assert_same_tree(&tree, &daemon.attach(&job, &checkpoint));
        }
    }
    let digests: Vec<_> = daemon.rows("list").iter().map(|row| row["digest"].clone()).collect();
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "one tree has one digest: {digests:?}");
    daemon.wait_empty("filling");
    assert!(disk_bytes(&daemon.state().join("blobs")) < 30 << 20, "members are kept once");
}

#[test]
fn an_archive_that_is_to_be_kept_is_a_file() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let bytes = packed(&tree(&place), "tar-gz");
    let url = site.put("/a.tar.gz", Page::Ranged(bytes.clone()));
    daemon.ctl(&["create", "kept", "--uri", &url, "--option", "extract=false", "--wait"]).ok();
    assert!(fs::read(daemon.attach("job", "kept").join("a.tar.gz")).unwrap() == *bytes);
}

#[test]
fn a_single_compressed_file_comes_without_its_ending() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let file = place.join("model.bin");
    random_file(&file, seed(), 6 << 20);
    run(Command::new("gzip").arg("-k1").arg(&file)).ok();
    let bytes = Arc::new(fs::read(place.join("model.bin.gz")).unwrap());
    create(&daemon, "single", &site.put("/model.bin.gz", Page::Ranged(bytes)));
    assert!(fs::read(daemon.attach("job", "single").join("model.bin")).unwrap() == fs::read(&file).unwrap());
}

#[test]
fn a_kill_in_the_middle_of_an_archive_is_made_good() {
    let (place, site, mut daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree(&place);
    let tar = site.put("/a.tar.gz", Page::Ranged(packed(&tree, "tar-gz")));
    let zip = site.put("/a.zip", Page::Ranged(packed(&tree, "zip-deflated")));
    site.limit(6 << 20);
    daemon.ctl(&["create", "tar", "--uri", &tar]).ok();
    daemon.ctl(&["create", "zip", "--uri", &zip]).ok();
    wait_until("both arrive", PATIENCE, || ["tar", "zip"].iter().all(|name| daemon.bytes_done(name) > 1 << 20));
    daemon.kill9();
    site.limit(0);
    daemon.restart();
    for name in ["tar", "zip"] {
        daemon.wait_state(name, "ready", PATIENCE);
        assert_mounted(&tree, &daemon.attach(&format!("job-{name}"), name));
    }
}

/// A tree whose tar has small members, links, and then files of several fill units, the last of which is larger than all before.
fn tree_to_go_on(place: &Place) -> PathBuf {
    let tree = place.dir("on");
    odd_tree(&tree, seed());
    (100..3000).for_each(|index| fs::remove_file(tree.join(format!("deep/f{index}"))).unwrap());
    (0..6).for_each(|number| random_file(&tree.join(format!("x{number}.bin")), seed() ^ number, 5 << 20));
    random_file(&tree.join("z.bin"), seed(), 60 << 20);
    tree
}

#[test]
fn a_tar_goes_on_after_each_kill_where_what_is_recorded_of_it_ends() {
    let (place, site, mut daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree_to_go_on(&place);
    let tar = packed(&tree, "tar-pax");
    let whole = u64::try_from(tar.len()).unwrap();
    let url = site.put("/a.tar", Page::Ranged(tar));
    site.narrow();
    site.limit(20 << 20);
    daemon.ctl(&["create", "tar", "--uri", &url]).ok();
    // Among the members, within the last one, and at once again.
    let mut recorded = 0;
    for until in [12 << 20, 50 << 20, 0] {
        wait_until("more of it is durable", PATIENCE, || daemon.recorded_bytes("tar") >= until);
        recorded = daemon.recorded_bytes("tar");
        assert!(recorded < u64::MAX, "it is ready before it was killed");
        daemon.kill9();
        site.take_sent();
        daemon.restart();
    }
    site.limit(0);
    daemon.wait_state("tar", "ready", PATIENCE);
    let sent = site.take_sent();
    // Headers and small members are not counted as recorded until they are sealed.
    assert!(sent <= whole - recorded + (4 << 20), "{sent} of {whole} bytes were sent again, {recorded} were here");
    assert_mounted(&tree, &daemon.attach("job", "tar"));
    daemon.wait_empty("filling");

    assert_keeps_nothing_of_another_revision(&mut daemon, &site, &tree, ("/a.tar", "tar-pax"), || {
        (0..6).for_each(|number| random_file(&tree.join(format!("x{number}.bin")), !seed() ^ number, 5 << 20));
    });
}

/// Kills the daemon while it extracts the archive of `tree` at a path for somebody else, and has `change` write other bytes of the same names and sizes.
fn assert_keeps_nothing_of_another_revision(
    daemon: &mut Daemon,
    site: &Site,
    tree: &Path,
    (path, kind): (&str, &str),
    change: impl FnOnce(),
) {
    site.limit(16 << 20);
    daemon.ctl(&["create", "other", "--uri", &site.url(path), "--owner", "somebody"]).ok();
    wait_until("some of it is durable", PATIENCE, || {
        daemon.files_done("other") >= 5 && daemon.recorded_bytes("other") >= 12 << 20
    });
    assert!(daemon.files_done("other") < u64::MAX, "it is ready before it was killed");
    daemon.kill9();
    change();
    site.put(path, Page::Ranged(packed(tree, kind)));
    site.limit(0);
    daemon.restart();
    daemon.wait_state("other", "ready", PATIENCE);
    let target = daemon.place().dir("at-other");
    daemon.ctl(&["attach", "job2", "other", "--owner", "somebody", "--at", target.to_str().unwrap()]).ok();
    assert_mounted(tree, &target);
}

#[test]
fn members_of_a_zip_that_were_sealed_before_a_kill_are_not_fetched_again() {
    let (place, site, mut daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = place.dir("tree");
    // Above a fill unit: each is sealed as it is whole.
    let each = 5 << 20;
    (0..16).for_each(|number| random_file(&tree.join(format!("{number:02}.bin")), seed() ^ number, each));
    fs::create_dir(tree.join("empty directory")).unwrap();
    let zip = packed(&tree, "zip-deflated");
    let whole = u64::try_from(zip.len()).unwrap();
    let ranged = site.put("/a.zip", Page::Ranged(zip.clone()));
    site.limit(16 << 20);
    daemon.ctl(&["create", "zip", "--uri", &ranged]).ok();
    wait_until("some members are sealed", PATIENCE, || daemon.files_done("zip") >= 5);
    let sealed = daemon.files_done("zip");
    daemon.kill9();
    site.limit(0);
    site.take_sent();
    daemon.restart();
    daemon.wait_state("zip", "ready", PATIENCE);
    let sent = site.take_sent();
    assert!(
        // The range that the first missing member begins in may begin before it.
        sent <= whole - sealed * each + each / 2 + (4 << 20),
        "{sent} of {whole} bytes were sent again, {sealed} members were here"
    );
    assert_mounted(&tree, &daemon.attach("job", "zip"));

    assert_keeps_nothing_of_another_revision(&mut daemon, &site, &tree, ("/a.zip", "zip-deflated"), || {
        (0..16).for_each(|number| random_file(&tree.join(format!("{number:02}.bin")), !seed() ^ number, each));
    });
}

#[test]
fn what_is_hostile_or_no_archive_fails_by_name_and_leaves_nothing() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree(&place);
    let zip = packed(&tree, "zip-deflated");
    let cut = Arc::new(zip[..zip.len() / 2].to_vec());
    let climbing = packed(&tree, "climbing");
    let device = packed(&tree, "device");
    for (name, bytes, code, words) in [
        ("no.zip", Arc::new(vec![7; 5000]), 2, "not a zip"),
        ("cut.zip", cut, 6, "truncated"),
        ("climbing.tar", climbing, 2, "climb"),
        ("device.tar", device, 2, "device"),
    ] {
        let url = site.put(&format!("/{name}"), Page::Ranged(bytes));
        daemon.ctl(&["create", name, "--uri", &url, "--wait"]).refused(&[code], &[name, words]);
        daemon.ctl(&["remove", name, "--yes"]).ok();
    }
    daemon.wait_empty("blobs");
    daemon.wait_empty("filling");
}

#[test]
fn an_archive_that_is_replaced_while_it_arrives_is_not_mixed() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree(&place);
    let (gz, other) = (packed(&tree, "tar-gz"), packed(&tree, "tar-pax"));
    let url = site.put("/a.tar.gz", Page::Short(gz, u64::MAX));
    site.limit(4 << 20);
    daemon.ctl(&["create", "mixed", "--uri", &url]).ok();
    wait_until("it arrives", PATIENCE, || daemon.bytes_done("mixed") > 0 || site.bodies() > 2);
    site.put("/a.tar.gz", Page::Ranged(other));
    site.limit(0);
    daemon.wait_state("mixed", "failed", PATIENCE);
    assert_eq!(daemon.json(&["get", "mixed"])["error"]["reason"], "SOURCE_CHANGED");
}

#[test]
fn an_archive_asked_for_twice_is_fetched_once() {
    let (place, site, daemon) = (Place::new(), Site::open(), Daemon::start_with(&[LOOPBACK]));
    let tree = tree(&place);
    let bytes = packed(&tree, "tar-gz");
    let size = u64::try_from(bytes.len()).unwrap();
    let url = site.put("/a.tar.gz", Page::Ranged(bytes));
    // Takes minutes, until the second has found what the first is fetching.
    site.limit(128 << 10);
    for name in ["one", "two"] {
        daemon.ctl(&["create", name, "--uri", &url]).ok();
    }
    wait_until("both are filling from what was listed", PATIENCE, || {
        let records = ["one", "two"].map(|name| daemon.json(&["get", name]));
        records.iter().all(|record| record["state"] == "filling" && record["revision"] != "")
    });
    site.limit(8 << 20);
    for name in ["one", "two"] {
        daemon.wait_state(name, "ready", PATIENCE);
    }
    assert!(site.take_sent() < size + size / 2, "fetched once");
}

/// A tree with what archives have dialects for: holes, names and links that are long, files and links with several names.
fn tree_of_dialects(place: &Place) -> PathBuf {
    let tree = place.dir("dialects");
    let sparse = fs::File::create(tree.join("sparse.bin")).unwrap();
    for at in 0..60 {
        sparse.write_all_at(format!("piece {at}").as_bytes(), at * 100_000 + 70_000).unwrap();
    }
    sparse.set_len(7_000_000).unwrap();
    fs::File::create(tree.join("hole")).unwrap().set_len(2_000_000).unwrap();
    random_file(&tree.join("weights.bin"), seed(), 6 << 20);
    let deep = tree.join("a component of some length ü/".repeat(6));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("n".repeat(200)), "deep").unwrap();
    symlink(Path::new(&"a component of some length ü/".repeat(6)).join("n".repeat(200)), tree.join("long link"))
        .unwrap();
    symlink("x".repeat(250), tree.join("dangling")).unwrap();
    fs::hard_link(deep.join("n".repeat(200)), tree.join("same")).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    tree
}

/// Archives as their own programs write them: name, how it is packed into `$2` (by the program `$3`), and how it is unpacked here from `$1`. Compressed pieces follow each other as
/// those programs allow.
const DIALECTS: &[(&str, &str, &str)] = &[
    ("gnu.tar", "tar -S --format=gnu -cf \"$2\" .", "tar -xf"),
    ("s00.tar", "tar -S --format=pax --sparse-version=0.0 -cf \"$2\" .", "tar -xf"),
    ("s01.tar", "tar -S --format=pax --sparse-version=0.1 -cf \"$2\" .", "tar -xf"),
    ("s10.tar", "tar -S --format=pax --sparse-version=1.0 -cf \"$2\" .", "tar -xf"),
    ("bsd.tar", "bsdtar --format=pax -cf \"$2\" .", "bsdtar -xf"),
    ("members.tar.gz", "tar -cf - . | split -b 1500000 --filter='gzip -1' - >\"$2\"", "tar -xzf"),
    ("frames.tar.zst", "tar -cf - . | split -b 1500000 --filter='zstd -1 -q -c' - >\"$2\"", "tar --zstd -xf"),
    ("streams.tar.xz", "tar -cf - . | split -b 4000000 --filter='xz -0 -c' - >\"$2\"", "tar -xJf"),
    ("streams.tar.bz2", "tar -cf - . | split -b 4000000 --filter='bzip2 -1 -c' - >\"$2\"", "tar -xjf"),
    ("forced-64.zip", "zip -1qry -fz \"$2\" .", "LC_ALL=C.UTF-8 unzip -q"),
    // Into a pipe: sizes and sums follow the bytes, those of the second in 64 bits.
    ("piped.zip", "bsdtar --format=zip -cf - . | cat >\"$2\"", "bsdtar -xf"),
    ("piped-64.zip", "python3 \"$3\" zip-64-streamed . \"$2\"", "LC_ALL=C.UTF-8 unzip -q"),
];

#[test]
fn the_dialects_of_other_programs_are_what_those_programs_extract() {
    let (place, daemon) = (Place::new(), Daemon::start_with(&[LOOPBACK]));
    let (tree, site, python) = (tree_of_dialects(&place), place.dir("site"), of_python());
    let server = nginx(&place, &site, "location /whole/ { rewrite ^/whole(.*)$ $1 break; max_ranges 0; }");
    for (name, pack, unpack) in DIALECTS {
        let archive = site.join(name);
        shell(&format!("cd \"$1\"; {pack}"), &[&tree, &archive, &python]).ok();
        let unpacked = place.dir(&format!("unpacked-{name}"));
        shell(&format!("cd \"$2\"; {unpack} \"$1\""), &[&archive, &unpacked]).ok();
        assert_same_tree(&tree, &unpacked);
        for (number, path) in ["", "/whole"].into_iter().enumerate() {
            let checkpoint = format!("{number}-{name}");
            create(&daemon, &checkpoint, &server.url(&format!("{path}/{name}")));
            assert_mounted(&unpacked, &daemon.attach(&checkpoint, &checkpoint));
        }
    }
    let digests: BTreeSet<_> = daemon.rows("list").iter().map(|row| row["digest"].to_string()).collect();
    assert_eq!(digests.len(), 1, "one tree has one digest, however it is packed");
}

/// The most that `fs` came to hold while `work` went on, beyond what it held before.
fn most_beyond(fs: &LoopFs, work: impl FnOnce()) -> u64 {
    let before = fs.used_bytes();
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(before));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(fs.used_now(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
        });
        // Whoever looks ends also where this fails.
        let worked = catch_unwind(AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        worked.unwrap_or_else(|panic| resume_unwind(panic));
    });
    most.load(Ordering::Relaxed) - before
}

#[test]
fn an_archive_is_on_no_disk_while_it_is_extracted() {
    let (place, site, fs) = (Place::new(), Site::open(), LoopFs::ext4(512));
    let daemon = Daemon::start_on(fs.dir("state"), &[LOOPBACK]);
    // Many names of the same bytes, which do not compress: what is kept is a small part of what arrives.
    let (each, copies) = (5 << 20, 16);
    site.limit(32 << 20);
    let cases: [(&str, &str, Served, bool); 3] = [
        ("unsized.tar.zst", "tar -cf - . | zstd -q -1", Page::Unsized, false),
        ("ranges.zip", "zip -q0r - .", Page::Ranged, false),
        // Without ranges a zip has to lie somewhere: what looks for a copy finds this one, which has no name.
        ("whole.zip", "zip -q0r - .", Page::Whole, true),
    ];
    for (number, (name, pack, page, copied)) in (0..).zip(cases) {
        let tree = place.dir(name);
        random_file(&tree.join("00.bin"), seed() ^ number, each);
        for copy in 1..copies {
            fs::copy(tree.join("00.bin"), tree.join(format!("{copy:02}.bin"))).unwrap();
        }
        let archive = place.join("archive");
        shell(&format!("cd \"$1\"; {pack} >\"$2\""), &[&tree, &archive]).ok();
        let bytes = fs::read(&archive).unwrap();
        let size = bytes.len() as u64;
        assert!(size > each * copies, "{name} has only {size} bytes");
        let url = site.put(&format!("/{name}"), page(Arc::new(bytes)));
        let before = fs.used_bytes();
        let most = most_beyond(&fs, || create(&daemon, name, &url));
        eprintln!("{name}: {most} bytes at a time, of {size}");
        // Some members may wait to be sealed, were the disk slow.
        assert!(if copied { most > size } else { most < 12 * each }, "{name}: {most} bytes at a time, of {size}");
        // What was doomed may go a little later.
        wait_until("only the bytes themselves are kept", PATIENCE, || fs.used_bytes() < before + each + (4 << 20));
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
}
