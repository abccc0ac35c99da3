//! `capture`: a checkpoint of what a job wrote into a directory, of the daemon's host or of the root of one of the job's processes.

use std::path::PathBuf;

use clap::Args;

use super::console::{Console, talk};
use super::create::parse_option;
use super::exit::Ended;
use super::{document, follow, text};
use crate::control::wire;
use crate::error::{Error, Result};

/// Make a checkpoint of a job's output directory, and wait until it is ready
#[derive(Args)]
pub(super) struct Capture {
    /// The job whose output it is
    job: String,
    /// The directory, on the daemon's host; with --pid as that process sees it [default with --pid: /opt/ml/output]
    #[arg(long, value_name = "DIR", required_unless_present = "pid")]
    from: Option<PathBuf>,
    /// A process of the job, whose root the directory is in
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// Number of this worker, from 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    worker: Option<u32>,
    /// Workers of the job
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: Option<u32>,
    /// What people call the job [default: its id]
    #[arg(long)]
    job_name: Option<String>,
    /// What to call the checkpoint (default: `Job - <job name>`, with ` Worker <n>` where there are several)
    #[arg(long)]
    name: Option<String>,
    /// `extract=false` keeps an archive as it is, where DIR is one
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = parse_option)]
    options: Vec<(String, String)>,
    /// Whose it is
    #[arg(long)]
    owner: Option<String>,
    /// Id to give it; makes repeating the command harmless
    #[arg(long)]
    id: Option<String>,
}

impl Capture {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let request = self.request()?;
        let daemon = console.daemon().await?;
        let record = daemon.ask(daemon.checkpoints().capture_output(request)).await?;
        talk(&format!("created {}", text::titled(&record)));
        let record = follow::until_ready(&daemon, &record).await?;
        console.answer(&document::Checkpoint::from(&record), || text::checkpoint_line(&record))
    }

    fn request(self) -> Result<wire::CaptureOutputRequest> {
        Ok(wire::CaptureOutputRequest {
            id: self.id.unwrap_or_default(),
            job: self.job,
            directory: self.from.map(|from| directory(from, self.pid)).transpose()?.unwrap_or_default(),
            name: self.name.unwrap_or_default(),
            job_name: self.job_name.unwrap_or_default(),
            worker: self.worker.unwrap_or_default(),
            workers: self.workers.unwrap_or_default(),
            owner: self.owner.unwrap_or_default(),
            options: self.options.into_iter().collect(),
            pid: self.pid.unwrap_or_default(),
        })
    }
}

/// The directory as the daemon takes it. A relative path means our working directory, which another process need not have.
fn directory(from: PathBuf, pid: Option<u32>) -> Result<String> {
    if pid.is_some() && !from.is_absolute() {
        let fault = format!("the directory `{}` in another process' root is not absolute", from.display());
        return Err(Error::invalid("BAD_PATH", fault).remedy("give --from an absolute path"));
    }
    absolute(from)
}

/// The path seen from the root, as text; symbolic links in it stay.
///
/// # Errors
/// Invalid where it is empty or not UTF-8, which a request cannot carry.
pub(super) fn absolute(path: PathBuf) -> Result<String> {
    let absolute = std::path::absolute(&path)
        .map_err(|error| Error::invalid("BAD_PATH", format!("`{}` is not a path", path.display())).because(error))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|_| Error::invalid("BAD_PATH", format!("the path `{}` is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;

    #[test]
    fn paths_are_made_absolute_here() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute("a/b".into()).unwrap(), here.join("a/b").to_str().unwrap());
        assert_eq!(absolute("/a//b/./c".into()).unwrap(), "/a/b/c");
        assert!(absolute("".into()).is_err());
        assert!(directory("a".into(), None).is_ok());
        assert!(directory("a".into(), Some(1)).is_err());
        assert!(absolute(OsString::from_vec(vec![b'/', 0xff]).into()).is_err());
    }
}
