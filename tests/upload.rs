//! An upload outlives its connection: it goes on where it broke, and what nobody goes on with goes.

#![cfg(test)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ckptd::control::wire;
use ckptd::control::wire::checkpoints_client::CheckpointsClient;
use ckptd::control::wire::upload_checkpoint_request::Message;
use ckptd::control::wire::upload_entry::Kind;
use ckptd::limits;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use support::corpus::{random_file, seed};
use support::daemon::Daemon;
use support::files::assert_mounted;
use support::ran::{run, wait_until};
use support::way::{Break, Client, Way};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// What the daemon may have received of a connection and not taken when it breaks: a window of HTTP/2, and what the sockets hold.
const IN_FLIGHT: u64 = 9 * MIB;

const ID: &str = "0b5e7c1e-94a3-4f5c-8d8e-6f0c2b9a7d31";
const ABSENT: &str = "0b5e7c1e-94a3-4f5c-8d8e-6f0c2b9a7d32";

/// A tree with a large file between small ones, and its size.
fn tree(daemon: &Daemon) -> (PathBuf, u64) {
    let source = daemon.place().dir("source");
    fs::create_dir_all(source.join("d/empty")).unwrap();
    for number in 0..40 {
        random_file(&source.join(format!("d/{number:02}")), seed() + number, MIB + number);
    }
    random_file(&source.join("e.bin"), seed() + 99, 80 * MIB + 5);
    std::os::unix::fs::symlink("e.bin", source.join("f.link")).unwrap();
    for number in 0..20 {
        random_file(&source.join(format!("g{number:02}")), seed() + 100 + number, number * 50_000);
    }
    let size = support::files::regular_files(&source).iter().map(|file| file.metadata().unwrap().len()).sum();
    (source, size)
}

fn upload<'a>(source: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["upload", "m", source.to_str().unwrap()], more].concat()
}

fn assert_arrived(daemon: &Daemon, source: &Path) {
    let record = daemon.json(&["get", "m"]);
    assert_eq!(record["state"], "ready", "{record}");
    assert_mounted(source, &daemon.attach("reader", "m"));
}

fn nothing_is_left(daemon: &Daemon) -> bool {
    daemon.rows("list").is_empty() && fs::read_dir(daemon.state().join("filling")).unwrap().next().is_none()
}

/// A client of which the daemon has `bytes` at least, and gets no more.
fn stalled(daemon: &Daemon, way: &Way, source: &Path, more: &[&str], bytes: u64) -> Client {
    let client = way.spawn(&upload(source, more));
    wait_until("some of it is here", LIMIT, || {
        let rows = daemon.rows("list");
        rows.iter().any(|row| row["name"] == "m" && row["fill"]["bytes_done"].as_u64() >= Some(bytes))
    });
    client
}

#[test]
fn an_upload_goes_on_after_each_break_and_sends_nothing_again_but_what_was_in_flight() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let cuts = [20 * MIB, 15 * MIB + 7, 30, 20 * MIB, 12 * MIB, 25 * MIB, 25 * MIB].map(Break::Cut);
    let way = Way::to(&daemon, &cuts);
    let ran = run(&mut way.command(&upload(&source, &[]))).ok();
    assert!(way.is_mended(), "{ran}");
    assert!(ran.stderr.matches("going on with the upload").count() >= 3, "{ran}");
    assert!(!ran.stderr.contains("sent again"), "{ran}");
    let most = size + size / 10 + cuts.len() as u64 * IN_FLIGHT;
    assert!(way.passed() <= most, "{} bytes passed for {size}\n{ran}", way.passed());
    assert_arrived(&daemon, &source);
}

#[test]
fn a_connection_that_only_the_client_saw_break_is_taken_over() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::HalfOpen(50 * MIB), Break::HalfOpen(30 * MIB)]);
    let ran = run(&mut way.command(&upload(&source, &[]))).ok();
    assert_eq!(ran.stderr.matches("going on with the upload").count(), 2, "{ran}");
    assert!(way.passed() <= size + size / 10 + 2 * IN_FLIGHT, "{} bytes passed for {size}", way.passed());
    assert_arrived(&daemon, &source);
}

#[test]
fn the_same_command_goes_on_after_its_client_was_killed() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    stalled(&daemon, &way, &source, &["--id", ID], 40 * MIB).kill();
    let before = way.passed();
    let ran = run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert!(ran.stderr.contains("going on with the upload"), "{ran}");
    let again = way.passed() - before;
    assert!(again <= size - 40 * MIB + MIB, "{again} bytes of {size} were sent after 40 MiB were there\n{ran}");
    assert_arrived(&daemon, &source);
    // Once more: it is there.
    run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert_eq!(daemon.rows("list").len(), 1);
}

#[test]
fn with_a_daemon_that_was_killed_and_started_again_it_begins_anew() {
    let mut daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let client = stalled(&daemon, &way, &source, &[], 40 * MIB);
    let id = daemon.rows("list")[0]["id"].clone();
    daemon.kill9();
    daemon.restart();
    let ran = client.ended().ok();
    assert!(ran.stderr.contains("does not know the upload any more"), "{ran}");
    assert_arrived(&daemon, &source);
    assert_eq!(daemon.json(&["get", "m"])["id"], id);
}

#[test]
fn a_tree_that_changed_meanwhile_is_refused_and_nothing_stays() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    // The file in the middle of which it broke; one that was sent before; a name that comes before.
    for (path, named) in [("e.bin", "e.bin changed"), ("d/05", "changed since"), ("d/01.new", "changed since")] {
        let way = Way::to(&daemon, &[Break::Stall(80 * MIB)]);
        let client = stalled(&daemon, &way, &source, &[], 56 * MIB);
        let file = fs::File::options().create(true).append(true).open(source.join(path)).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        way.cut();
        client.ended().refused(&[4], &[named, "upload it again"]);
        wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    }
}

#[test]
fn ctrl_c_ends_the_upload_and_nothing_of_it_is_kept() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let client = stalled(&daemon, &way, &source, &[], 40 * MIB);
    client.interrupt();
    client.ended().refused(&[130], &["interrupted", "nothing of the upload is kept"]);
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
}

#[test]
fn an_upload_that_is_left_goes_after_the_idle_time() {
    // A sender that stalls is silent too, and is to be seen before it has been for so long.
    let daemon = Daemon::start_with(&[("CKPTD_HTTP__UPLOAD_IDLE_S", "5")]);
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    stalled(&daemon, &way, &source, &["--owner", "alice"], 40 * MIB).kill();
    wait_until("it expires", LIMIT, || nothing_is_left(&daemon));
    wait_until("its owner is told", LIMIT, || {
        let events = run(daemon.ctl_command().args(["--as", "alice", "events"])).ok().stdout;
        events.contains("UPLOAD_EXPIRED") && events.contains("silent for 5 s")
    });
}

#[test]
fn an_upload_that_is_left_is_removed_at_once_and_holds_up_no_drain() {
    let mut daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let leave = |daemon: &Daemon| {
        let way = Way::to(daemon, &[Break::Stall(60 * MIB)]);
        stalled(daemon, &way, &source, &["--id", ID], 40 * MIB).kill();
        assert_eq!(daemon.json(&["get", ID])["state"], "filling");
    };
    leave(&daemon);
    daemon.ctl(&["remove", ID, "--yes"]).ok();
    assert!(daemon.rows("list").is_empty());
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    leave(&daemon);
    daemon.ctl(&["drain"]).ok();
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    daemon.stop();
    daemon.restart();
    leave(&daemon);
    daemon.stop();
    daemon.restart();
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    daemon.ctl(&upload(&source, &["--id", ID])).ok();
    assert_arrived(&daemon, &source);
}

#[test]
fn another_command_with_the_id_waits_for_nobody_who_still_sends() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let first = stalled(&daemon, &way, &source, &["--id", ID], 40 * MIB);
    daemon.ctl(&upload(&source, &["--id", ID])).refused(&[4], &["is being uploaded already"]);
    way.cut();
    first.ended().ok();
    assert_arrived(&daemon, &source);
}

/// The protocol itself, spoken by hand.
mod by_hand {
    use super::*;

    async fn connect(daemon: &Daemon) -> CheckpointsClient<Channel> {
        let socket = daemon.socket();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
        CheckpointsClient::new(channel)
    }

    fn block_on(test: impl Future<Output = ()>) {
        tokio::runtime::Runtime::new().unwrap().block_on(async { tokio::time::timeout(LIMIT, test).await.unwrap() });
    }

    fn start(id: &str, resume: Option<(u64, u64)>) -> Message {
        let resume = resume.map(|(entries, bytes)| wire::UploadPosition { entries, bytes });
        Message::Start(wire::UploadStart { id: id.into(), name: "m".into(), resume, ..Default::default() })
    }

    fn file(path: &str, size_bytes: u64) -> Message {
        let file = wire::UploadFile { size_bytes, modified_unix_ns: 7, ..Default::default() };
        Message::Entry(wire::UploadEntry { path: path.into(), kind: Some(Kind::File(file)) })
    }

    fn data(text: &str) -> Message {
        Message::Data(text.to_owned().into())
    }

    fn finish() -> Message {
        Message::Finish(wire::UploadFinish {})
    }

    /// One call, its end open until it is dropped.
    struct Sending {
        out: mpsc::Sender<wire::UploadCheckpointRequest>,
        answer: tokio::task::JoinHandle<Result<tonic::Response<wire::Checkpoint>, Status>>,
    }

    impl Sending {
        async fn begin(
            daemon: &Daemon,
            owner: Option<&'static str>,
            messages: impl IntoIterator<Item = Message>,
        ) -> Self {
            let (out, sent) = mpsc::channel(16);
            for message in messages {
                out.send(wire::UploadCheckpointRequest { message: Some(message) }).await.unwrap();
            }
            let mut client = connect(daemon).await;
            let answer = tokio::spawn(async move {
                let mut request = Request::new(ReceiverStream::new(sent));
                for_owner(&mut request, owner);
                client.upload_checkpoint(request).await
            });
            Self { out, answer }
        }

        async fn answer(self) -> Result<wire::Checkpoint, Status> {
            let answer = self.answer.await.unwrap().map(tonic::Response::into_inner);
            drop(self.out);
            answer
        }

        async fn refusal(self) -> (Code, String) {
            let status = self.answer().await.unwrap_err();
            (status.code(), status.get_details_error_info().map(|info| info.reason).unwrap_or_default())
        }

        /// Goes away without a word.
        async fn go(self) {
            self.answer.abort();
            let _ = self.answer.await;
        }
    }

    fn for_owner<T>(request: &mut Request<T>, owner: Option<&'static str>) {
        if let Some(owner) = owner {
            request.metadata_mut().insert(wire::OWNER_METADATA, owner.parse().unwrap());
        }
    }

    async fn get(
        daemon: &Daemon,
        owner: Option<&'static str>,
        id: &str,
        take_over: bool,
    ) -> Result<wire::Upload, Status> {
        let mut request = Request::new(wire::GetUploadRequest { id: id.into(), take_over });
        for_owner(&mut request, owner);
        connect(daemon).await.get_upload(request).await.map(tonic::Response::into_inner)
    }

    /// Waits until the daemon has taken so much; whether somebody is heard.
    async fn stands_at(daemon: &Daemon, id: &str, entries: u64, bytes: u64) -> wire::Upload {
        loop {
            if let Ok(upload) = get(daemon, None, id, false).await
                && upload.position == Some(wire::UploadPosition { entries, bytes })
            {
                return upload;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn left_at(daemon: &Daemon, id: &str, entries: u64, bytes: u64) -> wire::Upload {
        loop {
            let upload = stands_at(daemon, id, entries, bytes).await;
            if !upload.connected {
                return upload;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn wrong_state(reason: &str) -> (Code, String) {
        (Code::FailedPrecondition, reason.to_owned())
    }

    #[test]
    fn each_sender_goes_on_exactly_where_the_one_before_stopped() {
        let daemon = Daemon::start();
        block_on(async {
            // In the middle of a file.
            let first = Sending::begin(&daemon, None, [start(ID, None), file("a", 5), data("01")]).await;
            let upload = stands_at(&daemon, ID, 1, 2).await;
            assert!(upload.connected && !upload.finished);
            let Message::Entry(sent) = file("a", 5) else { unreachable!() };
            assert_eq!(upload.present.as_ref(), Some(&sent));
            let listed = prost::Message::encode_length_delimited_to_vec(&sent);
            assert_eq!(upload.entries_digest, blake3::hash(&listed).as_bytes());
            // While it is heard, another is not, but the one that is right takes its place.
            let second = Sending::begin(&daemon, None, [start(ID, None)]).await;
            assert_eq!(second.refusal().await, wrong_state("UPLOAD_UNDER_WAY"));
            for wrong in [(0, 0), (1, 1), (1, 3), (2, 0)] {
                let wrong = Sending::begin(&daemon, None, [start(ID, Some(wrong))]).await;
                assert_eq!(wrong.refusal().await, wrong_state("UPLOAD_DESYNC"));
            }
            let second = Sending::begin(&daemon, None, [start(ID, Some((1, 2))), data("2")]).await;
            assert_eq!(first.refusal().await, wrong_state("UPLOAD_TAKEN_OVER"));
            stands_at(&daemon, ID, 1, 3).await;
            // At the end of a file; what a sender says that was taken over does not count.
            let upload = get(&daemon, None, ID, true).await.unwrap();
            assert!(!upload.connected && upload.position == Some(wire::UploadPosition { entries: 1, bytes: 3 }));
            assert_eq!(second.refusal().await, wrong_state("UPLOAD_TAKEN_OVER"));
            let third = Sending::begin(&daemon, None, [start(ID, Some((1, 3))), data("34")]).await;
            stands_at(&daemon, ID, 1, 5).await;
            third.go().await;
            left_at(&daemon, ID, 1, 5).await;
            // Right behind an entry.
            let fourth = Sending::begin(&daemon, None, [start(ID, Some((1, 5))), file("b", 2)]).await;
            stands_at(&daemon, ID, 2, 0).await;
            fourth.go().await;
            left_at(&daemon, ID, 2, 0).await;
            let last = Sending::begin(&daemon, None, [start(ID, Some((2, 0))), data("56"), finish()]).await;
            assert_eq!(last.answer().await.unwrap().logical_bytes, 7);
            // Whoever lost the answer is told again.
            let again = Sending::begin(&daemon, None, [start(ID, Some((2, 2)))]).await;
            assert_eq!(again.answer().await.unwrap().id, ID);
            assert_eq!(get(&daemon, None, ID, false).await.unwrap_err().code(), Code::FailedPrecondition);
        });
        let at = daemon.attach("job", "m");
        assert_eq!((fs::read(at.join("a")).unwrap(), fs::read(at.join("b")).unwrap()), (b"01234".into(), b"56".into()));
    }

    #[test]
    fn without_an_id_an_upload_ends_with_its_connection() {
        let daemon = Daemon::start();
        block_on(async {
            let sending = Sending::begin(&daemon, None, [start("", None), file("a", 5), data("01")]).await;
            wait_until("it is under way", LIMIT, || !daemon.rows("list").is_empty());
            sending.go().await;
        });
        wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    }

    #[test]
    fn who_begins_anew_takes_the_place_of_what_was_left() {
        let daemon = Daemon::start();
        block_on(async {
            let left = Sending::begin(&daemon, None, [start(ID, None), file("a", 5), data("01")]).await;
            stands_at(&daemon, ID, 1, 2).await;
            left.go().await;
            left_at(&daemon, ID, 1, 2).await;
            let anew = Sending::begin(&daemon, None, [start(ID, None), file("b", 1), data("x"), finish()]).await;
            assert_eq!(anew.answer().await.unwrap().logical_bytes, 1);
        });
        assert_eq!(daemon.rows("list").len(), 1);
    }

    #[test]
    fn another_owner_can_neither_ask_for_an_upload_nor_go_on_with_it() {
        let daemon = Daemon::start();
        block_on(async {
            let alice = Some("alice");
            let sending = Sending::begin(&daemon, alice, [start(ID, None), file("a", 5), data("01")]).await;
            stands_at(&daemon, ID, 1, 2).await;
            let said = |status: Status, id: &str| {
                let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
                (status.code(), reason, status.message().replace(id, "ID"))
            };
            for take_over in [false, true] {
                let ask = |id| get(&daemon, Some("bob"), id, take_over);
                let there = said(ask(ID).await.unwrap_err(), ID);
                assert_eq!(there, said(ask(ABSENT).await.unwrap_err(), ABSENT));
                assert_eq!((there.0, there.1.as_str()), (Code::NotFound, "NO_SUCH_CHECKPOINT"));
            }
            for at in [(1, 2), (0, 0)] {
                let resume = |id| Sending::begin(&daemon, Some("bob"), [start(id, Some(at)), data("x")]);
                let there = said(resume(ID).await.answer().await.unwrap_err(), ID);
                assert_eq!(there, said(resume(ABSENT).await.answer().await.unwrap_err(), ABSENT));
                assert_eq!(there.0, Code::NotFound);
            }
            // It was neither taken over nor moved on.
            assert!(stands_at(&daemon, ID, 1, 2).await.connected);
            assert!(get(&daemon, alice, ID, false).await.unwrap().connected);
            let rest = [data("234"), finish()].map(|message| wire::UploadCheckpointRequest { message: Some(message) });
            for message in rest {
                sending.out.send(message).await.unwrap();
            }
            assert_eq!(sending.answer().await.unwrap().owner, "alice");
        });
    }

    #[test]
    fn of_many_that_are_left_those_left_first_make_way() {
        let daemon = Daemon::start();
        block_on(async {
            let ids: Vec<_> = (0..=limits::UPLOADS_LEFT).map(|number| format!("left-{number}")).collect();
            for id in &ids {
                let sending = Sending::begin(&daemon, None, [start(id, None), file("a", 5), data("01")]).await;
                stands_at(&daemon, id, 1, 2).await;
                sending.go().await;
                if *id != ids[limits::UPLOADS_LEFT] {
                    left_at(&daemon, id, 1, 2).await;
                }
            }
            wait_until("the first is gone", LIMIT, || daemon.rows("list").len() == limits::UPLOADS_LEFT);
            assert!(daemon.rows("list").iter().all(|row| row["id"] != ids[0].as_str()));
            wait_until("an event says so", LIMIT, || daemon.ctl(&["events"]).ok().stdout.contains("UPLOAD_EXPIRED"));
        });
    }
}
