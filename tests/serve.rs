//! Real mounts: what a job sees of a checkpoint, where views may go, and what is left behind.
//!
//! Needs root, `/dev/fuse` and passthrough (Linux 6.9); without root the tests say so and pass over.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod serve {
    mod fixture;

    mod attaching;
    mod reading;
    mod sessions;
}
