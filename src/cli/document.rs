//! Answers as JSON: keys that scripts rely on. Keys may be added, never renamed or dropped.
//!
//! Sizes are bytes, times RFC 3339 in UTC. `fill`, `error`, `transfer` and `expires_at` are null where they do not apply; texts are never null, an empty
//! one means that there is none (yet).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::control::wire;
use crate::error::Kind;
use crate::units;

mod scrub;
mod space;
pub(super) use scrub::Scrub;
pub(super) use space::{Evicted, Usage};

/// A state of a checkpoint in the word of its wire name.
pub(super) fn checkpoint_state(state: wire::CheckpointState) -> &'static str {
    match state {
        wire::CheckpointState::Unspecified => "unspecified",
        wire::CheckpointState::New => "new",
        wire::CheckpointState::Filling => "filling",
        wire::CheckpointState::Ready => "ready",
        wire::CheckpointState::Evicted => "evicted",
        wire::CheckpointState::Failed => "failed",
        wire::CheckpointState::Removing => "removing",
    }
}

/// A state of a job's right in the word of its wire name.
pub(super) fn attachment_state(state: wire::AttachmentState) -> &'static str {
    match state {
        wire::AttachmentState::Unspecified => "unspecified",
        wire::AttachmentState::Reserved => "reserved",
        wire::AttachmentState::Attached => "attached",
        wire::AttachmentState::Lost => "lost",
    }
}

/// A checkpoint's record.
#[derive(Serialize)]
pub(super) struct Checkpoint<'a> {
    id: &'a str,
    name: &'a str,
    owner: &'a str,
    public: bool,
    state: &'static str,
    digest: &'a str,
    revision: &'a str,
    source: Source<'a>,
    files: u64,
    logical_bytes: u64,
    unique_bytes: u64,
    shared_bytes: u64,
    physical_bytes: u64,
    pinned: bool,
    used_at: Option<String>,
    fill: Option<Fill>,
    error: Option<Failure<'a>>,
    created_at: String,
    transfer: Option<Transfer<'a>>,
}

#[derive(Serialize)]
struct Transfer<'a> {
    url: &'a str,
    token: &'a str,
}

#[derive(Serialize)]
struct Source<'a> {
    r#type: &'a str,
    uri: &'a str,
    options: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct Fill {
    bytes_done: u64,
    bytes_total: u64,
    rate_bytes_per_s: u64,
    files_done: u64,
    files_total: u64,
}

#[derive(Serialize)]
struct Failure<'a> {
    reason: &'a str,
    message: &'a str,
    remedy: &'a str,
    exit_code: u8,
}

impl<'a> From<&'a wire::Checkpoint> for Checkpoint<'a> {
    fn from(record: &'a wire::Checkpoint) -> Self {
        Self {
            id: &record.id,
            name: &record.name,
            owner: &record.owner,
            public: record.public,
            state: checkpoint_state(record.state()),
            digest: &record.digest,
            revision: &record.revision,
            source: Source::of(record.source.as_ref()),
            files: record.files,
            logical_bytes: record.logical_bytes,
            unique_bytes: record.unique_bytes,
            shared_bytes: record.shared_bytes,
            physical_bytes: record.physical_bytes,
            pinned: record.pinned,
            used_at: (record.used_unix_ms > 0).then(|| units::rfc3339(record.used_unix_ms)),
            fill: record.fill.as_ref().map(Fill::of),
            error: record.error.as_ref().map(Failure::of),
            created_at: units::rfc3339(record.created_unix_ms),
            transfer: record.transfer.as_ref().map(|transfer| Transfer { url: &transfer.url, token: &transfer.token }),
        }
    }
}

impl<'a> Source<'a> {
    fn of(source: Option<&'a wire::Source>) -> Self {
        match source {
            Some(source) => Self { r#type: &source.r#type, uri: &source.uri, options: sorted(&source.options) },
            None => Self { r#type: "", uri: "", options: BTreeMap::new() },
        }
    }
}

impl Fill {
    fn of(fill: &wire::Fill) -> Self {
        Self {
            bytes_done: fill.bytes_done,
            bytes_total: fill.bytes_total,
            rate_bytes_per_s: fill.rate_bytes_per_s,
            files_done: fill.files_done,
            files_total: fill.files_total,
        }
    }
}

impl<'a> Failure<'a> {
    fn of(failure: &'a wire::Failure) -> Self {
        Self {
            reason: &failure.reason,
            message: &failure.message,
            remedy: &failure.remedy,
            exit_code: Kind::from_grpc_code(failure.code).exit_code(),
        }
    }
}

/// The answer of `list`.
#[derive(Serialize)]
pub(super) struct Checkpoints<'a> {
    checkpoints: Vec<Checkpoint<'a>>,
}

impl<'a> From<&'a [wire::Checkpoint]> for Checkpoints<'a> {
    fn from(records: &'a [wire::Checkpoint]) -> Self {
        Self { checkpoints: records.iter().map(Checkpoint::from).collect() }
    }
}

/// The answer of `remove`.
#[derive(Serialize)]
pub(super) struct Removed<'a> {
    /// The checkpoint that is gone.
    pub(super) id: &'a str,
    /// Given back to the filesystem by now.
    pub(super) freed_bytes: u64,
    /// Whether more follows.
    pub(super) freeing: bool,
}

/// The answer of `catalog`.
#[derive(Serialize)]
pub(super) struct Catalog<'a> {
    checkpoints: Vec<CatalogEntry<'a>>,
}

#[derive(Serialize)]
struct CatalogEntry<'a> {
    name: &'a str,
    source: Source<'a>,
    terms_url: &'a str,
}

impl<'a> From<&'a [wire::CatalogEntry]> for Catalog<'a> {
    fn from(entries: &'a [wire::CatalogEntry]) -> Self {
        let entry = |entry: &'a wire::CatalogEntry| CatalogEntry {
            name: &entry.name,
            source: Source::of(entry.source.as_ref()),
            terms_url: &entry.terms_url,
        };
        Self { checkpoints: entries.iter().map(entry).collect() }
    }
}

/// A job's right to checkpoints, and where it sees them.
#[derive(Serialize)]
pub(super) struct Attachment<'a> {
    job: &'a str,
    target: &'a str,
    checkpoints: Vec<AttachedCheckpoint<'a>>,
    env: BTreeMap<&'a str, &'a str>,
    state: &'static str,
    terms: &'a [String],
    pid: u32,
    expires_at: Option<String>,
}

#[derive(Serialize)]
struct AttachedCheckpoint<'a> {
    id: &'a str,
    name: &'a str,
    path: &'a str,
    digest: &'a str,
}

impl<'a> From<&'a wire::Attachment> for Attachment<'a> {
    fn from(attachment: &'a wire::Attachment) -> Self {
        let checkpoints = attachment.checkpoints.iter().map(|attached| AttachedCheckpoint {
            id: &attached.id,
            name: &attached.name,
            path: &attached.path,
            digest: &attached.digest,
        });
        Self {
            job: &attachment.job,
            target: &attachment.target,
            checkpoints: checkpoints.collect(),
            env: sorted(&attachment.env),
            state: attachment_state(attachment.state()),
            terms: &attachment.terms,
            pid: attachment.pid,
            expires_at: (attachment.expires_unix_ms != 0).then(|| units::rfc3339(attachment.expires_unix_ms)),
        }
    }
}

/// The answer of `jobs`.
#[derive(Serialize)]
pub(super) struct Jobs<'a> {
    jobs: Vec<Attachment<'a>>,
}

impl<'a> From<&'a [wire::Attachment]> for Jobs<'a> {
    fn from(attachments: &'a [wire::Attachment]) -> Self {
        Self { jobs: attachments.iter().map(Attachment::from).collect() }
    }
}

/// The answer of `release`.
#[derive(Serialize)]
pub(super) struct Released<'a> {
    /// The job that holds nothing now.
    pub(super) job: &'a str,
    /// Always true: releasing twice is one.
    pub(super) released: bool,
}

/// The answer of `drain`.
#[derive(Serialize)]
pub(super) struct Drained {
    /// Always true: draining twice is one.
    pub(super) draining: bool,
}

/// The answer of `status`.
#[derive(Serialize)]
pub(super) struct Status<'a> {
    pid: u32,
    version: &'a str,
    uptime_s: u64,
    features: Features,
    sessions: u32,
    attachments: u32,
    state_dir: &'a str,
    runtime_dir: &'a str,
    degraded: &'a str,
    holder: &'a str,
    restarts: u32,
    draining: bool,
    reconciled: &'a str,
    estimates: Vec<Estimated<'a>>,
    scrub: Option<Scrub>,
}

/// An estimate beside its outcome.
#[derive(Serialize)]
struct Estimated<'a> {
    checkpoint: &'a str,
    bytes: u64,
    expected_s: f64,
    took_s: Option<f64>,
}

#[derive(Serialize)]
struct Features {
    passthrough: bool,
    resend: bool,
    reflink: bool,
    open_tree: bool,
}

impl<'a> From<&'a wire::Status> for Status<'a> {
    fn from(status: &'a wire::Status) -> Self {
        let features = status.features.unwrap_or_default();
        Self {
            pid: status.pid,
            version: &status.version,
            uptime_s: status.uptime_s,
            features: Features {
                passthrough: features.passthrough,
                resend: features.resend,
                reflink: features.reflink,
                open_tree: features.open_tree,
            },
            sessions: status.sessions,
            attachments: status.attachments,
            state_dir: &status.state_dir,
            runtime_dir: &status.runtime_dir,
            degraded: &status.degraded,
            holder: &status.holder,
            restarts: status.restarts,
            draining: status.draining,
            reconciled: &status.reconciled,
            estimates: status.estimates.iter().map(Estimated::from).collect(),
            scrub: status.scrub.as_ref().map(Scrub::from),
        }
    }
}

impl<'a> From<&'a wire::Estimated> for Estimated<'a> {
    fn from(made: &'a wire::Estimated) -> Self {
        Self {
            checkpoint: &made.checkpoint,
            bytes: made.bytes,
            expected_s: seconds(made.expected_ms),
            took_s: made.took_ms.map(seconds),
        }
    }
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}

/// What is expected of bringing a checkpoint here; absent figures are not known.
#[derive(Serialize)]
pub(super) struct Estimate<'a> {
    checkpoint: &'a str,
    missing_bytes: Option<u64>,
    from: &'a str,
    rate_bytes_per_s: Option<u64>,
    expected_s: Option<f64>,
}

impl<'a> From<&'a wire::Estimate> for Estimate<'a> {
    fn from(estimate: &'a wire::Estimate) -> Self {
        Self {
            checkpoint: &estimate.checkpoint,
            missing_bytes: estimate.missing_bytes,
            from: &estimate.from,
            rate_bytes_per_s: estimate.rate_bytes_per_s,
            expected_s: estimate.expected_ms.map(seconds),
        }
    }
}

/// Something that happened.
#[derive(Serialize)]
pub(super) struct Event<'a> {
    id: u64,
    at: String,
    kind: &'a str,
    checkpoint: &'a str,
    job: &'a str,
    message: &'a str,
}

impl<'a> From<&'a wire::Event> for Event<'a> {
    fn from(event: &'a wire::Event) -> Self {
        Self {
            id: event.id,
            at: units::rfc3339(event.at_unix_ms),
            kind: &event.kind,
            checkpoint: &event.checkpoint,
            job: &event.job,
            message: &event.message,
        }
    }
}

/// The answer of `events` without `--follow`.
#[derive(Serialize)]
pub(super) struct Events<'a> {
    events: Vec<Event<'a>>,
}

impl<'a> From<&'a [wire::Event]> for Events<'a> {
    fn from(events: &'a [wire::Event]) -> Self {
        Self { events: events.iter().map(Event::from).collect() }
    }
}

fn sorted(map: &std::collections::HashMap<String, String>) -> BTreeMap<&str, &str> {
    map.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn keys(value: &Value) -> String {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys.join(" ")
    }

    #[test]
    fn a_checkpoint_has_the_keys_of_the_contract() {
        let record = wire::Checkpoint { created_unix_ms: 1_700_000_000_000, ..Default::default() };
        let value = serde_json::to_value(Checkpoint::from(&record)).unwrap();
        assert_eq!(
            keys(&value),
            "created_at digest error files fill id logical_bytes name owner physical_bytes pinned public revision shared_bytes source state \
             transfer unique_bytes used_at"
        );
        assert_eq!(keys(&value["source"]), "options type uri");
        assert_eq!((&value["fill"], &value["error"]), (&Value::Null, &Value::Null));
        assert_eq!(value["created_at"], "2023-11-14T22:13:20.000Z");
    }

    #[test]
    fn filling_and_failing_are_shown_with_their_figures() {
        let record = wire::Checkpoint {
            state: wire::CheckpointState::Failed.into(),
            fill: Some(wire::Fill {
                bytes_done: 1,
                bytes_total: 2,
                rate_bytes_per_s: 3,
                files_done: 4,
                files_total: 5,
            }),
            error: Some(wire::Failure { code: 15, reason: "R".into(), message: "m".into(), remedy: "r".into() }),
            ..Default::default()
        };
        let value = serde_json::to_value(Checkpoint::from(&record)).unwrap();
        assert_eq!(value["state"], "failed");
        assert_eq!(
            value["fill"],
            json!({"bytes_done": 1, "bytes_total": 2, "rate_bytes_per_s": 3, "files_done": 4, "files_total": 5})
        );
        assert_eq!(value["error"], json!({"reason": "R", "message": "m", "remedy": "r", "exit_code": 6}));
    }

    #[test]
    fn an_attachment_tells_the_job_what_to_do() {
        let attachment = wire::Attachment {
            job: "j".into(),
            target: "/t".into(),
            checkpoints: vec![wire::AttachedCheckpoint {
                id: "i".into(),
                name: "n".into(),
                path: "/t".into(),
                digest: "d".into(),
            }],
            env: [("ML_CHECKPOINT_PATH".to_owned(), "/t".to_owned())].into(),
            state: wire::AttachmentState::Attached.into(),
            terms: vec!["be kind".into()],
            pid: 0,
            waited_for: String::new(),
            expires_unix_ms: 1000,
        };
        let expected = json!({
            "job": "j", "target": "/t", "checkpoints": [{"id": "i", "name": "n", "path": "/t", "digest": "d"}],
            "env": {"ML_CHECKPOINT_PATH": "/t"}, "state": "attached", "terms": ["be kind"], "pid": 0,
            "expires_at": "1970-01-01T00:00:01.000Z",
        });
        assert_eq!(serde_json::to_value(Attachment::from(&attachment)).unwrap(), expected);
    }

    #[test]
    fn usage_and_status_have_the_keys_of_the_contract() {
        let usage = wire::Usage { owners: vec![wire::OwnerUsage::default()], ..Default::default() };
        let value = serde_json::to_value(Usage::from(&usage)).unwrap();
        assert_eq!(
            keys(&value),
            "capacity_bytes catalog_bytes duplicate_bytes evictable_bytes filesystem_bytes filling_bytes free_bytes leased_bytes logical_bytes \
             not_refetchable_bytes other_bytes owners physical_bytes pinned_bytes quarantine_bytes remnant_bytes scratch_bytes unique_bytes"
        );
        assert_eq!(
            keys(&value["owners"][0]),
            "charged_bytes checkpoints logical_bytes owner physical_bytes quota_bytes shared_bytes unique_bytes"
        );
        let value = serde_json::to_value(Status::from(&wire::Status::default())).unwrap();
        assert_eq!(
            keys(&value),
            "attachments degraded draining estimates features holder pid reconciled restarts runtime_dir scrub sessions state_dir uptime_s \
             version"
        );
        assert_eq!(
            value["features"],
            json!({"passthrough": false, "resend": false, "reflink": false, "open_tree": false})
        );
    }
}
