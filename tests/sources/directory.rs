//! Directories of this host: each test makes its own, and touches nothing outside it.

use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use ckptd::error::Kind;
use ckptd::source::What;
use futures_util::StreamExt;

use super::{directory, file_of, list, only, paths, read};

/// Writes a file of a test; never through a link, for these tests run as root and plant links.
fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
    options.open(path).unwrap().write_all(bytes).unwrap();
}

#[tokio::test]
async fn a_directory_is_listed_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    write(&at("a b/c.bin"), b"hello");
    write(&at("run"), b"#!");
    std::fs::set_permissions(at("run"), std::fs::Permissions::from_mode(0o711)).unwrap();
    std::fs::create_dir(at("empty")).unwrap();
    symlink("../outside/secret", at("out")).unwrap();
    symlink("a b", at("in")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe%2F.\n");
    write(&root.path().join(odd), b"odd");
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let source = directory(root.path());
    let listing = list(&source).await.unwrap();
    let odd_shown = odd.as_bytes().escape_ascii().to_string();
    assert_eq!(paths(&listing), [odd_shown.as_str(), "a b", "a b/c.bin", "empty", "in", "out", "run"]);
    let skipped =
        [("fifo", "is a FIFO"), ("socket", "is a socket")].map(|(path, why)| (path.to_owned(), why.to_owned()));
    assert_eq!(listing.skipped, skipped);
    let link = listing.entries.iter().find(|entry| entry.path.as_bytes() == b"out").unwrap();
    assert!(matches!(&link.what, What::Symlink(target) if **target == *b"../outside/secret"));
    assert!(file_of(&listing, "run").executable && !file_of(&listing, "a b/c.bin").executable);
    let found = listing.entries.iter().find(|entry| entry.path.as_bytes() == odd.as_bytes()).unwrap();
    let What::File(file) = &found.what else { panic!() };
    assert_eq!(read(&source, file, 0..3).await.unwrap(), b"odd");
    let mut opened = source.open_local(file).unwrap().unwrap();
    let mut bytes = Vec::new();
    opened.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"odd");
    source.check_unchanged(file, &opened).unwrap();
}

#[tokio::test]
async fn the_revision_of_a_directory_is_met_again_only_if_nothing_was_touched() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("a/x"), b"1");
    write(&root.path().join("b"), b"2");
    let source = directory(root.path());
    let first = list(&source).await.unwrap().revision;
    assert_eq!(list(&directory(root.path())).await.unwrap().revision, first);
    write(&root.path().join("b"), b"3");
    let second = list(&source).await.unwrap().revision;
    assert_ne!(first, second);
    symlink("b", root.path().join("c")).unwrap();
    assert_ne!(list(&source).await.unwrap().revision, second);
}

#[tokio::test]
async fn a_file_of_a_directory_that_changes_is_noticed_by_name() {
    let mutations: [fn(&Path); 5] = [
        |path| write(path, b"longer than before"),
        |path| write(path, b"other"),
        |path| std::fs::remove_file(path).unwrap(),
        |path| {
            std::fs::remove_file(path).unwrap();
            std::fs::write(path.with_file_name("decoy"), b"hello").unwrap();
            symlink("decoy", path).unwrap();
        },
        |path| {
            let directory = path.parent().unwrap();
            std::fs::rename(directory, directory.with_extension("moved")).unwrap();
            symlink(directory.with_extension("moved"), directory).unwrap();
        },
    ];
    for mutate in mutations {
        // A tree of its own for each: what the one before left behind may be a link.
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("sub/x");
        write(&path, b"hello");
        let source = directory(root.path());
        let file = file_of(&list(&source).await.unwrap(), "sub/x");
        assert_eq!(read(&source, &file, 1..3).await.unwrap(), b"el");
        let opened = source.open_local(&file).unwrap().unwrap();
        mutate(&path);
        let error = read(&source, &file, 0..5).await.unwrap_err();
        assert_eq!(error.reason(), "SOURCE_CHANGED");
        assert!(error.to_string().contains("sub/x"), "{error}");
        assert_eq!(source.open_local(&file).unwrap_err().reason(), "SOURCE_CHANGED");
        let unlinked_or_written = source.check_unchanged(&file, &opened);
        let still_there = std::fs::symlink_metadata(root.path().join("sub.moved")).is_ok();
        assert_eq!(unlinked_or_written.is_ok(), still_there, "only the move left the open file as it was");
    }
}

#[tokio::test]
async fn a_file_that_is_written_while_it_is_read_is_noticed_at_its_end() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x");
    write(&path, &vec![1; 3 << 20]);
    let source = directory(root.path());
    let file = file_of(&list(&source).await.unwrap(), "x");
    let mut stream = source.read(&file, 0..3 << 20).await.unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all(b"2").unwrap();
    let mut last = None;
    while let Some(piece) = stream.next().await {
        last = Some(piece);
    }
    assert_eq!(last.unwrap().unwrap_err().reason(), "SOURCE_CHANGED");
}

#[tokio::test]
async fn a_single_file_is_a_checkpoint_of_that_file() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("model.bin"), b"weights");
    write(&root.path().join("other"), b"x");
    let source = directory(&root.path().join("model.bin"));
    let listing = list(&source).await.unwrap();
    let (name, file) = only(&listing);
    assert_eq!(name, "model.bin");
    assert_eq!(read(&source, &file, 0..7).await.unwrap(), b"weights");
}

#[tokio::test]
async fn a_root_that_cannot_be_listed_says_why() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("real")).unwrap();
    symlink("real", root.path().join("link")).unwrap();
    nix::unistd::mkfifo(&root.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (name, kind, reason) in [
        ("none", Kind::NotFound, "NO_SUCH_FILE"),
        ("link", Kind::Invalid, "NOT_A_DIRECTORY"),
        ("link/", Kind::Invalid, "NOT_A_DIRECTORY"),
        ("fifo", Kind::Invalid, "NOT_A_DIRECTORY"),
    ] {
        let error = list(&directory(&root.path().join(name))).await.err().unwrap();
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{error:?}");
        assert!(error.remedy_text().is_some());
    }
}

#[tokio::test]
async fn twenty_thousand_files_are_listed_quickly() {
    let root = tempfile::tempdir().unwrap();
    for directory in 0..20 {
        std::fs::create_dir(root.path().join(format!("d{directory}"))).unwrap();
        for file in 0..1000 {
            std::fs::File::create(root.path().join(format!("d{directory}/f{file}"))).unwrap();
        }
    }
    let source = directory(root.path());
    let begun = Instant::now();
    let listing = list(&source).await.unwrap();
    let took = begun.elapsed();
    assert_eq!(listing.entries.len(), 20_020);
    println!("20,000 files in {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}
