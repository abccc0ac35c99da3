//! Answers for people: tables without borders, sentences of one line.
//!
//! Sizes in IEC units, times local, `filling` shown as `downloading`. What tenants wrote (names, URIs) is escaped where it
//! could move the cursor.

use comfy_table::{CellAlignment, Table, presets};

use super::document;
use super::progress::percent;
use crate::control::wire;
use crate::names;
use crate::units::{counted, local_time, show_bytes};

/// `NAME (ID) ready: 3 files, 1.50 GiB, 1.00 GiB unique, 1.00 GiB on disk`.
pub(super) fn checkpoint_line(record: &wire::Checkpoint) -> String {
    let mut line = format!("{} {}", titled(record), shown_state(record));
    if record.files > 0 || record.state() == wire::CheckpointState::Ready {
        line.push_str(&format!(
            ": {}, {}, {} unique, {} on disk",
            counted(record.files, "file"),
            show_bytes(record.logical_bytes),
            show_bytes(record.unique_bytes),
            show_bytes(record.physical_bytes),
        ));
    }
    line
}

/// Where to send what the checkpoint waits for, a line behind its own; nothing for one that does not wait.
pub(super) fn transfer_lines(record: &wire::Checkpoint) -> String {
    record.transfer.as_ref().map_or_else(String::new, |transfer| {
        format!("\nwaits to be sent to {} with the token {}", plain(&transfer.url), plain(&transfer.token))
    })
}

/// `NAME (ID)`, or the id alone where it is the name.
pub(super) fn titled(record: &wire::Checkpoint) -> String {
    if record.name.is_empty() || record.name == record.id {
        plain(&record.id)
    } else {
        format!("{} ({})", plain(&record.name), plain(&record.id))
    }
}

/// The state as people are shown it: `downloading 43 %`.
pub(super) fn shown_state(record: &wire::Checkpoint) -> String {
    let share = record.fill.as_ref().and_then(|fill| percent(fill.bytes_done, fill.bytes_total));
    match (record.state(), share) {
        (wire::CheckpointState::Filling, Some(share)) => format!("downloading {share} %"),
        (wire::CheckpointState::Filling, None) => "downloading".to_owned(),
        (state, _) => document::checkpoint_state(state).to_owned(),
    }
}

/// The table of `list`.
pub(super) fn checkpoint_table(records: &[wire::Checkpoint]) -> String {
    let rows = records.iter().map(|record| {
        [
            plain(&record.id),
            shown_state(record),
            plain(&record.name),
            show_bytes(record.logical_bytes),
            record.files.to_string(),
            shown_owner(record),
            local_time(record.created_unix_ms),
        ]
    });
    table(["ID", "STATUS", "NAME", "SIZE", "FILES", "OWNER", "CREATED"], rows, &[3, 4])
}

/// Everything about one checkpoint.
pub(super) fn checkpoint_details(record: &wire::Checkpoint) -> String {
    let mut rows = vec![
        ("id", plain(&record.id)),
        ("name", plain(&record.name)),
        ("owner", shown_owner(record)),
        ("state", shown_state(record)),
        ("digest", record.digest.clone()),
        ("source", record.source.as_ref().map(shown_source).unwrap_or_default()),
        ("revision", plain(&record.revision)),
        ("files", record.files.to_string()),
        ("logical", show_bytes(record.logical_bytes)),
        ("unique", show_bytes(record.unique_bytes)),
        ("shared", show_bytes(record.shared_bytes)),
        ("on disk", show_bytes(record.physical_bytes)),
        ("pinned", if record.pinned { "yes" } else { "no" }.to_owned()),
        ("created", local_time(record.created_unix_ms)),
    ];
    if record.used_unix_ms > 0 {
        rows.push(("last used", local_time(record.used_unix_ms)));
    }
    if let Some(transfer) = &record.transfer {
        rows.push(("send to", plain(&transfer.url)));
        rows.push(("token", plain(&transfer.token)));
    }
    if let Some(failure) = &record.error {
        rows.push(("error", plain(&failure.message)));
        rows.push(("remedy", plain(&failure.remedy)));
    }
    details(rows)
}

/// The table of `catalog`.
pub(super) fn catalog_table(entries: &[wire::CatalogEntry]) -> String {
    let rows = entries.iter().map(|entry| {
        let source = entry.source.as_ref().map(shown_source).unwrap_or_default();
        [plain(&entry.name), source, plain(&entry.terms_url)]
    });
    table(["NAME", "SOURCE", "TERMS"], rows, &[])
}

/// The table of `jobs`.
pub(super) fn job_table(attachments: &[wire::Attachment]) -> String {
    let rows = attachments.iter().map(|attachment| {
        let names: Vec<_> = attachment.checkpoints.iter().map(|attached| plain(&attached.name)).collect();
        [
            plain(&attachment.job),
            document::attachment_state(attachment.state()).to_owned(),
            shown_target(attachment),
            names.join(", "),
            shown_expiry(attachment).unwrap_or_default(),
        ]
    });
    table(["JOB", "STATE", "TARGET", "CHECKPOINTS", "EXPIRES"], rows, &[])
}

/// What a job has and where: a line, its environment, a row for each checkpoint.
pub(super) fn attachment(attachment: &wire::Attachment) -> String {
    let state = document::attachment_state(attachment.state());
    let mut text = format!("job {} {state}", plain(&attachment.job));
    if !attachment.target.is_empty() {
        text.push_str(&format!(" at {}", shown_target(attachment)));
    }
    if let Some(expiry) = shown_expiry(attachment) {
        text.push_str(&format!(", until {expiry}"));
    }
    text.push('\n');
    let mut environment: Vec<_> = attachment.env.iter().collect();
    environment.sort();
    for (key, value) in environment {
        text.push_str(&format!("{}={}\n", plain(key), plain(value)));
    }
    let rows = attachment
        .checkpoints
        .iter()
        .map(|attached| [plain(&attached.id), plain(&attached.name), plain(&attached.path)]);
    if !attachment.checkpoints.is_empty() {
        text.push_str(&table(["ID", "NAME", "PATH"], rows, &[]));
    }
    text
}

/// The store's figures, and each owner's.
pub(super) fn usage(usage: &wire::Usage) -> String {
    let mut text = details(vec![
        ("logical", show_bytes(usage.logical_bytes)),
        ("unique", show_bytes(usage.unique_bytes)),
        ("on disk", show_bytes(usage.physical_bytes)),
        ("  of it duplicates", show_bytes(usage.duplicate_bytes)),
        ("  of it remnants", show_bytes(usage.remnant_bytes)),
        ("  of it evictable", show_bytes(usage.evictable_bytes)),
        ("  of it in use", show_bytes(usage.leased_bytes)),
        ("  of it pinned", show_bytes(usage.pinned_bytes)),
        ("  of it not to be had again", show_bytes(usage.not_refetchable_bytes)),
        ("filling", show_bytes(usage.filling_bytes)),
        ("quarantine", show_bytes(usage.quarantine_bytes)),
        ("scratch", show_bytes(usage.scratch_bytes)),
        ("catalog", show_bytes(usage.catalog_bytes)),
        ("others", show_bytes(usage.other_bytes)),
        ("free", show_bytes(usage.free_bytes)),
        ("filesystem", show_bytes(usage.filesystem_bytes)),
        ("capacity", show_bytes(usage.capacity_bytes)),
    ]);
    if !usage.owners.is_empty() {
        let rows = usage.owners.iter().map(|owner| {
            let name = if owner.owner.is_empty() { "(public)".to_owned() } else { plain(&owner.owner) };
            let [logical, unique, shared, physical] =
                [owner.logical_bytes, owner.unique_bytes, owner.shared_bytes, owner.physical_bytes].map(show_bytes);
            let quota = match owner.quota_bytes {
                0 => "-".to_owned(),
                quota => format!("{} of {}", show_bytes(owner.charged_bytes), show_bytes(quota)),
            };
            [name, owner.checkpoints.to_string(), logical, unique, shared, physical, quota]
        });
        text.push('\n');
        let heads = ["OWNER", "CHECKPOINTS", "SIZE", "UNIQUE", "SHARED", "ON DISK", "QUOTA"];
        text.push_str(&table(heads, rows, &[1, 2, 3, 4, 5, 6]));
    }
    text
}

/// What was evicted, or would be, with what is expected of each.
pub(super) fn evicted(answer: &wire::EvictCheckpointsResponse) -> String {
    let rows = answer.evicted.iter().map(|eviction| {
        let idle = show_span(eviction.idle_ms / 1000);
        [plain(&eviction.id), plain(&eviction.name), show_bytes(eviction.freed_bytes), idle]
    });
    let mut text = table(["ID", "NAME", "FREES", "UNUSED FOR"], rows, &[2]);
    let verb = if answer.dry_run { "would be freed" } else { "freed" };
    text.push_str(&format!(
        "\n{} {verb}, the store can take {}",
        show_bytes(answer.freed_bytes),
        show_bytes(answer.available_bytes)
    ));
    if answer.duplicate_bytes > 0 {
        text.push_str(&format!("; {} of it copies of borrowed ranges", show_bytes(answer.duplicate_bytes)));
    }
    if answer.lacking_bytes > 0 {
        text.push_str(&format!(
            "\n{} short of what was asked for: {} is in use by jobs, {} is pinned, {} cannot be fetched again",
            show_bytes(answer.lacking_bytes),
            show_bytes(answer.leased_bytes),
            show_bytes(answer.pinned_bytes),
            show_bytes(answer.not_refetchable_bytes)
        ));
    }
    text
}

/// The daemon in a few rows.
pub(super) fn status(status: &wire::Status) -> String {
    let features = status.features.unwrap_or_default();
    let yes_no = |yes| if yes { "yes" } else { "no" }.to_owned();
    let mut rows = vec![
        ("ckptd", plain(&status.version)),
        ("pid", status.pid.to_string()),
        ("up for", show_span(status.uptime_s)),
        ("sessions", status.sessions.to_string()),
        ("attachments", status.attachments.to_string()),
        ("passthrough", yes_no(features.passthrough)),
        ("resend", yes_no(features.resend)),
        ("reflink", yes_no(features.reflink)),
        ("open_tree", yes_no(features.open_tree)),
        ("state", plain(&status.state_dir)),
        ("runtime", plain(&status.runtime_dir)),
        ("descriptors held by", plain(&status.holder)),
        ("restarts", status.restarts.to_string()),
        ("last start", plain(&status.reconciled)),
    ];
    if let Some(scrub) = &status.scrub {
        rows.push(("last scrub", scrub_line(scrub)));
    }
    if status.draining {
        rows.push(("draining", yes_no(true)));
    }
    if !status.degraded.is_empty() {
        rows.push(("degraded", plain(&status.degraded)));
    }
    details(rows)
}

/// `began 2025-01-31 12:00:00, ended 2025-01-31 12:10:00: 3.0 GiB of 3.0 GiB in 12 files read, 0 healed, 0 lost`.
pub(super) fn scrub_line(scrub: &wire::Scrub) -> String {
    let state = match (scrub.running, scrub.stopped) {
        (true, _) => "goes on".to_owned(),
        (false, true) => "was cut short".to_owned(),
        (false, false) => format!("ended {}", local_time(scrub.ended_unix_ms)),
    };
    let unread = if scrub.unread > 0 { format!(", {} could not be read", scrub.unread) } else { String::new() };
    format!(
        "began {}, {state}: {} of {} in {} read, {} healed, {} lost{unread}",
        local_time(scrub.started_unix_ms),
        show_bytes(scrub.bytes),
        show_bytes(scrub.total_bytes),
        counted(scrub.files, "file"),
        scrub.healed,
        scrub.lost
    )
}

/// What is expected of bringing a checkpoint here.
pub(super) fn estimate(estimate: &wire::Estimate) -> String {
    let unknown = || "unknown".to_owned();
    details(vec![
        ("missing", estimate.missing_bytes.map_or_else(unknown, show_bytes)),
        ("from", plain(&estimate.from)),
        ("rate", estimate.rate_bytes_per_s.map_or_else(unknown, |rate| format!("{}/s", show_bytes(rate)))),
        ("expected", estimate.expected_ms.map_or_else(unknown, |ms| show_span(ms.div_ceil(1000)))),
    ])
}

/// `2025-01-31 12:00:00  CHECKPOINT_READY  <sentence>`.
pub(super) fn event_line(event: &wire::Event) -> String {
    let mut line = format!("{}  {}", local_time(event.at_unix_ms), plain(&event.kind));
    for subject in [&event.checkpoint, &event.job] {
        if !subject.is_empty() && !event.message.contains(subject.as_str()) {
            line.push_str(&format!("  {}", plain(subject)));
        }
    }
    line.push_str(&format!("  {}", plain(&event.message)));
    line
}

/// A span of time in its two largest units: `3 m 05 s`.
pub(super) fn show_span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

fn plain(text: &str) -> String {
    names::show_bytes(text.as_bytes())
}

fn shown_owner(record: &wire::Checkpoint) -> String {
    if record.public { "(public)".to_owned() } else { plain(&record.owner) }
}

fn shown_target(attachment: &wire::Attachment) -> String {
    match attachment.pid {
        0 => plain(&attachment.target),
        pid => format!("{} of process {pid}", plain(&attachment.target)),
    }
}

fn shown_source(source: &wire::Source) -> String {
    let mut options: Vec<_> = source.options.iter().map(|(key, value)| format!(" {key}={value}")).collect();
    options.sort();
    plain(&format!("{} {}{}", source.r#type, source.uri, options.concat()))
}

/// When the right ends by itself, if it does.
fn shown_expiry(attachment: &wire::Attachment) -> Option<String> {
    (attachment.expires_unix_ms != 0).then(|| local_time(attachment.expires_unix_ms))
}

fn details(rows: Vec<(&str, String)>) -> String {
    let mut table = bare_table();
    for (label, value) in rows.into_iter().filter(|(_, value)| !value.is_empty()) {
        table.add_row([label.to_owned(), value]);
    }
    rendered(table)
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>, numbers: &[usize]) -> String {
    let mut table = bare_table();
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for index in numbers {
        if let Some(column) = table.column_mut(*index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    rendered(table)
}

fn bare_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

fn rendered(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: wire::CheckpointState) -> wire::Checkpoint {
        wire::Checkpoint {
            id: "c1".into(),
            name: "llama".into(),
            owner: "me".into(),
            state: state.into(),
            files: 3,
            logical_bytes: 3 << 30,
            unique_bytes: 2 << 30,
            physical_bytes: 1 << 30,
            fill: (state == wire::CheckpointState::Filling).then(|| wire::Fill {
                bytes_done: 43,
                bytes_total: 100,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_final_line_says_what_came_of_it() {
        assert_eq!(
            checkpoint_line(&record(wire::CheckpointState::Ready)),
            "llama (c1) ready: 3 files, 3.00 GiB, 2.00 GiB unique, 1.00 GiB on disk"
        );
    }

    #[test]
    fn filling_is_shown_as_downloading_with_percent() {
        assert_eq!(shown_state(&record(wire::CheckpointState::Filling)), "downloading 43 %");
        assert_eq!(shown_state(&record(wire::CheckpointState::Evicted)), "evicted");
    }

    #[test]
    fn the_list_has_one_row_a_checkpoint_under_the_heads() {
        let text = checkpoint_table(&[record(wire::CheckpointState::Filling), record(wire::CheckpointState::Ready)]);
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0], ["ID", "STATUS", "NAME", "SIZE", "FILES", "OWNER", "CREATED"]);
        assert_eq!(lines[1][..8], ["c1", "downloading", "43", "%", "llama", "3.00", "GiB", "3"]);
        assert_eq!(lines[2][..6], ["c1", "ready", "llama", "3.00", "GiB", "3"]);
        assert!(text.lines().all(|line| line == line.trim()), "{text:?}");
    }

    #[test]
    fn an_empty_list_is_its_heads() {
        assert_eq!(
            job_table(&[]).split_whitespace().collect::<Vec<_>>(),
            ["JOB", "STATE", "TARGET", "CHECKPOINTS", "EXPIRES"]
        );
    }

    #[test]
    fn what_tenants_wrote_cannot_move_the_cursor() {
        let mut record = record(wire::CheckpointState::Ready);
        record.source = Some(wire::Source { uri: "\u{1b}[2J".into(), ..Default::default() });
        assert!(!checkpoint_details(&record).contains('\u{1b}'));
    }

    #[test]
    fn spans_have_two_units() {
        assert_eq!(show_span(59), "59 s");
        assert_eq!(show_span(185), "3 m 05 s");
        assert_eq!(show_span(3 * 3600 + 61), "3 h 01 m");
        assert_eq!(show_span(90_000), "1 d 01 h");
    }
}
