//! A catalog of the size that a busy host's may grow to: what asking and starting cost then.
//!
//! Ten checkpoints are real. The rest are rows written into the catalog of a stopped daemon, as ingests of as many would have left them, without
//! blobs on disk: nobody reads those.

use std::path::Path;
use std::time::{Duration, Instant};

use ckptd::control::wire::checkpoints_client::CheckpointsClient;
use ckptd::control::wire::{GetCheckpointRequest, ListCheckpointsRequest};
use ckptd::digest::Digest;
use ckptd::manifest::{Entry, EntryKind, Manifest};
use ckptd::names::EntryPath;
use rusqlite::{Connection, Transaction, params};
use tonic::transport::{Channel, Endpoint};

use super::attach::{attach_all, with_checkpoints};
use super::ingest::memory_kib;
use super::support::daemon::Daemon;
use super::table::{Scale, Table};

const REAL: usize = 10;
const OWNERS: usize = 100;
const FILES_EACH: usize = 100;
const CHUNKS_EACH: usize = 5;
const FILE_BYTES: i64 = 20 << 20;
/// What each is said to occupy: so little that together they leave the store below its watermarks, as where they really are.
const STORED_BYTES: i64 = 4096;
const ROUNDS: usize = 50;

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let mut daemon = with_checkpoints(REAL);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let few = runtime.block_on(attach_all(&daemon, &scale.with_checkpoints(REAL)));
    daemon.stop();
    let made = write_rows(&daemon.state().join("catalog.db"), scale.recorded);
    let began = Instant::now();
    daemon.restart();
    let started = began.elapsed();
    let detail = format!("{} checkpoints, {} files, {} chunks", scale.recorded, made.0, made.1);

    let (list, get) = runtime.block_on(ask(&daemon, scale.recorded));
    table.row(
        "list by owner",
        milliseconds(list),
        "<= 20 ms",
        format!("median; {} rows of {detail}", scale.recorded / OWNERS),
    );
    table.row("get", milliseconds(get), "<= 2 ms", format!("median; {detail}"));
    let many = runtime.block_on(attach_all(&daemon, &scale.with_checkpoints(REAL)));
    let ratio = median(many).as_secs_f64() / median(few).as_secs_f64();
    table.row("attach with many recorded / with ten", format!("{ratio:.3}"), "1", format!("medians; {detail}"));
    table.row("start", format!("{:.2} s", started.as_secs_f64()), "<= 2 s", &detail);
    table.row(
        "memory",
        format!("{} MiB", memory_kib(daemon.pid(), "VmHWM") / 1024),
        "<= 200 MiB",
        format!("at most; {detail}"),
    );
}

async fn ask(daemon: &Daemon, recorded: usize) -> (Duration, Duration) {
    let endpoint = Endpoint::from_shared(format!("unix:{}", daemon.socket().display())).unwrap();
    let mut client = CheckpointsClient::new(endpoint.connect().await.unwrap());
    let (mut lists, mut gets) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        lists.push(list(&mut client, &format!("owner-{}", round % OWNERS), recorded / OWNERS).await);
        let began = Instant::now();
        let checkpoint = format!("made-{}", round * recorded / ROUNDS);
        client.get_checkpoint(GetCheckpointRequest { checkpoint }).await.unwrap();
        gets.push(began.elapsed());
    }
    (median(lists), median(gets))
}

async fn list(client: &mut CheckpointsClient<Channel>, owner: &str, expected: usize) -> Duration {
    let began = Instant::now();
    let request = ListCheckpointsRequest { owner: owner.to_owned(), public: false };
    let listed = client.list_checkpoints(request).await.unwrap().into_inner();
    let took = began.elapsed();
    assert_eq!(listed.checkpoints.len(), expected);
    took
}

/// Writes rows of `count` checkpoints; how many files and chunks they have.
fn write_rows(catalog: &Path, count: usize) -> (usize, usize) {
    let mut connection = Connection::open(catalog).unwrap();
    connection.execute_batch("PRAGMA synchronous = OFF; PRAGMA cache_size = -1000000").unwrap();
    for first in (0..count).step_by(1000) {
        let tx = connection.transaction().unwrap();
        (first..count.min(first + 1000)).for_each(|number| write_checkpoint(&tx, number));
        tx.commit().unwrap();
    }
    connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    // What is still on its way to the disk would hold up the commits that are timed.
    nix::unistd::sync();
    (count * FILES_EACH, count * FILES_EACH * CHUNKS_EACH)
}

fn write_checkpoint(tx: &Transaction<'_>, number: usize) {
    let entries: Vec<Entry> = (0..FILES_EACH)
        .map(|file| Entry {
            path: EntryPath::new(format!("model/layer-{file:03}.safetensors").into_bytes()).unwrap(),
            kind: EntryKind::File {
                size: FILE_BYTES.unsigned_abs(),
                executable: false,
                digest: Digest::of(format!("{number}/{file}").as_bytes()),
            },
        })
        .collect();
    let mut blob = tx
        .prepare_cached("INSERT INTO blobs (digest, size, stored_bytes, state) VALUES (?, ?, ?, 'sealed') RETURNING id")
        .unwrap();
    let mut chunk = tx.prepare_cached("INSERT INTO chunks (digest, blob, start, len) VALUES (?, ?, ?, ?)").unwrap();
    let mut name = tx.prepare_cached("INSERT INTO manifest_blobs (manifest, blob) VALUES (?, ?)").unwrap();
    let manifest = Manifest::new(entries).unwrap();
    let tree = manifest.digest();
    let step = FILE_BYTES / i64::try_from(CHUNKS_EACH).unwrap();
    for entry in manifest.entries() {
        let EntryKind::File { digest, .. } = &entry.kind else { continue };
        let id: i64 = blob.query_row(params![digest.as_bytes(), FILE_BYTES, STORED_BYTES], |row| row.get(0)).unwrap();
        for piece in 0..i64::try_from(CHUNKS_EACH).unwrap() {
            let of = Digest::of(format!("{digest}/{piece}").as_bytes());
            chunk.execute(params![of.as_bytes(), id, piece * step, step]).unwrap();
        }
        name.execute(params![tree.as_bytes(), id]).unwrap();
    }
    tx.prepare_cached("INSERT INTO manifests (digest, encoded) VALUES (?, ?)")
        .unwrap()
        .execute(params![tree.as_bytes(), manifest.encode()])
        .unwrap();
    let source = format!(r#"{{"type":"huggingface","uri":"acme/model-{number}","options":{{"branch":"main"}}}}"#);
    tx.prepare_cached(
        "INSERT INTO checkpoints (id, name, owner, public, state, source, revision, manifest, files, logical_bytes, created_ms, used_ms)
         VALUES (?1, ?2, ?3, 0, 'ready', ?4, ?5, ?6, ?7, ?8, ?9, ?9)",
    )
    .unwrap()
    .execute(params![
        format!("made-{number}"),
        format!("model-{number}"),
        format!("owner-{}", number % OWNERS),
        source,
        format!("{number:040x}"),
        tree.as_bytes(),
        i64::try_from(FILES_EACH).unwrap(),
        FILE_BYTES * i64::try_from(FILES_EACH).unwrap(),
        1_700_000_000_000_i64 + i64::try_from(number).unwrap(),
    ])
    .unwrap();
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}
