//! I2, seen from a server: a sealed epoch stays sealed, whatever happens to the server, and nobody seals
//! what the cluster store has not given out.

use base::Epoch;

use super::Seen;

pub(super) struct Sealed {
    highest: Vec<Epoch>,
}

impl Sealed {
    pub(super) fn new(servers: usize) -> Self {
        Self { highest: vec![Epoch::NONE; servers] }
    }

    pub(super) fn forget(&mut self, process: usize) {
        if let Some(highest) = self.highest.get_mut(process) {
            *highest = Epoch::NONE;
        }
    }

    pub(super) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        let Some((_, info)) = seen.node.store().and_then(|store| store.replicas().next()) else {
            // Deleted, or never made: nothing is promised any more.
            self.forget(seen.process);
            return Ok(());
        };
        let highest = &mut self.highest[seen.process];
        let sealed = info.state.sealed;
        if sealed < *highest {
            return Err(format!(
                "I2: server {} had sealed {highest} and now says {sealed}",
                seen.process
            ));
        }
        if sealed > seen.store_epoch {
            return Err(format!("I2: server {} sealed {sealed}, which nobody won", seen.process));
        }
        *highest = sealed;
        Ok(())
    }
}
