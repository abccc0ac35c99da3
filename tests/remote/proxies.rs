//! Services behind the operator's proxy: object stores, hubs, and large files of repositories.

use std::fs;
use std::time::Duration;

use super::buckets::{assert_kept_nowhere, create, reason, tree};
use super::git::{GitSite, noise};
use super::s3::{KEY_ID, SECRET, rclone};
use crate::support::daemon::{Daemon, LOCALHOST};
use crate::support::faults::Faults;
use crate::support::files::{assert_digests, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::standin::Standin;
use crate::support::webserver::{certificates, nginx_tls_before, tinyproxy};

/// One loopback address, so that there is another that is refused.
const ONE_ADDRESS: (&str, &str) = ("CKPTD_SOURCES__ALLOW_NETWORKS", r#"["127.0.0.1/32"]"#);
const ONE_ATTEMPT: (&str, &str) = ("CKPTD_SOURCES__ATTEMPTS", "1");

/// User and password at the proxy, and how a header has them.
const LOGIN: (&str, &str) = ("reader", "pr0xypassw0rd");
const ENCODED: &str = "cmVhZGVyOnByMHh5cGFzc3cwcmQ=";

#[test]
fn a_bucket_comes_through_the_operators_proxy_which_opens_nothing() {
    let place = Place::new();
    tree(&place.dir("store/ckpt/p"));
    let (store, made) = (rclone(&place.join("store"), Some((KEY_ID, SECRET))), certificates(&place, &[]));
    let watched = Faults::before(store.port);
    let tls = nginx_tls_before(&place, watched.port(), &made.join("good.pem"));
    let log = place.join("proxy.log");
    let proxy = tinyproxy(&place, &log, Some(LOGIN));
    let logged = |words: &str| fs::read_to_string(&log).unwrap_or_default().contains(words);
    let authority = made.join("ca.pem").display().to_string();
    // A proxy may close a connection that is about to be used again: what is to arrive is asked for again then.
    let with = |port: u16, word: &str, more: &[(&'static str, &str)]| {
        let address = format!("http://{}:{word}@127.0.0.1:{port}", LOGIN.0);
        let proxies: [(&'static str, &str); 2] = [("HTTP_PROXY", address.as_str()), ("HTTPS_PROXY", address.as_str())];
        let rest: [(&'static str, &str); 3] =
            [ONE_ADDRESS, ("RUST_LOG", "debug"), ("SSL_CERT_FILE", authority.as_str())];
        Daemon::start_with(&[&rest[..], &proxies[..], more].concat())
    };
    let (id, secret) = (format!("@key_id={KEY_ID}"), format!("@secret={SECRET}"));
    let bring = |daemon: &Daemon, name: &str, endpoint: &str| {
        create(daemon, "aws", name, "s3://ckpt/p/", &[&format!("endpoint={endpoint}"), &id, &secret])
    };
    let (plain, protected) = (watched.url(""), format!("https://localhost:{}", tls.port));

    let daemon = with(proxy.port, LOGIN.1, &[]);
    for (name, endpoint, words) in [
        ("plain", &plain, format!("GET {plain}/ckpt")),
        ("protected", &protected, format!("CONNECT localhost:{}", tls.port)),
    ] {
        bring(&daemon, name, endpoint).ok();
        assert_same_tree(&place.join("store/ckpt/p"), &daemon.attach(name, name));
        wait_until("the proxy has logged it", Duration::from_secs(30), || logged(&words));
    }
    let heads = watched.heads().concat().to_ascii_lowercase();
    assert!(!heads.contains("proxy-") && !heads.contains(&ENCODED.to_ascii_lowercase()), "{heads}");

    let inside = ["http://127.0.0.2", "http://[::ffff:127.0.0.2]", "https://127.0.0.2", "http://169.254.169.254"];
    for (number, host) in inside.into_iter().enumerate() {
        let name = format!("inside-{number}");
        bring(&daemon, &name, &format!("{host}:{}", store.port)).refused(&[2], &["which sources may not reach"]);
        assert_eq!(reason(&daemon, &name), "EGRESS_REFUSED");
    }
    assert!(!logged("127.0.0.2") && !logged("169.254"), "{}", fs::read_to_string(&log).unwrap());
    assert_kept_nowhere(&daemon, &[LOGIN.1, ENCODED, SECRET]);

    let asked = watched.heads().len();
    for (name, port, word) in [("wrong", proxy.port, "wr0ngpassw0rd"), ("away", 1, LOGIN.1)] {
        let daemon = with(port, word, &[ONE_ATTEMPT]);
        for (number, endpoint) in [&plain, &protected].into_iter().enumerate() {
            let name = format!("{name}-{number}");
            bring(&daemon, &name, endpoint).refused(&[2, 7], &[]);
        }
        assert_kept_nowhere(&daemon, &[LOGIN.1, ENCODED, "wr0ngpassw0rd", "cmVhZGVyOndyMG5ncGFzc3cwcmQ="]);
    }
    assert_eq!(watched.heads().len(), asked, "nobody goes around a proxy that does not serve");
}

#[test]
fn hubs_and_large_files_come_through_the_operators_proxy() {
    let place = Place::new();
    let log = place.join("proxy.log");
    let proxy = tinyproxy(&place, &log, Some(LOGIN));
    let address = format!("http://{}:{}@127.0.0.1:{}", LOGIN.0, LOGIN.1, proxy.port);
    let daemon = Daemon::start_with(&[LOCALHOST, ("HTTP_PROXY", &address), ("RUST_LOG", "debug")]);
    let (hub, kaggle, site) = (Standin::start(), Standin::of("kaggle.py"), GitSite::start_with_lfs());
    let [hub, kaggle, git] = [hub.port, kaggle.port, site.port()].map(Faults::before);
    let work = site.work("org/model");
    work.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n").write("a b", "plain");
    let bytes = noise(1, 5 << 20);
    work.large("w.bin", &bytes);
    work.publish();
    let (at_hub, at_kaggle) = (format!("endpoint={}", hub.url("")), format!("endpoint={}", kaggle.url("")));
    for (kind, uri, options, faults, asked) in [
        ("huggingface", "acme/tiny".to_owned(), vec![at_hub.as_str()], &hub, &["/revision/", "/tree/", "/cdn/"][..]),
        (
            "kaggle",
            "acme/tables".to_owned(),
            vec![&at_kaggle, "type=dataset"],
            &kaggle,
            &["/datasets/view/", "/datasets/download/", "/storage/"],
        ),
        ("git", git.url("/org/model.git"), vec![], &git, &["git-upload-pack", "objects/batch", "objects/storage"]),
    ] {
        create(&daemon, kind, kind, &uri, &options).ok();
        let at = daemon.attach(kind, kind);
        assert_digests(&at);
        assert!(kind != "git" || fs::read(at.join("w.bin")).unwrap() == bytes);
        let heads = faults.heads();
        for words in asked {
            assert!(heads.iter().any(|head| head.contains(words)), "{words}: {heads:?}");
        }
        for head in heads {
            let head = head.to_ascii_lowercase();
            assert!(head.contains("\r\nvia: ") && head.contains("tinyproxy"), "{kind} went around the proxy: {head}");
            assert!(!head.contains("proxy-auth") && !head.contains(&ENCODED.to_ascii_lowercase()), "{head}");
        }
    }
    assert_kept_nowhere(&daemon, &[LOGIN.1, ENCODED]);
}
