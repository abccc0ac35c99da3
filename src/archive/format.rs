//! Which files are archives: by name, and by content.

use super::input::Coding;
use super::{tar_header, unsupported};
use crate::error::{Error, Result};
use crate::names::EntryName;

/// Names that are archives, longest ending first; matched without regard to case.
const ENDINGS: &[(&str, Format)] = &[
    (".tar.gz", Format::Tar),
    (".tar.bz2", Format::Tar),
    (".tar.xz", Format::Tar),
    (".tar.zst", Format::Tar),
    (".tgz", Format::Tar),
    (".tbz2", Format::Tar),
    (".tar", Format::Tar),
    (".zip", Format::Zip),
    (".gz", Format::Single(Coding::Gzip)),
    (".bz2", Format::Single(Coding::Bzip2)),
    (".xz", Format::Single(Coding::Xz)),
    (".zst", Format::Single(Coding::Zstd)),
];

/// What a name says an archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A zip.
    Zip,
    /// A tar, plain or compressed.
    Tar,
    /// One compressed file.
    Single(Coding),
}

impl Format {
    /// What `name` says; `None` for what is no archive to be extracted.
    pub fn of_name(name: &EntryName) -> Option<Self> {
        let found = ENDINGS.iter().find(|(ending, _)| has_ending(name.as_bytes(), ending));
        found.map(|(_, format)| *format)
    }

    /// Looks whether what begins with `start` is what its name says, and how it is compressed.
    ///
    /// # Errors
    /// `NOT_AN_ARCHIVE`; `ARCHIVE_UNSUPPORTED` for a volume of a split zip.
    pub(super) fn check(self, start: &[u8]) -> Result<Coding> {
        match (self, Coding::of_content(start)) {
            (Self::Zip, _) if start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06") => Ok(Coding::Plain),
            (Self::Zip, _) if start.starts_with(b"PK\x07\x08") => Err(unsupported("it is one volume of a split zip")),
            (Self::Tar, Some(coding)) => Ok(coding),
            (Self::Tar, None) if tar_header::begins_tar(start) => Ok(Coding::Plain),
            (Self::Single(named), Some(found)) if named == found => Ok(found),
            _ => Err(self.not_an_archive()),
        }
    }

    /// The name of the one file inside: the archive's without its ending.
    pub(super) fn content_name(self, name: &EntryName) -> &[u8] {
        let name = name.as_bytes();
        let ending = ENDINGS.iter().find(|(ending, _)| has_ending(name, ending)).map_or(0, |(ending, _)| ending.len());
        &name[..name.len() - ending]
    }

    fn not_an_archive(self) -> Error {
        let what = match self {
            Self::Zip => "a zip",
            Self::Tar => "a tar",
            Self::Single(Coding::Gzip) => "gzip",
            Self::Single(Coding::Bzip2) => "bzip2",
            Self::Single(Coding::Xz) => "xz",
            Self::Single(Coding::Zstd) => "zstd",
            Self::Single(Coding::Plain | Coding::Deflate) => "compressed",
        };
        Error::invalid("NOT_AN_ARCHIVE", format!("its content is not {what}, as its name says"))
            .remedy("give it the name of what it is")
    }
}

/// Whether `name` is `ending` with something before it.
fn has_ending(name: &[u8], ending: &str) -> bool {
    name.len() > ending.len() && name[name.len() - ending.len()..].eq_ignore_ascii_case(ending.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> Option<Format> {
        Format::of_name(&EntryName::new(name.as_bytes()).unwrap())
    }

    #[test]
    fn names_tell_archives_from_files() {
        for name in ["a.tar", "a.TAR", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tbz2", "a.tar.xz", "a.Tar.Zst"] {
            assert_eq!(of(name), Some(Format::Tar), "{name}");
        }
        assert_eq!(of("a.zip"), Some(Format::Zip));
        assert_eq!(of("model.safetensors.gz"), Some(Format::Single(Coding::Gzip)));
        for name in [
            "a.pt",
            "a.pth",
            "a.bin",
            "a.npz",
            "a.keras",
            "a.whl",
            "a.jar",
            "a.gguf",
            ".zip",
            "zip",
            "a.tar.lz4",
            "a.7z",
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }

    #[test]
    fn a_single_file_keeps_its_name_without_the_ending() {
        for (name, inside) in [("model.safetensors.ZST", "model.safetensors"), ("a.xz", "a"), (".x.gz", ".x")] {
            let name = EntryName::new(name.as_bytes()).unwrap();
            assert_eq!(Format::of_name(&name).unwrap().content_name(&name), inside.as_bytes());
        }
    }
}
