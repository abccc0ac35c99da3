//! Who may do what, and what an owner can learn of others: nothing.

#![cfg(test)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ckptd::control::wire;
use ckptd::control::wire::checkpoints_client::CheckpointsClient;
use ckptd::control::wire::jobs_client::JobsClient;
use ckptd::control::wire::upload_checkpoint_request::Message;
use ckptd::limits::{CALLS_OF_A_TENANT, MESSAGE_BYTES};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use support::corpus::{random_file, seed};
use support::daemon::{CKPTCTL, Daemon, LOOPBACK};
use support::place::Place;
use support::ran::{Ran, run, wait_until};
use support::server::free_port;
use support::site::{Page, Site};
use support::webserver::certificates;

const LIMIT: Duration = Duration::from_secs(180);

/// A user that is in no list, and a group.
const NOBODY: u32 = 65_534;
const GROUP: u32 = 54_321;

fn model(daemon: &Daemon, number: u64) -> PathBuf {
    let source = daemon.place().dir(&format!("source-{number}"));
    random_file(&source.join("w.bin"), seed() + number, (1 << 20) + number);
    source
}

fn upload(daemon: &Daemon, name: &str, owner: &str, from: &Path) -> Value {
    daemon.json(&["upload", name, from.to_str().unwrap(), "--owner", owner])
}

/// `ckptctl` as another user and group of this host, from a place that everybody may read.
fn ctl_as(daemon: &Daemon, uid: u32, groups: &str, args: &[&str]) -> Ran {
    run(&mut ctl_command_as(daemon, uid, groups, args))
}

fn ctl_command_as(daemon: &Daemon, uid: u32, groups: &str, args: &[&str]) -> Command {
    let program = daemon.place().join("ckptctl");
    if !program.exists() {
        fs::copy(CKPTCTL, &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}")).arg(format!("--groups={groups}"));
    command.arg(program).arg("--endpoint").arg(format!("unix:{}", daemon.socket().display())).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// `ckptctl --as OWNER`.
fn ctl_for(daemon: &Daemon, owner: &str, args: &[&str]) -> Ran {
    run(daemon.ctl_command().args(["--as", owner]).args(args))
}

fn json_for(daemon: &Daemon, owner: &str, args: &[&str]) -> Value {
    run(daemon.ctl_command().args(["--as", owner, "--json"]).args(args)).ok().json()
}

#[test]
fn users_and_groups_of_the_host_may_do_what_their_role_may() {
    let groups = format!(r#"["gid:{GROUP}"]"#);
    let readers = format!(r#"["uid:{NOBODY}"]"#);
    let daemon = Daemon::start_with(&[
        ("CKPTD_ACCESS__OPERATORS", r#"["uid:4243"]"#),
        ("CKPTD_ACCESS__SCHEDULERS", &groups),
        ("CKPTD_ACCESS__READERS", &readers),
    ]);
    daemon.capture("k", &model(&daemon, 1));
    let target = daemon.place().dir("at");
    let attach = ["attach", "job", "k", "--at", target.to_str().unwrap()];

    // In no list.
    ctl_as(&daemon, 4242, "4242", &["list"]).refused(&[2], &["user 4242", "access"]);
    // A reader looks, whoever else it is.
    let listed = ctl_as(&daemon, NOBODY, "65534", &["--json", "list"]).ok().json();
    assert_eq!(listed["checkpoints"][0]["name"], "k");
    ctl_as(&daemon, NOBODY, "65534", &attach).refused(&[2], &["a reader"]);
    ctl_as(&daemon, NOBODY, "65534", &["remove", "k", "--yes"]).refused(&[2], &["a reader"]);
    // A scheduler by a supplementary group commands jobs, and not the host.
    let supplementary = format!("4242,{GROUP}");
    ctl_as(&daemon, 4242, &supplementary, &attach).ok();
    ctl_as(&daemon, 4242, &supplementary, &["drain"]).refused(&[2], &["a scheduler"]);
    ctl_as(&daemon, 4242, &supplementary, &["pin", "k"]).refused(&[2], &["a scheduler"]);
    ctl_as(&daemon, 4242, &supplementary, &["release", "job"]).ok();
    daemon.ctl(&["pin", "k"]).ok();
    ctl_as(&daemon, 4242, &supplementary, &["remove", "k", "--yes"]).refused(&[4], &["pinned", "unpin"]);
    assert_eq!(daemon.json(&["unpin", "k"])["pinned"], false);
    ctl_as(&daemon, 4242, &supplementary, &["remove", "k", "--yes"]).ok();
    // An operator by uid commands the host.
    ctl_as(&daemon, 4243, "4243", &["drain"]).ok();
}

#[test]
fn without_lists_the_socket_is_roots_alone() {
    let daemon = Daemon::start();
    assert_eq!(fs::metadata(daemon.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    ctl_as(&daemon, NOBODY, "65534", &["list"]).refused(&[2, 7], &[]);
}

#[test]
fn an_owner_sees_its_own_and_public_ones_and_changes_only_its_own() {
    let site = Site::open();
    let url = site.put("/public.bin", Page::Ranged(vec![7; 1000].into()));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let alices = upload(&daemon, "m", "alice", &model(&daemon, 1));
    upload(&daemon, "m", "bob", &model(&daemon, 2));
    upload(&daemon, "hers", "alice", &model(&daemon, 3));
    daemon.ctl(&["create", "shared", "--type", "web", "--uri", &url, "--public", "--wait"]).ok();

    let names = |owner| -> Vec<String> {
        let listed = json_for(&daemon, owner, &["list"]);
        let rows = listed["checkpoints"].as_array().unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("alice"), ["m", "hers", "shared"]);
    assert_eq!(names("bob"), ["m", "shared"]);
    assert_eq!(names("carol"), ["shared"]);
    // One name, two owners: ambiguous for the host, clear for each.
    daemon.ctl(&["get", "m"]).refused(&[2], &["2 checkpoints"]);
    assert_eq!(json_for(&daemon, "alice", &["get", "m"])["id"], alices["id"]);

    let id = alices["id"].as_str().unwrap();
    let absent = ctl_for(&daemon, "bob", &["get", "no-such-id"]).refused(&[3], &["there is no checkpoint"]);
    for args in [
        &["get", id][..],
        &["remove", id, "--yes"],
        &["rename", id, "n"],
        &["retry", id],
        &["estimate", id],
        &["prefetch", id],
        &["reserve", "j", id],
        &["watch", id],
    ] {
        let hidden = ctl_for(&daemon, "bob", args).refused(&[3], &["there is no checkpoint"]);
        assert_eq!(hidden.stderr.replace(id, "no-such-id"), absent.stderr, "{args:?} tells that it is there");
    }
    for args in [&["remove", "shared", "--yes"][..], &["rename", "shared", "mine"], &["retry", "shared"]] {
        ctl_for(&daemon, "bob", args).refused(&[2], &["public"]);
    }
    ctl_for(&daemon, "bob", &["create", "x", "--uri", &url, "--owner", "alice"]).refused(&[2], &["another owner"]);
    ctl_for(&daemon, "bob", &["create", "x", "--uri", &url, "--public"]).refused(&[2], &["public"]);
    let made = json_for(&daemon, "bob", &["create", "x", "--uri", &url, "--wait"]);
    assert_eq!(made["owner"], "bob");
    ctl_for(&daemon, "bob", &["remove", "x", "--yes"]).ok();
}

#[test]
fn a_job_sees_its_owners_and_public_ones_and_is_seen_by_its_owner() {
    let daemon = Daemon::start();
    let id = upload(&daemon, "m", "alice", &model(&daemon, 1))["id"].as_str().unwrap().to_owned();
    let target = daemon.place().dir("at");
    let at = target.to_str().unwrap();
    for owner in [&["--owner", "bob"][..], &[]] {
        for verb in [&["reserve", "job", &id][..], &["attach", "job", &id, "--at", at]] {
            // Who sees it is told whose it is; who does not, that it is not there.
            daemon.ctl(&[verb, owner].concat()).refused(&[3], &["belongs to `alice`", "--owner alice"]);
            ctl_for(&daemon, "bob", verb).refused(&[3], &["there is no checkpoint"]);
        }
    }
    daemon.ctl(&["attach", "job", "m", "--at", at, "--owner", "alice"]).ok();
    assert!(target.join("w.bin").exists());
    assert_eq!(json_for(&daemon, "alice", &["jobs"])["jobs"][0]["job"], "job");
    assert_eq!(json_for(&daemon, "bob", &["jobs"])["jobs"], Value::Array(vec![]));
    ctl_for(&daemon, "bob", &["detach", "job"]).refused(&[3], &["no job"]);
    // As for a job that is not there: nothing is left to release.
    ctl_for(&daemon, "bob", &["release", "job"]).ok();
    assert!(target.join("w.bin").exists());
    ctl_for(&daemon, "alice", &["release", "job"]).ok();
}

#[test]
fn a_job_keeps_its_owner_until_it_is_released() {
    let daemon = Daemon::start();
    upload(&daemon, "m", "alice", &model(&daemon, 1));
    upload(&daemon, "m", "bob", &model(&daemon, 2));
    let target = daemon.place().dir("at");
    let at = target.to_str().unwrap();
    let jobs_of = |owner| json_for(&daemon, owner, &["jobs"])["jobs"].as_array().unwrap().len();
    daemon.ctl(&["reserve", "j", "m", "--owner", "alice"]).ok();
    for args in [&["attach", "j", "--at", at][..], &["attach", "j", "m", "--at", at], &["reserve", "j", "m"]] {
        daemon.ctl(&[args, &["--owner", "bob"]].concat()).refused(&[4], &["not one of `bob`"]);
        ctl_for(&daemon, "bob", args).refused(&[3], &["no job"]);
    }
    // Who names no owner means the one that it has.
    daemon.ctl(&["attach", "j", "--at", at]).ok();
    assert_eq!((jobs_of("alice"), jobs_of("bob")), (1, 0));
    daemon.ctl(&["attach", "j", "m", "--at", at]).ok();
    ctl_for(&daemon, "bob", &["renew", "j", "--expires", "1s"]).refused(&[3], &["no job"]);
    daemon.ctl(&["detach", "j"]).ok();
    assert_eq!((jobs_of("alice"), jobs_of("bob")), (1, 0));
    daemon.ctl(&["release", "j"]).ok();
    daemon.ctl(&["attach", "j", "m", "--owner", "bob", "--at", at]).ok();
    assert_eq!((jobs_of("alice"), jobs_of("bob")), (0, 1));
}

#[test]
fn the_view_of_another_job_is_no_target() {
    let daemon = Daemon::start();
    daemon.capture("k", &model(&daemon, 1));
    daemon.ctl(&["attach", "one", "k"]).ok();
    let views = daemon.place().join("run/jobs");
    let view = views.join("one/checkpoint");
    assert!(view.join("w.bin").exists());
    daemon.attach_at("two", &["k"], &view).refused(&[4], &["mounted"]);
    daemon.attach_at("two", &["k"], &views.join("one")).refused(&[4], &["not empty"]);
    daemon.attach_at("two", &["k"], &views).refused(&[2], &["ckptd's own"]);
    assert!(view.join("w.bin").exists());
}

#[test]
fn an_owner_cannot_find_out_which_ids_others_have() {
    let site = Site::open();
    let url = site.put("/w.bin", Page::Ranged(vec![7; 1000].into()));
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let create = |id: &'static str, url: &str| -> Vec<String> {
        ["create", "m", "--type", "web", "--uri", url, "--id", id].map(str::to_owned).into()
    };
    let as_owner = |owner: &str, args: &[String]| run(daemon.ctl_command().args(["--as", owner]).args(args));
    let of_alice = [create("alices", &url), vec!["--owner".into(), "alice".into(), "--wait".into()]].concat();
    run(daemon.ctl_command().args(of_alice)).ok();
    // One that is there and one that is not, whatever else is wrong with the request.
    for (url, why) in [(url.as_str(), "UUID"), ("http://", "")] {
        let [taken, free] = ["alices", "nobodys"].map(|id| as_owner("bob", &create(id, url)).refused(&[2], &[why]));
        assert_eq!(taken.stderr.replace("alices", "nobodys"), free.stderr);
    }
    let source = model(&daemon, 1);
    let [taken, free] = ["alices", "nobodys"].map(|id| {
        ctl_for(&daemon, "bob", &["upload", "m", source.to_str().unwrap(), "--id", id]).refused(&[2], &["UUID"])
    });
    // How far it had sent by then is chance.
    let last = |ran: &Ran| ran.stderr.lines().last().unwrap_or_default().replace("alices", "nobodys");
    assert_eq!(last(&taken), last(&free));
    // Its own is answered again, whoever chose it; a UUID is its to choose.
    as_owner("alice", &create("alices", &url)).ok();
    let own = create("0b5e7c1e-94a3-4f5c-8d8e-6f0c2b9a7d31", &url);
    as_owner("bob", &own).ok();
    as_owner("bob", &own).ok();
}

#[test]
fn what_others_have_changes_nothing_that_an_owner_is_shown() {
    let daemon = Daemon::start();
    let source = model(&daemon, 1);
    let seen = |owner: &str| {
        let record = json_for(&daemon, owner, &["get", "m"]);
        let usage = json_for(&daemon, owner, &["usage"]);
        let status = json_for(&daemon, owner, &["status"]);
        let figures = ["logical_bytes", "unique_bytes", "physical_bytes"].map(|key| record[key].clone());
        (
            figures,
            usage["logical_bytes"].clone(),
            usage["free_bytes"].clone(),
            usage["owners"].clone(),
            status["sessions"].clone(),
        )
    };
    upload(&daemon, "m", "alice", &source);
    let before = seen("alice");
    upload(&daemon, "m", "bob", &source);
    daemon.attach_at("job", &["m"], &daemon.place().dir("at")).refused(&[3], &[]);
    daemon.ctl(&["attach", "job", "m", "--owner", "bob"]).ok();
    assert_eq!(seen("alice"), before);
    let mut bobs = seen("bob");
    bobs.3[0]["owner"] = "alice".into();
    assert_eq!(bobs, before, "the second is shown other figures than the first");

    let events = |owner| -> String { run(daemon.ctl_command().args(["--as", owner, "--json", "events"])).ok().stdout };
    let id = |owner: &str| json_for(&daemon, owner, &["get", "m"])["id"].as_str().unwrap().to_owned();
    assert!(events("alice").contains(&id("alice")));
    assert!(!events("alice").contains(&id("bob")));
    assert!(!events("carol").contains("CHECKPOINT"));
}

#[test]
fn what_an_owner_watches_tells_of_its_own_alone() {
    let daemon = Daemon::start();
    let first = upload(&daemon, "first", "bob", &model(&daemon, 1));
    let follow = |args: &[&str]| {
        let heard = daemon.place().join(&format!("heard-{}", args[0]));
        let mut command = daemon.ctl_command();
        command.args(["--as", "bob", "--json"]).args(args).stdin(Stdio::null()).stderr(Stdio::null());
        (Follower(command.stdout(fs::File::create(&heard).unwrap()).spawn().unwrap()), heard)
    };
    let followed = [follow(&["watch"]), follow(&["events", "--follow"])];
    let heard = || followed.iter().map(|(_, heard)| fs::read_to_string(heard).unwrap());
    let wait_until_told = |record: &Value| {
        let id = record["id"].as_str().unwrap();
        wait_until("the owner is told of its own", LIMIT, || heard().all(|text| text.contains(id)));
    };
    wait_until_told(&first);
    let hidden = upload(&daemon, "of-alice", "alice", &model(&daemon, 2));
    // The last is told of after all that was told together with the one before it.
    for (number, name) in [(3, "second"), (4, "third")] {
        wait_until_told(&upload(&daemon, name, "bob", &model(&daemon, number)));
    }
    for text in heard() {
        assert!(!text.contains(hidden["id"].as_str().unwrap()) && !text.contains("alice"), "{text}");
    }
}

#[test]
fn a_job_of_another_is_as_one_that_is_not_there() {
    let daemon = Daemon::start();
    upload(&daemon, "m", "alice", &model(&daemon, 1));
    daemon.ctl(&["reserve", "alices", "m", "--owner", "alice"]).ok();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut client = JobsClient::new(connect(&daemon.socket()).await);
        assert_eq!(get_job(&mut client, "alice", "alices").await.unwrap().job, "alices");
        let hidden = get_job(&mut client, "bob", "alices").await.unwrap_err();
        let absent = get_job(&mut client, "bob", "nobodys").await.unwrap_err();
        assert_eq!((hidden.code(), absent.code()), (Code::NotFound, Code::NotFound));
        assert_eq!(hidden.message().replace("alices", "nobodys"), absent.message());
    });
}

async fn get_job(client: &mut JobsClient<Channel>, owner: &str, job: &str) -> Result<wire::Attachment, Status> {
    let mut request = Request::new(wire::GetJobRequest { job: job.into() });
    request.metadata_mut().insert(wire::OWNER_METADATA, owner.parse().unwrap());
    Ok(client.get_job(request).await?.into_inner())
}

#[test]
fn a_client_that_asks_too_much_is_told_to_try_again_and_others_do_not_suffer() {
    let readers = format!(r#"["uid:{NOBODY}"]"#);
    let daemon = Daemon::start_with(&[("CKPTD_ACCESS__READERS", &readers)]);
    let mut looking: Vec<Follower> = Vec::new();
    wait_until("the reader has as many calls under way as it may", LIMIT, || {
        if looking.len() < CALLS_OF_A_TENANT {
            looking.push(Follower(ctl_command_as(&daemon, NOBODY, "65534", &["events", "--follow"]).spawn().unwrap()));
            return false;
        }
        let refused = ctl_as(&daemon, NOBODY, "65534", &["list"]);
        refused.code == Some(7) && refused.stderr.contains("calls under way") && refused.stderr.contains("try again")
    });
    daemon.ctl(&["list"]).ok();
    drop(looking);
    wait_until("it may ask again", LIMIT, || ctl_as(&daemon, NOBODY, "65534", &["list"]).code == Some(0));
}

#[test]
fn a_client_that_calls_too_often_is_told_to_try_again() {
    let readers = format!(r#"["uid:{NOBODY}"]"#);
    let daemon = Daemon::start_with(&[("CKPTD_ACCESS__READERS", &readers)]);
    let (socket, stop) = (daemon.socket(), AtomicBool::new(false));
    thread::scope(|scope| {
        let calling = scope.spawn(|| {
            // SAFETY: the plain system call changes the user of this thread alone, which ends with this closure.
            let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, NOBODY, -1) };
            assert_eq!(changed, 0);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut client = CheckpointsClient::new(connect(&socket).await);
                let begun = Instant::now();
                while !stop.load(Ordering::Relaxed) && begun.elapsed() < 2 * LIMIT {
                    let _ = client.get_checkpoint(wire::GetCheckpointRequest { checkpoint: "x".into() }).await;
                }
            });
        });
        wait_until("it is told so", LIMIT, || {
            let refused = ctl_as(&daemon, NOBODY, "65534", &["list"]);
            calling.is_finished()
                || refused.code == Some(7)
                    && refused.stderr.contains("times a second")
                    && refused.stderr.contains("try again")
        });
        daemon.ctl(&["list"]).ok();
        stop.store(true, Ordering::Relaxed);
        calling.join().unwrap();
    });
    wait_until("it may ask again", LIMIT, || ctl_as(&daemon, NOBODY, "65534", &["list"]).code == Some(0));
}

async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
}

#[test]
fn an_upload_is_seen_from_both_ends() {
    // Two units: bytes count once a unit of theirs is written.
    const HALF: usize = 8 << 20;
    let daemon = Daemon::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let half = || vec![7_u8; HALF];
    let of = |message| wire::UploadCheckpointRequest { message: Some(message) };
    let (send, messages) = tokio::sync::mpsc::channel(8);
    let say = |message| runtime.block_on(send.send(of(message))).unwrap();
    let start = wire::UploadStart { name: "slow".into(), bytes_total: 2 * HALF as u64, ..Default::default() };
    let file = wire::UploadFile { size_bytes: 2 * HALF as u64, ..Default::default() };
    say(Message::Start(start));
    say(Message::Entry(wire::UploadEntry {
        path: b"w.bin".to_vec(),
        kind: Some(wire::upload_entry::Kind::File(file)),
    }));
    say(Message::Data(half().into()));
    let socket = daemon.socket();
    let answer = runtime.spawn(async move {
        let mut client = CheckpointsClient::new(connect(&socket).await);
        client.upload_checkpoint(tokio_stream::wrappers::ReceiverStream::new(messages)).await
    });
    let total = 2 * HALF as u64;
    wait_until("some of it is here", LIMIT, || {
        let ran = daemon.ctl(&["--json", "get", "slow"]);
        ran.code == Some(0) && ran.json()["fill"]["bytes_done"].as_u64() > Some(0)
    });
    let filling = daemon.json(&["get", "slow"]);
    assert_eq!((&filling["state"], &filling["fill"]["bytes_total"]), (&"filling".into(), &total.into()), "{filling}");
    assert!(filling["fill"]["bytes_done"].as_u64() < Some(total), "{filling}");
    say(Message::Data(half().into()));
    say(Message::Finish(wire::UploadFinish {}));
    drop(send);
    runtime.block_on(answer).unwrap().unwrap();
    assert_eq!(daemon.json(&["get", "slow"])["state"], "ready");

    // The one who sends.
    let sent = daemon.ctl(&["upload", "m", model(&daemon, 1).to_str().unwrap()]).ok();
    assert!(sent.stderr.contains("m: se") && sent.stderr.contains(" of 1.00 MiB"), "{sent}");
}

/// A `ckptctl` that goes on until it is killed.
struct Follower(Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_message_that_is_too_large_is_refused_and_the_connection_goes_on() {
    let daemon = Daemon::start();
    let ask = |bytes: usize| wire::GetCheckpointRequest { checkpoint: "x".repeat(bytes) };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut client = CheckpointsClient::new(connect(&daemon.socket()).await).max_encoding_message_size(usize::MAX);
        for _ in 0..3 {
            let refused = client.get_checkpoint(ask(MESSAGE_BYTES + 1)).await.unwrap_err();
            assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
            assert_eq!(client.get_checkpoint(ask(1)).await.unwrap_err().code(), Code::NotFound);
        }
    });
}

/// A daemon that listens by TCP, with the certificates of some names.
struct Remote {
    daemon: Daemon,
    port: u16,
    certificates: PathBuf,
    _place: Place,
}

impl Remote {
    fn start(names: &[&str], access: &[(&'static str, &str)]) -> Self {
        let place = Place::new();
        let certificates = certificates(&place, names);
        let port = free_port();
        let file = |name: &str| format!("{:?}", certificates.join(name));
        // Whom the daemon believes, and whom its clients believe, are two files.
        fs::copy(certificates.join("ca.pem"), certificates.join("clients.pem")).unwrap();
        let (listen, good, authority) = (format!(r#""127.0.0.1:{port}""#), file("good.pem"), file("clients.pem"));
        let mut env = vec![
            ("CKPTD_TLS__LISTEN", listen.as_str()),
            ("CKPTD_TLS__CERTIFICATE", &good),
            ("CKPTD_TLS__KEY", &good),
            ("CKPTD_TLS__CLIENT_CA", &authority),
        ];
        env.extend_from_slice(access);
        Self { daemon: Daemon::start_with(&env), port, certificates, _place: place }
    }

    fn ctl(&self, certificate: &str, args: &[&str]) -> Ran {
        let shown = self.certificates.join(format!("{certificate}.pem"));
        let mut command = Command::new(CKPTCTL);
        command.arg("--endpoint").arg(format!("https://localhost:{}", self.port));
        command.arg("--tls-certificate").arg(&shown).arg("--tls-key").arg(&shown);
        run(command.arg("--tls-ca").arg(self.certificates.join("ca.pem")).args(args))
    }
}

#[test]
fn by_tcp_a_certificate_is_needed_and_its_name_is_who_asks() {
    let remote = Remote::start(
        &["team-a", "team-b", "sched.example"],
        &[
            ("CKPTD_ACCESS__TENANTS", r#"["name:team-a", "name:team-b"]"#),
            ("CKPTD_ACCESS__SCHEDULERS", r#"["name:sched.example"]"#),
        ],
    );
    let source = model(&remote.daemon, 1);
    let from = source.to_str().unwrap();
    remote.ctl("team-a", &["upload", "m", from]).ok();
    let mine = remote.ctl("team-a", &["--json", "get", "m"]).ok().json();
    assert_eq!(mine["owner"], "team-a");
    remote.ctl("team-b", &["get", "m"]).refused(&[3], &["there is no checkpoint"]);
    remote.ctl("team-b", &["--as", "team-a", "get", "m"]).refused(&[2], &["another owner"]);
    remote.ctl("team-a", &["capture", "j", "--from", from]).refused(&[2], &["a tenant"]);
    remote.ctl("team-a", &["attach", "j", "m"]).refused(&[2], &["a tenant"]);
    remote.ctl("sched.example", &["attach", "j", "m", "--owner", "team-a"]).ok();
    remote.ctl("sched.example", &["release", "j"]).ok();
    remote.ctl("team-a", &["remove", "m", "--yes"]).ok();
    // Of our authority, but in no list; expired; of another authority.
    remote.ctl("good", &["list"]).refused(&[2], &["localhost", "access"]);
    for certificate in ["expired", "foreign"] {
        remote.ctl(certificate, &["list"]).refused(&[2, 7], &["localhost"]);
    }
    // Without a certificate there is no answer at all.
    let url = format!("https://localhost:{}/", remote.port);
    let authority = remote.certificates.join("ca.pem");
    let answer = run(Command::new("curl").args(["-sS", "--http2", "--cacert"]).arg(authority).arg(url));
    assert_ne!(answer.code, Some(0), "{answer}");
}

#[test]
fn clients_of_an_authority_that_is_taken_away_are_let_in_no_more() {
    let remote = Remote::start(&["ops"], &[("CKPTD_ACCESS__OPERATORS", r#"["name:ops"]"#)]);
    remote.ctl("ops", &["list"]).ok();
    let believed = remote.certificates.join("clients.pem");
    let ours = fs::read(&believed).unwrap();
    let others = certificates(remote.daemon.place(), &[]);
    fs::copy(others.join("ca.pem"), &believed).unwrap();
    wait_until("it is refused", LIMIT, || remote.ctl("ops", &["list"]).code != Some(0));
    remote.ctl("ops", &["list"]).refused(&[2, 7], &["localhost"]);
    fs::write(&believed, ours).unwrap();
    wait_until("it is let in again", LIMIT, || remote.ctl("ops", &["list"]).code == Some(0));
}

#[test]
fn renewed_certificates_are_used_without_a_restart_and_broken_ones_change_nothing() {
    let remote = Remote::start(&["ops"], &[("CKPTD_ACCESS__OPERATORS", r#"["name:ops"]"#)]);
    remote.ctl("ops", &["list"]).ok();
    let (good, elsewhere) = (remote.certificates.join("good.pem"), remote.certificates.join("elsewhere.pem"));
    let original = fs::read(&good).unwrap();
    fs::write(&good, "no certificate").unwrap();
    wait_until("the broken file was looked at", LIMIT, || {
        remote.ctl("ops", &["list"]).ok();
        remote.daemon.stderr().contains("those before stay in use")
    });
    // Another that is right, but for another host: ours does not believe it any more.
    fs::write(&good, fs::read(elsewhere).unwrap()).unwrap();
    wait_until("the new certificate is shown", LIMIT, || remote.ctl("ops", &["list"]).code != Some(0));
    fs::write(&good, original).unwrap();
    wait_until("the old one is shown again", LIMIT, || remote.ctl("ops", &["list"]).code == Some(0));
}
