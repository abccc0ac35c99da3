//! The generated messages and services of `proto/ckptd/v1`, and the descriptors for reflection.

#[expect(missing_docs, clippy::all, clippy::pedantic, reason = "generated from proto/, where the comments are")]
mod generated {
    tonic::include_proto!("ckptd.v1");
}

pub use generated::*;

/// Encoded `FileDescriptorSet` of the package, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Metadata in which a scheduler says for whom it asks: percent-encoded UTF-8.
pub const OWNER_METADATA: &str = "ckptd-owner";

/// Reasons of refusals that `ckptctl` acts on.
pub mod reasons {
    pub use crate::retain::scrub::GOES_ON as SCRUB_GOES_ON;

    /// An upload that somebody else is sending.
    pub const UPLOAD_UNDER_WAY: &str = "UPLOAD_UNDER_WAY";
    /// What is there, and not being uploaded.
    pub const UPLOAD_NOT_UNDER_WAY: &str = "UPLOAD_NOT_UNDER_WAY";
    /// An upload whose connection ended before it did.
    pub const UPLOAD_BROKEN: &str = "UPLOAD_BROKEN";
    /// An upload that stands elsewhere than where its sender goes on.
    pub const UPLOAD_DESYNC: &str = "UPLOAD_DESYNC";
}
