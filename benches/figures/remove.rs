//! Removing a tree of very many small files: how long the call takes, when the bytes are back, and what readers of another checkpoint
//! notice of it. Beside it, what they notice in as long a time when nothing is removed.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::support::corpus::{Tensors, seed};
use super::support::daemon::{Daemon, NO_PASSTHROUGH};
use super::support::ran::wait_until;
use super::support::steady::Readers;
use super::table::{Scale, Table};

const FILES_PER_DIRECTORY: usize = 1000;
const LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    for (path, env) in [("passthrough", &[][..]), ("the daemon's path", &[NO_PASSTHROUGH][..])] {
        let daemon = Daemon::start_with(env);
        let read = daemon.place().dir("read");
        let file = read.join("model.safetensors");
        Tensors::new(seed(), 4, 16 << 20).write_safetensors(&file);
        let bytes = Arc::new(fs::read(&file).unwrap());
        daemon.capture("read", &read);
        let served = daemon.attach("job", "read").join("model.safetensors");
        let wide = daemon.place().dir("wide");
        write(&wide, scale.files);
        daemon.capture("wide", &wide);
        fs::remove_dir_all(&wide).unwrap();
        nix::unistd::sync();

        let readers = Readers::start(&served, &bytes);
        let began = Instant::now();
        daemon.ctl(&["remove", "wide", "--yes"]).ok();
        let called = began.elapsed();
        wait_until("its bytes are back", LIMIT, || {
            daemon.rows("events").iter().any(|event| event["kind"] == "SPACE_FREED")
        });
        let freed = began.elapsed();
        readers.go_on("the removal");
        let longest = readers.longest();
        drop(readers);
        let idle = Readers::start(&served, &bytes);
        thread::sleep(freed);
        let detail = format!("{} files; readers by {path}", scale.files);
        table.row("remove returns", format!("{:.2} s", called.as_secs_f64()), "<= 1 s", &detail);
        table.row("its bytes are back", format!("{:.2} s", freed.as_secs_f64()), "", &detail);
        table.row(
            "longest pause of a reader meanwhile",
            milliseconds(longest),
            "<= 50 ms",
            format!("{detail}; as long a time without a removal: {}", milliseconds(idle.longest())),
        );
    }
}

fn write(root: &Path, files: usize) {
    for index in 0..files {
        let directory = root.join(format!("d{}", index / FILES_PER_DIRECTORY));
        if index % FILES_PER_DIRECTORY == 0 {
            fs::create_dir_all(&directory).unwrap();
        }
        fs::write(directory.join(format!("f{index}.json")), format!("{{\"i\": {index}}}")).unwrap();
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
