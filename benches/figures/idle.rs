//! What a daemon costs that serves many checkpoints and is asked for nothing.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use super::attach::with_checkpoints;
use super::ingest::memory_kib;
use super::table::{Scale, Table};

/// When a daemon has done what follows its start and its last call.
const SETTLED_AFTER: Duration = Duration::from_secs(20);

pub(crate) fn take(scale: &Scale, table: &mut Table) {
    let daemon = with_checkpoints(scale.checkpoints);
    for index in 0..scale.checkpoints {
        daemon.attach(&format!("job-{index}"), &format!("k{index}"));
    }
    let detail = format!("{} checkpoints served", scale.checkpoints);
    // What a start looks at once, some seconds after it, is not idleness; nor are threads that end after the last call.
    std::thread::sleep(SETTLED_AFTER);
    let before = switches(daemon.pid());
    std::thread::sleep(Duration::from_secs(scale.idle_s));
    // Threads that end meanwhile have woken once to do so; threads that are new have woken as often as they say.
    let woken = |(thread, count): (String, u32)| count - before.get(&thread).copied().unwrap_or(0).min(count);
    let switched: u32 = switches(daemon.pid()).into_iter().map(woken).sum();
    table.row("idle memory", format!("{} MiB", memory_kib(daemon.pid(), "VmRSS") / 1024), "<= 64 MiB", &detail);
    table.row(
        "idle wake-ups",
        format!("{:.1} a second", f64::from(switched) / Duration::from_secs(scale.idle_s).as_secs_f64()),
        "none",
        format!("voluntary context switches of all threads in {} s; {detail}", scale.idle_s),
    );
}

/// Voluntary context switches so far, by thread.
fn switches(pid: u32) -> HashMap<String, u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |status: String| {
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).map(str::to_owned);
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok()).unwrap_or(0)
    };
    tasks
        .filter_map(|task| {
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            Some((task.file_name().to_string_lossy().into_owned(), of(status)))
        })
        .collect()
}
