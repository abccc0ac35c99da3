//! The way to one repository: address judged and pinned, redirects followed beforehand, credentials ready.
//!
//! git and ssh would resolve names themselves, a moment after they were judged. So names are resolved here, under the egress policy,
//! and git is told which address the name has (`http.curloptResolve`), ssh likewise (`HostName`, while the host's key is still looked up
//! under its name). git follows no redirect. Instead the first request of the protocol is made here, with the one HTTP client: where it
//! leads is where git is sent, and what a refusal means is told better by a status than by git's words.
//!
//! With a proxy in the environment, a name that cannot be resolved here is left to the proxy; one that can is judged all the same.

use std::net::SocketAddr;

use reqwest::header::{CONTENT_TYPE, HeaderName};
use reqwest::{StatusCode, Url};

use super::super::connect::SourceContext;
use super::super::http::{Failure, Request};
use super::access::Access;
use super::address::{Remote, SshAddress};
use super::child::{Call, Workshop};
use crate::error::{Error, Kind, Result};

/// The first request of the protocol, below the repository's URL.
const FIRST: &str = "/info/refs?service=git-upload-pack";

/// What answers it, if it is a repository.
const ADVERTISEMENT: &str = "application/x-git-upload-pack-advertisement";

/// A repository that children may talk to.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// Where redirects led.
    pub(super) remote: Remote,
    number: usize,
    /// `host:port:address`, as curl takes it.
    pin: Option<String>,
    header: Option<(String, String)>,
}

impl Link {
    /// Finds the way to `remote`, the `number`-th repository of a checkpoint.
    ///
    /// # Errors
    /// `EGRESS_REFUSED`, and what its first answer means.
    pub(super) async fn find(
        remote: &Remote,
        number: usize,
        access: &Access,
        context: &SourceContext,
        workshop: &Workshop,
    ) -> Result<Self> {
        match remote {
            Remote::Http(url) => {
                let remote = Remote::Http(follow(url, remote, access, context).await?);
                let Remote::Http(url) = &remote else { return Err(Error::internal("a URL became another address")) };
                let pin = pin(url, context).await?;
                let header = access.header(&remote).map(|line| (format!("http.{url}.extraHeader"), line));
                Ok(Self { remote, number, pin, header })
            }
            Remote::Ssh(address) => {
                let found = context.policy.resolve(&address.host, address.port()).await?;
                let first = found.first().ok_or_else(|| Error::internal("a name was resolved to nothing"))?;
                write_configuration(number, access, address, *first, workshop).await?;
                Ok(Self { remote: remote.clone(), number, pin: None, header: None })
            }
        }
    }

    /// A call of git that talks to the repository.
    pub(super) fn call(&self, workshop: &Workshop, arguments: &[&str]) -> Call {
        let quiet_s = workshop.quiet.as_secs().max(1).to_string();
        let mut call = git(workshop, self.number, arguments)
            .with_network(workshop)
            .variable("GIT_ALLOW_PROTOCOL", self.remote.protocol())
            .variable("GIT_SSH_COMMAND", &format!("ssh -F {}", configuration_file(self.number)))
            .variable("GIT_SSH_VARIANT", "ssh")
            .setting("http.followRedirects", "false")
            .setting("http.lowSpeedLimit", "1")
            .setting("http.lowSpeedTime", quiet_s);
        if let Some(pin) = &self.pin {
            call = call.setting("http.curloptResolve", pin);
        }
        if let Some((key, line)) = &self.header {
            call = call.setting(key, line);
        }
        call
    }

    /// A call of ssh that runs `remote_command` at the host; `None` for http.
    pub(super) fn login(&self, workshop: &Workshop, remote_command: &str) -> Option<Call> {
        let Remote::Ssh(SshAddress { user, host, .. }) = &self.remote else { return None };
        let Remote::Ssh(address) = &self.remote else { return None };
        let (port, configuration) = (address.port().to_string(), configuration_file(self.number));
        let arguments = ["-F", &configuration, "-p", &port, "-l", user, "--", host, remote_command];
        Some(Call::new(workshop, "ssh", &arguments))
    }
}

/// git in the `number`-th repository, held to what a repository that nobody trusts may have it do.
pub(super) fn git(workshop: &Workshop, number: usize, arguments: &[&str]) -> Call {
    let directory = format!("--git-dir={}", directory(number));
    let all: Vec<&str> = std::iter::once(directory.as_str()).chain(arguments.iter().copied()).collect();
    let settings = [
        ("core.hooksPath", "/dev/null"),
        ("core.attributesFile", "/dev/null"),
        ("core.fsmonitor", "false"),
        ("core.askPass", ""),
        ("credential.helper", ""),
        ("protocol.version", "2"),
        ("submodule.recurse", "false"),
        ("gc.auto", "0"),
        ("maintenance.auto", "false"),
        // What is fetched is checked, and lies in one file. Faults that old programs left in dates and modes hurt nobody.
        ("transfer.fsckObjects", "true"),
        ("fetch.fsck.badTimezone", "ignore"),
        ("fetch.fsck.missingSpaceBeforeDate", "ignore"),
        ("fetch.fsck.zeroPaddedFilemode", "ignore"),
        ("fetch.unpackLimit", "1"),
        // Nothing here outlives the daemon.
        ("core.fsync", "none"),
        // Large files stream instead of being held.
        ("core.bigFileThreshold", "1m"),
        ("core.deltaBaseCacheLimit", "32m"),
        ("core.packedGitWindowSize", "32m"),
        ("core.packedGitLimit", "128m"),
        ("pack.threads", "1"),
    ];
    settings.into_iter().fold(Call::new(workshop, "git", &all), |call, (key, value)| call.setting(key, value))
}

/// The `number`-th repository, in the scratch directory.
fn directory(number: usize) -> String {
    format!("{number}.git")
}

fn configuration_file(number: usize) -> String {
    format!("{number}.ssh")
}

/// Makes the first request and gives the repository's URL behind all redirects.
async fn follow(url: &Url, remote: &Remote, access: &Access, context: &SourceContext) -> Result<Url> {
    let first = |base: &Url| Url::parse(&format!("{}{FIRST}", base.as_str().trim_end_matches('/')));
    let asked = first(url).map_err(|error| Error::internal("building a URL of a repository").because(error))?;
    let authorization = access.authorization(remote);
    let version = [(HeaderName::from_static("git-protocol"), "version=2".to_owned())];
    let request = Request::get(&asked, authorization.as_ref()).headers(&version);
    let reply = context.http.send(&request).await.map_err(|failure| refusal(failure, remote))?;
    let kind = reply.response.headers().get(CONTENT_TYPE).map(|value| value.as_bytes().to_vec()).unwrap_or_default();
    let base = reply.url.as_str().strip_suffix(FIRST).and_then(|base| Url::parse(base).ok());
    match base {
        Some(base) if kind.starts_with(ADVERTISEMENT.as_bytes()) => Ok(base),
        _ => {
            Err(Error::not_found("REPOSITORY_NOT_FOUND", format!("fetching {remote}: what is there is no repository"))
                .remedy("check the address; give the one that `git clone` takes")
                .fact("repository", remote))
        }
    }
}

fn refusal(failure: Failure, remote: &Remote) -> Error {
    let answer = match failure {
        Failure::Refused(answer) => answer,
        Failure::Failed(error) => return error,
    };
    let error = match answer.status {
        StatusCode::NOT_FOUND | StatusCode::GONE => answer
            .error(Kind::NotFound, "REPOSITORY_NOT_FOUND", "there is no repository")
            .remedy("check the address; a private repository also needs credentials"),
        StatusCode::UNAUTHORIZED if !answer.authorized => answer
            .error(Kind::Denied, "CREDENTIALS_REQUIRED", "credentials are asked for, or there is no repository")
            .remedy("check the address, or give the credential `token`, or `username` and `password`"),
        _ => answer.fault(),
    };
    error.fact("repository", remote)
}

/// Tells curl which address the host has; nothing where it is an address already.
async fn pin(url: &Url, context: &SourceContext) -> Result<Option<String>> {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let port = url.port_or_known_default().unwrap_or(443);
    let found = match context.policy.resolve(bare, port).await {
        Err(error) if error.reason() == "NAME_NOT_RESOLVED" && has_proxy(context) => return Ok(None),
        found => found?,
    };
    if bare.parse::<std::net::IpAddr>().is_ok() {
        return Ok(None);
    }
    let addresses: Vec<_> = found
        .iter()
        .map(|address| match address {
            SocketAddr::V4(v4) => v4.ip().to_string(),
            SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
        })
        .collect();
    Ok(Some(format!("{host}:{port}:{}", addresses.join(","))))
}

fn has_proxy(context: &SourceContext) -> bool {
    let set = |key: &str| std::env::var_os(key).is_some_and(|value| !value.is_empty());
    context.settings.environment_proxy
        && ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"].into_iter().any(set)
}

async fn write_configuration(
    number: usize,
    access: &Access,
    address: &SshAddress,
    found: SocketAddr,
    workshop: &Workshop,
) -> Result<()> {
    let directory = workshop.scratch.path();
    let (file, known) = (configuration_file(number), format!("{number}.known"));
    let text = access.ssh_configuration(address, found.ip(), &known, workshop.quiet);
    let known_hosts = access.known_hosts().map(|hosts| format!("{}\n", hosts.trim_end()));
    let (file, known) = (directory.join(file), directory.join(known));
    let write = tokio::task::spawn_blocking(move || {
        std::fs::write(&file, text).map_err(|error| Error::io("writing", &file, error))?;
        match known_hosts {
            Some(hosts) => std::fs::write(&known, hosts).map_err(|error| Error::io("writing", &known, error)),
            None => Ok(()),
        }
    });
    write.await.map_err(|error| Error::internal("writing a configuration").because(error))?
}
