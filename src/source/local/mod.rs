//! Somebody's own computer as a source: it sends a tar and a digest of it, when its owner wishes.
//!
//! The daemon cannot reach that computer, so nothing is opened or listed: a checkpoint of this type waits, and whoever has its
//! [token](Tokens) sends. Here are what proves that right, and the stream between the requests that bring bytes and the ingest that
//! takes entries ([`stream`]). The protocol is spoken by `http::transfer`.

mod beginning;
mod sent;
mod token;

pub use sent::{Feed, PIECE_BYTES, Room, SentTar, StreamDigest, stream};
pub use token::{Bearer, Tokens};

/// The revision of what was sent, by the SHA-512 of its tar.
pub fn revision(digest: &StreamDigest) -> String {
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha512:{hex}")
}
