//! Who asks: the credentials of one request, and how each program gets them without anybody seeing them.
//!
//! User name, password and token are for the origin that they were given for and go to no other, whatever a submodule says. git
//! gets them in a variable of its environment. The ssh key likewise is offered to the host that it was given for alone: another would learn
//! whose key it is, and could have it let itself in where only this key may. It lies in memory alone, as a file without a name that
//! ssh opens below `/proc`.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::Credentials;
use super::super::http::Authorization;
use super::address::{Remote, SshAddress};
use crate::error::{Error, Result};

/// User name beside a token: GitHub asks for this one, others take any.
const TOKEN_USER: &str = "x-access-token";

/// What the operator knows of hosts' keys, beside the credentials; no secret, and for whoever asks.
const HOST_KNOWN: &str = "known_hosts";

/// What the host knows of others' keys.
const KNOWN_HOSTS: &str = "/etc/ssh/ssh_known_hosts";

/// Largest file of known hosts.
const HOST_FILE_BYTES: u64 = 1 << 20;

/// Shortest secret that is looked for in what servers say: shorter ones are found in any text.
const REDACTED_FROM: usize = 4;

/// Credentials of one request: see the module's page.
#[derive(Clone, Default)]
pub(super) struct Access {
    basic: Option<(Remote, String, String)>,
    /// The ssh key, and the address that it was given for.
    key: Option<(Remote, Arc<File>)>,
    known_hosts: Option<String>,
    /// Whether `known_hosts` is the request's own and all that counts.
    own_known_hosts: bool,
}

impl Access {
    /// What `credentials` give for `remote`; without known hosts among them, the file `known_hosts` of the directory `host` counts.
    ///
    /// # Errors
    /// `BAD_CREDENTIALS`, or the I/O error of a file of the host.
    pub(super) fn of(credentials: &Credentials, remote: &Remote, host: Option<&Path>) -> Result<Self> {
        let username = credentials.get("username");
        let basic = match (credentials.get("token"), username) {
            (Some(token), _) => Some((username.unwrap_or(TOKEN_USER).to_owned(), token.trim().to_owned())),
            (None, Some(username)) => {
                Some((username.to_owned(), credentials.get("password").unwrap_or_default().to_owned()))
            }
            (None, None) => None,
        };
        let basic = basic.filter(|_| matches!(remote, Remote::Http(_)));
        if basic.iter().any(|(name, word)| name.contains(':') || (name.clone() + word).contains(char::is_control)) {
            return Err(Error::invalid("BAD_CREDENTIALS", "the credentials hold characters that HTTP cannot carry")
                .remedy("check that they were given whole and on one line"));
        }
        let own = credentials.get("known_hosts").map(str::to_owned);
        let own_known_hosts = own.is_some();
        let known_hosts = if own_known_hosts { own } else { host_file(host, HOST_KNOWN)? };
        Ok(Self {
            basic: basic.map(|(name, word)| (remote.clone(), name, word)),
            key: credentials.get("ssh_key").map(unnamed).transpose()?.map(|file| (remote.clone(), Arc::new(file))),
            known_hosts,
            own_known_hosts,
        })
    }

    /// Whether there is anything to show to `remote`.
    pub(super) fn is_for(&self, remote: &Remote) -> bool {
        match remote {
            Remote::Http(_) => self.authorization(remote).is_some(),
            Remote::Ssh(address) => self.key_for(address).is_some(),
        }
    }

    /// Whether there is something of the kind that `remote` takes, but for another host.
    pub(super) fn is_for_another(&self, remote: &Remote) -> bool {
        let any = match remote {
            Remote::Http(_) => self.basic.is_some(),
            Remote::Ssh(_) => self.key.is_some(),
        };
        any && !self.is_for(remote)
    }

    fn key_for(&self, address: &SshAddress) -> Option<&File> {
        self.key.as_ref().filter(|(given_for, _)| given_for.shares_key_with(address)).map(|(_, key)| key.as_ref())
    }

    /// For our own requests to `remote`.
    pub(super) fn authorization(&self, remote: &Remote) -> Option<Authorization> {
        let (origin, name, word) = self.basic.as_ref()?;
        origin.same_origin(remote).then(|| Authorization::Basic(name.clone(), word.clone()))
    }

    /// The header line for git's requests to `remote`.
    pub(super) fn header(&self, remote: &Remote) -> Option<String> {
        let (origin, name, word) = self.basic.as_ref()?;
        origin.same_origin(remote).then(|| format!("Authorization: Basic {}", encoded(name, word)))
    }

    /// `text` without any secret that a server may have put there.
    pub(super) fn redact(&self, text: &str) -> String {
        let Some((_, name, word)) = &self.basic else { return text.to_owned() };
        [word.clone(), encoded(name, word)]
            .iter()
            .filter(|secret| secret.len() >= REDACTED_FROM)
            .fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "***"))
    }

    /// The file of known hosts for ssh, if the request or the host's credentials give one.
    pub(super) fn known_hosts(&self) -> Option<&str> {
        self.known_hosts.as_deref()
    }

    /// ssh's whole configuration for `address`, which was resolved to `ip`. `known_hosts` names the file with [`Access::known_hosts`].
    pub(super) fn ssh_configuration(
        &self,
        address: &SshAddress,
        ip: std::net::IpAddr,
        known_hosts: &str,
        patience: Duration,
    ) -> String {
        let seconds = patience.as_secs().max(1);
        let key = self
            .key_for(address)
            .map_or_else(|| "none".to_owned(), |key| format!("/proc/{}/fd/{}", std::process::id(), key.as_raw_fd()));
        let own = if self.known_hosts.is_some() { known_hosts } else { "none" };
        let global = if self.own_known_hosts { "none" } else { KNOWN_HOSTS };
        let mut text = format!("HostName {ip}\nHostKeyAlias {}\nIdentityFile {key}\n", address.known_as());
        let _ = write!(text, "UserKnownHostsFile {own}\nGlobalKnownHostsFile {global}\n");
        let _ = write!(text, "ConnectTimeout {seconds}\nServerAliveInterval {seconds}\nServerAliveCountMax 2\n");
        text.push_str(
            "BatchMode yes\nIdentitiesOnly yes\nIdentityAgent none\nPreferredAuthentications publickey\n\
             StrictHostKeyChecking yes\nUpdateHostKeys no\nCheckHostIP no\nVerifyHostKeyDNS no\nProxyCommand none\n\
             ForwardAgent no\nForwardX11 no\nClearAllForwardings yes\nPermitLocalCommand no\nControlMaster no\n\
             ControlPath none\nRequestTTY no\nLogLevel ERROR\n",
        );
        text
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Access(..)")
    }
}

fn encoded(name: &str, word: &str) -> String {
    STANDARD.encode(format!("{name}:{word}"))
}

fn host_file(directory: Option<&Path>, name: &str) -> Result<Option<String>> {
    use std::io::Read as _;
    let Some(path) = directory.map(|directory| directory.join(name)) else { return Ok(None) };
    let mut text = String::new();
    match File::open(&path).and_then(|file| file.take(HOST_FILE_BYTES).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("reading", &path, error)),
    }
}

/// A file in memory that holds `key`, as ssh wants it: for its owner alone, the last line ended.
fn unnamed(key: &str) -> Result<File> {
    let fault = |error| Error::io("keeping", "an ssh key in memory", error);
    let mut file = File::from(memfd_create(c"ssh-key", MFdFlags::MFD_CLOEXEC).map_err(|errno| fault(errno.into()))?);
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(fault)?;
    let text = key.replace("\r\n", "\n");
    file.write_all(text.trim().as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(fault)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(secrets: &[(&str, &str)], uri: &str) -> Result<Access> {
        let secrets = secrets.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Access::of(&Credentials::new(secrets), &Remote::parse(uri).unwrap(), None)
    }

    #[test]
    fn a_token_goes_to_its_own_origin_and_is_never_shown() {
        let access = access(&[("token", "hunter22")], "https://h/r").unwrap();
        let header = access.header(&Remote::parse("https://h/s").unwrap()).unwrap();
        assert_eq!(header, "Authorization: Basic eC1hY2Nlc3MtdG9rZW46aHVudGVyMjI=");
        for other in ["https://k/r", "http://h/r", "git@h:r"] {
            assert_eq!(access.header(&Remote::parse(other).unwrap()), None, "{other}");
        }
        let said = access.redact("remote: you sent eC1hY2Nlc3MtdG9rZW46aHVudGVyMjI= which is hunter22");
        assert!(!said.contains("hunter22") && !said.contains("eC1h"), "{said}");
        assert!(!format!("{access:?}").contains("hunter22"));
    }

    #[test]
    fn what_would_break_a_header_is_refused() {
        for secrets in [&[("token", "a\nb")][..], &[("username", "a:b"), ("password", "c")]] {
            assert_eq!(access(secrets, "https://h/r").unwrap_err().reason(), "BAD_CREDENTIALS");
        }
    }
    #[test]
    fn a_key_is_in_the_configuration_for_its_own_host_alone() {
        let access = access(&[("ssh_key", "a key")], "git@h:r").unwrap();
        for (remote, offered) in [("git@h:s", true), ("git@k:s", false), ("ssh://git@h:2222/s", false)] {
            let remote = Remote::parse(remote).unwrap();
            assert_eq!(access.is_for(&remote), offered);
            let Remote::Ssh(address) = remote else { unreachable!() };
            let text = access.ssh_configuration(&address, [127, 0, 0, 1].into(), "known", Duration::from_secs(1));
            assert_eq!(!text.contains("IdentityFile none\n"), offered, "{text}");
        }
    }
}
