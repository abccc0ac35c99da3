//! What the store keeps and what it gives up: decided by a pure function ([`plan`]), carried out by [`Retention`].
//!
//! Owns no state of its own: what may go is in the catalog (pins, leases, last use), what is read this moment in the store's holds, and what calls
//! wait for in memory ([`Retention::keep`]). Nothing here changes a file or a row: the store evicts and punches, one small step after the other,
//! and refuses what became leased or pinned since it was planned.
//!
//! Room is made when somebody lacks it (an ingest before its first byte, or in its midst), when the store is above its high watermark (looked at
//! whenever a record changes, never by a clock: an idle daemon sleeps), and by hand. One round runs at a time. Who lacks room gets all of it or
//! nothing is given up for it; above the watermark, what can go goes, down to the low one. What is on its way out already, of removals and of what a crash
//! left, is waited for first, within bounds.
//!
//! An evicted checkpoint keeps its record, revision, tree and digest; whoever wants it has it filled again (`ingest::again`).
//!
//! **Scrubbing** ([`scrub`]) reads what is at rest again.
//!
//! A crash at any point leaves records that are evicted with blobs that are on their way out; the store finishes that when it is opened.

mod carry_out;
mod in_use;
pub mod plan;
pub mod scrub;

pub use carry_out::{ByHand, Outcome, Retention};
pub use in_use::Use;
