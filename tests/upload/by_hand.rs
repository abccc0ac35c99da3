//! The protocol itself, spoken by hand.

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

use super::*;

const ABSENT: &str = "0b5e7c1e-94a3-4f5c-8d8e-6f0c2b9a7d32";

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
    async fn begin(daemon: &Daemon, owner: Option<&'static str>, messages: impl IntoIterator<Item = Message>) -> Self {
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

async fn get(daemon: &Daemon, owner: Option<&'static str>, id: &str, take_over: bool) -> Result<wire::Upload, Status> {
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

fn directory(path: &str) -> Message {
    let kind = Some(Kind::Directory(wire::UploadDirectory {}));
    Message::Entry(wire::UploadEntry { path: path.into(), kind })
}

fn files_of_one_byte(paths: &str) -> impl Iterator<Item = Message> {
    paths.split(' ').flat_map(|path| [file(path, 1), data(path)]).collect::<Vec<_>>().into_iter()
}

fn kill_and_start(daemon: &mut Daemon) {
    daemon.kill9();
    daemon.restart();
}

#[test]
fn after_a_kill_its_owner_alone_is_told_what_is_durable_and_goes_on_from_there() {
    let mut daemon = Daemon::start();
    let alice = Some("alice");
    let messages = [directory("d"), file("d/b", 3), data("012"), directory("e"), file("f", 5), data("01")];
    block_on(async {
        let sending = Sending::begin(&daemon, alice, [start(ID, None)].into_iter().chain(messages.clone())).await;
        stands_at(&daemon, ID, 4, 2).await;
        // Nobody has to say more for it to become so.
        wait_recorded(&daemon, 3);
        sending.go().await;
    });
    kill_and_start(&mut daemon);
    block_on(async {
        let upload = get(&daemon, alice, ID, true).await.unwrap();
        assert!(!upload.connected && !upload.finished);
        assert_eq!(upload.position, Some(wire::UploadPosition { entries: 2, bytes: 3 }));
        let sent = [&messages[0], &messages[1]].map(|message| {
            let Message::Entry(entry) = message else { unreachable!() };
            entry.clone()
        });
        assert_eq!(upload.present.as_ref(), Some(&sent[1]));
        let listed = sent.map(|entry| prost::Message::encode_length_delimited_to_vec(&entry)).concat();
        assert_eq!(upload.entries_digest, blake3::hash(&listed).as_bytes());
        assert_eq!(get(&daemon, Some("bob"), ID, false).await.unwrap_err().code(), Code::NotFound);
        let bob = Sending::begin(&daemon, Some("bob"), [start(ID, Some((2, 3)))]).await;
        assert_eq!(bob.refusal().await.0, Code::NotFound);
        let too_far = Sending::begin(&daemon, alice, [start(ID, Some((4, 2)))]).await;
        assert_eq!(too_far.refusal().await, wrong_state("UPLOAD_DESYNC"));
        let rest = [start(ID, Some((2, 3))), file("f", 2), data("45"), finish()];
        assert_eq!(Sending::begin(&daemon, alice, rest).await.answer().await.unwrap().logical_bytes, 5);
    });
    let at = daemon.place().dir("at");
    run(daemon.ctl_command().args(["attach", "job", "m", "--owner", "alice", "--at"]).arg(&at)).ok();
    assert_eq!((fs::read(at.join("d/b")).unwrap(), fs::read(at.join("f")).unwrap()), (b"012".into(), b"45".into()));
    assert!(!at.join("e").exists(), "what was not durable is as if it had never come");
}

#[test]
fn what_is_behind_a_gap_is_as_if_it_had_never_come() {
    let mut daemon = Daemon::start();
    block_on(async {
        let behind = [directory("z")].into_iter().chain(files_of_one_byte("c"));
        let messages = [start(ID, None)].into_iter().chain(files_of_one_byte("a b")).chain(behind);
        let sending = Sending::begin(&daemon, None, messages).await;
        stands_at(&daemon, ID, 4, 1).await;
        wait_recorded(&daemon, 3);
        sending.go().await;
    });
    daemon.kill9();
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    // As where `b` is sealed after the others, and was not yet.
    assert_eq!(catalog.execute("DELETE FROM sent WHERE position = 1", []).unwrap(), 1);
    daemon.restart();
    block_on(async {
        let upload = get(&daemon, None, ID, false).await.unwrap();
        assert_eq!(upload.position, Some(wire::UploadPosition { entries: 1, bytes: 1 }));
        let rest = [start(ID, Some((1, 1)))].into_iter().chain(files_of_one_byte("x"));
        let sending = Sending::begin(&daemon, None, rest).await;
        wait_recorded(&daemon, 2);
        sending.go().await;
    });
    kill_and_start(&mut daemon);
    block_on(async {
        let upload = get(&daemon, None, ID, false).await.unwrap();
        assert_eq!(upload.position, Some(wire::UploadPosition { entries: 2, bytes: 1 }));
        let last = Sending::begin(&daemon, None, [start(ID, Some((2, 1))), finish()]).await;
        assert_eq!(last.answer().await.unwrap().logical_bytes, 2);
    });
    let at = daemon.attach("job", "m");
    let mut names: Vec<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "x"]);
    wait_until("what was sealed of the others is gone", LIMIT, || {
        catalog.query_row("SELECT COUNT(*) FROM blobs", [], |row| row.get::<_, i64>(0)).unwrap() == 2
    });
}

#[test]
fn without_an_id_nothing_is_kept_over_a_start() {
    let mut daemon = Daemon::start();
    block_on(async {
        let sending =
            Sending::begin(&daemon, None, [start("", None)].into_iter().chain(files_of_one_byte("a b"))).await;
        wait_until("some of it is sealed", LIMIT, || {
            daemon.rows("list").iter().any(|row| row["fill"]["files_done"].as_u64() == Some(2))
        });
        daemon.kill9();
        sending.go().await;
    });
    daemon.restart();
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    daemon.wait_empty("blobs");
}

#[test]
fn of_many_that_a_dead_daemon_left_those_wait_of_which_most_is_here() {
    let mut daemon = Daemon::start();
    let ids: Vec<_> = (0..=limits::UPLOADS_LEFT).map(|number| format!("left-{number}")).collect();
    block_on(async {
        let mut sending = Vec::new();
        for (number, id) in ids.iter().enumerate() {
            let files = if number == 3 { "a" } else { "a b" };
            let messages = [start(id, None)].into_iter().chain(files_of_one_byte(files));
            sending.push(Sending::begin(&daemon, None, messages).await);
        }
        let sealed = |row: &serde_json::Value| row["fill"]["files_done"].as_u64().unwrap_or(0);
        wait_until("all of it is sealed", LIMIT, || {
            daemon.rows("list").iter().map(sealed).sum::<u64>() == 2 * ids.len() as u64 - 1
        });
        daemon.kill9();
        for sending in sending {
            sending.go().await;
        }
    });
    daemon.restart();
    wait_until("one makes way", LIMIT, || daemon.rows("list").len() == limits::UPLOADS_LEFT);
    assert!(daemon.rows("list").iter().all(|row| row["id"] != ids[3].as_str()));
    block_on(async {
        assert_eq!(left_at(&daemon, &ids[0], 2, 1).await.id, ids[0]);
    });
}

#[test]
fn an_archive_that_is_sent_alone_is_taken_apart_while_it_comes() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    for (name, bytes) in [("a.bin", 5 * MIB), ("b.bin", 6 * MIB)] {
        random_file(&source.join(name), seed() + bytes, bytes);
    }
    let archive = daemon.place().join("m.tar");
    run(std::process::Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&source).args(["a.bin", "b.bin"]))
        .ok();
    let bytes = fs::read(&archive).unwrap();
    let alone = |id: &str| {
        let Message::Start(start) = start(id, None) else { unreachable!() };
        Message::Start(wire::UploadStart { one_file: true, name: id.into(), ..start })
    };
    // The first member, and some of the second.
    let pieces: Vec<_> = bytes.chunks(1 << 20).map(|piece| Message::Data(piece.to_vec().into())).collect();
    let (first, rest) = pieces.split_at(7);
    let entry = file("m.tar", bytes.len() as u64);
    let begun = [alone(ID), entry.clone()].into_iter().chain(first.to_vec());
    block_on(async {
        let sending = Sending::begin(&daemon, None, begun).await;
        let blobs = daemon.state().join("blobs");
        while support::files::regular_files(&blobs).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for message in rest.iter().cloned().chain([finish()]) {
            sending.out.send(wire::UploadCheckpointRequest { message: Some(message) }).await.unwrap();
        }
        assert_eq!(sending.answer().await.unwrap().files, 2);

        let begun = [alone(ABSENT), entry].into_iter().chain(first.to_vec());
        let sending = Sending::begin(&daemon, None, begun).await;
        for message in rest.iter().cloned().chain([file("more", 1), data("x"), finish()]) {
            // It may have been refused already.
            let _ = sending.out.send(wire::UploadCheckpointRequest { message: Some(message) }).await;
        }
        assert_eq!(sending.refusal().await, (Code::InvalidArgument, "BAD_UPLOAD".to_owned()));
    });
    assert_mounted(&source, &daemon.attach("reader", ID));
}
