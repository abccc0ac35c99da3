//! From what was asked for to a source: the rules of each kind's URI, and how a URI is shown.
//!
//! The rules are those of the platform's user page. A URI that breaks its kind's rule is refused here, before a record
//! is made of it; a kind whose bytes are sent and not fetched is `SOURCE_NOT_SUPPORTED`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use reqwest::Url;

use super::datastore::Datastores;
use super::egress::EgressPolicy;
use super::http::{HttpClient, HttpSettings};
use super::huggingface::RepositoryId;
use super::patience::{AllTurns, TurnsAsked};
use super::{Credentials, Source, SourceKind, SourceSpec, captured, git, huggingface, kaggle, objects, regional, web};
use crate::archive::Dictionaries;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::names::show_bytes;

/// Longest branch, tag or commit: git keeps references as files.
const REVISION_BYTES: usize = 255;

/// What every source is made with.
#[derive(Clone, Debug)]
pub struct SourceContext {
    /// The client for everything that speaks HTTP.
    pub(super) http: HttpClient,
    /// For what connects by other means.
    pub(super) policy: Arc<EgressPolicy>,
    /// What regional sources are below.
    pub(super) datastores: Arc<Datastores>,
    /// Who may list them: one that does not answer must not take every thread there is.
    pub(super) turns: AllTurns,
    /// Likewise for what is captured through processes.
    pub(super) process_turns: TurnsAsked,
    /// Likewise for what is captured by its path. Apart from the former, so that no job keeps the operator from it.
    pub(super) path_turns: TurnsAsked,
    /// Times and proxies, for what connects by other means.
    pub(super) settings: HttpSettings,
    /// For what has to lie on disk while it is read.
    pub(super) scratch: Option<ScratchSpace>,
    /// The directory with what the operator knows of other hosts (`known_hosts`).
    pub(super) host_credentials: Option<PathBuf>,
    /// For the dictionaries of archives of this host.
    pub(super) dictionaries: Dictionaries,
    host_directories: bool,
}

/// Where sources may make scratch directories, and how much may lie in one.
#[derive(Clone, Debug)]
pub(super) struct ScratchSpace {
    pub(super) disk: Arc<Disk>,
    pub(super) limit_bytes: u64,
}

impl SourceContext {
    /// A context whose sources talk HTTP as `settings` say and only to what `policy` permits. They may not
    /// read directories of this host.
    ///
    /// # Errors
    /// As [`HttpClient::new`].
    pub fn new(settings: &HttpSettings, policy: EgressPolicy) -> Result<Self> {
        let policy = Arc::new(policy);
        Ok(Self {
            http: HttpClient::new(settings, Arc::clone(&policy))?,
            policy,
            settings: settings.clone(),
            scratch: None,
            host_credentials: None,
            dictionaries: Dictionaries::default(),
            datastores: Arc::default(),
            turns: AllTurns::default(),
            process_turns: TurnsAsked::default(),
            path_turns: TurnsAsked::default(),
            host_directories: false,
        })
    }

    /// The same, with scratch directories on `disk` of at most `limit_bytes` each. Without, sources that need one are refused.
    #[must_use]
    pub fn with_scratch(self, disk: Arc<Disk>, limit_bytes: u64) -> Self {
        Self { scratch: Some(ScratchSpace { disk, limit_bytes }), ..self }
    }

    /// The same, with what the operator knows of other hosts in the files of `directory`. No secret is taken from there.
    #[must_use]
    pub fn with_host_credentials(self, directory: Option<PathBuf>) -> Self {
        Self { host_credentials: directory, ..self }
    }

    /// The same with the memory that there is for the dictionaries of archives.
    #[must_use]
    pub fn with_dictionaries(self, dictionaries: Dictionaries) -> Self {
        Self { dictionaries, ..self }
    }

    /// The same for a request of the scheduler or operator, which may name directories of this host. Never for a tenant's.
    #[must_use]
    pub fn with_host_directories(&self) -> Self {
        Self { host_directories: true, ..self.clone() }
    }

    /// The same with the datastores of this host.
    #[must_use]
    pub fn with_datastores(&self, datastores: Arc<Datastores>) -> Self {
        Self { turns: AllTurns::of(datastores.0.keys()), datastores, ..self.clone() }
    }
}

/// The source that `spec` means, with `credentials` that go nowhere else. Nothing is contacted yet.
///
/// # Errors
/// Invalid for a URI or option that breaks its kind's rule; denied for a directory where the context has none;
/// `SOURCE_NOT_SUPPORTED` for a kind whose bytes are sent and not fetched.
pub fn connect(spec: &SourceSpec, credentials: &Credentials, context: &SourceContext) -> Result<Arc<dyn Source>> {
    check_uri(spec.kind, &spec.uri)?;
    match spec.kind {
        SourceKind::Git => git::connect(spec, credentials, context),
        SourceKind::HuggingFace => huggingface::connect(spec, credentials, context),
        SourceKind::Kaggle => kaggle::connect(spec, credentials, context),
        SourceKind::Web => web::connect(spec, credentials, context),
        SourceKind::Regional => regional::connect(spec, context),
        SourceKind::Directory if context.host_directories => captured::connect(spec, context),
        SourceKind::Directory => {
            Err(Error::denied("HOST_FILES_REFUSED", "directories of this host are not open to this request")
                .remedy("let the scheduler capture it, or upload it"))
        }
        SourceKind::Aws | SourceKind::Wasabi => objects::s3::connect(spec, credentials, context),
        SourceKind::Azure => objects::azure::connect(spec, credentials, context),
        SourceKind::Gcp => objects::gcs::connect(spec, credentials, context),
        SourceKind::Local | SourceKind::Upload => Err(sent(spec.kind)),
    }
}

/// Whether `uri` keeps the rule of its kind; says nothing of whether anything is there.
///
/// # Errors
/// `BAD_URI` with the rule.
pub fn check_uri(kind: SourceKind, uri: &str) -> Result<()> {
    let (kept, rule) = match kind {
        SourceKind::Aws | SourceKind::Wasabi => (has_scheme(uri, &["s3"]), "begin with s3://"),
        SourceKind::Azure => (has_scheme(uri, &["https"]), "begin with https://"),
        SourceKind::Gcp => (has_scheme(uri, &["gs"]), "begin with gs://"),
        SourceKind::Git => (is_git(uri), "be an http(s), ssh or git@host:path address of a repository"),
        SourceKind::HuggingFace => return RepositoryId::parse(uri).map(drop),
        SourceKind::Kaggle => {
            (!uri.is_empty() && !uri.contains("://"), "be the short name of a competition, dataset or kernel")
        }
        SourceKind::Local => (uri.starts_with(['/', '$']) || uri.starts_with("~/"), "begin with `/`, `~/` or `$`"),
        SourceKind::Regional => (!uri.is_empty() && !uri.contains('/'), "be the name of a datastore"),
        SourceKind::Web => {
            (has_scheme(uri, &["http", "https", "ftp", "ftps"]), "begin with http://, https://, ftp:// or ftps://")
        }
        SourceKind::Directory => (uri.starts_with('/'), "be an absolute path"),
        SourceKind::Upload => (true, ""),
    };
    if kept && !uri.contains(['\0', '\n', '\r']) {
        return Ok(());
    }
    let shown = show_bytes(shown_uri(kind, uri).as_bytes());
    Err(Error::invalid("BAD_URI", format!("`{shown}` is not a URI of type `{kind}`")).remedy(format!("it must {rule}")))
}

/// Whether `options` may be recorded as they are: an `endpoint` is an address and nothing else, since options are kept and shown.
///
/// # Errors
/// `ENDPOINT_WITH_CREDENTIALS`, which does not repeat it.
pub fn check_options(options: &BTreeMap<String, String>) -> Result<()> {
    // However it is written: user information that no URL could hold (`p/ss@h`) is a secret all the same.
    if !options.get("endpoint").is_some_and(|endpoint| endpoint.contains(['@', '?', '#'])) {
        return Ok(());
    }
    let message = "the option `endpoint` holds user information or a query, and options are recorded and shown";
    Err(Error::invalid("ENDPOINT_WITH_CREDENTIALS", message)
        .remedy("give the address alone (https://host), and secrets as credentials (`--credential NAME=VALUE`)"))
}

/// `uri` for people, rows and logs: without user information, and for web addresses without query and fragment,
/// where signatures and tokens are.
pub fn shown_uri(kind: SourceKind, uri: &str) -> String {
    match kind {
        SourceKind::Local | SourceKind::Directory | SourceKind::Upload | SourceKind::Regional | SourceKind::Kaggle => {
            uri.to_owned()
        }
        SourceKind::Aws | SourceKind::Gcp | SourceKind::Wasabi => split_user_information(uri).0,
        SourceKind::Azure | SourceKind::Git | SourceKind::HuggingFace | SourceKind::Web => {
            let plain = split_user_information(uri).0;
            let plain = plain.split(['?', '#']).next().unwrap_or_default();
            match plain.split_once("://") {
                Some((scheme, rest)) if !has_plain_port(rest) => format!("{scheme}://"),
                _ => plain.to_owned(),
            }
        }
    }
}

/// Whether what follows a host's `:` is a port. If not, it may be a password that was not written as URIs want it.
fn has_plain_port(rest: &str) -> bool {
    let authority = rest.split('/').next().unwrap_or_default();
    let port =
        authority.rsplit_once(']').map_or(authority, |(_, port)| port).split_once(':').map_or("", |(_, port)| port);
    port.bytes().all(|byte| byte.is_ascii_digit())
}

/// `uri` without user information, and user name and password where it had them (percent-decoded). A URI without
/// `://` has none: the user of `git@host:path` is no secret, nor is that of `ssh://git@host/path`, which stays; there a password
/// has no use and is dropped.
pub fn split_user_information(uri: &str) -> (String, Option<(String, String)>) {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return (uri.to_owned(), None);
    };
    let end = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let Some((user_information, host)) = authority.rsplit_once('@') else {
        return (uri.to_owned(), None);
    };
    if scheme.eq_ignore_ascii_case("ssh") {
        let user = user_information.split(':').next().unwrap_or_default();
        return (format!("{scheme}://{user}@{host}{path}"), None);
    }
    let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let (username, password) = user_information.split_once(':').unwrap_or((user_information, ""));
    (format!("{scheme}://{host}{path}"), Some((decode(username), decode(password))))
}

/// `uri` without the signature that gives access to it, and that signature with the name of the secret that it is: for Azure the query (`sas`),
/// which is a shared access signature or nothing that we know; for the web a query with what signs or gives access (`query`).
pub fn split_signature(kind: SourceKind, uri: &str) -> (String, Option<(&'static str, String)>) {
    let plain = uri.split('#').next().unwrap_or_default();
    let found = plain.split_once('?').and_then(|(plain, query)| match kind {
        SourceKind::Azure => Some((plain, "sas", query)),
        SourceKind::Web if gives_access(query) => Some((plain, "query", query)),
        _ => None,
    });
    match found {
        Some((plain, _, "")) => (plain.to_owned(), None),
        Some((plain, name, query)) => (plain.to_owned(), Some((name, query.to_owned()))),
        None => (uri.to_owned(), None),
    }
}

/// Whether one of a query's parameters is called like what signs an address or gives access: those of S3 and what speaks like it, Google,
/// Azure, CloudFront, Akamai, and what web services call them.
fn gives_access(query: &str) -> bool {
    const WHOLE: [&str; 8] = ["sig", "auth", "jwt", "hmac", "hdnea", "hdnts", "apikey", "api_key"];
    const PART: [&str; 4] = ["signature", "token", "secret", "password"];
    query.split(['&', ';']).any(|pair| {
        let name = pair.split('=').next().unwrap_or_default();
        let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy().to_ascii_lowercase();
        WHOLE.contains(&name.as_str()) || PART.iter().any(|part| name.contains(part))
    })
}

/// The http or https address that `text` is; `what` says for the error what it was given as.
///
/// # Errors
/// `BAD_URI`.
pub(super) fn parse_http(text: &str, what: &str) -> Result<Url> {
    let bad = || Error::invalid("BAD_URI", format!("{what} is not an http or https address"));
    let url = Url::parse(text).map_err(|_| bad())?;
    if matches!(url.scheme(), "http" | "https") && url.has_host() { Ok(url) } else { Err(bad()) }
}

/// The branch, tag or commit of the option `branch`, if given.
///
/// # Errors
/// `BAD_BRANCH`.
pub(super) fn branch_of(spec: &SourceSpec) -> Result<Option<&str>> {
    let Some(branch) = spec.option("branch") else { return Ok(None) };
    if branch.len() > REVISION_BYTES
        || branch.chars().any(char::is_control)
        || branch.starts_with('-')
        || matches!(branch, "." | "..")
    {
        let message = format!("`{}` is no branch, tag or commit", show_bytes(branch.as_bytes()));
        return Err(Error::invalid("BAD_BRANCH", message));
    }
    Ok(Some(branch))
}

/// Whether `uri` is of one of `schemes` and names a host.
pub(super) fn has_scheme(uri: &str, schemes: &[&str]) -> bool {
    uri.split_once("://").is_some_and(|(scheme, rest)| {
        schemes.iter().any(|known| scheme.eq_ignore_ascii_case(known)) && !rest.is_empty() && !rest.starts_with('/')
    })
}

fn is_git(uri: &str) -> bool {
    let scp = uri.split_once(':').is_some_and(|(host, path)| {
        host.contains('@')
            && !host.contains('/')
            && !host.starts_with('-')
            && !path.is_empty()
            && !path.starts_with("//")
    });
    scp || has_scheme(uri, &["http", "https", "ssh"])
}

fn sent(kind: SourceKind) -> Error {
    let message = format!("checkpoints of type `{kind}` are sent to ckptd, which cannot fetch them");
    Error::new(Kind::Unsupported, "SOURCE_NOT_SUPPORTED", message).remedy("send it again from where it is")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: SourceKind, uri: &str) -> SourceSpec {
        SourceSpec { kind, uri: uri.to_owned(), options: BTreeMap::new() }
    }

    fn refused(kind: SourceKind, uri: &str) -> Error {
        let context = SourceContext::new(&HttpSettings::default(), EgressPolicy::default()).unwrap();
        connect(&spec(kind, uri), &Credentials::default(), &context).err().unwrap()
    }

    #[test]
    fn each_kind_has_its_rule() {
        use SourceKind as K;
        for (kind, good, bad) in [
            (K::Aws, "s3://b/k", "https://b/k"),
            (K::Wasabi, "s3://b", "s3:///k"),
            (K::Azure, "https://a.blob.core.windows.net/c/", "http://a/"),
            (K::Gcp, "gs://b/k", "s3://b/k"),
            (K::Git, "git@github.com:o/r.git", "o/r"),
            (K::Git, "https://h/o/r", "file:///r"),
            (K::Git, "ssh://git@h/o/r", "-oProxyCommand=x@h:p"),
            (K::Git, "http://h/o/r", "git://h/o/r"),
            (K::Git, "ssh://h:22/r", "ext::sh -c x@h:y"),
            (K::HuggingFace, "openai/whisper-tiny", "a/b/c"),
            (K::Kaggle, "lish-moa", "https://kaggle.com/x"),
            (K::Local, "~/x", "./x"),
            (K::Local, "$HOME/x", "x"),
            (K::Web, "ftp://h/x", "file:///etc/passwd"),
            (K::Web, "HTTPS://h/x", "https://"),
            (K::Directory, "/x", "x"),
        ] {
            assert!(check_uri(kind, good).is_ok(), "{kind} {good}");
            assert_eq!(check_uri(kind, bad).unwrap_err().reason(), "BAD_URI", "{kind} {bad}");
        }
    }

    #[test]
    fn what_is_sent_cannot_be_fetched() {
        let error = refused(SourceKind::Upload, "");
        assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "SOURCE_NOT_SUPPORTED"));
    }

    #[test]
    fn a_directory_of_the_host_is_not_for_everybody() {
        assert_eq!(refused(SourceKind::Directory, "/etc").reason(), "HOST_FILES_REFUSED");
    }

    #[test]
    fn what_is_shown_has_no_secret_in_it() {
        for (uri, shown) in [
            ("https://user:pa%20ss@h:1/x?sig=1#f", "https://h:1/x"),
            ("https://a@b:c@h/x@y", "https://h/x@y"),
            ("https://h/x", "https://h/x"),
            ("https://user:p#ss@h/x", "https://"),
            ("https://user:p/ss@h/x", "https://"),
            ("https://[::1]:80/x", "https://[::1]:80/x"),
        ] {
            assert_eq!(shown_uri(SourceKind::Web, uri), shown);
        }
        assert_eq!(shown_uri(SourceKind::Git, "git@github.com:o/r.git"), "git@github.com:o/r.git");
        assert_eq!(shown_uri(SourceKind::Git, "ssh://git:secret@h:22/o/r.git"), "ssh://git@h:22/o/r.git");
        assert_eq!(shown_uri(SourceKind::Aws, "s3://b/k?x#y"), "s3://b/k?x#y");
        assert_eq!(shown_uri(SourceKind::Directory, "/a?b#c"), "/a?b#c");
        let (plain, secret) = split_user_information("https://user:pa%20ss@h:1/x?q");
        assert_eq!((plain.as_str(), secret), ("https://h:1/x?q", Some(("user".to_owned(), "pa ss".to_owned()))));
    }

    #[test]
    fn an_endpoint_is_an_address_alone() {
        let check = |endpoint: &str| check_options(&[("endpoint".to_owned(), endpoint.to_owned())].into());
        for good in ["", "https://h:1/x", "minio.example:9000", "http://[::1]:80/a%40b"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [
            "https://u:hunter2@h",
            "u:hunter2@h",
            "https://hunter2@h/",
            "https://u:p/hunter2@h",
            "https://h?sig=hunter2",
        ] {
            let error = check(bad).unwrap_err();
            assert_eq!((error.kind(), error.reason()), (Kind::Invalid, "ENDPOINT_WITH_CREDENTIALS"), "{bad}");
            assert!(!format!("{error:?}{}", error.report()).contains("hunter2"));
        }
    }

    #[test]
    fn a_signature_in_the_uri_is_taken_out_of_it() {
        for (kind, uri, plain, signature) in [
            (SourceKind::Azure, "https://a/c/p?sv=1&sig=x#f", "https://a/c/p", Some(("sas", "sv=1&sig=x"))),
            (SourceKind::Azure, "https://a/c/p?", "https://a/c/p", None),
            (
                SourceKind::Web,
                "https://a/p?v=1&X-Amz-Signature=x",
                "https://a/p",
                Some(("query", "v=1&X-Amz-Signature=x")),
            ),
            (SourceKind::Web, "https://a/p?access%5Ftoken=x", "https://a/p", Some(("query", "access%5Ftoken=x"))),
            (SourceKind::Web, "https://a/p?Expires=1;SIG=x#f", "https://a/p", Some(("query", "Expires=1;SIG=x"))),
        ] {
            let (left, found) = split_signature(kind, uri);
            assert_eq!(
                (left.as_str(), found.as_ref().map(|(name, query)| (*name, query.as_str()))),
                (plain, signature)
            );
        }
        for (kind, uri) in [
            (SourceKind::Azure, "https://a/c/p"),
            (SourceKind::Aws, "s3://b/k?x#y"),
            (SourceKind::Web, "https://a/p?download=true&design=x#f"),
        ] {
            assert_eq!(split_signature(kind, uri), (uri.to_owned(), None));
        }
    }

    #[test]
    fn no_error_repeats_a_secret() {
        let error = refused(SourceKind::Web, "nothttp://user:secret@h/x?secret");
        assert!(!format!("{error:?}").contains("secret"));
    }
}
