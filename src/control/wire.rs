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
