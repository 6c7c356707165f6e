//! What holders tell of their volumes, and what happened.

use std::collections::BTreeMap;

use base::VolumeId;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::wire::{delete, exists, get, list, put, range, unchanged};
use super::{Commit, EtcdStore, Kind, Witness, decode, encode, new_mark};
use crate::error::StoreErrorKind;
use crate::events::{EVENTS_MAX, Event};
use crate::status::VolumeStatus;
use crate::volumes::ATTEMPTS;

/// Statuses that one transaction takes; etcd takes 128 operations in one.
const BATCH: usize = 32;

#[derive(Serialize, Deserialize)]
struct StoredEvent {
    mark: String,
    event: Event,
}

impl EtcdStore {
    pub(super) fn write_statuses(&self, statuses: &[VolumeStatus]) -> Kind<()> {
        for batch in statuses.chunks(BATCH) {
            if !self.try_statuses(batch)? {
                // One of them keeps the others back.
                for status in batch {
                    self.try_statuses(std::slice::from_ref(status))?;
                }
            }
        }
        Ok(())
    }

    /// False if a volume is not there, or another holder told of it meanwhile.
    fn try_statuses(&self, statuses: &[VolumeStatus]) -> Kind<bool> {
        let key = |volume: VolumeId| self.key(format_args!("statuses/{volume}"));
        let reads = statuses.iter().map(|status| get(&key(status.volume))).collect();
        let mut found = BTreeMap::new();
        for pair in self.read(reads)?.iter().flatten() {
            let kept: VolumeStatus = decode(pair)?;
            found.insert(kept.volume, (kept.epoch, pair.mod_revision));
        }
        let (mut compare, mut write): (Vec<Value>, Vec<Value>) = Default::default();
        for status in statuses {
            let (epoch, at) = found.get(&status.volume).copied().unwrap_or_default();
            if epoch <= status.epoch {
                compare.push(exists(&self.key(format_args!("volumes/{}", status.volume))));
                compare.push(unchanged(&key(status.volume), at));
                write.push(put(&key(status.volume), &encode(status)));
            }
        }
        if write.is_empty() {
            return Ok(true);
        }
        Ok(self.commit(Commit { compare, write, witness: Witness::None })?.is_some())
    }

    pub(super) fn read_statuses(&self) -> Kind<Vec<VolumeStatus>> {
        let found = self.read(vec![list(&self.key("statuses/"))])?.remove(0);
        found.iter().map(decode).collect()
    }

    /// The number of the newest event, and the revision in etcd of the key that says so.
    pub(super) fn read_last_event(&self) -> Kind<(u64, u64)> {
        let Some(pair) = self.read_one(&self.key("events/last"))? else { return Ok((0, 0)) };
        let number: u64 = decode(&pair)?;
        Ok((number, pair.mod_revision))
    }

    pub(super) fn write_event(&self, event: &Event) -> Kind<u64> {
        let stored = StoredEvent { mark: new_mark(), event: event.clone() };
        let last = self.key("events/last");
        for _ in 0..ATTEMPTS {
            let (number, at) = self.read_last_event()?;
            let number = number + 1;
            let key = self.event_key(number);
            let compare = vec![unchanged(&last, at)];
            let mut write = vec![put(&last, &number.to_string()), put(&key, &encode(&stored))];
            if let Some(dropped) = number.checked_sub(EVENTS_MAX) {
                write.push(delete(&self.event_key(dropped)));
            }
            let witness = Witness::Mark(&key, &stored.mark);
            if self.commit(Commit { compare, write, witness })?.is_some() {
                return Ok(number);
            }
        }
        Err(StoreErrorKind::Conflict)
    }

    pub(super) fn read_events(&self, after: u64, limit: usize) -> Kind<Vec<(u64, Event)>> {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX).min(EVENTS_MAX);
        let Some(first) = after.checked_add(1).filter(|_| limit > 0) else {
            return Ok(Vec::new());
        };
        let prefix = self.key("events/log/");
        let read = range(&prefix, &self.event_key(first), limit);
        let mut events = Vec::new();
        for pair in self.read(vec![read])?.remove(0) {
            let number = pair.key.strip_prefix(&prefix).and_then(|number| number.parse().ok());
            let unnumbered = || StoreErrorKind::Damaged(format!("{} in etcd", pair.key));
            let event = decode::<StoredEvent>(&pair)?.event;
            events.push((number.ok_or_else(unnumbered)?, event));
        }
        Ok(events)
    }

    /// Numbers have as many digits as the largest one, so that their order is that of the keys.
    fn event_key(&self, number: u64) -> String {
        self.key(format_args!("events/log/{number:020}"))
    }
}
