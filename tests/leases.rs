//! Rights of jobs that end by themselves: when, what is seen of it, and what survives.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::Value;

use support::corpus::{random_file, seed};
use support::daemon::Daemon;
use support::place::mounts_at;
use support::ran::{shell, wait_until};

const PATIENCE: Duration = Duration::from_secs(180);

/// Rights that are over at a start have a second more.
const SHORT_GRACE: (&str, &str) = ("CKPTD_LEASES__GRACE_S", "1");

/// A daemon with checkpoint `k`, and what that was made from.
fn daemon_with_k(env: &[(&'static str, &str)]) -> (Daemon, PathBuf) {
    let daemon = Daemon::start_with(env);
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 3 << 20);
    daemon.capture("k", &source);
    (daemon, source)
}

fn job(daemon: &Daemon, name: &str) -> Option<Value> {
    daemon.rows("jobs").into_iter().find(|row| row["job"] == name)
}

fn wait_until_released(daemon: &Daemon, name: &str) {
    wait_until(&format!("job {name} is released"), PATIENCE, || job(daemon, name).is_none());
}

fn in_seconds(seconds: i64) -> String {
    (Utc::now() + chrono::Duration::seconds(seconds)).to_rfc3339()
}

fn expiry(attachment: &Value) -> DateTime<Utc> {
    attachment["expires_at"].as_str().unwrap_or_else(|| panic!("no expiry: {attachment}")).parse().unwrap()
}

/// Messages of the events of this kind.
fn events(daemon: &Daemon, kind: &str) -> Vec<String> {
    let ran = daemon.ctl(&["--json", "events"]).ok();
    let document = ran.json();
    let events = document["events"].as_array().unwrap_or_else(|| panic!("{document}"));
    let of_kind = events.iter().filter(|event| event["kind"] == kind);
    of_kind.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_right_ends_at_its_time_and_only_then_can_the_checkpoint_be_removed() {
    let (daemon, _) = daemon_with_k(&[]);
    let begun = Instant::now();
    let reserved = daemon.json(&["reserve", "job", "k", "--expires", "8s"]);
    let left = expiry(&reserved) - Utc::now();
    assert!(left.num_milliseconds() > 1000 && left.num_milliseconds() <= 8000, "{reserved}");
    assert_eq!(job(&daemon, "job").unwrap()["expires_at"], reserved["expires_at"]);
    daemon.ctl(&["remove", "k", "--yes"]).refused(&[4], &["job"]);
    wait_until_released(&daemon, "job");
    assert!(begun.elapsed() >= Duration::from_secs(7), "it ended after {:?}", begun.elapsed());
    let messages = events(&daemon, "LEASE_EXPIRED");
    assert!(messages.len() == 1 && messages[0].contains("job"), "{messages:?}");
    daemon.ctl(&["renew", "job", "--expires", "1h"]).refused(&[3], &["job"]);
    daemon.ctl(&["remove", "k", "--yes"]).ok();
}

#[test]
fn of_a_removal_and_a_right_at_the_same_time_one_alone_is_granted() {
    const ROUNDS: usize = 20;
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    fs::write(source.join("w.bin"), "small").unwrap();
    for round in 0..ROUNDS {
        daemon.capture("k", &source);
        let name = format!("job-{round}");
        let verb = if round % 2 == 0 { "reserve" } else { "attach" };
        let calls = [[verb, &name, "k"], ["remove", "k", "--yes"]];
        let together = Barrier::new(calls.len());
        let [right, removal] = thread::scope(|scope| {
            let (daemon, together) = (&daemon, &together);
            let running = calls.map(|args| {
                scope.spawn(move || {
                    together.wait();
                    daemon.ctl(&args)
                })
            });
            running.map(|call| call.join().unwrap())
        });
        if right.code == Some(0) {
            removal.refused(&[4], &[&name]);
            assert_eq!(daemon.json(&["get", "k"])["state"], "ready");
            daemon.ctl(&["release", &name]).ok();
            daemon.ctl(&["remove", "k", "--yes"]).ok();
        } else {
            removal.ok();
            right.refused(&[3], &["checkpoint"]);
            daemon.ctl(&["get", "k"]).refused(&[3], &["`k`"]);
            assert_eq!(job(&daemon, &name), None);
        }
    }
}

#[test]
fn a_job_that_expires_while_attached_loses_its_view_and_keeps_what_it_has_open() {
    let (daemon, source) = daemon_with_k(&[]);
    let target = daemon.place().dir("at");
    let attach = ["attach", "job", "k", "--at", target.to_str().unwrap(), "--expires", "1h"];
    daemon.ctl(&attach).ok();
    let mut open = File::open(target.join("w.bin")).unwrap();
    let mut head = [0; 1000];
    open.read_exact(&mut head).unwrap();
    daemon.ctl(&["renew", "job", "--expires", "1s"]).ok();
    wait_until_released(&daemon, "job");
    assert!(mounts_at(&target).is_empty());
    let mut bytes = head.to_vec();
    open.read_to_end(&mut bytes).unwrap();
    assert!(bytes == fs::read(source.join("w.bin")).unwrap(), "what was open has other bytes");
    drop(open);
    wait_until("its session ends", PATIENCE, || daemon.json(&["status"])["sessions"] == 0);
}

#[test]
fn renewing_moves_the_end_in_both_directions() {
    let (daemon, _) = daemon_with_k(&[]);
    daemon.ctl(&["reserve", "job", "k", "--expires", "8s"]).ok();
    let renewed = daemon.json(&["renew", "job", "--expires", "1h"]);
    assert!(expiry(&renewed) > Utc::now() + chrono::Duration::minutes(59), "{renewed}");
    daemon.ctl(&["reserve", "witness", "k", "--expires", "9s"]).ok();
    wait_until_released(&daemon, "witness");
    assert!(job(&daemon, "job").is_some(), "its first end was kept");

    let renewed = daemon.json(&["renew", "job"]);
    assert_eq!(renewed["expires_at"], Value::Null, "{renewed}");
    daemon.ctl(&["renew", "job", "--expires", "1s"]).ok();
    wait_until_released(&daemon, "job");
}

#[test]
fn a_repeated_call_is_answered_alike_and_makes_no_right_shorter() {
    let (daemon, _) = daemon_with_k(&[]);
    let (soon, later) = (in_seconds(600), in_seconds(7200));
    let reserve = |end: &str| daemon.json(&["reserve", "job", "k", "--expires", end]);
    let first = reserve(&later);
    assert_eq!(reserve(&later), first);
    assert_eq!(reserve(&soon), first);
    assert_eq!(daemon.json(&["reserve", "job", "k"]), first);

    let target = daemon.place().dir("at");
    let at = target.to_str().unwrap();
    let attached = daemon.json(&["attach", "job", "--at", at]);
    assert_eq!(attached["expires_at"], first["expires_at"]);
    let longer = in_seconds(10_000);
    let attach = || daemon.json(&["attach", "job", "k", "--at", at, "--expires", &longer]);
    let extended = attach();
    assert!(expiry(&extended) > expiry(&first));
    assert_eq!(attach(), extended);
    let renew = || daemon.json(&["renew", "job", "--expires", &soon]);
    assert_eq!(renew(), renew());
    assert_eq!(mounts_at(&target).len(), 1);
}

#[test]
fn a_time_that_has_passed_is_refused_with_the_time_here() {
    let (daemon, _) = daemon_with_k(&[]);
    let past = in_seconds(-5);
    daemon.ctl(&["reserve", "job", "k", "--expires", &past]).refused(&[2], &["has passed"]);
    let at = daemon.place().dir("at");
    daemon
        .ctl(&["attach", "job", "k", "--at", at.to_str().unwrap(), "--expires", &past])
        .refused(&[2], &["has passed"]);
    assert_eq!(job(&daemon, "job"), None);
    daemon.ctl(&["renew", "job", "--expires", &past]).refused(&[2], &["has passed"]);
    daemon.ctl(&["reserve", "job", "k", "--expires", "3000000d"]).refused(&[2], &["9999"]);
}

#[test]
fn ends_are_durable_and_what_ended_while_nobody_was_there_has_a_grace() {
    let (mut daemon, _) = daemon_with_k(&[("CKPTD_LEASES__GRACE_S", "15")]);
    for name in ["ended", "renewed", "lasting"] {
        daemon.ctl(&["reserve", name, "k", "--expires", "8s"]).ok();
    }
    let end = expiry(&job(&daemon, "renewed").unwrap());
    let lasting = daemon.json(&["renew", "lasting", "--expires", "1h"]);
    daemon.kill9();
    // What ends here ends while nobody is there.
    thread::sleep((end + chrono::Duration::milliseconds(200) - Utc::now()).to_std().unwrap_or_default());
    daemon.restart();
    let begun = Instant::now();
    assert!(job(&daemon, "ended").is_some(), "there was no time to renew it");
    daemon.ctl(&["renew", "renewed", "--expires", "1h"]).ok();
    assert_eq!(job(&daemon, "lasting").unwrap()["expires_at"], lasting["expires_at"]);
    wait_until_released(&daemon, "ended");
    assert!(begun.elapsed() >= Duration::from_secs(3), "it ended after {:?}", begun.elapsed());
    assert!(job(&daemon, "renewed").is_some() && job(&daemon, "lasting").is_some());
}

#[test]
fn a_view_that_outlived_the_daemon_ends_with_its_right() {
    let (mut daemon, _) = daemon_with_k(&[SHORT_GRACE]);
    let target = daemon.attach("job", "k");
    daemon.ctl(&["renew", "job", "--expires", "1s"]).ok();
    daemon.kill9();
    daemon.restart();
    wait_until_released(&daemon, "job");
    assert!(mounts_at(&target).is_empty());
    daemon.ctl(&["remove", "k", "--yes"]).ok();
}

#[test]
fn a_view_that_somebody_has_covered_keeps_its_right_until_it_is_free() {
    let (daemon, _) = daemon_with_k(&[]);
    let target = daemon.attach("job", "k");
    shell("mount -t tmpfs none \"$1\"", &[&target]).ok();
    daemon.ctl(&["renew", "job", "--expires", "1s"]).ok();
    wait_until("it is said that it stays", PATIENCE, || !events(&daemon, "LEASE_NOT_RELEASED").is_empty());
    assert!(job(&daemon, "job").is_some());
    shell("umount \"$1\"", &[&target]).ok();
    // A changed row is looked at once; without one it would take a minute.
    daemon.ctl(&["reserve", "other", "k", "--expires", "1h"]).ok();
    wait_until_released(&daemon, "job");
    assert!(mounts_at(&target).is_empty());
}
