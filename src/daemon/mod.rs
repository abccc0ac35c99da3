//! The process: configuration in, everything composed, one drain.
//!
//! [`Instance::start`] builds the floors from the bottom up: state directory (its lock makes this the only daemon on it), socket,
//! kernel features and stale mounts, sessions of a predecessor (their readers wait: before anything that may take long), ingests, then
//! recovery: removals finished, interrupted ingests begun again, views of known jobs that are dead made again. Only then is the socket answered, so whoever is answered sees the state whole.
//!
//! On the way out nothing is unmounted: jobs go on with what the kernel has. A private instance ([`quickstart`]) takes everything
//! down instead.

pub mod config;
pub mod holder;
pub mod keeper;
pub mod logging;
mod notify;
pub mod quickstart;
mod recover;
mod secrets;
mod starts;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;

use crate::archive::Dictionaries;
use crate::catalog::checkpoints::Record;
use crate::control::caller::Roles;
use crate::control::catalogue::Catalogue;
use crate::control::tls::Certificates;
use crate::control::{self, Facts, Floors, Listeners, Uploads};
use crate::error::{Error, Result};
use crate::http::{self, transfer::Transfers};
use crate::in_place::on_another_thread as blocking;
use crate::ingest::{Connector, Ingests, MakeRoom, Settings};
use crate::panics;
use crate::retain::Retention;
use crate::retain::scrub::Scrubber;
use crate::serve::attachments::{Attachments, KernelWishes};
use crate::source::egress::EgressPolicy;
use crate::source::local::Tokens;
use crate::source::{
    self, Credentials, CredentialsDirectory, Datastores, HttpSettings, SourceContext, SourceKind, SourceSpec,
};
use crate::store::Store;
use crate::store::room::Bounds;
use config::Config;
use holder::{Holder, Inherited};

/// File of the secret that tokens of local transfers are derived from.
const TRANSFER_KEY: &str = "transfer.key";

/// File of the runtime directory that says when the process last ended for a panic.
const PANICKED: &str = "panicked";

/// How long a listener is tried while jobs are served.
const BIND_FOR: Duration = Duration::from_secs(30);

/// Pause before a listener is tried again.
const BIND_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How long calls under way may go on after a stop was asked for.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3);

/// A composed daemon that has not answered anybody yet.
pub struct Instance {
    floors: Floors,
    listeners: Listeners,
    roles: Roles,
    socket: PathBuf,
    /// Whether the socket is ours to remove.
    bound: bool,
    holder: Holder,
    web: Option<(TcpListener, Arc<Transfers>)>,
    lease_grace: Duration,
}

impl Instance {
    /// Composes and recovers.
    ///
    /// # Errors
    /// `NOT_ROOT`, `NO_FUSE`, `STATE_DIR_*`, `SOCKET_*`, or what failed on the way; nothing runs then.
    pub async fn start(config: &Config, mut inherited: Inherited) -> Result<Self> {
        let started = Instant::now();
        require_root()?;
        raise_descriptor_limit();
        leave_no_core();
        for problem in config::examine_host(config) {
            tracing::warn!(key = problem.place, "{}", problem.what);
        }
        let (state_dir, runtime_dir) = (config.state_dir.clone(), config.runtime_dir.clone());
        let read_ahead_bytes = config.read_ahead_bytes;
        let store = blocking(move || {
            let store = Store::open(&state_dir)?;
            store.disk().raise_read_ahead(read_ahead_bytes);
            Ok(store)
        })
        .await?;
        std::fs::create_dir_all(&runtime_dir).map_err(|error| Error::io("creating", &runtime_dir, error))?;
        let socket = runtime_dir.join("ckptd.sock");
        let (listener, bound) = match inherited.listener.take() {
            Some(listener) => (control::take_listener(listener)?, false),
            None => (control::bind(&socket, config.roles.name_others()).await?, true),
        };
        let (holder, secrets) = (inherited.holder.clone(), Arc::new(inherited.secrets()));
        let composed = async {
            let mut floors = compose(config, store, secrets.clone(), started, inherited).await?;
            let sent = recover::recover(&floors, &holder, &secrets).await?;
            // Whoever has a port of ours must not keep readers waiting.
            let serves = floors.attachments.sessions() > 0;
            let tcp = until_bound(serves, || listen_by_tcp(config)).await?;
            let (web, tokens) = until_bound(serves, || listen_for_transfers(config, &floors.store)).await?;
            floors.tokens = tokens;
            let web = transfers(config, &floors, web, sent).await;
            floors.finish_sweeping().await;
            Ok((floors, tcp, web))
        };
        let (floors, tcp, web): (Floors, _, _) = composed.await.inspect_err(|_: &Error| {
            if bound {
                let _ = std::fs::remove_file(&socket);
            }
        })?;
        let listeners = Listeners { socket: listener, tcp };
        let (roles, lease_grace) = (config.roles.clone(), config.lease_grace);
        Ok(Self { floors, listeners, roles, socket, bound, web, holder, lease_grace })
    }

    /// Where it will listen.
    pub fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// The floors, for whoever drives the instance from within.
    pub fn floors(&self) -> &Floors {
        &self.floors
    }

    /// Answers until `stop` resolves, then lets running calls end.
    ///
    /// # Errors
    /// The listener failed.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<()> {
        let attachments = self.floors.attachments.clone();
        let (holder, catalog) = (self.holder.clone(), self.floors.store.catalog().clone());
        let (floors, healing) = (self.floors.clone(), self.floors.clone());
        let (retention, changes) = (self.floors.retention.clone(), self.floors.ingests.changes());
        let (leases, lease_grace) = (self.floors.attachments.clone(), self.lease_grace);
        if holder.name() != "none" && attachments.features().resend {
            panics::first_ends_the_process(self.floors.facts.runtime_dir.join(PANICKED));
        }
        holder.ready();
        let (stopped, stopping) = tokio::sync::oneshot::channel::<()>();
        let serving = control::serve(self.floors, self.listeners, self.roles, async move {
            stop.await;
            holder.stopping();
            floors.drain().await;
            let _ = stopped.send(());
        });
        // Ends where this future does: whoever sends then must begin again in any case.
        let web = async {
            if let Some((listener, transfers)) = self.web {
                http::serve(listener, transfers).await;
            }
            std::future::pending::<()>().await;
        };
        // Calls that only watch or wait would never end by themselves.
        let patience = async {
            let _ = stopping.await;
            tokio::time::sleep(DRAIN_PATIENCE).await;
        };
        let outcome = tokio::select! {
            outcome = serving => outcome,
            () = patience => Ok(()),
            () = web => Ok(()),
            () = leases.end_leases(lease_grace) => Ok(()),
            () = retention.run(changes) => Ok(()),
            () = healing.heal_from_sources() => Ok(()),
            () = self.holder.settle() => Ok(()),
            () = self.holder.clone().watch(catalog) => Ok(()),
        };
        if self.bound {
            let _ = std::fs::remove_file(&self.socket);
        }
        attachments.leave().await;
        outcome
    }
}

/// What `bind` gives; where jobs are served already it is asked again for a while, for they would wait for the next start.
async fn until_bound<T, F: Future<Output = Result<T>>>(serves: bool, mut bind: impl FnMut() -> F) -> Result<T> {
    let until = Instant::now() + BIND_FOR;
    loop {
        match bind().await {
            Err(error) if serves && error.kind().may_pass() && Instant::now() < until => {
                tracing::warn!(error = %error.report(), "a listener is tried again; jobs are served meanwhile");
                tokio::time::sleep(BIND_AGAIN_AFTER).await;
            }
            bound => return bound,
        }
    }
}

/// The gRPC listeners by TCP, if any are configured, with their certificates.
async fn listen_by_tcp(config: &Config) -> Result<Vec<(TcpListener, Arc<Certificates>)>> {
    if config.tls_listen.is_empty() {
        return Ok(Vec::new());
    }
    let certificates = Arc::new(Certificates::open(config.certificates.clone())?);
    let mut listeners = Vec::new();
    for address in &config.tls_listen {
        let listener = control::bind_tcp(*address).await?;
        if let Ok(bound) = listener.local_addr() {
            tracing::info!("listening for gRPC on {bound}");
        }
        listeners.push((listener, Arc::clone(&certificates)));
    }
    Ok(listeners)
}

/// The HTTP listener, if one is configured, and the tokens for what is sent there.
async fn listen_for_transfers(config: &Config, store: &Store) -> Result<(Option<TcpListener>, Option<Arc<Tokens>>)> {
    let Some(address) = config.http_listen else { return Ok((None, None)) };
    let (listener, bound) = http::bind(address).await?;
    let url = if config.http_url.is_empty() { format!("http://{bound}") } else { config.http_url.clone() };
    let disk = store.disk().clone();
    let key = blocking(move || disk.secret(TRANSFER_KEY)).await?;
    tracing::info!(url, "listening for HTTP on {bound}");
    Ok((Some(listener), Some(Arc::new(Tokens::new(key, url)))))
}

/// What takes uploads by `listener`, and goes on with those of a predecessor, which are of the records `sent`.
async fn transfers(
    config: &Config,
    floors: &Floors,
    listener: Option<TcpListener>,
    sent: Vec<Record>,
) -> Option<(TcpListener, Arc<Transfers>)> {
    let (store, ingests) = (floors.store.clone(), floors.ingests.clone());
    let Some((listener, tokens)) = listener.zip(floors.tokens.clone()) else {
        for record in sent {
            ingests.start_over(&record).await;
        }
        return None;
    };
    let transfers = Arc::new(Transfers::new(store, ingests, tokens, config.upload_idle));
    transfers.await_senders(sent).await;
    Some((listener, transfers))
}

async fn compose(
    config: &Config,
    store: Store,
    secrets: Arc<secrets::Secrets>,
    started: Instant,
    mut inherited: Inherited,
) -> Result<Floors> {
    let store = store.within(Bounds {
        capacity_bytes: config.capacity_bytes,
        high_thousandths: config.high_watermark,
        low_thousandths: config.low_watermark,
    });
    let runtime_dir = config.runtime_dir.clone();
    let (on, below) = (store.clone(), runtime_dir.clone());
    let retention = Retention::new(store.clone());
    let scrubber = Scrubber::start(store.clone(), config.scrub)?;
    let asked = retention.clone();
    let make_room: MakeRoom = Arc::new(move |bytes| {
        let retention = asked.clone();
        Box::pin(async move { retention.make_room(bytes).await })
    });
    let datastores = Arc::new(config.datastores.clone());
    let known = datastores.clone();
    let dictionaries = Dictionaries::within(config.memory_budget_bytes / 2);
    let ingests = Ingests::new(
        store.clone(),
        connector(config, &store, datastores, dictionaries.clone())?,
        make_room,
        Settings {
            memory_budget_bytes: config.memory_budget_bytes,
            dictionaries,
            checkpoint_bytes: config.checkpoint_bytes,
            attempts: config.attempts,
            quotas: Arc::new(config.quotas.clone()),
            secrets,
        },
    );
    let (filling, told) = (ingests.clone(), ingests.clone());
    retention.tell(move |id| told.note_change(id));
    let keeping = inherited.keeping();
    let wishes = KernelWishes { passthrough: config.passthrough, resend: config.resend };
    let attachments = blocking(move || Attachments::open(on, filling, known, &below, wishes, keeping)).await?;
    // Readers wait for it.
    attachments.adopt().await?;
    let catalogue = Catalogue::open(config.catalogue_file.as_deref())?;
    let facts = Arc::new(Facts {
        started,
        runtime_dir,
        catalogue,
        holder: inherited.holder.name(),
        restarts: inherited.holder.restarts(),
    });
    let uploads = Arc::new(Uploads::new(config.upload_idle));
    Ok(Floors { store, ingests, retention, scrubber, attachments, uploads, tokens: None, facts })
}

/// Sources as the configuration allows them, with the secrets of their request or of the credentials directory. Directories of this host come from
/// `capture` alone, which only the socket's owner can ask for.
fn connector(
    config: &Config,
    store: &Store,
    datastores: Arc<Datastores>,
    dictionaries: Dictionaries,
) -> Result<Connector> {
    let policy = EgressPolicy::new(config.allow_networks.clone());
    let settings = HttpSettings { inactivity_timeout: config.inactivity_timeout, ..HttpSettings::default() };
    let context = SourceContext::new(&settings, policy)?
        .with_dictionaries(dictionaries)
        .with_scratch(Arc::clone(store.disk()), config.checkpoint_bytes)
        .with_host_credentials(Some(config.credentials_dir.clone()))
        .with_host_directories()
        .with_datastores(datastores.clone());
    let directory = CredentialsDirectory::new(config.credentials_dir.clone());
    Ok(Arc::new(move |spec: &SourceSpec, owner: &str, given: &Credentials| {
        if spec.kind == SourceKind::Regional {
            datastores.find(&spec.uri, owner)?;
        }
        source::connect(spec, &directory.resolve(spec, owner, given)?, &context)
    }))
}

fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::denied("NOT_ROOT", "ckptd mounts file systems for other processes, which needs root")
        .remedy("run it as root"))
}

/// Every open blob is a descriptor, here and in the kernel: take what the hard limit gives. Less is a warning, not a failure.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(errno) = raised {
        tracing::warn!(%errno, "the limit of open files stays as it is");
    }
}

/// A core would write the credentials of sources to disk, and a successor would wait for it.
fn leave_no_core() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let lowered = getrlimit(Resource::RLIMIT_CORE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_CORE, 0, hard));
    if let Err(errno) = lowered {
        tracing::warn!(%errno, "a crash may leave a core, with credentials in it");
    }
}

/// Resolves on SIGTERM or SIGINT.
///
/// # Errors
/// Handlers cannot be installed.
pub fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let install = |kind| signal(kind).map_err(|error| Error::internal("installing a signal handler").because(error));
    let mut terminate = install(SignalKind::terminate())?;
    let mut interrupt = install(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
