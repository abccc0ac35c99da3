//! The credentials of the daemon's environment, and whom they are for.
//!
//! They are the operator's, and a request names its endpoint: so they go to AWS itself, where a request names none, and to the one endpoint that
//! the operator names beside them (`AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`, as AWS's own programs take them). Any other would
//! read the key's id and the session's token, and could pass a signature on as long as it holds.

use reqwest::Url;

use super::sign::Keys;

/// The credentials that `set`, which reads the environment, has for `endpoint`, or for AWS itself.
pub(super) fn keys(endpoint: Option<&Url>, set: impl Fn(&str) -> Option<String>) -> Option<Keys> {
    let operators = || set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL"));
    let permitted = endpoint.is_none_or(|endpoint| {
        operators().and_then(|own| super::parse_endpoint(&own).ok()).is_some_and(|own| same_place(&own, endpoint))
    });
    if !permitted {
        return None;
    }
    let (id, secret) = set("AWS_ACCESS_KEY_ID").zip(set("AWS_SECRET_ACCESS_KEY"))?;
    Some(Keys { id, secret, token: set("AWS_SESSION_TOKEN") })
}

/// Whether two endpoints are one: scheme, host, port and path.
fn same_place(one: &Url, other: &Url) -> bool {
    one.origin() == other.origin() && one.path().trim_end_matches('/') == other.path().trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environments_credentials_are_for_aws_and_the_operators_endpoint() {
        let general = &[("AWS_ENDPOINT_URL", "https://minio.example:9000/")][..];
        let both = &[general[0], ("AWS_ENDPOINT_URL_S3", "s3.example")][..];
        for (endpoint, environment, given) in [
            (None, &[][..], true),
            (None, general, true),
            (Some("https://minio.example:9000"), general, true),
            (Some("HTTPS://MINIO.example:9000/"), general, true),
            (Some("https://minio.example:9000"), &[], false),
            (Some("https://tenant.example"), &[], false),
            (Some("https://tenant.example"), general, false),
            (Some("http://minio.example:9000"), general, false),
            (Some("https://minio.example"), general, false),
            (Some("https://minio.example:9000/other"), general, false),
            (Some("https://minio.example.tenant.example:9000"), general, false),
            (Some("https://s3.example:443"), both, true),
            (Some("https://minio.example:9000"), both, false),
            (Some("https://tenant.example"), &[("AWS_ENDPOINT_URL", "not a url")], false),
        ] {
            let set = |name: &str| {
                let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret")];
                let found = keys.iter().chain(environment).find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let endpoint = endpoint.map(|text| super::super::parse_endpoint(text).unwrap());
            assert_eq!(keys(endpoint.as_ref(), set).is_some(), given, "{endpoint:?} {environment:?}");
        }
    }
}
