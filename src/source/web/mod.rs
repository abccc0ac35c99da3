//! The web: a file, or with a trailing `/` everything below an address, by HTTP, HTTPS, FTP or FTPS.
//!
//! | address | what it is | where |
//! |---|---|---|
//! | `http(s)://host/file` | that file | [`mod@file`] |
//! | `http(s)://host/dir/` | everything below, by the server's index pages | [`tree`], [`index`], [`html`] |
//! | `ftp(s)://host/file`, `ftp(s)://host/dir/` | that file, or everything below | [`ftp`] |
//!
//! User name and password come with the request (`username`, `password`) or as user information in the address; those of the
//! request win. So does a query that signs the address or gives access (`query`), which is taken out of an address that is created with it. Nothing
//! is kept beyond the ingest that opened the source.

mod file;
mod ftp;
mod html;
mod index;
mod probe;
mod tree;
mod validators;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::connect::{SourceContext, has_scheme, parse_http, split_user_information};
use super::http::Authorization;
use super::{Credentials, Source, SourceSpec, UNPINNED};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Longest listing of one directory, whatever it is written in: about 100,000 entries as servers write them.
const LISTING_BYTES: usize = 32 << 20;

/// The file or tree that `spec` means.
///
/// # Errors
/// `BAD_URI` for an address that cannot be.
pub(super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let (plain, user_information) = split_user_information(&spec.uri);
    let given = credentials
        .get("username")
        .map(|name| (name.to_owned(), credentials.get("password").unwrap_or_default().to_owned()));
    let login = given.or(user_information);
    if has_scheme(&plain, &["ftp", "ftps"]) {
        return ftp::connect(&plain, login, context);
    }
    let mut url = parse_http(&plain, "the URI")?;
    if let Some(query) = credentials.get("query") {
        url.set_query(Some(query));
    }
    let authorization = login.map(|(username, password)| Authorization::Basic(username, password));
    if !url.path().ends_with('/') {
        return Ok(Arc::new(file::WebFile::new(context.http.clone(), url, authorization)));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(Error::invalid("BAD_URI", "the address of a directory of the web has no query and no fragment")
            .remedy("leave away what follows the last `/`"));
    }
    Ok(Arc::new(tree::WebTree::new(context.http.clone(), url, authorization)))
}

/// A revision that equals no other: nothing resumes across bytes that nobody vouches for.
fn unpinned() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_nanos());
    let seed = format!("{nanos}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    format!("{UNPINNED}{}", Digest::of(seed.as_bytes()))
}
