//! Proxies of the daemon's environment (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`), and what the egress policy means with them.
//!
//! The operator chose the proxy, so the proxy itself may be anywhere, also on this host, without being on the allow list of networks: its name
//! is resolved without the policy, and an address it is given by was never resolved. For sources nothing opens by that: whoever gives the proxy's
//! own name or address as a source's is judged as for any other.
//!
//! Behind a proxy it is the proxy that resolves names. So that `localhost` or a name of the private network does not reach there what it could not
//! reach from here, names are resolved here as well and judged ([`Proxies::check`]); those that cannot be resolved here are left to the proxy, for on some
//! networks it alone can. A name that is answered differently there is the proxy's to refuse.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;
use tokio::time::timeout;

use super::super::egress::EgressPolicy;
use crate::error::{Error, Kind, Result};

/// How long the judgement of a name holds, lest every request of a listing waits for a resolver that is not there.
const JUDGED_FOR: Duration = Duration::from_secs(60);

/// Names whose judgement is remembered: more than sources under way.
const NAMES_KEPT: usize = 1024;

/// How long a name may take to resolve here before it is left to the proxy.
const RESOLVE_LIMIT: Duration = Duration::from_secs(3);

/// The proxies, and names judged lately.
pub(super) struct Proxies {
    matcher: Option<Matcher>,
    hosts: Vec<String>,
    permitted: Mutex<HashMap<String, Instant>>,
}

impl Proxies {
    /// Those of the environment, or none.
    pub(super) fn new(of_environment: bool) -> Self {
        let matcher = of_environment.then(Matcher::from_env);
        let mut proxies = Self { matcher, hosts: Vec::new(), permitted: Mutex::default() };
        let anywhere = ["http://host.invalid/", "https://host.invalid/"];
        proxies.hosts = anywhere.iter().filter_map(|url| proxies.proxy_of(url)).collect();
        proxies
    }

    /// The names or addresses of the proxies.
    pub(super) fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Judges the name in `url` where the resolver of the client will not: behind a proxy, and for the proxy's own name.
    ///
    /// # Errors
    /// `EGRESS_REFUSED`.
    pub(super) async fn check(&self, url: &Url, policy: &EgressPolicy) -> Result<()> {
        // A `.` at the end only says that nothing is to be added; not every resolver knows `localhost.`.
        let Some(name) = url.domain().map(|name| name.trim_end_matches('.')) else { return Ok(()) };
        let behind_proxy = self.proxy_of(url.as_str()).is_some();
        if !behind_proxy && !self.hosts.iter().any(|host| same_name(host, name)) {
            return Ok(());
        }
        if self.is_permitted(name) {
            return Ok(());
        }
        let found = timeout(RESOLVE_LIMIT, policy.resolve(name, url.port_or_known_default().unwrap_or(80))).await;
        match found {
            Ok(Err(refused)) if refused.kind() == Kind::Denied => return Err(refused),
            Ok(Err(error)) if !behind_proxy => return Err(error),
            Err(_) if !behind_proxy => {
                return Err(Error::unavailable("NAME_NOT_RESOLVED", format!("resolving `{name}`: it took too long")));
            }
            _ => {}
        }
        if behind_proxy {
            self.permit(name);
        }
        Ok(())
    }

    /// The host of the proxy that requests for `url` go through.
    fn proxy_of(&self, url: &str) -> Option<String> {
        let uri = url.parse().ok()?;
        self.matcher.as_ref()?.intercept(&uri)?.uri().host().map(str::to_owned)
    }

    fn is_permitted(&self, name: &str) -> bool {
        let permitted = self.permitted.lock().unwrap_or_else(PoisonError::into_inner);
        permitted.get(name).is_some_and(|judged| judged.elapsed() < JUDGED_FOR)
    }

    fn permit(&self, name: &str) {
        let mut permitted = self.permitted.lock().unwrap_or_else(PoisonError::into_inner);
        if permitted.len() >= NAMES_KEPT {
            permitted.clear();
        }
        permitted.insert(name.to_owned(), Instant::now());
    }
}

/// Whether two names of hosts mean the same.
fn same_name(one: &str, other: &str) -> bool {
    one.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.'))
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxies").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}
