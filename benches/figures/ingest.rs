//! Bringing a directory in, against `cp -r` and sync of the same, and the memory it took.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::support::corpus::{Tensors, seed};
use super::support::daemon::Daemon;
use super::support::files::regular_files;
use super::support::ran::shell;
use super::table::{Scale, Table, best, three};
use super::warm::warm;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = Daemon::start();
    let (mut copies, mut captures) = (Vec::new(), Vec::new());
    for round in 0..scale.rounds.min(3) {
        // New bytes every round: what is known already would not be written again.
        let source = daemon.place().dir(&format!("source-{round}"));
        write_source(scale, &source, seed() + round as u64);
        warm(scale.bytes());
        copies.push(1.0 / seconds_of_copy(&source, &daemon.place().join("copy")));
        warm(scale.bytes());
        let began = Instant::now();
        daemon.capture(&format!("k{round}"), &source);
        captures.push(1.0 / began.elapsed().as_secs_f64());
        fs::remove_dir_all(&source).unwrap();
        daemon.ctl(&["remove", &format!("k{round}"), "--yes"]).ok();
    }
    let (copy, capture) = (1.0 / best(copies), 1.0 / best(captures));
    table.row(
        "directory to ready / cp -r and sync",
        three(capture / copy),
        "<= 1.2",
        format!("{capture:.2} s of {copy:.2} s"),
    );
    let peak = memory_kib(daemon.pid(), "VmHWM") / 1024;
    table.row("peak memory of the daemon", format!("{peak} MiB"), "<= 300 MiB", "VmHWM after these");
}

fn write_source(scale: &Scale, source: &Path, seed: u64) {
    Tensors::new(seed, scale.tensors, scale.tensor_bytes).write_safetensors(&source.join("model.safetensors"));
    for index in 0..200 {
        fs::write(source.join(format!("extra_{index:03}.json")), format!("{{\"i\": {index}}}").repeat(50)).unwrap();
    }
    shell("sync -f \"$1\"; cat \"$1\"/* > /dev/null", &[source]).ok();
}

fn seconds_of_copy(source: &Path, copy: &Path) -> f64 {
    let began = Instant::now();
    shell("cp -r \"$1\" \"$2\"; sync -f \"$2\"", &[source, copy]).ok();
    let took = began.elapsed().as_secs_f64();
    assert_eq!(regular_files(copy).len(), regular_files(source).len());
    fs::remove_dir_all(copy).unwrap();
    shell("sync -f \"$1\"", &[source]).ok();
    took
}

/// A figure of `/proc/PID/status`, in KiB.
pub(crate) fn memory_kib(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
