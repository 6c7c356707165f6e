//! Log matching: what is settled at one server is settled everywhere: no two servers have had, at the
//! same seq, settled records of different epochs. And what is trimmed or home is settled.

use std::collections::BTreeMap;

use base::{Epoch, Position, Seq};

use super::Seen;

/// Positions that are remembered, at most: the newest.
const KNOWN_MAX: usize = 4096;

#[derive(Default)]
pub(super) struct Matching {
    /// The epoch of a settled record, and the server that had it first.
    known: BTreeMap<Seq, (Epoch, usize)>,
}

impl Matching {
    pub(super) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        let Some(store) = seen.node.store() else { return Ok(()) };
        let Some((key, info)) = store.replicas().next() else { return Ok(()) };
        let state = info.state;
        if info.damaged || state.damaged || state.filling || !seen.keeps_its_word {
            return Ok(());
        }
        if state.trimmed > state.commit {
            return Err(format!(
                "I1: server {} trimmed through {}, and only {} is settled",
                seen.process, state.trimmed, state.commit
            ));
        }
        for Position { epoch, seq } in store.log_marks(key) {
            if seq > state.commit || seq == Seq::ZERO {
                continue;
            }
            let (known, server) = *self.known.entry(seq).or_insert((epoch, seen.process));
            if known != epoch {
                return Err(format!(
                    "I2: record {seq} is settled, of {known} at server {server} and of {epoch} at \
                     server {}",
                    seen.process
                ));
            }
        }
        while self.known.len() > KNOWN_MAX {
            self.known.pop_first();
        }
        Ok(())
    }
}
