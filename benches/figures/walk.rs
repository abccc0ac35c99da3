//! A tree of very many small files: bringing it in, finding it, asking for every file's attributes.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::support::daemon::Daemon;
use super::support::ran::shell;
use super::table::{Scale, Table};

const FILES_PER_DIRECTORY: usize = 1000;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    for index in 0..scale.files {
        let directory = source.join(format!("d{}", index / FILES_PER_DIRECTORY));
        if index % FILES_PER_DIRECTORY == 0 {
            fs::create_dir_all(&directory).unwrap();
        }
        fs::write(directory.join(format!("f{index}.json")), format!("{{\"i\": {index}}}")).unwrap();
    }
    let began = Instant::now();
    daemon.capture("wide", &source);
    let detail = format!("{} files", scale.files);
    table.row("many small files to ready", format!("{:.2} s", began.elapsed().as_secs_f64()), "", &detail);

    let (mut first, mut again, mut attributes) = (f64::MAX, f64::MAX, f64::MAX);
    let mut firsts = Vec::new();
    for round in 0..scale.rounds {
        let job = format!("job-{round}");
        let target = daemon.attach(&job, "wide");
        firsts.push(seconds("find \"$1\" -type f", &target, scale.files));
        again = again.min(seconds("find \"$1\" -type f", &target, scale.files));
        attributes = attributes.min(seconds("find \"$1\" -type f -size +0c", &target, scale.files));
        first = first.min(firsts[round]);
        daemon.ctl(&["release", &job]).ok();
        forget();
    }
    let native = seconds("find \"$1\" -type f -size +0c", &source, scale.files);
    let native_first = {
        forget();
        seconds("find \"$1\" -type f -size +0c", &source, scale.files)
    };
    let firsts: Vec<String> = firsts.iter().map(|first| format!("{first:.2}")).collect();
    table.row(
        "find, first",
        format!("{first:.2} s"),
        "<= 0.5 s",
        format!(
            "{detail}; the rounds {}; the source itself, its inodes forgotten, with attributes {native_first:.2} s",
            firsts.join(", ")
        ),
    );
    table.row("find, again", format!("{again:.2} s"), "", &detail);
    table.row(
        "find with attributes",
        format!("{attributes:.2} s"),
        "<= 0.3 s",
        format!("{detail}; the source itself {native:.2} s"),
    );
}

/// Lets the kernel forget names and inodes: memory for those of the next round is then memory that this machine's host
/// has given already. A virtual machine's first touch of a page costs more than the inode in it.
fn forget() {
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

/// Seconds that a `find` below `path` takes; it must list so many files.
fn seconds(script: &str, path: &Path, files: usize) -> f64 {
    let began = Instant::now();
    let ran = shell(&format!("{script} | wc -l"), &[path]).ok();
    let took = began.elapsed().as_secs_f64();
    assert_eq!(ran.stdout.trim(), files.to_string());
    took
}
