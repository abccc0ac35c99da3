//! Repositories behind sshd.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::large::noise;
use super::servers::{GitSite, USER, Work, git};
use super::{IMPATIENT, TWICE, assert_no_scratch, create, ready};
use crate::buckets::assert_kept_nowhere;
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::Faults;
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::{run, wait_until};
use crate::support::relay::{Break, Relay};
use crate::support::server::{Server, free_port};
use crate::support::site::{Page, Site};

/// An sshd of its own keys, that lets one key in.
struct Sshd {
    server: Server,
    place: Place,
}

impl Sshd {
    fn start() -> Self {
        let place = Place::new();
        let port = free_port();
        for key in ["host", "other-host", "user", "stranger"] {
            keygen(&place.join(key));
        }
        fs::create_dir_all("/run/sshd").unwrap();
        let public = fs::read_to_string(place.join("user.pub")).unwrap();
        fs::write(place.join("authorized"), public).unwrap();
        let directory = place.path().display();
        let configuration = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
             AuthorizedKeysFile {directory}/authorized\nLogLevel DEBUG\nSetEnv PATH={directory}/bin:{}\n",
            std::env::var("PATH").unwrap()
        );
        fs::write(place.join("sshd_config"), configuration).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        command.arg("-D").arg("-f").arg(place.join("sshd_config")).arg("-E").arg(place.join("log"));
        Self { server: Server::start(&mut command, port), place }
    }

    /// `ssh://`, with the path of a repository on this host.
    fn url(&self, repository: &Path) -> String {
        url_at(self.server.port, repository)
    }

    /// The option that gives one of the keys.
    fn key(&self, name: &str) -> String {
        format!("ssh_key=@{}", self.place.join(name).display())
    }

    /// The option that gives known hosts, with one of the host keys.
    fn known(&self, key: &str) -> String {
        self.known_at(self.server.port, key)
    }

    /// The same of a host that is reached at another port.
    fn known_at(&self, port: u16, key: &str) -> String {
        let public = fs::read_to_string(self.place.join(&format!("{key}.pub"))).unwrap();
        format!("known_hosts=[127.0.0.1]:{port} {public}")
    }
}

fn url_at(port: u16, repository: &Path) -> String {
    format!("ssh://root@127.0.0.1:{port}{}", repository.display())
}

/// A working tree whose `sub` is the commit `commit` at `url`.
fn with_submodule(work: &Work, url: &str, commit: &str) {
    work.write(".gitmodules", format!("[submodule \"sub\"]\n\tpath = sub\n\turl = {url}\n")).write("a", "a");
    git(&work.tree, &["add", "--all"]);
    git(&work.tree, &["update-index", "--add", "--cacheinfo", &format!("160000,{commit},sub")]);
    work.publish_index();
}

fn keygen(path: &Path) {
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(path)).ok();
}

#[test]
fn a_repository_comes_by_ssh_for_the_right_key_from_the_right_host() {
    let (site, sshd) = (GitSite::start(), Sshd::start());
    let module = site.work("org/module");
    module.write("m", "m").publish();
    let work = site.work("org/model");
    work.write("a b", "x").write("big", vec![3; 6 << 20]);
    git(&work.tree, &["submodule", "--quiet", "add", "../module.git", "sub"]);
    let commit = work.publish();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    let (url, lost) = (sshd.url(&site.published("org/model")), sshd.url(Path::new("/nowhere.git")));
    let (key, known) = (sshd.key("user"), sshd.known("host"));
    let (stranger, other) = (sshd.key("stranger"), sshd.known("other-host"));
    for (uri, more, codes, words) in [
        (&url, &["--credential", &key][..], &[2][..], &["the host's key is not known", "known_hosts"][..]),
        (&url, &["--credential", &key, "--credential", &other], &[2], &["the host's key is another"]),
        (&url, &["--credential", &known], &[2], &["credentials are asked for", "ssh_key"]),
        (&url, &["--credential", &stranger, "--credential", &known], &[2], &["the credentials are not accepted"]),
        (&url, &["--credential", "ssh_key=nonsense", "--credential", &known], &[2], &["ssh key cannot be read"]),
        (&lost, &["--credential", &key, "--credential", &known], &[3], &["there is no repository"]),
        (&url, &["--option", "branch=nope", "--credential", &key, "--credential", &known], &[3], &["nope"]),
    ] {
        let ran = create(&daemon, "refused", uri, more).refused(codes, words);
        assert!(!ran.stderr.contains("PRIVATE KEY"), "{ran}");
        daemon.ctl(&["remove", "refused", "--yes"]);
    }
    for (name, branch) in [("default", "HEAD"), ("commit", commit.as_str())] {
        let option = format!("branch={branch}");
        create(&daemon, name, &url, &["--option", &option, "--credential", &key, "--credential", &known]).ok();
        assert_eq!(ready(&daemon, name)["revision"], commit);
        let job = format!("job-{name}");
        assert_same_tree(&work.expected(&format!("expected-{name}")), &daemon.attach(&job, name));
    }
    assert_no_scratch(&daemon);
}

#[test]
fn the_hosts_own_key_and_known_hosts_serve_those_that_give_none() {
    use std::os::unix::fs::PermissionsExt as _;
    let (site, sshd, place) = (GitSite::start(), Sshd::start(), Place::new());
    let work = site.work("org/model");
    work.write("a", "x").publish();
    let url = sshd.url(&site.published("org/model"));
    let keys = place.dir("keys");
    let secret = fs::read_to_string(sshd.place.join("user")).unwrap();
    let write = |name: &str, text: &str| {
        fs::write(keys.join(name), text).unwrap();
        fs::set_permissions(keys.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let known = sshd.known("host");
    let known = known.trim_start_matches("known_hosts=");
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE, ("CKPTD_SOURCES__CREDENTIALS_DIR", keys.to_str().unwrap())]);
    let key = format!("hosts = ['127.0.0.1']\nowners = ['', 'team-a']\nssh_key = '''\n{secret}'''\n");
    write("git.toml", &key);
    create(&daemon, "unknown-host", &url, &[]).refused(&[2], &["the host's key is not known"]);
    write("known_hosts", known);
    create(&daemon, "file", &url, &[]).ok();
    assert_same_tree(&work.expected("expected"), &daemon.attach("job", "file"));
    create(&daemon, "not-for-b", &url, &["--owner", "team-b"]).refused(&[2], &["credentials are asked for"]);
    fs::remove_file(keys.join("known_hosts")).unwrap();
    write("git.toml", &format!("{key}known_hosts = '''\n{known}'''\n"));
    create(&daemon, "secret", &url, &["--owner", "team-a"]).ok();
    assert_kept_nowhere(&daemon, &[secret.lines().nth(2).unwrap()]);
    assert_no_scratch(&daemon);
}

#[test]
fn a_key_is_not_offered_to_another_host_that_a_submodule_names() {
    let (site, sshd, other) = (GitSite::start(), Sshd::start(), Sshd::start());
    // It would let this very key in.
    fs::copy(sshd.place.join("authorized"), other.place.join("authorized")).unwrap();
    let module = site.work("org/module");
    let commit = module.write("m", "m").publish();
    let known = format!("{}\n{}", sshd.known("host"), other.known("host").trim_start_matches("known_hosts="));
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    let secrets = ["--credential", &sshd.key("user"), "--credential", &known];

    let work = site.work("org/greedy");
    with_submodule(&work, &other.url(&site.published("org/module")), &commit);
    create(&daemon, "greedy", &sshd.url(&site.published("org/greedy")), &secrets)
        .refused(&[2], &["the submodule `sub`", "credentials are asked for", "for another host"]);
    let log = fs::read_to_string(other.place.join("log")).unwrap();
    assert!(log.contains("userauth-request for user root"), "it was reached: {log}");
    assert!(!log.contains("method publickey"), "the key was offered: {log}");
    assert!(fs::read_to_string(sshd.place.join("log")).unwrap().contains("method publickey"), "the log tells of keys");

    // Where none is needed the submodule comes.
    let work = site.work("org/modest");
    with_submodule(&work, &site.url("org/module.git"), &commit);
    create(&daemon, "modest", &sshd.url(&site.published("org/modest")), &secrets).ok();
    assert_eq!(fs::read(daemon.attach("job", "modest").join("sub/m")).unwrap(), b"m");
}

#[test]
fn a_password_is_not_shown_to_another_host_that_a_submodule_names() {
    let (site, elsewhere) = (GitSite::start(), GitSite::start());
    let watched = Faults::before(elsewhere.port());
    let open = elsewhere.work("org/module").write("m", "m").publish();
    let hidden = elsewhere.work("private/module").write("m", "m").publish();
    let daemon = Daemon::start_with(&[LOOPBACK, TWICE]);
    let given = [format!("username={}", USER.0), format!("password={}", USER.1)];
    let secrets = ["--credential", &given[0], "--credential", &given[1]];

    with_submodule(&site.work("private/modest"), &watched.url("/org/module.git"), &open);
    create(&daemon, "modest", &site.url("private/modest.git"), &secrets).ok();
    assert_eq!(fs::read(daemon.attach("job", "modest").join("sub/m")).unwrap(), b"m");

    with_submodule(&site.work("private/greedy"), &watched.url("/private/module.git"), &hidden);
    create(&daemon, "greedy", &site.url("private/greedy.git"), &secrets)
        .refused(&[2], &["the submodule `sub`", "credentials are asked for"]);
    let heads = watched.heads();
    assert!(heads.iter().any(|head| head.contains("/private/module.git")), "it was reached: {heads:?}");
    assert!(!heads.iter().any(|head| head.to_ascii_lowercase().contains("authorization")), "{heads:?}");
}

/// A repository with a large file, which `answer` says of at the `site` where it is, once it is asked; who asked what, line by line.
fn large_file_by_login(answer: impl FnOnce(&GitSite) -> String) -> Vec<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let (site, sshd) = (GitSite::start_with_lfs(), Sshd::start());
    let work = site.work("org/model");
    work.write(".gitattributes", "*.bin filter=lfs -text\n");
    let bytes = vec![9; 5 << 20];
    work.large("w.bin", &bytes);
    work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let (login, asked) = (sshd.place.dir("bin").join("git-lfs-authenticate"), sshd.place.join("asked"));
    let answer = answer(&site);
    fs::write(&login, format!("#!/bin/sh\nasked='{}'\n{answer}\necho \"$@\" >>\"$asked\"\n", asked.display())).unwrap();
    fs::set_permissions(&login, fs::Permissions::from_mode(0o755)).unwrap();
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let url = sshd.url(&site.published("org/model"));
    create(&daemon, "w", &url, &["--credential", &sshd.key("user"), "--credential", &sshd.known("host")]).ok();
    assert_same_tree(&expected, &daemon.attach("job", "w"));
    let asked = fs::read_to_string(asked).unwrap();
    let wanted = format!("{} download", site.published("org/model").display());
    asked.lines().for_each(|line| assert_eq!(line, wanted));
    asked.lines().map(str::to_owned).collect()
}

/// What a login prints.
fn told(href: &str) -> String {
    format!("echo '{{\"href\": \"{href}\", \"header\": {{}}}}'")
}

#[test]
fn large_files_of_an_ssh_repository_come_from_where_its_host_says() {
    let asked = large_file_by_login(|site| told(&site.url("org/model.git/info/lfs")));
    assert_eq!(asked.len(), 1);
}

#[test]
fn a_login_for_large_files_that_has_run_out_is_asked_for_anew() {
    let refusing = Site::open();
    let old = refusing.put("/lfs", Page::Status(404));
    refusing.put("/lfs/objects/batch", Page::Status(401));
    let asked = large_file_by_login(|site| {
        let (old, new) = (told(&old), told(&site.url("org/model.git/info/lfs")));
        format!("if [ -e \"$asked\" ]; then {new}; else {old}; fi")
    });
    assert_eq!(asked.len(), 2);
}

#[test]
fn a_repository_comes_whole_by_ssh_through_a_network_that_breaks() {
    let (site, sshd) = (GitSite::start(), Sshd::start());
    let work = site.work("org/model");
    work.write("weights.bin", noise(21, 6 << 20)).write("a", "a").publish();
    let relay = Relay::before(sshd.server.port);
    let url = url_at(relay.port(), &site.published("org/model"));
    // In the login, then in the middle of the objects.
    relay.break_at(&[Break::Reset(500), Break::Stall(500), Break::Reset(2 << 20), Break::Stall(3 << 20)]);
    let daemon = Daemon::start_with(&[LOOPBACK, IMPATIENT]);
    let (key, known) = (sshd.key("user"), sshd.known_at(relay.port(), "host"));
    create(&daemon, "w", &url, &["--credential", &key, "--credential", &known]).ok();
    assert_eq!(relay.breaks_left(), []);
    assert_same_tree(&work.expected("expected"), &daemon.attach("job", "w"));
    assert_no_scratch(&daemon);
}

#[test]
fn a_daemon_that_is_killed_while_it_clones_by_ssh_clones_anew() {
    use std::os::unix::fs::PermissionsExt as _;
    let (site, sshd, place) = (GitSite::start(), Sshd::start(), Place::new());
    let work = site.work("org/model");
    let commit = work.write("weights.bin", noise(22, 8 << 20)).write("dir/a b", "a").publish();
    let relay = Relay::before(sshd.server.port);
    let (keys, secret) = (place.dir("keys"), fs::read_to_string(sshd.place.join("user")).unwrap());
    let known = sshd.known_at(relay.port(), "host");
    let known = known.trim_start_matches("known_hosts=");
    let named = format!("hosts = ['127.0.0.1']\nssh_key = '''\n{secret}'''\nknown_hosts = '''\n{known}'''\n");
    fs::write(keys.join("team.toml"), named).unwrap();
    fs::set_permissions(keys.join("team.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut daemon = Daemon::start_with(&[LOOPBACK, ("CKPTD_SOURCES__CREDENTIALS_DIR", keys.to_str().unwrap())]);
    relay.slow_down(1 << 20);
    let url = url_at(relay.port(), &site.published("org/model"));
    daemon.ctl(&["create", "w", "--type", "git", "--uri", &url, "--option", "credentials=team"]).ok();
    wait_until("objects come", Duration::from_secs(60), || relay.bytes() > 1 << 20);
    daemon.kill9();
    assert!(relay.bytes() < 7 << 20, "it was killed too late");
    wait_until("git and ssh have gone with the daemon", Duration::from_secs(30), || relay.open() == 0);
    relay.slow_down(0);
    daemon.restart();
    daemon.wait_state("w", "ready", Duration::from_secs(60));
    assert_eq!(ready(&daemon, "w")["revision"], commit);
    assert_mounted(&work.expected("expected"), &daemon.attach("job", "w"));
    assert_kept_nowhere(&daemon, &[secret.lines().nth(2).unwrap()]);
    assert_no_scratch(&daemon);
}
