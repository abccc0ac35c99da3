//! A prefix of an S3 server on loopback, large files and small, against `rclone copy` of the same.
//!
//! The server is rclone's, which both read from in the same run. It answers ranges with whole files, so it is a fair race for one
//! stream a file. Needs what `tests/run` installs (`TEST_TOOLS`); without, the figure is left out.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::support::corpus::{Tensors, seed};
use super::support::daemon::{Daemon, LOOPBACK};
use super::support::files::regular_files;
use super::support::ran::shell;
use super::support::server::{Server, free_port, tool};
use super::table::{Scale, Table, best, three};
use super::warm::warm;

/// Large files of the prefix.
const LARGE: usize = 4;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    if std::env::var_os("TEST_TOOLS").is_none() {
        eprintln!("  left out: TEST_TOOLS is not set; tests/run says what it holds");
        return;
    }
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let (mut copies, mut ingests, mut synced) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..scale.rounds.min(3) {
        // New bytes every round: what is known already would not be written again.
        let store = daemon.place().dir(&format!("store-{round}"));
        write_prefix(scale, &store.join("ckpt/prefix"), seed() + 100 * round as u64);
        let server = serve(&store);
        let copy = daemon.place().join("copy");
        warm(scale.bytes());
        let began = Instant::now();
        copy_with_rclone(&server, &copy);
        copies.push(1.0 / began.elapsed().as_secs_f64());
        shell("sync -f \"$1\"", &[&copy]).ok();
        synced.push(1.0 / began.elapsed().as_secs_f64());
        assert_eq!(regular_files(&copy).len(), regular_files(&store).len());
        fs::remove_dir_all(&copy).unwrap();
        shell("sync -f \"$1\"", &[&store]).ok();
        let (name, endpoint) = (format!("s3-{round}"), format!("endpoint={}", server.url("")));
        warm(scale.bytes());
        let began = Instant::now();
        let options = ["--type", "aws", "--uri", "s3://ckpt/prefix/", "--option", "anonymous=true", "--option"];
        daemon.ctl(&[&["create", &name, "--wait"][..], &options, &[&endpoint]].concat()).ok();
        ingests.push(1.0 / began.elapsed().as_secs_f64());
        daemon.ctl(&["remove", &name, "--yes"]).ok();
        drop(server);
        fs::remove_dir_all(&store).unwrap();
    }
    let (copy, ingest, synced) = (1.0 / best(copies), 1.0 / best(ingests), 1.0 / best(synced));
    table.row(
        "S3 prefix to ready / rclone copy",
        three(ingest / copy),
        "<= 1.0",
        format!("{ingest:.2} s of {copy:.2} s ({synced:.2} s with sync)"),
    );
}

fn write_prefix(scale: &Scale, prefix: &Path, seed: u64) {
    for number in 0..LARGE {
        let tensors = Tensors::new(seed + number as u64, scale.tensors / LARGE, scale.tensor_bytes);
        fs::create_dir_all(prefix).unwrap();
        tensors.write_safetensors(&prefix.join(format!("model-{number}.safetensors")));
    }
    for number in 0..scale.files / 100 {
        fs::write(prefix.join(format!("extra_{number:04}.json")), format!("{{\"i\": {number}}}").repeat(50)).unwrap();
    }
    shell("sync -f \"$1\"; cat \"$1\"/* > /dev/null", &[prefix]).ok();
}

fn serve(store: &Path) -> Server {
    let port = free_port();
    let mut command = Command::new(tool("objects/bin/rclone"));
    command.args(["serve", "s3", "--config", "/dev/null", "--addr"]).arg(format!("127.0.0.1:{port}")).arg(store);
    Server::start(&mut command, port)
}

fn copy_with_rclone(server: &Server, copy: &Path) {
    let rclone = tool("objects/bin/rclone");
    let from = format!(":s3,provider=Other,env_auth=false,endpoint='{}':ckpt/prefix", server.url(""));
    let script = "\"$1\" --config /dev/null copy \"$2\" \"$3\"";
    shell(script, &[&rclone, Path::new(&from), copy]).ok();
}
