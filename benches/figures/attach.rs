//! One more attachment where many stand already, asked for over gRPC without a client program.

use std::time::{Duration, Instant};

use ckptd::control::wire::jobs_client::JobsClient;
use ckptd::control::wire::{AttachCheckpointsRequest, CheckpointRef, ReleaseJobRequest};
use tonic::transport::{Channel, Endpoint};

use super::support::corpus::{random_file, seed};
use super::support::daemon::Daemon;
use super::table::{Scale, Table};

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = with_checkpoints(scale.checkpoints);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut times = runtime.block_on(attach_all(&daemon, scale));
    times.sort();
    let at = |per_cent: usize| times[(times.len() * per_cent / 100).min(times.len() - 1)];
    let detail = format!("{} checkpoints, {} attachments standing", scale.checkpoints, scale.attachments);
    table.row("attach, p50", milliseconds(at(50)), "<= 3 ms", &detail);
    table.row("attach, p99", milliseconds(at(99)), "<= 15 ms", &detail);
}

/// A daemon with so many small checkpoints, `k0` and on.
pub(crate) fn with_checkpoints(count: usize) -> Daemon {
    let daemon = Daemon::start();
    for index in 0..count {
        let source = daemon.place().dir(&format!("source-{index}"));
        random_file(&source.join("w.bin"), seed() + index as u64, 100_000);
        daemon.capture(&format!("k{index}"), &source);
    }
    daemon
}

/// Times of attaching where as many stand as the scale says; all are released again.
pub(crate) async fn attach_all(daemon: &Daemon, scale: &Scale) -> Vec<Duration> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", daemon.socket().display())).unwrap();
    let mut jobs = JobsClient::new(endpoint.connect().await.unwrap());
    for index in 0..scale.attachments {
        attach(&mut jobs, daemon, index, scale.checkpoints).await;
    }
    let mut times = Vec::new();
    for index in scale.attachments..scale.attachments + scale.timed {
        times.push(attach(&mut jobs, daemon, index, scale.checkpoints).await);
        jobs.release_job(ReleaseJobRequest { job: format!("job-{index}") }).await.unwrap();
    }
    for index in 0..scale.attachments {
        jobs.release_job(ReleaseJobRequest { job: format!("job-{index}") }).await.unwrap();
    }
    times
}

async fn attach(jobs: &mut JobsClient<Channel>, daemon: &Daemon, index: usize, checkpoints: usize) -> Duration {
    let target = daemon.place().dir(&format!("at-{index}"));
    let checkpoint = CheckpointRef { checkpoint: format!("k{}", index % checkpoints), ..CheckpointRef::default() };
    let request = AttachCheckpointsRequest {
        job: format!("job-{index}"),
        checkpoints: vec![checkpoint],
        target: target.display().to_string(),
        ..AttachCheckpointsRequest::default()
    };
    let began = Instant::now();
    jobs.attach_checkpoints(request).await.unwrap();
    began.elapsed()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}
