//! Where a repository's LFS is served, and what to show there.
//!
//! `lfs.url` of the repository's own `.lfsconfig`, if that is an http(s) address; else `<repository>.git/info/lfs` beside an
//! http(s) one; else what the ssh host says when asked with `git-lfs-authenticate`, which is good for some minutes and asked
//! for again then; and where the host does not know that command, the https address of the same path.
//! Credentials go along only to the origin that they were given for.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::super::super::http::{Authorization, shown};
use super::super::access::Access;
use super::super::address::{Remote, SshAddress};
use super::super::child::Workshop;
use super::super::fetch::collect;
use super::super::link::Link;
use super::stated;
use crate::error::{Error, Result};

/// What `git-lfs-authenticate` prints: a URL and a token.
const LOGIN_BYTES: usize = 64 << 10;

/// Where to ask, and with what.
#[derive(Clone, Debug)]
pub(in crate::source::git) struct Place {
    base: Url,
    pub(super) authorization: Option<Authorization>,
    /// Whether what is shown there ends by itself, and is had anew by finding the place again.
    pub(super) ends: bool,
}

impl Place {
    fn new(base: Url, authorization: Option<Authorization>) -> Self {
        Self { base, authorization, ends: false }
    }

    /// The endpoint.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// A URL below it.
    pub(super) fn below(&self, path: &str) -> Result<Url> {
        let text = format!("{}/{path}", self.base.as_str().trim_end_matches('/'));
        Url::parse(&text).map_err(|error| Error::internal("building a URL of LFS").because(error))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.base))
    }
}

/// Finds the place once it is needed.
#[derive(Debug)]
pub(in crate::source::git) struct Endpoint {
    link: Link,
    access: Access,
    workshop: Workshop,
    /// `lfs.url` of the repository.
    configured: Option<Url>,
    found: Mutex<Arc<OnceCell<Place>>>,
}

#[derive(Deserialize)]
struct Login {
    href: String,
    #[serde(default)]
    header: HashMap<String, String>,
}

impl Endpoint {
    /// The endpoint of the repository at `link`, whose `.lfsconfig` says `configured`.
    ///
    /// # Errors
    /// `BAD_URI` for another scheme than http(s) in `.lfsconfig`.
    pub(in crate::source::git) fn new(
        link: &Link,
        access: &Access,
        workshop: &Workshop,
        configured: Option<&str>,
    ) -> Result<Self> {
        let configured = match configured.map(Remote::parse).transpose()? {
            Some(Remote::Http(url)) => Some(url),
            // By ssh git's own client would log in there: the repository's own host is asked instead.
            Some(Remote::Ssh(_)) | None => None,
        };
        let (link, access, workshop) = (link.clone(), access.clone(), workshop.clone());
        Ok(Self { link, access, workshop, configured, found: Mutex::default() })
    }

    /// The place, found now if it is not known.
    pub(super) async fn place(&self) -> Result<Place> {
        let cell = Arc::clone(&self.found.lock().unwrap_or_else(PoisonError::into_inner));
        cell.get_or_try_init(|| self.find()).await.cloned()
    }

    /// Lets the next one find it anew, unless somebody else has seen to it.
    pub(super) fn forget(&self, stale: &Place) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.get().is_some_and(|place| place.base == stale.base) {
            *found = Arc::default();
        }
    }

    async fn find(&self) -> Result<Place> {
        let at = |url: Url| {
            let authorization = self.access.authorization(&Remote::Http(url.clone()));
            Place::new(url, authorization)
        };
        if let Some(url) = &self.configured {
            return Ok(at(url.clone()));
        }
        match &self.link.remote {
            Remote::Http(url) => Ok(at(beside(url)?)),
            Remote::Ssh(address) => match self.log_in(address).await? {
                Some(login) => place_of(login, address),
                None => {
                    let text = format!("https://{}/{}", bracketed(&address.host), address.path.trim_start_matches('/'));
                    let bad = |_| Error::invalid("BAD_URI", format!("{} has no https address", self.link.remote));
                    Ok(at(beside(&Url::parse(&text).map_err(bad)?)?))
                }
            },
        }
    }

    /// Asks the ssh host; `None` where it does not know the question.
    async fn log_in(&self, address: &SshAddress) -> Result<Option<Login>> {
        let command = format!("git-lfs-authenticate '{}' download", address.path.replace('\'', r"'\''"));
        let Some(call) = self.link.login(&self.workshop, &command) else { return Ok(None) };
        let mut text = Vec::new();
        let ended = call.run(&self.workshop, |bytes| collect(&mut text, bytes, LOGIN_BYTES)).await?;
        Ok(if ended.good { serde_json::from_slice(&text).ok() } else { None })
    }
}

fn place_of(login: Login, address: &SshAddress) -> Result<Place> {
    let bad = || Error::corrupt("BAD_ANSWER", format!("{address} says where its LFS is in a way that makes no sense"));
    let base = Url::parse(&login.href).map_err(|_| bad())?;
    let authorization = stated(login.header).ok_or_else(bad)?;
    Ok(Place { ends: true, ..Place::new(base, authorization) })
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// `<repository>.git/info/lfs`.
fn beside(repository: &Url) -> Result<Url> {
    let base = repository.as_str().trim_end_matches('/');
    let base = base.strip_suffix(".git").unwrap_or(base);
    Url::parse(&format!("{base}.git/info/lfs")).map_err(|error| Error::internal("building a URL of LFS").because(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lfs_is_beside_its_repository() {
        for url in ["https://h/o/r", "https://h/o/r.git", "https://h/o/r/"] {
            assert_eq!(beside(&Url::parse(url).unwrap()).unwrap().as_str(), "https://h/o/r.git/info/lfs");
        }
    }
}
