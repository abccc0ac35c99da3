//! `ckptd`: arguments -> serve | quickstart | keeper | check-config.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use ckptd::daemon::config::{self, Config};
use ckptd::daemon::holder::{self, Inherited};
use ckptd::daemon::{Instance, keeper, logging, quickstart, stop_signal};
use ckptd::error::{Error, Result};
use ckptd::panics::Essential;

/// Brings model checkpoints onto this host, keeps them once, and shows them to jobs read-only
///
/// Exit codes: 0 done, 2 the request is wrong, 3 not found, 4 in use or in the wrong state, 5 no space or over a limit,
/// 6 data corrupt, 7 unavailable (try again), 1 a bug of ours.
#[derive(Parser)]
#[command(name = "ckptd", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Serve(Serve),
    /// Do the whole job once, on a private instance: ingest, attach, check, measure, serve until Ctrl-C
    Quickstart(Quickstart),
    /// Run the daemon, hold its mounts' descriptors, and start it again when it ends: where there is no systemd
    ///
    /// SIGHUP restarts the daemon, by the same path: jobs do not notice. SIGTERM ends both.
    Keeper(Serve),
    /// Report every problem of a configuration at once
    CheckConfig {
        /// File to check
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Serve {
    /// Configuration file; /etc/ckptd/config.toml if it is there
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where blobs and the catalog are
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where the socket and the mounts are
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Where gRPC is listened for by TCP with certificates, besides the socket; see `[tls]` of the configuration
    #[arg(long, value_name = "ADDR")]
    listen: Vec<std::net::SocketAddr>,
}

#[derive(clap::Args)]
struct Quickstart {
    /// A directory, a file, a URL, or hf:<namespace>/<repo>; without one, a small generated model
    source: Option<String>,
    /// Where to attach it [default: /opt/ml/checkpoint, else a temporary directory]
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// Clean up and return when done, instead of serving until Ctrl-C
    #[arg(long)]
    exit: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = install_crypto().and_then(|()| match arguments.command {
        Command::Serve(serve) => run_serve(serve).map(|()| 0),
        Command::Keeper(_) => run_keeper(),
        Command::Quickstart(quickstart) => run_quickstart(quickstart).map(|()| 0),
        Command::CheckConfig { config } => check_config(config).map(|()| 0),
    });
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ckptd: {}", error.report());
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// One TLS provider for the whole process, before anything may want one.
fn install_crypto() -> Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| Error::internal("another TLS provider is installed already"))
}

/// Threads come with it: what is to be said of memory is said before, and where the log hears of it.
fn runtime() -> Result<tokio::runtime::Runtime> {
    ckptd::allocator::set_up();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::unavailable("NO_RUNTIME", "starting the runtime").because(error))
}

fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The arguments have been understood; the daemon gets them as they are.
fn run_keeper() -> Result<u8> {
    logging::start("info");
    keeper::run(std::env::args_os().skip(2).collect())
}

fn run_serve(arguments: Serve) -> Result<()> {
    // SAFETY: nothing before this has started a thread.
    let mut inherited = unsafe { holder::take_over() };
    logging::start("info");
    inherited.count_start();
    let mut config = config::load(arguments.config.as_deref(), environment())?;
    let absolute = |path: PathBuf| std::path::absolute(&path).map_err(|error| Error::io("finding", &path, error));
    if let Some(state_dir) = arguments.state_dir {
        config.state_dir = absolute(state_dir)?;
    }
    if let Some(runtime_dir) = arguments.runtime_dir {
        config.runtime_dir = absolute(runtime_dir)?;
    }
    if !arguments.listen.is_empty() {
        config.tls_listen = arguments.listen;
    }
    let runtime = runtime()?;
    // Before the runtime goes, which would wait for what blocks.
    let _essential = Essential::new("what the daemon stands on");
    let outcome = runtime.block_on(serve(config, inherited));
    // Copies under way on blocking threads are nothing to wait for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

async fn serve(config: Config, inherited: Inherited) -> Result<()> {
    let stop = stop_signal()?;
    let instance = Instance::start(&config, inherited).await?;
    let ready = format!("ckptd {} is ready on {}\n", env!("CARGO_PKG_VERSION"), instance.socket().display());
    // Whoever does not read our standard output does not want to know.
    let _ = std::io::stdout().write_all(ready.as_bytes()).and_then(|()| std::io::stdout().flush());
    instance.run(stop).await
}

fn run_quickstart(arguments: Quickstart) -> Result<()> {
    logging::start("warn");
    let config = quickstart::configuration(environment())?;
    let arguments = quickstart::Arguments { source: arguments.source, at: arguments.at, exit: arguments.exit };
    runtime()?.block_on(quickstart::run(arguments, config))
}

fn check_config(file: Option<PathBuf>) -> Result<()> {
    let (config, mut problems) = config::examine(file.as_deref(), environment())?;
    problems.extend(config::examine_host(&config));
    for problem in &problems {
        println!("{}: {}", problem.place, problem.what);
    }
    match problems.len() {
        0 => {
            println!("the configuration is right");
            Ok(())
        }
        count => {
            Err(Error::invalid("BAD_CONFIG", format!("the configuration has {count} problems")).remedy("mend them"))
        }
    }
}
