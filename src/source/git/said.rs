//! What git and ssh say when they fail, and what it means.
//!
//! They tell programs nothing but an exit code; so their words count, in the C locale. What is not known here may pass, and is tried
//! again. Servers have words in it too: they are quoted only as far as they are printable, short and free of our secrets.

use crate::error::{Error, Kind, LATER, OUT_OF_REACH};
use crate::names::show_bytes;

use super::access::Access;
use super::address::Remote;

/// Most that is quoted.
const QUOTE_BYTES: usize = 300;

const CHECK_ACCESS: &str = "check that the credentials may read it";
const CHECK_ADDRESS: &str = "check the address; a private repository also needs credentials";
const ACCEPT_HOST: &str = "after checking the host's key, give it as the credential `known_hosts` (what `ssh-keyscan` prints), \
                           or let the operator put it into /etc/ssh/ssh_known_hosts";

/// Words, and what they mean. The first that is found counts.
const MEANINGS: &[(&str, Kind, &str, &str, &str)] = &[
    ("No space left", Kind::NoSpace, "NO_SPACE", "the disk is full", "free space or remove checkpoints, then retry"),
    (
        "File too large",
        Kind::NoSpace,
        "CHECKPOINT_TOO_LARGE",
        "it is larger than a checkpoint may be or the disk can take",
        "free space, or ask the operator to raise the limit",
    ),
    (
        "ut of memory",
        Kind::NoSpace,
        "REPOSITORY_TOO_COMPLEX",
        "unpacking it takes more memory than git may have",
        "keep its large files in git LFS",
    ),
    (
        "IDENTIFICATION HAS CHANGED",
        Kind::Denied,
        "HOST_KEY_CHANGED",
        "the host's key is another than the known one",
        ACCEPT_HOST,
    ),
    ("Host key verification failed", Kind::Denied, "HOST_KEY_UNKNOWN", "the host's key is not known", ACCEPT_HOST),
    (
        "invalid format",
        Kind::Invalid,
        "BAD_CREDENTIALS",
        "the ssh key cannot be read",
        "give the private key whole, as it is in its file",
    ),
    (
        "error in libcrypto",
        Kind::Invalid,
        "BAD_CREDENTIALS",
        "the ssh key cannot be read",
        "give the private key whole, as it is in its file",
    ),
    (
        "incorrect passphrase",
        Kind::Invalid,
        "BAD_CREDENTIALS",
        "the ssh key has a passphrase",
        "give a key without one",
    ),
    (
        "fsck error",
        Kind::Corrupt,
        "REPOSITORY_MALFORMED",
        "it holds objects that are malformed",
        "let `git fsck` show them",
    ),
    ("Repository not found", Kind::NotFound, "REPOSITORY_NOT_FOUND", "there is no repository", CHECK_ADDRESS),
    (
        "does not appear to be a git repository",
        Kind::NotFound,
        "REPOSITORY_NOT_FOUND",
        "there is no repository",
        CHECK_ADDRESS,
    ),
    ("' not found", Kind::NotFound, "REPOSITORY_NOT_FOUND", "there is no repository", CHECK_ADDRESS),
    ("returned error: 404", Kind::NotFound, "REPOSITORY_NOT_FOUND", "there is no repository", CHECK_ADDRESS),
    (
        "is this a git repository?",
        Kind::NotFound,
        "REPOSITORY_NOT_FOUND",
        "what is there is no repository",
        CHECK_ADDRESS,
    ),
    ("returned error: 403", Kind::Denied, "ACCESS_REFUSED", "access is refused", CHECK_ACCESS),
    ("returned error: 429", Kind::Unavailable, "RATE_LIMITED", "the server asks to slow down", LATER),
    ("returned error: 5", Kind::Unavailable, "SERVER_ERROR", "the server failed", LATER),
    (
        "returned error: 3",
        Kind::Invalid,
        "BAD_REDIRECT",
        "it is redirected",
        "give the address that it is redirected to",
    ),
    (
        "SSL certificate problem",
        Kind::Denied,
        "CERTIFICATE_REFUSED",
        "the server's certificate is not trusted",
        "check it, or add its authority to the host's trust store",
    ),
    (
        "certificate verification failed",
        Kind::Denied,
        "CERTIFICATE_REFUSED",
        "the server's certificate is not trusted",
        "check it, or add its authority to the host's trust store",
    ),
    ("not allowed", Kind::Denied, "EGRESS_REFUSED", "its protocol is not fetched", "give an http(s) or ssh address"),
    (
        "cannot run ssh",
        Kind::Unsupported,
        "PROGRAM_MISSING",
        "this host does not have the program `ssh`",
        "install the package openssh-client",
    ),
    ("too slow", Kind::Unavailable, "STALLED", "nothing came for too long", LATER),
    ("timed out", Kind::Unavailable, "CONNECT_TIMED_OUT", "the connection took too long", OUT_OF_REACH),
    ("onnection refused", Kind::Unavailable, "CONNECT_FAILED", "the connection is refused", OUT_OF_REACH),
    ("ailed to connect", Kind::Unavailable, "CONNECT_FAILED", "there is no connection", OUT_OF_REACH),
];

/// Words of whoever asks for credentials or does not accept them.
const CREDENTIALS: &[&str] = &[
    "could not read Username",
    "could not read Password",
    "Authentication failed",
    "returned error: 401",
    "Permission denied (",
];

/// Words of servers that do not give a commit.
const COMMIT_REFUSED: &[&str] = &["not our ref", "unadvertised object", "couldn't find remote ref"];

/// Whether `said` means that the commit that was asked for is not given.
pub(super) fn refuses_commit(said: &str) -> bool {
    COMMIT_REFUSED.iter().any(|words| said.contains(words))
}

/// The error of a child that said `said` when it was to fetch from `remote`.
pub(super) fn explain(said: &str, remote: &Remote, access: &Access) -> Error {
    let meaning = MEANINGS.iter().find(|(words, ..)| said.contains(words));
    let asks = CREDENTIALS.iter().find(|words| said.contains(**words));
    let quoted = quote(said, meaning.map(|(words, ..)| *words).or(asks.copied()), access);
    let error = |kind, reason: &str, why: &str| {
        Error::new(kind, reason, format!("fetching {remote}: {why} (`{quoted}`)")).fact("repository", remote)
    };
    if let Some((_, kind, reason, why, remedy)) = meaning {
        return error(*kind, reason, why).remedy(*remedy);
    }
    if asks.is_some() {
        return if access.is_for(remote) {
            error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted")
                .remedy("check the credentials, and that they have not expired")
        } else {
            error(Kind::Denied, "CREDENTIALS_REQUIRED", "credentials are asked for").remedy(match remote {
                _ if access.is_for_another(remote) => {
                    "those given are for another host and go nowhere else: only submodules of the repository's own host may need some"
                }
                Remote::Http(_) => "give the credential `token`, or `username` and `password`",
                Remote::Ssh(_) => "give the credential `ssh_key`",
            })
        };
    }
    error(Kind::Unavailable, "FETCH_FAILED", "git gave up").remedy(LATER)
}

/// The line with `words`, else the one that says most.
fn quote(said: &str, words: Option<&str>, access: &Access) -> String {
    let lines: Vec<_> = said.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect();
    let telling = words.into_iter().chain(["ERROR", "fatal: ", "error: "]);
    let line = telling.filter_map(|words| lines.iter().find(|line| line.contains(words))).next();
    let line = line.or(lines.last()).copied().unwrap_or("without a word");
    let mut shown = show_bytes(access.redact(line).as_bytes());
    if let Some((end, _)) = shown.char_indices().find(|(at, _)| *at >= QUOTE_BYTES) {
        shown.truncate(end);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(said: &str, uri: &str, access: &Access) -> (Kind, String, String) {
        let error = explain(said, &Remote::parse(uri).unwrap(), access);
        (error.kind(), error.reason().to_owned(), error.report())
    }

    #[test]
    fn words_are_understood() {
        let none = Access::default();
        for (said, kind, reason) in [
            ("fatal: repository 'http://h/r/' not found", Kind::NotFound, "REPOSITORY_NOT_FOUND"),
            (
                "ERROR: Repository not found.\nfatal: Could not read from remote repository.",
                Kind::NotFound,
                "REPOSITORY_NOT_FOUND",
            ),
            (
                "fatal: could not read Username for 'http://h': terminal prompts disabled",
                Kind::Denied,
                "CREDENTIALS_REQUIRED",
            ),
            ("git@h: Permission denied (publickey).", Kind::Denied, "CREDENTIALS_REQUIRED"),
            (
                "error: RPC failed; HTTP 503 curl 22 The requested URL returned error: 503",
                Kind::Unavailable,
                "SERVER_ERROR",
            ),
            ("fatal: early EOF", Kind::Unavailable, "FETCH_FAILED"),
            ("No ED25519 host key is known for h\nHost key verification failed.", Kind::Denied, "HOST_KEY_UNKNOWN"),
            (
                "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
                Kind::Denied,
                "HOST_KEY_CHANGED",
            ),
            ("", Kind::Unavailable, "FETCH_FAILED"),
        ] {
            let (found, word, _) = meaning(said, "git@h:r", &none);
            assert_eq!((found, word.as_str()), (kind, reason), "{said}");
        }
    }
}
