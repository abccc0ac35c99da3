//! Whose a job is: whoever's it was when it was first known, until it is released.
//!
//! Asked before anything is looked for, and again behind the job's gate, since the job may have been released and be somebody else's by then.

use super::Attachments;
use crate::catalog::jobs::JobRow;
use crate::error::{Error, Kind, Result};
use crate::names::JobId;

/// The owner of a job that `asked` is asked for: the one it has, if there is such a job; naming none asks for that one.
///
/// # Errors
/// `JOB_OF_ANOTHER`.
pub fn owner_of(known: Option<&JobRow>, asked: &str) -> Result<String> {
    match known {
        Some(row) if !asked.is_empty() && row.owner != asked => Err(of_another(&row.job, asked)),
        Some(row) => Ok(row.owner.clone()),
        None => Ok(asked.to_owned()),
    }
}

impl Attachments {
    /// The row of a job, if it is `owner`'s; `None` for an owner: whoever's it is.
    pub(super) async fn row_of(&self, job: &JobId, owner: Option<&str>) -> Result<Option<JobRow>> {
        Ok(self.row(job).await?.filter(|row| owner.is_none_or(|owner| row.owner == owner)))
    }
}

fn of_another(job: &str, asked: &str) -> Error {
    Error::new(Kind::AlreadyExists, "JOB_OF_ANOTHER", format!("the job {job} is not one of `{asked}`"))
        .fact("job", job)
        .remedy(format!("`ckptctl release {job}` first, use another job id, or name no owner"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::jobs::JobState;

    #[test]
    fn a_job_keeps_its_owner() {
        let row = |owner: &str| JobRow {
            job: "j".into(),
            owner: owner.into(),
            state: JobState::Reserved,
            target: String::new(),
            pid: 0,
            mounted: None,
            created_ms: 0,
            expires_ms: None,
            leases: Vec::new(),
        };
        for (known, asked, owner) in [
            (None, "", Some("")),
            (None, "a", Some("a")),
            (Some("a"), "", Some("a")),
            (Some("a"), "a", Some("a")),
            (Some("a"), "b", None),
            (Some(""), "", Some("")),
            (Some(""), "b", None),
        ] {
            let found = owner_of(known.map(row).as_ref(), asked);
            assert_eq!(found.as_ref().ok().map(String::as_str), owner, "{known:?} {asked}");
            assert!(found.is_ok() || found.unwrap_err().reason() == "JOB_OF_ANOTHER");
        }
    }
}
