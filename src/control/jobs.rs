//! The service `Jobs`.

use std::path::PathBuf;

use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::refusal::status;
use super::{Floors, records, resolve, wire};
use crate::catalog::checkpoints::{self as checkpoint_rows, Record, Seen};
use crate::catalog::jobs as rows;
use crate::error::{Error, Result};
use crate::names::JobId;
use crate::serve::attachments::{EVICTED_MEANWHILE, Wanted, owner_of};
use crate::units::{now_unix_ms, rfc3339};

/// The end of the year 9999: the last time that RFC 3339 can write.
const LAST_UNIX_MS: i64 = 253_402_300_799_999;

pub(super) struct Service {
    floors: Floors,
}

impl Service {
    pub(super) fn new(floors: Floors) -> Self {
        Self { floors }
    }

    /// Records of what a request names, with their directories: a job sees its owner's and public ones, and nothing else.
    async fn named(
        &self,
        refs: Vec<wire::CheckpointRef>,
        owner: String,
        caller: &Caller,
    ) -> Result<Vec<(Record, String)>> {
        let (seen, caller) = (Seen::By(owner), caller.sees());
        let find = move |tx: &rusqlite::Connection| {
            let one = |wanted: wire::CheckpointRef| {
                let found = resolve::record(tx, &wanted.checkpoint, &seen, wanted.public);
                let found = found.map_err(|error| of_another(tx, &wanted, &caller).unwrap_or(error))?;
                Ok((found, wanted.subdir))
            };
            refs.into_iter().map(one).collect()
        };
        self.floors.store.catalog().read(find).await
    }

    /// Whose a job is, or is to be.
    ///
    /// # Errors
    /// `NOT_YOURS`, `JOB_OF_ANOTHER`; `NO_SUCH_JOB` for a job that the caller does not see.
    async fn owner_of(&self, job: &JobId, asked: String, caller: &Caller) -> Result<String> {
        let asked = caller.owner_of_new(asked, false)?;
        let key = job.to_string();
        let known = self.floors.store.catalog().read(move |tx| rows::get(tx, &key)).await?;
        if known.as_ref().is_some_and(|row| !caller.is_owner(&row.owner)) {
            return Err(no_such_job(job.as_str()));
        }
        owner_of(known.as_ref(), &asked)
    }

    /// What a job has reserved, which must be for its owner to see, as what it names is.
    async fn reserved(&self, job: &JobId, owner: String) -> Result<Vec<(Record, String)>> {
        let (job, seen) = (job.to_string(), Seen::By(owner));
        let find = move |tx: &rusqlite::Connection| {
            let Some(row) = rows::get(tx, &job)? else { return Ok(Vec::new()) };
            let record = |lease: rows::Lease| match checkpoint_rows::get(tx, &lease.checkpoint)? {
                Some(record) if !seen.includes(&record) => Err(reserved_by_another(&row.job)),
                found => Ok(found.map(|record| (record, lease.subdir.clone()))),
            };
            row.leases.iter().cloned().filter_map(|lease| record(lease).transpose()).collect()
        };
        self.floors.store.catalog().read(find).await
    }

    async fn reserve(&self, request: wire::ReserveCheckpointsRequest, caller: &Caller) -> Result<wire::Attachment> {
        self.floors.admit()?;
        let job = JobId::new(request.job)?;
        let expires_ms = end_of_right(request.expires_unix_ms)?;
        let owner = self.owner_of(&job, request.owner, caller).await?;
        let named = self.named(request.checkpoints, owner.clone(), caller).await?;
        let records: Vec<Record> = named.iter().map(|(record, _)| record.clone()).collect();
        let row = self.floors.attachments.reserve(&job, &owner, named, expires_ms).await?;
        for record in records {
            self.floors.bring_back(&self.floors.find_again(&record.id).await?).await?;
        }
        self.floors.show_job(row).await
    }

    async fn renew(&self, request: wire::RenewLeaseRequest, caller: &Caller) -> Result<wire::Attachment> {
        let job = JobId::new(request.job)?;
        let expires_ms = end_of_right(request.expires_unix_ms)?;
        let row = self.floors.attachments.renew(&job, caller.owner.as_deref(), expires_ms).await?;
        self.floors.show_job(row.ok_or_else(|| no_such_job(job.as_str()))?).await
    }

    async fn attach(&self, request: wire::AttachCheckpointsRequest, caller: &Caller) -> Result<wire::Attachment> {
        self.floors.admit()?;
        let job = JobId::new(request.job)?;
        let expires_ms = end_of_right(request.expires_unix_ms)?;
        let owner = self.owner_of(&job, request.owner, caller).await?;
        let named = if request.checkpoints.is_empty() {
            self.reserved(&job, owner.clone()).await?
        } else {
            self.named(request.checkpoints, owner.clone(), caller).await?
        };
        // What is here stays while others are waited for.
        let _kept = self.floors.retention.keep(named.iter().map(|(record, _)| record.id.clone()).collect());
        for (record, _) in &named {
            self.floors.bring_back(record).await?;
        }
        let wanted = Wanted {
            job,
            owner,
            checkpoints: Vec::new(),
            target: (!request.target.is_empty()).then(|| PathBuf::from(request.target)),
            pid: request.pid,
            expires_ms,
        };
        loop {
            let (checkpoints, waited_for) = self.until_attachable(&named, request.lazy).await?;
            let wanted = Wanted { checkpoints, ..wanted.clone() };
            // Cancelling the call must not leave an attach half-way: it goes on in a task of its own.
            let attachments = self.floors.attachments.clone();
            let row = tokio::spawn(async move { attachments.attach(wanted).await })
                .await
                .map_err(|error| Error::internal("attaching ended early").because(error))?;
            match row {
                Err(error) if error.reason() == EVICTED_MEANWHILE => {}
                row => return Ok(wire::Attachment { waited_for, ..self.floors.show_job(row?).await? }),
            }
        }
    }

    /// Waits until all can be attached, and says for which it was waited until they were ready though that was not asked for.
    async fn until_attachable(
        &self,
        named: &[(Record, String)],
        lazy: bool,
    ) -> Result<(Vec<(Record, String)>, String)> {
        let mut checkpoints = Vec::with_capacity(named.len());
        let mut waited_for = Vec::new();
        for (record, subdir) in named {
            let record = if lazy {
                let (record, obstacle) = self.floors.until_readable(&record.id).await?;
                waited_for.extend(obstacle.map(|why| format!("`{}`: {why}", record.name)));
                record
            } else {
                self.floors.until_ready(&record.id).await?
            };
            checkpoints.push((record, subdir.clone()));
        }
        Ok((checkpoints, waited_for.join("; ")))
    }

    async fn detach(&self, request: wire::DetachCheckpointsRequest, caller: &Caller) -> Result<wire::Attachment> {
        let job = JobId::new(request.job)?;
        let attachments = self.floors.attachments.clone();
        let (detaching, owner) = (job.clone(), caller.owner.clone());
        let row = tokio::spawn(async move { attachments.detach(&detaching, owner.as_deref()).await })
            .await
            .map_err(|error| Error::internal("detaching ended early").because(error))??;
        self.floors.show_job(row.ok_or_else(|| no_such_job(job.as_str()))?).await
    }

    async fn release(&self, request: wire::ReleaseJobRequest, caller: &Caller) -> Result<wire::ReleaseJobResponse> {
        let job = JobId::new(request.job)?;
        let (attachments, owner) = (self.floors.attachments.clone(), caller.owner.clone());
        // Of a job that is not there, or another's, nothing is left to release, and the answer is the same.
        tokio::spawn(async move { attachments.release(&job, owner.as_deref()).await })
            .await
            .map_err(|error| Error::internal("releasing ended early").because(error))??;
        self.floors.retention.wake();
        Ok(wire::ReleaseJobResponse {})
    }

    async fn get(&self, request: wire::GetJobRequest, caller: Caller) -> Result<wire::Attachment> {
        let facts = self.floors.facts.clone();
        let find = move |tx: &rusqlite::Connection| {
            let row = rows::get(tx, &request.job)?.filter(|row| caller.is_owner(&row.owner));
            let row = row.ok_or_else(|| no_such_job(&request.job))?;
            records::attachment(tx, row, &facts.catalogue)
        };
        self.floors.store.catalog().read(find).await
    }

    async fn list(&self, caller: Caller) -> Result<wire::ListJobsResponse> {
        let facts = self.floors.facts.clone();
        let list = move |tx: &rusqlite::Connection| {
            let show = |row| records::attachment(tx, row, &facts.catalogue);
            let seen = rows::list(tx)?.into_iter().filter(|row| caller.is_owner(&row.owner));
            seen.map(show).collect::<Result<Vec<_>>>()
        };
        let jobs = self.floors.store.catalog().read(list).await?;
        Ok(wire::ListJobsResponse { jobs })
    }
}

/// When a right is to end by itself, as a request says it: 0 for when it is released.
fn end_of_right(expires_unix_ms: i64) -> Result<Option<i64>> {
    let refused = |reason, why: String| {
        Err(Error::invalid(reason, why)
            .fact("now_unix_ms", now_unix_ms())
            .remedy("give a later time by the clock of this host, or 0 for a right that lasts until it is released"))
    };
    match expires_unix_ms {
        0 => Ok(None),
        passed if passed <= now_unix_ms() => {
            refused("EXPIRY_PASSED", format!("the right would end at {}, which has passed", rfc3339(passed)))
        }
        LAST_UNIX_MS.. => refused("EXPIRY_TOO_LATE", "the right would end after the year 9999".to_owned()),
        later => Ok(Some(later)),
    }
}

/// Why a job is not given what the caller sees: it belongs to somebody else than the job.
fn of_another(tx: &rusqlite::Connection, wanted: &wire::CheckpointRef, seen: &Seen) -> Option<Error> {
    let record = resolve::record(tx, &wanted.checkpoint, seen, wanted.public).ok()?;
    let message = format!(
        "the checkpoint `{}` belongs to `{}`, and a job is given its owner's and public ones only",
        record.name, record.owner
    );
    let error = Error::not_found("NOT_THE_JOBS_OWNERS", message).fact("checkpoint", &record.id);
    Some(error.remedy(format!("name the job's owner: `--owner {}`", record.owner)))
}

/// Why a job is not given what it has a right to: an older version of ckptd forgot whose the job was.
fn reserved_by_another(job: &str) -> Error {
    let message = format!("the job {job} has a right to a checkpoint that is not for its owner to see");
    let error = Error::not_found("NOT_THE_JOBS_OWNERS", message).fact("job", job);
    error.remedy(format!("`ckptctl release {job}`, then attach it for the owner of the checkpoint"))
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
        let caller = Caller::of(&request).map_err(status)?;
        self.reserve(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn attach_checkpoints(
        &self,
        request: Request<wire::AttachCheckpointsRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.attach(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn renew_lease(
        &self,
        request: Request<wire::RenewLeaseRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.renew(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn detach_checkpoints(
        &self,
        request: Request<wire::DetachCheckpointsRequest>,
    ) -> Result<Response<wire::Attachment>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.detach(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn release_job(
        &self,
        request: Request<wire::ReleaseJobRequest>,
    ) -> Result<Response<wire::ReleaseJobResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.release(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Result<Response<wire::Attachment>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.get(request.into_inner(), caller).await.map(Response::new).map_err(status)
    }

    async fn list_jobs(
        &self,
        request: Request<wire::ListJobsRequest>,
    ) -> Result<Response<wire::ListJobsResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.list(caller).await.map(Response::new).map_err(status)
    }
}
