//! Reading a checkpoint while it arrives, and across kills of the daemon.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ckptd::control::wire::checkpoints_client::CheckpointsClient;
use ckptd::control::wire::jobs_client::JobsClient;
use ckptd::control::wire::{AttachCheckpointsRequest, CheckpointRef, CreateCheckpointRequest, Source};
use nix::sys::signal::{Signal, kill};
use tonic::transport::{Channel, Endpoint};

use super::support::corpus::{Random, random_file, seed};
use super::support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use super::support::ran::wait_until;
use super::support::site::{Page, Site};
use super::table::{Scale, Table};

/// What the source gives, in all.
const RATE: u64 = 100_000_000;

/// One way there and back to the source.
const ROUND_TRIP: Duration = Duration::from_millis(20);

const READ: usize = 4 << 20;
const PAGE: usize = 4096;

/// Bytes of each page that a reader of everything compares.
const LOOKED_AT: usize = 64;

const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let bytes = Arc::new(Random::new(seed()).bytes(scale.tensors * scale.tensor_bytes));
    first_byte(&bytes, table);
    random_reads(&bytes, table);
    in_order(&bytes, table);
    many_jobs(&bytes, table);
    kills(scale, table);
}

/// A source, and a daemon that has not heard of it.
struct Scene {
    daemon: Daemon,
    site: Site,
    url: String,
}

impl Scene {
    fn new(bytes: &Arc<Vec<u8>>, rate: u64) -> Self {
        let site = Site::open();
        site.limit(rate);
        let url = site.put("/w.bin", Page::Ranged(Arc::clone(bytes)));
        Self { daemon: Daemon::start_with(&[LOOPBACK]), site, url }
    }

    /// Creates, and attaches without waiting; where the file is.
    fn attach(&self, job: &str) -> PathBuf {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let target = self.daemon.place().dir(&format!("at-{job}"));
        runtime.block_on(self.ask(job, &target));
        target.join("w.bin")
    }

    async fn ask(&self, job: &str, target: &Path) {
        let endpoint = Endpoint::from_shared(format!("unix:{}", self.daemon.socket().display())).unwrap();
        let channel: Channel = endpoint.connect().await.unwrap();
        let source = Source { r#type: "web".into(), uri: self.url.clone(), ..Source::default() };
        let create = CreateCheckpointRequest {
            id: "w".into(),
            name: "w".into(),
            source: Some(source),
            ..CreateCheckpointRequest::default()
        };
        CheckpointsClient::new(channel.clone()).create_checkpoint(create).await.unwrap();
        let attach = AttachCheckpointsRequest {
            job: job.into(),
            checkpoints: vec![CheckpointRef { checkpoint: "w".into(), ..CheckpointRef::default() }],
            target: target.display().to_string(),
            lazy: true,
            ..AttachCheckpointsRequest::default()
        };
        JobsClient::new(channel).attach_checkpoints(attach).await.unwrap();
    }
}

fn first_byte(bytes: &Arc<Vec<u8>>, table: &mut Table) {
    let scene = Scene::new(bytes, 0);
    scene.site.delay(ROUND_TRIP);
    let began = Instant::now();
    let file = File::open(scene.attach("first")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, (bytes.len() / 2) as u64).unwrap();
    let took = began.elapsed();
    let wanted = format!("<= {} ms", (3 * ROUND_TRIP + Duration::from_millis(50)).as_millis());
    table.row("create to first byte, lazily", milliseconds(took), &wanted, "each answer of the source 20 ms late");
}

fn random_reads(bytes: &Arc<Vec<u8>>, table: &mut Table) {
    let scene = Scene::new(bytes, RATE);
    let file = File::open(scene.attach("random")).unwrap();
    let mut random = Random::new(seed());
    let mut found = vec![0; READ];
    let mut times = Vec::new();
    while scene.daemon.json(&["get", "w"])["state"] != "ready" {
        for _ in 0..8 {
            let at = usize::try_from(random.below((bytes.len() - READ) as u64)).unwrap();
            let began = Instant::now();
            file.read_exact_at(&mut found, at as u64).unwrap();
            times.push(began.elapsed());
            assert!(found == bytes[at..at + READ], "wrong bytes at {at}");
        }
    }
    times.sort();
    let at = |per_cent: usize| times[(times.len() * per_cent / 100).min(times.len() - 1)];
    let detail = format!("{} reads of 4 MiB while it fills at 100 MB/s", times.len());
    table.row("random read while filling, median", milliseconds(at(50)), "<= 80 ms", &detail);
    table.row("random read while filling, p99", milliseconds(at(99)), "<= 250 ms", &detail);
}

fn in_order(bytes: &Arc<Vec<u8>>, table: &mut Table) {
    let scene = Scene::new(bytes, RATE);
    let began = Instant::now();
    read_all(&scene.attach("loader"), bytes);
    let took = began.elapsed().as_secs_f64();
    let delivered = bytes.len() as f64 / RATE as f64;
    let detail = format!("{took:.2} s of {delivered:.2} s");
    table.row("loader in order, lazily / delivery", format!("{:.3}", took / delivered), "<= 1.1", &detail);
}

fn many_jobs(bytes: &Arc<Vec<u8>>, table: &mut Table) {
    let timed = |jobs: usize| {
        let scene = Scene::new(bytes, RATE);
        let began = Instant::now();
        thread::scope(|scope| {
            for job in 0..jobs {
                let scene = &scene;
                scope.spawn(move || read_all(&scene.attach(&format!("job-{job}")), bytes));
            }
        });
        (began.elapsed().as_secs_f64(), scene.site.take_sent())
    };
    let (alone, _) = timed(1);
    let (together, sent) = timed(32);
    let detail = format!("{together:.2} s of {alone:.2} s");
    table.row("32 cold jobs / one", format!("{:.3}", together / alone), "<= 1.15", &detail);
    let ratio = sent as f64 / bytes.len() as f64;
    table.row("32 cold jobs: bytes of the source", format!("{ratio:.3}"), "<= 1.01", "of the checkpoint's");
}

/// Reads a file in order and looks at some bytes of every page: comparing all of them would cost 32 readers on two cores as much as reading.
fn read_all(path: &Path, bytes: &[u8]) {
    let file = File::open(path).unwrap();
    let mut found = vec![0; 1 << 20];
    for at in (0..bytes.len()).step_by(found.len()) {
        let length = found.len().min(bytes.len() - at);
        file.read_exact_at(&mut found[..length], at as u64).unwrap();
        let pages = found[..length].chunks(PAGE).zip(bytes[at..at + length].chunks(PAGE));
        for (found, sent) in pages {
            let seen = LOOKED_AT.min(found.len());
            assert!(found[..seen] == sent[..seen], "wrong bytes after {at}");
        }
    }
}

/// The pauses that readers see while the daemon is killed under the keeper; and, for what of them is the kill's, while another daemon is,
/// which starts beside them just the same and serves none of what they read.
fn kills(scale: &Scale, table: &mut Table) {
    let longest = |env, killed| {
        let pauses = pauses(scale, env, killed);
        milliseconds(pauses.into_iter().max().unwrap())
    };
    let detail = |env| {
        format!("the longest of all kills, keeper; {} when another daemon is killed", longest(env, Killed::Another))
    };
    let kernel: &[(&'static str, &str)] = &[];
    let daemon = &[NO_PASSTHROUGH];
    table.row(
        "pause across kill -9, kernel reads",
        longest(kernel, Killed::Its),
        "<= 5 ms attributable",
        detail(kernel),
    );
    table.row("pause across kill -9, daemon reads", longest(daemon, Killed::Its), "p99 <= 300 ms", detail(daemon));
}

/// Whose daemon is killed: that of the file that is read, or one that has nothing to do with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    Its,
    Another,
}

fn pauses(scale: &Scale, env: &[(&'static str, &str)], killed: Killed) -> Vec<Duration> {
    let read = Daemon::start_kept(env);
    let another = (killed == Killed::Another).then(|| Daemon::start_kept(env));
    let daemons = [Some(&read), another.as_ref()];
    let mut files = daemons.into_iter().flatten().map(|daemon| {
        let source = daemon.place().dir("source");
        random_file(&source.join("w.bin"), seed(), 64 << 20);
        daemon.capture("k", &source);
        File::open(daemon.attach("job", "k").join("w.bin")).unwrap()
    });
    let file = files.next().unwrap();
    let _held = files.next();
    let victim = another.as_ref().unwrap_or(&read);
    let stop = AtomicBool::new(false);
    let mut longest = Vec::new();
    let (sender, pauses) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(seed());
            let mut found = vec![0; 64 << 10];
            while !stop.load(Ordering::Relaxed) {
                let at = random.below((64 << 20) - (64 << 10));
                let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                let began = Instant::now();
                file.read_exact_at(&mut found, at).unwrap();
                let _ = sender.send(began.elapsed());
            }
        });
        for _ in 0..scale.rounds.max(3) * 2 {
            thread::sleep(Duration::from_millis(1500));
            let before = victim.server();
            pauses.try_iter().for_each(drop);
            kill(before, Signal::SIGKILL).unwrap();
            wait_until("a successor answers", LIMIT, || victim.ctl(&["--json", "status"]).code == Some(0));
            thread::sleep(Duration::from_millis(200));
            longest.push(pauses.try_iter().max().unwrap_or_default());
        }
        stop.store(true, Ordering::Relaxed);
    });
    longest
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
