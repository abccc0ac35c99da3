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
    /// What to call it; need not be unique. With --catalog: its name there, unless given
    #[arg(required_unless_present = "catalog")]
    name: Option<String>,
    /// Make a public checkpoint of the catalogue; `ckptctl catalog` lists them
    #[arg(long, value_name = "NAME", conflicts_with_all = ["uri", "type", "options", "owner"])]
    catalog: Option<String>,
    /// Where it comes from, in the form of the type, e.g. s3://bucket/prefix/, `<namespace>/<repo>` or a datastore's name
    #[arg(long, required_unless_present = "catalog")]
    uri: Option<String>,
    /// aws, azure, gcp, git, huggingface, kaggle, local, regional, wasabi or web; needed where the URI does not tell
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    r#type: Option<SourceKind>,
    /// Option of the type, repeatable: endpoint, branch, type, path, region, account, anonymous, extract, copy, credentials
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
        if let (None, Some(uri)) = (&self.r#type, &self.uri) {
            // Only to be told early: without a type the daemon infers it by the same rule, and reads the URI accordingly.
            SourceKind::infer(uri).map_err(|error| error.remedy("give --type"))?;
        }
        let source = self.uri.map(|uri| wire::Source {
            r#type: self.r#type.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
            uri,
            options: self.options.into_iter().collect(),
        });
        Ok(wire::CreateCheckpointRequest {
            id: self.id.unwrap_or_default(),
            name: self.name.unwrap_or_default(),
            owner: self.owner.unwrap_or_default(),
            public: self.public || self.catalog.is_some(),
            source,
            credentials: self.secrets.read()?,
            catalog: self.catalog.unwrap_or_default(),
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

/// An option as the command line has it.
pub(super) fn parse_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}
