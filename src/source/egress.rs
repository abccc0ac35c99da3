//! Egress policy: which addresses a source may talk to.
//!
//! Sources are chosen by tenants, and the daemon sits where it could reach what a tenant must not: its own host,
//! the metadata service, the private network. So every address is judged by the one table here, *after* name
//! resolution: [`GuardedResolver`] drops refused addresses before a connection is tried, so a name that resolves
//! to something else a moment later gains nothing, and [`EgressPolicy::check_url`] judges the scheme and literal
//! addresses of every request and of every redirect. IPv4 addresses inside IPv6 (mapped, compatible, 6to4, NAT64) are judged
//! as the IPv4 address that they reach.
//!
//! Operators open networks with `sources.allow_networks`; the allow list wins over the table.
//!
//! With `HTTPS_PROXY` or `HTTP_PROXY` in the daemon's environment it is the proxy that connects. The proxy itself is the operator's choice and
//! needs no place on the allow list; what is asked of it is judged as without it, names by what they resolve to here. A name that
//! the proxy resolves otherwise, or that only the proxy resolves, is the proxy's to refuse.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::error::{Error, Result};

/// A network: an address and how many of its leading bits count.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The network that holds `address`; bits beyond the prefix do not count.
    ///
    /// # Errors
    /// `BAD_NETWORK` for a prefix longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Result<Self> {
        if prefix > width(address) {
            return Err(bad_network(&format!("{address}/{prefix}")));
        }
        Ok(Self { network: address, prefix })
    }

    const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self { network: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
    }

    const fn v6(head: [u16; 4], prefix: u8) -> Self {
        Self { network: IpAddr::V6(Ipv6Addr::new(head[0], head[1], head[2], head[3], 0, 0, 0, 0)), prefix }
    }

    /// Whether `address` lies inside; never across address families.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (ours, theirs) = match (self.network, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => (u128::from(ours.to_bits()), u128::from(theirs.to_bits())),
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => (ours.to_bits(), theirs.to_bits()),
            _ => return false,
        };
        let free = u32::from(width(self.network) - self.prefix);
        (ours ^ theirs).checked_shr(free).unwrap_or(0) == 0
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn bad_network(text: &str) -> Error {
    Error::invalid("BAD_NETWORK", format!("`{text}` is not a network"))
        .remedy("write an address and a prefix length, as in 10.0.0.0/8 or fd00::/8")
}

impl FromStr for Cidr {
    type Err = Error;

    /// `address/prefix`, or an address alone for just that one.
    fn from_str(text: &str) -> Result<Self> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| bad_network(text))?;
        let prefix = match prefix {
            None => width(address),
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_| bad_network(text))?
            }
            Some(_) => return Err(bad_network(text)),
        };
        Self::new(address, prefix).map_err(|_| bad_network(text))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cidr({self})")
    }
}

/// What is refused unless allowed, with the words for the error. First match wins, so the single metadata addresses come
/// before the networks around them. From the IANA special-purpose registries (RFC 6890) and the clouds' manuals.
const REFUSED: &[(Cidr, &str)] = &[
    (Cidr::v4(169, 254, 169, 254, 32), "a metadata service"),
    (Cidr::v4(100, 100, 100, 200, 32), "a metadata service"),
    (Cidr::v4(168, 63, 129, 16, 32), "a metadata service"),
    (Cidr::v4(192, 0, 0, 192, 32), "a metadata service"),
    (Cidr::v4(0, 0, 0, 0, 8), "an unspecified address"),
    (Cidr::v4(10, 0, 0, 0, 8), "a private network"),
    (Cidr::v4(100, 64, 0, 0, 10), "a carrier's private network"),
    (Cidr::v4(127, 0, 0, 0, 8), "this host"),
    (Cidr::v4(169, 254, 0, 0, 16), "a link-local address"),
    (Cidr::v4(172, 16, 0, 0, 12), "a private network"),
    (Cidr::v4(192, 0, 0, 0, 24), "a reserved network"),
    (Cidr::v4(192, 0, 2, 0, 24), "a reserved network"),
    (Cidr::v4(192, 168, 0, 0, 16), "a private network"),
    (Cidr::v4(198, 18, 0, 0, 15), "a reserved network"),
    (Cidr::v4(198, 51, 100, 0, 24), "a reserved network"),
    (Cidr::v4(203, 0, 113, 0, 24), "a reserved network"),
    (Cidr::v4(224, 0, 0, 0, 4), "a multicast address"),
    (Cidr::v4(240, 0, 0, 0, 4), "a reserved network"),
    (Cidr { network: IpAddr::V6(Ipv6Addr::UNSPECIFIED), prefix: 128 }, "an unspecified address"),
    (Cidr { network: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix: 128 }, "this host"),
    (Cidr::v6([0x0064, 0xff9b, 0x0001, 0], 48), "a reserved network"),
    (Cidr::v6([0x0100, 0, 0, 0], 64), "a reserved network"),
    (Cidr::v6([0x2001, 0, 0, 0], 32), "a tunnel"),
    (Cidr::v6([0x2001, 0x0db8, 0, 0], 32), "a reserved network"),
    (Cidr::v6([0xfc00, 0, 0, 0], 7), "a unique-local network"),
    (Cidr::v6([0xfe80, 0, 0, 0], 10), "a link-local address"),
    (Cidr::v6([0xfec0, 0, 0, 0], 10), "a private network"),
    (Cidr::v6([0xff00, 0, 0, 0], 8), "a multicast address"),
];

/// The address that packets to `address` end at: IPv4 addresses carried inside IPv6 are taken out.
fn reached(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let [a, b, c, d, e, f, _, _] = v6.segments();
    let bits = v6.to_bits();
    let low = Ipv4Addr::from_bits(u32::try_from(bits & 0xffff_ffff).unwrap_or_default());
    match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0xffff) | (0x0064, 0xff9b, 0, 0, 0, 0) => IpAddr::V4(low),
        (0, 0, 0, 0, 0, 0) if low.to_bits() > 1 => IpAddr::V4(low),
        (0x2002, ..) => IpAddr::V4(Ipv4Addr::from_bits((u32::from(b) << 16) | u32::from(c))),
        _ => address,
    }
}

/// Which addresses sources may reach: public ones and the operator's allow list.
#[derive(Clone, Debug, Default)]
pub struct EgressPolicy {
    allowed: Vec<Cidr>,
}

impl EgressPolicy {
    /// Public addresses, and `allowed` besides (`sources.allow_networks`).
    pub fn new(allowed: Vec<Cidr>) -> Self {
        Self { allowed }
    }

    /// Judges one address.
    ///
    /// # Errors
    /// What kind of address it is.
    pub fn check_address(&self, address: IpAddr) -> Result<(), Refusal> {
        let end = reached(address);
        if self.allowed.iter().any(|network| network.contains(end) || network.contains(address)) {
            return Ok(());
        }
        match REFUSED.iter().find(|(network, _)| network.contains(end)) {
            None => Ok(()),
            Some((_, what)) => Err(Refusal { host: address.to_string(), what }),
        }
    }

    /// Judges what can be seen of a URL before it is resolved: scheme, and the host where it is an address.
    ///
    /// # Errors
    /// `EGRESS_REFUSED`.
    pub fn check_url(&self, url: &Url) -> Result<()> {
        if !matches!(url.scheme(), "http" | "https") {
            let message = format!("`{}:` addresses are not fetched", url.scheme());
            return Err(Error::denied("EGRESS_REFUSED", message).remedy("give an http or https address"));
        }
        let host = url.host_str().unwrap_or_default();
        match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(address) => self.check_address(address).map_err(Error::from),
            Err(_) => Ok(()),
        }
    }
}

impl EgressPolicy {
    /// The addresses of `host` (a name or an address, without brackets) that sources may reach, for protocols that
    /// connect by themselves. Connect to one of these and resolve no further.
    ///
    /// # Errors
    /// `EGRESS_REFUSED` where none is left; unavailable where the name does not resolve.
    pub async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>> {
        let unresolved = |why: String| Error::unavailable("NAME_NOT_RESOLVED", format!("resolving `{host}`: {why}"));
        let found = tokio::net::lookup_host((host, port)).await.map_err(|error| unresolved(error.to_string()))?;
        let permitted = permitted(self, host, found)?;
        if permitted.is_empty() { Err(unresolved("it has no address".to_owned())) } else { Ok(permitted) }
    }
}

/// A refused address; becomes `EGRESS_REFUSED`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{host} is {what}, which sources may not reach")]
pub struct Refusal {
    host: String,
    what: &'static str,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::denied("EGRESS_REFUSED", refusal.to_string())
            .remedy("let the operator add its network to `sources.allow_networks`, if sources are meant to reach it")
            .fact("host", refusal.host)
    }
}

/// Resolves names with the system's resolver and hands on only the addresses that the policy permits.
pub(super) struct GuardedResolver {
    policy: Arc<EgressPolicy>,
    proxies: Vec<String>,
}

impl GuardedResolver {
    /// A resolver under `policy`, but for the names of `proxies`; whoever asks for one of these as a source's is judged before.
    pub(super) fn new(policy: Arc<EgressPolicy>, proxies: Vec<String>) -> Self {
        Self { policy, proxies }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.policy);
        let is_proxy = self.proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(name.as_str()));
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            if is_proxy {
                return Ok(Box::new(found.collect::<Vec<_>>().into_iter()) as Addrs);
            }
            let permitted = permitted(&policy, name.as_str(), found)?;
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

/// The permitted addresses among `found`; refused if there were some but none is left.
fn permitted(
    policy: &EgressPolicy,
    host: &str,
    found: impl Iterator<Item = SocketAddr>,
) -> Result<Vec<SocketAddr>, Refusal> {
    let mut kept = Vec::new();
    let mut refused = None;
    for address in found {
        match policy.check_address(address.ip()) {
            Ok(()) => kept.push(address),
            Err(refusal) => refused = Some(Refusal { host: host.to_owned(), what: refusal.what }),
        }
    }
    match refused {
        Some(refusal) if kept.is_empty() => Err(refusal),
        _ => Ok(kept),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_parsed_and_junk_is_refused() {
        for (text, shown) in
            [("10.0.0.0/8", "10.0.0.0/8"), ("::1", "::1/128"), ("1.2.3.4", "1.2.3.4/32"), ("::/0", "::/0")]
        {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), shown);
        }
        for junk in ["", "/", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/", "10.0.0.0/+8", "x/8", "10.0.0.0/8/8"] {
            assert_eq!(junk.parse::<Cidr>().unwrap_err().reason(), "BAD_NETWORK", "{junk}");
        }
    }

    #[test]
    fn a_network_holds_its_addresses_and_no_others() {
        let network: Cidr = "172.16.0.0/12".parse().unwrap();
        assert!(network.contains(ip("172.16.0.0")) && network.contains(ip("172.31.255.255")));
        assert!(!network.contains(ip("172.32.0.0")) && !network.contains(ip("172.15.255.255")));
        assert!(!network.contains(ip("::172.16.0.0")));
        assert!("0.0.0.0/0".parse::<Cidr>().unwrap().contains(ip("255.255.255.255")));
        assert!("::/0".parse::<Cidr>().unwrap().contains(ip("ffff::")));
        assert!("10.1.2.3/8".parse::<Cidr>().unwrap().contains(ip("10.9.9.9")));
    }

    #[test]
    fn what_is_not_public_is_refused() {
        let policy = EgressPolicy::default();
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.1.1",
            "169.254.169.254",
            "168.63.129.16",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::10.0.0.1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "2001::1",
        ] {
            assert!(policy.check_address(ip(address)).is_err(), "{address}");
        }
    }

    #[test]
    fn what_is_public_is_permitted() {
        let policy = EgressPolicy::default();
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.0.1",
            "172.32.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "2002:101:101::1",
            "2001:4860:4860::8888",
        ] {
            assert_eq!(policy.check_address(ip(address)), Ok(()), "{address}");
        }
    }

    #[test]
    fn the_allow_list_opens_just_what_it_names() {
        let policy = EgressPolicy::new(vec!["127.0.0.1/32".parse().unwrap(), "fd00::/16".parse().unwrap()]);
        for open in ["127.0.0.1", "::ffff:127.0.0.1", "fd00::5"] {
            assert_eq!(policy.check_address(ip(open)), Ok(()), "{open}");
        }
        for shut in ["127.0.0.2", "::1", "fd01::5"] {
            assert!(policy.check_address(ip(shut)).is_err(), "{shut}");
        }
    }

    #[test]
    fn urls_are_judged_by_scheme_and_literal_address() {
        let policy = EgressPolicy::default();
        for bad in [
            "file:///etc/passwd",
            "gopher://example.com/",
            "http://127.0.0.1/",
            "http://[::1]:80/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://[::ffff:169.254.169.254]/latest",
            "ftp://example.com/x",
        ] {
            let error = policy.check_url(&Url::parse(bad).unwrap()).unwrap_err();
            assert_eq!(error.reason(), "EGRESS_REFUSED", "{bad}");
        }
        assert!(policy.check_url(&Url::parse("https://example.com/x").unwrap()).is_ok());
        let error = policy.check_url(&Url::parse("http://10.0.0.1/").unwrap()).unwrap_err();
        assert!(error.remedy_text().unwrap().contains("sources.allow_networks"));
    }

    #[test]
    fn a_name_keeps_its_permitted_addresses_and_is_refused_without_any() {
        let policy = EgressPolicy::default();
        let found =
            |texts: &[&str]| texts.iter().map(|text| SocketAddr::new(ip(text), 0)).collect::<Vec<_>>().into_iter();
        assert_eq!(
            permitted(&policy, "x", found(&["10.0.0.1", "1.1.1.1"])).unwrap(),
            [SocketAddr::new(ip("1.1.1.1"), 0)]
        );
        let refusal = permitted(&policy, "inside.example", found(&["10.0.0.1"])).unwrap_err();
        assert_eq!(refusal.to_string(), "inside.example is a private network, which sources may not reach");
        assert!(permitted(&policy, "x", found(&[])).unwrap().is_empty());
    }
}
