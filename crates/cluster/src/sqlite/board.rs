//! What holders tell of their volumes, and what happened: tables beside the records, which no
//! decision about data depends on.

use rusqlite::{Connection, Transaction, params};

use super::{Kind, decode, encode};
use crate::events::{EVENTS_MAX, Event};
use crate::status::VolumeStatus;

pub(super) fn put_statuses(transaction: &Transaction<'_>, statuses: &[VolumeStatus]) -> Kind<()> {
    let mut put = transaction.prepare_cached(
        "INSERT INTO statuses (volume, epoch, record)
         SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM volumes WHERE id = ?1)
         ON CONFLICT (volume) DO UPDATE SET epoch = excluded.epoch, record = excluded.record
            WHERE excluded.epoch >= epoch",
    )?;
    for status in statuses {
        let epoch = status.epoch.0.cast_signed();
        put.execute(params![status.volume.to_string(), epoch, encode(status)])?;
    }
    Ok(())
}

pub(super) fn statuses(connection: &Connection) -> Kind<Vec<VolumeStatus>> {
    let mut query =
        connection.prepare_cached("SELECT volume, record FROM statuses ORDER BY volume")?;
    let mut rows = query.query([])?;
    let mut statuses = Vec::new();
    while let Some(row) = rows.next()? {
        let what = format!("the status of volume {}", row.get::<_, String>(0)?);
        statuses.push(decode(&row.get::<_, String>(1)?, &what)?);
    }
    Ok(statuses)
}

pub(super) fn append_event(transaction: &Transaction<'_>, event: &Event) -> Kind<u64> {
    transaction
        .prepare_cached("INSERT INTO events (record) VALUES (?1)")?
        .execute([encode(event)])?;
    let number = transaction.last_insert_rowid().cast_unsigned();
    let last_dropped = number.saturating_sub(EVENTS_MAX).cast_signed();
    transaction.prepare_cached("DELETE FROM events WHERE number <= ?1")?.execute([last_dropped])?;
    Ok(number)
}

pub(super) fn events(connection: &Connection, after: u64, limit: usize) -> Kind<Vec<(u64, Event)>> {
    let mut query = connection.prepare_cached(
        "SELECT number, record FROM events WHERE number > ?1 ORDER BY number LIMIT ?2",
    )?;
    let clamp = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    let mut rows = query.query([clamp(after), clamp(limit)])?;
    let mut events = Vec::new();
    while let Some(row) = rows.next()? {
        let number = row.get::<_, i64>(0)?.cast_unsigned();
        let event = decode(&row.get::<_, String>(1)?, &format!("event {number}"))?;
        events.push((number, event));
    }
    Ok(events)
}

pub(super) fn last_event(connection: &Connection) -> Kind<u64> {
    // Also right when all events are gone.
    let mut query =
        connection.prepare_cached("SELECT max(seq) FROM sqlite_sequence WHERE name = 'events'")?;
    let last: Option<i64> = query.query_row([], |row| row.get(0))?;
    Ok(last.unwrap_or(0).cast_unsigned())
}
