//! How values are read: what a key accepts, and what it says of anything else.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use crate::control::caller::Named;
use crate::names::OwnerId;
use crate::source::egress::Cidr;

pub(super) fn set<T>(slot: &mut T, value: std::result::Result<T, String>) -> std::result::Result<(), String> {
    *slot = value?;
    Ok(())
}

pub(super) fn absolute_path(value: &Value) -> std::result::Result<PathBuf, String> {
    match value.as_str() {
        Some(text) if text.starts_with('/') => Ok(PathBuf::from(text)),
        _ => Err("must be an absolute path".to_owned()),
    }
}

pub(super) fn file_or_none(value: &Value) -> std::result::Result<Option<PathBuf>, String> {
    match value.as_str() {
        Some("") => Ok(None),
        _ => absolute_path(value).map(Some).map_err(|what| format!("{what}, or empty")),
    }
}

pub(super) fn bytes(value: &Value) -> std::result::Result<u64, String> {
    value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok())
        .ok_or_else(|| "must be a number of bytes, 0 or more".to_owned())
}

pub(super) fn at_least(value: &Value, least: u64) -> std::result::Result<u64, String> {
    bytes(value)
        .ok()
        .filter(|number| *number >= least)
        .ok_or_else(|| format!("must be a number of bytes, at least {least}"))
}

/// A fraction, in thousandths.
pub(super) fn fraction(value: &Value) -> std::result::Result<u64, String> {
    let given = value.as_float().filter(|given| (0.001..=1.0).contains(given));
    let given = given.or_else(|| value.as_integer().filter(|given| *given == 1).map(|_| 1.0));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 1 and 1000")]
    given.map(|given| (given * 1000.0).round() as u64).ok_or_else(|| "must be a fraction from 0.001 to 1".to_owned())
}

pub(super) fn auto_or_never(value: &Value) -> std::result::Result<bool, String> {
    match value.as_str() {
        Some("auto") => Ok(true),
        Some("never") => Ok(false),
        _ => Err("must be \"auto\" or \"never\"".to_owned()),
    }
}

pub(super) fn networks(value: &Value) -> std::result::Result<Vec<Cidr>, String> {
    let expected = "must be a list of networks such as [\"10.0.0.0/8\", \"fd00::/8\"]";
    let list = value.as_array().ok_or_else(|| expected.to_owned())?;
    list.iter()
        .map(|network| {
            let text = network.as_str().ok_or_else(|| expected.to_owned())?;
            text.parse::<Cidr>().map_err(|error| format!("{expected}: {}", error.report()))
        })
        .collect()
}

pub(super) fn path_or_empty(value: &Value) -> std::result::Result<PathBuf, String> {
    file_or_none(value).map(Option::unwrap_or_default)
}

pub(super) fn peers(value: &Value) -> std::result::Result<Vec<Named>, String> {
    let expected =
        || "must be a list of callers such as [\"uid:1000\", \"gid:990\", \"name:scheduler.example\"]".to_owned();
    let list = value.as_array().ok_or_else(expected)?;
    list.iter()
        .map(|peer| peer.as_str().ok_or_else(expected)?.parse::<Named>().map_err(|error| error.report()))
        .collect()
}

/// Tenants are known by certificates: many of them may share a user of this host.
pub(super) fn tenants(value: &Value) -> std::result::Result<Vec<Named>, String> {
    let named = peers(value)?;
    if named.iter().any(|named| matches!(named, Named::User(_) | Named::Group(_))) {
        return Err("must be a list of certificates' names such as [\"name:team-a\"], or [\"name:*\"]".to_owned());
    }
    Ok(named)
}

pub(super) fn owners(value: &Value) -> std::result::Result<Vec<String>, String> {
    let expected = || "must be a list of owners such as [\"team-a\"]; [] is everybody".to_owned();
    let list = value.as_array().ok_or_else(expected)?;
    list.iter()
        .map(|owner| {
            let owner = owner.as_str().ok_or_else(expected)?;
            OwnerId::new(owner).map(|owner| owner.to_string()).map_err(|error| error.report())
        })
        .collect()
}

/// A table of owners and bytes.
pub(super) fn bytes_of_owners(value: &Value) -> std::result::Result<BTreeMap<String, u64>, String> {
    let expected = "must be a table of owners and bytes such as { \"team-a\" = 2000000000000 }";
    let table = value.as_table().ok_or_else(|| expected.to_owned())?;
    let of_owner = |(owner, value): (&String, &Value)| {
        let owner = OwnerId::new(owner.clone()).map_err(|error| error.report())?;
        let bytes = bytes(value).map_err(|what| format!("is wrong: `{owner}` {what}"))?;
        Ok((owner.to_string(), bytes))
    };
    table.iter().map(of_owner).collect()
}

pub(super) fn attempts(value: &Value) -> std::result::Result<u32, String> {
    value
        .as_integer()
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (1..=100).contains(number))
        .ok_or_else(|| "must be a number from 1 to 100".to_owned())
}

pub(super) fn days(value: &Value) -> std::result::Result<Duration, String> {
    value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok())
        .filter(|number| (1..=3650).contains(number))
        .map(|days| Duration::from_secs(days * super::DAY_SECONDS))
        .ok_or_else(|| "must be a number of days from 1 to 3650".to_owned())
}

pub(super) fn seconds(value: &Value) -> std::result::Result<Duration, String> {
    value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok())
        .filter(|number| (1..=3600).contains(number))
        .map(Duration::from_secs)
        .ok_or_else(|| "must be a number of seconds from 1 to 3600".to_owned())
}

/// `""` for none, a port of loopback, or an address with its port.
pub(super) fn listen_address(value: &Value) -> std::result::Result<Option<SocketAddr>, String> {
    let expected = || "must be \"\", a port, or an address with its port such as \"0.0.0.0:8080\"".to_owned();
    let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match (value.as_integer(), value.as_str()) {
        (Some(port), _) => u16::try_from(port).map(|port| Some(loopback(port))).map_err(|_| expected()),
        (_, Some("")) => Ok(None),
        (_, Some(text)) => match text.parse::<u16>() {
            Ok(port) => Ok(Some(loopback(port))),
            Err(_) => text.parse().map(Some).map_err(|_| expected()),
        },
        _ => Err(expected()),
    }
}

/// As [`listen_address`], or a list of such.
pub(super) fn listen_addresses(value: &Value) -> std::result::Result<Vec<SocketAddr>, String> {
    let one = |value| listen_address(value).map(|address| address.into_iter().collect::<Vec<_>>());
    match value.as_array() {
        Some(list) => list.iter().map(one).collect::<std::result::Result<Vec<_>, _>>().map(|found| found.concat()),
        None => one(value),
    }
}

pub(super) fn base_url(value: &Value) -> std::result::Result<String, String> {
    let url = value.as_str().map(|text| text.trim_end_matches('/'));
    url.filter(|url| url.is_empty() || url.starts_with("http://") || url.starts_with("https://"))
        .map(str::to_owned)
        .ok_or_else(|| "must be a URL that begins with http:// or https://".to_owned())
}
