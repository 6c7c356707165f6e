//! Exports that come from another process, or back from one.

use std::sync::MutexGuard;

use shell::control::ExportSpec;
use shell::handover::{HandOver, LeftExport};

use super::{Export, Exports, State, lock};
use crate::config::ExportConfig;
use crate::follow::Leases;

impl Exports {
    /// Nothing is started or stopped, no lease taken or marked for as long as this is held. What
    /// comes after is [`Exports::thaw`], or another process.
    pub(crate) fn freeze(&self) -> MutexGuard<'_, ()> {
        let changing = lock(&self.changing);
        self.follow.freeze();
        changing
    }

    /// All goes on after [`Exports::freeze`].
    pub(crate) fn thaw(&self) {
        self.follow.thaw();
    }

    /// Ends the heads that only repair, so that the next process may have their volumes.
    pub(crate) fn end_repairs(&self) {
        for entry in self.heads.repairing() {
            let (id, epoch) = (entry.volume.id, entry.volume.epoch);
            if let Err(error) = self.heads.close_repair(id, epoch) {
                tracing::warn!(volume = entry.volume.name, %error, "ending a repair");
            }
        }
    }

    /// Goes on with exports that this process had left: see [`crate::follow::Follow::take_back`].
    pub(crate) fn take_back(&self, hand_over: &dyn HandOver, left: Vec<LeftExport>) {
        self.follow.take_back(hand_over, left, &|spec| self.adopt(spec));
    }

    /// Goes on with exports that another process has left: see [`crate::follow::Follow::go_on`].
    pub(crate) fn go_on(
        &self,
        hand_over: &dyn HandOver,
        left: Vec<LeftExport>,
        leases: Leases,
    ) -> Result<(), String> {
        self.follow.go_on(hand_over, left, leases, &|spec| self.adopt(spec))
    }

    /// Notes an export that runs, wanted or not: its guest is there. True if it is a standby's.
    fn adopt(&self, spec: &ExportSpec) -> bool {
        let volume = spec.volume;
        let mut inner = self.inner();
        let known = inner.exports.entry(spec.socket.clone()).or_insert_with(|| {
            // Not configured any more.
            let wanted = ExportConfig {
                volume: volume.to_string(),
                socket: spec.socket.clone(),
                queues: spec.queues,
                read_only: spec.read_only,
                standby: false,
            };
            Export { wanted, configured: false, state: State::Running { volume } }
        });
        known.state = State::Running { volume };
        known.wanted.standby
    }
}
