//! Sources from end to end against servers that nobody here wrote: create, ready, attach, compared byte by byte, killed in
//! the middle and resumed, and whatever goes wrong on the way.
//!
//! `tests/run` installs the servers; each test starts its own on loopback and ends it. Needs root, as mounting does.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod archives;
mod aws;
mod azure;
mod buckets;
mod catalogue;
mod credentials;
mod faltering;
mod ftp;
mod gcs;
mod git;
mod huggingface;
mod kaggle;
mod local;
mod proxies;
mod regional;
mod s3;
mod taken_back;
mod web;
mod web_policy;
