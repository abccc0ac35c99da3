//! Connections under way, each on a thread of its own while there are threads for it.
//!
//! Whoever sends a checkpoint does so by one connection, piece after piece, and waits for each answer. On the threads of the daemon's runtime a piece costs a
//! handful of wakes: of the thread that listens for all, of the one that answers, of the one that stands in for it while it writes. A thread that has nothing
//! else to do is woken once, and may block. There are [`OWN_THREADS`]; what connects beyond that is answered by the runtime's.
//!
//! Whatever a request starts belongs to the daemon's runtime in both cases: an upload goes on when the connection that began it has ended.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::runtime::{self, Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::Service;

use crate::in_place;
use crate::limits::SENDERS_AT_A_TIME;

/// Longest wait for a request's head, and so between requests: well above what clients keep connections for.
const HEAD_PATIENCE: Duration = Duration::from_secs(120);

/// As many as there are uploads that move bytes at a time, and as many again for whoever else connects.
const OWN_THREADS: usize = 2 * SENDERS_AT_A_TIME;

/// See the module's page. When it is dropped all end: at once, or where one blocks as soon as it does not.
pub(super) struct Connections {
    requests: TowerToHyperService<Requests>,
    own_threads: Arc<Semaphore>,
    /// Dropped to end those that have a thread of their own.
    alive: watch::Sender<()>,
    shared: JoinSet<()>,
}

/// A connection, and its place among all.
type Placed = (std::net::TcpStream, OwnedSemaphorePermit);

impl Connections {
    /// None yet; requests are for `router`. Needs the daemon's runtime.
    pub(super) fn new(router: Router) -> Self {
        Self {
            requests: TowerToHyperService::new(Requests { router, runtime: Handle::current() }),
            own_threads: Arc::new(Semaphore::new(OWN_THREADS)),
            alive: watch::Sender::new(()),
            shared: JoinSet::new(),
        }
    }

    /// Answers by `stream` until it ends; then its `place` is free.
    pub(super) fn begin(&mut self, stream: TcpStream, place: OwnedSemaphorePermit) {
        while self.shared.try_join_next().is_some() {}
        let Some(thread) = self.own_thread() else {
            let requests = self.requests.clone();
            self.shared.spawn(async move {
                answer(stream, requests).await;
                drop(place);
            });
            return;
        };
        // Its thread waits for nothing else.
        let given = stream.into_std().map(|stream| thread.send((stream, place)));
        if let Err(error) = given {
            tracing::warn!(%error, "a connection could not be answered");
        }
    }

    /// A thread for one connection, which it waits for; nothing where there is no room or no means for one.
    fn own_thread(&self) -> Option<SyncSender<Placed>> {
        let permit = Arc::clone(&self.own_threads).try_acquire_owned().ok()?;
        let runtime = OwnRuntime::new().ok()?;
        let (requests, ends) = (self.requests.clone(), self.alive.subscribe());
        let (thread, given) = sync_channel::<Placed>(1);
        let answers = move || {
            in_place::may_block_here();
            if let Ok((stream, place)) = given.recv() {
                if let Err(error) = runtime.answer(stream, requests, ends) {
                    tracing::warn!(%error, "a connection could not be answered");
                }
                drop(place);
            }
            drop((runtime, permit));
        };
        std::thread::Builder::new().name("http".to_owned()).spawn(answers).ok()?;
        Some(thread)
    }
}

/// The runtime of one thread, which may be dropped anywhere: nothing but a connection is ever in it.
struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    fn new() -> io::Result<Self> {
        runtime::Builder::new_current_thread().enable_io().enable_time().build().map(|runtime| Self(Some(runtime)))
    }

    /// Answers until the connection ends or all are to end.
    fn answer(
        &self,
        stream: std::net::TcpStream,
        requests: TowerToHyperService<Requests>,
        mut ends: watch::Receiver<()>,
    ) -> io::Result<()> {
        let Some(runtime) = &self.0 else { return Ok(()) };
        runtime.block_on(async {
            let stream = TcpStream::from_std(stream)?;
            tokio::select! {
                // First: what an answer waits for may be gone then.
                biased;
                _ = ends.changed() => {}
                () = answer(stream, requests) => {}
            }
            Ok(())
        })
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

async fn answer(stream: TcpStream, requests: TowerToHyperService<Requests>) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE);
    // That a connection broke is for its client to know.
    let _ = builder.serve_connection(TokioIo::new(stream), requests).await;
}

/// Requests that are answered within the daemon's runtime, whichever thread asks for the answer.
#[derive(Clone)]
struct Requests {
    router: Router,
    runtime: Handle,
}

impl<R> Service<R> for Requests
where
    Router: Service<R>,
{
    type Response = <Router as Service<R>>::Response;
    type Error = <Router as Service<R>>::Error;
    type Future = Answer<<Router as Service<R>>::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.router.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let _within = self.runtime.enter();
        Answer { answer: Some(Box::pin(self.router.call(request))), runtime: self.runtime.clone() }
    }
}

/// What becomes of a request.
struct Answer<F> {
    /// Until it was dropped.
    answer: Option<Pin<Box<F>>>,
    runtime: Handle,
}

impl<F: Future> Future for Answer<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Self { answer, runtime } = &mut *self;
        let _within = runtime.enter();
        answer.as_mut().map_or(Poll::Pending, |answer| answer.as_mut().poll(context))
    }
}

impl<F> Drop for Answer<F> {
    /// What it holds may start something to end itself.
    fn drop(&mut self) {
        let _within = self.runtime.enter();
        self.answer = None;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpStream as Client};
    use std::sync::Barrier;

    use axum::routing::get;
    use tokio::net::TcpListener;

    use super::*;
    use crate::error::Result;

    /// More than have a thread of their own.
    const MANY: usize = OWN_THREADS + 3;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// So many connections to `router`, under way, what ends them, and their places.
    async fn connected(router: Router, clients: usize) -> (Vec<Client>, Connections, Arc<Semaphore>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let places = Arc::new(Semaphore::new(clients));
        let mut connections = Connections::new(router);
        let mut connected = Vec::new();
        for _ in 0..clients {
            let client = Client::connect(address).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            connected.push(client);
            let place = Arc::clone(&places).try_acquire_owned().unwrap();
            connections.begin(listener.accept().await.unwrap().0, place);
        }
        (connected, connections, places)
    }

    /// Waits until so many of `permits` are there.
    async fn all(permits: &Semaphore, count: usize) {
        let all = permits.acquire_many(u32::try_from(count).unwrap());
        drop(tokio::time::timeout(PATIENCE, all).await.unwrap().unwrap());
    }

    fn ask(mut client: &Client) {
        client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    }

    /// What comes until there is `end`, or until the connection ends.
    fn hear(mut client: &Client, end: &str) -> String {
        let mut heard = Vec::new();
        let mut some = [0; 1024];
        while !heard.ends_with(end.as_bytes()) {
            match client.read(&mut some).unwrap() {
                0 => break,
                more => heard.extend_from_slice(&some[..more]),
            }
        }
        String::from_utf8(heard).unwrap()
    }

    /// Says which thread answers, and a full stop.
    async fn named() -> String {
        format!("{}.", std::thread::current().name().unwrap_or_default())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn all_are_answered_at_a_time_however_many_and_each_again_and_again() {
        let (clients, connections, places) = connected(Router::new().route("/", get(named)), MANY).await;
        let ask_all = move || {
            for _ in 0..3 {
                clients.iter().for_each(ask);
                let own = clients.iter().filter(|client| hear(client, ".").ends_with("http.")).count();
                assert_eq!(own, OWN_THREADS);
            }
        };
        tokio::task::spawn_blocking(ask_all).await.unwrap();
        // Their clients are gone: others have their places and their threads.
        all(&places, MANY).await;
        all(&connections.own_threads, OWN_THREADS).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn those_that_block_at_a_time_hold_up_nobody() {
        let met = Arc::new(Barrier::new(OWN_THREADS + 1));
        let meets = Arc::clone(&met);
        let blocks = move || {
            let meets = Arc::clone(&meets);
            async move {
                let met = in_place::blocking(move || {
                    meets.wait();
                    Result::Ok(())
                });
                met.await.unwrap();
                named().await
            }
        };
        let router = Router::new().route("/", get(blocks)).route("/other", get(|| async { "other." }));
        let (mut clients, _connections, _places) = connected(router, MANY).await;
        let ask_all = move || {
            let others = clients.split_off(OWN_THREADS);
            clients.iter().for_each(ask);
            for mut other in others {
                other.write_all(b"GET /other HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
                assert!(hear(&other, ".").ends_with("other."));
            }
            met.wait();
            assert!(clients.iter().all(|client| hear(client, ".").ends_with("http.")));
        };
        tokio::task::spawn_blocking(ask_all).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_request_starts_goes_on_when_its_connection_has_ended() {
        let (ended, done) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (until, told) = (Arc::clone(&ended), Arc::clone(&done));
        let starts = move || {
            let (until, told) = (Arc::clone(&until), Arc::clone(&told));
            async move {
                tokio::spawn(async move {
                    until.acquire().await.unwrap().forget();
                    tokio::task::spawn_blocking(move || told.add_permits(1)).await.unwrap();
                });
                "started"
            }
        };
        let (clients, connections, _places) = connected(Router::new().route("/", get(starts)), MANY).await;
        tokio::task::spawn_blocking(move || {
            for client in clients {
                ask(&client);
                hear(&client, "started");
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(hear(&client, "nothing"), "", "its end");
            }
        })
        .await
        .unwrap();
        drop(connections);
        ended.add_permits(MANY);
        all(&done, MANY).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn all_end_when_nobody_answers_any_more() {
        let never = get(std::future::pending::<&'static str>);
        let (clients, connections, places) = connected(Router::new().route("/", never), MANY).await;
        clients.iter().for_each(ask);
        drop(connections);
        tokio::task::spawn_blocking(move || assert!(clients.iter().all(ends))).await.unwrap();
        all(&places, MANY).await;
    }

    /// Whether the connection ends without a word.
    fn ends(mut client: &Client) -> bool {
        match client.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}
