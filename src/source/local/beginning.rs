//! Whether a tar holds a tree or one file by its own name, by its first member.
//!
//! `tar -C DIR .` begins with the member `./`, a directory; `tar -C PARENT FILE` with the file. Readers of tars drop `./`, so it is
//! looked for here, behind what may come before it: extended headers and long names.

/// Length of a header and of whatever follows it in blocks.
const BLOCK_BYTES: usize = 512;

/// Reads on until the first member is known.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    /// The present header, as far as it is here.
    header: Vec<u8>,
    /// Bytes of an extension still to be passed over.
    skip: u64,
    tree: Option<bool>,
}

impl Beginning {
    /// Looks at the next bytes.
    pub(super) fn look(&mut self, mut bytes: &[u8]) {
        while self.tree.is_none() && !bytes.is_empty() {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= u64::try_from(skipped).unwrap_or(self.skip);
            bytes = &bytes[skipped..];
            let taken = (BLOCK_BYTES - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.header.len() == BLOCK_BYTES {
                self.judge();
            }
        }
    }

    /// Whether it begins with its root; `None` while that is not known.
    pub(super) fn is_tree(&self) -> Option<bool> {
        self.tree
    }

    fn judge(&mut self) {
        match self.header[156] {
            b'x' | b'X' | b'g' | b'L' | b'K' => self.skip = padded_size(&self.header[124..136]),
            kind => {
                let name = self.header[..100].split(|byte| *byte == 0).next().unwrap_or_default();
                self.tree = Some(kind == b'5' && matches!(name, b"./" | b"."));
            }
        }
        self.header.clear();
    }
}

/// A size in octal, rounded up to whole blocks; what is no number is left to the reader of the tar to refuse.
fn padded_size(field: &[u8]) -> u64 {
    let digits = field.iter().skip_while(|byte| **byte == b' ').take_while(|byte| (b'0'..=b'7').contains(*byte));
    let size = digits.fold(0_u64, |size, digit| (size << 3) | u64::from(digit - b'0'));
    size.next_multiple_of(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, kind: u8, size: usize) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[156] = kind;
        block.resize(BLOCK_BYTES + size.next_multiple_of(BLOCK_BYTES), b'.');
        block
    }

    #[test]
    fn a_tree_begins_with_its_root_whatever_comes_before_it() {
        let extended =
            |then: Vec<u8>| [member("././@PaxHeader", b'x', 700), member("././@LongLink", b'L', 3), then].concat();
        for (tar, tree) in [
            (member("./", b'5', 0), true),
            (member("model.zip", b'0', 9), false),
            (member("./model.zip", b'0', 9), false),
            (extended(member("./", b'5', 0)), true),
            (extended(member("x", b'0', 0)), false),
        ] {
            for step in [1, 100, 512, 5000] {
                let mut beginning = Beginning::default();
                tar.chunks(step).for_each(|piece| beginning.look(piece));
                assert_eq!(beginning.is_tree(), Some(tree), "{step}");
            }
        }
        let mut short = Beginning::default();
        short.look(&[0; 511]);
        assert_eq!(short.is_tree(), None);
    }
}
