//! Everything that a checkpoint takes from a repository and its submodules, brought into the scratch directory and listed.
//!
//! Repositories are numbered as they are found, the first being the one asked for; submodules follow level by level, bounded in depth and
//! number, each by the same rules and at most with the credentials meant for its origin. What is listed equals what a
//! checkout would give, less line ends and encodings that attributes would change: bytes are those of the repository, and the large
//! files of LFS where attributes say so.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::super::connect::SourceContext;
use super::super::{Counter, File, Listed, Stated, What};
use super::access::Access;
use super::address::Remote;
use super::blobs::read_all;
use super::child::Workshop;
use super::fetch::{Wanted, fetch, good};
use super::lfs::{Endpoint, Lfs, Pointer, decode};
use super::link::{Link, git};
use super::tree::{self, Item, Kind};
use crate::error::{Error, Result};
use crate::limits;
use crate::names::EntryPath;

/// A checkpoint's repositories, fetched, and what they hold.
#[derive(Debug, Default)]
pub(super) struct Checkout {
    /// The first repository's commit.
    pub(super) commit: String,
    pub(super) entries: Vec<Listed>,
    pub(super) skipped: Vec<(String, String)>,
    /// By the number of the repository, where it has large files.
    pub(super) lfs: HashMap<usize, Arc<Lfs>>,
}

/// A repository that is still to be fetched.
struct Pending {
    number: usize,
    depth: usize,
    /// Where it stands in the checkpoint.
    at: EntryPath,
    remote: Remote,
    wanted: Wanted,
}

/// What every step needs.
pub(super) struct Errand<'a> {
    pub(super) access: &'a Access,
    pub(super) context: &'a SourceContext,
    pub(super) workshop: &'a Workshop,
}

impl Errand<'_> {
    /// Fetches and lists what `wanted` means at `remote`.
    ///
    /// # Errors
    /// What a server says; a submodule's path is named.
    pub(super) async fn run(&self, remote: &Remote, wanted: &Wanted, counter: &Counter) -> Result<Checkout> {
        let mut checkout = Checkout::default();
        let first =
            Pending { number: 0, depth: 0, at: EntryPath::root(), remote: remote.clone(), wanted: wanted.clone() };
        let mut pending = VecDeque::from([first]);
        let mut found = 1;
        while let Some(next) = pending.pop_front() {
            let at = next.at.clone();
            let done = self.take(next, (&mut checkout, counter), &mut found).await;
            pending.extend(done.map_err(|error| {
                if at.is_root() { error } else { error.during(format!("the submodule `{at}`")).fact("submodule", &at) }
            })?);
        }
        Ok(checkout)
    }

    /// One repository; returns its submodules.
    async fn take(
        &self,
        from: Pending,
        (checkout, counter): (&mut Checkout, &Counter),
        found: &mut usize,
    ) -> Result<Vec<Pending>> {
        let Errand { access, context, workshop } = *self;
        let number = from.number;
        let link = Link::find(&from.remote, number, access, context, workshop).await?;
        let commit = fetch(&link, number, &from.wanted, access, workshop).await?;
        let before = checkout.entries.len();
        let items = tree::list(workshop, number, &commit, &|entries| counter(before + entries)).await?;
        let pointers = self.pointers(number, &commit, &items).await?;
        let links = self.link_targets(number, &items).await?;
        let mut objects = Vec::with_capacity(pointers.len());
        let mut indices: HashMap<&Pointer, usize> = HashMap::new();
        for (place, item) in items.iter().enumerate() {
            let path = below(&from.at, &item.path)?;
            let what = match item.kind {
                Kind::Symlink => What::Symlink(links.get(&place).cloned().unwrap_or_default()),
                Kind::Submodule => What::Directory,
                Kind::File { executable } => What::File(match pointers.get(&place) {
                    None => plain_file(number, item, executable)?,
                    Some(pointer) => {
                        let index = *indices.entry(pointer).or_insert_with(|| {
                            objects.push(pointer.clone());
                            objects.len() - 1
                        });
                        lfs_file(number, index, pointer, executable)
                    }
                }),
            };
            checkout.entries.push(Listed { path, what });
        }
        if !objects.is_empty() {
            self.add_lfs(number, &items, &link, objects, checkout).await?;
        }
        if number == 0 {
            checkout.commit = commit;
        }
        self.submodules(&from, &link.remote, &items, checkout, found).await
    }

    /// Targets of symbolic links, by place in `items`.
    async fn link_targets(&self, number: usize, items: &[Item]) -> Result<HashMap<usize, Box<[u8]>>> {
        let (places, links) = chosen(items, |item| item.kind == Kind::Symlink);
        if let Some(link) = links.iter().find(|item| item.size == 0 || item.size > limits::ENTRY_PATH_BYTES as u64) {
            let message = format!("the link `{}` has a target of {} bytes", link.path, link.size);
            return Err(Error::invalid("BAD_LINK_TARGET", message));
        }
        let mut targets = HashMap::with_capacity(links.len());
        read_all(self.workshop, number, &links, |at, bytes| {
            targets.insert(places[at], bytes.into());
            Ok(())
        })
        .await?;
        Ok(targets)
    }

    /// Pointers that a checkout would replace, by place in `items`.
    async fn pointers(&self, number: usize, commit: &str, items: &[Item]) -> Result<HashMap<usize, Pointer>> {
        let (places, small) =
            chosen(items, |item| matches!(item.kind, Kind::File { .. }) && Pointer::may_be(item.size));
        let mut found = Vec::new();
        read_all(self.workshop, number, &small, |at, bytes| {
            found.extend(Pointer::parse(bytes).map(|pointer| (places[at], pointer)));
            Ok(())
        })
        .await?;
        if found.is_empty() {
            return Ok(HashMap::new());
        }
        let paths: Vec<&EntryPath> = found.iter().map(|(place, _)| &items[*place].path).collect();
        let filtered = self.filtered(number, commit, &paths).await?;
        Ok(found.into_iter().zip(filtered).filter_map(|(found, filtered)| filtered.then_some(found)).collect())
    }

    /// Whether the repository's attributes send each of `paths` through LFS.
    async fn filtered(&self, number: usize, commit: &str, paths: &[&EntryPath]) -> Result<Vec<bool>> {
        let index = format!("{number}.index");
        let read = git(self.workshop, number, &["read-tree", commit]).variable("GIT_INDEX_FILE", &index);
        good(read.run(self.workshop, |_| Ok(())).await?, "reading a tree")?;
        let mut list = Vec::new();
        paths.iter().for_each(|path| list.extend_from_slice(&[path.as_bytes(), b"\0"].concat()));
        let file = self.workshop.scratch.path().join(format!("{number}.paths"));
        std::fs::write(&file, list).map_err(|error| Error::io("writing", &file, error))?;
        let input = std::fs::File::open(&file).map_err(|error| Error::io("opening", &file, error))?;
        let call = git(self.workshop, number, &["check-attr", "-z", "--stdin", "--cached", "filter"])
            .variable("GIT_INDEX_FILE", &index);
        // Answers of three fields: path, attribute, value.
        let (mut filtered, mut field, mut value) = (Vec::with_capacity(paths.len()), 0, Vec::new());
        let take = |bytes: &[u8]| {
            for byte in bytes {
                match (byte, field) {
                    (0, 2) => {
                        filtered.push(value == b"lfs");
                        value.clear();
                        field = 0;
                    }
                    (0, _) => field += 1,
                    (byte, 2) if value.len() < limits::ENTRY_NAME_BYTES => value.push(*byte),
                    _ => {}
                }
            }
            Ok(())
        };
        let ended = call.run_on(input.into(), self.workshop, take).await?;
        good(ended, "reading attributes")?;
        if filtered.len() == paths.len() {
            return Ok(filtered);
        }
        Err(Error::internal("git tells other attributes than it was asked for"))
    }

    /// Makes the client of the large files, and finds out whether they can be read in ranges.
    async fn add_lfs(
        &self,
        number: usize,
        items: &[Item],
        link: &Link,
        objects: Vec<Pointer>,
        checkout: &mut Checkout,
    ) -> Result<()> {
        let configuration = items.iter().find(|item| item.path.as_bytes() == b".lfsconfig" && is_file(item));
        let settings = match configuration {
            Some(item) => tree::settings(self.workshop, number, item).await?,
            None => Vec::new(),
        };
        let configured = settings.iter().find(|(key, _)| key == "lfs.url").map(|(_, value)| value.as_str());
        let endpoint = Endpoint::new(link, self.access, self.workshop, configured)?;
        let largest = (0..objects.len()).max_by_key(|index| objects[*index].size);
        let largest = largest.filter(|index| objects[*index].size > limits::UNIT_BYTES);
        let lfs = Arc::new(Lfs::new(self.context.http.clone(), endpoint, objects));
        if let Some(largest) = largest
            && !lfs.answers_ranges(largest).await?
        {
            let ours = prefix(number);
            let files = checkout.entries.iter_mut().filter_map(|entry| match &mut entry.what {
                What::File(file) if file.locator.starts_with(&ours) => Some(file),
                _ => None,
            });
            files.for_each(|file| file.ranges = false);
        }
        checkout.lfs.insert(number, lfs);
        Ok(())
    }

    /// Submodules among `items`. One that the repository itself gives no address stays an empty directory, as in a checkout.
    async fn submodules(
        &self,
        from: &Pending,
        remote: &Remote,
        items: &[Item],
        checkout: &mut Checkout,
        found: &mut usize,
    ) -> Result<Vec<Pending>> {
        let (_, modules) = chosen(items, |item| item.kind == Kind::Submodule);
        if modules.is_empty() {
            return Ok(Vec::new());
        }
        let file = items.iter().find(|item| item.path.as_bytes() == b".gitmodules" && is_file(item));
        let settings = match file {
            Some(item) => tree::settings(self.workshop, from.number, item).await?,
            None => Vec::new(),
        };
        let mut pending = Vec::with_capacity(modules.len());
        for item in modules {
            let at = below(&from.at, &item.path)?;
            let Some(url) = tree::submodule_url(&settings, &item.path) else {
                checkout.skipped.push((at.to_string(), "is a submodule without an address".to_owned()));
                continue;
            };
            let depth = from.depth + 1;
            if depth > limits::GIT_SUBMODULE_DEPTH || *found > limits::GIT_SUBMODULES {
                let message = format!(
                    "the submodule `{at}` is one too many: {} levels and {} in all are allowed",
                    limits::GIT_SUBMODULE_DEPTH,
                    limits::GIT_SUBMODULES
                );
                return Err(Error::no_space("TOO_MANY_SUBMODULES", message).fact("submodule", &at));
            }
            let named = |error: Error| error.during(format!("the submodule `{at}`")).fact("submodule", &at);
            let remote = remote.submodule(url).map_err(named)?;
            let wanted = Wanted::Commit(item.id.clone());
            pending.push(Pending { number: *found, depth, at, remote, wanted });
            *found += 1;
        }
        Ok(pending)
    }
}

/// Begins the locators of the large files of a repository.
pub(super) fn prefix(number: usize) -> String {
    format!("lfs/{number}/")
}

fn plain_file(number: usize, item: &Item, executable: bool) -> Result<File> {
    // Ids of 64 digits are SHA-256, made of what no other program calls so: git itself verified them.
    let git_sha1 = decode::<20>(&item.id);
    Ok(File {
        locator: format!("blob/{number}/{}", item.id).into(),
        size: Some(item.size),
        executable,
        ranges: false,
        expected: Stated { git_sha1, ..Stated::default() }.into(),
    })
}

fn lfs_file(number: usize, index: usize, pointer: &Pointer, executable: bool) -> File {
    File {
        locator: format!("{}{index}", prefix(number)).into(),
        size: Some(pointer.size),
        executable,
        ranges: true,
        expected: Stated { sha256: Some(pointer.sha256), ..Stated::default() }.into(),
    }
}

fn is_file(item: &Item) -> bool {
    matches!(item.kind, Kind::File { .. })
}

/// The items that `choose` takes, and their places.
fn chosen(items: &[Item], choose: impl Fn(&Item) -> bool) -> (Vec<usize>, Vec<&Item>) {
    items.iter().enumerate().filter(|(_, item)| choose(item)).unzip()
}

fn below(at: &EntryPath, path: &EntryPath) -> Result<EntryPath> {
    if at.is_root() {
        return Ok(path.clone());
    }
    EntryPath::new([at.as_bytes(), b"/", path.as_bytes()].concat())
}
