//! From a branch, tag or commit to a bare, shallow repository that holds just that commit.
//!
//! Two steps. `ls-remote` turns the name into an object id, and tells what is missing: repository, name or right. `fetch --depth 1` of
//! that id then brings the one commit, so a branch that moves in between moves nothing here; where a server no longer gives the
//! id, the name is looked up again by whoever retries.

use super::access::Access;
use super::child::{Ended, Workshop};
use super::link::{Link, git};
use super::said::{explain, refuses_commit};
use crate::error::{Error, Kind, Result};

/// Answer of `ls-remote` to at most five exact names.
const REFERENCES_BYTES: usize = 64 << 10;

/// What git can do without which nothing here is safe: `http.curloptResolve` came with 2.37.
const OLDEST_GIT: (u32, u32) = (2, 37);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// What the repository gives first.
    Default,
    /// A branch, a tag, or a full name such as `refs/pull/1/head`.
    Name(String),
    /// A commit, in full.
    Commit(String),
}

impl Wanted {
    /// What the option `branch` means.
    ///
    /// # Errors
    /// `BAD_BRANCH`.
    pub(super) fn of(branch: Option<&str>) -> Result<Self> {
        match branch {
            None | Some("HEAD") => Ok(Self::Default),
            Some(text) if is_object_id(text) => Ok(Self::Commit(text.to_ascii_lowercase())),
            Some(text) if is_reference(text) => Ok(Self::Name(text.to_owned())),
            Some(_) => Err(Error::invalid("BAD_BRANCH", "the option `branch` is no name that git knows")
                .remedy("give a branch, a tag, or a whole commit id")),
        }
    }

    /// Names to ask for, the best first; a tag has its commit behind `^{}`.
    fn names(&self) -> Vec<String> {
        match self {
            Self::Default | Self::Commit(_) => vec!["HEAD".to_owned()],
            Self::Name(name) if name.starts_with("refs/") => vec![name.clone()],
            Self::Name(name) => vec![format!("refs/heads/{name}"), format!("refs/tags/{name}")],
        }
    }
}

/// Whether `text` is an object's whole id, of either kind.
pub(super) fn is_object_id(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// git's rule for names of references, as far as a name could be mistaken for something else.
fn is_reference(name: &str) -> bool {
    let bad = |byte: u8| byte <= b' ' || byte == 0x7f || b"~^:?*[\\".contains(&byte);
    !name.bytes().any(bad)
        && !name.starts_with(['-', '/'])
        && !name.ends_with(['/', '.'])
        && !["..", "//", "@{", "/."].iter().any(|part| name.contains(part))
}

/// # Errors
/// `GIT_TOO_OLD`, `PROGRAM_MISSING`.
pub(super) async fn check_version(workshop: &Workshop) -> Result<()> {
    let mut text = String::new();
    git(workshop, 0, &["version"])
        .run(workshop, |bytes| {
            text.push_str(&String::from_utf8_lossy(bytes));
            Ok(())
        })
        .await?;
    let numbers = text.split_whitespace().nth(2).unwrap_or_default();
    let mut parts = numbers.split('.').map_while(|part| part.parse::<u32>().ok());
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if found >= OLDEST_GIT {
        return Ok(());
    }
    let (major, minor) = OLDEST_GIT;
    let message = format!("git sources need git {major}.{minor}, this host has `{}`", text.trim());
    Err(Error::new(Kind::Unsupported, "GIT_TOO_OLD", message).remedy("install a newer git"))
}

/// Fetches what is `wanted` into the `number`-th repository and gives the commit's id.
///
/// # Errors
/// Not found, denied, or unavailable, as the server says.
pub(super) async fn fetch(
    link: &Link,
    number: usize,
    wanted: &Wanted,
    access: &Access,
    workshop: &Workshop,
) -> Result<String> {
    let id = match wanted {
        Wanted::Commit(id) => id.clone(),
        Wanted::Default | Wanted::Name(_) => resolve(link, wanted, access, workshop).await?,
    };
    let format = if id.len() == 64 { "sha256" } else { "sha1" };
    let object_format = format!("--object-format={format}");
    let init = git(workshop, number, &["init", "--quiet", "--bare", "--template=", &object_format]);
    good(init.run(workshop, |_| Ok(())).await?, "making a repository")?;
    let remote = link.remote.to_string();
    let arguments = [
        "fetch",
        "--progress",
        "--depth=1",
        "--no-tags",
        "--no-write-fetch-head",
        "--no-recurse-submodules",
        "--no-auto-maintenance",
        "--",
        &remote,
        &id,
    ];
    let ended = link.call(workshop, &arguments).run(workshop, |_| Ok(())).await.map_err(|error| during(error, link))?;
    if !ended.good {
        return Err(match wanted {
            _ if !refuses_commit(&ended.said) => explain(&ended.said, &link.remote, access),
            Wanted::Commit(id) => no_such_commit(link, id),
            Wanted::Default | Wanted::Name(_) => Error::unavailable(
                "SOURCE_CHANGED",
                format!("fetching {}: it changed between being looked at and fetched", link.remote),
            ),
        });
    }
    let commit = commit_of(&id, number, workshop).await?;
    commit.ok_or_else(|| no_such_commit(link, &id))
}

fn during(error: Error, link: &Link) -> Error {
    error.during(format!("fetching {}", link.remote)).fact("repository", &link.remote)
}

fn no_such_commit(link: &Link, id: &str) -> Error {
    Error::not_found("REVISION_NOT_FOUND", format!("fetching {}: it does not give a commit `{id}`", link.remote))
        .remedy("check the commit's id; some servers give only what branches and tags name")
        .fact("repository", &link.remote)
        .fact("revision", id)
}

/// The object that a name means now.
async fn resolve(link: &Link, wanted: &Wanted, access: &Access, workshop: &Workshop) -> Result<String> {
    let (remote, names) = (link.remote.to_string(), wanted.names());
    let mut arguments = vec!["ls-remote", "--", &remote];
    arguments.extend(names.iter().map(String::as_str));
    let mut text = Vec::new();
    let take = |bytes: &[u8]| collect(&mut text, bytes, REFERENCES_BYTES);
    let ended = link.call(workshop, &arguments).run(workshop, take).await.map_err(|error| during(error, link))?;
    if !ended.good {
        return Err(explain(&ended.said, &link.remote, access));
    }
    let text = String::from_utf8_lossy(&text);
    let id = names.iter().find_map(|name| reference(&text, name));
    id.ok_or_else(|| match wanted {
        Wanted::Name(name) => Error::not_found(
            "REVISION_NOT_FOUND",
            format!("the repository {} has no branch, tag or commit `{name}`", link.remote),
        )
        .remedy("give a `branch` that it has; commits are given by their whole id")
        .fact("repository", &link.remote)
        .fact("revision", name),
        Wanted::Default | Wanted::Commit(_) => {
            Error::not_found("EMPTY_REPOSITORY", format!("the repository {} has no commit to begin with", link.remote))
                .remedy("push to it, or give a `branch` that it has")
                .fact("repository", &link.remote)
        }
    })
}

/// The id of exactly `name`; `ls-remote` takes names for patterns of endings.
fn reference(text: &str, name: &str) -> Option<String> {
    let found = text.lines().filter_map(|line| line.split_once('\t')).find(|(_, found)| *found == name);
    found.map(|(id, _)| id).filter(|id| is_object_id(id)).map(str::to_owned)
}

/// The commit that `id` is or, being a tag, names; `None` for anything else.
async fn commit_of(id: &str, number: usize, workshop: &Workshop) -> Result<Option<String>> {
    let mut text = Vec::new();
    let object = format!("{id}^{{commit}}");
    let call = git(workshop, number, &["rev-parse", "--verify", "--quiet", "--end-of-options", &object]);
    let ended = call.run(workshop, |bytes| collect(&mut text, bytes, REFERENCES_BYTES)).await?;
    let commit = String::from_utf8_lossy(&text).trim().to_owned();
    Ok((ended.good && is_object_id(&commit)).then_some(commit))
}

/// Adds `bytes` to an answer that should be short.
pub(super) fn collect(answer: &mut Vec<u8>, bytes: &[u8], most: usize) -> Result<()> {
    if answer.len() + bytes.len() > most {
        return Err(Error::invalid("ANSWER_TOO_LONG", format!("an answer of git is longer than {most} bytes")));
    }
    answer.extend_from_slice(bytes);
    Ok(())
}

/// Insists that a child that talks to nobody succeeded.
pub(super) fn good(ended: Ended, doing: &str) -> Result<()> {
    if ended.good {
        return Ok(());
    }
    let last = ended.said.lines().last().unwrap_or("without a word").to_owned();
    Err(Error::corrupt("REPOSITORY_MALFORMED", format!("{doing}: git gave up (`{last}`)"))
        .remedy("let `git fsck` look at the repository"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_told_by_its_form() {
        let id = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(Wanted::of(None).unwrap(), Wanted::Default);
        assert_eq!(Wanted::of(Some(id)).unwrap(), Wanted::Commit(id.to_owned()));
        assert_eq!(Wanted::of(Some("v1.0")).unwrap().names(), ["refs/heads/v1.0", "refs/tags/v1.0"]);
        assert_eq!(Wanted::of(Some("refs/pull/1/head")).unwrap().names(), ["refs/pull/1/head"]);
        for bad in ["-x", "a b", "a..b", "a*", "a^", "a:b", "a/", "@{1}", "a\\b", "a/.b"] {
            assert_eq!(Wanted::of(Some(bad)).unwrap_err().reason(), "BAD_BRANCH", "{bad}");
        }
    }

    #[test]
    fn only_the_exact_reference_counts() {
        let id = "0123456789abcdef0123456789abcdef01234567";
        let text = format!("{id}\trefs/heads/x/refs/heads/main\n{id}\trefs/heads/main2\n");
        assert_eq!(reference(&text, "refs/heads/main"), None);
        assert_eq!(reference(&format!("{text}{id}\trefs/heads/main\n"), "refs/heads/main").as_deref(), Some(id));
    }
}
