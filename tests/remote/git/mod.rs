//! Repositories behind git's own servers.

mod large;
mod protected;
mod servers;
mod ssh;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;

use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::ran::{Ran, wait_until};
pub(super) use large::noise;
use servers::git;
pub(super) use servers::{GitSite, USER};

/// Gives up a silent server after two seconds.
const IMPATIENT: (&str, &str) = ("CKPTD_SOURCES__INACTIVITY_TIMEOUT_S", "2");

/// Goes on trying where a server asks to come back.
const ENDURING: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "100");

/// Tries twice.
const TWICE: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "2");

/// Creates a checkpoint of the repository at `uri` and waits for it.
fn create(daemon: &Daemon, name: &str, uri: &str, more: &[&str]) -> Ran {
    let mut arguments = vec!["create", name, "--type", "git", "--uri", uri, "--wait"];
    arguments.extend(more);
    daemon.ctl(&arguments)
}

/// The record of a checkpoint that must be ready.
fn ready(daemon: &Daemon, name: &str) -> Value {
    let record = daemon.json(&["get", name]);
    assert_eq!(record["state"], "ready", "{record}");
    record
}

/// Nothing that was fetched is left on the disk.
fn assert_no_scratch(daemon: &Daemon) {
    let scratch = daemon.state().join("scratch");
    wait_until("the scratch directories are gone", std::time::Duration::from_secs(10), || {
        fs::read_dir(&scratch).unwrap().next().is_none()
    });
}

#[test]
fn every_way_to_name_a_commit_gives_its_files() {
    let site = GitSite::start();
    let module = site.work("org/module");
    module.write("inner file", "of the module\n").publish();
    let work = site.work("org/model");
    work.write("first", "1").publish();
    git(&work.tree, &["tag", "-a", "v1", "-m", "v1"]);
    git(&work.tree, &["tag", "light"]);
    let old = work.expected("old");
    work.write("a b%20c+d#e?.txt", "odd")
        .write("ünïcode/日本", "é")
        .write("new\nline", "x")
        .write("empty", "")
        .write("run.sh", "#!/bin/sh\n")
        .executable("run.sh")
        .write("big.bin", vec![7; 9 << 20])
        .link("link", "ünïcode/日本");
    git(&work.tree, &["submodule", "--quiet", "add", "../module.git", "deep/module"]);
    let new = work.publish();
    git(&work.tree, &["push", "--quiet", "origin", "--tags", "HEAD:refs/heads/dev/x", "v1^{}:refs/heads/past"]);
    let first = git(&work.tree, &["rev-parse", "v1^{}"]);
    let now = work.expected("now");

    let daemon = Daemon::start_with(&[LOOPBACK]);
    let cases: [(&str, &str, &Path, &str); 9] = [
        ("default", "", &now, &new),
        ("branch", "main", &now, &new),
        ("slash", "dev/x", &now, &new),
        ("past", "past", &old, &first),
        ("annotated", "v1", &old, &first),
        ("light", "light", &old, &first),
        ("full", "refs/heads/past", &old, &first),
        ("commit", &new, &now, &new),
        ("earlier", &first, &old, &first),
    ];
    for (name, branch, expected, commit) in cases {
        let option = format!("branch={branch}");
        let more: &[&str] = if branch.is_empty() { &[] } else { &["--option", &option] };
        create(&daemon, name, &site.url("org/model.git"), more).ok();
        assert_eq!(ready(&daemon, name)["revision"], commit, "{name}");
        assert_same_tree(expected, &daemon.attach(name, name));
    }
    let at = daemon.place().join("at-default");
    let mode = |path: &str| fs::metadata(at.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("run.sh"), mode("empty")), (0o555, 0o444));
    create(&daemon, "moved", &site.url("elsewhere/model.git"), &[]).ok();
    assert_eq!(ready(&daemon, "moved")["revision"], new);
    assert_no_scratch(&daemon);
}

#[test]
fn what_is_not_there_or_not_allowed_is_told_apart() {
    let site = GitSite::start();
    let work = site.work("org/model");
    work.write("a", "a").publish();
    site.work("org/empty");
    let hidden = site.work("private/model");
    hidden.write("b", "b").publish();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    let (name, word) = USER;
    let (right, wrong) = (format!("password={word}"), "password=n0t-the-passw0rd");
    let (user, token_user) = (format!("username={name}"), format!("token={word}"));
    let lost = format!("branch={}", "0123456789".repeat(4));
    let odd = ["a b", "-x", "a..b"].map(|name| format!("branch={name}"));
    let (model, private) = (site.url("org/model.git"), site.url("private/model.git"));
    for (uri, more, codes, words) in [
        (&model, &["--option", "branch=nope"][..], &[3][..], &["nope", "no branch, tag or commit"][..]),
        (&model, &["--option", &lost], &[3], &["does not give a commit"]),
        (&model, &["--option", &odd[0]], &[2], &["branch"]),
        (&model, &["--option", &odd[1]], &[2], &["branch"]),
        (&model, &["--option", &odd[2]], &[2], &["branch"]),
        (&site.url("org/nothing.git"), &[], &[3], &["there is no repository"]),
        (&site.url("org/empty.git"), &[], &[3], &["no commit to begin with"]),
        (&private, &[], &[2], &["credentials are asked for", "give the credential"]),
        (&private, &["--credential", &user, "--credential", wrong], &[2], &["the credentials are not accepted"]),
        (&"ssh://git@127.0.0.1:1/x".to_owned(), &[], &[7], &["onnection refused"]),
        (&"file:///etc".to_owned(), &[], &[2], &["is not a URI of type `git`"]),
        (&"ext::sh -c id@h:x".to_owned(), &[], &[2], &["is not a URI of type `git`"]),
        (&"git://127.0.0.1/x".to_owned(), &[], &[2], &["is not a URI of type `git`"]),
    ] {
        let ran = create(&daemon, "refused", uri, more).refused(codes, words);
        assert!(!format!("{ran}").contains(word) && !ran.stderr.contains("n0t-the"), "{ran}");
        daemon.ctl(&["remove", "refused", "--yes"]);
    }
    create(&daemon, "named", &private, &["--credential", &user, "--credential", &right]).ok();
    create(&daemon, "token", &private, &["--credential", &user, "--credential", &token_user]).ok();
    assert_same_tree(&hidden.expected("hidden"), &daemon.attach("job", "named"));
    assert_no_scratch(&daemon);
}

#[test]
fn hosts_of_this_network_are_refused_unless_allowed() {
    let site = GitSite::start();
    site.work("org/model").write("a", "a").publish();
    let daemon = Daemon::start();
    for uri in [&site.url("org/model.git"), "ssh://git@127.0.0.1:22/x", "git@localhost:x", "http://localhost:1/x.git"] {
        create(&daemon, "refused", uri, &[]).refused(&[2], &["which sources may not reach"]);
        daemon.ctl(&["remove", "refused", "--yes"]);
    }
}

#[test]
fn a_redirect_to_where_sources_may_not_go_is_refused() {
    let site = GitSite::start();
    site.work("org/model").write("a", "a").publish();
    let faults = Faults::before(site.port());
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    // git itself follows nowhere.
    for (number, (words, reason, said)) in [
        ("GET /org/model.git/info/refs", "EGRESS_REFUSED", "169.254.169.254"),
        ("POST /org/model.git/git-upload-pack", "BAD_REDIRECT", "it is redirected"),
    ]
    .into_iter()
    .enumerate()
    {
        faults.spoil(words, Fault::Status(302, "Location: http://169.254.169.254/x"), 9);
        let name = format!("w{number}");
        create(&daemon, &name, &faults.url("/org/model.git"), &[]).refused(&[2], &[said]);
        assert_eq!(crate::buckets::reason(&daemon, &name), reason);
        faults.spare();
    }
    assert_no_scratch(&daemon);
}

#[test]
fn a_submodule_follows_the_same_rules() {
    let site = GitSite::start();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    let secret = site.work("private/module");
    let commit = secret.write("s", "s").publish();
    for (number, (url, codes, words)) in [
        ("file:///etc", &[2][..], &["the submodule `sub`", "is not the address of a repository"][..]),
        ("/etc", &[2], &["the submodule `sub`", "is not the address of a repository"]),
        ("ext::sh -c id", &[2], &["the submodule `sub`"]),
        ("http://10.0.0.1/x.git", &[2], &["the submodule `sub`", "which sources may not reach"]),
        ("../nothing.git", &[3], &["the submodule `sub`", "there is no repository"]),
        ("../../private/module.git", &[2], &["the submodule `sub`", "credentials are asked for"]),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("org/model{number}");
        let work = site.work(&name);
        work.write(".gitmodules", format!("[submodule \"sub\"]\n\tpath = sub\n\turl = {url}\n")).write("a", "a");
        git(&work.tree, &["add", "--all"]);
        git(&work.tree, &["update-index", "--add", "--cacheinfo", &format!("160000,{commit},sub")]);
        work.publish_index();
        create(&daemon, "refused", &site.url(&format!("{name}.git")), &[]).refused(codes, words);
        daemon.ctl(&["remove", "refused", "--yes"]);
    }
    // With the credentials of its origin the last one comes.
    let given = [format!("username={}", USER.0), format!("password={}", USER.1)];
    let more = ["--credential", &given[0], "--credential", &given[1]];
    create(&daemon, "whole", &site.url("org/model5.git"), &more).ok();
    assert_eq!(fs::read(daemon.attach("job", "whole").join("sub/s")).unwrap(), b"s");
}

#[test]
fn a_repository_comes_whole_through_faults_of_its_server() {
    let site = GitSite::start();
    let work = site.work("org/model");
    work.write("weights.bin", noise(13, 4 << 20)).publish();
    let expected = work.expected("expected");
    let daemon = Daemon::start_with(&[LOOPBACK, IMPATIENT]);
    let post = "POST /org/model.git/git-upload-pack";
    for (number, (words, fault)) in [
        ("GET /org/model.git/info/refs", Fault::Status(503, "Retry-After: 0")),
        ("GET /org/model.git/info/refs", Fault::Status(429, "Retry-After: 1")),
        (post, Fault::Status(500, "")),
        (post, Fault::Stall(10)),
        ("Content-Type: application/x-git-upload-pack-request", Fault::Reset(20)),
    ]
    .into_iter()
    .enumerate()
    {
        let faults = Faults::before(site.port());
        faults.spoil(words, fault.clone(), 1);
        let name = format!("w{number}");
        create(&daemon, &name, &faults.url("/org/model.git"), &[]).ok();
        assert_eq!(faults.faults_left(), 0, "{fault:?}");
        assert_same_tree(&expected, &daemon.attach(&name, &name));
    }
    // In the middle of the objects, where the answers are large.
    for (number, fault) in
        [Fault::Reset(1 << 20), Fault::Truncate(1 << 20), Fault::Stall(1 << 20)].into_iter().enumerate()
    {
        let faults = Faults::before(site.port());
        // The first of these meets the short answer to `ls-remote`, and leaves it as it is.
        faults.spoil(post, fault.clone(), 2);
        let name = format!("m{number}");
        create(&daemon, &name, &faults.url("/org/model.git"), &[]).ok();
        assert_eq!((faults.faults_left(), faults.broken()), (0, 1), "{fault:?} in the middle of the objects");
        assert!(faults.body_bytes() > 5 << 20, "{fault:?}: all of it came again");
        assert_same_tree(&expected, &daemon.attach(&name, &name));
    }
    assert_no_scratch(&daemon);
}

#[test]
fn a_daemon_that_is_killed_while_it_clones_clones_anew() {
    let site = GitSite::start();
    let work = site.work("org/model");
    let noise: Vec<u8> = (0..2_000_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    work.write("weights.bin", &noise).publish();
    let faults = Faults::before(site.port());
    let mut daemon = Daemon::start_with(&[LOOPBACK]);
    faults.slow_down(1 << 20);
    daemon.ctl(&["create", "w", "--type", "git", "--uri", &faults.url("/org/model.git")]).ok();
    wait_until("objects come", std::time::Duration::from_secs(30), || faults.body_bytes() > 1 << 20);
    daemon.kill9();
    assert!(faults.body_bytes() < 7 << 20, "it was killed too late");
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", std::time::Duration::from_secs(60));
    assert_mounted(&work.expected("expected"), &daemon.attach("job", "w"));
    assert_no_scratch(&daemon);
}

#[test]
fn a_commit_without_files_is_no_checkpoint() {
    let site = GitSite::start();
    let work = site.work("org/model");
    work.write("a", "a").publish();
    fs::remove_file(work.tree.join("a")).unwrap();
    work.publish();
    let daemon = Daemon::start_with(&[LOOPBACK]);
    create(&daemon, "w", &site.url("org/model.git"), &[]).refused(&[2], &["no files"]);
    assert_eq!(crate::buckets::reason(&daemon, "w"), "EMPTY_SOURCE");
    assert_no_scratch(&daemon);
}

#[test]
fn a_repository_that_is_too_large_is_stopped_while_it_comes() {
    let site = GitSite::start();
    let noise: Vec<u8> = (0..2_000_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    site.work("org/model").write("weights.bin", noise).publish();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE, ("CKPTD_STORE__CHECKPOINT_LIMIT", "1000000")]);
    create(&daemon, "w", &site.url("org/model.git"), &[]).refused(&[5], &["larger than a checkpoint may be"]);
    assert_no_scratch(&daemon);
}

#[test]
fn twenty_thousand_files_come_quickly() {
    let site = GitSite::start();
    let work = site.work("org/many");
    for number in 0..20_000 {
        work.write(&format!("{}/{number}", number / 500), format!("file {number}"));
    }
    work.publish();
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let began = std::time::Instant::now();
    create(&daemon, "many", &site.url("org/many.git"), &[]).ok();
    eprintln!("20,000 files in {:?}", began.elapsed());
    assert_eq!(ready(&daemon, "many")["files"], 20_000);
    assert_same_tree(&work.expected("expected"), &daemon.attach("job", "many"));
}
