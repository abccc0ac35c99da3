//! Jobs and their views: rights in the catalog, sessions in memory, binds in the kernel.
//!
//! **Attach**: row `attaching` (durable, with the leases, so that nothing named can be removed), sessions of all checkpoints started or
//! found, the view built, row `attached` with how it will be found again, the view put in its place (and the row again, where it is built there: its
//! number is known only then). So a crash at no step leaves a mount that no row knows. A failure in between undoes what was done and restores the row that was there. **Detach** unmounts, then writes `reserved`. Requests of one job pass one gate, so they never overlap; the
//! start of a session passes the gate of its checkpoint. No gate is held while waiting for another job.
//!
//! **Sessions** start with the first job and stop with the last; what a job still has open is served until it is closed. A checkpoint
//! whose blobs are compact is hydrated in the background once it is served and ready.
//!
//! **Lazily attached** checkpoints are served from the listing on, which is durable before it is shown; their session goes on when they are
//! ready, and nothing is mounted anew.
//!
//! **Rights may end by themselves**: [`leases`]. A job **keeps its owner**: [`owner`].
//!
//! **After a restart** what somebody has held goes on as it was, and what is dead is made again: [`recover`].

mod adopt;
mod contents;
mod expiry;
mod leases;
mod owner;
mod recover;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::fuse::{self, ReadWaits};
use super::gates::Gates;
use super::keeping::{Keeping, Orphan, Outlive};
use super::placed::InPlace;
use super::strays::Strays;
use super::{Features, NamedView, Place, ReadBuffers, Reserved, Session, Views, features};
use crate::catalog::checkpoints::Record;
use crate::catalog::jobs::{self, JobRow, JobState, Lease};
use crate::error::{Error, Kind, Result};
use crate::in_place::on_another_thread as blocking;
use crate::ingest::Ingests;
use crate::limits;
use crate::names::{CheckpointName, EntryName, JobId};
use crate::source::Datastores;
use crate::store::Store;
use crate::store::read::Reader;
use crate::units::now_unix_ms;
pub use contents::EVICTED_MEANWHILE;
pub use owner::owner_of;
pub use recover::Reconciled;

/// Where a job inside a container expects its checkpoint.
pub const CONTAINER_TARGET: &str = "/opt/ml/checkpoint";

/// Directory among the sessions in which the kernel is asked what it offers: no id begins so.
const PROBE: &str = ".probe";

/// How long a stop waits for the threads of a session; they go on by themselves after that.
const STOP_PATIENCE: Duration = Duration::from_millis(200);

/// What a job asks for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The job.
    pub job: JobId,
    /// Who asks; may be empty.
    pub owner: String,
    /// Checkpoints that are ready or can be read while they fill, each with the directory it is to have (empty: decided here).
    pub checkpoints: Vec<(Record, String)>,
    /// Where; `None` for the default.
    pub target: Option<PathBuf>,
    /// Process whose mount namespace the target is in; 0: the host.
    pub pid: u32,
    /// When the right is to end by itself, in milliseconds since the epoch; `None`: when it is released.
    pub expires_ms: Option<i64>,
}

/// What of the kernel's offers is used; the rest has its next-best path.
#[derive(Clone, Copy, Debug)]
pub struct KernelWishes {
    /// The kernel reads whole blobs itself. Else every read goes through the daemon.
    pub passthrough: bool,
    /// A successor has requests handed out again that the daemon had taken. Else the kernel ends them with the daemon.
    pub resend: bool,
}

/// All attachments of the daemon; cheap to clone.
#[derive(Clone)]
pub struct Attachments(Arc<Shared>);

struct Shared {
    store: Store,
    ingests: Ingests,
    in_place: InPlace,
    sessions_dir: PathBuf,
    jobs_dir: PathBuf,
    reserved: Reserved,
    wishes: KernelWishes,
    features: Features,
    stack_depth: u32,
    buffers: Arc<ReadBuffers>,
    waits: ReadWaits,
    live: Mutex<HashMap<String, Arc<Served>>>,
    job_gates: Gates,
    session_gates: Gates,
    outlive: Option<Outlive>,
    /// What a predecessor has left, until it is adopted.
    orphans: Mutex<Vec<Arc<Orphan>>>,
    strays: Strays,
    reconciled: Mutex<Reconciled>,
    /// Told when a right has been given another end.
    ends_changed: Notify,
}

/// A live session and the jobs that see it.
struct Served {
    session: Mutex<Option<Session>>,
    jobs: Mutex<BTreeSet<String>>,
}

impl Attachments {
    /// Prepares the runtime directory, removes dead sessions, finds out what the kernel offers. Blocks.
    ///
    /// # Errors
    /// `LEDGER_TOO_NEW` (nothing is touched then), `NO_FUSE`, `FUSE_NOT_PERMITTED`, `CALL_REFUSED`, the I/O error.
    pub fn open(
        store: Store,
        ingests: Ingests,
        datastores: Arc<Datastores>,
        runtime_dir: &Path,
        wishes: KernelWishes,
        keeping: Keeping,
    ) -> Result<Self> {
        let sessions_dir = runtime_dir.join("sessions");
        let jobs_dir = runtime_dir.join("jobs");
        for directory in [runtime_dir, &jobs_dir] {
            std::fs::create_dir_all(directory).map_err(|error| Error::io("creating", directory, error))?;
        }
        let strays = Strays::of(runtime_dir);
        let (outlive, orphans, reconciled) = recover::look_around(runtime_dir, keeping, &strays)?;
        if strays.may_be() {
            store.punch_nothing();
        }
        super::prepare_sessions_dir(&sessions_dir)?;
        let features = super::probe(&sessions_dir.join(PROBE))?;
        let stack_depth = features::stack_depth(store.disk().root());
        let reserved = reserved(store.disk().root(), runtime_dir, &jobs_dir);
        Ok(Self(Arc::new(Shared {
            in_place: InPlace::new(store.catalog().clone(), datastores),
            store,
            ingests,
            sessions_dir,
            jobs_dir,
            reserved,
            wishes,
            features,
            stack_depth,
            buffers: Arc::new(ReadBuffers::new()),
            waits: fuse::no_waits(),
            live: Mutex::default(),
            job_gates: Gates::default(),
            session_gates: Gates::default(),
            outlive,
            orphans: Mutex::new(orphans.into_iter().map(Arc::new).collect()),
            strays,
            reconciled: Mutex::new(reconciled),
            ends_changed: Notify::new(),
        })))
    }

    /// What the kernel and the configuration give.
    pub fn features(&self) -> Features {
        let (offered, wishes) = (self.0.features, self.0.wishes);
        Features {
            passthrough: offered.passthrough && wishes.passthrough,
            resend: offered.resend && wishes.resend,
            ..offered
        }
    }

    /// Checkpoints served now.
    pub fn sessions(&self) -> usize {
        lock(&self.0.live).len()
    }

    /// Takes a durable right without a view, until `expires_ms` if that is given. A job that has the same right, or a view of the same, is
    /// left as it is, save that its right may now end later.
    ///
    /// # Errors
    /// `JOB_HAS_OTHERS`, `JOB_OF_ANOTHER`; those of the catalog.
    pub async fn reserve(
        &self,
        job: &JobId,
        owner: &str,
        wanted: Vec<(Record, String)>,
        expires_ms: Option<i64>,
    ) -> Result<JobRow> {
        let _gate = self.0.job_gates.pass(job.as_str()).await?;
        let leases = arrange(&wanted)?;
        if let Some(row) = self.row(job).await? {
            owner_of(Some(&row), owner)?;
            return if same_checkpoints(&row.leases, &wanted) {
                self.extend(row, expires_ms).await
            } else {
                Err(has_others(&row))
            };
        }
        let row = JobRow {
            job: job.to_string(),
            owner: owner.to_owned(),
            state: JobState::Reserved,
            target: String::new(),
            pid: 0,
            mounted: None,
            created_ms: now_unix_ms(),
            expires_ms,
            leases,
        };
        self.put_checked(&row).await?;
        self.0.ends_changed.notify_one();
        Ok(row)
    }

    /// Makes a job see checkpoints; stands on return.
    ///
    /// # Errors
    /// `TARGET_*`, `NO_SUCH_PROCESS`, `DUPLICATE_DIRECTORY`, `JOB_ATTACHED_ELSEWHERE`, `JOB_HAS_OTHERS`, `JOB_OF_ANOTHER`,
    /// `DATASTORE_*`, [`EVICTED_MEANWHILE`]; nothing is mounted then.
    pub async fn attach(&self, wanted: Wanted) -> Result<JobRow> {
        let _gate = self.0.job_gates.pass(wanted.job.as_str()).await?;
        let mut leases = arrange(&wanted.checkpoints)?;
        let before = self.row(&wanted.job).await?;
        let owner = owner_of(before.as_ref(), &wanted.owner)?;
        let (target, made) = self.target_of(&wanted)?;
        if let Some(row) = &before {
            if !same_checkpoints(&row.leases, &wanted.checkpoints) {
                return Err(has_others(row));
            }
            leases.clone_from(&row.leases);
            if row.state == JobState::Attached {
                if row.target != target.to_string_lossy() || row.pid != wanted.pid {
                    return Err(attached_elsewhere(row));
                }
                if stands(row).await? {
                    return self.extend(row.clone(), wanted.expires_ms).await;
                }
            }
        }
        for (record, _) in &wanted.checkpoints {
            self.0.in_place.check(record).await?;
        }
        let row = JobRow {
            job: wanted.job.to_string(),
            owner,
            state: JobState::Attaching,
            target: target.to_string_lossy().into_owned(),
            pid: wanted.pid,
            mounted: None,
            created_ms: before.as_ref().map_or_else(now_unix_ms, |row| row.created_ms),
            expires_ms: match &before {
                Some(row) => expiry::extended(row.expires_ms, wanted.expires_ms),
                None => wanted.expires_ms,
            },
            leases,
        };
        if made {
            std::fs::create_dir_all(&target).map_err(|error| Error::io("creating the target", &target, error))?;
        }
        self.put_checked(&row).await?;
        self.0.ends_changed.notify_one();
        let mounted = async { self.mount(&row, &self.still_here(&wanted.checkpoints).await?).await };
        match mounted.await {
            Ok(row) => Ok(row),
            Err(error) => {
                self.take_back(&row, before).await?;
                Err(error)
            }
        }
    }

    /// Takes a job's view away and keeps its right; `None` for a job that is not known, or not `owner`'s if that is given.
    ///
    /// # Errors
    /// `TARGET_COVERED`, or what the kernel says; the row stays as it was then.
    pub async fn detach(&self, job: &JobId, owner: Option<&str>) -> Result<Option<JobRow>> {
        let _gate = self.0.job_gates.pass(job.as_str()).await?;
        let Some(row) = self.row_of(job, owner).await? else { return Ok(None) };
        self.unmount(&row).await.map(Some)
    }

    /// Detaches a job and forgets it; one that is not known, or not `owner`'s if that is given, is forgotten already.
    ///
    /// # Errors
    /// As [`Attachments::detach`].
    pub async fn release(&self, job: &JobId, owner: Option<&str>) -> Result<()> {
        let _gate = self.0.job_gates.pass(job.as_str()).await?;
        let Some(row) = self.row_of(job, owner).await? else { return Ok(()) };
        self.unmount(&row).await?;
        let job = job.to_string();
        self.0.store.catalog().write(move |tx| jobs::delete(tx, &job, now_unix_ms())).await
    }

    /// Takes every view and session down: for a private instance that ends.
    ///
    /// # Errors
    /// The first failure; the rest is taken down all the same.
    pub async fn take_down(&self) -> Result<()> {
        let mut outcome = Ok(());
        for row in self.0.store.catalog().read(jobs::list).await? {
            let released = self.release(&JobId::new(row.job)?, None).await;
            outcome = outcome.and(released);
        }
        let dir = self.0.sessions_dir.clone();
        let released = blocking(move || super::sessions::release_sessions_dir(&dir)).await;
        outcome.and(released)
    }

    /// Gives up the sessions directory if nothing is served: a daemon that nobody needs leaves no mount.
    pub async fn leave(&self) {
        if self.sessions() == 0 {
            let dir = self.0.sessions_dir.clone();
            if let Err(error) = blocking(move || super::sessions::release_sessions_dir(&dir)).await {
                tracing::debug!(error = %error.report(), "the sessions directory stays mounted");
            }
        }
    }

    async fn row(&self, job: &JobId) -> Result<Option<JobRow>> {
        let job = job.to_string();
        self.0.store.catalog().read(move |tx| jobs::get(tx, &job)).await
    }

    async fn put(&self, row: &JobRow) -> Result<()> {
        let row = row.clone();
        self.0.store.catalog().write(move |tx| jobs::put(tx, &row)).await
    }

    async fn put_checked(&self, row: &JobRow) -> Result<()> {
        let row = row.clone();
        self.0.store.catalog().write(move |tx| jobs::put_checked(tx, &row, now_unix_ms())).await
    }

    /// The target, and whether it is ours to make.
    fn target_of(&self, wanted: &Wanted) -> Result<(PathBuf, bool)> {
        match &wanted.target {
            Some(target) if target.is_absolute() => Ok((target.clone(), false)),
            Some(target) => Err(Error::invalid(
                "TARGET_NOT_ABSOLUTE",
                format!("the target {} is not an absolute path", target.display()),
            )
            .remedy("give a path that begins with `/`")),
            None if wanted.pid != 0 => Ok((PathBuf::from(CONTAINER_TARGET), false)),
            None => Ok((self.0.jobs_dir.join(wanted.job.as_str()).join("checkpoint"), true)),
        }
    }

    async fn mount(&self, row: &JobRow, records: &[(Record, String)]) -> Result<JobRow> {
        let mut served = Vec::new();
        for (record, _) in records {
            served.push(self.served(record, &row.job).await?);
        }
        let place = Place { target: PathBuf::from(&row.target), pid: (row.pid != 0).then_some(row.pid) };
        let subdirs: Vec<String> = row.leases.iter().map(|lease| lease.subdir.clone()).collect();
        let reserved = self.0.reserved.clone();
        let view = blocking(move || super::prepare(&place, views(&served, &subdirs)?, &reserved)).await?;
        let foretold = view.mounted().clone();
        let row = self.note_mounted(row, &foretold).await?;
        let mounted = blocking(move || view.show()).await?;
        if mounted == foretold {
            return Ok(row);
        }
        // It had no number before it was seen. If that cannot be noted it must not stand.
        let noted = self.note_mounted(&row, &mounted).await;
        if noted.is_err() {
            blocking(move || super::detach(&mounted)).await?;
        }
        noted
    }

    async fn note_mounted(&self, row: &JobRow, mounted: &super::Mounted) -> Result<JobRow> {
        let mounted = serde_json::to_string(mounted)
            .map_err(|error| Error::internal("encoding what was mounted").because(error))?;
        let row = JobRow { state: JobState::Attached, mounted: Some(mounted), ..row.clone() };
        self.put(&row).await?;
        Ok(row)
    }

    /// Undoes an attach that failed.
    async fn take_back(&self, row: &JobRow, before: Option<JobRow>) -> Result<()> {
        self.leave_sessions(row).await;
        self.drop_default_target(row);
        match before {
            Some(before) => self.put(&before).await,
            None => {
                let job = row.job.clone();
                self.0.store.catalog().write(move |tx| jobs::delete(tx, &job, now_unix_ms())).await
            }
        }
    }

    async fn unmount(&self, row: &JobRow) -> Result<JobRow> {
        if let Some(mounted) = &row.mounted {
            let mounted: super::Mounted = serde_json::from_str(mounted).map_err(|error| {
                Error::corrupt("CATALOG_DAMAGED", format!("the row of job {} is damaged", row.job)).because(error)
            })?;
            blocking(move || super::detach(&mounted)).await?;
        }
        self.drop_default_target(row);
        let after = JobRow { state: JobState::Reserved, target: String::new(), pid: 0, mounted: None, ..row.clone() };
        self.put(&after).await?;
        self.leave_sessions(row).await;
        Ok(after)
    }

    /// The default target's directories are ours; anything else at a target is the caller's.
    fn drop_default_target(&self, row: &JobRow) {
        let own = self.0.jobs_dir.join(&row.job);
        if Path::new(&row.target).starts_with(&own) {
            let _ = std::fs::remove_dir(&row.target);
            let _ = std::fs::remove_dir(own);
        }
    }

    /// The live session of a checkpoint, started if need be, with `job` noted as seeing it.
    async fn served(&self, record: &Record, job: &str) -> Result<Arc<Served>> {
        let _gate = self.0.session_gates.pass(&record.id).await?;
        if let Some(served) = lock(&self.0.live).get(&record.id) {
            lock(&served.jobs).insert(job.to_owned());
            return Ok(served.clone());
        }
        if let Some(served) = self.adopt_for(record, job).await? {
            return Ok(served);
        }
        let served = self.start_session(record, job).await?;
        lock(&self.0.live).insert(record.id.clone(), served.clone());
        Ok(served)
    }

    async fn start_session(&self, record: &Record, job: &str) -> Result<Arc<Served>> {
        let (tree, content, reader) = self.content_of(record).await?;
        let config = self.session_config(record);
        let session = blocking(move || Session::start(config, tree, content)).await?;
        Ok(self.serve(record, session, reader, BTreeSet::from([job.to_owned()])))
    }

    /// A session that runs, seen by `jobs`; what is compact of it is made whole.
    fn serve(
        &self,
        record: &Record,
        session: Session,
        reader: Option<Arc<Reader>>,
        jobs: BTreeSet<String>,
    ) -> Arc<Served> {
        if let (Some(reader), Some(digest)) = (reader, record.ready_manifest()) {
            self.hydrate(record.id.clone(), digest, reader);
        }
        Arc::new(Served { session: Mutex::new(Some(session)), jobs: Mutex::new(jobs) })
    }

    /// Takes a job off its sessions and stops those without jobs.
    async fn leave_sessions(&self, row: &JobRow) {
        for lease in &row.leases {
            let Ok(_gate) = self.0.session_gates.pass(&lease.checkpoint).await else { return };
            let stopped = {
                let mut live = lock(&self.0.live);
                let unused = live.get(&lease.checkpoint).is_some_and(|served| {
                    let mut jobs = lock(&served.jobs);
                    jobs.remove(&row.job);
                    jobs.is_empty()
                });
                if unused { live.remove(&lease.checkpoint) } else { None }
            };
            let Some(session) = stopped.and_then(|served| lock(&served.session).take()) else { continue };
            self.keep_order(&lease.checkpoint, session.read_order()).await;
            if let Err(error) = blocking(move || session.stop(STOP_PATIENCE)).await {
                tracing::warn!(checkpoint = lease.checkpoint, error = %error.report(), "stopping a session failed");
            }
        }
    }
}

/// What no target may be in. Without the links in it: the paths of targets have none.
fn reserved(state_dir: &Path, runtime_dir: &Path, jobs_dir: &Path) -> Reserved {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    Reserved { directories: vec![real(state_dir), real(runtime_dir)], free: Some(real(jobs_dir)) }
}

/// Whether the view of a row is still there: somebody may have unmounted it.
async fn stands(row: &JobRow) -> Result<bool> {
    let mounted = row.mounted.as_deref().and_then(|text| serde_json::from_str::<super::Mounted>(text).ok());
    match mounted {
        Some(mounted) => blocking(move || super::standing(&mounted)).await,
        None => Ok(false),
    }
}

fn views(served: &[Arc<Served>], subdirs: &[String]) -> Result<Views> {
    let mut originals = Vec::new();
    for served in served {
        let session = lock(&served.session);
        let session = session.as_ref().ok_or_else(|| {
            Error::unavailable("SESSION_STOPPED", "the session was stopped meanwhile").remedy("attach again")
        })?;
        originals.push(session.original()?);
    }
    if let [subdir] = subdirs
        && subdir.is_empty()
        && let Some(original) = originals.pop()
    {
        return Ok(Views::One(original));
    }
    let named = originals
        .into_iter()
        .zip(subdirs)
        .map(|(original, subdir)| Ok(NamedView { name: EntryName::new(subdir.as_bytes())?, original }));
    named.collect::<Result<_>>().map(Views::Several)
}

/// Decides the directory of each checkpoint: none for one alone, its name or the given one for several.
fn arrange(wanted: &[(Record, String)]) -> Result<Vec<Lease>> {
    if wanted.is_empty() {
        return Err(Error::invalid("NO_CHECKPOINT", "the request names no checkpoint").remedy("name at least one"));
    }
    if wanted.len() > limits::CHECKPOINTS_PER_JOB {
        return Err(Error::new(
            Kind::NoSpace,
            "TOO_MANY_CHECKPOINTS",
            format!(
                "the job asks for {} checkpoints, at most {} are allowed",
                wanted.len(),
                limits::CHECKPOINTS_PER_JOB
            ),
        ));
    }
    let alone = wanted.len() == 1;
    let mut leases: Vec<Lease> = Vec::new();
    for (record, subdir) in wanted {
        let subdir = match subdir.as_str() {
            "" if alone => String::new(),
            "" => CheckpointName::new(record.name.clone())?.as_directory(),
            given => given.to_owned(),
        };
        if !subdir.is_empty() {
            EntryName::new(subdir.as_bytes())?;
        }
        if leases.iter().any(|lease| lease.subdir == subdir) {
            return Err(Error::invalid(
                "DUPLICATE_DIRECTORY",
                format!("two checkpoints would both be at `{subdir}` below the target"),
            )
            .fact("directory", subdir)
            .remedy("give one of them another `subdir`, or rename one"));
        }
        leases.push(Lease { checkpoint: record.id.clone(), subdir });
    }
    Ok(leases)
}

/// Whether a job asks for what it holds. A directory that the request leaves open is the one it got, whatever the checkpoint is called by now.
fn same_checkpoints(held: &[Lease], wanted: &[(Record, String)]) -> bool {
    held.len() == wanted.len()
        && held.iter().zip(wanted).all(|(lease, (record, subdir))| {
            lease.checkpoint == record.id && (subdir.is_empty() || *subdir == lease.subdir)
        })
}

fn has_others(row: &JobRow) -> Error {
    let held: Vec<_> = row.leases.iter().map(|lease| lease.checkpoint.as_str()).collect();
    Error::new(
        Kind::AlreadyExists,
        "JOB_HAS_OTHERS",
        format!("the job {} has a right to other checkpoints already: {}", row.job, held.join(", ")),
    )
    .fact("job", &row.job)
    .remedy(format!("`ckptctl release {}` first, or use another job id", row.job))
}

fn attached_elsewhere(row: &JobRow) -> Error {
    Error::new(
        Kind::AlreadyExists,
        "JOB_ATTACHED_ELSEWHERE",
        format!("the job {} is attached at {} already", row.job, row.target),
    )
    .fact("job", &row.job)
    .fact("target", &row.target)
    .remedy(format!("`ckptctl detach {}` first", row.job))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
