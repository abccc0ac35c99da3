//! Logs: one line an event on stderr; `RUST_LOG` chooses, `info` by default.

use tracing_subscriber::EnvFilter;

/// Installs the subscriber; a second call does nothing. `default` applies where `RUST_LOG` is not set.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}
