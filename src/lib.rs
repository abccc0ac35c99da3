//! ckptd: node-local checkpoint service.
pub mod digest;
pub mod error;
pub mod limits;
pub mod names;
pub mod units;

pub mod layout;
pub mod manifest;

pub mod disk;

pub mod catalog;
pub mod store;

pub mod control;
pub mod source;

pub mod ingest;
