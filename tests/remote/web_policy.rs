//! Who may be talked to: certificates, endpoints, redirects, and proxies of the operator.

use std::fs;
use std::path::PathBuf;

use super::buckets::{self, assert_kept_nowhere};
use super::web::{create, refused};
use crate::support::corpus::{random_file, seed};
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::assert_same_tree;
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::webserver::{certificates, nginx, nginx_tls, tinyproxy};

/// One loopback address, so that there is another that is refused.
const ONE_ADDRESS: (&str, &str) = ("CKPTD_SOURCES__ALLOW_NETWORKS", r#"["127.0.0.1/32"]"#);
const ONE_ATTEMPT: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "1");

fn site(place: &Place) -> PathBuf {
    let site = place.dir("site");
    random_file(&site.join("weights.bin"), seed(), 5 << 20);
    site
}

#[test]
fn a_certificate_is_refused_unless_all_of_it_is_right() {
    let place = Place::new();
    let (site, made) = (site(&place), certificates(&place, &[]));
    let authority = made.join("ca.pem").display().to_string();
    let servers = ["good", "expired", "elsewhere", "foreign"]
        .map(|name| nginx_tls(&place, &site, &made.join(format!("{name}.pem"))));
    let trusting = Daemon::start_with(&[LOOPBACK, ONE_ATTEMPT, ("SSL_CERT_FILE", &authority)]);
    let [good, wrong @ ..] = &servers;
    for (index, server) in wrong.iter().enumerate() {
        for path in ["/weights.bin", "/"] {
            let url = format!("https://127.0.0.1:{}{path}", server.port);
            refused(&trusting, &format!("wrong-{index}{}", path.len()), &url, "CERTIFICATE_REFUSED");
        }
    }
    let url = format!("https://localhost:{}/", good.port);
    create(&trusting, "good", &url);
    assert_same_tree(&site, &trusting.attach("job", "good"));
    let host_trust = Daemon::start_with(&[LOOPBACK, ONE_ATTEMPT]);
    refused(&host_trust, "unknown", &url, "CERTIFICATE_REFUSED");
}

#[test]
fn redirects_are_followed_where_the_policy_permits() {
    let place = Place::new();
    let (site, made) = (site(&place), certificates(&place, &[]));
    let authority = made.join("ca.pem").display().to_string();
    let tls = nginx_tls(&place, &site, &made.join("good.pem"));
    let plain = nginx(&place, &site, "");
    let locations = format!(
        "location = /up {{ return 302 https://localhost:{}/weights.bin; }}\n\
         location = /across {{ return 307 http://localhost:{}/weights.bin; }}\n\
         location = /inside {{ return 302 http://127.0.0.2:{1}/weights.bin; }}\n\
         location = /metadata {{ return 302 http://169.254.169.254/latest/; }}\n\
         location = /file {{ return 302 file:///etc/passwd; }}\n\
         location = /circle {{ return 302 /circle; }}",
        tls.port, plain.port
    );
    let server = nginx(&place, &site, &locations);
    let down = nginx(&place, &site, &format!("location = /x {{ return 302 {}; }}", plain.url("/weights.bin")));
    let daemon = Daemon::start_with(&[ONE_ADDRESS, ONE_ATTEMPT, ("SSL_CERT_FILE", &authority)]);
    for (name, path) in [("up", "/up"), ("across", "/across")] {
        create(&daemon, name, &server.url(path));
        assert_same_tree(&site, &daemon.attach(name, name));
    }
    for (name, path, reason) in [
        ("inside", "/inside", "EGRESS_REFUSED"),
        ("metadata", "/metadata", "EGRESS_REFUSED"),
        ("file", "/file", "EGRESS_REFUSED"),
        ("circle", "/circle", "REDIRECT_LOOP"),
    ] {
        refused(&daemon, name, &server.url(path), reason);
    }
    refused(&daemon, "direct", &format!("http://127.0.0.2:{}/", plain.port), "EGRESS_REFUSED");
    create(&daemon, "same-scheme", &down.url("/x"));
}

/// Sources of every type that takes an endpoint: the type, an address, the path below the endpoint, and what is given besides.
const WITH_ENDPOINT: &[(&str, &str, &str, &[&str])] = &[
    ("aws", "s3://bucket/x", "", &["@key_id=k", "@secret=s"]),
    ("wasabi", "s3://bucket/x", "", &["@key_id=k", "@secret=s"]),
    ("azure", "https://account.blob.core.windows.net/container/x", "/account", &["@account_key=c2VjcmV0"]),
    ("gcp", "gs://bucket/x", "", &["@token=t"]),
    ("huggingface", "acme/model", "", &[]),
    ("kaggle", "acme/tables", "", &["type=dataset"]),
];

#[test]
fn an_endpoint_where_sources_may_not_go_is_refused_and_asked_nothing() {
    let (site, daemon) = (Faults::before(1), Daemon::start());
    for (kind, uri, below, more) in WITH_ENDPOINT {
        for (number, host) in ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]"].into_iter().enumerate() {
            let endpoint = format!("endpoint=http://{host}:{}{below}", site.port());
            let more = [*more, &[endpoint.as_str()][..]].concat();
            buckets::create(&daemon, kind, &format!("{kind}-{number}"), uri, &more)
                .refused(&[2], &["which sources may not reach"]);
        }
    }
    assert_eq!(site.heads(), [] as [&str; 0]);
}

#[test]
fn what_is_signed_for_one_store_is_not_taken_to_another() {
    let (elsewhere, store) = (Faults::before(1), Faults::before(1));
    let location: &'static str = format!("Location: {}", elsewhere.url("/x")).leak();
    let daemon = Daemon::start_with(&[LOOPBACK, ONE_ATTEMPT]);
    for status in [302, 307] {
        store.spoil("", Fault::Status(status, location), 1000);
        for (kind, uri, below, more) in WITH_ENDPOINT.iter().take(4) {
            let endpoint = format!("endpoint={}", store.url(below));
            let more = [*more, &[endpoint.as_str()][..]].concat();
            let name = format!("{kind}-{status}");
            buckets::create(&daemon, kind, &name, uri, &more).refused(&[2, 3, 4, 6, 7], &[&status.to_string()]);
            assert_eq!(daemon.json(&["get", &name])["state"], "failed");
        }
        store.spare();
    }
    assert!(!store.heads().is_empty());
    assert_eq!(elsewhere.heads(), [] as [&str; 0]);
}

#[test]
fn a_proxy_of_the_environment_carries_plain_and_protected_requests() {
    let place = Place::new();
    let (site, made, log) = (site(&place), certificates(&place, &[]), place.join("proxy.log"));
    let authority = made.join("ca.pem").display().to_string();
    let tls = nginx_tls(&place, &site, &made.join("good.pem"));
    let plain = nginx(&place, &site, "");
    let proxy = tinyproxy(&place, &log, None);
    let address = proxy.url("");
    // A proxy may close a connection that is about to be used again: what is to arrive is asked for again then.
    let environment = [
        ONE_ADDRESS,
        ("SSL_CERT_FILE", authority.as_str()),
        ("HTTPS_PROXY", address.as_str()),
        ("HTTP_PROXY", address.as_str()),
    ];
    let daemon = Daemon::start_with(&environment);
    let logged = |words: &str| fs::read_to_string(&log).unwrap_or_default().contains(words);
    create(&daemon, "tls", &format!("https://localhost:{}/", tls.port));
    wait_until("the proxy has logged it", super::web::PATIENCE, || logged(&format!("CONNECT localhost:{}", tls.port)));
    create(&daemon, "plain", &plain.url("/"));
    wait_until("the proxy has logged it", super::web::PATIENCE, || logged(&format!("GET {}", plain.url("/"))));
    for name in ["tls", "plain"] {
        assert_same_tree(&site, &daemon.attach(name, name));
    }
    let direct = Daemon::start_with(&[&environment[..], &[("NO_PROXY", "localhost,127.0.0.1")]].concat());
    fs::write(&log, "").unwrap();
    create(&direct, "direct", &plain.url("/"));
    assert!(!logged("GET "), "{}", fs::read_to_string(&log).unwrap());
}

#[test]
fn the_operators_proxy_needs_no_place_on_the_allow_list_and_opens_nothing() {
    let place = Place::new();
    let site = site(&place);
    let web = nginx(&place, &site, "");
    // Answers whatever name it is asked for, as a proxy does that alone can resolve it.
    let proxy = nginx(&place, &site, &format!("location / {{ proxy_pass {}; }}", web.url("")));
    for host in ["127.0.0.1", "localhost"] {
        let address = format!("http://{host}:{}", proxy.port);
        let daemon = Daemon::start_with(&[ONE_ATTEMPT, ("HTTP_PROXY", &address)]);
        create(&daemon, "name", "http://only-the-proxy-knows.invalid/");
        assert_same_tree(&site, &daemon.attach("job", "name"));
        for (name, url) in [
            ("own", web.url("/weights.bin")),
            ("localhost", format!("http://localhost:{}/weights.bin", web.port)),
            ("dot", format!("http://LOCALHOST.:{}/weights.bin", web.port)),
            ("proxy", format!("{address}/weights.bin")),
            ("metadata", "http://169.254.169.254/latest/".to_owned()),
        ] {
            refused(&daemon, name, &url, "EGRESS_REFUSED");
        }
        let direct = Daemon::start_with(&[ONE_ATTEMPT, ("HTTP_PROXY", &address), ("NO_PROXY", "localhost")]);
        refused(&direct, "direct", &format!("http://localhost:{}/weights.bin", web.port), "EGRESS_REFUSED");
    }
}

#[test]
fn a_password_of_the_operators_proxy_is_shown_nowhere() {
    let place = Place::new();
    let (site, made) = (site(&place), certificates(&place, &[]));
    let authority = made.join("ca.pem").display().to_string();
    let (plain, tls) = (nginx(&place, &site, ""), nginx_tls(&place, &site, &made.join("good.pem")));
    let proxy = tinyproxy(&place, &place.join("proxy.log"), None);
    for (name, port) in [("there", proxy.port), ("away", 1)] {
        let address = format!("http://reader:pr0xy-passw0rd@127.0.0.1:{port}");
        let environment: [(&'static str, &str); 5] = [
            ONE_ADDRESS,
            ("RUST_LOG", "debug"),
            ("SSL_CERT_FILE", &authority),
            ("HTTPS_PROXY", &address),
            ("HTTP_PROXY", &address),
        ];
        let attempts: &[(&'static str, &str)] = if name == "away" { &[ONE_ATTEMPT] } else { &[] };
        let daemon = Daemon::start_with(&[&environment[..], attempts].concat());
        for (number, url) in [plain.url("/"), format!("https://localhost:{}/", tls.port)].into_iter().enumerate() {
            match name {
                "there" => create(&daemon, &format!("{name}-{number}"), &url),
                _ => refused(&daemon, &format!("{name}-{number}"), &url, "CONNECT_FAILED"),
            }
        }
        // As it is, and as a header has it.
        assert_kept_nowhere(&daemon, &["pr0xy-passw0rd", "cmVhZGVyOnByMHh5LXBhc3N3MHJk"]);
    }
}
