//! Bringing files in from a web server on loopback, in one piece and in many, against `cp -r` and sync of the same, and against `curl`.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::support::corpus::{random_file, seed};
use super::support::daemon::{Daemon, LOOPBACK};
use super::support::files::regular_files;
use super::support::ran::shell;
use super::support::webserver::nginx;
use super::table::{Scale, Table, best, three};
use super::warm::warm;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let bytes = scale.bytes() as u64;
    one_file(scale, table, bytes);
    many_files(scale, table, bytes, scale.files as u64 / 50);
}

fn one_file(scale: &Scale, table: &mut Table, bytes: u64) {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = daemon.place().dir("site");
    let server = nginx(daemon.place(), &site, "");
    let url = server.url("/weights.bin");
    let (mut copies, mut curls, mut ingests) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..scale.rounds.min(3) {
        let file = site.join("weights.bin");
        prepare(&site, || random_file(&file, seed() + round as u64, bytes));
        let copy = daemon.place().join("copy");
        warm(scale.bytes());
        copies.push(1.0 / seconds_of("cp -r \"$1\" \"$2\"; sync -f \"$2\"", &site, &copy));
        warm(scale.bytes());
        curls.push(1.0 / seconds_of("curl -sS -o \"$2\" \"$1\"; sync -f \"$2\"", Path::new(&url), &copy));
        warm(scale.bytes());
        ingests.push(1.0 / seconds_of_ingest(&daemon, round, &url));
    }
    let (copy, curl, ingest) = (1.0 / best(copies), 1.0 / best(curls), 1.0 / best(ingests));
    let detail = format!("{ingest:.2} s of {copy:.2} s, {} MiB from nginx", bytes >> 20);
    table.row("one file by HTTP to ready / cp -r and sync", three(ingest / copy), "<= 1.5", detail);
    let detail = format!("{ingest:.2} s of {curl:.2} s");
    table.row("one file by HTTP to ready / curl and sync", three(ingest / curl), "<= 1.0", detail);
}

fn many_files(scale: &Scale, table: &mut Table, bytes: u64, files: u64) {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = daemon.place().dir("site");
    let server = nginx(daemon.place(), &site, "");
    let (mut copies, mut ingests) = (Vec::new(), Vec::new());
    for round in 0..scale.rounds.min(3) {
        prepare(&site, || {
            for index in 0..files {
                let path = site.join(format!("d{}/f{index}.bin", index % 20));
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                random_file(&path, seed() + round as u64 * files + index, bytes / files);
            }
        });
        warm(scale.bytes());
        copies.push(1.0 / seconds_of("cp -r \"$1\" \"$2\"; sync -f \"$2\"", &site, &daemon.place().join("copy")));
        warm(scale.bytes());
        ingests.push(1.0 / seconds_of_ingest(&daemon, round, &server.url("/")));
        assert_eq!(regular_files(&site).len() as u64, files);
    }
    let (copy, ingest) = (1.0 / best(copies), 1.0 / best(ingests));
    let detail = format!("{ingest:.2} s of {copy:.2} s, {} MiB in {files} files from nginx", bytes >> 20);
    table.row("a tree by HTTP to ready / cp -r and sync", three(ingest / copy), "<= 1.5", detail);
}

/// New bytes every round: what is known already would not be written again. They are in memory then, and on disk.
fn prepare(site: &Path, write: impl FnOnce()) {
    write();
    shell("sync -f \"$1\"; find \"$1\" -type f -exec cat {} + > /dev/null", &[site]).ok();
}

fn seconds_of(script: &str, from: &Path, to: &Path) -> f64 {
    let began = Instant::now();
    shell(script, &[from, to]).ok();
    let took = began.elapsed().as_secs_f64();
    shell("rm -rf \"$1\"; sync -f \"$(dirname \"$1\")\"", &[to]).ok();
    took
}

fn seconds_of_ingest(daemon: &Daemon, round: usize, url: &str) -> f64 {
    let name = format!("w{round}");
    let began = Instant::now();
    daemon.ctl(&["create", &name, "--type", "web", "--uri", url, "--wait"]).ok();
    let took = began.elapsed().as_secs_f64();
    daemon.ctl(&["remove", &name, "--yes"]).ok();
    took
}
