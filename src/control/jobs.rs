//! The service `Jobs`.

use std::path::PathBuf;

use tonic::{Request, Response, Status};

use super::refusal::status;
use super::{Floors, records, resolve, wire};
use crate::catalog::checkpoints::{self as checkpoint_rows, Record};
use crate::catalog::jobs as rows;
use crate::error::{Error, Result};
use crate::names::JobId;
use crate::serve::attachments::Wanted;

pub(super) struct Service {
    floors: Floors,
}

impl Service {
    pub(super) fn new(floors: Floors) -> Self {
        Self { floors }
    }

    /// Records of what a request names, with their directories.
    async fn named(&self, refs: Vec<wire::CheckpointRef>, owner: String) -> Result<Vec<(Record, String)>> {
        let find = move |tx: &rusqlite::Connection| {
            refs.into_iter()
                .map(|wanted| Ok((resolve::record(tx, &wanted.checkpoint, &owner, wanted.public)?, wanted.subdir)))
                .collect()
        };
        self.floors.store.catalog().read(find).await
    }

    /// What a job has reserved.
    async fn reserved(&self, job: &JobId) -> Result<Vec<(Record, String)>> {
        let job = job.to_string();
        let find = move |tx: &rusqlite::Connection| {
            let Some(row) = rows::get(tx, &job)? else { return Ok(Vec::new()) };
            let record = |lease: rows::Lease| {
                Ok(checkpoint_rows::get(tx, &lease.checkpoint)?.map(|record| (record, lease.subdir)))
            };
            row.leases.into_iter().filter_map(|lease| record(lease).transpose()).collect()
        };
        self.floors.store.catalog().read(find).await
    }

    async fn reserve(&self, request: wire::ReserveCheckpointsRequest) -> Result<wire::Attachment> {
        self.floors.admit()?;
        let job = JobId::new(request.job)?;
        let named = self.named(request.checkpoints, request.owner.clone()).await?;
        let row = self.floors.attachments.reserve(&job, &request.owner, named).await?;
        self.floors.show_job(row).await
    }

    async fn attach(&self, request: wire::AttachCheckpointsRequest) -> Result<wire::Attachment> {
        self.floors.admit()?;
        let job = JobId::new(request.job)?;
        let named = if request.checkpoints.is_empty() {
            self.reserved(&job).await?
        } else {
            self.named(request.checkpoints, request.owner.clone()).await?
        };
        let mut checkpoints = Vec::with_capacity(named.len());
        let mut waited_for = Vec::new();
        for (record, subdir) in named {
            let record = if request.lazy {
                let (record, obstacle) = self.floors.until_readable(&record.id).await?;
                waited_for.extend(obstacle.map(|why| format!("`{}`: {why}", record.name)));
                record
            } else {
                self.floors.until_ready(&record.id).await?
            };
            checkpoints.push((record, subdir));
        }
        let wanted = Wanted {
            job,
            owner: request.owner,
            checkpoints,
            target: (!request.target.is_empty()).then(|| PathBuf::from(request.target)),
            pid: request.pid,
        };
        // Cancelling the call must not leave an attach half-way: it goes on in a task of its own.
        let attachments = self.floors.attachments.clone();
        let row = tokio::spawn(async move { attachments.attach(wanted).await })
            .await
            .map_err(|error| Error::internal("attaching ended early").because(error))??;
        Ok(wire::Attachment { waited_for: waited_for.join("; "), ..self.floors.show_job(row).await? })
    }

    async fn detach(&self, request: wire::DetachCheckpointsRequest) -> Result<wire::Attachment> {
        let job = JobId::new(request.job)?;
        let attachments = self.floors.attachments.clone();
        let detaching = job.clone();
        let row = tokio::spawn(async move { attachments.detach(&detaching).await })
            .await
            .map_err(|error| Error::internal("detaching ended early").because(error))??;
        self.floors.show_job(row.ok_or_else(|| no_such_job(job.as_str()))?).await
    }

    async fn release(&self, request: wire::ReleaseJobRequest) -> Result<wire::ReleaseJobResponse> {
        let job = JobId::new(request.job)?;
        let attachments = self.floors.attachments.clone();
        tokio::spawn(async move { attachments.release(&job).await })
            .await
            .map_err(|error| Error::internal("releasing ended early").because(error))??;
        Ok(wire::ReleaseJobResponse {})
    }

    async fn get(&self, request: wire::GetJobRequest) -> Result<wire::Attachment> {
        let facts = self.floors.facts.clone();
        let find = move |tx: &rusqlite::Connection| {
            let row = rows::get(tx, &request.job)?.ok_or_else(|| no_such_job(&request.job))?;
            records::attachment(tx, row, &facts.catalogue)
        };
        self.floors.store.catalog().read(find).await
    }

    async fn list(&self) -> Result<wire::ListJobsResponse> {
        let facts = self.floors.facts.clone();
        let list = move |tx: &rusqlite::Connection| {
            let show = |row| records::attachment(tx, row, &facts.catalogue);
            rows::list(tx)?.into_iter().map(show).collect::<Result<Vec<_>>>()
        };
        let jobs = self.floors.store.catalog().read(list).await?;
        Ok(wire::ListJobsResponse { jobs })
    }
}

fn no_such_job(job: &str) -> Error {
    Error::not_found("NO_SUCH_JOB", format!("there is no job `{job}`"))
        .fact("job", job)
        .remedy("`ckptctl jobs` shows those that hold checkpoints")
}

#[tonic::async_trait]
impl wire::jobs_server::Jobs for Service {
    async fn reserve_checkpoints(
        &self,
        request: Request<wire::ReserveCheckpointsRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        self.reserve(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn attach_checkpoints(
        &self,
        request: Request<wire::AttachCheckpointsRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        self.attach(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn detach_checkpoints(
        &self,
        request: Request<wire::DetachCheckpointsRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        self.detach(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn release_job(
        &self,
        request: Request<wire::ReleaseJobRequest>,
    ) -> Result<Response<wire::ReleaseJobResponse>, Status> {
        self.release(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Result<Response<wire::Attachment>, Status> {
        self.get(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn list_jobs(
        &self,
        _request: Request<wire::ListJobsRequest>,
    ) -> Result<Response<wire::ListJobsResponse>, Status> {
        self.list().await.map(Response::new).map_err(status)
    }
}
