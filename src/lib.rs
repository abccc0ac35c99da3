//! ckptd: node-local checkpoint service.
pub mod digest;
pub mod error;
pub mod limits;
pub mod names;
pub mod units;

pub mod manifest;

pub mod serve;

pub mod control;
pub mod source;
