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

    let target = daemon.attach("job", "wide");
    let first = seconds("find \"$1\" -type f", &target, scale.files);
    let again = seconds("find \"$1\" -type f", &target, scale.files);
    let attributes = seconds("find \"$1\" -type f -size +0c", &target, scale.files);
    let native = seconds("find \"$1\" -type f -size +0c", &source, scale.files);
    table.row("find, first", format!("{first:.2} s"), "<= 0.5 s", &detail);
    table.row("find, again", format!("{again:.2} s"), "", &detail);
    table.row(
        "find with attributes",
        format!("{attributes:.2} s"),
        "<= 0.3 s",
        format!("{detail}; the source itself {native:.2} s"),
    );
}

/// Seconds that a `find` below `path` takes; it must list so many files.
fn seconds(script: &str, path: &Path, files: usize) -> f64 {
    let began = Instant::now();
    let ran = shell(&format!("{script} | wc -l"), &[path]).ok();
    let took = began.elapsed().as_secs_f64();
    assert_eq!(ran.stdout.trim(), files.to_string());
    took
}
