//! Secrets for sources: those that come with a request, and those that the operator keeps in the credentials directory.
//!
//! The directory holds one file `NAME.toml` for each named credential, in the form
//! ```toml
//! token = "..."                # secrets by name, as a request gives them: token, username, password, key_id, secret, ssh_key ...
//! owners = ["team-a"]          # who may use it; absent: everybody
//! types = ["huggingface"]      # for which types of source; absent: any
//! hosts = ["hub.example.org"]  # which hosts it may be sent to; `*.` in front stands for any name below
//! ```
//! Without `hosts` it goes to the service of its type alone (no `endpoint` given), and for `git`, `web` and `azure`, whose URI
//! names the host, nowhere: whoever may *use* a secret must not get to *read* it by naming a host of its own.
//!
//! A request names one by the option `credentials`, which is recorded with the source; secrets are not, so a fill that begins again
//! (after a restart, by retry) reads the file again, and rotation needs no more than a new file. A request that names none gets the
//! file called like its type, if there is one that it may use. A request that brings secrets gets those alone: half of
//! one and half of the other would be neither.
//!
//! A name that does not exist and one that this request may not use give the same error. Files that others than root can read or
//! write are refused. Nothing here is written, cached or shown; errors hold no line of a file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use reqwest::Url;
use toml::{Table, Value};

use super::{SourceKind, SourceSpec};
use crate::error::{Error, Result};
use crate::names::show_bytes;

/// The option that names a credential.
const OPTION: &str = "credentials";

/// Longest credential file: a service account's key and a list of owners have some kilobytes.
const FILE_BYTES: u64 = 256 << 10;

/// Longest name.
const NAME_BYTES: usize = 64;

/// Secrets of one request, by name (`token`, `username`, `password`, `key_id`, ...): in memory only; `Debug` shows the names alone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials(BTreeMap<String, String>);

impl Credentials {
    /// Wraps named secrets.
    pub fn new(secrets: BTreeMap<String, String>) -> Self {
        Self(secrets)
    }

    /// The secret called `name`, if given and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// All of them, by name: for whoever holds them in memory beyond this process, and nobody else.
    pub fn reveal(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Whether none was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The operator's named credentials: see the module's page.
#[derive(Clone, Debug)]
pub struct CredentialsDirectory(PathBuf);

impl CredentialsDirectory {
    /// The directory at `path`, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The secrets that a fill of `spec` for `owner` uses, where the request brought `given`. Reads one small file.
    ///
    /// # Errors
    /// `CREDENTIALS_NOT_AVAILABLE` for a name that is not there or not for this request, `CREDENTIALS_EXPOSED` for a file that others
    /// can read or write, `CREDENTIALS_UNREADABLE` for one that makes no sense.
    pub fn resolve(&self, spec: &SourceSpec, owner: &str, given: &Credentials) -> Result<Credentials> {
        if !given.is_empty() {
            return Ok(given.clone());
        }
        let named = spec.option(OPTION);
        let name = named.unwrap_or(spec.kind.as_str());
        let found = if is_name(name) { Entry::read(&self.0.join(format!("{name}.toml")))? } else { None };
        match (found, named) {
            (Some(entry), _) if entry.is_for(spec, owner) => entry.open(name),
            (_, None) => Ok(Credentials::default()),
            (_, Some(name)) => Err(not_available(name)),
        }
    }
}

fn not_available(name: &str) -> Error {
    let message = format!("no credentials `{}` are available to this request", show_bytes(name.as_bytes()));
    Error::denied("CREDENTIALS_NOT_AVAILABLE", message)
        .remedy("check the name, and with the operator that this owner, type of source and host may use them")
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// One file of the directory as it was found.
struct Entry {
    exposed: bool,
    /// `None` where it makes no sense.
    content: Option<Content>,
}

#[derive(Default)]
struct Content {
    secrets: BTreeMap<String, String>,
    owners: Option<Vec<String>>,
    types: Option<Vec<String>>,
    hosts: Vec<String>,
}

impl Entry {
    /// `None` where there is no such file.
    fn read(path: &Path) -> Result<Option<Self>> {
        let fault = |error| Error::io("reading the credentials", path, error);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(error) => return Err(fault(error)),
        };
        let metadata = file.metadata().map_err(fault)?;
        let mut text = String::new();
        let content = match file.take(FILE_BYTES + 1).read_to_string(&mut text) {
            Ok(_) if u64::try_from(text.len()).is_ok_and(|length| length <= FILE_BYTES) => Content::parse(&text),
            Ok(_) => None,
            Err(error) if error.kind() == ErrorKind::InvalidData => None,
            Err(error) => return Err(fault(error)),
        };
        Ok(Some(Self { exposed: metadata.uid() != 0 || metadata.mode() & 0o077 != 0, content }))
    }

    /// Whether a request may use it. What makes no sense restricts nobody: it is then told to everybody that it does not.
    fn is_for(&self, spec: &SourceSpec, owner: &str) -> bool {
        let among = |list: &Option<Vec<String>>, wanted: &str| {
            list.as_ref().is_none_or(|list| list.iter().any(|item| item == wanted))
        };
        self.content.as_ref().is_none_or(|content| {
            among(&content.owners, owner) && among(&content.types, spec.kind.as_str()) && goes_to(&content.hosts, spec)
        })
    }

    /// The secrets, if nobody else can have seen or set them.
    fn open(self, name: &str) -> Result<Credentials> {
        if self.exposed {
            let message = format!("the credentials `{name}` are in a file that others than root can read or write");
            return Err(Error::denied("CREDENTIALS_EXPOSED", message)
                .remedy("let the operator replace the secret, and make the file root's own with mode 0600"));
        }
        let content = self.content.ok_or_else(|| {
            let message = format!("the credentials `{name}` are in a file that is not in the form of credentials");
            Error::invalid("CREDENTIALS_UNREADABLE", message)
                .remedy("let the operator write TOML: strings by name, and the lists `owners`, `types` and `hosts`")
        })?;
        Ok(Credentials(content.secrets))
    }
}

impl Content {
    fn parse(text: &str) -> Option<Self> {
        let mut content = Self::default();
        for (key, value) in text.parse::<Table>().ok()? {
            match (key.as_str(), value) {
                ("owners", value) => content.owners = Some(strings(value)?),
                ("types", value) => content.types = Some(strings(value)?),
                ("hosts", value) => content.hosts = strings(value)?,
                (_, Value::String(secret)) => drop(content.secrets.insert(key, secret)),
                _ => return None,
            }
        }
        Some(content)
    }
}

fn strings(value: Value) -> Option<Vec<String>> {
    let Value::Array(items) = value else { return None };
    items.into_iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// Whether `hosts` permits every host that `spec` names; a source that names none goes to the service of its type.
fn goes_to(hosts: &[String], spec: &SourceSpec) -> bool {
    let by_uri =
        matches!(spec.kind, SourceKind::Azure | SourceKind::Git | SourceKind::Web).then_some(spec.uri.as_str());
    by_uri.into_iter().chain(spec.option("endpoint")).all(|address| {
        host_of(address).is_some_and(|host| {
            let service = spec.kind == SourceKind::Wasabi && host.ends_with(".wasabisys.com");
            service || hosts.iter().any(|allowed| covers(allowed, &host))
        })
    })
}

fn covers(allowed: &str, host: &str) -> bool {
    match allowed.strip_prefix('*') {
        Some(suffix) => suffix.starts_with('.') && host.ends_with(&suffix.to_ascii_lowercase()),
        None => allowed.eq_ignore_ascii_case(host),
    }
}

/// The host of a URL, of a bare `host:port`, or of git's `user@host:path`; `None` where two readers might see two hosts.
fn host_of(address: &str) -> Option<String> {
    if address.contains(['\\', ' ']) || address.contains(char::is_control) {
        return None;
    }
    if !address.contains("://")
        && let Some((user_and_host, _)) = address.split_once(':').filter(|(front, _)| front.contains('@'))
    {
        return user_and_host.rsplit('@').next().map(str::to_ascii_lowercase);
    }
    let url =
        Url::parse(address).ok().filter(Url::has_host).or_else(|| Url::parse(&format!("https://{address}")).ok())?;
    url.host_str().map(|host| host.trim_matches(['[', ']']).to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: SourceKind, uri: &str, options: &[(&str, &str)]) -> SourceSpec {
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        SourceSpec { kind, uri: uri.to_owned(), options }
    }

    #[test]
    fn secrets_go_where_the_operator_says_and_to_the_service_itself() {
        use SourceKind as K;
        let hosts = ["hub.example".to_owned(), "*.ours.example".to_owned(), "::1".to_owned()];
        for (kind, uri, endpoint, goes) in [
            (K::HuggingFace, "a/b", "", true),
            (K::HuggingFace, "a/b", "https://HUB.example:8443/x", true),
            (K::HuggingFace, "a/b", "https://evil.example", false),
            (K::HuggingFace, "a/b", "https://hub.example@evil.example/", false),
            (K::HuggingFace, "a/b", "https://evil.example\\@hub.example/", false),
            (K::HuggingFace, "a/b", "http://[::1]:80", true),
            (K::Aws, "s3://b/k", "minio.ours.example:9000", true),
            (K::Aws, "s3://b/k", "ours.example", false),
            (K::Aws, "s3://b/k", "xours.example", false),
            (K::Wasabi, "s3://b/k", "https://s3.eu-central-1.wasabisys.com", true),
            (K::Wasabi, "s3://b/k", "https://wasabisys.com.evil.example", false),
            (K::Web, "https://hub.example/x", "", true),
            (K::Web, "https://evil.example/x", "https://hub.example", false),
            (K::Git, "git@git.ours.example:o/r", "", true),
            (K::Git, "git@evil.example:o/r@hub.example", "", false),
            (K::Git, "ssh://git@hub.example/o/r", "", true),
        ] {
            let spec = spec(kind, uri, &[("endpoint", endpoint)]);
            assert_eq!(goes_to(&hosts, &spec), goes, "{kind} {uri} {endpoint}");
        }
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("x.toml"), "token = \"a\"").unwrap();
        let directory = CredentialsDirectory::new(place.path().join("inside"));
        std::fs::create_dir(place.path().join("inside")).unwrap();
        let by_name = |name: &str| {
            let spec = spec(SourceKind::HuggingFace, "a/b", &[("credentials", name)]);
            directory.resolve(&spec, "", &Credentials::default()).unwrap_err()
        };
        for name in ["../x", "/etc/passwd", ".", "..", "a/b", "nul\0", &"x".repeat(65)] {
            assert_eq!(by_name(name).reason(), "CREDENTIALS_NOT_AVAILABLE", "{name:?}");
        }
    }

    #[test]
    fn what_is_no_credential_is_not_repeated() {
        for text in ["token = = 'hunter2'", "token = ['hunter2']", "[hunter2]\na = 'b'", "owners = 'hunter2'"] {
            assert!(Content::parse(text).is_none(), "{text}");
        }
        let entry = Entry { exposed: false, content: None };
        assert!(!entry.open("x").unwrap_err().report().contains("hunter2"));
    }
}
