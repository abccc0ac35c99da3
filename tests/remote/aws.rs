//! What is AWS's own: the hosts of its buckets, signatures that are verified as it does, and versions. moto is AWS behind the one way out.

use std::fs;
use std::time::Duration;

use serde_json::json;

use super::buckets::{ENDURING, HASTY, assert_kept_nowhere, create, python, reason, start, tree};
use super::s3::{ANY_ID, ANY_SECRET, KEY_ID, Moto, SECRET, endpoint};
use crate::support::corpus::random_file;
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree};
use crate::support::place::Place;
use crate::support::ran::{shell, wait_until};
use crate::support::relay::Relay;
use crate::support::webserver::{certificates, nginx_tls_before};

/// Makes a user who may do everything, prints the keys, and from then on lets nobody in without.
const MAKE_USER: &str = r#"
import json, sys, urllib.request
import boto3
iam = boto3.client('iam', endpoint_url=sys.argv[1], region_name='us-east-1', aws_access_key_id='x', aws_secret_access_key='y')
iam.create_user(UserName='reader')
everything = {'Version': '2012-10-17', 'Statement': [{'Effect': 'Allow', 'Action': '*', 'Resource': '*'}]}
iam.put_user_policy(UserName='reader', PolicyName='all', PolicyDocument=json.dumps(everything))
key = iam.create_access_key(UserName='reader')['AccessKey']
urllib.request.urlopen(urllib.request.Request(sys.argv[1] + '/moto-api/reset-auth', b'0', {'Content-Type': 'text/plain'})).read()
print(json.dumps([key['AccessKeyId'], key['SecretAccessKey']]))
"#;

/// The hosts of AWS in two regions.
const HOSTS: &str =
    "*.s3.eu-west-3.amazonaws.com,s3.eu-west-3.amazonaws.com,*.s3.us-east-1.amazonaws.com,s3.us-east-1.amazonaws.com";

#[test]
fn a_bucket_is_asked_for_at_its_own_host_and_signed_for_its_region() {
    let place = Place::new();
    let tree_of_all = place.dir("tree");
    tree(&tree_of_all);
    let moto = Moto::start();
    let trees = json!([["ckpt", "p/", tree_of_all], ["dotted.bucket", "p/", tree_of_all]]);
    moto.fill(&json!({"buckets": ["ckpt", "dotted.bucket"], "trees": trees}));
    let aws = Faults::before(moto.0.port);
    let made = certificates(&place, &[HOSTS]);
    let tls = nginx_tls_before(&place, aws.port(), &made.join(format!("{HOSTS}.pem")));
    let (id, secret) = (format!("@key_id={KEY_ID}"), format!("@secret={SECRET}"));
    for (name, uri, region, environment, host, path) in [
        ("given", "s3://ckpt/p/", "region=eu-west-3", "", "ckpt.s3.eu-west-3.amazonaws.com", "/p/"),
        ("none", "s3://ckpt/p/", "", "", "ckpt.s3.us-east-1.amazonaws.com", "/p/"),
        ("host", "s3://ckpt/p/", "", "eu-west-3", "ckpt.s3.eu-west-3.amazonaws.com", "/p/"),
        ("wins", "s3://ckpt/p/", "region=us-east-1", "eu-west-3", "ckpt.s3.us-east-1.amazonaws.com", "/p/"),
        ("path", "s3://dotted.bucket/p/", "region=eu-west-3", "", "s3.eu-west-3.amazonaws.com", "/dotted.bucket/p/"),
    ] {
        let proxy = Relay::proxy(tls.port);
        let daemon = Daemon::start_with(&[
            LOOPBACK,
            ("SSL_CERT_FILE", &made.join("ca.pem").display().to_string()),
            ("HTTPS_PROXY", &format!("http://127.0.0.1:{}", proxy.port())),
            ("AWS_REGION", environment),
        ]);
        let before = aws.heads().len();
        let more = [region, &id, &secret].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>();
        create(&daemon, "aws", name, uri, &more).ok();
        assert_mounted(&tree_of_all, &daemon.attach(name, name));
        let asked = proxy.asked();
        assert!(!asked.is_empty(), "{name}");
        assert!(asked.iter().all(|head| head.starts_with(&format!("CONNECT {host}:443 "))), "{name}: {asked:?}");
        let region = host.trim_end_matches(".amazonaws.com").rsplit('.').next().unwrap();
        let scope = format!("/{region}/s3/aws4_request");
        let heads = aws.heads().split_off(before);
        assert!(heads.iter().any(|head| head.starts_with(&format!("GET {path}model/weights.bin "))), "{heads:?}");
        for head in heads {
            assert!(head.contains(&format!("Host: {host}\r\n")) && head.contains(&scope), "{name}: {head}");
        }
        assert_kept_nowhere(&daemon, &[SECRET, KEY_ID]);
    }
}

#[test]
fn a_region_that_the_store_names_is_where_the_bucket_is_asked_for() {
    let place = Place::new();
    let moto = Moto::start();
    moto.fill(&json!({"buckets": ["ckpt"], "put": [["ckpt", "p/a b", "x"], ["ckpt", "p/c", "y"]]}));
    let aws = Faults::before(moto.0.port);
    let made = certificates(&place, &[HOSTS]);
    let tls = nginx_tls_before(&place, aws.port(), &made.join(format!("{HOSTS}.pem")));
    let proxy = Relay::proxy(tls.port);
    let daemon = Daemon::start_with(&[
        LOOPBACK,
        ("SSL_CERT_FILE", &made.join("ca.pem").display().to_string()),
        ("HTTPS_PROXY", &format!("http://127.0.0.1:{}", proxy.port())),
    ]);
    aws.spoil("Host: ckpt.s3.us-east-1.", Fault::Status(301, "x-amz-bucket-region: eu-west-3"), 9);
    let (id, secret) = (format!("@key_id={KEY_ID}"), format!("@secret={SECRET}"));
    create(&daemon, "aws", "moved", "s3://ckpt/p/", &[&id, &secret]).ok();
    assert_eq!(fs::read(daemon.attach("job", "moved").join("a b")).unwrap(), b"x");
    let heads = aws.heads();
    let there = |head: &&String| {
        head.contains("Host: ckpt.s3.eu-west-3.amazonaws.com\r\n") && head.contains("/eu-west-3/s3/aws4_request")
    };
    assert_eq!(heads.iter().filter(there).count(), heads.len() - 1, "the first learns it: {heads:?}");
    // A region that was asked for is not mended.
    let given = create(&daemon, "aws", "given", "s3://ckpt/p/", &["region=us-east-1", &id, &secret]);
    given.refused(&[2], &["another region", "`region`"]);
    assert_eq!(reason(&daemon, "given"), "WRONG_REGION");
}

#[test]
fn signatures_are_verified_of_ranges_too() {
    let place = Place::new();
    let tree_of_all = place.dir("tree");
    tree(&tree_of_all);
    let moto = Moto::start();
    moto.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "some/pre fix/", tree_of_all]]}));
    let keys = python(MAKE_USER, &[&moto.0.url("")]).json();
    let (id, secret) = (keys[0].as_str().unwrap(), keys[1].as_str().unwrap());
    let faults = Faults::before(moto.0.port);
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let uri = "s3://ckpt/some/pre fix/";
    let (given, other) = ([format!("@key_id={id}"), format!("@secret={secret}")], "@secret=an0ther-secret");
    create(&daemon, "aws", "right", uri, &[&own, &given[0], &given[1]]).ok();
    assert_mounted(&tree_of_all, &daemon.attach("right", "right"));
    let ranges = faults.heads().into_iter().filter(|head| head.contains("range: bytes=") && !head.contains("=0-0\r\n"));
    assert!(ranges.count() >= 2, "of the large file");
    for (name, more, word) in [
        ("wrong", &[own.as_str(), &given[0], other][..], "CREDENTIALS_REFUSED"),
        ("unknown", &[&own, "@key_id=AKIANOBODYNOBODYNOBO", &given[1]], "CREDENTIALS_REFUSED"),
    ] {
        create(&daemon, "aws", name, uri, more).refused(&[2], &[]);
        assert_eq!(reason(&daemon, name), word);
    }
    assert_kept_nowhere(&daemon, &[secret, "an0ther"]);
}

#[test]
fn keys_that_are_no_paths_are_fetched_with_signatures_too() {
    let place = Place::new();
    let (part, expected) = (place.dir("part"), place.dir("expected"));
    fs::write(part.join("a b"), "small").unwrap();
    random_file(&part.join("few.bin"), 3, 5 << 20);
    let moto = Moto::start_exact();
    // With and without what a URL would leave out, and each with files of its own.
    let odd = ["p/empty//in/", "p/dot/./in/", "p/both/.//./in/", "p//first/in/", "p/./second/in/", "p/plain/in/"];
    let trees: Vec<_> = odd.iter().map(|prefix| json!(["ckpt", prefix, part])).collect();
    moto.fill(&json!({"buckets": ["ckpt"], "trees": trees}));
    for name in ["empty", "dot", "both", "first", "second", "plain"] {
        let at = place.dir(&format!("expected/{name}/in"));
        shell("cp \"$1\"/* \"$2\"", &[&part, &at]).ok();
    }
    let keys = python(MAKE_USER, &[&moto.0.url("")]).json();
    let given = [("key_id", 0), ("secret", 1)].map(|(name, at)| format!("@{name}={}", keys[at].as_str().unwrap()));
    let faults = Faults::before(moto.0.port);
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    create(&daemon, "aws", "odd", "s3://ckpt/p/", &[&own, &given[0], &given[1]]).ok();
    assert_mounted(&expected, &daemon.attach("odd", "odd"));
    create(&daemon, "aws", "alone", "s3://ckpt/p/dot/./in/few.bin", &[&own, &given[0], &given[1]]).ok();
    assert_same_file(&part.join("few.bin"), &daemon.attach("alone", "alone").join("few.bin"));
    create(&daemon, "aws", "wrong", "s3://ckpt/p/dot/./in/few.bin", &[&own, &given[0], "@secret=an0ther"])
        .refused(&[2], &[]);
    assert_eq!(reason(&daemon, "wrong"), "CREDENTIALS_REFUSED");
}

#[test]
fn what_a_bucket_of_versions_lists_is_what_comes_of_it() {
    let place = Place::new();
    let (one, two) = (place.dir("one"), place.dir("two"));
    for (folder, number) in [(&one, 1), (&two, 2)] {
        // The smallest is asked for when it is listed, to learn what an ETag is.
        fs::write(folder.join("least"), "x").unwrap();
        fs::write(folder.join("small"), format!("small {number}")).unwrap();
        fs::write(folder.join("a b+c%20#é"), format!("odd {number}")).unwrap();
        random_file(&folder.join("few.bin"), number, 3 << 20);
        random_file(&folder.join("large.bin"), number, 5 << 20);
    }
    let moto = Moto::start();
    let fill = |folder| moto.fill(&json!({"trees": [["versions", "p/", folder]]}));
    moto.fill(&json!({"buckets": ["versions"], "versioned": ["versions"]}));
    fill(&one);
    let faults = Faults::before(moto.0.port);
    let daemon = Daemon::start_with(ENDURING);
    let own = endpoint(&faults);
    let given = [own.as_str(), ANY_ID, ANY_SECRET];
    // What is looked at to list them passes; the files themselves have to wait.
    let waiting = [
        "GET /versions/p/small",
        "GET /versions/p/a%20b",
        "GET /versions/p/few.bin",
        "GET /versions/p/large.bin?versionId=",
    ];
    for words in waiting {
        faults.spoil(words, Fault::Status(503, "Retry-After: 2"), 99);
    }
    start(&daemon, "aws", "k", "s3://versions/p/", &given);
    wait_until("all are asked for", Duration::from_secs(60), || {
        let heads = faults.heads();
        waiting.iter().all(|words| heads.iter().any(|head| head.contains(words)))
    });
    fill(&two);
    faults.spare();
    daemon.wait_state("k", "ready", Duration::from_secs(180));
    assert_mounted(&one, &daemon.attach("job", "k"));
    create(&daemon, "aws", "now", "s3://versions/p/", &given).ok();
    assert_same_tree(&two, &daemon.attach("now", "now"));
}
