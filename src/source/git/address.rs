//! Where a repository is: an http(s) URL, `ssh://[user@]host[:port]/path` or `user@host:path`, and what a submodule's relative URL
//! means there.
//!
//! An address is checked once, here: other schemes (`file:`, `ext::`, `git:`), local paths, user information, and words that a
//! program could take for an option or a line of its own are refused. What is left may stand in an argument list, in a line of
//! an ssh configuration and in an error.

use std::fmt;

use reqwest::Url;

use super::super::connect::split_user_information;
use crate::error::{Error, Result};
use crate::names::show_bytes;

/// The user that git hosts log in.
const SSH_USER: &str = "git";

/// Where ssh listens unless the address says otherwise.
const SSH_PORT: u16 = 22;

/// An address that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Remote {
    /// Without user information, query and fragment.
    Http(Url),
    Ssh(SshAddress),
}

/// A repository behind a login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SshAddress {
    pub(super) user: String,
    /// A name or an address, without brackets.
    pub(super) host: String,
    pub(super) port: Option<u16>,
    /// As the host is to see it: absolute, or relative to the user's home.
    pub(super) path: String,
    /// Written as `user@host:path`, where a path may be relative.
    short: bool,
}

impl Remote {
    /// # Errors
    /// `BAD_URI`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let parsed = match text.split_once("://") {
            Some((scheme, _)) if matches!(scheme.to_ascii_lowercase().as_str(), "http" | "https") => parse_http(text),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("ssh") => SshAddress::parse_long(rest).map(Self::Ssh),
            Some(_) => None,
            None => SshAddress::parse_short(text).map(Self::Ssh),
        };
        parsed.filter(|_| !text.contains(char::is_control)).ok_or_else(|| refused(text))
    }

    /// The repository at `url` of a `.gitmodules` in this one: absolute, or relative to this one's own address.
    ///
    /// # Errors
    /// `BAD_URI`.
    pub(super) fn submodule(&self, url: &str) -> Result<Self> {
        if !(url.starts_with("./") || url.starts_with("../")) {
            // What a repository says about users and passwords is not to be followed.
            return Self::parse(&split_user_information(url).0);
        }
        let mut segments: Vec<&str> = self.path().trim_end_matches('/').split('/').collect();
        for segment in url.split('/') {
            match segment {
                "" | "." => {}
                ".." if segments.iter().all(|segment| segment.is_empty()) => return Err(refused(url)),
                ".." => drop(segments.pop()),
                other => segments.push(other),
            }
        }
        let path = segments.join("/");
        match self {
            Self::Http(base) => {
                let mut url = base.clone();
                url.set_path(&path);
                Self::parse(url.as_str())
            }
            Self::Ssh(base) => Self::parse(&SshAddress { path, ..base.clone() }.to_string()),
        }
    }

    fn path(&self) -> &str {
        match self {
            Self::Http(url) => url.path(),
            Self::Ssh(address) => &address.path,
        }
    }

    /// The protocol, as `GIT_ALLOW_PROTOCOL` names it.
    pub(super) fn protocol(&self) -> &str {
        match self {
            Self::Http(url) => url.scheme(),
            Self::Ssh(_) => "ssh",
        }
    }

    /// Whether credentials for the one are meant for the other.
    pub(super) fn same_origin(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Http(one), Self::Http(other)) => one.origin() == other.origin(),
            (Self::Ssh(one), Self::Ssh(other)) => one.is_at(other),
            _ => false,
        }
    }

    /// Whether an ssh key that came with this address may be offered at `other`: to the very server, or, where this is an http(s)
    /// address, to the ssh server that the same host has beside.
    pub(super) fn shares_key_with(&self, other: &SshAddress) -> bool {
        match self {
            Self::Ssh(one) => one.is_at(other),
            Self::Http(url) => {
                let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
                host.eq_ignore_ascii_case(&other.host) && other.port() == SSH_PORT
            }
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(url) => f.write_str(url.as_str()),
            Self::Ssh(address) => address.fmt(f),
        }
    }
}

fn parse_http(text: &str) -> Option<Remote> {
    let mut url = Url::parse(text).ok()?;
    let plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    if !plain || url.fragment().is_some() || !url.has_host() {
        return None;
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Some(Remote::Http(url))
}

impl SshAddress {
    fn parse_long(rest: &str) -> Option<Self> {
        let (authority, path) = rest.split_at(rest.find('/')?);
        let (user, place) = authority.rsplit_once('@').unwrap_or((SSH_USER, authority));
        let (host, port) = split_port(place)?;
        let port = port.map(str::parse).transpose().ok()?;
        Self { user: user.to_owned(), host: host.to_owned(), port, path: path.to_owned(), short: false }.checked()
    }

    fn parse_short(text: &str) -> Option<Self> {
        let (user, rest) = text.split_once('@')?;
        let (host, path) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once("]:")?,
            None => rest.split_once(':')?,
        };
        // A second `:` is another way to name a helper program.
        let plain = !path.starts_with(':');
        let address =
            Self { user: user.to_owned(), host: host.to_owned(), port: None, path: path.to_owned(), short: true };
        address.checked().filter(|_| plain)
    }

    fn checked(self) -> Option<Self> {
        let word = |text: &str, more: &[u8]| {
            !text.is_empty()
                && !text.starts_with('-')
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte))
        };
        let path = !self.path.is_empty() && self.path != "/" && !self.path.starts_with('-');
        (word(&self.user, b"._-+") && word(&self.host, b"._-:") && path).then_some(self)
    }

    /// Where it listens.
    pub(super) fn port(&self) -> u16 {
        self.port.unwrap_or(SSH_PORT)
    }

    /// Whether both are of one server.
    fn is_at(&self, other: &Self) -> bool {
        self.host.eq_ignore_ascii_case(&other.host) && self.port() == other.port()
    }

    /// The host as known_hosts files name it.
    pub(super) fn known_as(&self) -> String {
        match self.port() {
            SSH_PORT => self.host.clone(),
            port => format!("[{}]:{port}", self.host),
        }
    }
}

impl fmt::Display for SshAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, host, path, .. } = self;
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        match (self.short, self.port) {
            (true, _) => write!(f, "{user}@{host}:{path}"),
            (false, Some(port)) => write!(f, "ssh://{user}@{host}:{port}{path}"),
            (false, None) => write!(f, "ssh://{user}@{host}{path}"),
        }
    }
}

/// `host`, `host:port`, `[address]`, `[address]:port`.
fn split_port(place: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = place.strip_prefix('[') {
        let (host, behind) = rest.split_once(']')?;
        return match behind.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None => behind.is_empty().then_some((host, None)),
        };
    }
    match place.split_once(':') {
        Some((host, port)) => Some((host, Some(port))),
        None => Some((place, None)),
    }
}

fn refused(text: &str) -> Error {
    let shown = show_bytes(split_user_information(text).0.as_bytes());
    Error::invalid("BAD_URI", format!("`{shown}` is not the address of a repository that is fetched"))
        .remedy("give an http(s)://, ssh:// or user@host:path address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_or_refused() {
        for good in [
            "https://h/o/r.git",
            "http://127.0.0.1:8080/r",
            "ssh://git@h/o/r.git",
            "ssh://git@[::1]:2222/r",
            "git@github.com:o/r.git",
            "git@h:~/r",
            "git@[::1]:r",
        ] {
            assert_eq!(Remote::parse(good).unwrap().to_string(), good);
        }
        assert_eq!(Remote::parse("ssh://h/r").unwrap().to_string(), "ssh://git@h/r");
        assert_eq!(Remote::parse("https://h/o/r/").unwrap().to_string(), "https://h/o/r");
        for bad in [
            "file:///etc",
            "/etc",
            "../x",
            "ext::sh -c id",
            "ext::x@h:p",
            "git://h/r",
            "-oProxyCommand=x@h:p",
            "ssh://-oProxyCommand=x/r",
            "ssh://-x@h/r",
            "git@-h:r",
            "git@h:-r",
            "git@h::r",
            "git@h:",
            "ssh://h",
            "ssh://h:x/r",
            "ssh://h y/r",
            "https://user:secret@h/r",
            "https://h/r?x",
            "https://h/r#x",
            "https://h/r\n",
            "git@h:r\nHostName x",
            "",
        ] {
            let error = Remote::parse(bad).unwrap_err();
            assert_eq!(error.reason(), "BAD_URI", "{bad}");
            assert!(!error.report().contains("secret"));
        }
    }

    #[test]
    fn relative_submodules_are_found_beside_their_parent() {
        for (base, url, found) in [
            ("https://h/o/r.git", "../s.git", Some("https://h/o/s.git")),
            ("https://h/o/r.git", "../../p/s", Some("https://h/p/s")),
            ("https://h/o/r", "./s", Some("https://h/o/r/s")),
            ("https://h/o/r", "../../../s", None),
            ("git@h:o/r.git", "../s.git", Some("git@h:o/s.git")),
            ("ssh://git@h:22/o/r.git", "../s.git", Some("ssh://git@h:22/o/s.git")),
            ("https://h/o/r", "https://token:x@k/s", Some("https://k/s")),
            ("https://h/o/r", "git@k:s", Some("git@k:s")),
            ("https://h/o/r", "file:///etc", None),
            ("https://h/o/r", "/etc", None),
            ("https://h/o/r", "-x", None),
        ] {
            let joined = Remote::parse(base).unwrap().submodule(url);
            assert_eq!(joined.map(|remote| remote.to_string()).ok().as_deref(), found, "{base} {url}");
        }
    }

    #[test]
    fn credentials_are_for_one_origin() {
        let remote = |text| Remote::parse(text).unwrap();
        assert!(remote("https://h/a").same_origin(&remote("https://h:443/b")));
        assert!(remote("git@h:a").same_origin(&remote("ssh://x@H/b")));
        for (one, other) in [("https://h/a", "http://h/a"), ("https://h/a", "https://k/a"), ("https://h/a", "git@h:a")]
        {
            assert!(!remote(one).same_origin(&remote(other)));
        }
    }
    #[test]
    fn a_key_is_for_one_host() {
        for (given_for, asked, goes) in [
            ("git@h:a", "ssh://x@H/b", true),
            ("https://h/a", "git@h:b", true),
            ("https://[::1]/a", "git@[::1]:b", true),
            ("https://h/a", "ssh://git@h:2222/b", false),
            ("ssh://git@h:2222/a", "git@h:b", false),
            ("git@h:a", "git@k:a", false),
            ("https://h/a", "git@k:a", false),
        ] {
            let Remote::Ssh(address) = Remote::parse(asked).unwrap() else { unreachable!() };
            assert_eq!(Remote::parse(given_for).unwrap().shares_key_with(&address), goes, "{given_for} {asked}");
        }
    }
}
