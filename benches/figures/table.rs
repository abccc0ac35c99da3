//! How large the figures are taken, and how they are shown.

use std::fmt;

/// Sizes and repetitions.
#[derive(Debug)]
pub(crate) struct Scale {
    short: bool,
    /// Tensors of a checkpoint.
    pub(crate) tensors: usize,
    /// Bytes of each.
    pub(crate) tensor_bytes: usize,
    /// Rounds of which the best counts.
    pub(crate) rounds: usize,
    /// Checkpoints served in the figures about many.
    pub(crate) checkpoints: usize,
    /// Checkpoints in the catalog in the figures about very many.
    pub(crate) recorded: usize,
    /// Attachments standing in the figures about many.
    pub(crate) attachments: usize,
    /// Attachments timed.
    pub(crate) timed: usize,
    /// Files of the wide tree.
    pub(crate) files: usize,
    /// Seconds the daemon is watched doing nothing.
    pub(crate) idle_s: u64,
}

impl Scale {
    /// The short one if `CKPTD_BENCH_SHORT` says 1.
    pub(crate) fn from_environment() -> Self {
        if std::env::var("CKPTD_BENCH_SHORT").is_ok_and(|value| value == "1") { Self::short() } else { Self::long() }
    }

    /// Bytes of a checkpoint.
    pub(crate) const fn bytes(&self) -> usize {
        self.tensors * self.tensor_bytes
    }

    /// The same, with so many checkpoints served.
    pub(crate) fn with_checkpoints(&self, checkpoints: usize) -> Self {
        Self { checkpoints, ..*self }
    }

    fn long() -> Self {
        Self {
            short: false,
            tensors: 24,
            tensor_bytes: 64 << 20,
            rounds: 4,
            checkpoints: 100,
            recorded: 10_000,
            attachments: 500,
            timed: 200,
            files: 100_000,
            idle_s: 10,
        }
    }

    fn short() -> Self {
        Self {
            short: true,
            tensors: 12,
            tensor_bytes: 8 << 20,
            rounds: 2,
            checkpoints: 10,
            recorded: 500,
            attachments: 40,
            timed: 40,
            files: 5_000,
            idle_s: 2,
        }
    }
}

/// Rows as they are taken.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    rows: Vec<[String; 4]>,
}

impl Table {
    pub(crate) fn new(scale: &Scale) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let form = if scale.short { "short form: not to be quoted" } else { "best of the rounds of one run" };
        Self { title: format!("kernel {}, {cores} cores, {form}", kernel.trim()), rows: Vec::new() }
    }

    /// Adds a figure, what it should be, and what it was made of.
    pub(crate) fn row(&mut self, name: &str, figure: impl fmt::Display, wanted: &str, detail: impl fmt::Display) {
        eprintln!("  {name}: {figure} ({detail})");
        self.rows.push([name.to_owned(), figure.to_string(), wanted.to_owned(), detail.to_string()]);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}\n", self.title)?;
        writeln!(f, "| figure | is | wanted | taken from |\n|---|---|---|---|")?;
        self.rows.iter().try_for_each(|row| writeln!(f, "| {} |", row.join(" | ")))
    }
}

/// Three decimals, for ratios and rates.
pub(crate) fn three(value: f64) -> String {
    format!("{value:.3}")
}

/// Bytes as a number that can be divided.
pub(crate) fn float(bytes: u64) -> f64 {
    const HALF: u64 = 1 << 32;
    let low = u32::try_from(bytes % HALF).unwrap();
    let high = u32::try_from(bytes / HALF).unwrap();
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

/// The highest of the values.
pub(crate) fn best(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, f64::max)
}
