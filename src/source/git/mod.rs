//! A git repository over http(s) or ssh, with its submodules and the large files it keeps in LFS.
//!
//! [`GitSource::open`] fetches: the host's `git` brings the one commit that is meant, without history, into a bare repository in a
//! scratch directory ([`fetch`]), then those of its submodules ([`checkout`]). Nothing is checked out; `ls-tree` lists, and files are
//! read from `cat-file` ([`blobs`]). Large files of LFS are read from their server, in ranges, by our own client ([`lfs`]).
//! The revision is the commit's id, which pins everything: submodules by their commits, large files by their SHA-256.
//!
//! *Hostile repositories.* git runs without a shell, without any configuration but ours, without hooks, and without protocols but the
//! one of the address ([`child`], [`link`]); names are resolved and judged here and pinned; addresses of submodules pass the same rules
//! ([`address`]); objects are checked as they come (`transfer.fsckObjects`) and once more by their ids when they are sealed.
//!
//! *Secrets* reach git by its environment and ssh by a file without a name ([`access`]).
//!
//! *Space.* What is fetched lies packed on the store's filesystem until the source is dropped, in addition to what is filled
//! from it. It is bounded by what a checkpoint may have, and never takes the last of the disk.
//!
//! *After a crash* the scratch directory is removed by the next start. Resuming fetches the commit anew, but fills only what is missing: files
//! that were sealed are known by their rows, large files of LFS by their units.

mod access;
mod address;
mod blobs;
mod checkout;
mod child;
mod fetch;
mod lfs;
mod link;
mod said;
mod tree;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_util::stream;

use super::connect::{SourceContext, branch_of, split_user_information};
use super::{ByteStream, Counter, Credentials, File, Listing, Opened, Source, SourceSpec};
use crate::error::{Error, Kind, Result};

use access::Access;
use address::Remote;
use blobs::Blobs;
use checkout::{Checkout, Errand};
use child::Workshop;
use fetch::Wanted;
use lfs::Lfs;

/// The repository that `spec` means.
///
/// # Errors
/// Invalid for an address, branch or credentials that cannot be; `NO_SCRATCH` where the context has no room for it.
pub(super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let remote = Remote::parse(&split_user_information(&spec.uri).0)?;
    let wanted = Wanted::of(branch_of(spec)?)?;
    if context.scratch.is_none() {
        return Err(Error::new(Kind::Unsupported, "NO_SCRATCH", "repositories need a directory to be fetched into"));
    }
    let access = Access::of(credentials, &remote, context.host_credentials.as_deref())?;
    Ok(Arc::new(GitSource { remote, wanted, access, context: context.clone(), fetched: Mutex::default() }))
}

/// A repository.
#[derive(Debug)]
struct GitSource {
    remote: Remote,
    wanted: Wanted,
    access: Access,
    context: SourceContext,
    fetched: Mutex<Option<Arc<Fetched>>>,
}

/// What opening brought, from which files are read.
#[derive(Debug)]
struct Fetched {
    blobs: Arc<Blobs>,
    lfs: HashMap<usize, Arc<Lfs>>,
}

impl GitSource {
    async fn workshop(&self) -> Result<Workshop> {
        let space = self.context.scratch.clone().ok_or_else(|| Error::internal("there is no scratch space"))?;
        let making =
            tokio::task::spawn_blocking(move || space.disk.begin_scratch().map(|made| (made, space.limit_bytes)));
        let (scratch, limit_bytes) =
            making.await.map_err(|error| Error::internal("making a scratch directory").because(error))??;
        let settings = &self.context.settings;
        Ok(Workshop {
            scratch: Arc::new(scratch),
            limit_bytes,
            patience: settings.connect_timeout + settings.inactivity_timeout,
            quiet: settings.inactivity_timeout,
            environment_proxy: settings.environment_proxy,
        })
    }
}

#[async_trait]
impl Source for GitSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let workshop = self.workshop().await?;
        fetch::check_version(&workshop).await?;
        let errand = Errand { access: &self.access, context: &self.context, workshop: &workshop };
        let Checkout { commit, entries, skipped, lfs } = errand.run(&self.remote, &self.wanted, counter).await?;
        let fetched = Fetched { blobs: Arc::new(Blobs::new(workshop)), lfs };
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(fetched));
        Ok(Opened::Listed(Listing { skipped, ..Listing::new(commit, entries) }))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let unknown = || Error::internal(format!("`{}` is no file of {}", file.locator, self.remote));
        let (fetched, size) = fetched.zip(file.size).ok_or_else(unknown)?;
        let mut parts = file.locator.splitn(3, '/');
        let (kind, number, object) = (parts.next(), parts.next(), parts.next());
        let number = number.and_then(|number| number.parse::<usize>().ok()).ok_or_else(unknown)?;
        match (kind, object) {
            (Some("lfs"), Some(index)) => {
                let lfs = fetched.lfs.get(&number).ok_or_else(unknown)?;
                lfs.read(index.parse().map_err(|_| unknown())?, file, range).await
            }
            (Some("blob"), Some(_)) if range.is_empty() => Ok(Box::pin(stream::empty())),
            (Some("blob"), Some(id)) if range == (0..size) => fetched.blobs.read(number, id, size).await,
            _ => Err(unknown()),
        }
    }
}
