//! Credentials that a server took, and takes no more when some has come: the checkpoint fails and says what to do, nothing of it is shown,
//! and fresh credentials heal it. Those of hubs and buckets are in the tests of these.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::buckets::{ENDURING, assert_kept_nowhere, replace_midway, start};
use super::git::{GitSite, USER, noise};
use crate::support::corpus::{random_file, seed};
use crate::support::daemon::{Daemon, LOCALHOST, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, regular_files};
use crate::support::ftp_faults::{FtpFault, FtpFaults};
use crate::support::place::Place;
use crate::support::ran::{Ran, wait_until};
use crate::support::standin::Standin;
use crate::support::webserver::{certificates, nginx, nginx_tls_before, pyftpdlib};

const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

/// Fails unless `name` fails, or has failed, for `reason`, tells `remedy`, and shows nothing.
fn assert_refused(daemon: &Daemon, name: &str, reason: &str, remedy: &str) {
    daemon.wait_state(name, "failed", LIMIT);
    let record = daemon.json(&["get", name]);
    assert_eq!(record["error"]["reason"], reason, "{record}");
    assert!(record["error"]["remedy"].as_str().unwrap().contains(remedy), "{record}");
    daemon.ctl(&["attach", "nobody", name]).refused(&[4], &[name]);
    assert!(daemon.rows("jobs").iter().all(|job| job["job"] != "nobody"), "{:?}", daemon.rows("jobs"));
}

fn retry(daemon: &Daemon, name: &str, secrets: &[&str]) -> Ran {
    let line = ["retry", name, "--wait"].into_iter();
    daemon.ctl(&line.chain(secrets.iter().flat_map(|secret| ["--credential", secret])).collect::<Vec<_>>())
}

/// Tries again with what is refused, which stays so, and with fresh credentials: it becomes `expected`.
fn assert_healed(daemon: &Daemon, name: &str, (stale, fresh): (&[&str], &[&str]), expected: &Path) {
    retry(daemon, name, stale).refused(&[2], &[]);
    assert_refused(daemon, name, "CREDENTIALS_REFUSED", "not expired");
    retry(daemon, name, fresh).ok();
    assert_mounted(expected, &daemon.attach(name, name));
}

#[test]
fn a_web_servers_password_that_changes_in_the_middle_is_given_anew() {
    let place = Place::new();
    let (site, passwords) = (place.dir("site"), place.join("passwords"));
    random_file(&site.join("big.bin"), seed(), 48 * MIB);
    let set = |word: &str| fs::write(&passwords, format!("u:{{PLAIN}}{word}\n")).unwrap();
    let locked = format!("location / {{ auth_basic x; auth_basic_user_file {}; }}", passwords.display());
    let server = nginx(&place, &site, &locked);
    let faults = Faults::before(server.port);
    let daemon = Daemon::start_with(ENDURING);
    for (name, path) in [("file", "/big.bin"), ("tree", "/")] {
        set("f1rst-word");
        let given = ["@username=u", "@password=f1rst-word"];
        let begin = || start(&daemon, "web", name, &faults.url(path), &given);
        replace_midway(&faults, begin, || set("s3cond-word"));
        assert_refused(&daemon, name, "CREDENTIALS_REFUSED", "check the credentials, and that they have not expired");
        let before = faults.body_bytes();
        let (stale, fresh) = (["username=u", "password=f1rst-word"], ["username=u", "password=s3cond-word"]);
        assert_healed(&daemon, name, (&stale, &fresh), &site);
        let again = faults.body_bytes() - before;
        assert!(again < 42 * MIB, "{again} bytes were fetched again, of which 8 MiB were here");
    }
    assert_kept_nowhere(&daemon, &["f1rst-word", "s3cond-word"]);
}

#[test]
fn a_login_that_an_ftp_server_takes_no_more_in_the_middle_is_given_anew() {
    let place = Place::new();
    let site = place.dir("site");
    random_file(&site.join("big.bin"), seed(), 60 * MIB);
    let server = pyftpdlib(&site, None);
    let login = ["username=u", "password=p@ss:word"];
    let given = ["@username=u", "@password=p@ss:word"];
    for (name, path) in [("file", "/big.bin"), ("tree", "/")] {
        let daemon = Daemon::start_with(&[LOOPBACK]);
        let faults = FtpFaults::before(server.port);
        // Both ranges end early, and what is left needs other connections.
        faults.spoil("RETR", FtpFault::Reset(20 * MIB), 2);
        faults.slow_down(3 * MIB);
        start(&daemon, "web", name, &faults.url(path), &given);
        wait_until("some is here", LIMIT, || daemon.bytes_done(name) > 8 * MIB);
        faults.spoil("PASS", FtpFault::Answer("530 Login incorrect."), usize::MAX / 2);
        faults.slow_down(0);
        assert_refused(&daemon, name, "CREDENTIALS_REFUSED", "check user name and password");
        retry(&daemon, name, &login).refused(&[2], &["logging in"]);
        let before = faults.data_bytes();
        faults.spare();
        retry(&daemon, name, &login).ok();
        assert_mounted(&site, &daemon.attach(name, name));
        let again = faults.data_bytes() - before;
        assert!(again < 48 * MIB, "{again} bytes were fetched again");
        assert_kept_nowhere(&daemon, &["p@ss:word"]);
    }
}

#[test]
fn a_password_of_a_repository_that_changes_before_its_objects_come_is_given_anew() {
    let place = Place::new();
    let made = certificates(&place, &[]);
    let authority = made.join("ca.pem").display().to_string();
    let site = GitSite::start();
    let work = site.work("private/model");
    work.write("weights.bin", noise(51, 8 << 20)).write("dir/a", "a").publish();
    let expected = work.expected("expected");
    let faults = Faults::before(site.port());
    let tls = nginx_tls_before(&place, faults.port(), &made.join("good.pem"));
    let url = format!("https://localhost:{}/private/model.git", tls.port);
    let daemon = Daemon::start_with(&[LOCALHOST, ("SSL_CERT_FILE", &authority)]);
    let objects = "POST /private/model.git/git-upload-pack";
    let asks = Fault::Status(401, "WWW-Authenticate: Basic realm=\"git\"");
    for (name, fault, reason, remedy) in [
        ("asked", asks, "CREDENTIALS_REFUSED", "check the credentials, and that they have not expired"),
        ("barred", Fault::Status(403, ""), "ACCESS_REFUSED", "check that the credentials may read it"),
    ] {
        site.set_password(USER.1);
        // The name is looked up first, and its commit is told.
        faults.spoil(objects, Fault::Truncate(u64::MAX), 1);
        faults.spoil(objects, fault, 9);
        let (user, then) = (format!("username={}", USER.0), format!("password={}", USER.1));
        let before = faults.body_bytes();
        start(&daemon, "git", name, &url, &[&format!("@{user}"), &format!("@{then}")]);
        assert_refused(&daemon, name, reason, remedy);
        assert!(faults.faults_left() < 9 && faults.body_bytes() > before, "it was refused at once");
        faults.spare();
        site.set_password("an0ther-passw0rd");
        assert_healed(&daemon, name, (&[&user, &then], &[&user, "password=an0ther-passw0rd"]), &expected);
    }
    assert!(regular_files(&daemon.state().join("scratch")).is_empty());
    assert_kept_nowhere(&daemon, &[USER.1, "an0ther-passw0rd"]);
}

#[test]
fn a_password_of_large_files_that_changes_in_the_middle_is_given_anew() {
    let site = GitSite::start_with_lfs();
    let work = site.work("private/model");
    work.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n");
    let bytes = noise(52, 48 << 20);
    work.large("w.bin", &bytes);
    work.publish();
    let expected = work.expected("expected");
    fs::write(expected.join("w.bin"), &bytes).unwrap();
    let faults = Faults::before(site.port());
    let daemon = Daemon::start_with(ENDURING);
    let (user, then) = (format!("username={}", USER.0), format!("password={}", USER.1));
    let given = [format!("@{user}"), format!("@{then}")];
    let begin = || start(&daemon, "git", "w", &faults.url("/private/model.git"), &[&given[0], &given[1]]);
    replace_midway(&faults, begin, || site.set_password("an0ther-passw0rd"));
    assert_refused(&daemon, "w", "CREDENTIALS_REFUSED", "check the credentials, and that they have not expired");
    let before = faults.body_bytes();
    assert_healed(&daemon, "w", (&[&user, &then], &[&user, "password=an0ther-passw0rd"]), &expected);
    let again = faults.body_bytes() - before;
    assert!(again < 42 * MIB, "{again} bytes were fetched again, of which 8 MiB were here");
    assert_kept_nowhere(&daemon, &[USER.1, "an0ther-passw0rd"]);
}

#[test]
fn a_token_of_kaggle_that_ends_in_the_middle_is_given_anew() {
    let (daemon, service) = (Daemon::start_with(&[LOCALHOST]), Standin::of("kaggle.py"));
    let faults = Faults::before(service.port);
    // The bundle's place is told once; then neither it nor the service takes anybody.
    faults.spoil("download-all", Fault::Truncate(u64::MAX), 1);
    faults.spoil("download-all", Fault::Status(401, ""), 99);
    // All of it is asked for to see what it is, then for its files; between them is the list at its end, by ranges.
    faults.spoil("range: bytes=37", Fault::Truncate(u64::MAX), 99);
    faults.spoil("accept-encoding: identity\r\nif-match: ", Fault::Truncate(15 * MIB), 2);
    faults.spoil("if-match: ", Fault::Status(403, ""), 99);
    let endpoint = format!("endpoint={}", faults.url(""));
    let given = [endpoint.as_str(), "type=competition", "@token=kaggle_secret_token"];
    start(&daemon, "kaggle", "big", "big", &given);
    assert_refused(&daemon, "big", "CREDENTIALS_REFUSED", "that it has not expired");
    assert_eq!(faults.broken(), 1, "it was refused before anything came");
    retry(&daemon, "big", &["token=kaggle_secret_token"]).refused(&[2], &["not accepted"]);
    faults.spare();
    let (before, asked) = (faults.body_bytes(), faults.heads().len());
    retry(&daemon, "big", &["username=alice", "key=kaggle_secret_key"]).ok();
    let again = faults.body_bytes() - before;
    assert!(again < 34 * MIB, "{again} bytes were fetched again, of which two files were here");
    let heads = faults.heads().split_off(asked).concat();
    assert!(heads.contains("uthorization: Basic ") && !heads.contains("Bearer"), "{heads}");
    let whole = Daemon::start_with(&[LOCALHOST]);
    let own = format!("endpoint={}", service.url(""));
    super::buckets::create(&whole, "kaggle", "big", "big", &[&own, "type=competition", given[2]]).ok();
    assert_mounted(&whole.attach("big", "big"), &daemon.attach("big", "big"));
    assert_kept_nowhere(&daemon, &["kaggle_secret"]);
}
