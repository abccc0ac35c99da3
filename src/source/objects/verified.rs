//! Bytes checked against a digest that came with them.
//!
//! A listing does not tell the digest of every object, and an answer does: its headers. Where one answer is a whole object, its bytes
//! are checked as they pass, and a wrong digest is found at their end, before the file is sealed.

use futures_util::StreamExt as _;
use futures_util::stream;

use super::super::{ByteStream, Expected, Verifier};

/// `bytes` of the whole object called `what`, and an error behind the last if they are not what is expected.
pub(super) fn verified(bytes: ByteStream, expected: &Expected, what: String) -> ByteStream {
    if expected.is_empty() {
        return bytes;
    }
    // No object's digest depends on its size, as git's ids do.
    let verifier = Some(Verifier::new(expected, 0));
    Box::pin(stream::try_unfold((bytes, verifier, what), |(mut bytes, mut verifier, what)| async move {
        match bytes.next().await.transpose()? {
            Some(piece) => {
                if let Some(verifier) = &mut verifier {
                    verifier.update(&piece);
                }
                Ok(Some((piece, (bytes, verifier, what))))
            }
            None => verifier.take().map_or(Ok(()), |verifier| verifier.finish(&what)).map(|()| None),
        }
    }))
}
