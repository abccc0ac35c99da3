//! ckptd brings model checkpoints onto a GPU host, keeps them once, and lets any number of jobs read them at native speed.
//!
//! # How it hangs together
//!
//! ```text
//!  request --> control --> ingest  --> store + catalog --> serve --> job
//!                            ^             |
//!                          source        disk
//! ```
//! A scheduler asks over gRPC ([`control`]). A [`source`] says which revision is meant and gives bytes; [`ingest`] brings them in,
//! in fill units and several at a time; [`layout`] says where to cut them, [`store`] seals them as blobs, deduplicated by
//! chunk, with their rows in the [`catalog`]; the tree becomes a [`manifest`], whose digest is the checkpoint's identity. [`serve`]
//! shows each checkpoint as one read-only FUSE file system, bound wherever jobs want it, with whole blobs handed to the kernel. When the store is
//! short of room, [`retain`] gives up what can be fetched again.
//!
//! # Floors
//!
//! Modules stand below in floor order, which is also the order to read them in; none imports one that comes later (`tests/tidy.rs`
//! holds the table). Two rules run through all of them:
//!
//! * what is durable when is decided in [`store`] (order of writes) and carried out in [`disk`], the only part that changes files;
//! * nothing that answers the kernel waits for network, SQLite or a lock of unknown length ([`serve`]).

// 0: words.
pub mod allocator;
pub mod certificates;
pub mod digest;
pub mod error;
mod in_place;
pub mod limits;
pub mod names;
pub mod panics;
pub mod places;
pub mod units;

// 1: model.
pub mod layout;
pub mod manifest;

// 2: disk.
pub mod disk;
mod pieces;

// 3: state.
pub mod catalog;
pub mod store;

// 3: sources.
pub mod archive;
pub mod source;

// 4: work.
pub mod ingest;
pub mod retain;

// 5: serve.
pub mod serve;

// 6: control.
pub mod control;
pub mod http;

// 7: process.
pub mod cli;
pub mod daemon;
