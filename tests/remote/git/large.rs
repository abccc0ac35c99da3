//! Large files that a repository keeps in LFS: giftless says where they are, nginx or giftless itself has them.

use std::collections::HashMap;
use std::fs;
use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::faltering;
use super::servers::{GitSite, USER, Work, git};
use super::{TWICE, assert_no_scratch, create, ready};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_tree, walk};
use crate::support::ran::wait_until;

/// Bytes that do not compress, different for each seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A working tree whose `.bin` files are in LFS.
fn with_attributes(site: &GitSite, name: &str) -> Work {
    let work = site.work(name);
    work.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n").write("README", "plain\n");
    work
}

#[test]
fn large_files_come_verified_or_not_at_all() {
    let site = GitSite::start_with_lfs();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    // The second server answers every range with the whole file.
    for (name, length) in [("org/model", 20 << 20), ("whole/model", 9 << 20)] {
        let work = with_attributes(&site, name);
        let (big, small) = (noise(1, length), noise(2, 1000));
        work.large("big.bin", &big);
        work.large("dir/small one.bin", &small);
        work.large("copy.bin", &big);
        work.large("empty.bin", b"");
        // A text that only looks like a pointer.
        work.large("docs/pointer.txt", b"never fetched");
        work.publish();
        let expected = work.expected(&format!("expected-{}", name.replace('/', "-")));
        for (path, bytes) in [("big.bin", &big), ("dir/small one.bin", &small), ("copy.bin", &big)] {
            fs::write(expected.join(path), bytes).unwrap();
        }
        fs::write(expected.join("empty.bin"), "").unwrap();
        let checkpoint = name.replace('/', "-");
        create(&daemon, &checkpoint, &site.url(&format!("{name}.git")), &[]).ok();
        assert_same_tree(&expected, &daemon.attach(&checkpoint, &checkpoint));
    }
    for (name, length) in [("org/small", 5000), ("org/big", 9 << 20)] {
        let work = with_attributes(&site, name);
        let object = work.large("w.bin", &noise(3, length));
        work.publish();
        fs::write(&object, noise(4, length)).unwrap();
        let url = site.url(&format!("{name}.git"));
        create(&daemon, "wrong", &url, &[]).refused(&[6], &["`w.bin` arrived with SHA-256"]);
        assert_eq!(daemon.json(&["get", "wrong"])["error"]["reason"], "DIGEST_MISMATCH");
        daemon.ctl(&["remove", "wrong", "--yes"]).ok();
        fs::remove_file(&object).unwrap();
        create(&daemon, "missing", &url, &[]).refused(&[3], &["it has none of the files asked for"]);
        daemon.ctl(&["remove", "missing", "--yes"]).ok();
    }
    assert_no_scratch(&daemon);
}

#[test]
fn a_large_file_comes_whole_through_faults_of_its_server() {
    let site = GitSite::start_with_lfs();
    let faults = Faults::before(site.port());
    let work = with_attributes(&site, "org/model");
    let bytes = noise(5, 40 << 20);
    work.large("w.bin", &bytes);
    work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let daemon = Daemon::start_with(&[LOOPBACK, super::IMPATIENT]);
    faults.spoil("objects/batch", Fault::Status(503, "Retry-After: 0"), 1);
    faults.spoil("objects/batch", Fault::Status(429, "Retry-After: 1"), 1);
    faults.spoil("objects/storage", Fault::Status(500, ""), 1);
    faults.spoil("objects/storage", Fault::Status(403, ""), 1);
    // The first of these meets the one byte that tells whether there are ranges.
    faults.spoil("objects/storage", Fault::Reset(3 << 20), 2);
    faults.spoil("objects/storage", Fault::Stall(3 << 20), 1);
    create(&daemon, "w", &faults.url("/org/model.git"), &[]).ok();
    assert_eq!(faults.faults_left(), 0);
    assert_same_tree(&expected, &daemon.attach("job", "w"));
}

#[test]
fn large_files_are_not_fetched_from_where_sources_may_not_go() {
    let site = GitSite::start_with_lfs();
    let faults = Faults::before(site.port());
    let work = with_attributes(&site, "org/model");
    work.large("w.bin", &noise(5, 5 << 20));
    work.publish();
    let daemon = Daemon::start_with(&[LOOPBACK, super::IMPATIENT]);
    for (number, (words, status)) in [("objects/batch", 307), ("objects/storage", 302)].into_iter().enumerate() {
        faults.spoil(words, Fault::Status(status, "Location: http://169.254.169.254/x"), 9);
        let name = format!("w{number}");
        create(&daemon, &name, &faults.url("/org/model.git"), &[])
            .refused(&[2], &["169.254.169.254", "which sources may not reach"]);
        assert_eq!(crate::buckets::reason(&daemon, &name), "EGRESS_REFUSED");
        faults.spare();
    }
}

#[test]
fn a_killed_daemon_goes_on_where_it_was() {
    let site = GitSite::start_with_lfs();
    let faults = Faults::before(site.port());
    let work = with_attributes(&site, "org/model");
    let bytes = noise(6, 64 << 20);
    work.large("w.bin", &bytes);
    let commit = work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(3 << 20);
    daemon.ctl(&["create", "w", "--type", "git", "--uri", &faults.url("/org/model.git")]).ok();
    wait_until("a good part is here", Duration::from_secs(60), || daemon.recorded_bytes("w") > 28 << 20);
    daemon.kill9();
    let before = faults.body_bytes();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", Duration::from_secs(60));
    assert_eq!(ready(&daemon, "w")["revision"], commit);
    assert_mounted(&expected, &daemon.attach("job", "w"));
    let again = faults.body_bytes() - before;
    assert!(again < 44 << 20, "{again} bytes were fetched again, {before} before");
    assert_no_scratch(&daemon);
}

/// The commits in each repository that the daemon has fetched and reads from.
fn fetched_commits(daemon: &Daemon) -> Vec<Vec<String>> {
    let heads = walk(&daemon.state().join("scratch")).into_iter().filter(|path| path.ends_with("HEAD"));
    let mut commits: Vec<Vec<String>> = heads
        .map(|head| {
            let listed = ["cat-file", "--batch-all-objects", "--batch-check=%(objecttype) %(objectname)"];
            let listed = git(head.parent().unwrap(), &listed);
            listed.lines().filter_map(|line| line.strip_prefix("commit ")).map(str::to_owned).collect()
        })
        .collect();
    commits.sort();
    commits
}

#[test]
fn only_the_commit_that_is_meant_comes_and_nothing_of_its_history() {
    let site = GitSite::start_with_lfs();
    let module = site.work("org/module");
    let commits: Vec<_> = (0..3).map(|number| module.write("m", format!("{number}")).publish()).collect();
    let work = with_attributes(&site, "org/model");
    let bytes = noise(12, 5 << 20);
    work.large("w.bin", &bytes);
    git(&work.tree, &["submodule", "--quiet", "add", "../module.git", "sub"]);
    let mut commit = String::new();
    let mut states = Vec::new();
    for number in 0..5 {
        commit = work.write("changes", format!("{number}")).publish();
        let expected = work.expected(&format!("expected-{number}"));
        fs::write(expected.join("w.bin"), &bytes).unwrap();
        states.push((commit.clone(), expected));
        if number == 2 {
            git(&work.tree, &["tag", "-a", "v1", "-m", "v1"]);
            git(&work.tree, &["push", "--quiet", "origin", "--tags"]);
        }
    }
    for (name, branch, (id, expected)) in [
        ("default", "HEAD", &states[4]),
        ("branch", "main", &states[4]),
        ("tag", "v1", &states[2]),
        ("latest", commit.as_str(), &states[4]),
        ("earlier", states[1].0.as_str(), &states[1]),
    ] {
        let faults = Faults::before(site.port());
        let daemon = Daemon::start_with(&[LOOPBACK, super::ENDURING]);
        // Until the large file comes, what was fetched is kept. The byte that tells whether there are ranges is asked for before.
        faults.spoil("objects/storage", Fault::Truncate(u64::MAX), 1);
        faults.spoil("objects/storage", Fault::Status(503, "Retry-After: 1"), usize::MAX / 2);
        let option = format!("branch={branch}");
        let line = ["create", name, "--type", "git", "--uri", &faults.url("/org/model.git"), "--option", &option];
        daemon.ctl(&line).ok();
        wait_until("the large file is asked for", Duration::from_secs(60), || {
            faults.heads().iter().filter(|head| head.contains("objects/storage")).count() > 1
        });
        let mut meant = [vec![id.clone()], vec![commits[2].clone()]];
        meant.sort();
        assert_eq!(fetched_commits(&daemon), meant, "{name}: the commit, and that of the submodule");
        faults.spare();
        daemon.wait_state(name, "ready", Duration::from_secs(60));
        assert_eq!(ready(&daemon, name)["revision"], *id);
        assert_mounted(expected, &daemon.attach("job", name));
        assert_no_scratch(&daemon);
    }
}

#[test]
fn a_branch_that_moves_moves_nothing_that_was_listed() {
    let site = GitSite::start_with_lfs();
    let faults = Faults::before(site.port());
    let work = with_attributes(&site, "org/model");
    let bytes = noise(7, 16 << 20);
    work.large("w.bin", &bytes);
    let commit = work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(4 << 20);
    daemon.ctl(&["create", "w", "--type", "git", "--uri", &faults.url("/org/model.git")]).ok();
    wait_until("something is here", Duration::from_secs(60), || daemon.bytes_done("w") > 0);
    work.write("README", "moved\n").large("w.bin", &noise(8, 100));
    work.publish();
    faults.slow_down(0);
    daemon.wait_state("w", "ready", Duration::from_secs(60));
    assert_eq!(ready(&daemon, "w")["revision"], commit);
    assert_same_tree(&expected, &daemon.attach("job", "w"));
}

/// Argument lists of the process `first` and of all that came from it.
fn argument_lists(first: u32) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let all = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: HashMap<u32, u32> = all.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let above = |pid: &u32| parents.get(pid).copied();
    let is_ours = |pid: u32| iter::successors(Some(pid), above).take(parents.len()).any(|pid| pid == first);
    let ours = parents.keys().filter(|pid| is_ours(**pid));
    let lines = ours.map(|pid| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).collect()
}

/// The second word behind the name, which is in parentheses and may hold some.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn secrets_show_nowhere() {
    let site = GitSite::start_with_lfs();
    let faults = Faults::before(site.port());
    let work = with_attributes(&site, "private/model");
    work.large("w.bin", &noise(9, 9 << 20));
    work.write("plain.bin.txt", noise(10, 2 << 20));
    work.publish();
    let daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(3 << 20);
    let seen = AtomicBool::new(false);
    let done = AtomicBool::new(false);
    let encoded = "cmVhZGVyOnMzY3JldC1wYXNzdzByZA";
    std::thread::scope(|scope| {
        // Every argument list of the daemon's, as long as it takes.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for line in argument_lists(daemon.pid()) {
                    if line.contains("git-upload-pack\0") || line.contains("remote-http") {
                        seen.store(true, Ordering::Relaxed);
                    }
                    assert!(!line.contains(USER.1) && !line.contains(encoded), "{line}");
                }
            }
        });
        let secret = daemon.place().join("secret");
        fs::write(&secret, USER.1).unwrap();
        let given = [format!("username={}", USER.0), format!("password=@{}", secret.display())];
        let more = ["--credential", &given[0], "--credential", &given[1]];
        let ran = create(&daemon, "w", &faults.url("/private/model.git"), &more);
        done.store(true, Ordering::Relaxed);
        fs::remove_file(secret).unwrap();
        ran.ok();
    });
    assert!(seen.load(Ordering::Relaxed), "git was never seen at work");
    let mut texts = vec![daemon.ctl(&["events"]).stdout, daemon.ctl(&["--json", "get", "w"]).stdout];
    texts.push(fs::read_to_string(daemon.place().join("stderr")).unwrap());
    for path in walk(daemon.state()).into_iter().filter(|path| path.is_file()) {
        texts.push(String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned());
    }
    assert!(texts.iter().all(|text| !text.contains(USER.1) && !text.contains(encoded)));
    assert_no_scratch(&daemon);
}

#[test]
fn jobs_that_read_large_files_lazily_see_nothing_of_a_network_that_falters() {
    let site = GitSite::start_with_lfs();
    let network = faltering::before(site.port());
    let work = with_attributes(&site, "org/model");
    let bytes = noise(11, 48 << 20);
    work.large("w.bin", &bytes);
    work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let daemon = Daemon::start_with(&[LOOPBACK, super::IMPATIENT]);
    daemon.ctl(&["create", "k", "--type", "git", "--uri", &network.url("/org/model.git")]).ok();
    faltering::assert_read_lazily(&daemon, &network, "k", &expected);
}
