//! `ckptd quickstart`: the whole job in one command, on a private instance.
//!
//! Its configuration is the built-in one, changed by the environment alone: the file in /etc is the installed daemon's, and so are the addresses
//! that daemon listens on.
//!
//! A temporary directory holds state, runtime directory and, where nothing better is given, the model and the target. The instance is
//! driven over its own socket, as a scheduler would. Whatever happens (an error, Ctrl-C at any time) everything is
//! unmounted and removed at the end.

mod model;
mod verify;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};

use super::config::{self, Config};
use super::holder::Inherited;
use super::{Instance, stop_signal};
use crate::cli::connect::{Daemon, Way, connect};
use crate::cli::progress::Progress;
use crate::control::wire;
use crate::error::{Error, Kind, Result};
use crate::serve::attachments::CONTAINER_TARGET;
use crate::source::{SourceKind, shown_uri};
use crate::units::show_bytes;
use verify::Verified;

/// The job that the quickstart plays.
const JOB: &str = "quickstart";

/// A configuration file that says nothing.
const NO_FILE: &str = "/dev/null";

/// Beginnings of the variables that are about addresses to listen on.
const OF_LISTENERS: &[&str] = &["CKPTD_HTTP__", "CKPTD_TLS__"];

/// Name of a checkpoint whose source suggests none.
const NAMELESS: &str = "checkpoint";

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    /// A directory, a file, a URL, `hf:<namespace>/<repo>`; none for a generated model.
    pub source: Option<String>,
    /// Where the job sees it.
    pub at: Option<PathBuf>,
    /// Clean up and return when done.
    pub exit: bool,
}

/// The built-in defaults, with what the environment says besides; nothing of it listens.
///
/// # Errors
/// `BAD_CONFIG` with every problem of the environment.
pub fn configuration(environment: impl Iterator<Item = (String, String)>) -> Result<Config> {
    let of_listeners = |name: &str| {
        let name = name.to_ascii_uppercase();
        OF_LISTENERS.iter().any(|beginning| name.starts_with(beginning))
    };
    config::load(Some(Path::new(NO_FILE)), environment.filter(|(name, _)| !of_listeners(name)))
}

/// Runs it all; returns when everything is cleaned up.
///
/// # Errors
/// Whatever stopped it.
pub async fn run(arguments: Arguments, config: Config) -> Result<()> {
    let home = Home::new()?;
    let stop = stop_signal()?;
    let (state_dir, runtime_dir) = (home.path.join("state"), home.path.join("run"));
    let config = Config { state_dir, runtime_dir, http_listen: None, tls_listen: Vec::new(), ..config };
    let instance = Instance::start(&config, Inherited::default()).await?;
    let attachments = instance.floors().attachments.clone();
    let endpoint = format!("unix:{}", instance.socket().display());
    let (finished, finish) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(instance.run(async {
        let _ = finish.await;
    }));
    let mut targets = Vec::new();
    let outcome = tokio::select! {
        outcome = show(&arguments, &config, &endpoint, &home.path, &mut targets) => outcome,
        () = stop => {
            eprintln!("cleaning up");
            Ok(())
        }
    };
    let taken_down = attachments.take_down().await;
    drop(finished);
    let served = serving.await.unwrap_or_else(|error| Err(Error::internal("serving ended early").because(error)));
    targets.iter().for_each(|target| drop(std::fs::remove_dir(target)));
    outcome.and(taken_down).and(served)
}

async fn show(
    arguments: &Arguments,
    config: &Config,
    endpoint: &str,
    home: &Path,
    targets: &mut Vec<PathBuf>,
) -> Result<()> {
    let daemon = connect(&Way { endpoint: endpoint.to_owned(), ..Way::default() }).await?;
    let began = Instant::now();
    let record = create(&daemon, arguments.source.as_deref(), home).await?;
    let record = follow(&daemon, record).await?;
    let ready_after = began.elapsed();
    let (attachment, attach_time) = attach(&daemon, &record, arguments.at.as_deref(), home, targets).await?;
    let target = PathBuf::from(&attachment.target);
    println!("{} is at {} (read-only); checking every file through the mount", record.name, target.display());
    let state_dir = config.state_dir.clone();
    let root = target.clone();
    let verified = tokio::task::spawn_blocking(move || verify::verify(&root, &state_dir))
        .await
        .map_err(|error| Error::internal("checking ended early").because(error))??;
    println!("{}", table(&record, &verified, ready_after, attach_time));
    if arguments.exit {
        return Ok(());
    }
    println!("serving until Ctrl-C; look around in {}", target.display());
    std::future::pending::<()>().await;
    Ok(())
}

async fn create(daemon: &Daemon, source: Option<&str>, home: &Path) -> Result<wire::Checkpoint> {
    let Some(source) = source else {
        let directory = home.join("model");
        let making = directory.clone();
        tokio::task::spawn_blocking(move || model::generate(&making))
            .await
            .map_err(|error| Error::internal("generating a model ended early").because(error))??;
        println!("no source given: generated a small safetensors model");
        return capture(daemon, &directory, "generated").await;
    };
    if source.contains("://") || source.starts_with("hf:") {
        let request = request_of(source, std::env::var("HF_TOKEN").ok());
        return daemon.ask(daemon.checkpoints().create_checkpoint(request)).await;
    }
    let path = std::path::absolute(source).map_err(|error| Error::io("finding", source, error))?;
    let name = path.file_name().map_or_else(|| NAMELESS.to_owned(), |name| name.to_string_lossy().into_owned());
    // Through whatever links there are: they are the caller's own.
    let path = path.canonicalize().map_err(|error| Error::io("finding", source, error))?;
    capture(daemon, &path, &name).await
}

/// The request for a checkpoint of a URI. The hub's token is shown to the hub and to nobody else.
fn request_of(uri: &str, hub_token: Option<String>) -> wire::CreateCheckpointRequest {
    let kind = if uri.starts_with("s3://") { "aws" } else { "" };
    let token = hub_token.filter(|_| uri.starts_with("hf:"));
    wire::CreateCheckpointRequest {
        name: name_of(uri),
        source: Some(wire::Source { r#type: kind.to_owned(), uri: uri.to_owned(), options: Default::default() }),
        credentials: token.map(|token| ("token".to_owned(), token)).into_iter().collect(),
        ..Default::default()
    }
}

/// What the checkpoint of a URI is called: the last part of its path, else its host. Neither passwords nor signatures, which are in user information
/// and query, become names.
fn name_of(uri: &str) -> String {
    let shown = shown_uri(SourceKind::Web, uri);
    let place = shown.split_once("://").map_or(shown.as_str(), |(_, place)| place);
    let place = place.strip_prefix("hf:").unwrap_or(place);
    place.rsplit('/').find(|part| !part.is_empty()).unwrap_or(NAMELESS).to_owned()
}

async fn capture(daemon: &Daemon, path: &Path, name: &str) -> Result<wire::Checkpoint> {
    let directory = path
        .to_str()
        .ok_or_else(|| Error::invalid("PATH_NOT_TEXT", format!("the path {} is not valid text", path.display())))?;
    let request = wire::CaptureOutputRequest {
        job: JOB.to_owned(),
        directory: directory.to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    daemon.ask(daemon.checkpoints().capture_output(request)).await
}

/// Shows progress until the checkpoint is decided.
async fn follow(daemon: &Daemon, record: wire::Checkpoint) -> Result<wire::Checkpoint> {
    let request = wire::WatchCheckpointsRequest { checkpoint: record.id.clone() };
    let mut updates = daemon.ask(daemon.checkpoints().watch_checkpoints(request)).await?;
    let mut progress = Progress::on_stderr();
    let mut last = record;
    while let Some(update) = updates.message().await.map_err(|status| {
        Error::unavailable("WATCH_BROKEN", format!("following `{}`: {}", last.name, status.message()))
    })? {
        progress.update(&update);
        last = update;
    }
    match (last.state(), &last.error) {
        (wire::CheckpointState::Ready, _) => Ok(last),
        (_, Some(failure)) => {
            let error = Error::new(Kind::from_grpc_code(failure.code), failure.reason.clone(), failure.message.clone());
            Err(if failure.remedy.is_empty() { error } else { error.remedy(failure.remedy.clone()) })
        }
        _ => Err(Error::internal(format!("`{}` is neither ready nor failed", last.name))),
    }
}

async fn attach(
    daemon: &Daemon,
    record: &wire::Checkpoint,
    at: Option<&Path>,
    home: &Path,
    targets: &mut Vec<PathBuf>,
) -> Result<(wire::Attachment, Duration)> {
    let target = match at {
        Some(at) => {
            let at = std::path::absolute(at).map_err(|error| Error::io("finding", at, error))?;
            make_target(&at, targets)?;
            at
        }
        None => match make_target(Path::new(CONTAINER_TARGET), targets) {
            Ok(()) if is_free(Path::new(CONTAINER_TARGET)) => PathBuf::from(CONTAINER_TARGET),
            _ => {
                let target = home.join("checkpoint");
                make_target(&target, targets)?;
                println!("{CONTAINER_TARGET} is taken; using {}", target.display());
                target
            }
        },
    };
    let request = wire::AttachCheckpointsRequest {
        job: JOB.to_owned(),
        checkpoints: vec![wire::CheckpointRef { checkpoint: record.id.clone(), ..Default::default() }],
        target: target.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let began = Instant::now();
    let attachment = daemon.ask(daemon.jobs().attach_checkpoints(request)).await?;
    Ok((attachment, began.elapsed()))
}

/// Makes a directory that is not there, noting every level made, so that it goes again.
fn make_target(target: &Path, made: &mut Vec<PathBuf>) -> Result<()> {
    let missing: Vec<_> = target.ancestors().take_while(|ancestor| !ancestor.exists()).map(Path::to_owned).collect();
    std::fs::create_dir_all(target).map_err(|error| Error::io("creating the target", target, error))?;
    made.extend(missing);
    Ok(())
}

/// Whether a directory is empty and nothing is mounted on it: anything else is somebody's.
fn is_free(target: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let empty = std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    let device = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.dev()).ok();
    empty && target.parent().is_some_and(|parent| device(parent) == device(target))
}

fn table(record: &wire::Checkpoint, verified: &Verified, ready_after: Duration, attach_time: Duration) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let dedup = if record.unique_bytes >= record.logical_bytes {
        "nothing occurs twice".to_owned()
    } else {
        format!("{} kept, {} on disk", show_bytes(record.unique_bytes), show_bytes(record.physical_bytes))
    };
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("files", format!("{}, every one as its digest says", verified.files));
    row("bytes", show_bytes(verified.bytes));
    row("dedup", dedup);
    row("ready after", format!("{:.2} s", ready_after.as_secs_f64()));
    row("time to attach", format!("{:.1} ms", attach_time.as_secs_f64() * 1e3));
    row("read through the mount", rate(verified.mount_bytes_per_s));
    row("read of the blobs themselves", rate(verified.blob_bytes_per_s));
    table
}

fn rate(bytes_per_s: Option<u64>) -> String {
    bytes_per_s.map_or_else(|| "too little to measure".to_owned(), |rate| format!("{}/s", show_bytes(rate)))
}

/// The private directory; removed in the end.
struct Home {
    path: PathBuf,
}

impl Home {
    fn new() -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let parent = std::env::temp_dir();
        for attempt in 0..100_u32 {
            let path = parent.join(format!("ckptd-quickstart-{}-{attempt}", std::process::id()));
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(Error::io("creating a private directory in", &parent, error)
                        .remedy("set TMPDIR to a writable directory"));
                }
            }
        }
        Err(Error::unavailable("NO_PRIVATE_DIRECTORY", format!("every name tried in {} is taken", parent.display())))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the private directory stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_end_of_the_path_or_the_host_and_nothing_secret() {
        for (uri, name) in [
            ("https://example.org/models/tiny.safetensors", "tiny.safetensors"),
            ("https://example.org/models/tiny/", "tiny"),
            ("https://bucket.example.org/w.bin?X-Amz-Signature=se/cret", "w.bin"),
            ("https://example.org/w.bin#secret/x", "w.bin"),
            ("https://user:secret@example.org/w.bin", "w.bin"),
            ("https://user:secret@example.org", "example.org"),
            ("https://user:secret@example.org/?token=secret", "example.org"),
            ("https://example.org:8443", "example.org:8443"),
            // Passwords that are not written as URIs want it.
            ("https://user:sec?ret@example.org/w.bin", NAMELESS),
            ("s3://key:sec/ret@bucket", NAMELESS),
            ("s3://bucket/models/llama", "llama"),
            ("s3://bucket", "bucket"),
            ("hf:acme/tiny", "tiny"),
            ("hf:gpt2", "gpt2"),
            ("https://", NAMELESS),
        ] {
            assert_eq!(name_of(uri), name, "{uri}");
        }
    }

    #[test]
    fn the_hubs_token_goes_to_the_hub_alone() {
        for (uri, expected) in [
            ("hf:acme/gated", true),
            ("https://example.org/hf:acme/gated", false),
            ("s3://bucket/model", false),
            ("gs://bucket/model", false),
            ("ftp://example.org/w.bin", false),
        ] {
            let request = request_of(uri, Some("hf_secret".to_owned()));
            let given = request.credentials.get("token").map(String::as_str);
            assert_eq!(given, expected.then_some("hf_secret"), "{uri}");
        }
        assert!(request_of("hf:acme/tiny", None).credentials.is_empty());
    }

    #[test]
    fn its_configuration_is_the_built_in_one_and_nothing_listens() {
        let of = |environment: &[(&str, &str)]| {
            configuration(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
        };
        assert_eq!(of(&[]).unwrap(), Config::default());
        let listening = [
            ("CKPTD_TLS__LISTEN", "[\"127.0.0.1:1\"]"),
            ("CKPTD_http__listen", "\"127.0.0.1:1\""),
            ("CKPTD_SERVE__PASSTHROUGH", "\"never\""),
        ];
        assert_eq!(of(&listening).unwrap(), Config { passthrough: false, ..Config::default() });
        assert_eq!(of(&[("CKPTD_SERVE__NONE", "1")]).unwrap_err().reason(), "BAD_CONFIG");
    }
}
