//! What a job sees of a checkpoint.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use super::fixture::{Ground, Served, can_mount, noise, wait_for};

fn xattr(path: &Path, name: &str) -> Result<String, i32> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let name = std::ffi::CString::new(name).unwrap();
    let mut room = [0_u8; 256];
    // SAFETY: every pointer is to a live, NUL-terminated or sized buffer for the time of the call.
    let got = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    match usize::try_from(got) {
        Ok(length) => Ok(String::from_utf8(room[..length].to_vec()).unwrap()),
        Err(_) => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

fn same_everywhere(served: &Served) {
    let differs =
        Command::new("diff").arg("-r").arg("--no-dereference").arg(&served.source).arg(served.at("")).status();
    assert!(differs.unwrap().success(), "the mount differs from its source");
    let file = served.at("model.safetensors");
    assert!(Command::new("cmp").arg(&file).arg(served.source.join("model.safetensors")).status().unwrap().success());
    // SAFETY: the file is never changed while it is mapped.
    let mapped = unsafe { memmap2::Mmap::map(&File::open(&file).unwrap()).unwrap() };
    assert!(mapped[..] == noise(5_000_123, 7)[..]);
}

#[test]
fn bytes_are_the_source_s_by_read_and_mmap_through_passthrough() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut served = ground.serve("a", |_| {});
    assert!(served.session().passthrough());
    same_everywhere(&served);
    assert_eq!(served.reads(), 0, "reads of whole files reach the daemon");
    assert_eq!(served.stop(), ckptd::serve::Stopped::Ended);
}

#[test]
fn bytes_are_the_source_s_through_the_daemon() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let without = ground.serve("without", |config| config.passthrough = false);
    assert!(!without.session().passthrough());
    same_everywhere(&without);
    assert!(without.reads() > 0);
    let compact = ground.serve("compact", |_| {});
    compact.content.compact.store(true, Ordering::SeqCst);
    same_everywhere(&compact);
    assert!(compact.reads() > 0);
}

#[test]
fn every_entry_is_found_with_its_attributes() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let listed = |root: &Path| {
        let out = Command::new("find").arg(root).args(["-printf", "%P %y %s %l\\n"]).output().unwrap().stdout;
        let mut lines: Vec<_> = String::from_utf8(out).unwrap().lines().map(str::to_owned).collect();
        lines.retain(|line| !line.contains(" d "));
        lines.sort();
        lines
    };
    assert_eq!(listed(&served.at("")), listed(&served.source));
    let model = fs::metadata(served.at("model.safetensors")).unwrap();
    assert_eq!((model.permissions().mode(), model.uid(), model.gid()), (0o100_444, 0, 0));
    assert_eq!((model.blocks(), model.mtime(), model.nlink()), (5_000_123_u64.div_ceil(512), 1_700_000_000, 1));
    assert_eq!(fs::metadata(served.at("run.sh")).unwrap().permissions().mode(), 0o100_555);
    assert_eq!(Command::new(served.at("run.sh")).output().unwrap().stdout, b"ran\n");
    let deep = fs::metadata(served.at("deep")).unwrap();
    assert_eq!((deep.permissions().mode(), deep.nlink()), (0o40_555, 3));
    assert_eq!(fs::read_link(served.at("link")).unwrap(), Path::new("deep/er/config.json"));
    assert_eq!(fs::read_to_string(served.at("link")).unwrap(), "a");
    assert_eq!(fs::metadata(served.at("no/such")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::metadata(served.at("nosuch")).unwrap_err().kind(), ErrorKind::NotFound);
    // A second time from what the kernel has kept.
    assert_eq!(fs::metadata(served.at("nosuch")).unwrap_err().kind(), ErrorKind::NotFound);
    // Inodes follow from the manifest: entry i has i + 2.
    let at = served.manifest.entries().iter().position(|entry| entry.path.as_bytes() == b"run.sh").unwrap();
    assert_eq!(fs::metadata(served.at("run.sh")).unwrap().ino(), at as u64 + 2);
}

#[test]
fn a_directory_of_thousands_is_listed_once_each() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let source = ground.directory("many");
    for number in 0..3000 {
        fs::write(source.join(format!("file-with-a-longer-name-{number:05}")), "").unwrap();
    }
    let served = ground.serve_directory("many", source, |_| {});
    for _ in 0..2 {
        let mut names: Vec<_> = fs::read_dir(served.at("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names.len(), 3000);
        names.dedup();
        assert_eq!(names.len(), 3000);
    }
}

#[test]
fn attributes_and_figures_say_what_is_served_and_how() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let file = served.at("model.safetensors");
    let digest = ckptd::digest::Digest::of(&noise(5_000_123, 7)).to_hex();
    assert_eq!(xattr(&file, "user.ckptd.digest"), Ok(digest));
    assert_eq!(xattr(&file, "user.ckptd.checkpoint"), Ok("id-a".into()));
    assert_eq!(xattr(&served.at(""), "user.ckptd.checkpoint"), Ok("id-a".into()));
    assert_eq!(xattr(&file, "user.ckptd.state"), Ok("passthrough".into()));
    assert_eq!(xattr(&file, "user.other"), Err(libc::ENODATA));
    served.content.compact.store(true, Ordering::SeqCst);
    assert_eq!(xattr(&file, "user.ckptd.state"), Ok("daemon".into()));
    served.content.filling.store(true, Ordering::SeqCst);
    assert_eq!(xattr(&file, "user.ckptd.state"), Ok("filling 43%".into()));
    let figures = nix::sys::statvfs::statvfs(&served.at("")).unwrap();
    assert_eq!(figures.blocks(), served.manifest.logical_bytes().div_ceil(4096));
    assert_eq!((figures.files(), figures.blocks_free(), figures.fragment_size()), (4, 0, 4096));
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line =
        mounts.lines().find(|line| line.contains(served.at("").to_str().unwrap().trim_end_matches('/'))).unwrap();
    assert!(line.starts_with("ckptd ") && line.contains(" fuse.ckptd ro,nosuid,nodev,"), "{line}");
}

#[test]
fn nothing_can_be_written() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let file = served.at("model.safetensors");
    let denied = |what: &str, error: std::io::Error| {
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{what}: {error}");
    };
    denied("write", OpenOptions::new().write(true).open(&file).unwrap_err());
    denied("append", OpenOptions::new().append(true).open(&file).unwrap_err());
    denied("truncate", OpenOptions::new().write(true).truncate(true).open(&file).unwrap_err());
    denied("create", File::create(served.at("new")).unwrap_err());
    denied("mkdir", fs::create_dir(served.at("new")).unwrap_err());
    denied("unlink", fs::remove_file(&file).unwrap_err());
    denied("rmdir", fs::remove_dir(served.at("empty")).unwrap_err());
    denied("rename", fs::rename(&file, served.at("new")).unwrap_err());
    denied("link", fs::hard_link(&file, served.at("new")).unwrap_err());
    denied("symlink", std::os::unix::fs::symlink("x", served.at("new")).unwrap_err());
    denied("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap_err());
    denied("chown", std::os::unix::fs::chown(&file, Some(1), Some(1)).unwrap_err());
    denied("utimes", File::open(&file).unwrap().set_modified(std::time::SystemTime::now()).unwrap_err());
    use nix::sys::stat::{Mode, SFlag, mknod};
    denied("mknod", mknod(&served.at("new"), SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap_err().into());
    let path = std::ffi::CString::new(file.to_str().unwrap()).unwrap();
    // SAFETY: every pointer is to a live, NUL-terminated or sized buffer for the time of the call.
    let set = unsafe { libc::setxattr(path.as_ptr(), c"user.x".as_ptr(), c"y".as_ptr().cast(), 1, 0) };
    assert_eq!(set, -1);
    denied("setxattr", std::io::Error::last_os_error());
    // SAFETY: every pointer is to a live, NUL-terminated or sized buffer for the time of the call.
    let removed = unsafe { libc::removexattr(path.as_ptr(), c"user.ckptd.digest".as_ptr()) };
    assert_eq!(removed, -1);
    denied("removexattr", std::io::Error::last_os_error());
}

#[test]
fn a_file_that_becomes_whole_changes_mode_with_its_last_handle() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let path = served.at("model.safetensors");
    served.content.compact.store(true, Ordering::SeqCst);
    let first = File::open(&path).unwrap();
    served.content.compact.store(false, Ordering::SeqCst);
    assert_eq!(xattr(&path, "user.ckptd.state"), Ok("daemon".into()));
    let second = File::open(&path).unwrap();
    let mut byte = [0; 1];
    second.read_at(&mut byte, 4_900_000).unwrap();
    assert!(served.reads() > 0, "a second handle is in the mode of the first");
    assert_eq!(served.session().open_handles(), 2);
    drop((first, second));
    wait_for("the release", || served.session().open_handles() == 0);
    let before = served.reads();
    let mut whole = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut whole).unwrap();
    assert!(whole == noise(5_000_123, 7));
    assert_eq!(served.reads(), before, "the file is whole and free, and still read through the daemon");
}

#[test]
fn many_openers_at_once_all_read_the_same() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    for passthrough in [true, false] {
        let served = ground.serve(&format!("p-{passthrough}"), |config| config.passthrough = passthrough);
        let expected = noise(5_000_123, 7);
        std::thread::scope(|scope| {
            for worker in 0..8_u64 {
                let (path, expected) = (served.at("model.safetensors"), &expected);
                scope.spawn(move || {
                    for round in 0..40_u64 {
                        let file = File::open(&path).unwrap();
                        let offset = (worker * 611_953 + round * 104_729) % 4_900_000;
                        let mut piece = vec![0; 70_000];
                        file.read_exact_at(&mut piece, offset).unwrap();
                        let from = usize::try_from(offset).unwrap();
                        assert!(piece == expected[from..from + 70_000]);
                    }
                });
            }
        });
        wait_for("all releases", || served.session().open_handles() == 0);
    }
}

#[test]
fn a_read_that_must_wait_holds_up_nobody_else() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    served.content.filling.store(true, Ordering::SeqCst);
    let path = served.at("deep/er/config.json");
    // More readers than there are loops.
    let readers: Vec<_> = (0..8)
        .map(|number| {
            let path = if number < 4 { path.clone() } else { served.at("run.sh") };
            std::thread::spawn(move || fs::read(path))
        })
        .collect();
    wait_for("the reads", || served.content.waiting.lock().unwrap().len() >= 2);
    assert_eq!(fs::metadata(served.at("nothing")).unwrap().len(), 0);
    assert_eq!(fs::read_dir(served.at("deep")).unwrap().count(), 1);
    served.content.filling.store(false, Ordering::SeqCst);
    let mut finished = 0;
    wait_for("the answers", || {
        for resume in served.content.waiting.lock().unwrap().drain(..) {
            resume(Ok(()));
        }
        finished = readers.iter().filter(|reader| reader.is_finished()).count();
        finished == readers.len()
    });
    for (number, reader) in readers.into_iter().enumerate() {
        let expected: &[u8] = if number < 4 { b"a" } else { b"#!/bin/sh\necho ran\n" };
        assert_eq!(reader.join().unwrap().unwrap(), expected);
    }
}

#[test]
fn a_read_whose_bytes_cannot_come_fails_with_eio() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    served.content.filling.store(true, Ordering::SeqCst);
    let path = served.at("run.sh");
    let reader = std::thread::spawn(move || fs::read(path));
    let mut failed = false;
    wait_for("the failure", || {
        for resume in served.content.waiting.lock().unwrap().drain(..) {
            resume(Err(ckptd::error::Error::unavailable("INGEST_FAILED", "the ingest has failed")));
            failed = true;
        }
        failed && reader.is_finished()
    });
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_panic_or_a_short_blob_fails_one_read_and_not_the_session() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |config| config.passthrough = false);
    for (fault, path) in [(&served.content.panics, "run.sh"), (&served.content.short, "deep/er/config.json")] {
        fault.store(true, Ordering::SeqCst);
        for _ in 0..5 {
            assert_eq!(fs::read(served.at(path)).unwrap_err().raw_os_error(), Some(libc::EIO));
        }
        fault.store(false, Ordering::SeqCst);
        assert_eq!(fs::read(served.at(path)).unwrap(), fs::read(served.source.join(path)).unwrap());
    }
}

#[test]
fn seeking_finds_all_of_a_file_to_be_data() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    for passthrough in [true, false] {
        let served = ground.serve(&format!("p-{passthrough}"), |config| config.passthrough = passthrough);
        let file = File::open(served.at("model.safetensors")).unwrap();
        // SAFETY: the descriptor is open; no memory is passed.
        let seek = |offset, whence| unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        assert_eq!(seek(0, libc::SEEK_HOLE), 5_000_123);
        assert_eq!(seek(4096, libc::SEEK_DATA), 4096);
        assert_eq!(seek(-1, libc::SEEK_END), 5_000_122);
    }
}
