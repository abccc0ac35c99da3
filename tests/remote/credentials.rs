//! Named credentials of the operator: who gets which, that they come back after a kill, and that they show nowhere.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::buckets::{self, assert_kept_nowhere, reason};
use crate::support::corpus::{Random, random_file};
use crate::support::daemon::{Daemon, LOCALHOST, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::place::Place;
use crate::support::ran::{Ran, wait_until};
use crate::support::site::{Page, Site};
use crate::support::standin::Standin;
use crate::support::webserver::nginx;

/// The token that the stand-in trusts.
const TOKEN: &str = "hf_secret_token";

fn daemon_with(directory: &Path) -> Daemon {
    Daemon::start_with(&[LOCALHOST, ("CKPTD_SOURCES__CREDENTIALS_DIR", directory.to_str().unwrap())])
}

/// Puts a credential for loopback into `directory`.
fn put(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(format!("{name}.toml"));
    fs::write(&path, format!("hosts = ['127.0.0.1', 'localhost']\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn create(daemon: &Daemon, endpoint: &str, name: &str, more: &[&str]) -> Ran {
    let endpoint = format!("endpoint={endpoint}");
    let arguments = ["create", name, "--type", "huggingface", "--uri", "acme/private", "--option", &endpoint];
    daemon.ctl(&[&arguments[..], more].concat())
}

#[test]
fn a_request_gets_the_secrets_that_it_may_use_and_no_other() {
    let (place, hub) = (Place::new(), Standin::start());
    let keys = place.dir("keys");
    let daemon = daemon_with(&keys);
    let endpoint = hub.url("");
    let good = format!("token = '{TOKEN}'");
    put(&keys, "anybody", &good);
    put(&keys, "team", &format!("{good}\nowners = ['team-a', 'team-b']"));
    put(&keys, "buckets", &format!("{good}\ntypes = ['aws']"));
    put(&keys, "stale", "token = 'hf_secret_stale'");
    fs::write(put(&keys, "elsewhere", ""), format!("{good}\nhosts = ['hub.example']")).unwrap();
    fs::write(put(&keys, "nonsense", ""), format!("token = = '{TOKEN}'")).unwrap();
    let open = put(&keys, "open", &good);
    fs::set_permissions(&open, fs::Permissions::from_mode(0o640)).unwrap();
    let foreign = put(&keys, "foreign", &good);
    std::os::unix::fs::chown(&foreign, Some(12345), None).unwrap();
    let not_available = "no credentials `NAME` are available to this request";
    for (name, owner, refusal) in [
        ("anybody", "", None),
        ("anybody", "team-c", None),
        ("team", "team-b", None),
        ("team", "team-c", Some(not_available)),
        ("team", "", Some(not_available)),
        ("buckets", "team-a", Some(not_available)),
        ("elsewhere", "team-a", Some(not_available)),
        ("unknown", "team-a", Some(not_available)),
        ("../keys/anybody", "team-a", Some(not_available)),
        ("open", "team-a", Some("a file that others than root can read or write")),
        ("foreign", "team-a", Some("a file that others than root can read or write")),
        ("nonsense", "team-a", Some("not in the form of credentials")),
        ("stale", "team-a", Some("private")),
    ] {
        let option = format!("credentials={name}");
        let mut more = vec!["--wait", "--option", &option];
        more.extend(if owner.is_empty() { vec![] } else { vec!["--owner", owner] });
        let ran = create(&daemon, &endpoint, &format!("{}-{owner}", name.replace('/', "_")), &more);
        match refusal {
            None => drop(ran.ok()),
            Some(words) => drop(ran.refused(&[2, 3], &[&words.replace("NAME", name)])),
        }
    }
    let own = ["--wait", "--option", "credentials=stale", "--credential", &format!("token={TOKEN}")];
    create(&daemon, &endpoint, "own-secret", &own).ok();
    assert_kept_nowhere(&daemon, &[TOKEN, "hf_secret_stale"]);
}

#[test]
fn the_file_called_like_the_type_serves_those_that_name_none_and_rotates() {
    let (place, hub) = (Place::new(), Standin::start());
    let keys = place.dir("keys");
    let daemon = daemon_with(&keys);
    create(&daemon, &hub.url(""), "before", &["--wait"]).refused(&[2, 3], &["give a token"]);
    put(&keys, "huggingface", &format!("token = '{TOKEN}'\nowners = ['', 'team-a']"));
    daemon.ctl(&["retry", "before"]).ok();
    daemon.wait_state("before", "ready", Duration::from_secs(30));
    create(&daemon, &hub.url(""), "permitted", &["--wait", "--owner", "team-a"]).ok();
    create(&daemon, &hub.url(""), "not", &["--wait", "--owner", "team-b"]).refused(&[2, 3], &["give a token"]);
    assert_kept_nowhere(&daemon, &[TOKEN]);
}

#[test]
fn a_fill_that_was_killed_has_its_named_secrets_again() {
    let (place, hub) = (Place::new(), Standin::start());
    let keys = place.dir("keys");
    put(&keys, "team", &format!("token = '{TOKEN}'"));
    let mut daemon = daemon_with(&keys);
    let faults = Faults::before(hub.port);
    faults.slow_down(1 << 20);
    create(&daemon, &faults.url(""), "p", &["--option", "credentials=team"]).ok();
    wait_until("bytes have come", Duration::from_secs(30), || daemon.bytes_done("p") > 0);
    daemon.kill9();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("p", "ready", Duration::from_secs(60));
    assert_eq!(daemon.json(&["get", "p"])["source"]["options"]["credentials"], "team");
    assert_kept_nowhere(&daemon, &[TOKEN]);
}

#[test]
fn a_fill_that_was_killed_under_the_keeper_has_the_secrets_of_its_request_again() {
    let hub = Standin::start();
    let daemon = Daemon::start_kept(&[LOCALHOST]);
    let faults = Faults::before(hub.port);
    faults.slow_down(1 << 20);
    let token = format!("token={TOKEN}");
    create(&daemon, &faults.url(""), "p", &["--credential", &token]).ok();
    wait_until("bytes have come", Duration::from_secs(30), || daemon.bytes_done("p") > 0);
    assert_eq!(held_secrets(&daemon), 1);
    daemon.replace();
    assert_eq!(held_secrets(&daemon), 1);
    faults.slow_down(0);
    daemon.wait_state("p", "ready", Duration::from_secs(60));
    assert_kept_nowhere(&daemon, &[TOKEN]);
    wait_until("they are let go", Duration::from_secs(30), || held_secrets(&daemon) == 0);
}

/// Files of secrets that the keeper holds.
fn held_secrets(daemon: &Daemon) -> usize {
    let held = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let names = held.filter_map(|held| fs::read_link(held.unwrap().path()).ok());
    names.filter(|name| name.to_string_lossy().contains("ckptd-secrets")).count()
}

#[test]
fn an_endpoint_with_a_secret_in_it_is_refused_before_there_is_a_record() {
    let daemon = Daemon::start_with(&[LOCALHOST]);
    for (kind, uri) in [
        ("aws", "s3://bucket/x"),
        ("wasabi", "s3://bucket/x"),
        ("azure", "https://account.blob.core.windows.net/container/x"),
        ("gcp", "gs://bucket/x"),
        ("huggingface", "acme/model"),
        ("kaggle", "acme"),
        ("web", "https://127.0.0.1:1/x"),
    ] {
        for endpoint in
            ["http://reader:hunter22@127.0.0.1:1", "hunter22@127.0.0.1:1", "http://127.0.0.1:1/?sig=hunter22"]
        {
            let option = format!("endpoint={endpoint}");
            let ran = daemon.ctl(&["create", "refused", "--type", kind, "--uri", uri, "--option", &option, "--wait"]);
            let ran = ran.refused(&[2], &["the option `endpoint` holds user information", "--credential"]);
            assert!(!(ran.stdout.clone() + &ran.stderr).contains("hunter22"), "{ran}");
        }
    }
    assert!(daemon.rows("list").is_empty(), "nothing is recorded of them");
    assert_kept_nowhere(&daemon, &["hunter22"]);
}

#[test]
fn what_signs_the_address_that_a_redirect_names_is_kept_nowhere() {
    const SIGNED: &str = "X-Amz-Signature=hunter22&X-Goog-Signature=hunter23&sig=hunter24";
    let place = Place::new();
    let site = place.dir("site");
    random_file(&site.join("w.bin"), 1, 5 << 20);
    let store = nginx(&place, &site, "");
    let behind = Faults::before(store.port);
    let leads = format!("location /to/ {{ rewrite ^/to/(.*)$ {}?{SIGNED}? redirect; }}", behind.url("/$1"));
    let (web, hub, kaggle) = (nginx(&place, &site, &leads), Standin::start(), Standin::of("kaggle.py"));
    let (at_hub, at_kaggle) = (Faults::before(hub.port), Faults::before(kaggle.port));
    let environment = [LOCALHOST, ("RUST_LOG", "debug"), ("CKPTD_SOURCES__ATTEMPTS", "2")];
    let daemon = Daemon::start_with(&environment);
    let (hub, kaggle) = (format!("endpoint={}", at_hub.url("")), format!("endpoint={}", at_kaggle.url("")));
    for (kind, uri, options, faults, signed) in [
        ("web", web.url("/to/w.bin"), vec![], &behind, "X-Amz-Signature="),
        ("huggingface", "acme/tiny".to_owned(), vec![hub.as_str()], &at_hub, "?Signature=secret"),
        ("kaggle", "acme/tables".to_owned(), vec![&kaggle, "type=dataset"], &at_kaggle, "?X-Goog-Signature=secret"),
    ] {
        let spoiled = [
            Fault::Status(500, ""),
            Fault::Status(403, ""),
            Fault::Reset(100),
            Fault::Status(302, "Location: http://10.0.0.1/x?sig=hunter24"),
        ];
        for (number, fault) in spoiled.into_iter().enumerate() {
            faults.spoil(signed, fault.clone(), 99);
            let ran = buckets::create(&daemon, kind, &format!("{kind}-{number}"), &uri, &options);
            let ran = ran.refused(&[2, 3, 6, 7], &[]);
            for secret in ["hunter2", "Signature=secret"] {
                assert!(!format!("{ran}").contains(secret), "{kind} {fault:?}: {ran}");
            }
            faults.spare();
        }
        assert!(faults.heads().iter().any(|head| head.contains(signed)), "{kind} was redirected there");
        buckets::create(&daemon, kind, kind, &uri, &options).ok();
        daemon.attach(kind, kind);
    }
    assert_kept_nowhere(&daemon, &["hunter2", "Signature=secret"]);
}

#[test]
fn what_signs_an_address_is_a_secret_of_its_request_and_is_given_again() {
    let (site, daemon) = (Site::open(), Daemon::start_with(&[LOOPBACK, ("RUST_LOG", "debug")]));
    let bytes = Arc::new(Random::new(7).bytes(1 << 20));
    let signed = site.put("/w.bin?v=1&X-Amz-Signature=hunter2", Page::Ranged(Arc::clone(&bytes)));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &signed, "--wait"]).ok();
    assert!(fs::read(daemon.attach("job", "w").join("w.bin")).unwrap() == *bytes);
    daemon.ctl(&["release", "job"]).ok();

    daemon.ctl(&["evict", "w"]).refused(&[4], &["secrets that came with the request"]);
    wait_until("its session has ended", Duration::from_secs(60), || {
        daemon.ctl(&["evict", "w", "--force"]).code == Some(0)
    });
    daemon.ctl(&["reserve", "job", "w"]).ok();
    wait_until("it cannot be had without", Duration::from_secs(60), || daemon.json(&["get", "w"])["state"] == "failed");
    assert_eq!(reason(&daemon, "w"), "SOURCE_GONE");
    daemon.ctl(&["retry", "w", "--credential", "query=v=1&X-Amz-Signature=hunter2", "--wait"]).ok();
    assert!(fs::read(daemon.attach("job", "w").join("w.bin")).unwrap() == *bytes);
    assert_kept_nowhere(&daemon, &["hunter2"]);
}
