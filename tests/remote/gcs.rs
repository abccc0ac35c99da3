//! Google Cloud Storage against fake-gcs-server, which takes any credentials: what is sent as such is verified here.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::archives::{packed, two_archives};
use super::buckets::{
    ENDURING, HASTY, assert_comes_back_later, assert_goes_on_after_a_kill, assert_kept_nowhere, create, python, reason,
    replace_midway, spoil_files, start, tree, wait_bytes,
};
use super::faltering;
use crate::support::corpus::random_file;
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree, disk_bytes, walk};
use crate::support::place::Place;
use crate::support::ran::{shell, wait_until};
use crate::support::relay::Relay;
use crate::support::server::{Server, free_port, tool};
use crate::support::webserver::{certificates, nginx_tls_before};

/// Fills buckets as the plan says: `buckets`, `put` [bucket, name, text], `gzip` [bucket, name, text], `trees` [bucket, prefix, folder].
const FILL: &str = r#"
import gzip, json, os, sys, urllib.parse, urllib.request
base, plan = sys.argv[1], json.loads(sys.argv[2])
def post(path, body, kind='application/octet-stream'):
    urllib.request.urlopen(urllib.request.Request(base + path, body, {'Content-Type': kind})).read()
def put(bucket, name, body, more=''):
    post(f'/upload/storage/v1/b/{bucket}/o?uploadType=media&name={urllib.parse.quote(name, safe="")}{more}', body)
for name in plan.get('buckets', []):
    post('/storage/v1/b', json.dumps({'name': name}).encode(), 'application/json')
for bucket, name, text in plan.get('put', []):
    put(bucket, name, text.encode())
for bucket, name, text in plan.get('gzip', []):
    put(bucket, name, gzip.compress(text.encode(), mtime=0), '&contentEncoding=gzip')
for bucket, prefix, folder in plan.get('trees', []):
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            put(bucket, prefix + os.path.relpath(path, folder), open(path, 'rb').read())
"#;

/// Makes a key file of a service account.
const MAKE_ACCOUNT: &str = r#"
import json, sys
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import rsa
key = rsa.generate_private_key(65537, 2048)
pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()
json.dump({'type': 'service_account', 'client_email': 'robot@project.iam', 'private_key_id': 'k1', 'private_key': pem},
          open(sys.argv[1], 'w'))
"#;

/// Verifies a token with the key of that file, and prints its claims.
const VERIFY: &str = r#"
import base64, json, sys
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
key = serialization.load_pem_private_key(json.load(open(sys.argv[1]))['private_key'].encode(), None).public_key()
head, claims, signature = sys.argv[2].split('.')
plain = lambda text: base64.urlsafe_b64decode(text + '=' * (-len(text) % 4))
key.verify(plain(signature), f'{head}.{claims}'.encode(), padding.PKCS1v15(), hashes.SHA256())
print(json.dumps({**json.loads(plain(head)), **json.loads(plain(claims))}))
"#;

/// Writes objects below `many/` of the bucket `many` as fake-gcs-server keeps them on disk: told by HTTP, each would cost more than the one
/// before.
const SEED: &str = r#"
import base64, hashlib, json, os, sys
import google_crc32c
root, count = sys.argv[1], int(sys.argv[2])
os.makedirs(root)
open(f'{root}/many.bucketMetadata', 'w').write('{"DefaultEventBasedHold":false,"VersioningEnabled":false}')
for number in range(count):
    folder, body = f'{root}/many/many/{number // 1000}', f'{number}\n'.encode()
    os.makedirs(folder, exist_ok=True)
    path = f'{folder}/{number} %+#\u00fc'
    open(path, 'wb').write(body)
    md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
    crc = base64.b64encode(google_crc32c.Checksum(body).digest()).decode()
    time = '2026-01-01T00:00:00Z'
    os.setxattr(path, 'user.metadata', json.dumps({'Crc32c': crc, 'Md5Hash': md5, 'Etag': md5, 'Created': time, 'Updated': time,
                                                   'Generation': 1700000000000000 + number}).encode())
"#;

struct FakeGcs(Server);

impl FakeGcs {
    fn start() -> Self {
        Self::start_on(&["-backend", "memory"])
    }

    fn start_on(backend: &[&str]) -> Self {
        let port = free_port();
        let at = format!("127.0.0.1:{port}");
        let mut command = Command::new(tool("fake-gcs-server"));
        command.args(["-scheme", "http", "-host", "127.0.0.1", "-port", &port.to_string()]).args(backend).args([
            "-public-host",
            &at,
            "-external-url",
            &format!("http://{at}"),
        ]);
        Self(Server::start(&mut command, port))
    }

    fn fill(&self, plan: &serde_json::Value) {
        python(FILL, &[&self.0.url(""), &plan.to_string()]);
    }
}

fn endpoint(faults: &Faults) -> String {
    format!("endpoint={}", faults.url(""))
}

/// Its digests are of the whole tar, so that what takes them has to go on as well.
#[test]
fn a_tar_with_a_stated_checksum_goes_on_after_each_kill_and_is_held_to_it() {
    let place = Place::new();
    let (tree, folder) = (place.dir("on"), place.dir("packed"));
    random_file(&tree.join("a.bin"), 1, 80 << 20);
    (0..8).for_each(|number| random_file(&tree.join(format!("b{number}.bin")), 2 + number, 5 << 20));
    (0..500).for_each(|number| fs::write(tree.join(format!("c{number}")), format!("{number}")).unwrap());
    let tar = packed(&tree, "tar-pax");
    let server = FakeGcs::start();
    fs::write(folder.join("a.tar"), &*tar).unwrap();
    server.fill(&json!({"buckets": ["open"], "trees": [["open", "", folder]]}));
    let faults = Faults::before(server.0.port);
    let mut daemon = Daemon::start_with(HASTY);
    let endpoint = endpoint(&faults);
    for (name, is_sound) in [("sound", true), ("wrong", false)] {
        if !is_sound {
            // In the bytes of the member that is sealed before the last kill; the first request looks what there is.
            faults.spoil("alt=media", Fault::Damage(10 << 20), 2);
        }
        faults.slow_down(20 << 20);
        let create = ["create", name, "--type", "gcp", "--uri", "gs://open/a.tar", "--option", &endpoint];
        daemon.ctl(&[create.as_slice(), &["--owner", name]].concat()).ok();
        let mut before = 0;
        // Within the large member behind its mark, behind it, and at once again.
        for until in [72 << 20, 96 << 20, 0] {
            wait_bytes(&daemon, name, until);
            daemon.kill9();
            faults.wait_idle();
            before = faults.body_bytes();
            daemon.restart();
        }
        faults.slow_down(0);
        daemon.wait_state(name, if is_sound { "ready" } else { "failed" }, Duration::from_secs(180));
        let bytes = faults.body_bytes() - before;
        assert!(bytes < 41 << 20, "{bytes} bytes were fetched again, the large member among them");
        if !is_sound {
            assert_eq!(reason(&daemon, name), "DIGEST_MISMATCH");
            // Nothing that came with it is believed any more, nor kept.
            wait_until("what came is gone", Duration::from_secs(60), || {
                disk_bytes(&daemon.state().join("blobs")) < 130 << 20
            });
            daemon.ctl(&["retry", name, "--wait"]).ok();
        }
        let target = daemon.place().dir(name);
        daemon.ctl(&["attach", name, name, "--owner", name, "--at", target.to_str().unwrap()]).ok();
        assert_mounted(&tree, &target);
    }
}

#[test]
fn a_prefix_comes_whole_through_every_fault() {
    let place = Place::new();
    tree(&place.dir("tree"));
    let folder = place.join("tree");
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "some/pre fix/", folder]]}));
    let faults = Faults::before(server.0.port);
    faults.spoil("maxResults", Fault::Status(500, ""), 1);
    faults.spoil("maxResults", Fault::Status(503, "Retry-After: 0"), 1);
    spoil_files(&faults, "%2F");
    let daemon = Daemon::start_with(HASTY);
    for (name, uri) in [("slash", "gs://ckpt/some/pre fix/"), ("bare", "gs://ckpt/some/pre fix")] {
        create(&daemon, "gcp", name, uri, &[&endpoint(&faults)]).ok();
        assert_same_tree(&folder, &daemon.attach(name, name));
    }
    assert_eq!(faults.faults_left(), 0);
    let heads = faults.heads();
    assert!(heads.iter().filter(|head| head.contains("alt=media")).all(|head| head.contains("generation=")));
    assert!(heads.iter().all(|head| !head.contains("authorization")));
    assert_comes_back_later(&faults, "7.json?alt=media", || {
        create(&daemon, "gcp", "later", "gs://ckpt/some/pre fix/deep/1/2/3/7.json", &[&endpoint(&faults)])
    });
}

#[test]
fn keys_are_entries_or_are_named_and_digests_are_verified() {
    let place = Place::new();
    let server = FakeGcs::start();
    let mut put: Vec<[&str; 3]> = vec![
        ["plain", "a//b", "1"],
        ["plain", "a/./c", "2"],
        ["plain", "/d", "3"],
        ["plain", "é &<%20>+#", "5"],
        ["clash", "weights", "1"],
        ["clash", "weights/part1", "2"],
        ["climbs", "a/../b", "2"],
        ["many", "model.bin", "exactly this"],
        ["many", "model.bin.old", "not this"],
        ["many", "tiny", "some bytes"],
    ];
    let numbered: Vec<String> = (0..2100).map(|number| format!("pages/{number}")).collect();
    put.extend(numbered.iter().map(|name| ["many", name.as_str(), "x"]));
    let packed = [["packed", "page.html", "the same words, the same words, the same words"]];
    server.fill(
        &json!({"buckets": ["plain", "clash", "climbs", "many", "packed", "nothing"], "put": put, "gzip": packed}),
    );
    let faults = Faults::before(server.0.port);
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let names = |name: &str, uri: &str| {
        create(&daemon, "gcp", name, uri, &[&own]).ok();
        let at = daemon.attach(name, name);
        walk(&at).iter().map(|path| path.strip_prefix(&at).unwrap().display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names("plain", "gs://plain"), ["a", "a/b", "a/c", "d", "é &<%20>+#"]);
    assert_eq!(names("exact", "gs://many/model.bin"), ["model.bin"]);
    assert_eq!(names("pages", "gs://many/pages").len(), 2100);
    assert_eq!(names("packed", "gs://packed"), ["page.html"]);
    let page = daemon.attach("again", "packed").join("page.html");
    let unpacked = shell("gzip -dc <\"$1\"", &[&page]).ok();
    assert_eq!(unpacked.stdout, packed[0][2]);
    faults.spoil("/tiny?alt=media", Fault::Damage(3), 9);
    for (name, uri, word, exit, words) in [
        ("clash", "gs://clash/", "BAD_KEYS", 2, &["`weights/part1`", "`weights`"][..]),
        ("climbs", "gs://climbs", "BAD_KEYS", 2, &["`a/../b`"]),
        ("nothing", "gs://nothing", "NO_SUCH_OBJECT", 3, &["nothing is there"]),
        ("neither", "gs://many/mod", "NO_SUCH_OBJECT", 3, &["many/mod"]),
        ("nowhere", "gs://no-such-bucket/x", "NO_SUCH_BUCKET", 3, &["no such bucket"]),
        ("damaged", "gs://many/tiny", "DIGEST_MISMATCH", 6, &["tiny", "CRC-32C"]),
    ] {
        create(&daemon, "gcp", name, uri, &[&own]).refused(&[exit], words);
        assert_eq!(reason(&daemon, name), word);
    }
    for (status, word) in [(401, "CREDENTIALS_REFUSED"), (403, "ACCESS_REFUSED")] {
        faults.spoil("maxResults", Fault::Status(status, ""), 1);
        let name = format!("refused-{status}");
        create(&daemon, "gcp", &name, "gs://many/", &[&own, "@token=b3arer-t0ken"]).refused(&[2], &[]);
        assert_eq!(reason(&daemon, &name), word);
    }
    let account = place.join("account.json");
    python(MAKE_ACCOUNT, &[&account.display().to_string()]);
    let secret = format!("@service_account=@{}", account.display());
    create(&daemon, "gcp", "signed", "gs://many/model.bin", &[&own, &secret]).ok();
    let heads = faults.heads();
    assert!(heads.iter().any(|head| head.contains("authorization: Bearer b3arer-t0ken\r\n")));
    let token = heads.iter().find_map(|head| head.split("Bearer ey").nth(1)?.lines().next()).unwrap();
    let claims = python(VERIFY, &[&account.display().to_string(), &format!("ey{token}")]).json();
    assert_eq!((&claims["iss"], &claims["kid"]), (&json!("robot@project.iam"), &json!("k1")), "{claims}");
    assert_kept_nowhere(&daemon, &["b3arer-t0ken", &token[..40], &key_line(&account)]);
}

/// A line of the private key.
fn key_line(account: &Path) -> String {
    let file: serde_json::Value = serde_json::from_slice(&fs::read(account).unwrap()).unwrap();
    file["private_key"].as_str().unwrap().lines().nth(3).unwrap().to_owned()
}

#[test]
fn what_is_killed_is_resumed_and_what_is_replaced_is_not_mixed() {
    let place = Place::new();
    let (first, second) = (place.join("one/big.bin"), place.join("two/big.bin"));
    random_file(&first, 1, 48 << 20);
    random_file(&second, 2, 48 << 20);
    let server = FakeGcs::start();
    let put = |file: &Path| json!([["open", "", file.parent().unwrap()]]);
    server.fill(&json!({"buckets": ["open"], "trees": put(&first)}));
    let faults = Faults::before(server.0.port);
    let mut daemon = Daemon::start_with(ENDURING);
    let tree = first.parent().unwrap();
    assert_goes_on_after_a_kill(&mut daemon, &faults, ("gcp", "gs://open/"), &[&endpoint(&faults)], tree);

    let begin = || start(&daemon, "gcp", "replaced", "gs://open/big.bin", &[&endpoint(&faults)]);
    replace_midway(&faults, begin, || server.fill(&json!({"trees": put(&second)})));
    daemon.wait_state("replaced", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "replaced"), "SOURCE_CHANGED");
    daemon.ctl(&["retry", "replaced", "--wait"]).ok();
    assert_same_file(&second, &daemon.attach("replaced", "replaced").join("big.bin"));
}

#[test]
fn what_proves_who_asks_and_is_refused_in_the_middle_is_given_anew() {
    let place = Place::new();
    let file = place.join("tree/big.bin");
    random_file(&file, 5, 40 << 20);
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "", file.parent().unwrap()]]}));
    let accounts = ["first.json", "second.json"].map(|name| place.join(name).display().to_string());
    accounts.iter().for_each(|path| _ = python(MAKE_ACCOUNT, &[path]));
    for (kind, old, fresh) in [
        ("token", "token=expired-t0ken".to_owned(), "token=fresh-t0ken".to_owned()),
        ("account", format!("service_account=@{}", accounts[0]), format!("service_account=@{}", accounts[1])),
    ] {
        let faults = Faults::before(server.0.port);
        let daemon = Daemon::start_with(HASTY);
        // The first range ends early, and what is asked for then is refused.
        faults.spoil("bytes=0-33554431", Fault::Truncate(6 << 20), 1);
        faults.spoil("bytes=4194304-", Fault::Status(401, ""), 9);
        start(&daemon, "gcp", kind, "gs://ckpt/big.bin", &[&endpoint(&faults), &format!("@{old}")]);
        daemon.wait_state(kind, "failed", Duration::from_secs(180));
        assert_eq!(reason(&daemon, kind), "CREDENTIALS_REFUSED");
        let (before, asked) = (faults.body_bytes(), faults.heads().len());
        faults.spare();
        daemon.ctl(&["retry", kind, "--credential", &fresh, "--wait"]).ok();
        assert_mounted(file.parent().unwrap(), &daemon.attach(kind, kind));
        let again = faults.body_bytes() - before;
        assert!(again <= 37 << 20, "{again} bytes were fetched again, of which 4 MiB were here");
        let bearers = |heads: &[String]| {
            let found =
                heads.iter().map(|head| head.split("Bearer ").nth(1).unwrap().lines().next().unwrap().to_owned());
            found.collect::<BTreeSet<_>>()
        };
        let heads = faults.heads();
        let (then, now) = (bearers(&heads[..asked]), bearers(&heads[asked..]));
        assert!(!now.is_empty() && then.is_disjoint(&now), "{then:?} {now:?}");
        let shown: Vec<_> = then.iter().chain(&now).map(String::as_str).collect();
        assert_kept_nowhere(&daemon, &shown);
    }
}

#[test]
fn a_token_of_a_service_account_that_ends_in_the_middle_is_made_anew() {
    let place = Place::new();
    let file = place.join("tree/big.bin");
    random_file(&file, 5, 40 << 20);
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "", file.parent().unwrap()]]}));
    let account = place.join("account.json").display().to_string();
    python(MAKE_ACCOUNT, &[&account]);
    let faults = Faults::before(server.0.port);
    let daemon = Daemon::start_with(HASTY);
    // The first range ends early, and the token is a second older when what is left is asked for.
    faults.spoil("bytes=0-33554431", Fault::Truncate(6 << 20), 1);
    faults.spoil("bytes=4194304-", Fault::Status(503, "Retry-After: 2"), 1);
    faults.spoil("bytes=4194304-", Fault::Status(401, ""), 1);
    create(&daemon, "gcp", "k", "gs://ckpt/big.bin", &[&endpoint(&faults), &format!("@service_account=@{account}")])
        .ok();
    assert_eq!(faults.faults_left(), 0);
    assert_mounted(file.parent().unwrap(), &daemon.attach("job", "k"));
    let heads = faults.heads();
    let tokens: Vec<_> =
        heads.iter().map(|head| head.split("Bearer ").nth(1).unwrap().lines().next().unwrap()).collect();
    let refused = heads.iter().rposition(|head| head.contains("bytes=4194304-")).unwrap();
    assert!(!tokens[..refused].contains(&tokens[refused]), "it was shown again");
    assert_kept_nowhere(&daemon, &tokens);
}

#[test]
fn jobs_that_read_a_bucket_lazily_see_nothing_of_a_network_that_falters() {
    let place = Place::new();
    let tree = place.dir("tree");
    faltering::plain_tree(&tree);
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "lazy/", tree]]}));
    let network = faltering::before(server.0.port);
    let daemon = Daemon::start_with(HASTY);
    start(&daemon, "gcp", "k", "gs://ckpt/lazy/", &[&format!("endpoint={}", network.url(""))]);
    faltering::assert_read_lazily(&daemon, &network, "k", &tree);
}

#[test]
fn twenty_thousand_objects_are_listed_and_come() {
    let place = Place::new();
    let root = place.join("root").display().to_string();
    python(SEED, &[&root, "20000"]);
    let server = FakeGcs::start_on(&["-backend", "filesystem", "-filesystem-root", &root, "-log-level", "error"]);
    let faults = Faults::before(server.0.port);
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let began = Instant::now();
    create(&daemon, "gcp", "many", "gs://many/many", &[&endpoint(&faults)]).ok();
    eprintln!("20,000 objects in {:?}", began.elapsed());
    assert_eq!(daemon.json(&["get", "many"])["files"], 20_000);
    assert_same_tree(&place.join("root/many/many"), &daemon.attach("job", "many"));
    let heads = faults.heads();
    let pages = heads.iter().filter(|head| head.contains("maxResults")).count();
    assert!((20..40).contains(&pages), "{pages} pages");
}

#[test]
fn an_object_that_is_an_archive_is_extracted() {
    let place = Place::new();
    let (tree, folder) = two_archives(&place);
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "some/", folder]]}));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let endpoint = format!("endpoint={}", server.0.url(""));
    for (name, object) in [("tar", "a.tar.gz"), ("zip", "b.zip")] {
        create(&daemon, "gcp", name, &format!("gs://ckpt/some/{object}"), &[&endpoint]).ok();
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
}

#[test]
fn the_service_account_of_the_environment_is_shown_to_google_alone() {
    let place = Place::new();
    let server = FakeGcs::start();
    server.fill(&json!({"buckets": ["ckpt"], "put": [["ckpt", "a", "x"]]}));
    // Google itself, as far as the daemon can tell, behind the one way out of here.
    let name = "storage.googleapis.com";
    let made = certificates(&place, &[name]);
    let (google, foreign) = (Faults::before(server.0.port), Faults::before(server.0.port));
    let tls = nginx_tls_before(&place, google.port(), &made.join(format!("{name}.pem")));
    let proxy = Relay::proxy(tls.port);
    let account = place.join("account.json");
    python(MAKE_ACCOUNT, &[&account.display().to_string()]);
    let daemon = Daemon::start_with(&[
        LOOPBACK,
        ("SSL_CERT_FILE", &made.join("ca.pem").display().to_string()),
        ("HTTPS_PROXY", &format!("http://127.0.0.1:{}", proxy.port())),
        ("GOOGLE_APPLICATION_CREDENTIALS", &account.display().to_string()),
    ]);
    create(&daemon, "gcp", "own", "gs://ckpt/", &[]).ok();
    assert_eq!(fs::read(daemon.attach("job", "own").join("a")).unwrap(), b"x");
    let heads = google.heads();
    assert!(!heads.is_empty() && heads.iter().all(|head| head.contains("Bearer ey")), "{heads:?}");
    create(&daemon, "gcp", "foreign", "gs://ckpt/a", &[&endpoint(&foreign)]).ok();
    let heads = foreign.heads();
    assert!(!heads.is_empty() && heads.iter().all(|head| !head.contains("Bearer")), "{heads:?}");
    assert_kept_nowhere(&daemon, &[&key_line(&account)]);
}
