//! What the black-box tests and the figures stand on: a private daemon, private file systems, a web site that
//! misbehaves on request, and checkpoints made from a seed.
//!
//! Everything is a guard: it undoes on drop whatever it made, also when the test fails. Nothing here reaches into
//! the crate; the programs are driven through what they promise to scripts.

#![expect(dead_code, reason = "each test file and the figures use their part of it")]

pub(crate) mod container;
pub(crate) mod corpus;
pub(crate) mod daemon;
pub(crate) mod faultfs;
pub(crate) mod faults;
pub(crate) mod files;
pub(crate) mod ftp_faults;
pub(crate) mod jail;
pub(crate) mod loopfs;
pub(crate) mod memory;
pub(crate) mod network;
pub(crate) mod place;
pub(crate) mod ran;
pub(crate) mod relay;
pub(crate) mod rot;
pub(crate) mod seccomp;
pub(crate) mod server;
pub(crate) mod site;
pub(crate) mod standin;
pub(crate) mod steady;
pub(crate) mod still;
pub(crate) mod waiting;
pub(crate) mod way;
pub(crate) mod webserver;
