//! `create`: a checkpoint of a source that the daemon fetches.

use clap::Args;

use super::console::{Console, talk};
use super::exit::Ended;
use super::secret::Secrets;
use super::{document, follow, text};
use crate::control::wire;
use crate::source::SourceKind;

/// Create a checkpoint and begin to fill it
#[derive(Args)]
pub(super) struct Create {
    /// What to call it; need not be unique
    name: String,
    /// Where it comes from, in the form of the type, e.g. s3://bucket/prefix/ or `<namespace>/<repo>`
    #[arg(long)]
    uri: String,
    /// aws, azure, gcp, git, huggingface, kaggle, local, regional, wasabi or web; needed where the URI does not tell
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    r#type: Option<SourceKind>,
    /// Option of the type, repeatable: endpoint, branch, type, path, region, extract, copy
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = parse_option)]
    options: Vec<(String, String)>,
    #[command(flatten)]
    secrets: Secrets,
    /// Whose it is
    #[arg(long, conflicts_with = "public")]
    owner: Option<String>,
    /// Visible to every owner
    #[arg(long)]
    public: bool,
    /// Id to give it; makes repeating the command harmless
    #[arg(long)]
    id: Option<String>,
    /// Wait until it is ready
    #[arg(long)]
    wait: bool,
}

impl Create {
    pub(super) async fn run(self, console: &Console) -> Ended {
        let wait = self.wait;
        let request = self.request()?;
        let daemon = console.daemon().await?;
        let mut record = daemon.ask(daemon.checkpoints().create_checkpoint(request)).await?;
        if wait {
            talk(&format!("created {}{}", text::titled(&record), text::transfer_lines(&record)));
            record = follow::until_ready(&daemon, &record).await?;
        }
        let line = || text::checkpoint_line(&record) + &text::transfer_lines(&record);
        console.answer(&document::Checkpoint::from(&record), line)
    }

    fn request(self) -> Ended<wire::CreateCheckpointRequest> {
        if self.r#type.is_none() {
            // Only to be told early: without a type the daemon infers it by the same rule, and reads the URI accordingly.
            SourceKind::infer(&self.uri).map_err(|error| error.remedy("give --type"))?;
        }
        Ok(wire::CreateCheckpointRequest {
            id: self.id.unwrap_or_default(),
            name: self.name,
            owner: self.owner.unwrap_or_default(),
            public: self.public,
            source: Some(wire::Source {
                r#type: self.r#type.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
                uri: self.uri,
                options: self.options.into_iter().collect(),
            }),
            credentials: self.secrets.read()?,
        })
    }
}

fn parse_type(text: &str) -> Result<SourceKind, String> {
    match text.parse().map_err(|error: crate::error::Error| error.report())? {
        SourceKind::Directory => Err("directories of this host are captured: use `ckptctl capture`".to_owned()),
        SourceKind::Upload => Err("files of this computer are sent: use `ckptctl upload`".to_owned()),
        kind => Ok(kind),
    }
}

pub(super) fn parse_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}
