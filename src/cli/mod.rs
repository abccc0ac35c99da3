//! `ckptctl`: the operator's client, one file per verb.
//!
//! A verb asks the daemon over gRPC ([`connect`]) and shows the answer: a JSON document or text for people on stdout,
//! and nothing else there ([`console`]); progress, questions and errors go to stderr ([`progress`], [`exit`]). It decides nothing
//! that the daemon decides: names are resolved, rights checked and limits kept there. What it does check here is what
//! can be said without the daemon: arguments, files that are read, a terminal to ask on.
//!
//! Promises to scripts: the keys of [`document`], and the exit codes of [`crate::error::Kind::exit_code`]. A reader that closes our
//! stdout ends the run quietly; an interrupted wait exits with 130 and stops nothing in the daemon.
//!
//! | file | what it is about |
//! |---|---|
//! | `console` `exit` | stdout, stderr, how a run ends |
//! | `connect` `refusal` | reaching the daemon; its statuses as our errors |
//! | `document` `text` | answers as JSON, answers for people |
//! | `follow` `progress` | waiting for a checkpoint, and what is seen meanwhile |
//! | `secret` `expires` | `--credential`, `--expires` |
//! | the rest | one verb, or a pair that belongs together |

mod ahead;
mod attach;
mod capture;
mod catalog;
pub(crate) mod connect;
mod console;
mod create;
mod document;
mod drain;
mod events;
mod evict;
mod exit;
mod expires;
mod follow;
mod get;
mod jobs;
mod list;
mod pin;
pub mod progress;
mod refusal;
mod release;
mod remove;
mod rename;
mod reserve;
mod retry;
mod scrub;
mod secret;
mod status;
mod text;
mod upload;
mod usage;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::certificates::CertificateFiles;
use crate::error::Error;
use connect::Way;
use console::Console;
use exit::Ended;

/// Heading of the options that every verb has.
const EVERYWHERE: &str = "Options of every verb";

/// Commands ckptd, the checkpoint service of this host
///
/// CHECKPOINT is an id, or a name if only one visible checkpoint bears it. Answers go to stdout, talk to stderr.
///
/// Exit codes: 0 done, 2 the request is wrong, 3 not found, 4 in use or in the wrong state, 5 no space or over a limit,
/// 6 data corrupt, 7 unavailable (try again), 1 a bug of ours, 130 interrupted.
#[derive(Parser)]
#[command(name = "ckptctl", version)]
struct Ckptctl {
    /// Where ckptd listens: unix:PATH, or https://HOST:PORT
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "CKPTD_ENDPOINT", default_value = connect::DEFAULT_ENDPOINT)]
    endpoint: String,
    /// Print one JSON document on stdout (`watch` and `events --follow`: one object a line)
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    json: bool,
    /// Ask for this owner: see and change only what is its own, and public checkpoints
    #[arg(long = "as", global = true, help_heading = EVERYWHERE, env = "CKPTD_OWNER", value_name = "OWNER")]
    on_behalf_of: Option<String>,
    /// By https: the certificate to show, PEM
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "CKPTD_TLS_CERTIFICATE", value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// By https: its key, PEM
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "CKPTD_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// By https: the authority that ckptd's certificate is of, PEM
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "CKPTD_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

impl Ckptctl {
    fn console(&self) -> Console {
        let file = |given: &Option<PathBuf>| given.clone().unwrap_or_default();
        let certificates = CertificateFiles {
            certificate: file(&self.tls_certificate),
            key: file(&self.tls_key),
            authorities: file(&self.tls_ca),
        };
        let way = Way { endpoint: self.endpoint.clone(), certificates, owner: self.on_behalf_of.clone() };
        Console::new(way, self.json)
    }
}

#[derive(Subcommand)]
enum Verb {
    Create(create::Create),
    Upload(upload::Upload),
    Capture(capture::Capture),
    Catalog(catalog::Catalog),
    Get(get::Get),
    List(list::List),
    Watch(watch::Watch),
    Retry(retry::Retry),
    Rename(rename::Rename),
    Pin(pin::Pin),
    Unpin(pin::Unpin),
    Remove(remove::Remove),
    Attach(attach::Attach),
    Detach(attach::Detach),
    Jobs(jobs::Jobs),
    Reserve(reserve::Reserve),
    Renew(reserve::Renew),
    Release(release::Release),
    Prefetch(ahead::Prefetch),
    Estimate(ahead::Estimate),
    Usage(usage::Usage),
    Evict(evict::Evict),
    Scrub(scrub::Scrub),
    Status(status::Status),
    Drain(drain::Drain),
    Events(events::Events),
}

impl Verb {
    async fn run(self, console: &Console) -> Ended {
        match self {
            Self::Create(verb) => verb.run(console).await,
            Self::Upload(verb) => verb.run(console).await,
            Self::Capture(verb) => verb.run(console).await,
            Self::Catalog(verb) => verb.run(console).await,
            Self::Get(verb) => verb.run(console).await,
            Self::List(verb) => verb.run(console).await,
            Self::Watch(verb) => verb.run(console).await,
            Self::Retry(verb) => verb.run(console).await,
            Self::Rename(verb) => verb.run(console).await,
            Self::Pin(verb) => verb.run(console).await,
            Self::Unpin(verb) => verb.run(console).await,
            Self::Remove(verb) => verb.run(console).await,
            Self::Attach(verb) => verb.run(console).await,
            Self::Detach(verb) => verb.run(console).await,
            Self::Jobs(verb) => verb.run(console).await,
            Self::Reserve(verb) => verb.run(console).await,
            Self::Renew(verb) => verb.run(console).await,
            Self::Release(verb) => verb.run(console).await,
            Self::Prefetch(verb) => verb.run(console).await,
            Self::Estimate(verb) => verb.run(console).await,
            Self::Usage(verb) => verb.run(console).await,
            Self::Evict(verb) => verb.run(console).await,
            Self::Scrub(verb) => verb.run(console).await,
            Self::Status(verb) => verb.run(console).await,
            Self::Drain(verb) => verb.run(console).await,
            Self::Events(verb) => verb.run(console).await,
        }
    }
}

/// Runs `ckptctl` with the arguments of this process and says how it ended.
pub fn run() -> ExitCode {
    let arguments = Ckptctl::parse();
    let (console, verb) = (arguments.console(), arguments.verb);
    // One connection and one stream at a time: a second thread would only cost start-up.
    let ended = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(verb.run(&console)),
        Err(error) => Err(Error::unavailable("NO_EVENT_LOOP", "starting the event loop").because(error).into()),
    };
    exit::code(ended)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    fn fault(line: &str) -> Option<ErrorKind> {
        Ckptctl::try_parse_from(line.split(' ')).err().map(|error| error.kind())
    }

    #[test]
    fn the_argument_tree_is_consistent() {
        Ckptctl::command().debug_assert();
    }

    #[test]
    fn every_verb_and_option_has_help() {
        for verb in Ckptctl::command().get_subcommands() {
            assert!(verb.get_about().is_some(), "{} has no help", verb.get_name());
            for argument in verb.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} has no help", verb.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn lines_of_the_contract_are_accepted() {
        for line in [
            "ckptctl create m --type aws --uri s3://b/p/ --option region=eu --option endpoint=x --owner me --id i --wait",
            "ckptctl create m --uri hf:a/b --public --credential token=env:HF_TOKEN",
            "ckptctl create --catalog whisper-tiny --id i --wait",
            "ckptctl create m --catalog whisper-tiny",
            "ckptctl catalog --json",
            "ckptctl upload m ./model --owner me",
            "ckptctl capture job --from out --worker 2 --workers 4 --job-name Train --name n --owner me",
            "ckptctl list --owner me --public --json",
            "ckptctl --json watch",
            "ckptctl watch m",
            "ckptctl retry m",
            "ckptctl rename m n",
            "ckptctl remove m --yes",
            "ckptctl pin m",
            "ckptctl unpin m",
            "ckptctl attach job a b --public-checkpoint c --public-checkpoint d --at /x --pid 7 --lazy --owner me",
            "ckptctl attach job",
            "ckptctl detach job",
            "ckptctl prefetch c --memory",
            "ckptctl estimate c --json",
            "ckptctl reserve job a b",
            "ckptctl reserve job a --expires 12h",
            "ckptctl attach job a --expires 2030-01-31T12:00:00Z",
            "ckptctl renew job",
            "ckptctl renew job --expires 1d6h",
            "ckptctl release job",
            "ckptctl evict a b --dry-run",
            "ckptctl scrub",
            "ckptctl scrub m --full-rate --wait",
            "ckptctl evict --until 20GiB --force",
            "ckptctl drain",
            "ckptctl --endpoint unix:/x events --follow",
            "ckptctl status --endpoint unix:/x",
            "ckptctl --as me --endpoint https://h:1 --tls-certificate c --tls-key k --tls-ca a list",
        ] {
            assert_eq!(fault(line), None, "{line}");
        }
    }

    #[test]
    fn lines_that_contradict_themselves_are_refused() {
        assert_eq!(fault("ckptctl create m --uri u --owner me --public"), Some(ErrorKind::ArgumentConflict));
        assert_eq!(fault("ckptctl create m --catalog c --uri u"), Some(ErrorKind::ArgumentConflict));
        assert_eq!(fault("ckptctl create --catalog c --owner me"), Some(ErrorKind::ArgumentConflict));
        assert_eq!(fault("ckptctl create --uri u"), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(fault("ckptctl create m"), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(fault("ckptctl create m --uri u --option novalue"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl create m --uri u --type floppy"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl create m --uri u --type upload"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl capture job --from d --worker 0"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl reserve job"), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(fault("ckptctl renew job --expires soon"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl evict"), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(fault("ckptctl evict --until lots"), Some(ErrorKind::ValueValidation));
        assert_eq!(fault("ckptctl polish"), Some(ErrorKind::InvalidSubcommand));
    }
}
