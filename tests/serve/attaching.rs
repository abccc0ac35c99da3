//! Where views may go, and that only they are taken away.

use std::fs;
use std::path::{Path, PathBuf};

use ckptd::error::Result;
use ckptd::names::EntryName;
use ckptd::serve::{Detached, Mounted, NamedView, Place, Reserved, Views, detach, prepare, standing};

use super::fixture::{Ground, Holder, Served, can_mount, mounts_below, wait_for};

fn host(target: PathBuf) -> Place {
    Place { target, pid: None }
}

fn one(served: &Served) -> Views {
    Views::One(served.session().original().unwrap())
}

/// What was made durable before must find the view that is there afterwards.
fn put(place: &Place, views: Views, sessions: &Path) -> Result<Mounted> {
    let reserved = Reserved { directories: vec![sessions.to_owned()], free: None };
    let prepared = prepare(place, views, &reserved)?;
    let foretold = recorded(prepared.mounted());
    assert!(!standing(&foretold)?, "the view is there before it is shown");
    let mounted = prepared.show()?;
    assert_eq!(mounted, foretold);
    Ok(mounted)
}

fn reason(ground: &Ground, place: &Place, served: &Served) -> String {
    let error = put(place, one(served), &ground.sessions()).unwrap_err();
    assert!(error.remedy_text().is_some(), "{error:?}");
    error.reason().to_owned()
}

fn config(at: &Path) -> String {
    fs::read_to_string(at.join("deep/er/config.json")).unwrap()
}

/// A record survives being written down.
fn recorded(mounted: &Mounted) -> Mounted {
    serde_json::from_str(&serde_json::to_string(mounted).unwrap()).unwrap()
}

#[test]
fn one_checkpoint_is_bound_at_the_target_read_only() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let target = ground.directory("job");
    let mounted = put(&host(target.clone()), one(&served), &ground.sessions()).unwrap();
    assert_eq!(config(&target), "a");
    assert_eq!(fs::write(target.join("x"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(mounted.device, served.session().number());
    assert!(standing(&mounted).unwrap());
    assert_eq!(detach(&recorded(&mounted)).unwrap(), Detached::Removed);
    assert!(!standing(&mounted).unwrap());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    assert_eq!(detach(&mounted).unwrap(), Detached::AlreadyGone);
    assert_eq!(config(&served.at("")), "a");
}

#[test]
fn several_checkpoints_are_directories_of_a_read_only_target() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let (a, b) = (ground.serve("a", |_| {}), ground.serve("b", |_| {}));
    let target = ground.directory("job");
    let view = |name: &str, served: &Served| NamedView {
        name: EntryName::new(name.as_bytes()).unwrap(),
        original: served.session().original().unwrap(),
    };
    let twice = Views::Several(vec![view("x", &a), view("x", &b)]);
    assert_eq!(put(&host(target.clone()), twice, &ground.sessions()).unwrap_err().reason(), "DUPLICATE_VIEW");
    let before = mounts_below(ground.root()).len();
    let views = Views::Several(vec![view("first", &a), view("the second", &b)]);
    let mounted = put(&host(target.clone()), views, &ground.sessions()).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
    assert_eq!((config(&target.join("first")), config(&target.join("the second"))), ("a".into(), "b".into()));
    assert_eq!(fs::create_dir(target.join("x")).unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(detach(&mounted).unwrap(), Detached::Removed);
    assert_eq!(mounts_below(ground.root()).len(), before);
}

#[test]
fn each_wrong_target_has_its_own_reason_and_nothing_is_mounted() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let before = mounts_below(ground.root());
    let why = |target: PathBuf| reason(&ground, &host(target), &served);
    assert_eq!(why("job".into()), "TARGET_NOT_ABSOLUTE");
    assert_eq!(why(ground.path("x/../job")), "TARGET_NOT_ABSOLUTE");
    assert_eq!(why(ground.path("missing")), "TARGET_MISSING");
    fs::write(ground.path("file"), "").unwrap();
    assert_eq!(why(ground.path("file")), "TARGET_NOT_DIRECTORY");
    let full = ground.directory("full");
    fs::write(full.join(".hidden"), "").unwrap();
    assert_eq!(why(full), "TARGET_NOT_EMPTY");
    assert_eq!(why("/".into()), "TARGET_IS_MOUNTPOINT");
    assert_eq!(why("/proc".into()), "TARGET_IS_MOUNTPOINT");
    assert_eq!(why(served.at("")), "TARGET_RESERVED");
    let job = ground.directory("job");
    std::os::unix::fs::symlink(&job, ground.path("link")).unwrap();
    std::os::unix::fs::symlink(ground.root(), ground.path("up")).unwrap();
    assert_eq!(why(ground.path("link")), "TARGET_IS_SYMLINK");
    assert_eq!(why(ground.path("up/job")), "TARGET_IS_SYMLINK");
    assert_eq!(mounts_below(ground.root()), before);
    let mounted = put(&host(job.clone()), one(&served), &ground.sessions()).unwrap();
    assert_eq!(why(job.clone()), "TARGET_IS_MOUNTPOINT");
    assert_eq!(why(job.join("empty")), "TARGET_IN_CHECKPOINT");
    detach(&mounted).unwrap();
    let place = Place { target: "/mnt".into(), pid: Some(4_194_303) };
    assert_eq!(reason(&ground, &place, &served), "NO_SUCH_PROCESS");
}

#[test]
fn a_view_goes_into_the_namespace_of_a_process_and_nowhere_else() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let mut holder = Holder::new("mkdir -p /mnt/opt/ml/checkpoint /mnt/full/x");
    let place = |target: &str| Place { target: target.into(), pid: Some(holder.pid()) };
    let mounted = put(&place("/mnt/opt/ml/checkpoint"), one(&served), &ground.sessions()).unwrap();
    assert_eq!(config(&holder.inside("/mnt/opt/ml/checkpoint")), "a");
    assert!(!Path::new("/mnt/opt/ml/checkpoint").exists());
    assert!(standing(&mounted).unwrap());
    assert_eq!(reason(&ground, &place("/mnt/opt/ml/checkpoint"), &served), "TARGET_IS_MOUNTPOINT");
    assert_eq!(reason(&ground, &place("/mnt/none"), &served), "TARGET_MISSING");
    assert_eq!(reason(&ground, &place("/mnt/full"), &served), "TARGET_NOT_EMPTY");
    // The process that was named may be gone while others live on in its namespace.
    let another = Mounted { pid: Some(4_194_303), ..recorded(&mounted) };
    assert_eq!(detach(&another).unwrap(), Detached::Removed);
    assert_eq!(fs::read_dir(holder.inside("/mnt/opt/ml/checkpoint")).unwrap().count(), 0);
    let views = Views::Several(vec![NamedView {
        name: EntryName::new(*b"x").unwrap(),
        original: served.session().original().unwrap(),
    }]);
    let again = put(&place("/mnt/opt/ml/checkpoint"), views, &ground.sessions()).unwrap();
    assert_eq!(config(&holder.inside("/mnt/opt/ml/checkpoint/x")), "a");
    holder.end();
    assert_eq!(detach(&again).unwrap(), Detached::AlreadyGone);
}

#[test]
fn a_process_with_a_root_of_its_own_is_served_in_that_root() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    // A container: its own root, and links in it that would lead elsewhere on the host.
    let setup = "mkdir -p /mnt/bin /mnt/lib /mnt/lib64 /mnt/usr /mnt/data/checkpoint && mount --bind /bin /mnt/bin \
         && mount --bind /lib /mnt/lib && mount --bind /lib64 /mnt/lib64 && mount --bind /usr /mnt/usr \
         && ln -s /data /mnt/opt && exec chroot /mnt sh -c 'echo ready; exec cat'; false";
    let holder = Holder::new(setup);
    let place = Place { target: "/opt/checkpoint".into(), pid: Some(holder.pid()) };
    let mounted = put(&place, one(&served), &ground.sessions()).unwrap();
    assert_eq!(config(&holder.inside("/data/checkpoint")), "a");
    assert!(!Path::new("/data/checkpoint").exists());
    assert_eq!(detach(&mounted).unwrap(), Detached::Removed);
}

#[test]
fn what_others_have_mounted_is_never_taken_away() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let served = ground.serve("a", |_| {});
    let target = ground.directory("job");
    let tmpfs = || {
        let none: Option<&str> = None;
        nix::mount::mount(Some("other"), &target, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
        fs::write(target.join("theirs"), "x").unwrap();
    };
    let mounted = put(&host(target.clone()), one(&served), &ground.sessions()).unwrap();
    tmpfs();
    assert_eq!(detach(&mounted).unwrap_err().reason(), "TARGET_COVERED");
    assert!(!standing(&mounted).unwrap());
    assert_eq!(fs::read_to_string(target.join("theirs")).unwrap(), "x");
    nix::mount::umount(&target).unwrap();
    assert_eq!(detach(&mounted).unwrap(), Detached::Removed);
    // Ours is gone and something else is there now.
    tmpfs();
    assert_eq!(detach(&mounted).unwrap(), Detached::AlreadyGone);
    assert_eq!(fs::read_to_string(target.join("theirs")).unwrap(), "x");
}

#[test]
fn an_open_file_goes_on_when_its_view_is_detached() {
    if !can_mount() {
        return;
    }
    let ground = Ground::new();
    let mut served = ground.serve("a", |config| config.passthrough = false);
    let target = ground.directory("job");
    let mounted = put(&host(target.clone()), one(&served), &ground.sessions()).unwrap();
    let file = fs::File::open(target.join("model.safetensors")).unwrap();
    detach(&mounted).unwrap();
    let session = served.session.take().unwrap();
    let content = served.content.clone();
    assert_eq!(session.stop(std::time::Duration::from_millis(50)).unwrap(), ckptd::serve::Stopped::Serving);
    let mut byte = [0; 1];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 4_000_000).unwrap();
    drop((file, served));
    wait_for("the end of the session's threads", || std::sync::Arc::strong_count(&content) == 1);
}
