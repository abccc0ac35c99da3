//! The service `Node`.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::refusal::status;
use super::{Floors, records, wire};
use crate::catalog::jobs::JobState;
use crate::catalog::{events, jobs};
use crate::error::Result;

/// Estimates that a status shows.
const ESTIMATES_SHOWN: usize = 20;

/// Events read at a time.
const EVENTS_AT_A_TIME: usize = 256;

/// A follower looks this often for events that no change of a checkpoint announces; only while somebody follows.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Service {
    floors: Floors,
}

impl Service {
    pub(super) fn new(floors: Floors) -> Self {
        Self { floors }
    }

    async fn status(&self, caller: &Caller) -> Result<wire::Status> {
        let floors = &self.floors;
        if caller.owner.is_some() {
            return Ok(self.status_for_owners());
        }
        let rows = floors.store.catalog().read(jobs::list).await?;
        let attached = rows.iter().filter(|row| row.state == JobState::Attached).count();
        let estimates = floors.ingests.estimates(ESTIMATES_SHOWN).await?.into_iter().map(|made| wire::Estimated {
            checkpoint: made.checkpoint,
            bytes: made.bytes,
            expected_ms: made.expected_ms,
            took_ms: made.took_ms,
        });
        Ok(wire::Status {
            estimates: estimates.collect(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: floors.facts.started.elapsed().as_secs(),
            features: Some(self.features()),
            sessions: u32::try_from(floors.attachments.sessions()).unwrap_or(u32::MAX),
            attachments: u32::try_from(attached).unwrap_or(u32::MAX),
            state_dir: floors.store.disk().root().display().to_string(),
            runtime_dir: floors.facts.runtime_dir.display().to_string(),
            degraded: floors.store.disk().poisoned().unwrap_or_default().to_owned(),
            holder: floors.facts.holder.to_owned(),
            restarts: floors.facts.restarts,
            draining: floors.ingests.is_paused(),
            reconciled: floors.attachments.reconciled().to_string(),
            scrub: floors.last_scrub(),
        })
    }

    /// What an owner may know of this host: nothing that others have a part in.
    fn status_for_owners(&self) -> wire::Status {
        wire::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.floors.facts.started.elapsed().as_secs(),
            features: Some(self.features()),
            draining: self.floors.ingests.is_paused(),
            ..Default::default()
        }
    }

    fn features(&self) -> wire::Features {
        let features = self.floors.attachments.features();
        wire::Features {
            passthrough: features.passthrough,
            resend: features.resend,
            reflink: self.floors.store.disk().reflink(),
            open_tree: features.open_tree,
        }
    }
}

type Sink = mpsc::Sender<Result<wire::Event, Status>>;

async fn send_events(floors: &Floors, request: wire::WatchEventsRequest, caller: &Caller, sink: &Sink) -> Result<()> {
    let mut changes = floors.ingests.changes();
    let mut last = request.after_id;
    loop {
        let owner = caller.owner.clone();
        let next = move |tx: &rusqlite::Connection| match &owner {
            // What is about nobody, or about what is public, tells of others.
            Some(owner) => events::of_owner_after(tx, owner, last, EVENTS_AT_A_TIME),
            None => events::after(tx, last, EVENTS_AT_A_TIME),
        };
        let found = floors.store.catalog().read(next).await?;
        let was_full = found.len() == EVENTS_AT_A_TIME;
        for event in found {
            last = event.id;
            if sink.send(Ok(records::event(event))).await.is_err() {
                return Ok(());
            }
        }
        if was_full {
            continue;
        }
        if !request.follow {
            return Ok(());
        }
        tokio::select! {
            () = sink.closed() => return Ok(()),
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
            _ = changes.recv() => {}
        }
    }
}

#[tonic::async_trait]
impl wire::node_server::Node for Service {
    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<wire::Event, Status>> + Send>>;

    async fn get_status(&self, request: Request<wire::GetStatusRequest>) -> Result<Response<wire::Status>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.status(&caller).await.map(Response::new).map_err(status)
    }

    async fn drain(&self, _request: Request<wire::DrainRequest>) -> Result<Response<wire::DrainResponse>, Status> {
        self.floors.drain().await;
        Ok(Response::new(wire::DrainResponse {}))
    }

    async fn evict_checkpoints(
        &self,
        request: Request<wire::EvictCheckpointsRequest>,
    ) -> Result<Response<wire::EvictCheckpointsResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.evict(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn start_scrub(&self, request: Request<wire::StartScrubRequest>) -> Result<Response<wire::Scrub>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.start_scrub(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn get_usage(&self, request: Request<wire::GetUsageRequest>) -> Result<Response<wire::Usage>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.usage(&caller).await.map(Response::new).map_err(status)
    }

    async fn watch_events(
        &self,
        request: Request<wire::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let (sink, receiver) = mpsc::channel(64);
        let caller = Caller::of(&request).map_err(status)?;
        let floors = self.floors.clone();
        let request = request.into_inner();
        tokio::spawn(async move {
            if let Err(error) = send_events(&floors, request, &caller, &sink).await {
                let _ = sink.send(Err(status(error))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
