//! `holdfast events`: what happened in the cluster, one line each with its cause.

use std::time::Duration;

use base::{ServerId, VolumeId};
use cluster::{ClusterStore, Create, Event, EventKind, StoreErrorKind, volumes};
use serde::Serialize;

use crate::arguments::{EventsArguments, StoreArgument};
use crate::exit::Failure;
use crate::output::Output;
use crate::server::find;

/// Events that are asked for at once.
const BATCH: usize = 256;

/// How often `--follow` looks. Events are no news for a store's revision, so there is nothing to
/// wait on.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// One line of `events --json`.
#[derive(Serialize)]
struct EventView<'event> {
    number: u64,
    /// Milliseconds since 1970.
    at_ms: u64,
    kind: EventKind,
    /// UUID.
    volume_id: Option<String>,
    /// UUID.
    server_id: Option<String>,
    text: &'event str,
    /// Empty if the text is all there is to say.
    cause: &'event str,
}

/// Which events are shown.
struct Filter {
    volume: Option<VolumeId>,
    server: Option<ServerId>,
}

impl Filter {
    fn lets_through(&self, event: &Event) -> bool {
        self.volume.is_none_or(|id| event.volume == Some(id))
            && self.server.is_none_or(|id| event.server == Some(id))
    }
}

pub(crate) fn run(
    store: &StoreArgument,
    arguments: &EventsArguments,
    output: &Output,
) -> Result<(), Failure> {
    let store = cluster::open(store.address()?, Create::Never)?;
    let store = store.as_ref();
    let filter = filter(store, arguments)?;
    let mut after = match arguments.after {
        Some(number) => number,
        None => show_last(store, &filter, arguments.limit, output)?,
    };
    loop {
        let events = match store.events(after, BATCH) {
            Ok(events) => events,
            // Whoever follows wants to see what comes after an outage, too.
            Err(error)
                if arguments.follow && matches!(error.kind, StoreErrorKind::Unavailable(_)) =>
            {
                output.note(&error.to_string());
                std::thread::sleep(FOLLOW_EVERY);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        for (number, event) in &events {
            after = *number;
            if filter.lets_through(event) {
                show(*number, event, output);
            }
        }
        if events.len() == BATCH {
            continue;
        }
        if !arguments.follow {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

fn filter(store: &dyn ClusterStore, arguments: &EventsArguments) -> Result<Filter, Failure> {
    let volume = match &arguments.volume {
        // One that was deleted has a history, too.
        Some(text) => match text.parse() {
            Ok(id) => Some(id),
            Err(_) => Some(volumes::find(store, text)?.volume.id),
        },
        None => None,
    };
    let server = match &arguments.server {
        Some(name) => Some(find(store, name)?.server.id),
        None => None,
    };
    Ok(Filter { volume, server })
}

/// Shows the last `limit` events that the filter lets through; the number of the last one there is.
fn show_last(
    store: &dyn ClusterStore,
    filter: &Filter,
    limit: usize,
    output: &Output,
) -> Result<u64, Failure> {
    let mut after = 0;
    let mut last = std::collections::VecDeque::new();
    loop {
        let events = store.events(after, BATCH)?;
        let count = events.len();
        for (number, event) in events {
            after = number;
            if filter.lets_through(&event) {
                last.push_back((number, event));
            }
            if last.len() > limit {
                last.pop_front();
            }
        }
        if count < BATCH {
            break;
        }
    }
    for (number, event) in &last {
        show(*number, event, output);
    }
    Ok(after)
}

fn show(number: u64, event: &Event, output: &Output) {
    let view = EventView {
        number,
        at_ms: event.at_ms,
        kind: event.kind,
        volume_id: event.volume.map(|id| id.to_string()),
        server_id: event.server.map(|id| id.to_string()),
        text: &event.text,
        cause: &event.cause,
    };
    output.print_line(&view, || line(event));
}

/// `2026-11-22 01:02:03.456Z  in sync  what happened (because of this)`.
pub(crate) fn line(event: &Event) -> String {
    let cause = if event.cause.is_empty() { String::new() } else { format!(" ({})", event.cause) };
    format!("{}  {:<14}  {}{cause}", timestamp(event.at_ms), event.kind.to_string(), event.text)
}

/// A moment in UTC.
pub(crate) fn timestamp(ms: u64) -> String {
    let (days, in_day) = (ms / 86_400_000, ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (hours, minutes) = (in_day / 3_600_000, in_day / 60_000 % 60);
    let (seconds, ms) = (in_day / 1000 % 60, in_day % 1000);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}.{ms:03}Z")
}

/// Year, month and day in the Gregorian calendar, of days since 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    // 400 years have the same number of days, wherever they begin.
    let (mut year, mut days) = (1970 + days / 146_097 * 400, days % 146_097);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new kind does not compile here: explain it in the table of `holdfast events`, too.
    #[test]
    fn the_manual_explains_every_kind_of_event() {
        let all = std::iter::successors(Some(EventKind::Opened), |kind| {
            Some(match kind {
                EventKind::Opened => EventKind::Released,
                EventKind::Released => EventKind::TakenOver,
                EventKind::TakenOver => EventKind::Waiting,
                EventKind::Waiting => EventKind::Stalled,
                EventKind::Stalled => EventKind::Resumed,
                EventKind::Resumed => EventKind::Resized,
                EventKind::Resized => EventKind::MemberLost,
                EventKind::MemberLost => EventKind::MemberBack,
                EventKind::MemberBack => EventKind::Degraded,
                EventKind::Degraded => EventKind::Mended,
                EventKind::Mended => EventKind::MemberAdded,
                EventKind::MemberAdded => EventKind::FillStarted,
                EventKind::FillStarted => EventKind::InSync,
                EventKind::InSync => EventKind::Demoted,
                EventKind::Demoted => EventKind::MemberRemoved,
                EventKind::MemberRemoved => EventKind::HealRefused,
                EventKind::HealRefused => EventKind::RepairStarted,
                EventKind::RepairStarted => EventKind::RepairEnded,
                EventKind::RepairEnded => EventKind::DrainStarted,
                EventKind::DrainStarted => EventKind::Drained,
                EventKind::Drained => EventKind::Undrained,
                EventKind::Undrained => EventKind::ServerUp,
                EventKind::ServerUp => EventKind::ServerDown,
                EventKind::ServerDown => EventKind::Other,
                EventKind::Other => return None,
            })
        });
        let manual = include_str!("../../docs/operations.md");
        let table = manual.split("| `holdfast events` | meaning |").nth(1).expect("the table");
        let rows =
            table.lines().skip(1).take_while(|line| line.is_empty() || line.starts_with('|'));
        let cells: Vec<&str> = rows.filter_map(|row| row.split('|').nth(1)).collect();
        for kind in all {
            let word = kind.to_string();
            let explained = cells.iter().any(|cell| cell.split(',').any(|w| w.trim() == word));
            assert!(explained, "docs/operations.md does not explain the event '{word}'");
        }
    }

    #[test]
    fn moments_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00.000Z"),
            (951_782_399, "2000-02-28 23:59:59.000Z"),
            (951_782_400, "2000-02-29 00:00:00.000Z"),
            (951_868_800, "2000-03-01 00:00:00.000Z"),
            (1_709_164_800, "2024-02-29 00:00:00.000Z"),
            (4_107_542_400, "2100-03-01 00:00:00.000Z"),
            (1_795_309_200, "2026-11-22 01:00:00.000Z"),
        ] {
            assert_eq!(timestamp(seconds * 1000), text);
        }
        assert_eq!(timestamp(1_795_309_200_456), "2026-11-22 01:00:00.456Z");
    }
}
