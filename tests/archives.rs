//! Archives as other programs write them, and as nobody should: what comes out of them is what was packed, or an error.
//!
//! Written by GNU tar, the compressors' own programs and Python (`tests/fixtures/archives.py`); a program that is not installed is named and left out.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ckptd::error::{Error, Kind, Result};
use ckptd::manifest::Manifest;
use ckptd::source::egress::EgressPolicy;
use ckptd::source::{Counter, Credentials, HttpSettings, Opened, SourceContext, SourceKind, SourceSpec, What, connect};

/// Lets a listing have as many entries as it likes.
fn any_number() -> Counter {
    Arc::new(|_| Ok(()))
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Directory,
    Symlink(Vec<u8>),
    File(Vec<u8>, bool),
}

type Tree = BTreeMap<String, Found>;

/// What `capture` of the archive brings in, in the shape it comes.
async fn open(path: &Path, extract: &str) -> Result<Opened> {
    let context = SourceContext::new(&HttpSettings::default(), EgressPolicy::default())?.with_host_directories();
    let options = [("extract".to_owned(), extract.to_owned())].into_iter().collect();
    let spec = SourceSpec { kind: SourceKind::Directory, uri: path.to_str().unwrap().to_owned(), options };
    connect(&spec, &Credentials::default(), &context)?.open(&any_number()).await
}

async fn extract(path: &Path) -> Result<Tree> {
    let Opened::Streamed(mut stream) = open(path, "").await? else { panic!("{} is listed", path.display()) };
    let mut tree = Tree::new();
    while let Some(entry) = stream.next_entry().await? {
        let found = match entry.what {
            What::Directory => Found::Directory,
            What::Symlink(target) => Found::Symlink(target.into()),
            What::SameAs(earlier) => tree[&earlier.to_string()].clone(),
            What::File(file) => {
                let mut bytes = Vec::new();
                while let Some(piece) = stream.next_bytes().await? {
                    piece.iter().for_each(|run| bytes.extend_from_slice(run));
                }
                assert!(file.size.is_none_or(|size| size == bytes.len() as u64), "{}", entry.path);
                Found::File(bytes, file.executable)
            }
        };
        assert!(tree.insert(entry.path.to_string(), found).is_none(), "{} comes twice", entry.path);
    }
    assert!(stream.revision(&any_tree()).starts_with("archive:"));
    Ok(tree)
}

/// Any will do: the revision is the archive's own.
fn any_tree() -> Manifest {
    Manifest::new(Vec::new()).unwrap()
}

async fn refused(path: &Path) -> Error {
    extract(path).await.err().unwrap_or_else(|| panic!("{} was taken", path.display()))
}

/// The tree below `root`, as the file system has it.
fn on_disk(root: &Path) -> Tree {
    fn walk(root: &Path, at: &Path, tree: &mut Tree) {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            let found = if metadata.is_dir() {
                walk(root, &path, tree);
                Found::Directory
            } else if metadata.is_symlink() {
                Found::Symlink(std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes())
            } else {
                Found::File(std::fs::read(&path).unwrap(), metadata.permissions().mode() & 0o111 != 0)
            };
            tree.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), found);
        }
    }
    let mut tree = Tree::new();
    walk(root, root, &mut tree);
    tree
}

/// A directory to pack and a place for archives of it.
struct Place {
    home: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let tree = home.path().join("tree");
        let deep = tree.join("a").join("long-component-".repeat(6)).join("another-component-".repeat(6));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir_all(tree.join("empty")).unwrap();
        let weights: Vec<u8> =
            (0..1_500_000_u32).flat_map(|n| (n / 7).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(tree.join("weights.bin"), &weights[..3_000_001]).unwrap();
        std::fs::write(tree.join("nothing"), b"").unwrap();
        std::fs::write(deep.join("n".repeat(120)), b"deep").unwrap();
        std::fs::write(tree.join("grüße ü.txt"), "grüße").unwrap();
        std::fs::write(tree.join("run.sh"), b"#!/bin/sh\n").unwrap();
        std::fs::set_permissions(tree.join("run.sh"), PermissionsExt::from_mode(0o6755)).unwrap();
        symlink("../weights.bin", tree.join("a/link")).unwrap();
        symlink("n".repeat(150), tree.join("dangling")).unwrap();
        Self { home }
    }

    fn tree(&self) -> PathBuf {
        self.home.path().join("tree")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Python's archive of the tree, or a hostile one.
    fn python(&self, kind: &str, name: &str) -> PathBuf {
        let out = self.at(name);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/archives.py");
        run(Command::new("python3").arg(script).arg(kind).arg(self.tree()).arg(&out));
        out
    }

    /// GNU tar's archive of the tree.
    fn gnu(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let out = self.at(name);
        run(Command::new("tar").args(arguments).arg("-cf").arg(&out).arg("-C").arg(self.tree()).arg("."));
        out
    }

    /// What GNU tar makes of `archive`.
    fn unpacked(&self, archive: &Path) -> Tree {
        let into = self.at("unpacked");
        let _ = std::fs::remove_dir_all(&into);
        std::fs::create_dir(&into).unwrap();
        run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&into));
        on_disk(&into)
    }
}

fn run(command: &mut Command) {
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

fn has(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok_and(|ran| ran.status.success());
    if !there {
        eprintln!("{program} is not installed: left out");
    }
    there
}

#[tokio::test]
async fn a_tar_of_gnu_tar_is_the_tree_that_was_packed() {
    let place = Place::new();
    // Of a file and, as `cp -al` makes them, of a symbolic link.
    for name in ["weights.bin", "dangling"] {
        std::fs::hard_link(place.tree().join(name), place.tree().join(format!("{name}.too"))).unwrap();
    }
    let packed = on_disk(&place.tree());
    for (name, arguments) in [
        ("gnu.tar", &["--format=gnu"][..]),
        ("dump.tar", &["--incremental"]),
        ("pax.tar", &["--format=pax"]),
        ("oldgnu.tar", &["--format=oldgnu"]),
        ("a.tar.gz", &["-z"]),
        ("a.TGZ", &["-z"]),
        ("a.tar.bz2", &["-j"]),
        ("a.tbz2", &["-j"]),
        ("a.tar.xz", &["-J"]),
        ("a.tar.zst", &["--zstd"]),
        ("named-otherwise.tar.gz", &["-J"]),
        ("labelled.tar", &["--label=label"]),
        ("blocked.tar", &["--blocking-factor=1"]),
    ] {
        let archive = place.gnu(name, arguments);
        let tree = extract(&archive).await.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
        assert!(tree == packed, "{name}: {:?}", tree.keys());
        assert!(place.unpacked(&archive) == packed, "{name}");
    }
}

#[tokio::test]
async fn an_archive_of_bsdtar_is_the_tree_that_was_packed() {
    if !has("bsdtar") {
        return;
    }
    let place = Place::new();
    std::fs::hard_link(place.tree().join("weights.bin"), place.tree().join("weights.too")).unwrap();
    let packed = on_disk(&place.tree());
    for (name, arguments) in [
        ("bsd.tar", &[][..]),
        ("bsd-pax.tar", &["--format=pax"]),
        ("bsd-gnu.tar", &["--format=gnutar"]),
        ("bsd.tar.zst", &["--zstd"]),
        ("bsd.zip", &["--format=zip"]),
    ] {
        let out = place.at(name);
        run(Command::new("bsdtar").args(arguments).arg("-cf").arg(&out).arg("-C").arg(place.tree()).arg("."));
        let tree = extract(&out).await.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
        assert!(tree == packed, "{name}: {:?}", tree.keys());
    }
    // Into a pipe a zip cannot go back to its headers: sizes and sums follow the bytes.
    let out = place.at("piped.zip");
    let pipe = "bsdtar --format=zip -cf - -C \"$1\" . | cat > \"$2\"";
    run(Command::new("sh").args(["-c", pipe, "sh"]).arg(place.tree()).arg(&out));
    assert!(extract(&out).await.unwrap() == packed);
}

#[tokio::test]
async fn ustar_splits_long_names() {
    let place = Place::new();
    let long = place.tree().join("a").join("long-component-".repeat(6));
    std::fs::remove_dir_all(&long).unwrap();
    std::fs::remove_file(place.tree().join("dangling")).unwrap();
    let deep = long.join("d".repeat(60));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join("f".repeat(80)), b"split").unwrap();
    let archive = place.gnu("u.tar", &["--format=ustar"]);
    assert!(extract(&archive).await.unwrap() == on_disk(&place.tree()));
    assert!(extract(&place.python("tar-ustar", "p.tar")).await.unwrap() == on_disk(&place.tree()));
    if has("bsdtar") {
        let out = place.at("b.tar");
        run(Command::new("bsdtar").args(["--format=ustar", "-cf"]).arg(&out).arg("-C").arg(place.tree()).arg("."));
        assert!(extract(&out).await.unwrap() == on_disk(&place.tree()));
    }
    // The oldest dialect has no room for long names, nor a word that says what it is.
    std::fs::remove_dir_all(&long).unwrap();
    let archive = place.gnu("v7.tar", &["--format=v7"]);
    assert!(extract(&archive).await.unwrap() == on_disk(&place.tree()));
}

#[tokio::test]
async fn a_tar_of_python_is_the_tree_that_was_packed() {
    let place = Place::new();
    std::fs::hard_link(place.tree().join("weights.bin"), place.tree().join("weights.too")).unwrap();
    let packed = on_disk(&place.tree());
    for (kind, name) in [
        ("tar-pax", "p.tar"),
        ("tar-gnu", "g.tar"),
        ("tar-gz", "p.tar.gz"),
        ("tar-bz2", "p.tar.bz2"),
        ("tar-xz", "p.tar.xz"),
    ] {
        let archive = place.python(kind, name);
        let tree = extract(&archive).await.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
        assert!(tree == packed, "{name}: {:?}", tree.keys());
    }
    let sized = extract(&place.python("tar-pax-size", "size.tar")).await.unwrap();
    assert_eq!(sized["big"], Found::File(vec![b'b'; 3000], false));
}

#[tokio::test]
async fn sparse_files_come_with_their_holes_as_zeros() {
    let place = Place::new();
    let file = std::fs::File::create(place.tree().join("sparse")).unwrap();
    for at in 0..60 {
        std::os::unix::fs::FileExt::write_all_at(&file, format!("piece {at}").as_bytes(), at * 100_000 + 70_000)
            .unwrap();
    }
    file.set_len(7_000_000).unwrap();
    std::fs::File::create(place.tree().join("all-hole")).unwrap().set_len(2_000_000).unwrap();
    let packed = on_disk(&place.tree());
    for (name, arguments) in [
        ("s-gnu.tar", &["-S", "--format=gnu"][..]),
        ("s-00.tar", &["-S", "--format=pax", "--sparse-version=0.0"]),
        ("s-01.tar", &["-S", "--format=pax", "--sparse-version=0.1"]),
        ("s-10.tar", &["-S", "--format=pax", "--sparse-version=1.0"]),
    ] {
        let archive = place.gnu(name, arguments);
        assert!(std::fs::metadata(&archive).unwrap().len() < 5_000_000, "{name} is not sparse");
        let tree = extract(&archive).await.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
        assert!(tree == packed, "{name}: {:?}", tree.keys());
    }
    if has("bsdtar") {
        let out = place.at("s-bsd.tar");
        run(Command::new("bsdtar").args(["--format=pax", "-cf"]).arg(&out).arg("-C").arg(place.tree()).arg("."));
        assert!(std::fs::metadata(&out).unwrap().len() < 5_000_000, "it is not sparse");
        assert!(extract(&out).await.unwrap() == packed);
    }
}

#[tokio::test]
async fn a_zip_is_the_tree_that_was_packed() {
    let place = Place::new();
    let packed = on_disk(&place.tree());
    for kind in ["zip-stored", "zip-deflated", "zip-bzip2", "zip-64", "zip-streamed"] {
        let archive = place.python(kind, &format!("{kind}.zip"));
        let tree = extract(&archive).await.unwrap_or_else(|error| panic!("{kind}: {}", error.report()));
        assert!(tree == packed, "{kind}: {:?}", tree.keys());
    }
    if has("zip") {
        let out = place.at("info.zip");
        run(Command::new("zip").args(["-q", "-r", "--symlinks"]).arg(&out).arg(".").current_dir(place.tree()));
        assert!(extract(&out).await.unwrap() == packed);
    }
}

#[tokio::test]
async fn a_zip_beyond_what_32_bits_and_16_bits_count_is_whole() {
    let place = Place::new();
    let tree =
        extract(&place.python("zip-many", "many.zip")).await.unwrap_or_else(|error| panic!("{}", error.report()));
    let empty = Found::File(Vec::new(), false);
    assert_eq!(tree.values().filter(|found| **found == empty).count(), 70_000);
    assert!(tree.contains_key("00/00000") && tree.contains_key("69/69999"));
    let tree = extract(&place.python("zip-far", "far.zip")).await.unwrap_or_else(|error| panic!("{}", error.report()));
    let expected: Tree =
        ["near", "far"].map(|name| (name.to_owned(), Found::File(name.as_bytes().to_vec(), false))).into();
    assert!(tree == expected, "{:?}", tree.keys());
}

#[tokio::test]
async fn a_compressed_file_loses_its_ending() {
    let place = Place::new();
    let weights = std::fs::read(place.tree().join("weights.bin")).unwrap();
    for (program, ending) in [("gzip", "gz"), ("bzip2", "bz2"), ("xz", "xz"), ("zstd", "zst")] {
        if !has(program) {
            continue;
        }
        let out = place.at(&format!("model.safetensors.{ending}"));
        let packed = Command::new(program).arg("-c").arg(place.tree().join("weights.bin")).output().unwrap().stdout;
        std::fs::write(&out, &packed).unwrap();
        let expected: Tree = [("model.safetensors".to_owned(), Found::File(weights.clone(), false))].into();
        assert!(extract(&out).await.unwrap() == expected, "{program}");
        std::fs::write(&out, [packed.as_slice(), &packed].concat()).unwrap();
        let twice: Tree = [("model.safetensors".to_owned(), Found::File(weights.repeat(2), false))].into();
        assert!(extract(&out).await.unwrap() == twice, "{program}, twice");
        std::fs::write(&out, &packed[..packed.len() - 3]).unwrap();
        let error = refused(&out).await;
        assert_eq!((error.kind(), error.reason()), (Kind::Corrupt, "ARCHIVE_DAMAGED"), "{program}: {}", error.report());
        assert!(error.to_string().contains("truncated"), "{program}: {}", error.report());
    }
}

#[tokio::test]
async fn what_is_hostile_is_refused_by_name() {
    let place = Place::new();
    for (kind, name, reason, said) in [
        ("absolute", "t.tar", "ARCHIVE_REFUSED", "`/etc/passwd` is absolute"),
        ("climbing", "t.tar", "ARCHIVE_REFUSED", "`a/../../b` climbs"),
        ("link-out", "t.tar", "ARCHIVE_REFUSED", "`d/l` leads out"),
        ("link-absolute", "t.tar", "ARCHIVE_REFUSED", "`l` leads out, to `/etc`"),
        ("link-through", "t.tar", "ARCHIVE_REFUSED", "`l` goes up through the link `a`"),
        ("below-link", "t.tar", "ARCHIVE_REFUSED", "`d/f` is below `d`"),
        ("hard-link-out", "t.tar", "ARCHIVE_REFUSED", "hard link `l`"),
        ("hard-link-before", "t.tar", "ARCHIVE_REFUSED", "`l` leads to `x`"),
        ("fifo", "t.tar", "ARCHIVE_REFUSED", "`pipe` is a FIFO"),
        ("device", "t.tar", "ARCHIVE_REFUSED", "`null` is a device"),
        ("twice", "t.tar", "ARCHIVE_REFUSED", "`a` occurs twice"),
        ("long-component", "t.tar", "ARCHIVE_REFUSED", "longer than 255"),
        ("long-name-bomb", "t.tar", "ARCHIVE_UNSUPPORTED", "extended header"),
        ("below-file", "t.tar", "ARCHIVE_REFUSED", "`a/b` is below `a`"),
        ("bomb", "b.gz", "ARCHIVE_BOMB", "over 1000 for each"),
        ("bomb-bz2", "b.bz2", "ARCHIVE_BOMB", "over 1000 for each"),
        ("bomb-xz", "b.xz", "ARCHIVE_BOMB", "over 1000 for each"),
        ("bomb-zst", "b.zst", "ARCHIVE_BOMB", "over 1000 for each"),
        ("bomb-zip", "b.zip", "ARCHIVE_BOMB", "over 1000 for each"),
        ("long-window", "w.zst", "ARCHIVE_UNSUPPORTED", "more than 128 MiB of memory"),
        ("zip-climbing", "z.zip", "ARCHIVE_REFUSED", "`../a` climbs"),
        ("zip-link-out", "z.zip", "ARCHIVE_REFUSED", "`l` leads out"),
        ("zip-socket", "z.zip", "ARCHIVE_REFUSED", "`s` is a device"),
        ("zip-encrypted", "z.zip", "ARCHIVE_UNSUPPORTED", "`a` is encrypted"),
        ("zip-lzma", "z.zip", "ARCHIVE_UNSUPPORTED", "`a` is compressed by method 14"),
        ("zip-overlap", "z.zip", "ARCHIVE_REFUSED", "`a` shares its bytes"),
        ("zip-crc", "z.zip", "ARCHIVE_DAMAGED", "`a`: its CRC-32 is wrong"),
        ("zip-names", "z.zip", "ARCHIVE_DAMAGED", "its own header calls it `name1`"),
        ("text", "x.tar", "NOT_AN_ARCHIVE", "not a tar"),
        ("text", "x.tar.gz", "NOT_AN_ARCHIVE", "not a tar"),
        ("text", "x.zip", "NOT_AN_ARCHIVE", "not a zip"),
        ("text", "x.zst", "NOT_AN_ARCHIVE", "not zstd"),
    ] {
        let archive = place.python(kind, name);
        let error = if kind.starts_with("bomb") { drain(&archive).await } else { refused(&archive).await };
        assert_eq!(error.reason(), reason, "{kind}: {}", error.report());
        assert!(error.report().contains(said), "{kind}: {}", error.report());
        assert!(error.to_string().starts_with(&format!("extracting `{name}`: ")), "{kind}: {error}");
    }
}

/// As [`refused`], without keeping what came.
async fn drain(path: &Path) -> Error {
    let Opened::Streamed(mut stream) = open(path, "").await.unwrap() else { panic!("listed") };
    loop {
        match stream.next_entry().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was taken"),
            Err(error) => return error,
        }
    }
}

#[tokio::test]
async fn an_archive_cut_anywhere_is_damaged() {
    let place = Place::new();
    std::fs::remove_file(place.tree().join("weights.bin")).unwrap();
    let made = [
        place.gnu("c.tar", &["--format=gnu", "--blocking-factor=1"]),
        place.gnu("c.tar.zst", &["--zstd"]),
        place.python("zip-deflated", "c.zip"),
    ];
    for path in made {
        let whole = std::fs::read(&path).unwrap();
        extract(&path).await.unwrap();
        for step in 1..60 {
            let cut = whole.len() * step / 60;
            // GNU tar writes two zero blocks, the first of which is the end.
            if path.ends_with("c.tar") && cut >= whole.len() - 512 {
                continue;
            }
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = refused(&path).await;
            let expected = ["ARCHIVE_DAMAGED", "NOT_AN_ARCHIVE"].contains(&error.reason());
            assert!(expected, "{} cut at {cut}: {}", path.display(), error.report());
        }
    }
}

#[tokio::test]
async fn damaged_bytes_never_panic() {
    let place = Place::new();
    std::fs::remove_file(place.tree().join("weights.bin")).unwrap();
    let made = [
        place.gnu("d.tar", &["-S", "--format=pax"]),
        place.gnu("d.tar.gz", &["-z"]),
        place.gnu("d.tar.xz", &["-J"]),
        place.python("zip-64", "d.zip"),
    ];
    for path in made {
        let whole = std::fs::read(&path).unwrap();
        for step in 0..80 {
            let mut damaged = whole.clone();
            let at = step * 7919 % whole.len();
            damaged[at] ^= 1 << (step % 8);
            std::fs::write(&path, &damaged).unwrap();
            if let Err(error) = extract(&path).await {
                assert_ne!(error.kind(), Kind::Internal, "{} at {at}: {}", path.display(), error.report());
            }
        }
    }
}

#[tokio::test]
async fn files_that_are_zips_inside_and_kept_archives_are_files() {
    let place = Place::new();
    for (name, extract) in [("model.pt", ""), ("a.npz", "true"), ("a.whl", ""), ("kept.zip", "false")] {
        let path = place.python("zip-stored", name);
        let Opened::Listed(listing) = open(&path, extract).await.unwrap() else { panic!("{name} is streamed") };
        let paths: Vec<_> = listing.entries.iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(paths, [name]);
    }
}

#[tokio::test]
async fn the_revision_is_that_of_the_file() {
    let place = Place::new();
    let path = place.python("zip-stored", "r.zip");
    let revision = async || match open(&path, "").await.unwrap() {
        Opened::Streamed(stream) => stream.revision(&any_tree()),
        Opened::Listed(_) => panic!("listed"),
    };
    let first = revision().await;
    assert_eq!(revision().await, first);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert_ne!(revision().await, first);
}

#[tokio::test]
async fn an_archive_that_changes_while_it_is_read_says_so() {
    let place = Place::new();
    let path = place.gnu("c.tar", &[]);
    let Opened::Streamed(mut stream) = open(&path, "").await.unwrap() else { panic!("listed") };
    stream.next_entry().await.unwrap().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() + 512).unwrap();
    let error = loop {
        match stream.next_entry().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was taken"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), "SOURCE_CHANGED");
}
