//! Somebody's own computer as a source: it sends a tar and a digest of it, when its owner wishes.
//!
//! The daemon cannot reach that computer, so nothing is opened or listed: a checkpoint of this type waits, and whoever has its
//! [token](Tokens) sends. Here are what proves that right, and the stream between the requests that bring bytes and the ingest that
//! takes entries ([`stream`]). The protocol is spoken by `http::transfer`.

mod digester;
mod incoming;
mod sent;
mod settling;
mod token;

pub use sent::{Feed, Left, PIECE_BYTES, Room, SentTar, go_on, stream};
pub use token::{Bearer, Tokens};

/// SHA-512 of a stream.
pub type StreamDigest = [u8; 64];

/// The revision of what was sent, by the SHA-512 of its tar.
pub fn revision(digest: &StreamDigest) -> String {
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha512:{hex}")
}
