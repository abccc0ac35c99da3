//! gRPC: the services of `proto/`, wire <-> domain, authorisation.

pub mod wire;
