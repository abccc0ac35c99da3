//! Azure Blob Storage against azurite, which verifies keys and signatures.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::archives::two_archives;
use super::buckets::{
    ENDURING, HASTY, assert_comes_back_later, assert_goes_on_after_a_kill, assert_kept_nowhere, create, python, reason,
    replace_midway, spoil_files, start, tree,
};
use super::faltering;
use crate::support::corpus::random_file;
use crate::support::daemon::{Daemon, LOOPBACK};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree, walk};
use crate::support::place::Place;
use crate::support::ran::wait_until;
use crate::support::relay::Relay;
use crate::support::server::{Server, free_port, tool};
use crate::support::webserver::{certificates, nginx_tls_before};

const ACCOUNT: &str = "ckptaccount";
const KEY: &str = "c2VjcmV0LWtleS1vZi10aGUtdGVzdHMtMDEyMzQ1Njc4OQ==";

/// Fills containers as the plan says: `containers` [name, public], `put` [container, name, text], `trees` [container, prefix, folder]. Prints
/// three shared access signatures of the container `ckpt`: one that holds, one that has expired, one that holds for `short` seconds.
const FILL: &str = r#"
import base64, datetime, json, os, sys
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas
endpoint, key, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
account = endpoint.rsplit('/', 1)[1]
service = BlobServiceClient(endpoint, credential={'account_name': account, 'account_key': key}, api_version='2021-12-02')
for name, public in plan.get('containers', []):
    service.create_container(name, public_access='container' if public else None)
for container, name, text in plan.get('put', []):
    service.get_blob_client(container, name).upload_blob(text.encode(), overwrite=True)
for container, prefix, folder in plan.get('trees', []):
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            with open(path, 'rb') as data:
                service.get_blob_client(container, prefix + os.path.relpath(path, folder)).upload_blob(data, overwrite=True)
now = datetime.datetime.now(datetime.timezone.utc)
for seconds in (3600, -3600, plan.get('short', 0)):
    print(generate_container_sas(account, 'ckpt', account_key=key, permission=ContainerSasPermissions(read=True, list=True),
                                 start=now - datetime.timedelta(days=1), expiry=now + datetime.timedelta(seconds=seconds)))
"#;

/// Multiplies the one blob that azurite has saved in its database. Every twentieth has bytes of its own; the others are empty, since
/// azurite takes 7 ms of its one thread for each that is read.
const SEED: &str = r#"
import copy, hashlib, json, sys
folder, count = sys.argv[1], int(sys.argv[2])
blobs = json.load(open(f'{folder}/__azurite_db_blob__.json'))
extents = json.load(open(f'{folder}/__azurite_db_blob_extent__.json'))
table = next(c for c in blobs['collections'] if c['name'] == '$BLOBS_COLLECTION$')
extent = extents['collections'][0]['data'][0]
first, rows, at = table['data'][0], [], 0
with open(f'{folder}/__blobstorage__/{extent["path"]}', 'wb') as out:
    for number in range(count):
        blob, body = copy.deepcopy(first), b'' if number % 20 else f'{number}\n'.encode()
        blob['name'] = f'many/{number // 1000:02}/{number:05} %+#\u00fc'
        blob['properties'].update(etag='"0x%015X"' % (0x200000000000000 + number), contentLength=len(body))
        blob['properties']['contentMD5']['data'] = list(hashlib.md5(body).digest())
        blob['persistency'] = {'id': extent['id'], 'offset': at, 'count': len(body)}
        blob['$loki'] = number + 1
        out.write(body)
        at += len(body)
        rows.append(blob)
extent['size'] = at
table['data'], table['maxId'] = rows, count
for index in table['binaryIndices'].values():
    index['values'] = list(range(count))
json.dump(blobs, open(f'{folder}/__azurite_db_blob__.json', 'w'))
json.dump(extents, open(f'{folder}/__azurite_db_blob_extent__.json', 'w'))
"#;

struct Azurite {
    server: Server,
    place: Place,
}

impl Azurite {
    fn start() -> Self {
        Self::start_at(Place::new())
    }

    /// With what is saved at `place`.
    fn start_at(place: Place) -> Self {
        let port = free_port();
        let mut command = Command::new("node");
        command
            .arg(tool("azurite/node_modules/azurite/dist/src/blob/main.js"))
            .args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string(), "--location"])
            .arg(place.path())
            .args(["--silent", "--disableTelemetry", "--skipApiVersionCheck"])
            .env("AZURITE_ACCOUNTS", format!("{ACCOUNT}:{KEY}"));
        Self { server: Server::start(&mut command, port), place }
    }

    /// The same with `count` blobs below `many/` of the container `open`, which anybody may read.
    fn start_with_many(count: usize) -> Self {
        let azurite = Self::start();
        azurite.fill(&json!({"containers": [["open", true]], "put": [["open", "first", "x"]]}));
        let saved = |name: &str, word: &str| {
            std::fs::read_to_string(azurite.place.join(name)).is_ok_and(|text| text.contains(word))
        };
        wait_until("azurite has saved what it has", Duration::from_secs(180), || {
            saved("__azurite_db_blob__.json", "\"name\":\"first\"")
                && saved("__azurite_db_blob_extent__.json", "\"locationId\"")
        });
        let Self { server, place } = azurite;
        drop(server);
        python(SEED, &[place.path().to_str().unwrap(), &count.to_string()]);
        Self::start_at(place)
    }

    /// Fills containers; a signature that holds and one that has expired.
    fn fill(&self, plan: &serde_json::Value) -> (String, String) {
        let endpoint = self.server.url(&format!("/{ACCOUNT}"));
        let ran = python(FILL, &[&endpoint, KEY, &plan.to_string()]);
        let mut lines = ran.stdout.lines().map(str::to_owned);
        (lines.next().unwrap(), lines.next().unwrap())
    }
}

fn endpoint(faults: &Faults) -> String {
    format!("endpoint={}", faults.url(&format!("/{ACCOUNT}")))
}

fn uri(path: &str) -> String {
    format!("https://{ACCOUNT}.blob.core.windows.net/{path}")
}

#[test]
fn a_prefix_comes_whole_through_every_fault() {
    let place = Place::new();
    tree(&place.dir("tree"));
    let folder = place.join("tree");
    let azurite = Azurite::start();
    let (good, expired) =
        azurite.fill(&json!({"containers": [["ckpt", false]], "trees": [["ckpt", "some/pre fix/", folder]]}));
    let faults = Faults::before(azurite.server.port);
    faults.spoil("comp=list", Fault::Status(500, ""), 1);
    faults.spoil("comp=list", Fault::Status(503, "Retry-After: 0"), 1);
    spoil_files(&faults, "/");
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let key = format!("@account_key={KEY}");
    create(&daemon, "azure", "slash", &uri("ckpt/some/pre%20fix/"), &[&own, &key]).ok();
    assert_same_tree(&folder, &daemon.attach("slash", "slash"));
    assert_eq!(faults.faults_left(), 0);
    let heads = faults.heads();
    assert!(heads.iter().filter(|head| head.contains(".json")).all(|head| head.contains("if-match: \"")));

    assert_comes_back_later(&faults, &format!("GET /{ACCOUNT}/ckpt/some/pre%20fix/deep/1/2/3/7.json"), || {
        create(&daemon, "azure", "later", &uri("ckpt/some/pre%20fix/deep/1/2/3/7.json"), &[&own, &key])
    });

    // A signature as a credential, and in the address.
    create(&daemon, "azure", "sas", &uri("ckpt/some/pre fix"), &[&own, &format!("@sas={good}")]).ok();
    assert_same_tree(&folder, &daemon.attach("sas", "sas"));
    let address = uri(&format!("ckpt/some/pre%20fix/model/few.bin?{good}"));
    create(&daemon, "azure", "address", &address, &[&own]).ok();
    assert_same_file(&folder.join("model/few.bin"), &daemon.attach("address", "address").join("few.bin"));
    assert_eq!(daemon.json(&["get", "address"])["source"]["uri"], uri("ckpt/some/pre%20fix/model/few.bin"));

    for (name, more, word) in [
        ("nobody", &[own.as_str()][..], "CREDENTIALS_REQUIRED"),
        ("late", &[&own, &format!("@sas={expired}")], "CREDENTIALS_EXPIRED"),
        // azurite calls a wrong key `AuthorizationFailure`, where Azure says `AuthenticationFailed`.
        ("wrong", &[&own, "@account_key=d3JvbmcgIGtleQ=="], "ACCESS_REFUSED"),
    ] {
        create(&daemon, "azure", name, &uri("ckpt/some/"), more).refused(&[2], &[]);
        assert_eq!(reason(&daemon, name), word);
    }
    // What cannot be is refused before there is a record.
    create(&daemon, "azure", "junk", &uri("ckpt/"), &[&own, "@account_key=?"]).refused(&[2], &["account key"]);
    let signature = good.split("sig=").nth(1).unwrap().split('&').next().unwrap();
    assert_kept_nowhere(&daemon, &[KEY, signature, "d3JvbmcgIGtleQ"]);
}

#[test]
fn keys_are_entries_or_are_named_and_digests_are_verified() {
    let azurite = Azurite::start();
    let mut put: Vec<[&str; 3]> = vec![
        ["plain", "a//b", "1"],
        ["plain", "d", "3"],
        ["plain", " é&<%20>+#", "5"],
        ["clash", "weights", "1"],
        ["clash", "weights/part1", "2"],
        ["twice", "a/b", "1"],
        ["twice", "a//b", "2"],
        ["many", "model.bin", "exactly this"],
        ["many", "model.bin.old", "not this"],
        ["many", "tiny", "some bytes"],
    ];
    let numbered: Vec<String> = (0..1100).map(|number| format!("pages/{number}")).collect();
    put.extend(numbered.iter().map(|name| ["many", name.as_str(), "x"]));
    let containers: Vec<_> = ["plain", "clash", "twice", "many", "nothing"].map(|name| json!([name, true])).into();
    azurite.fill(&json!({"containers": containers, "put": put}));
    let faults = Faults::before(azurite.server.port);
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let names = |name: &str, path: &str| {
        create(&daemon, "azure", name, &uri(path), &[&own]).ok();
        let at = daemon.attach(name, name);
        walk(&at).iter().map(|path| path.strip_prefix(&at).unwrap().display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names("plain", "plain"), [" é&<%20>+#", "a", "a/b", "d"]);
    assert_eq!(names("exact", "many/model.bin"), ["model.bin"]);
    assert_eq!(names("pages", "many/pages").len(), 1100);
    faults.spoil("/many/tiny", Fault::Damage(3), 9);
    for (name, path, word, exit, words) in [
        ("clash", "clash/", "BAD_KEYS", 2, &["`weights/part1`", "`weights`"][..]),
        ("twice", "twice", "BAD_KEYS", 2, &["`a//b`", "`a/b`"]),
        ("nothing", "nothing", "NO_SUCH_OBJECT", 3, &["nothing is there"]),
        ("neither", "many/mod", "NO_SUCH_OBJECT", 3, &["many/mod"]),
        ("damaged", "many/tiny", "DIGEST_MISMATCH", 6, &["tiny", "MD5"]),
    ] {
        create(&daemon, "azure", name, &uri(path), &[&own]).refused(&[exit], words);
        assert_eq!(reason(&daemon, name), word);
    }
    let key = format!("@account_key={KEY}");
    create(&daemon, "azure", "nowhere", &uri("no-such-container/x"), &[&own, &key])
        .refused(&[3], &["no such container"]);
}

#[test]
fn what_is_killed_is_resumed_and_what_is_replaced_is_not_mixed() {
    let place = Place::new();
    let (first, second) = (place.join("one/big.bin"), place.join("two/big.bin"));
    random_file(&first, 1, 48 << 20);
    random_file(&second, 2, 48 << 20);
    let azurite = Azurite::start();
    let put = |folder: &std::path::Path| json!([["open", "", folder.parent().unwrap()]]);
    azurite.fill(&json!({"containers": [["open", true]], "trees": put(&first)}));
    let faults = Faults::before(azurite.server.port);
    let mut daemon = Daemon::start_with(ENDURING);
    let tree = first.parent().unwrap();
    assert_goes_on_after_a_kill(&mut daemon, &faults, ("azure", &uri("open/")), &[&endpoint(&faults)], tree);

    let begin = || start(&daemon, "azure", "replaced", &uri("open/big.bin"), &[&endpoint(&faults)]);
    replace_midway(&faults, begin, || _ = azurite.fill(&json!({"trees": put(&second)})));
    daemon.wait_state("replaced", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "replaced"), "SOURCE_CHANGED");
    daemon.ctl(&["retry", "replaced", "--wait"]).ok();
    assert_same_file(&second, &daemon.attach("replaced", "replaced").join("big.bin"));
}

#[test]
fn a_signature_that_expires_in_the_middle_is_given_anew() {
    let place = Place::new();
    let file = place.join("tree/big.bin");
    random_file(&file, 5, 40 << 20);
    let azurite = Azurite::start();
    let trees = json!([["ckpt", "", file.parent().unwrap()]]);
    azurite.fill(&json!({"containers": [["ckpt", false]], "trees": trees}));
    let faults = Faults::before(azurite.server.port);
    let daemon = Daemon::start_with(ENDURING);
    let signatures = |short: u32| {
        let endpoint = azurite.server.url(&format!("/{ACCOUNT}"));
        let ran = python(FILL, &[&endpoint, KEY, &json!({"short": short}).to_string()]);
        ran.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    // Both ranges break off with some of them here, and what is asked for then is asked for when the signature has expired.
    for (range, rest) in [("bytes=0-33554431", "bytes=8388608-"), ("bytes=33554432-", "bytes=37748736-")] {
        faults.spoil(range, Fault::Truncate(if rest == "bytes=8388608-" { 10 << 20 } else { 5 << 20 }), 1);
        faults.spoil(rest, Fault::Status(503, "Retry-After: 12"), 1);
    }
    let short = signatures(10).remove(2);
    start(&daemon, "azure", "k", &uri("ckpt/big.bin"), &[&endpoint(&faults), &format!("@sas={short}")]);
    daemon.wait_state("k", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "k"), "CREDENTIALS_EXPIRED");
    let before = faults.body_bytes();
    assert!(before > 12 << 20, "{before} bytes came before it expired");
    let fresh = signatures(0).remove(0);
    daemon.ctl(&["retry", "k", "--credential", &format!("sas={fresh}"), "--wait"]).ok();
    assert_mounted(file.parent().unwrap(), &daemon.attach("job", "k"));
    let again = faults.body_bytes() - before;
    assert!(again <= 30 << 20, "{again} bytes were fetched again, of which 12 MiB were here");
    let secret = |sas: &str| sas.split("sig=").nth(1).unwrap().split('&').next().unwrap().to_owned();
    assert_kept_nowhere(&daemon, &[&secret(&short), &secret(&fresh)]);
}

#[test]
fn jobs_that_read_a_container_lazily_see_nothing_of_a_network_that_falters() {
    let place = Place::new();
    let tree = place.dir("tree");
    faltering::plain_tree(&tree);
    let azurite = Azurite::start();
    azurite.fill(&json!({"containers": [["open", true]], "trees": [["open", "lazy/", tree]]}));
    let network = faltering::before(azurite.server.port);
    let daemon = Daemon::start_with(HASTY);
    let endpoint = format!("endpoint={}", network.url(&format!("/{ACCOUNT}")));
    start(&daemon, "azure", "k", &uri("open/lazy/"), &[&endpoint]);
    faltering::assert_read_lazily(&daemon, &network, "k", &tree);
}

#[test]
fn twenty_thousand_blobs_are_listed_and_come() {
    let azurite = Azurite::start_with_many(20_000);
    let faults = Faults::before(azurite.server.port);
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let began = Instant::now();
    create(&daemon, "azure", "many", &uri("open/many"), &[&endpoint(&faults)]).ok();
    eprintln!("20,000 blobs in {:?}", began.elapsed());
    assert_eq!(daemon.json(&["get", "many"])["files"], 20_000);
    let at = daemon.attach("job", "many");
    for number in 0..20_000 {
        let bytes = std::fs::read(at.join(format!("{:02}/{number:05} %+#ü", number / 1000))).unwrap();
        assert_eq!(bytes, if number % 20 == 0 { format!("{number}\n").into_bytes() } else { vec![] });
    }
    let heads = faults.heads();
    let pages = heads.iter().filter(|head| head.contains("comp=list")).count();
    assert!((20..40).contains(&pages), "{pages} pages");
}

#[test]
fn a_blob_that_is_an_archive_is_extracted() {
    let place = Place::new();
    let (tree, folder) = two_archives(&place);
    let azurite = Azurite::start();
    azurite.fill(&json!({"containers": [["open", true]], "trees": [["open", "some/", folder]]}));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let endpoint = format!("endpoint={}", azurite.server.url(&format!("/{ACCOUNT}")));
    for (name, blob) in [("tar", "a.tar.gz"), ("zip", "b.zip")] {
        create(&daemon, "azure", name, &uri(&format!("open/some/{blob}")), &[&endpoint]).ok();
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
}

#[test]
fn credentials_of_the_environment_go_to_their_own_account_at_azure_alone() {
    let place = Place::new();
    let azurite = Azurite::start();
    let (sas, _) = azurite.fill(&json!({"containers": [["ckpt", false]], "put": [["ckpt", "a", "x"]]}));
    // Azure itself, as far as the daemon can tell, behind the one way out of here.
    let wildcard = "*.blob.core.windows.net";
    let made = certificates(&place, &[wildcard]);
    let (azure, foreign) = (Faults::before(azurite.server.port), Faults::before(azurite.server.port));
    let tls = nginx_tls_before(&place, azure.port(), &made.join(format!("{wildcard}.pem")));
    let proxy = Relay::proxy(tls.port);
    let (address, authority) = (proxy_url(&proxy), made.join("ca.pem").display().to_string());
    let signature = sas.split("sig=").nth(1).unwrap().split('&').next().unwrap();
    for (number, (name, secret)) in
        [("AZURE_STORAGE_KEY", KEY), ("AZURE_STORAGE_SAS_TOKEN", sas.as_str())].into_iter().enumerate()
    {
        let environment: [(&'static str, &str); 6] = [
            LOOPBACK,
            ("CKPTD_SOURCES__ATTEMPTS", "1"),
            ("SSL_CERT_FILE", &authority),
            ("HTTPS_PROXY", &address),
            ("AZURE_STORAGE_ACCOUNT", ACCOUNT),
            (name, secret),
        ];
        let daemon = Daemon::start_with(&environment);
        let asked = azure.heads().len();
        create(&daemon, "azure", "own", &uri("ckpt/"), &[]).ok();
        assert_eq!(std::fs::read(daemon.attach(&format!("job-{number}"), "own").join("a")).unwrap(), b"x");
        let heads = azure.heads().split_off(asked);
        assert!(heads.iter().all(|head| head.contains("SharedKey ") || head.contains("sig=")), "{heads:?}");

        let asked = azure.heads().len();
        let account = format!("account={ACCOUNT}");
        for (name, uri, more) in [
            ("endpoint", uri("ckpt/"), vec![endpoint(&foreign)]),
            (
                "endpoint-of-account",
                "https://other.blob.core.windows.net/ckpt/".to_owned(),
                vec![account.clone(), endpoint(&foreign)],
            ),
            ("other-account", "https://other.blob.core.windows.net/ckpt/".to_owned(), vec![]),
            ("other-host", "https://other.blob.core.windows.net/ckpt/".to_owned(), vec![account]),
        ] {
            let more: Vec<_> = more.iter().map(String::as_str).collect();
            create(&daemon, "azure", name, &uri, &more).refused(&[2, 3, 7], &[]);
        }
        let heads = [foreign.heads(), azure.heads().split_off(asked)].concat();
        assert!(heads.len() >= 4, "{heads:?}");
        for head in heads {
            assert!(!head.contains("SharedKey") && !head.contains("sig="), "{head}");
        }
        assert_kept_nowhere(&daemon, &[KEY, signature]);
    }
}

fn proxy_url(proxy: &Relay) -> String {
    format!("http://127.0.0.1:{}", proxy.port())
}
