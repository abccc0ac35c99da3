//! Logs: one line an event on stderr; `RUST_LOG` chooses, `info` by default.
//!
//! **For tests**, in debug builds alone: where `TEST_PANIC_AT` names a file with a text in it, the next event or span of ckptd whose words contain that text
//! panics where it is written, once, and the file goes. So a bug of any task can be had at a moment of the test's choice.

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

/// Installs the subscriber; a second call does nothing. `default` applies where `RUST_LOG` is not set.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_filter(filter);
    let subscriber = tracing_subscriber::registry().with(lines);
    #[cfg(debug_assertions)]
    let subscriber = subscriber.with(trap::set());
    let _ = subscriber.try_init();
}

#[cfg(debug_assertions)]
mod trap {
    use std::fmt::{Debug, Write as _};
    use std::fs;
    use std::path::PathBuf;

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id};
    use tracing::{Event, Metadata, Subscriber};
    use tracing_subscriber::layer::{Context, Layer};

    /// Names the file.
    const VARIABLE: &str = "TEST_PANIC_AT";

    /// The file with the text.
    pub(super) struct Trap(PathBuf);

    /// One, where the environment wants it.
    pub(super) fn set() -> Option<Trap> {
        std::env::var_os(VARIABLE).map(|file| Trap(file.into()))
    }

    impl Trap {
        #[expect(clippy::panic, reason = "this is what it is for")]
        fn step_on(&self, words: &str) {
            let wanted = fs::read_to_string(&self.0).unwrap_or_default();
            // Of several threads one removes it.
            if !wanted.is_empty() && words.contains(wanted.trim()) && fs::remove_file(&self.0).is_ok() {
                panic!("a test wants it: {words}");
            }
        }
    }

    impl<S: Subscriber> Layer<S> for Trap {
        fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
            metadata.target().starts_with("ckptd")
        }

        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut words = Words::default();
            event.record(&mut words);
            self.step_on(&words.0);
        }

        fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
            let mut words = Words(attributes.metadata().name().to_owned());
            attributes.record(&mut words);
            self.step_on(&words.0);
        }
    }

    #[derive(Default)]
    struct Words(String);

    impl Visit for Words {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            // Into a string it cannot fail.
            let _ = write!(self.0, " {}={value:?}", field.name());
        }
    }
}
