//! S3 against two servers: moto (its semantics: conditions, versions, odd keys, anybody may read), and rclone's, which verifies
//! signatures and ignores ranges.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::archives::two_archives;
use super::buckets::{
    ENDURING, HASTY, LARGE, assert_comes_back_later, assert_goes_on_after_a_kill, assert_kept_nowhere, create, python,
    reason, replace_midway, spoil_files, start, tree, wait_bytes,
};
use super::faltering;
use crate::support::corpus::random_file;
use crate::support::daemon::{Daemon, LOCALHOST, LOOPBACK, NO_PASSTHROUGH};
use crate::support::faults::{Fault, Faults};
use crate::support::files::{assert_mounted, assert_same_file, assert_same_tree, regular_files, walk};
use crate::support::place::Place;
use crate::support::ran::{run, wait_until};
use crate::support::server::{Server, free_port, tool};

pub(super) const KEY_ID: &str = "AKIATESTTESTTESTTEST";
pub(super) const SECRET: &str = "s3cr3t/of+the/te5ts";

/// Fills buckets as the plan says: `buckets`, `versioned`, `put` [bucket, key, text], `trees` [bucket, prefix, folder].
const FILL: &str = r#"
import base64, hashlib, json, os, sys, zlib
import boto3, google_crc32c
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
def crc64nvme(body):
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x9a6c9329ac4bc9b5 if crc & 1 else 0)
        table.append(crc)
    crc = 0xffffffffffffffff
    for byte in body:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return (crc ^ 0xffffffffffffffff).to_bytes(8, 'big')
CHECKSUMS = {'CRC32C': lambda body: google_crc32c.Checksum(body).digest(), 'CRC64NVME': crc64nvme,
             'CRC32': lambda body: zlib.crc32(body).to_bytes(4, 'big'),
             'SHA256': lambda body: hashlib.sha256(body).digest()}
plan = json.loads(sys.argv[2])
# The client states a CRC-32 of its own where it is not told to state nothing.
states = 'when_required' if plan.get('bare') else 'when_supported'
s3 = boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1', aws_access_key_id=plan.get('id', 'x'),
                  aws_secret_access_key=plan.get('secret', 'y'),
                  config=Config(s3={'addressing_style': 'path'}, request_checksum_calculation=states))
for bucket in plan.get('buckets', []):
    s3.create_bucket(Bucket=bucket)
for bucket in plan.get('versioned', []):
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={'Status': 'Enabled'})
for bucket, key, text in plan.get('put', []):
    s3.put_object(Bucket=bucket, Key=key, Body=text.encode())
for bucket, prefix, folder in plan.get('trees', []):
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            key = prefix + os.path.relpath(path, folder)
            if plan.get('checksum'):
                # Under keys of its own, so that the ETag is no MD5 and this is the only digest that is stated.
                algorithm, body = plan['checksum'], open(path, 'rb').read()
                value = base64.b64encode(CHECKSUMS[algorithm](body)).decode()
                # Without this header moto does not keep it.
                name = lambda request, **_: request.headers.__setitem__('x-amz-sdk-checksum-algorithm', algorithm)
                s3.meta.events.register('before-sign.s3.PutObject', name, unique_id='algorithm')
                s3.put_object(Bucket=bucket, Key=key, Body=body, ServerSideEncryption='aws:kms',
                              **{'Checksum' + algorithm: value})
                continue
            s3.upload_file(path, bucket, key, Config=TransferConfig(multipart_threshold=16 << 20),
                           ExtraArgs=plan.get('extra'))
"#;

pub(super) struct Moto(pub(super) Server);

/// moto that verifies the path of a key as S3 does, whose slashes are signed as such however they are sent. By itself it takes the path as it
/// was sent, which is another for keys that no path can be.
const EXACT: &str = "
import sys, urllib.parse
from moto.iam import access_control
from moto.server import main
made = access_control.IAMRequestBase.__init__
def of_key(self, path, **rest):
    sent, mark, query = path.partition('?')
    made(self, path=urllib.parse.quote(urllib.parse.unquote(sent), safe='/~') + mark + query, **rest)
access_control.IAMRequestBase.__init__ = of_key
main(sys.argv[1:])
";

impl Moto {
    pub(super) fn start() -> Self {
        Self::of(&mut Command::new(tool("objects/bin/moto_server")))
    }

    /// See [`EXACT`].
    pub(super) fn start_exact() -> Self {
        Self::of(Command::new(tool("objects/bin/python")).args(["-c", EXACT]))
    }

    fn of(command: &mut Command) -> Self {
        let port = free_port();
        Self(Server::start(command.args(["-H", "127.0.0.1", "-p"]).arg(port.to_string()), port))
    }

    pub(super) fn fill(&self, plan: &serde_json::Value) {
        python(FILL, &[&self.0.url(""), &plan.to_string()]);
    }

    fn endpoint(&self) -> String {
        format!("endpoint={}", self.0.url(""))
    }
}

/// rclone serving `folder`, each directory in it a bucket, to whoever has the keys; to everybody where there are none.
pub(super) fn rclone(folder: &Path, keys: Option<(&str, &str)>) -> Server {
    let port = free_port();
    let mut command = Command::new(tool("objects/bin/rclone"));
    command.args(["serve", "s3", "--config", "/dev/null", "--addr"]).arg(format!("127.0.0.1:{port}"));
    if let Some((id, secret)) = keys {
        command.arg("--auth-key").arg(format!("{id},{secret}"));
    }
    Server::start(command.arg(folder), port)
}

pub(super) fn endpoint(faults: &Faults) -> String {
    format!("endpoint={}", faults.url(""))
}

/// What moto takes for credentials: anything.
pub(super) const ANY_ID: &str = "@key_id=anything";
pub(super) const ANY_SECRET: &str = "@secret=whatever";

#[test]
fn a_prefix_comes_whole_through_every_fault() {
    let place = Place::new();
    tree(&place.dir("tree"));
    let moto = Moto::start();
    let folder = place.join("tree");
    moto.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "some/pre fix/", folder]]}));
    let faults = Faults::before(moto.0.port);
    for kind in ["aws", "wasabi"] {
        faults.spoil("list-type=2", Fault::Status(500, ""), 1);
        faults.spoil("list-type=2", Fault::Status(503, "Retry-After: 0"), 1);
        faults.spoil("HEAD ", Fault::Status(500, ""), 1);
        spoil_files(&faults, "/");
        let daemon = Daemon::start_with(HASTY);
        let own = endpoint(&faults);
        let given = [own.as_str(), ANY_ID, ANY_SECRET];
        for (name, uri) in [("slash", "s3://ckpt/some/pre fix/"), ("bare", "s3://ckpt/some/pre fix")] {
            create(&daemon, kind, name, uri, &given).ok();
            assert_same_tree(&folder, &daemon.attach(name, name));
        }
        assert_eq!(faults.faults_left(), 0, "{kind}");
        assert_comes_back_later(&faults, "GET /ckpt/some/pre%20fix/deep/1/2/3/7.json", || {
            create(&daemon, kind, "later", "s3://ckpt/some/pre fix/deep/1/2/3/7.json", &given)
        });
    }
    let heads = faults.heads();
    let mut large = heads.iter().filter(|head| head.starts_with("GET") && head.contains("weights.bin"));
    assert!(large.all(|head| head.contains("range: bytes=0-0\r\n") || head.contains("if-match: \"")));
}

#[test]
fn keys_are_entries_or_are_named() {
    let moto = Moto::start();
    let long = "x".repeat(300);
    let buckets = ["plain", "clash", "twice", "climbs", "markers", "nothing", "hollow", "many"];
    let mut put: Vec<[&str; 3]> = vec![
        ["plain", "a//b", "1"],
        ["plain", "a/./c", "2"],
        ["plain", "/d", "3"],
        ["plain", "e/", ""],
        ["plain", "e/f", "4"],
        ["plain", "x&<y>\"z", "5"],
        ["clash", "weights", "1"],
        ["clash", "weights/part1", "2"],
        ["clash", "fine", "2"],
        ["twice", "a/b", "1"],
        ["twice", "a//b", "2"],
        ["climbs", "ok", "1"],
        ["climbs", "a/../b", "2"],
        ["climbs", &long, "2"],
        ["markers", "p/only/", ""],
        ["hollow", "p/", ""],
        ["many", "model.bin", "exactly this"],
        ["many", "model.bin.old", "not this"],
        ["many", "sub/model.bin", "one file"],
    ];
    let numbered: Vec<String> = (0..1100).map(|number| format!("pages/{number}")).collect();
    put.extend(numbered.iter().map(|key| ["many", key.as_str(), "x"]));
    moto.fill(&json!({"buckets": buckets, "put": put}));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let endpoint = moto.endpoint();
    let names = |name: &str, uri: &str| {
        create(&daemon, "aws", name, uri, &[&endpoint, ANY_ID, ANY_SECRET]).ok();
        let at = daemon.attach(name, name);
        walk(&at).iter().map(|path| path.strip_prefix(&at).unwrap().display().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names("plain", "s3://plain"), ["a", "a/b", "a/c", "d", "e", "e/f", "x&<y>\"z"]);
    assert_eq!(names("markers", "s3://markers/p/"), ["only"]);
    assert_eq!(names("exact", "s3://many/model.bin"), ["model.bin"]);
    assert_eq!(names("below", "s3://many/sub/model.bin"), ["model.bin"]);
    assert_eq!(names("pages", "s3://many/pages").len(), 1100);
    for (name, uri, reason_word, exit, words) in [
        ("clash", "s3://clash/", "BAD_KEYS", 2, &["`weights/part1`", "`weights`"][..]),
        ("twice", "s3://twice", "BAD_KEYS", 2, &["`a//b`", "`a/b`"]),
        ("climbs", "s3://climbs", "BAD_KEYS", 2, &["2 keys", "`a/../b`", "longer than 255"]),
        ("nothing", "s3://nothing", "NO_SUCH_OBJECT", 3, &["s3://nothing"]),
        ("neither", "s3://many/mod", "NO_SUCH_OBJECT", 3, &["s3://many/mod"]),
        ("nowhere", "s3://no-such-bucket-at-all/x", "NO_SUCH_BUCKET", 3, &["no such bucket"]),
        ("hollow", "s3://hollow/p/", "EMPTY_SOURCE", 2, &["no files"]),
    ] {
        create(&daemon, "aws", name, uri, &[&endpoint, ANY_ID, ANY_SECRET]).refused(&[exit], words);
        assert_eq!(reason(&daemon, name), reason_word);
    }
}

#[test]
fn what_is_killed_is_resumed_and_what_is_replaced_is_not_mixed() {
    let place = Place::new();
    let (first, second) = (place.join("one/big.bin"), place.join("two/big.bin"));
    random_file(&first, 1, 48 << 20);
    random_file(&second, 2, 48 << 20);
    let moto = Moto::start();
    let one = first.parent().unwrap();
    let plan = json!({
        "buckets": ["plain", "versions"],
        "versioned": ["versions"],
        "trees": [["plain", "", one], ["versions", "", one]],
        "extra": {"ACL": "public-read"},
    });
    moto.fill(&plan);
    let faults = Faults::before(moto.0.port);
    // By nobody, and with secrets that the host keeps.
    let keys = place.join("keys.toml");
    fs::write(&keys, format!("key_id = '{KEY_ID}'\nsecret = '{SECRET}'\nhosts = ['127.0.0.1']\n")).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let kept = ("CKPTD_SOURCES__CREDENTIALS_DIR", place.path().to_str().unwrap());
    for (kind, more) in [("aws", &[][..]), ("wasabi", &["credentials=keys"])] {
        let mut daemon = Daemon::start_with(&[ENDURING, &[kept]].concat());
        let own = endpoint(&faults);
        let more = [&[own.as_str()], more].concat();
        assert_goes_on_after_a_kill(&mut daemon, &faults, (kind, "s3://plain/"), &more, one);
        assert_kept_nowhere(&daemon, &[SECRET, KEY_ID]);
    }
    let signed = faults.heads().into_iter().filter(|head| head.contains(&format!("Credential={KEY_ID}/"))).count();
    assert!((1..faults.heads().len()).contains(&signed), "{signed} requests were signed");

    let daemon = Daemon::start_with(ENDURING);
    for (bucket, state) in [("plain", "failed"), ("versions", "ready")] {
        let begin = || start(&daemon, "aws", bucket, &format!("s3://{bucket}/big.bin"), &[&endpoint(&faults)]);
        let trees = json!([[bucket, "", second.parent().unwrap()]]);
        replace_midway(&faults, begin, || moto.fill(&json!({"trees": trees, "extra": {"ACL": "public-read"}})));
        daemon.wait_state(bucket, state, Duration::from_secs(180));
    }
    assert_eq!(reason(&daemon, "plain"), "SOURCE_CHANGED");
    assert_same_file(&first, &daemon.attach("versions", "versions").join("big.bin"));
    daemon.ctl(&["retry", "plain", "--wait"]).ok();
    assert_same_file(&second, &daemon.attach("plain", "plain").join("big.bin"));
}

#[test]
fn digests_that_the_store_states_are_verified() {
    let place = Place::new();
    // Each with what an ETag is learned from.
    fs::write(place.dir("tree/small").join("tiny"), "x").unwrap();
    fs::write(place.dir("tree/large").join("tiny"), "y").unwrap();
    fs::write(place.join("tree/small/file"), "the bytes").unwrap();
    random_file(&place.join("tree/large/file"), 3, 9 << 20);
    let moto = Moto::start();
    let folder = place.join("tree");
    let of_kms = json!({"ServerSideEncryption": "aws:kms"});
    // Where there is a checksum of its own, it is all that is stated: the ETag is none.
    let buckets = [
        ("md5", json!(null), json!(null), "MD5"),
        ("crc32c", json!(null), json!("CRC32C"), "CRC-32C"),
        ("crc32", json!(null), json!("CRC32"), "CRC-32"),
        ("crc64", json!(null), json!("CRC64NVME"), "CRC-64/NVME"),
        ("sha", json!(null), json!("SHA256"), "SHA-256"),
        ("both", json!({"ChecksumAlgorithm": "SHA256"}), json!(null), "SHA-256"),
        ("kms", of_kms, json!(null), ""),
    ];
    for (bucket, extra, checksum, _) in &buckets {
        let trees = json!([[bucket, "", folder]]);
        let plan = json!({"buckets": [bucket], "trees": trees, "extra": extra, "checksum": checksum, "bare": true});
        moto.fill(&plan);
    }
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let faults = Faults::before(moto.0.port);
    let own = endpoint(&faults);
    for (bucket, ..) in &buckets {
        create(&daemon, "aws", bucket, &format!("s3://{bucket}"), &[&own, ANY_ID, ANY_SECRET]).ok();
        assert_same_tree(&folder, &daemon.attach(bucket, bucket));
    }
    for (bucket, _, _, digest) in &buckets {
        // By themselves: what came of the one while the other failed would be here already.
        for part in ["small", "large"] {
            faults.spoil(&format!("GET /{bucket}/{part}/file "), Fault::Damage(5), 9);
            let (name, uri) = (format!("{bucket}-{part}"), format!("s3://{bucket}/{part}/"));
            let ran = create(&daemon, "aws", &name, &uri, &[&own, ANY_ID, ANY_SECRET]);
            if digest.is_empty() {
                // Nothing is stated, so nobody can tell: what told of the others were the digests alone.
                ran.ok();
                let (shown, sent) = (daemon.attach(&name, &name), folder.join(part));
                let is_same = fs::read(shown.join("file")).unwrap() == fs::read(sent.join("file")).unwrap();
                assert!(!is_same, "{name}: nothing was damaged");
            } else {
                ran.refused(&[6], &[&format!("file` arrived with {digest} ")]);
                assert_eq!(reason(&daemon, &name), "DIGEST_MISMATCH");
            }
            faults.spare();
        }
    }
    wrong_bytes_that_were_shown_are_put_aside_and_healed(&daemon, &faults, &folder);
}

/// Has a job read bytes of `large/file` in the bucket `md5`, which is below `folder`, that turn out wrong at its end; where it sees the checkpoint.
fn read_wrong_bytes(daemon: &Daemon, faults: &Faults, folder: &Path) -> PathBuf {
    faults.spoil("GET /md5/large/file ", Fault::Damage(5), 9);
    faults.slow_down(64 << 10);
    start(daemon, "aws", "early", "s3://md5", &[&endpoint(faults), ANY_ID, ANY_SECRET]);
    let at = daemon.place().dir("at-early");
    run(daemon.ctl_command().args(["attach", "early", "early", "--lazy", "--at"]).arg(&at)).ok();
    // All of it comes in nine seconds, what is read in four. Whatever is asked for otherwise, some answer begins with it.
    faults.slow_down(1 << 20);
    let (mut seen, mut right) = ([0; 10], [0; 10]);
    fs::File::open(at.join("large/file")).unwrap().read_exact_at(&mut seen, 0).unwrap();
    fs::File::open(folder.join("large/file")).unwrap().read_exact_at(&mut right, 0).unwrap();
    assert_ne!(seen, right, "what was read is right");
    faults.slow_down(0);
    daemon.wait_state("early", "failed", Duration::from_secs(180));
    assert_eq!(reason(daemon, "early"), "DIGEST_MISMATCH");
    faults.spare();
    at
}

fn retry_early(daemon: &Daemon) {
    let (id, secret) = (ANY_ID.trim_start_matches('@'), ANY_SECRET.trim_start_matches('@'));
    daemon.ctl(&["retry", "early", "--wait", "--credential", id, "--credential", secret]).ok();
}

/// A job reads what turns out wrong at its end.
fn wrong_bytes_that_were_shown_are_put_aside_and_healed(daemon: &Daemon, faults: &Faults, folder: &Path) {
    // The file itself takes the place of what an earlier checkpoint of the same bytes has left.
    let aside = || daemon.ctl(&["events"]).ok().stdout.matches("FILE_QUARANTINED").count();
    let before = aside();
    let at = read_wrong_bytes(daemon, faults, folder);
    assert_eq!(aside(), before + 1);
    assert!(!regular_files(&daemon.state().join("quarantine")).is_empty());
    let missing = fs::File::open(at.join("large/file")).unwrap().read_exact_at(&mut [0; 10], 5 << 20).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(nix::libc::EIO));
    assert_eq!(fs::read(at.join("small/file")).unwrap(), b"the bytes");
    retry_early(daemon);
    assert_same_tree(folder, &at);
}

#[test]
fn wrong_bytes_that_the_kernel_keeps_are_not_believed_after_restarts() {
    let place = Place::new();
    fs::write(place.dir("tree/small").join("file"), "the bytes").unwrap();
    random_file(&place.dir("tree/large").join("file"), 3, 9 << 20);
    let (moto, folder) = (Moto::start(), place.join("tree"));
    moto.fill(&json!({"buckets": ["md5"], "trees": [["md5", "", folder]]}));
    let faults = Faults::before(moto.0.port);
    let daemon = Daemon::start_kept(&[LOOPBACK, NO_PASSTHROUGH]);
    let at = read_wrong_bytes(&daemon, &faults, &folder);
    retry_early(&daemon);
    // Nobody opens it before it is served from the store.
    for _ in 0..2 {
        daemon.replace();
    }
    assert_same_tree(&folder, &at);
}

#[test]
fn signatures_are_verified_and_ranges_that_are_ignored_do_no_harm() {
    let place = Place::new();
    tree(&place.dir("store/ckpt/p"));
    let server = rclone(&place.join("store"), Some((KEY_ID, SECRET)));
    let faults = Faults::before(server.port);
    let mut daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let (id, secret) = (format!("@key_id={KEY_ID}"), format!("@secret={SECRET}"));
    let keys = [own.as_str(), &id, &secret];
    create(&daemon, "wasabi", "right", "s3://ckpt/p/", &keys).ok();
    assert_same_tree(&place.join("store/ckpt/p"), &daemon.attach("right", "right"));
    for (name, more, exit, word) in [
        ("wrong", &[own.as_str(), &id, "@secret=wr0ng-secret"][..], 2, "CREDENTIALS_REFUSED"),
        ("nobody", &[&own], 2, "CREDENTIALS_REQUIRED"),
    ] {
        let ran = create(&daemon, "aws", name, "s3://ckpt/p/", more);
        ran.refused(&[exit], &[]);
        assert_eq!(reason(&daemon, name), word);
    }
    // What cannot be is refused before there is a record.
    create(&daemon, "aws", "half", "s3://ckpt/p/", &[&own, &id]).refused(&[2], &["not whole"]);
    create(&daemon, "wasabi", "nowhere", "s3://ckpt/p/", &[&id, &secret]).refused(&[2], &["endpoint"]);
    // The store says where the bucket is, and the request is signed anew.
    faults.spoil("HEAD ", Fault::Status(301, "x-amz-bucket-region: eu-test-7"), 1);
    create(&daemon, "aws", "moved", "s3://ckpt/p/empty", &keys).ok();
    assert!(faults.heads().iter().any(|head| head.contains("/eu-test-7/s3/aws4_request")));

    // Replaced between list and read, at a store that takes no conditions.
    faults.spoil("/1.json", Fault::Status(503, "Retry-After: 3"), 8);
    start(&daemon, "aws", "changed", "s3://ckpt/p/deep", &keys);
    wait_until("the file was asked for", Duration::from_secs(20), || faults.faults_left() < 8);
    fs::write(place.join("store/ckpt/p/deep/1/2/3/1.json"), "{\"n\": 7}").unwrap();
    faults.spare();
    daemon.wait_state("changed", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "changed"), "SOURCE_CHANGED");

    // Credentials are not kept across a crash; given again, what is here counts.
    faults.slow_down(4 << 20);
    start(&daemon, "aws", "killed", "s3://ckpt/p/model", &keys);
    wait_bytes(&daemon, "killed", 12 << 20);
    daemon.kill9();
    faults.slow_down(0);
    daemon.restart();
    daemon.wait_state("killed", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "killed"), "CREDENTIALS_REQUIRED");
    let ran = daemon.ctl(&["retry", "killed", "--credential", &id[1..], "--credential", &secret[1..], "--wait"]);
    ran.ok();
    assert_mounted(&place.join("store/ckpt/p/model"), &daemon.attach("killed", "killed"));
    assert!(fs::metadata(place.join("store/ckpt/p/model/weights.bin")).unwrap().len() == LARGE);
    assert_kept_nowhere(&daemon, &[SECRET, "wr0ng-secret", KEY_ID]);
}

/// What stores say of a session that is over.
const EXPIRED: &str = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";

#[test]
fn temporary_credentials_that_expire_in_the_middle_are_given_anew() {
    let place = Place::new();
    let file = place.join("tree/big.bin");
    random_file(&file, 5, 40 << 20);
    let moto = Moto::start();
    moto.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "", file.parent().unwrap()]]}));
    let faults = Faults::before(moto.0.port);
    let daemon = Daemon::start_with(HASTY);
    let own = endpoint(&faults);
    let given = [own.as_str(), ANY_ID, ANY_SECRET, "@token=t3mporary-one"];
    faults.spoil("HEAD ", Fault::Refusal(400, ""), 9);
    faults.spoil("GET ", Fault::Refusal(400, EXPIRED), 9);
    create(&daemon, "aws", "late", "s3://ckpt/big.bin", &given).refused(&[2], &["expired", "fresh credentials"]);
    assert_eq!(reason(&daemon, "late"), "CREDENTIALS_EXPIRED");
    faults.spare();

    // The first range ends early, and what is asked for then is refused.
    faults.spoil("bytes=0-33554431", Fault::Truncate(6 << 20), 1);
    faults.spoil("bytes=4194304-", Fault::Refusal(400, EXPIRED), 9);
    start(&daemon, "aws", "midway", "s3://ckpt/big.bin", &given);
    daemon.wait_state("midway", "failed", Duration::from_secs(180));
    assert_eq!(reason(&daemon, "midway"), "CREDENTIALS_EXPIRED");
    faults.spare();
    let (before, asked) = (faults.body_bytes(), faults.heads().len());
    let fresh = ["key_id=another", "secret=other", "token=t3mporary-two"];
    let line = fresh.iter().flat_map(|secret| ["--credential", *secret]);
    daemon.ctl(&["retry", "midway", "--wait"].into_iter().chain(line).collect::<Vec<_>>()).ok();
    assert_same_file(&file, &daemon.attach("midway", "midway").join("big.bin"));
    let again = faults.body_bytes() - before;
    assert!(again <= 37 << 20, "{again} bytes were fetched again, of which 4 MiB were here");
    let sent = |heads: &[String], token: &str| {
        heads.iter().all(|head| head.contains(&format!("x-amz-security-token: {token}\r\n")))
    };
    let heads = faults.heads();
    assert!(sent(&heads[..asked], "t3mporary-one") && sent(&heads[asked..], "t3mporary-two"), "{heads:?}");
    assert_kept_nowhere(&daemon, &["t3mporary"]);
}

#[test]
fn keys_of_the_environment_go_to_no_endpoint_that_a_request_chooses() {
    let (own, foreign) = (Faults::before(1), Faults::before(1));
    for store in [&own, &foreign] {
        store.spoil("", Fault::Status(403, ""), usize::MAX / 2);
    }
    let operators = own.url("/");
    let environment =
        [("AWS_ACCESS_KEY_ID", KEY_ID), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_SESSION_TOKEN", "s3ssion-token")];
    let by_name = [&environment[..], &[("AWS_ENDPOINT_URL", operators.as_str()), LOCALHOST]].concat();
    let by_service = [&environment[..], &[("AWS_ENDPOINT_URL_S3", operators.as_str()), LOCALHOST]].concat();
    let without = [&environment[..], &[LOCALHOST]].concat();
    for environment in [&by_name, &by_service, &without] {
        let daemon = Daemon::start_with(environment);
        for (number, kind) in ["aws", "wasabi"].into_iter().enumerate() {
            for (name, endpoint) in [
                ("foreign", foreign.url("")),
                ("by-another-name", format!("http://localhost:{}", own.port())),
                ("below", own.url("/below")),
            ] {
                let name = format!("{name}-{number}");
                let endpoint = format!("endpoint={endpoint}");
                create(&daemon, kind, &name, "s3://ckpt/x", &[&endpoint]).refused(&[2], &["key_id"]);
                assert_eq!(reason(&daemon, &name), "CREDENTIALS_REQUIRED");
            }
        }
        let heads = [own.heads(), foreign.heads()].concat().join("").to_ascii_lowercase();
        assert!(heads.contains("/ckpt/x http") && !heads.contains("authorization"), "{heads}");
        assert!(!heads.contains("x-amz-security-token") && !heads.contains(&KEY_ID.to_lowercase()), "{heads}");
    }
    let daemon = Daemon::start_with(&[&by_name[..], &[("RUST_LOG", "debug")]].concat());
    create(&daemon, "aws", "own", "s3://ckpt/x", &[&endpoint(&own)]).refused(&[2], &[]);
    let heads = own.heads().concat();
    assert!(heads.contains(&format!("Credential={KEY_ID}/")) && heads.contains("x-amz-security-token: s3ssion-token"));
    assert_kept_nowhere(&daemon, &[SECRET, KEY_ID, "s3ssion-token"]);
}

#[test]
fn twenty_thousand_objects_and_the_environments_credentials() {
    let place = Place::new();
    let folder = place.dir("store/ckpt/many");
    for number in 0..20_000 {
        if number % 1000 == 0 {
            fs::create_dir_all(folder.join(format!("{}", number / 1000))).unwrap();
        }
        fs::write(folder.join(format!("{}/{number}.txt", number / 1000)), format!("{number}\n")).unwrap();
    }
    let server = rclone(&place.join("store"), Some((KEY_ID, SECRET)));
    let faults = Faults::before(server.port);
    let (own, option) = (faults.url(""), endpoint(&faults));
    let keys = [
        ("AWS_ACCESS_KEY_ID", KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_ENDPOINT_URL", own.as_str()),
        LOOPBACK,
    ];
    let daemon = Daemon::start_with(&keys);
    create(&daemon, "aws", "many", "s3://ckpt/many", &[&option]).ok();
    let pages: Vec<_> = faults.heads().into_iter().filter(|head| head.contains("list-type=2")).collect();
    let tokens = pages.iter().filter_map(|head| head.split_once("continuation-token=")?.1.split(['&', ' ']).next());
    let further = tokens.collect::<BTreeSet<_>>();
    assert_eq!((pages.len(), further.len()), (20, 19), "pages of a thousand, by 19 tokens");
    assert_eq!(daemon.json(&["get", "many"])["files"], 20_000);
    let at = daemon.attach("job", "many");
    assert_eq!(regular_files(&at).len(), 20_000);
    assert_same_tree(&folder.join("19"), &at.join("19"));
    create(&daemon, "aws", "nobody", "s3://ckpt/many", &["anonymous=true", &option]).refused(&[2], &["key_id"]);
    assert_kept_nowhere(&daemon, &[SECRET, KEY_ID]);
}

#[test]
fn jobs_that_read_a_bucket_lazily_see_nothing_of_a_network_that_falters() {
    let place = Place::new();
    let tree = place.dir("tree");
    faltering::plain_tree(&tree);
    let moto = Moto::start();
    moto.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "lazy/", tree]]}));
    for kind in ["aws", "wasabi"] {
        let network = faltering::before(moto.0.port);
        let daemon = Daemon::start_with(HASTY);
        let endpoint = format!("endpoint={}", network.url(""));
        start(&daemon, kind, "k", "s3://ckpt/lazy/", &[&endpoint, ANY_ID, ANY_SECRET]);
        faltering::assert_read_lazily(&daemon, &network, "k", &tree);
    }
}

#[test]
fn an_object_that_is_an_archive_is_extracted() {
    let place = Place::new();
    let (tree, folder) = two_archives(&place);
    let moto = Moto::start();
    moto.fill(&json!({"buckets": ["ckpt"], "trees": [["ckpt", "some/", folder]]}));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    for (name, key) in [("tar", "a.tar.gz"), ("zip", "b.zip")] {
        create(&daemon, "aws", name, &format!("s3://ckpt/some/{key}"), &[&moto.endpoint(), ANY_ID, ANY_SECRET]).ok();
        assert_same_tree(&tree, &daemon.attach(name, name));
    }
}
