//! What a capture is asked for, checked: the directory, how the checkpoint is called, and the process whose path it is.
//!
//! A process is recorded as what it is and not by its number alone, so that neither a retry nor the next start of the daemon takes another for
//! it. A call that is repeated with its id finds the first one's record, also when the process has ended meanwhile.

use std::path::{Component, Path};
use std::sync::Arc;

use super::caller::Caller;
use super::checkpoints::{known, new_record};
use super::{Floors, wire};
use crate::catalog::checkpoints::{Origin, Record};
use crate::error::{Error, Result};
use crate::names::{JobId, show_bytes};
use crate::source::{Credentials, PROCESS_OPTION, ProcessId, Source, SourceKind};

/// Where a job inside a container leaves its output.
const CONTAINER_OUTPUT: &str = "/opt/ml/output";

/// The record that is to be; where it is new also its source, which holds the directory from now on.
///
/// # Errors
/// `BAD_JOB_ID`, `BAD_WORKER`, `PATH_NOT_ABSOLUTE`, `UNKNOWN_OPTION`, and what the source's first look fails with. There is no record then.
pub(super) async fn record_of(
    floors: &Floors,
    request: wire::CaptureOutputRequest,
    caller: &Caller,
) -> Result<(Record, Option<Arc<dyn Source>>)> {
    let job = JobId::new(request.job)?;
    let name = if request.name.is_empty() {
        let job_name = if request.job_name.is_empty() { job.to_string() } else { request.job_name };
        name_of(&job_name, request.worker, request.workers)?
    } else {
        request.name
    };
    let directory = directory_of(request.directory, request.pid)?;
    if let Some(unknown) = request.options.keys().find(|key| request.pid != 0 || *key != "extract") {
        return Err(Error::invalid(
            "UNKNOWN_OPTION",
            format!("capturing has no option `{}`", show_bytes(unknown.as_bytes())),
        )
        .remedy("the only one is `extract`, for a path of this host"));
    }
    let owner = caller.owner_of_new(request.owner, false)?;
    let origin = Origin {
        kind: SourceKind::Directory.to_string(),
        uri: directory,
        options: request.options.into_iter().collect(),
    };
    let mut record = new_record(request.id, name, owner, false, origin)?;
    let (id, seen) = (record.id.clone(), caller.sees());
    let known = floors.store.catalog().read(move |tx| known(tx, &id, &seen)).await?;
    if request.pid != 0 {
        let process = match known.as_ref().and_then(|known| process_of(known, request.pid)) {
            Some(first) => first,
            None => ProcessId::of(request.pid)?.to_string(),
        };
        record.origin.options.insert(PROCESS_OPTION.to_owned(), process);
    }
    if known.is_some() {
        return Ok((record, None));
    }
    let source = floors.ingests.source(&record, &Credentials::default())?;
    source.check().await?;
    Ok((record, Some(source)))
}

/// The process of a record, if its number is `pid`.
fn process_of(record: &Record, pid: u32) -> Option<String> {
    let process = record.origin.options.get(PROCESS_OPTION)?;
    process.parse::<ProcessId>().is_ok_and(|process| process.pid == pid).then(|| process.clone())
}

/// # Errors
/// `PATH_NOT_ABSOLUTE`.
fn directory_of(asked: String, pid: u32) -> Result<String> {
    if asked.is_empty() && pid != 0 {
        return Ok(CONTAINER_OUTPUT.to_owned());
    }
    let plain = |component: Component<'_>| matches!(component, Component::RootDir | Component::Normal(_));
    let path = Path::new(&asked);
    if path.is_absolute() && path.components().all(plain) && !asked.contains('\0') {
        return Ok(asked);
    }
    let shown = show_bytes(asked.as_bytes());
    Err(Error::invalid("PATH_NOT_ABSOLUTE", format!("the directory `{shown}` is not an absolute path without `..`"))
        .remedy("give a path that begins with `/`"))
}

/// As the platform calls a job's output.
///
/// # Errors
/// `BAD_WORKER`.
fn name_of(job_name: &str, worker: u32, workers: u32) -> Result<String> {
    match workers {
        0 | 1 => Ok(format!("Job - {job_name}")),
        _ if (1..=workers).contains(&worker) => Ok(format!("Job - {job_name} Worker {worker}")),
        _ => Err(Error::invalid("BAD_WORKER", format!("there is no worker {worker} of {workers}"))
            .remedy("number the workers from 1, or give a name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_called_as_on_the_platform() {
        assert_eq!(name_of("Train", 0, 0).unwrap(), "Job - Train");
        assert_eq!(name_of("Train", 1, 1).unwrap(), "Job - Train");
        assert_eq!(name_of("Train", 3, 4).unwrap(), "Job - Train Worker 3");
        for worker in [0, 5] {
            assert_eq!(name_of("Train", worker, 4).unwrap_err().reason(), "BAD_WORKER");
        }
    }

    #[test]
    fn a_directory_is_absolute_and_does_not_climb() {
        assert_eq!(directory_of(String::new(), 7).unwrap(), CONTAINER_OUTPUT);
        for good in ["/", "/a", "/a/b/", "/a//b", "/a/./b", "/...", "/a\nb"] {
            assert_eq!(directory_of(good.to_owned(), 0).unwrap(), good);
        }
        for bad in ["", "a", "./a", "/..", "/a/../b", "../a", "/a\0b"] {
            assert_eq!(directory_of(bad.to_owned(), 0).unwrap_err().reason(), "PATH_NOT_ABSOLUTE", "{bad:?}");
        }
    }
}
