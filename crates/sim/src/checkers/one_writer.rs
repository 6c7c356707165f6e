//! I7: an epoch has one head, in one process.

use std::collections::BTreeMap;

use base::Epoch;

use super::Seen;

#[derive(Default)]
pub(super) struct OneWriter {
    /// The process whose head has an epoch.
    heads: BTreeMap<Epoch, usize>,
}

impl OneWriter {
    pub(super) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        if let Some(epoch) = seen.head {
            let process = *self.heads.entry(epoch).or_insert(seen.process);
            if process != seen.process {
                return Err(format!(
                    "I7: {epoch} has heads in processes {process} and {}",
                    seen.process
                ));
            }
            if epoch > seen.store_epoch {
                return Err(format!("I7: a head of {epoch}, which nobody won"));
            }
        }
        Ok(())
    }
}
