//! The door: every call passes it before any service sees it.
//!
//! It finds out who calls ([`caller`](super::caller)), whether they may, and whether they ask too much; what is let in carries its [`Caller`].
//! Each client (a user of this host, a certificate's name) has a number of calls that it may have under way, streams included, and a rate
//! ([`limits`]); what is beyond is refused at once with `TOO_MANY_CALLS`, unavailable, and never queued. What is kept of a client that has no call under
//! way is forgotten when its rate has recovered, so the memory of it is bounded by who may connect.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use http_body_util::BodyExt as _;
use tonic::body::Body;
use tower::{Layer, Service};

use super::caller::{Caller, Peer, Right, Role, Roles, right_of};
use super::refusal::status;
use super::wire::OWNER_METADATA;
use crate::error::{Error, Result};
use crate::limits;

/// Clients remembered before those that have recovered are forgotten.
const FORGET_FROM: usize = 256;

/// Who may do what, and how much of it.
pub(super) struct Access {
    roles: Roles,
    clients: Mutex<HashMap<String, Client>>,
}

impl Access {
    pub(super) fn new(roles: Roles) -> Arc<Self> {
        Arc::new(Self { roles, clients: Mutex::default() })
    }

    /// Who calls `path`, and its place among the calls under way.
    ///
    /// # Errors
    /// `CALLER_REFUSED`, `BAD_OWNER`, `NOT_YOURS`, `TOO_MANY_CALLS`.
    fn admit(self: &Arc<Self>, peer: Option<&Peer>, path: &str, stated: Option<&[u8]>) -> Result<(Caller, UnderWay)> {
        let peer = peer.ok_or_else(|| Error::internal("a connection came without its peer"))?;
        let caller = self.roles.caller(peer)?;
        let right = right_of(path);
        caller.check(right)?;
        let place = self.take_place(&caller, right)?;
        let caller = match stated {
            Some(owner) => caller.stating(owner)?,
            None => caller,
        };
        Ok((caller, place))
    }

    fn take_place(self: &Arc<Self>, caller: &Caller, right: Right) -> Result<UnderWay> {
        if right == Right::Open {
            return Ok(UnderWay(None));
        }
        let now = Instant::now();
        let bounds = Bounds::of(caller.role);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= FORGET_FROM {
            clients.retain(|_, client| client.under_way > 0 || !client.has_recovered(now));
        }
        let client = clients.entry(caller.name.clone()).or_insert_with(|| Client::new(bounds, now));
        client.begin(now).map_err(|what| {
            Error::unavailable("TOO_MANY_CALLS", format!("{} {what}", caller.name))
                .remedy("wait a moment, then try again")
        })?;
        Ok(UnderWay(Some((Arc::clone(self), caller.name.clone()))))
    }
}

/// What one client may ask.
#[derive(Clone, Copy)]
struct Bounds {
    under_way: usize,
    per_second: f64,
}

impl Bounds {
    const fn of(role: Role) -> Self {
        match role {
            Role::Scheduler | Role::Operator => {
                Self { under_way: limits::CALLS_OF_A_SCHEDULER, per_second: limits::CALLS_PER_SECOND_OF_A_SCHEDULER }
            }
            Role::Tenant | Role::Reader => {
                Self { under_way: limits::CALLS_OF_A_TENANT, per_second: limits::CALLS_PER_SECOND_OF_A_TENANT }
            }
        }
    }

    /// Calls that may come at once.
    const fn burst(self) -> f64 {
        self.per_second * 2.0
    }
}

/// Calls of one client: a bucket that fills at its rate.
struct Client {
    bounds: Bounds,
    under_way: usize,
    allowance: f64,
    at: Instant,
}

impl Client {
    fn new(bounds: Bounds, now: Instant) -> Self {
        Self { bounds, under_way: 0, allowance: bounds.burst(), at: now }
    }

    fn allowance_at(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        elapsed.mul_add(self.bounds.per_second, self.allowance).min(self.bounds.burst())
    }

    fn has_recovered(&self, now: Instant) -> bool {
        self.allowance_at(now) >= self.bounds.burst()
    }

    fn begin(&mut self, now: Instant) -> std::result::Result<(), String> {
        if self.under_way >= self.bounds.under_way {
            return Err(format!("has {} calls under way, which is as many as one client may", self.under_way));
        }
        let allowance = self.allowance_at(now);
        if allowance < 1.0 {
            return Err(format!("calls more often than {} times a second", self.bounds.per_second));
        }
        (self.allowance, self.at) = (allowance - 1.0, now);
        self.under_way += 1;
        Ok(())
    }
}

/// A call that counts until this is dropped.
struct UnderWay(Option<(Arc<Access>, String)>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Some((access, name)) = self.0.take() else { return };
        let mut clients = access.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get_mut(&name) {
            client.under_way = client.under_way.saturating_sub(1);
        }
    }
}

/// Puts the door before a service.
#[derive(Clone)]
pub(super) struct Door(pub(super) Arc<Access>);

impl<S> Layer<S> for Door {
    type Service = Behind<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Behind { inner, access: Arc::clone(&self.0) }
    }
}

/// A service with the door before it.
#[derive(Clone)]
pub(super) struct Behind<S> {
    inner: S,
    access: Arc<Access>,
}

type Answer<E> = Pin<Box<dyn Future<Output = std::result::Result<http::Response<Body>, E>> + Send>>;

impl<S> Service<http::Request<Body>> for Behind<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let stated = request.headers().get(OWNER_METADATA).map(http::HeaderValue::as_bytes);
        let admitted = self.access.admit(request.extensions().get::<Peer>(), request.uri().path(), stated);
        let (caller, place) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                let refused = status(error).into_http();
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        tracing::debug!(caller = caller.name, path = request.uri().path(), "a call");
        request.extensions_mut().insert(caller);
        let answer = self.inner.call(request);
        Box::pin(async move {
            // A stream is under way until its last message, or until its reader is gone.
            answer.await.map(|response| {
                response.map(|body| {
                    Body::new(body.map_frame(move |frame| {
                        let _counted = &place;
                        frame
                    }))
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn process(uid: u32) -> Peer {
        Peer::Process { uid, gids: Vec::new() }
    }

    fn access() -> Arc<Access> {
        let readers = vec!["uid:7".parse().unwrap()];
        Access::new(Roles { readers, ..Roles::default() })
    }

    const GET: &str = "/ckptd.v1.Checkpoints/GetCheckpoint";

    fn reason(access: &Arc<Access>, uid: u32, path: &str) -> Option<String> {
        access.admit(Some(&process(uid)), path, None).err().map(|error| error.reason().to_owned())
    }

    #[test]
    fn who_may_not_is_refused_before_the_service() {
        let access = access();
        assert_eq!(reason(&access, 7, GET), None);
        assert_eq!(reason(&access, 7, "/ckptd.v1.Jobs/AttachCheckpoints").as_deref(), Some("CALLER_REFUSED"));
        assert_eq!(reason(&access, 8, GET).as_deref(), Some("CALLER_REFUSED"));
        assert_eq!(reason(&access, 0, "/ckptd.v1.Node/Drain"), None);
        assert_eq!(access.admit(None, GET, None).err().unwrap().reason(), "INTERNAL");
    }

    #[test]
    fn one_client_has_so_many_calls_under_way_and_others_do_not_suffer() {
        let access = access();
        let places: Vec<_> =
            (0..limits::CALLS_OF_A_TENANT).map(|_| access.admit(Some(&process(7)), GET, None)).collect();
        assert!(places.iter().all(Result::is_ok));
        assert_eq!(reason(&access, 7, GET).as_deref(), Some("TOO_MANY_CALLS"));
        assert_eq!(reason(&access, 0, GET), None);
        drop(places);
        assert_eq!(reason(&access, 7, GET), None);
    }

    #[test]
    fn a_rate_allows_bursts_and_recovers() {
        let bounds = Bounds { under_way: 100, per_second: 2.0 };
        let began = Instant::now();
        let mut client = Client::new(bounds, began);
        let granted = (0..10).filter(|_| client.begin(began).is_ok()).count();
        assert_eq!(granted, 4);
        assert!(client.begin(began + Duration::from_millis(400)).is_err());
        assert!(client.begin(began + Duration::from_millis(600)).is_ok());
        assert!(!client.has_recovered(began + Duration::from_secs(2)));
        assert!(client.has_recovered(began + Duration::from_secs(3)));
    }

    #[test]
    fn clients_that_have_recovered_are_forgotten() {
        let access = Access::new(Roles { readers: vec!["name:*".parse().unwrap()], ..Roles::default() });
        for number in 0..FORGET_FROM + 9 {
            drop(access.admit(Some(&Peer::Certificate(vec![format!("c{number}")])), GET, None).unwrap());
        }
        // Those of this instant have not recovered yet.
        let later = Instant::now() + Duration::from_secs(9);
        let mut clients = access.clients.lock().unwrap();
        clients.retain(|_, client| client.under_way > 0 || !client.has_recovered(later));
        assert!(clients.is_empty());
    }
}
