//! A directory or file of a datastore: served in place, or brought in with `copy=true`.
//!
//! In place the listing says where the bytes stay, and the ingest only takes digests. A path that names one archive is then
//! served as the file it is; only a copy is extracted. `path` is absolute within the datastore, `/` the whole of it; it may not
//! climb, and resolving it follows no link, so that nothing outside of the datastore can be named or reached.
//!
//! Listing is given up ([`patience`](super::patience)) when the datastore says nothing for as long as a server of the network may (`sources.inactivity_timeout_s`).

use std::fs::File as OpenFile;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::beneath::Root;
use super::connect::SourceContext;
use super::directory::DirectorySource;
use super::patience::Turns;
use super::{ByteStream, Counter, File, Opened, Source, SourceSpec};
use crate::error::{Error, Result};
use crate::names::{EntryPath, show_bytes};
use crate::places::Place;

/// See the module's page.
struct RegionalSource {
    tree: DirectorySource,
    /// Set where the bytes stay: what was asked for, a directory or a file.
    in_place: Option<Place>,
    turns: Arc<Turns>,
    /// How long the datastore may say nothing while it is listed.
    patience: Duration,
    /// For errors.
    datastore: String,
}

/// # Errors
/// `NO_SUCH_DATASTORE`, and those of [`options`].
pub(super) fn connect(spec: &SourceSpec, context: &SourceContext) -> Result<Arc<dyn Source>> {
    let (path, copy) = options(spec)?;
    let datastore = context.datastores.get(&spec.uri).cloned().ok_or_else(|| {
        Error::not_found("NO_SUCH_DATASTORE", format!("there is no datastore `{}`", spec.uri))
            .remedy("let the operator configure it: [datastores.NAME] path = \"/mnt/...\"")
    })?;
    let extract = copy && spec.option("extract") != Some("false");
    let below = path.clone();
    let find = move || {
        let root = Root::open_trusted(&datastore.path).map_err(|error| {
            Error::io("opening the datastore at", &datastore.path, error).remedy("let the operator mount it")
        })?;
        root.descend(&below)
    };
    let tree = DirectorySource::found_by("regional", Arc::new(find), extract.then(|| context.dictionaries.clone()));
    let in_place = (!copy).then(|| Place { datastore: spec.uri.clone(), below: path });
    let turns = context.turns.get(&spec.uri).ok_or_else(|| Error::internal("a datastore has no turns"))?;
    let patience = context.settings.inactivity_timeout;
    Ok(Arc::new(RegionalSource { tree, in_place, turns, patience, datastore: spec.uri.clone() }))
}

impl RegionalSource {
    fn silent(&self) -> Error {
        let (name, seconds) = (&self.datastore, self.patience.as_secs_f64());
        Error::unavailable(
            "DATASTORE_SILENT",
            format!("listing the datastore `{name}`: it gave no answer within {seconds} s"),
        )
        .fact("datastore", name)
        .remedy("see to whoever serves it, then retry")
    }
}

/// The options of a regional source: where below the datastore's root, and whether to copy.
///
/// # Errors
/// `BAD_PATH`, `BAD_OPTION`.
pub(super) fn options(spec: &SourceSpec) -> Result<(EntryPath, bool)> {
    let copy = match spec.option("copy") {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let other = show_bytes(other.as_bytes());
            return Err(Error::invalid("BAD_OPTION", format!("`copy={other}` is neither true nor false"))
                .remedy("give `copy=true` or leave it out"));
        }
    };
    let text = spec.option("path").unwrap_or("/");
    let bad = |why: String| {
        Error::invalid("BAD_PATH", format!("the path `{}` {why}", show_bytes(text.as_bytes())))
            .remedy("give an absolute path below the datastore's root; `/` is all of it")
    };
    let Some(rest) = text.strip_prefix('/') else { return Err(bad("does not begin with `/`".into())) };
    let names: Vec<_> = rest.split('/').filter(|name| !name.is_empty()).collect();
    let path = EntryPath::new(names.join("/").into_bytes()).map_err(|error| bad(format!("cannot be: {error}")))?;
    Ok((path, copy))
}

#[async_trait]
impl Source for RegionalSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let looked = self.turns.run(self.patience, || self.silent(), self.tree.look(counter)).await?;
        let mut opened = self.tree.opened(looked)?;
        if let (Opened::Listed(listing), Some(asked)) = (&mut opened, &self.in_place) {
            listing.in_place = Some(if self.tree.is_one_file() { asked.above() } else { asked.clone() });
        }
        Ok(opened)
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        self.tree.read(file, range).await
    }

    fn is_local(&self) -> bool {
        true
    }

    fn open_local(&self, file: &File) -> Result<Option<OpenFile>> {
        self.tree.open_local(file)
    }

    fn check_unchanged(&self, file: &File, opened: &OpenFile) -> Result<()> {
        self.tree.check_unchanged(file, opened)
    }
}

#[cfg(test)]
mod tests {
    use super::super::SourceKind;
    use super::*;

    fn read(path: &str, copy: &str) -> Result<(EntryPath, bool)> {
        let given = [("path", path), ("copy", copy)].map(|(key, value)| (key.to_owned(), value.to_owned()));
        options(&SourceSpec { kind: SourceKind::Regional, uri: "d".into(), options: given.into() })
    }

    #[test]
    fn a_path_is_absolute_and_does_not_climb() {
        for (text, path) in [("", ""), ("/", ""), ("/a/b/", "a/b"), ("//a//b", "a/b"), ("/...", "...")] {
            assert_eq!(read(text, "").unwrap(), (EntryPath::new(path.as_bytes()).unwrap(), false), "{text}");
        }
        for bad in ["a", "../a", "/..", "/a/../b", "/./a", "/a\0"] {
            assert_eq!(read(bad, "").unwrap_err().reason(), "BAD_PATH", "{bad}");
        }
        assert!(read("/", "true").unwrap().1);
        assert!(!read("/", "false").unwrap().1);
        assert_eq!(read("/", "yes").unwrap_err().reason(), "BAD_OPTION");
    }
}
