//! Who calls: what the kernel says of the other end of the Unix socket.

use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use super::refusal::status;
use crate::error::Error;

/// Lets root and the daemon's own user pass.
pub(super) fn check(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    let uid = peer.map(|peer| peer.uid());
    if uid.is_some_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw()) {
        return Ok(request);
    }
    let who = uid.map_or_else(|| "an unknown caller".to_owned(), |uid| format!("the user {uid}"));
    Err(status(Error::denied("CALLER_REFUSED", format!("{who} may not command ckptd")).remedy("call as root")))
}
