//! Who may do what, and what an owner can learn of others: nothing.

#![cfg(test)]

mod support;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use support::corpus::{random_file, seed};
use support::daemon::{CKPTCTL, Daemon, LOOPBACK};
use support::place::Place;
use support::ran::{Ran, run, wait_until};
use support::site::{Page, Site};
use support::webserver::certificates;

const LIMIT: Duration = Duration::from_secs(60);

/// A user that is in no list, and a group.
const NOBODY: u32 = 65_534;
const GROUP: u32 = 54_321;

fn model(daemon: &Daemon, number: u64) -> PathBuf {
    let source = daemon.place().dir(&format!("source-{number}"));
    random_file(&source.join("w.bin"), seed() + number, (1 << 20) + number);
    source
}

fn upload(daemon: &Daemon, name: &str, owner: &str, from: &Path) -> Value {
    daemon.json(&["upload", name, from.to_str().unwrap(), "--owner", owner])
}

/// `ckptctl` as another user and group of this host, from a place that everybody may read.
fn ctl_as(daemon: &Daemon, uid: u32, groups: &str, args: &[&str]) -> Ran {
    let program = daemon.place().join("ckptctl");
    if !program.exists() {
        fs::copy(CKPTCTL, &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}")).arg(format!("--groups={groups}"));
    run(command.arg(program).arg("--endpoint").arg(format!("unix:{}", daemon.socket().display())).args(args))
}

/// `ckptctl --as OWNER`.
fn ctl_for(daemon: &Daemon, owner: &str, args: &[&str]) -> Ran {
    run(daemon.ctl_command().args(["--as", owner]).args(args))
}

fn json_for(daemon: &Daemon, owner: &str, args: &[&str]) -> Value {
    run(daemon.ctl_command().args(["--as", owner, "--json"]).args(args)).ok().json()
}

#[test]
fn users_and_groups_of_the_host_may_do_what_their_role_may() {
    let groups = format!(r#"["gid:{GROUP}"]"#);
    let readers = format!(r#"["uid:{NOBODY}"]"#);
    let daemon = Daemon::start_with(&[("CKPTD_ACCESS__SCHEDULERS", &groups), ("CKPTD_ACCESS__READERS", &readers)]);
    daemon.capture("k", &model(&daemon, 1));
    let target = daemon.place().dir("at");
    let attach = ["attach", "job", "k", "--at", target.to_str().unwrap()];

    // In no list.
    ctl_as(&daemon, 4242, "4242", &["list"]).refused(&[2], &["user 4242", "access"]);
    // A reader looks, whoever else it is.
    let listed = ctl_as(&daemon, NOBODY, "65534", &["--json", "list"]).ok().json();
    assert_eq!(listed["checkpoints"][0]["name"], "k");
    ctl_as(&daemon, NOBODY, "65534", &attach).refused(&[2], &["a reader"]);
    ctl_as(&daemon, NOBODY, "65534", &["remove", "k", "--yes"]).refused(&[2], &["a reader"]);
    // A scheduler by a supplementary group commands jobs, and not the host.
    let supplementary = format!("4242,{GROUP}");
    ctl_as(&daemon, 4242, &supplementary, &attach).ok();
    ctl_as(&daemon, 4242, &supplementary, &["drain"]).refused(&[2], &["a scheduler"]);
    ctl_as(&daemon, 4242, &supplementary, &["pin", "k"]).refused(&[2], &["a scheduler"]);
    ctl_as(&daemon, 4242, &supplementary, &["release", "job"]).ok();
    daemon.ctl(&["pin", "k"]).ok();
    ctl_as(&daemon, 4242, &supplementary, &["remove", "k", "--yes"]).refused(&[4], &["pinned", "unpin"]);
    assert_eq!(daemon.json(&["unpin", "k"])["pinned"], false);
    ctl_as(&daemon, 4242, &supplementary, &["remove", "k", "--yes"]).ok();
    daemon.ctl(&["drain"]).ok();
}

#[test]
fn without_lists_the_socket_is_roots_alone() {
    let daemon = Daemon::start();
    assert_eq!(fs::metadata(daemon.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    ctl_as(&daemon, NOBODY, "65534", &["list"]).refused(&[2, 7], &[]);
}

#[test]
fn an_owner_sees_its_own_and_public_ones_and_changes_only_its_own() {
    let site = Site::open();
    let url = site.put("/public.bin", Page::Ranged(vec![7; 1000].into()));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let alices = upload(&daemon, "m", "alice", &model(&daemon, 1));
    upload(&daemon, "m", "bob", &model(&daemon, 2));
    upload(&daemon, "hers", "alice", &model(&daemon, 3));
    daemon.ctl(&["create", "shared", "--type", "web", "--uri", &url, "--public", "--wait"]).ok();

    let names = |owner| -> Vec<String> {
        let listed = json_for(&daemon, owner, &["list"]);
        let rows = listed["checkpoints"].as_array().unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("alice"), ["m", "hers", "shared"]);
    assert_eq!(names("bob"), ["m", "shared"]);
    assert_eq!(names("carol"), ["shared"]);
    // One name, two owners: ambiguous for the host, clear for each.
    daemon.ctl(&["get", "m"]).refused(&[2], &["2 checkpoints"]);
    assert_eq!(json_for(&daemon, "alice", &["get", "m"])["id"], alices["id"]);

    let id = alices["id"].as_str().unwrap();
    let absent = ctl_for(&daemon, "bob", &["get", "no-such-id"]).refused(&[3], &["there is no checkpoint"]);
    for args in [
        &["get", id][..],
        &["remove", id, "--yes"],
        &["rename", id, "n"],
        &["retry", id],
        &["estimate", id],
        &["prefetch", id],
        &["reserve", "j", id],
        &["watch", id],
    ] {
        let hidden = ctl_for(&daemon, "bob", args).refused(&[3], &["there is no checkpoint"]);
        assert_eq!(hidden.stderr.replace(id, "no-such-id"), absent.stderr, "{args:?} tells that it is there");
    }
    for args in [&["remove", "shared", "--yes"][..], &["rename", "shared", "mine"], &["retry", "shared"]] {
        ctl_for(&daemon, "bob", args).refused(&[2], &["public"]);
    }
    ctl_for(&daemon, "bob", &["create", "x", "--uri", &url, "--owner", "alice"]).refused(&[2], &["another owner"]);
    ctl_for(&daemon, "bob", &["create", "x", "--uri", &url, "--public"]).refused(&[2], &["public"]);
    let made = json_for(&daemon, "bob", &["create", "x", "--uri", &url, "--wait"]);
    assert_eq!(made["owner"], "bob");
    ctl_for(&daemon, "bob", &["remove", "x", "--yes"]).ok();
}

#[test]
fn a_job_sees_its_owners_and_public_ones_and_is_seen_by_its_owner() {
    let daemon = Daemon::start();
    let id = upload(&daemon, "m", "alice", &model(&daemon, 1))["id"].as_str().unwrap().to_owned();
    let target = daemon.place().dir("at");
    let at = target.to_str().unwrap();
    for owner in [&["--owner", "bob"][..], &[]] {
        for verb in [&["reserve", "job", &id][..], &["attach", "job", &id, "--at", at]] {
            // Who sees it is told whose it is; who does not, that it is not there.
            daemon.ctl(&[verb, owner].concat()).refused(&[3], &["belongs to `alice`", "--owner alice"]);
            ctl_for(&daemon, "bob", verb).refused(&[3], &["there is no checkpoint"]);
        }
    }
    daemon.ctl(&["attach", "job", "m", "--at", at, "--owner", "alice"]).ok();
    assert!(target.join("w.bin").exists());
    assert_eq!(json_for(&daemon, "alice", &["jobs"])["jobs"][0]["job"], "job");
    assert_eq!(json_for(&daemon, "bob", &["jobs"])["jobs"], Value::Array(vec![]));
    ctl_for(&daemon, "bob", &["detach", "job"]).refused(&[3], &["no job"]);
    // As for a job that is not there: nothing is left to release.
    ctl_for(&daemon, "bob", &["release", "job"]).ok();
    assert!(target.join("w.bin").exists());
    ctl_for(&daemon, "alice", &["release", "job"]).ok();
}

#[test]
fn what_others_have_changes_nothing_that_an_owner_is_shown() {
    let daemon = Daemon::start();
    let source = model(&daemon, 1);
    let seen = |owner: &str| {
        let record = json_for(&daemon, owner, &["get", "m"]);
        let usage = json_for(&daemon, owner, &["usage"]);
        let status = json_for(&daemon, owner, &["status"]);
        let figures = ["logical_bytes", "unique_bytes", "physical_bytes"].map(|key| record[key].clone());
        (
            figures,
            usage["logical_bytes"].clone(),
            usage["free_bytes"].clone(),
            usage["owners"].clone(),
            status["sessions"].clone(),
        )
    };
    upload(&daemon, "m", "alice", &source);
    let before = seen("alice");
    upload(&daemon, "m", "bob", &source);
    daemon.attach_at("job", &["m"], &daemon.place().dir("at")).refused(&[3], &[]);
    daemon.ctl(&["attach", "job", "m", "--owner", "bob"]).ok();
    assert_eq!(seen("alice"), before);
    let mut bobs = seen("bob");
    bobs.3[0]["owner"] = "alice".into();
    assert_eq!(bobs, before, "the second is shown other figures than the first");

    let events = |owner| -> String { run(daemon.ctl_command().args(["--as", owner, "--json", "events"])).ok().stdout };
    let id = |owner: &str| json_for(&daemon, owner, &["get", "m"])["id"].as_str().unwrap().to_owned();
    assert!(events("alice").contains(&id("alice")));
    assert!(!events("alice").contains(&id("bob")));
    assert!(!events("carol").contains("CHECKPOINT"));
}

/// A daemon that listens by TCP, with the certificates of some names.
struct Remote {
    daemon: Daemon,
    port: u16,
    certificates: PathBuf,
    _place: Place,
}

impl Remote {
    fn start(names: &[&str], access: &[(&'static str, &str)]) -> Self {
        let place = Place::new();
        let certificates = certificates(&place, names);
        // Nobody else binds it in between: the tests' ports are their own.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let file = |name: &str| format!("{:?}", certificates.join(name));
        let (listen, good, authority) = (format!(r#""127.0.0.1:{port}""#), file("good.pem"), file("ca.pem"));
        let mut env = vec![
            ("CKPTD_TLS__LISTEN", listen.as_str()),
            ("CKPTD_TLS__CERTIFICATE", &good),
            ("CKPTD_TLS__KEY", &good),
            ("CKPTD_TLS__CLIENT_CA", &authority),
        ];
        env.extend_from_slice(access);
        Self { daemon: Daemon::start_with(&env), port, certificates, _place: place }
    }

    fn ctl(&self, certificate: &str, args: &[&str]) -> Ran {
        let shown = self.certificates.join(format!("{certificate}.pem"));
        let mut command = Command::new(CKPTCTL);
        command.arg("--endpoint").arg(format!("https://localhost:{}", self.port));
        command.arg("--tls-certificate").arg(&shown).arg("--tls-key").arg(&shown);
        run(command.arg("--tls-ca").arg(self.certificates.join("ca.pem")).args(args))
    }
}

#[test]
fn by_tcp_a_certificate_is_needed_and_its_name_is_who_asks() {
    let remote = Remote::start(
        &["team-a", "team-b", "sched.example"],
        &[
            ("CKPTD_ACCESS__TENANTS", r#"["name:team-a", "name:team-b"]"#),
            ("CKPTD_ACCESS__SCHEDULERS", r#"["name:sched.example"]"#),
        ],
    );
    let source = model(&remote.daemon, 1);
    let from = source.to_str().unwrap();
    remote.ctl("team-a", &["upload", "m", from]).ok();
    let mine = remote.ctl("team-a", &["--json", "get", "m"]).ok().json();
    assert_eq!(mine["owner"], "team-a");
    remote.ctl("team-b", &["get", "m"]).refused(&[3], &["there is no checkpoint"]);
    remote.ctl("team-b", &["--as", "team-a", "get", "m"]).refused(&[2], &["another owner"]);
    remote.ctl("team-a", &["capture", "j", "--from", from]).refused(&[2], &["a tenant"]);
    remote.ctl("team-a", &["attach", "j", "m"]).refused(&[2], &["a tenant"]);
    remote.ctl("sched.example", &["attach", "j", "m", "--owner", "team-a"]).ok();
    remote.ctl("sched.example", &["release", "j"]).ok();
    remote.ctl("team-a", &["remove", "m", "--yes"]).ok();
    // Of our authority, but in no list; expired; of another authority.
    remote.ctl("good", &["list"]).refused(&[2], &["localhost", "access"]);
    for certificate in ["expired", "foreign"] {
        remote.ctl(certificate, &["list"]).refused(&[2, 7], &["localhost"]);
    }
    // Without a certificate there is no answer at all.
    let url = format!("https://localhost:{}/", remote.port);
    let authority = remote.certificates.join("ca.pem");
    let answer = run(Command::new("curl").args(["-sS", "--http2", "--cacert"]).arg(authority).arg(url));
    assert_ne!(answer.code, Some(0), "{answer}");
}

#[test]
fn renewed_certificates_are_used_without_a_restart_and_broken_ones_change_nothing() {
    let remote = Remote::start(&["ops"], &[("CKPTD_ACCESS__OPERATORS", r#"["name:ops"]"#)]);
    remote.ctl("ops", &["list"]).ok();
    let (good, elsewhere) = (remote.certificates.join("good.pem"), remote.certificates.join("elsewhere.pem"));
    let original = fs::read(&good).unwrap();
    fs::write(&good, "no certificate").unwrap();
    wait_until("the broken file was looked at", LIMIT, || {
        remote.ctl("ops", &["list"]).ok();
        remote.daemon.stderr().contains("those before stay in use")
    });
    // Another that is right, but for another host: ours does not believe it any more.
    fs::write(&good, fs::read(elsewhere).unwrap()).unwrap();
    wait_until("the new certificate is shown", LIMIT, || remote.ctl("ops", &["list"]).code != Some(0));
    fs::write(&good, original).unwrap();
    wait_until("the old one is shown again", LIMIT, || remote.ctl("ops", &["list"]).code == Some(0));
}
