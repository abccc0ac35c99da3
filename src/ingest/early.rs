//! What a loader reads of a large file before its weights: by its name, for nothing of it is here.
//!
//! A header is at the beginning of safetensors, GGUF, npy; what `torch.save`, `numpy.savez` and Keras write is a zip file, whose directory is
//! at its end. Tokenizers, vocabularies and indexes are read whole before any of that.

use crate::names::EntryPath;

/// Endings of files that are zip files.
const ZIPPED: [&[u8]; 8] = [b"bin", b"ckpt", b"keras", b"npz", b"pt", b"pt2", b"pth", b"zip"];

/// Endings of files that say what to do with the others.
const TELLING: [&[u8]; 10] = [b"jinja", b"json", b"md", b"model", b"py", b"spm", b"tiktoken", b"txt", b"yaml", b"yml"];

/// Longer ones are data, whatever they are called.
const TELLING_BYTES: u64 = 128 << 20;

/// What is fetched whole of one checkpoint: a model has so much at most, a set of data may have any number of such files.
const WHOLE_BYTES: u64 = 2 * TELLING_BYTES;

/// The early parts of one checkpoint's files.
#[derive(Debug, Default)]
pub(super) struct Earlies {
    whole_bytes: u64,
}

impl Earlies {
    /// Of the next file.
    pub(super) fn of(&mut self, path: &EntryPath, size: Option<u64>) -> Early {
        let early = Early::of(path, size);
        if early == Early::Whole {
            self.whole_bytes = self.whole_bytes.saturating_add(size.unwrap_or(0));
        }
        if early == Early::Whole && self.whole_bytes > WHOLE_BYTES { Early::Beginning } else { early }
    }
}

/// Which part of a file is fetched before the rest of the large ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Early {
    /// Its first unit.
    Beginning,
    /// Its first unit and its last.
    BothEnds,
    /// All of it.
    Whole,
}

impl Early {
    /// Of a file of `size` bytes, if that is known, at `path`.
    pub(super) fn of(path: &EntryPath, size: Option<u64>) -> Self {
        let ending = path.file_name().rsplit(|byte| *byte == b'.').next().unwrap_or_default().to_ascii_lowercase();
        let is_one = |endings: &[&'static [u8]]| endings.iter().any(|one| *one == ending);
        if is_one(&TELLING) && size.is_some_and(|size| size <= TELLING_BYTES) {
            Self::Whole
        } else if is_one(&ZIPPED) {
            Self::BothEnds
        } else {
            Self::Beginning
        }
    }

    /// Whether the unit is of that part of a file of so many units.
    pub(super) fn contains(self, unit: u64, units: u64) -> bool {
        match self {
            Self::Beginning => unit == 0,
            Self::BothEnds => unit == 0 || unit + 1 == units,
            Self::Whole => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_is_read_first() {
        let early = |path: &str, size| Early::of(&EntryPath::new(path.as_bytes().to_vec()).unwrap(), Some(size));
        assert_eq!(early("a/tokenizer.json", 33 << 20), Early::Whole);
        assert_eq!(early("train.JSON", 1 << 40), Early::Beginning);
        assert_eq!(early("unet/diffusion_pytorch_model.bin", 5 << 30), Early::BothEnds);
        assert_eq!(early("model-00001-of-00002.safetensors", 5 << 30), Early::Beginning);
        assert_eq!(early("weights", 5 << 30), Early::Beginning);
        let mut earlies = Earlies::default();
        let of_many = [(); 4].map(|()| earlies.of(&EntryPath::new(b"part.json".to_vec()).unwrap(), Some(100 << 20)));
        assert_eq!(of_many, [Early::Whole, Early::Whole, Early::Beginning, Early::Beginning]);
        let units = |early: Early| (0..4).filter(|unit| early.contains(*unit, 4)).collect::<Vec<_>>();
        assert_eq!(
            [Early::Beginning, Early::BothEnds, Early::Whole].map(units),
            [vec![0], vec![0, 3], vec![0, 1, 2, 3]]
        );
    }
}
