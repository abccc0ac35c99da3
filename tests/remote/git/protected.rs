//! Repositories behind https, and behind the operator's proxy.

use std::fs;
use std::time::Duration;

use super::large::noise;
use super::servers::{GitSite, git};
use super::{IMPATIENT, TWICE, assert_no_scratch, create, ready};
use crate::buckets::{assert_kept_nowhere, reason};
use crate::support::daemon::{Daemon, LOCALHOST, LOOPBACK};
use crate::support::files::{assert_mounted, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::relay::{Break, Relay};
use crate::support::webserver::{certificates, tinyproxy};

/// A name that no resolver knows.
const UNKNOWN: &str = "git.invalid";

/// User and password at the proxy, and how a header has them.
const LOGIN: (&str, &str) = ("reader", "pr0xypassw0rd");
const ENCODED: &str = "cmVhZGVyOnByMHh5cGFzc3cwcmQ=";

#[test]
fn a_repository_comes_by_https_from_who_proves_to_be_its_host() {
    let place = Place::new();
    let made = certificates(&place, &[]);
    let authority = made.join("ca.pem").display().to_string();
    let daemon = Daemon::start_with(&[LOCALHOST, TWICE, ("SSL_CERT_FILE", &authority)]);
    for name in ["good", "expired", "elsewhere", "foreign"] {
        let site = GitSite::start_tls(&made.join(format!("{name}.pem")));
        let work = site.work("org/model");
        work.write("a b", name).publish();
        let ran = create(&daemon, name, &site.url("org/model.git"), &[]);
        if name == "good" {
            ran.ok();
            assert_same_tree(&work.expected("expected"), &daemon.attach("job", name));
        } else {
            ran.refused(&[2], &["certificate"]);
            assert_eq!(reason(&daemon, name), "CERTIFICATE_REFUSED");
        }
    }
    assert_no_scratch(&daemon);
}

#[test]
fn a_repository_comes_whole_by_https_through_breaks_and_a_kill() {
    let place = Place::new();
    let made = certificates(&place, &[]);
    let authority = made.join("ca.pem").display().to_string();
    let site = GitSite::start_tls(&made.join("good.pem"));
    let work = site.work("org/model");
    let first = work.write("weights.bin", noise(31, 8 << 20)).write("dir/a", "a").publish();
    let expected = work.expected("expected");
    let relay = Relay::before(site.port());
    let url = format!("https://localhost:{}/org/model.git", relay.port());
    let mut daemon = Daemon::start_with(&[LOCALHOST, IMPATIENT, ("SSL_CERT_FILE", &authority)]);
    relay.break_at(&[Break::Reset(1000), Break::Reset(2 << 20), Break::Stall(3 << 20)]);
    create(&daemon, "broken", &url, &[]).ok();
    assert_eq!(relay.breaks_left(), []);
    assert_same_tree(&expected, &daemon.attach("job", "broken"));

    let second = work.write("weights.bin", noise(32, 8 << 20)).publish();
    let before = relay.bytes();
    relay.slow_down(1 << 20);
    daemon.ctl(&["create", "killed", "--type", "git", "--uri", &url]).ok();
    wait_until("objects come", Duration::from_secs(60), || relay.bytes() > before + (1 << 20));
    daemon.kill9();
    assert!(relay.bytes() < before + (7 << 20), "it was killed too late");
    wait_until("git has gone with the daemon", Duration::from_secs(30), || relay.open() == 0);
    relay.slow_down(0);
    daemon.restart();
    daemon.wait_state("killed", "ready", Duration::from_secs(60));
    assert_eq!([&ready(&daemon, "broken")["revision"], &ready(&daemon, "killed")["revision"]], [&first, &second]);
    assert_mounted(&work.expected("later"), &daemon.attach("later", "killed"));
    assert_no_scratch(&daemon);
}

#[test]
fn git_goes_through_the_operators_proxy_to_a_name_that_it_alone_knows() {
    let place = Place::new();
    let made = certificates(&place, &[UNKNOWN]);
    let authority = made.join("ca.pem").display().to_string();
    let site = GitSite::start_tls(&made.join(format!("{UNKNOWN}.pem")));
    let work = site.work("org/model");
    work.write("a", "a").write("weights.bin", noise(33, 2 << 20)).publish();
    let proxy = Relay::proxy(site.port());
    let address = format!("http://{}:{}@127.0.0.1:{}", LOGIN.0, LOGIN.1, proxy.port());
    let environment: [(&'static str, &str); 4] =
        [TWICE, ("SSL_CERT_FILE", &authority), ("HTTPS_PROXY", &address), ("HTTP_PROXY", &address)];
    let daemon = Daemon::start_with(&[&environment[..], &[("RUST_LOG", "debug")]].concat());
    create(&daemon, "w", &format!("https://{UNKNOWN}/org/model.git"), &[]).ok();
    assert_same_tree(&work.expected("expected"), &daemon.attach("job", "w"));
    // Our own first request, git's look-up of the name, and its fetch.
    let asked = proxy.asked();
    assert!(asked.len() >= 3, "{asked:?}");
    for head in &asked {
        assert!(head.starts_with(&format!("CONNECT {UNKNOWN}:443 ")), "{head}");
    }
    // git shows the login to a proxy that asks for it.
    assert!(asked.iter().any(|head| head.contains(&format!("Basic {ENCODED}"))), "{asked:?}");
    // What sources may not reach they may not reach by the proxy either, nor may what a repository leads to.
    let inside = ["https://localhost", "https://127.0.0.1", "http://169.254.169.254", "http://[::ffff:10.0.0.1]"];
    for (number, host) in inside.into_iter().enumerate() {
        let name = format!("refused-{number}");
        create(&daemon, &name, &format!("{host}/org/model.git"), &[]).refused(&[2], &["which sources may not reach"]);
        assert_eq!(reason(&daemon, &name), "EGRESS_REFUSED");
    }
    let module = "[submodule \"sub\"]\n\tpath = sub\n\turl = https://localhost/org/module.git\n";
    let commit = git(&work.tree, &["rev-parse", "HEAD"]);
    let greedy = site.work("org/greedy");
    greedy.write(".gitmodules", module).write("a", "a");
    git(&greedy.tree, &["add", "--all"]);
    git(&greedy.tree, &["update-index", "--add", "--cacheinfo", &format!("160000,{commit},sub")]);
    greedy.publish_index();
    create(&daemon, "greedy", &format!("https://{UNKNOWN}/org/greedy.git"), &[])
        .refused(&[2], &["the submodule `sub`", "which sources may not reach"]);
    let elsewhere: Vec<_> = proxy.asked().into_iter().filter(|head| !head.contains(UNKNOWN)).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    assert_kept_nowhere(&daemon, &[LOGIN.1, ENCODED]);
    assert_no_scratch(&daemon);
}

#[test]
fn a_proxy_of_debians_carries_git_and_its_password_is_shown_nowhere() {
    let (site, place) = (GitSite::start(), Place::new());
    let work = site.work("org/model");
    work.write("a", "a").write("weights.bin", noise(34, 2 << 20)).publish();
    let log = place.join("proxy.log");
    let proxy = tinyproxy(&place, &log, Some(LOGIN));
    let url = site.url("org/model.git");
    for (name, port, word) in
        [("there", proxy.port, LOGIN.1), ("wrong", proxy.port, "wr0ngpassw0rd"), ("away", 1, LOGIN.1)]
    {
        let address = format!("http://{}:{word}@127.0.0.1:{port}", LOGIN.0);
        let daemon = Daemon::start_with(&[LOOPBACK, TWICE, ("HTTP_PROXY", &address), ("RUST_LOG", "debug")]);
        let ran = create(&daemon, name, &url, &[]);
        if name == "there" {
            ran.ok();
            assert_same_tree(&work.expected("expected"), &daemon.attach("job", name));
            wait_until("the proxy has logged it", Duration::from_secs(30), || {
                let logged = fs::read_to_string(&log).unwrap_or_default();
                // The second is asked for by git alone.
                ["GET", "POST"].iter().all(|method| logged.contains(&format!("{method} {url}/")))
            });
        } else {
            ran.refused(&[2, 7], &[]);
        }
        assert_kept_nowhere(&daemon, &[LOGIN.1, ENCODED, "wr0ngpassw0rd", "cmVhZGVyOndyMG5ncGFzc3cwcmQ="]);
        assert_no_scratch(&daemon);
    }
}
