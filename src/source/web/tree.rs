//! Everything below a directory of the web, by the server's index pages.
//!
//! Opening fetches the page of the directory and of every directory it links to, and asks for the head of every file: pages tell rounded sizes and
//! no validators. A link that is redirected to itself with a `/` behind it is a directory after all. Only links strictly below a page
//! count ([`index`]), so a walk cannot go in a circle; what servers make endless by links of their own file system is stopped by
//! the bounds on depth, length of paths, and entries.
//!
//! A page may be redirected, though not to another origin: what lies there is not what was asked for. Files may; credentials stay
//! behind then. A page that lists nothing and does not look like an index is an error: it hides what the directory holds.
//!
//! The revision is a digest over every path with its size and validator, if each has one. The locator of a file carries its validators, and
//! each read is held to them.
//!
//! At most [`PAGES_AT_A_TIME`] pages of [`LISTING_BYTES`] are in memory. One request that fails in passing does not begin the listing
//! anew: it is tried again here, a few times.

use std::collections::HashSet;
use std::ops::Range;

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Url;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderName, RANGE};

use super::super::asking::ask_again;
use super::super::http::{
    Authorization, Failure, HttpClient, Request, Target, Wanted, read_document, shown, without_user_information,
};
use super::super::{ByteStream, Counter, Expected, File, Listed, Listing, Opened, Source, What, source_changed};
use super::index::{self, Index, Link};
use super::probe::{Probe, check_encoding};
use super::validators::{Validators, explain, text_of};
use super::{LISTING_BYTES, unpinned};
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::limits;
use crate::names::EntryPath;

/// Index pages fetched at a time: each may take [`LISTING_BYTES`].
const PAGES_AT_A_TIME: usize = 4;

/// Heads asked for at a time: enough that 20,000 files over a distance of 50 ms take a minute, and no more than browsers in a
/// row would ask.
const HEADS_AT_A_TIME: usize = 16;

/// What index pages are asked to be: JSON where the server can, for it is exact.
const INDEX_TYPES: &str = "application/json, text/html;q=0.9, application/xhtml+xml;q=0.9, text/xml;q=0.8";

/// A directory at a URL.
#[derive(Debug)]
pub(super) struct WebTree {
    http: HttpClient,
    url: Url,
    authorization: Option<Authorization>,
}

impl WebTree {
    /// The directory at `url`, which ends in `/`; nothing is asked before it is opened.
    pub(super) fn new(http: HttpClient, url: Url, authorization: Option<Authorization>) -> Self {
        Self { http, url: without_user_information(url), authorization }
    }

    /// Credentials for `url`: those of the origin that was asked for.
    fn authorization(&self, url: &Url) -> Option<&Authorization> {
        self.authorization.as_ref().filter(|_| url.origin() == self.url.origin())
    }

    async fn index(&self, url: &Url) -> Result<Index> {
        let request = Request::get(url, self.authorization(url)).headers(&[(ACCEPT, INDEX_TYPES.to_owned())]);
        let reply = self.http.send(&request).await.map_err(Failure::into_error)?;
        if reply.url.origin() != url.origin() {
            let message = format!("listing {}: it is redirected to another origin ({})", shown(url), shown(&reply.url));
            return Err(Error::invalid("BAD_REDIRECT", message).remedy("give the address that it leads to"));
        }
        check_encoding(reply.response.headers(), b"", url)?;
        let content_type = text_of(reply.response.headers(), CONTENT_TYPE).unwrap_or_default();
        let found_at = reply.url.clone();
        let text = read_document(reply, LISTING_BYTES, &self.http).await?;
        index::parse(&content_type, &text, &found_at).ok_or_else(|| {
            Error::invalid("NOT_AN_INDEX", format!("listing {}: the page is no index of a directory", shown(url)))
                .remedy("give the address of a file, or have the server list the directory")
                .fact("content_type", content_type)
        })
    }

    /// The file at `url`; a directory if that is what it turns out to be.
    async fn file(&self, path: EntryPath, url: Url) -> Result<Found> {
        let probe = ask_again(|| Probe::head(&url, self.authorization(&url), &self.http)).await?;
        if probe.url.origin() == url.origin() && probe.url.path().strip_suffix('/') == Some(url.path()) {
            return Ok(Found::Directory(Link { path, url: probe.url, directory: true }));
        }
        check_encoding(&probe.headers, path.file_name(), &url)?;
        let validators = Validators::of(&probe.headers);
        let pin = validators.pin(probe.size);
        let file = File {
            locator: Locator { url, validators }.to_text().into(),
            size: probe.size,
            executable: false,
            // Ranges of what nothing pins may be of two files.
            ranges: probe.ranges && pin.is_some(),
            expected: Expected::default(),
        };
        Ok(Found::File { path, file, pin })
    }

    /// Believes of ranges what the largest file shows, if it is longer than a unit: some servers announce what they do not keep.
    async fn believe_ranges(&self, files: &mut [(EntryPath, File, Option<String>)]) -> Result<()> {
        let ranged = files.iter().map(|(_, file, _)| file).filter(|file| file.ranges);
        let Some(largest) = ranged.max_by_key(|file| file.size).filter(|file| file.size > Some(limits::UNIT_BYTES))
        else {
            return Ok(());
        };
        let url = Locator::parse(&largest.locator)?.url;
        let target = Target::new(url.clone(), self.authorization(&url).cloned());
        let probe = ask_again(|| Probe::first_byte(&target, self.authorization(&url), &self.http)).await?;
        files.iter_mut().for_each(|(_, file, _)| file.ranges &= probe.ranges);
        Ok(())
    }
}

#[async_trait]
impl Source for WebTree {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let mut walk = Walk {
            tree: self,
            counter,
            seen: HashSet::new(),
            directories: Vec::new(),
            files: Vec::new(),
            skipped: Vec::new(),
        };
        walk.run().await?;
        let Walk { mut files, directories, skipped, .. } = walk;
        self.believe_ranges(&mut files).await?;
        files.sort_by(|(one, ..), (other, ..)| one.cmp(other));
        let revision = revision(&files, &directories);
        let directories = directories.into_iter().map(|path| Listed { path, what: What::Directory });
        let files = files.into_iter().map(|(path, file, _)| Listed { path, what: What::File(file) });
        Ok(Opened::Listed(Listing { skipped, ..Listing::new(revision, directories.chain(files).collect()) }))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let Locator { url, validators } = Locator::parse(&file.locator)?;
        let what = shown(&url);
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(&what)?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let mut headers: Vec<(HeaderName, String)> = Vec::new();
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        headers.extend(validators.condition());
        let request = Request::get(&url, self.authorization(&url)).headers(&headers);
        let reply =
            self.http.send(&request).await.map_err(|failure| match failure.status().map(|code| code.as_u16()) {
                Some(404 | 410) => source_changed(&what, "it was removed"),
                _ => explain(failure, &what),
            })?;
        validators.check(reply.response.headers(), &what)?;
        wanted.accept(reply, &self.http)
    }

    async fn confirm(&self, file: &File) -> Result<()> {
        let Locator { url, validators } = Locator::parse(&file.locator)?;
        let probe = Probe::head(&url, self.authorization(&url), &self.http).await;
        validators.confirm(probe, file.size, &shown(&url))
    }
}

/// What a link turned out to be.
enum Found {
    File { path: EntryPath, file: File, pin: Option<String> },
    Directory(Link),
}

/// A listing under way.
struct Walk<'a> {
    tree: &'a WebTree,
    counter: &'a Counter,
    seen: HashSet<(EntryPath, bool)>,
    directories: Vec<EntryPath>,
    files: Vec<(EntryPath, File, Option<String>)>,
    skipped: Vec<(String, String)>,
}

impl Walk<'_> {
    /// Goes down level by level until there is no page and no file that has not been asked for.
    async fn run(&mut self) -> Result<()> {
        let tree = self.tree;
        let mut pages = vec![Link { path: EntryPath::root(), url: tree.url.clone(), directory: true }];
        let mut unprobed: Vec<Link> = Vec::new();
        while !pages.is_empty() || !unprobed.is_empty() {
            let mut below = Vec::new();
            let mut indexes = stream::iter(std::mem::take(&mut pages))
                .map(|page| async move { ask_again(|| tree.index(&page.url)).await.map(|index| (page.path, index)) })
                .buffer_unordered(PAGES_AT_A_TIME);
            while let Some((path, index)) = indexes.try_next().await? {
                self.admit(&path, index, &mut below)?;
            }
            drop(indexes);
            let (directories, files): (Vec<_>, Vec<_>) = below.into_iter().partition(|link| link.directory);
            pages = directories;
            unprobed.extend(files);
            if pages.is_empty() {
                pages = self.probe(std::mem::take(&mut unprobed)).await?;
            }
        }
        Ok(())
    }

    /// Takes over what the page of the directory `of` lists.
    fn admit(&mut self, of: &EntryPath, index: Index, below: &mut Vec<Link>) -> Result<()> {
        let shown_under = |name: &str| if of.is_root() { name.to_owned() } else { format!("{of}/{name}") };
        self.skipped.extend(index.refused.into_iter().map(|(name, why)| (shown_under(&name), why)));
        for link in index.links {
            let path = of.below(&link.path)?;
            if self.seen.insert((path.clone(), link.directory)) {
                if link.directory {
                    self.directories.push(path.clone());
                }
                below.push(Link { path, ..link });
            }
        }
        (self.counter)(self.seen.len() + self.skipped.len())
            .map_err(|error| error.during(format!("listing {}", shown(&self.tree.url))))
    }

    /// Asks for the heads of `links`; those that are directories after all are returned.
    async fn probe(&mut self, links: Vec<Link>) -> Result<Vec<Link>> {
        let tree = self.tree;
        let mut heads =
            stream::iter(links).map(|link| tree.file(link.path, link.url)).buffer_unordered(HEADS_AT_A_TIME);
        let mut directories = Vec::new();
        while let Some(found) = heads.try_next().await? {
            match found {
                Found::File { path, file, pin } => self.files.push((path, file, pin)),
                Found::Directory(link) if self.seen.insert((link.path.clone(), true)) => {
                    self.directories.push(link.path.clone());
                    directories.push(link);
                }
                Found::Directory(_) => {}
            }
        }
        Ok(directories)
    }
}

/// Names exactly these bytes if every file is pinned.
fn revision(files: &[(EntryPath, File, Option<String>)], directories: &[EntryPath]) -> String {
    let mut directories: Vec<_> = directories.iter().collect();
    directories.sort();
    let mut digester = Digester::new();
    let mut add = |part: &[u8]| {
        digester.update(&(part.len() as u64).to_le_bytes());
        digester.update(part);
    };
    directories.iter().for_each(|path| add(path.as_bytes()));
    for (path, file, pin) in files {
        let Some(pin) = pin else { return unpinned() };
        add(path.as_bytes());
        add(&file.size.unwrap_or(u64::MAX).to_le_bytes());
        add(pin.as_bytes());
    }
    format!("index:{}", digester.finish())
}

/// How a file is found again: its URL and validators, as lines of text; neither can hold a line break.
#[derive(Debug, PartialEq, Eq)]
struct Locator {
    url: Url,
    validators: Validators,
}

impl Locator {
    fn to_text(&self) -> String {
        let line = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{}\n{}\n{}", self.url, line(&self.validators.etag), line(&self.validators.last_modified))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut lines = text.split('\n');
        let url = lines.next().and_then(|url| Url::parse(url).ok());
        let mut line = || lines.next().filter(|line| !line.is_empty()).map(str::to_owned);
        let validators = Validators { etag: line(), last_modified: line() };
        match url {
            Some(url) => Ok(Self { url, validators }),
            None => Err(Error::internal("a file has no URL")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locator_is_read_as_it_was_written() {
        for (etag, date) in [(None, None), (Some("\"a\""), None), (None, Some("d")), (Some("W/\"a\""), Some("d"))] {
            let validators = Validators { etag: etag.map(str::to_owned), last_modified: date.map(str::to_owned) };
            let locator = Locator { url: Url::parse("http://h/a%20b").unwrap(), validators };
            assert_eq!(Locator::parse(&locator.to_text()).unwrap(), locator);
        }
    }

    #[test]
    fn a_revision_is_met_again_only_if_all_is_pinned() {
        let file = |name: &str, pin: Option<&str>| {
            let file = File {
                locator: "".into(),
                size: Some(1),
                executable: false,
                ranges: true,
                expected: Expected::default(),
            };
            (EntryPath::new(name.as_bytes()).unwrap(), file, pin.map(str::to_owned))
        };
        let pinned = [file("a", Some("x")), file("b", Some("y"))];
        assert_eq!(revision(&pinned, &[]), revision(&pinned, &[]));
        assert_ne!(revision(&pinned, &[]), revision(&[file("a", Some("x")), file("b", Some("z"))], &[]));
        let loose = [file("a", Some("x")), file("b", None)];
        assert_ne!(revision(&loose, &[]), revision(&loose, &[]));
    }
}
