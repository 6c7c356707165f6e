//! What guests may see: per block, the position of the record that must at least show. Grows with every
//! acknowledged write and every value seen; falls back to what is durable when power is lost.

use std::collections::BTreeMap;

use base::{BlockReply, Position, RecordKind, RequestId, Status};

use super::model::{Truth, touches, values_of};

/// What a guest asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read,
    Write { value: u64, fua: bool },
    Zero { kind: RecordKind, fua: bool },
    Flush,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) asked: Asked,
    pub(super) lba: usize,
    pub(super) blocks: usize,
    pub(super) head: usize,
    /// What each block must at least show, at the time it was asked.
    floor: Vec<Position>,
}

/// Counts of what happened, to know that a run was worth something.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answers {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) flushes: u64,
    pub(super) errors: u64,
}

#[derive(Debug)]
pub(super) struct Oracle {
    pub(super) pending: BTreeMap<u64, Pending>,
    /// Per block: what a read must at least show.
    shown: Vec<Position>,
    /// Per block: the part of it that survives a loss of power.
    durable: Vec<Position>,
    /// What was written before the last loss of power, and was not durable, may be lost until an
    /// opening settled it, even if it was seen since: the member that lost it may be the one that
    /// the next opening hears.
    fragile: Position,
    /// Acknowledged means durable.
    always_durable: bool,
    pub(super) errors_allowed: bool,
    pub(super) answers: Answers,
}

impl Oracle {
    pub(super) fn new(blocks: usize, always_durable: bool) -> Self {
        Self {
            pending: BTreeMap::new(),
            shown: vec![Position::ZERO; blocks],
            durable: vec![Position::ZERO; blocks],
            fragile: Position::ZERO,
            always_durable,
            errors_allowed: false,
            answers: Answers::default(),
        }
    }

    /// The newest record that any block must show.
    pub(super) fn newest_shown(&self) -> Position {
        self.shown.iter().max().copied().unwrap_or_default()
    }

    pub(super) fn asked(&mut self, id: u64, asked: Asked, lba: usize, blocks: usize, head: usize) {
        let floor = match asked {
            Asked::Flush => self.shown.clone(),
            Asked::Read | Asked::Write { .. } | Asked::Zero { .. } => {
                self.shown[lba..lba + blocks].to_vec()
            }
        };
        let previous = self.pending.insert(id, Pending { asked, lba, blocks, head, floor });
        assert!(previous.is_none());
    }

    /// Unsynced data of some member is gone: all that is certain is what was durable.
    pub(super) fn power_lost(&mut self, truth: &Truth) {
        if self.always_durable {
            return;
        }
        self.fragile = truth.records.keys().next_back().copied().unwrap_or_default();
        for (shown, durable) in self.shown.iter_mut().zip(&self.durable) {
            *shown = (*shown).min(*durable);
        }
        for pending in self.pending.values_mut() {
            for (place, floor) in pending.floor.iter_mut().enumerate() {
                let block = match pending.asked {
                    Asked::Flush => place,
                    Asked::Read | Asked::Write { .. } | Asked::Zero { .. } => pending.lba + place,
                };
                *floor = (*floor).min(self.durable[block]);
            }
        }
    }

    /// An opening settled everything before it, on media.
    pub(super) fn opened(&mut self) {
        self.durable.clone_from(&self.shown);
        self.fragile = Position::ZERO;
    }

    /// A head went away: what it was asked stays unknown.
    pub(super) fn head_gone(&mut self, head: usize) {
        self.pending.retain(|_, pending| pending.head != head);
    }

    pub(super) fn answered(&mut self, truth: &Truth, reply: &BlockReply, judged: bool) {
        let RequestId(id) = reply.id;
        let pending = self.pending.remove(&id).expect("a request is answered once");
        if reply.status != Status::Ok {
            assert_eq!(reply.status, Status::IoError);
            assert!(self.errors_allowed, "no errors without reason");
            self.answers.errors += 1;
            return;
        }
        match pending.asked {
            // A head that was deposed may answer from before its time unless members keep grants.
            Asked::Read if !judged => {}
            Asked::Read => self.read(truth, &pending, reply),
            Asked::Write { value, fua } => {
                self.answers.writes += 1;
                let position = |(position, _): (&Position, _)| *position;
                let written = truth.records.iter().rfind(|(_, entry)| entry.value == value);
                let written = written.map(position).expect("an acknowledged write was written");
                self.written(&pending, written, fua);
            }
            Asked::Zero { kind, fua } => {
                self.answers.writes += 1;
                let least = pending.floor.iter().min().copied().unwrap();
                let same = |entry: &super::model::Entry| {
                    let header = &entry.header;
                    header.kind == kind
                        && header.lba.0 == pending.lba as u64
                        && header.blocks.0 as usize == pending.blocks
                };
                let written = truth.records.range(least..).find(|(_, entry)| same(entry));
                let written = *written.expect("an acknowledged zeroing was written").0;
                self.written(&pending, written, fua);
            }
            Asked::Flush => {
                self.answers.flushes += 1;
                for (durable, floor) in self.durable.iter_mut().zip(&pending.floor) {
                    *durable = (*durable).max(*floor);
                }
            }
        }
    }

    fn written(&mut self, pending: &Pending, position: Position, fua: bool) {
        for block in pending.lba..pending.lba + pending.blocks {
            if position > self.fragile || fua {
                self.shown[block] = self.shown[block].max(position);
            }
            if fua || self.always_durable {
                self.durable[block] = self.durable[block].max(position);
            }
        }
    }

    fn read(&mut self, truth: &Truth, pending: &Pending, reply: &BlockReply) {
        self.answers.reads += 1;
        let data = reply.data.as_ref().expect("a successful read has data");
        let values = values_of(data.bytes());
        assert_eq!(values.len(), pending.blocks);
        for (place, value) in values.into_iter().enumerate() {
            let block = pending.lba + place;
            let holds =
                |entry: &super::model::Entry| entry.value == value && touches(&entry.header, block);
            let newest = truth.records.iter().rfind(|(_, entry)| holds(entry));
            let seen = newest.map(|(position, _)| *position);
            let seen = if value == 0 { seen.unwrap_or_default() } else { seen.expect("written") };
            assert!(
                seen >= pending.floor[place],
                "block {block} shows {seen}, but {} was acknowledged or seen before",
                pending.floor[place]
            );
            if value != 0 && seen > self.fragile {
                self.shown[block] = self.shown[block].max(seen);
                if self.always_durable {
                    self.durable[block] = self.durable[block].max(seen);
                }
            }
        }
    }
}
