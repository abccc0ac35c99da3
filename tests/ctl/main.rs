//! The real `ckptctl` against a daemon with canned answers: what it prints, what it sends, how it ends.

#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod stub;

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use ckptd::control::wire::upload_entry::Kind;
use ckptd::control::wire::{UploadDirectory, UploadFile};
use serde_json::{Value, json};
use stub::{Sent, Stub};
use tempfile::TempDir;

struct Host {
    stub: Stub,
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { stub: Stub::start(directory.path()), directory }
    }

    fn command(&self, line: &str) -> Command {
        ckptctl(&self.stub.endpoint(), line)
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    fn spawn(&self, line: &str) -> Child {
        self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn calls(&self) -> Vec<String> {
        self.stub.asked().calls.clone()
    }
}

fn ckptctl(endpoint: &str, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckptctl"));
    command.env("CKPTD_ENDPOINT", endpoint).args(line.split_whitespace()).stdin(Stdio::null());
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn document(output: &Output) -> Value {
    assert_eq!(code(output), 0, "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn looking_answers_with_one_document_and_no_talk() {
    let host = Host::new();
    for (line, pointer, expected) in [
        ("get good --json", "/state", json!("ready")),
        ("get good --json", "/created_at", json!("2023-11-14T22:13:20.000Z")),
        ("get good --json", "/source/uri", json!("https://x/y")),
        ("--json list", "/checkpoints/0/state", json!("filling")),
        ("--json list --owner me --public", "/checkpoints/0/fill/bytes_done", json!(43)),
        ("--json list", "/checkpoints/1/fill", Value::Null),
        ("--json jobs", "/jobs/0/env/ML_CHECKPOINT_PATH", json!("/t")),
        ("--json detach j", "/state", json!("reserved")),
        ("--json release j", "/job", json!("j")),
        ("--json rename a b", "/name", json!("b")),
        ("--json retry a", "/state", json!("filling")),
        ("--json usage", "/logical_bytes", json!(10)),
        ("--json status", "/features/passthrough", json!(true)),
        ("--json events", "/events/1/id", json!(2)),
        ("--json scrub m --full-rate", "/running", json!(true)),
    ] {
        let output = host.run(line);
        assert_eq!(document(&output).pointer(pointer), Some(&expected), "{line} {pointer}");
        assert_eq!(stderr(&output), "", "{line}");
    }
}

#[test]
fn people_get_tables() {
    let host = Host::new();
    let list = stdout(&host.run("list"));
    assert!(list.starts_with("ID"), "{list}");
    assert!(list.contains("downloading 43 %") && list.contains("3.00 GiB"), "{list}");
    assert!(stdout(&host.run("jobs")).contains("attached"));
    assert!(stdout(&host.run("status")).contains("passthrough  yes"));
    assert_eq!(stdout(&host.run("events --after 1")).lines().count(), 1);
}

/// Ends `child` and gives what it had said so far.
fn stopped(mut child: Child) -> Output {
    child.kill().unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn following_goes_on_after_the_daemon_and_repeats_nothing() {
    let host = Host::new();
    let child = host.spawn("events --follow --after 1");
    // Each stream of the stub ends: the second is asked for from where the first ended.
    host.stub.await_call("WatchEventsRequest { after_id: 2, follow: true }");
    let output = stopped(child);
    assert_eq!(stdout(&output).lines().count(), 1);
    assert!(stderr(&output).contains("waiting for it to come back"), "{}", stderr(&output));

    let child = host.spawn("watch --json");
    host.stub.await_calls(2, "WatchCheckpointsRequest");
    let lines = stdout(&stopped(child));
    assert!(lines.lines().count() >= 3, "{lines}");
}

#[test]
fn refusals_end_with_their_sentence_and_exit_code() {
    let host = Host::new();
    for (grpc, exit) in [(3, 2), (7, 2), (5, 3), (9, 4), (6, 4), (8, 5), (15, 6), (14, 7), (13, 1)] {
        let output = host.run(&format!("get refuse-{grpc} --json"));
        assert_eq!(code(&output), exit, "{grpc}");
        assert_eq!(stderr(&output), "ckptctl: no such luck; do better\n");
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn a_wrong_command_line_is_exit_2() {
    for line in ["", "levitate", "get", "create m --uri hf:a/b --owner me --public", "create m --uri s3://b/p"] {
        let output = ckptctl("unix:/nonexistent", line).output().unwrap();
        assert_eq!(code(&output), 2, "{line}: {}", stderr(&output));
    }
}

#[test]
fn nobody_at_the_socket_is_unavailable_and_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let endpoint = format!("unix:{}", socket.display());
    let missing = ckptctl(&endpoint, "status").output().unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let refused = ckptctl(&endpoint, "status").output().unwrap();
    for output in [missing, refused] {
        assert_eq!(code(&output), 7);
        let text = stderr(&output);
        assert!(text.starts_with(&format!("ckptctl: connecting to ckptd at {endpoint}: ")), "{text}");
        assert!(text.ends_with("; is ckptd running? start it with `ckptd serve` or give --endpoint\n"), "{text}");
    }
    assert_eq!(code(&ckptctl("https://host:1", "status").output().unwrap()), 2);
}

#[test]
fn create_sends_what_was_given_and_returns_at_once() {
    let host = Host::new();
    let mut command =
        host.command("--json create endless --type huggingface --uri a/b --option branch=main --owner me --id x");
    let output = command.args(["--credential", "token=env:A_TOKEN"]).env("A_TOKEN", "hunter2").output().unwrap();
    assert_eq!(document(&output)["state"], "new");
    let call = host.calls().concat();
    for part in
        [r#"id: "x""#, r#"owner: "me""#, r#"type: "huggingface""#, r#"{"branch": "main"}"#, r#"{"token": "hunter2"}"#]
    {
        assert!(call.contains(part), "{part} is not in {call}");
    }
}

#[test]
fn create_wait_shows_progress_and_ends_with_the_ready_record() {
    let host = Host::new();
    let output = host.run("--json create good --uri hf:a/b --wait");
    assert_eq!(document(&output)["state"], "ready");
    assert_eq!(stderr(&output), "created good\ngood: downloading 25 %, 25 B of 100 B, 25 B/s, 3 s left\n");
    let output = host.run("create good --uri hf:a/b --wait");
    assert_eq!(stdout(&output), "good ready: 3 files, 3.00 GiB, 2.00 GiB unique, 1.00 GiB on disk\n");
}

#[test]
fn a_checkpoint_that_fails_while_waited_for_ends_with_its_error() {
    let host = Host::new();
    for line in ["create bad --uri hf:a/b --wait", "watch bad"] {
        let output = host.run(line);
        assert_eq!(code(&output), 5, "{line}");
        assert_eq!(stdout(&output), "");
        let last = stderr(&output).lines().last().unwrap().to_owned();
        assert_eq!(last, "ckptctl: filling bad: 5 GiB are missing; remove a checkpoint");
    }
}

#[test]
fn watch_json_is_one_object_a_line() {
    let host = Host::new();
    let output = host.run("watch good --json");
    assert_eq!((code(&output), stderr(&output).as_str()), (0, ""));
    let states: Vec<_> =
        stdout(&output).lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["state"].clone()).collect();
    assert_eq!(states, ["filling", "filling", "ready"]);
}

#[test]
fn an_interrupted_wait_says_what_goes_on() {
    let host = Host::new();
    let child = host.spawn("create endless --uri hf:a/b --wait");
    host.stub.await_call("WatchCheckpointsRequest");
    interrupt_when_it_listens(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 130);
    let text = stderr(&output);
    let expected = "ckptctl: interrupted; endless goes on filling; `ckptctl watch endless` follows it\n";
    assert!(text.ends_with(expected), "{text}");
}

/// Interrupts once the child catches SIGINT, which it does when it begins to wait.
fn interrupt_when_it_listens(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    loop {
        let text = std::fs::read_to_string(&status).unwrap();
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
        if caught & (1 << (libc::SIGINT - 1)) != 0 {
            break;
        }
        std::thread::yield_now();
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

#[test]
fn a_wait_survives_the_daemon() {
    let Host { stub, directory } = Host::new();
    let child = ckptctl(&stub.endpoint(), "--json watch endless")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    stub.await_call("WatchCheckpointsRequest");
    drop(stub);
    let successor = Stub::start(directory.path());
    successor.await_call("WatchCheckpointsRequest");
    interrupt_when_it_listens(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 130);
    assert_eq!(stderr(&output).matches("waiting for it to come back").count(), 1, "{}", stderr(&output));
}

#[test]
fn upload_sends_the_tree_as_it_is() {
    let host = Host::new();
    let root = host.directory.path().join("tree");
    let big: Vec<u8> = (0..3_u32 << 19).flat_map(|at| at.to_le_bytes()).take((5 << 19) + 1).collect();
    let odd = Path::new(std::ffi::OsStr::from_bytes(b"odd \xff\n%41+#"));
    std::fs::create_dir_all(root.join("empty")).unwrap();
    std::fs::write(root.join("big"), &big).unwrap();
    std::fs::write(root.join("run"), "#!").unwrap();
    std::fs::set_permissions(root.join("run"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(root.join(odd), "").unwrap();
    symlink("../gone", root.join("link")).unwrap();

    let mut command = host.command("--json upload model --owner me");
    let output = command.arg(&root).output().unwrap();
    assert_eq!(document(&output)["state"], "ready");

    let entry = |path: &[u8], kind, content: &[u8]| Sent { path: path.to_vec(), kind, content: content.to_vec() };
    let file = |size_bytes, executable| Kind::File(UploadFile { size_bytes, executable, modified_unix_ns: 0 });
    let expected = [
        entry(b"big", file(big.len() as u64, false), &big),
        entry(b"empty", Kind::Directory(UploadDirectory {}), b""),
        entry(b"link", Kind::Symlink(b"../gone".to_vec()), b""),
        entry(b"odd \xff\n%41+#", file(0, false), b""),
        entry(b"run", file(2, true), b"#!"),
    ];
    let asked = host.stub.asked();
    assert!(asked.sent == expected, "{:?}", asked.sent.iter().map(|sent| &sent.path).collect::<Vec<_>>());
    let start = asked.start.clone().unwrap();
    assert_eq!((start.name.as_str(), start.owner.as_str(), start.bytes_total), ("model", "me", big.len() as u64 + 2));
    assert!(start.origin.ends_with(&format!(":{}", root.display())), "{}", start.origin);
}

#[test]
fn an_upload_that_the_daemon_refuses_ends_with_its_words() {
    let host = Host::new();
    let big = host.directory.path().join("big");
    std::fs::File::create(&big).unwrap().set_len(64 << 20).unwrap();
    let output = host.command("upload refuse-8").arg(&big).output().unwrap();
    assert_eq!((code(&output), stderr(&output).lines().last()), (5, Some("ckptctl: no such luck; do better")));
    assert_eq!(code(&host.run("upload m /nonexistent/model")), 3);
}

#[test]
fn an_upload_that_cannot_be_read_to_its_end_is_not_finished() {
    let host = Host::new();
    // Files of /proc state no size and have content, those of /sys state a page and have less: both are another than stated.
    for kernels in ["/proc/version", "/sys/kernel/uevent_seqnum"] {
        let output = host.run(&format!("upload m {kernels}"));
        assert_eq!((code(&output), stdout(&output).as_str()), (4, ""));
        let text = stderr(&output);
        assert!(text.contains(&format!("ckptctl: {kernels} changed while it was sent; ")), "{text}");
    }
    let odd = host.directory.path().join("tree");
    std::fs::create_dir(&odd).unwrap();
    nix::unistd::mkfifo(&odd.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let output = host.command("upload m").arg(&odd).output().unwrap();
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("/pipe is not a file, directory or symbolic link"), "{}", stderr(&output));
}

#[test]
fn capture_makes_the_path_absolute_and_waits() {
    let host = Host::new();
    let mut command = host.command("--json capture j1 --from out --worker 2 --workers 4 --job-name Train");
    let output = command.current_dir(host.directory.path()).output().unwrap();
    assert_eq!(document(&output)["state"], "ready");
    let call = host.calls().concat();
    let here = host.directory.path().canonicalize().unwrap();
    assert!(call.contains(&format!("directory: {:?}", here.join("out"))), "{call}");
    assert!(call.contains("worker: 2, workers: 4"), "{call}");
}

#[test]
fn attach_tells_the_terms_on_stderr_and_the_path_on_stdout() {
    let host = Host::new();
    let output = host.run("attach j1 good --public-checkpoint other --at /t --pid 7 --lazy --owner me");
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains("ML_CHECKPOINT_PATH=/t\n"), "{}", stdout(&output));
    assert_eq!(stderr(&output), "by attaching you accept: a licence\n");
    let call = host.calls().concat();
    assert!(call.contains(r#"target: "/t", pid: 7, owner: "me", lazy: true"#), "{call}");
    assert!(call.contains(r#"checkpoint: "other", public: true"#), "{call}");
    assert_eq!(document(&host.run("--json reserve j1 good"))["state"], "reserved");
}

#[test]
fn remove_does_nothing_unasked() {
    let host = Host::new();
    let output = host.run("remove good");
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).ends_with("; give --yes if you mean it\n"), "{}", stderr(&output));
    assert_eq!(host.calls(), [""; 0]);
    let output = host.run("--json remove good --yes");
    assert_eq!(document(&output), json!({"id": "c1", "freed_bytes": 1 << 20, "freeing": false}));
    assert_eq!(code(&host.run("remove refuse-9 --yes")), 4);
}

#[test]
fn a_reader_that_has_gone_ends_the_run_quietly() {
    let host = Host::new();
    for line in ["list", "list --json", "watch good --json", "events --follow"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output =
            host.command(line).stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!((code(&output), stderr(&output).as_str()), (0, ""), "{line}");
    }
}

#[test]
fn the_catalogue_is_listed_and_made_from() {
    let host = Host::new();
    let output = host.run("catalog");
    for words in ["tiny", "huggingface acme/tiny branch=half", "https://hub.example/acme/tiny"] {
        assert!(stdout(&output).contains(words), "{}", stdout(&output));
    }
    let source = json!({"type": "huggingface", "uri": "acme/tiny", "options": {"branch": "half"}});
    let entry = json!({"name": "tiny", "source": source, "terms_url": "https://hub.example/acme/tiny"});
    assert_eq!(document(&host.run("--json catalog")), json!({"checkpoints": [entry]}));
    assert_eq!(code(&host.run("create --catalog tiny --id i")), 0);
    assert_eq!(code(&host.run("create mine --catalog tiny")), 0);
    let calls = host.calls();
    assert!(calls[0].contains(r#"id: "i", name: "", owner: "", public: true, source: None"#), "{calls:?}");
    assert!(calls[0].contains(r#"catalog: "tiny""#) && calls[1].contains(r#"name: "mine""#), "{calls:?}");
}
