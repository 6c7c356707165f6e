//! What is known of a member beyond its log: for how long it has been silent, what its server says of
//! itself in state messages, and what other servers say of it.

use core::time::Duration;

use base::{DegradedReason, Health, Instant, ServerId, StateMessage};

use crate::head::Head;
use crate::status::Draining;

/// What is known of a member beyond its log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemberHealth {
    /// Since when it has answered nothing.
    pub(crate) down_since: Option<Instant>,
    pub(crate) others_say: Option<Health>,
    pub(crate) draining: Option<Draining>,
    pub(crate) degraded: Option<DegradedReason>,
    pub(crate) throttled: Option<u64>,
}

impl MemberHealth {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            down_since: Some(now),
            others_say: None,
            draining: None,
            degraded: None,
            throttled: None,
        }
    }

    /// A new session: what was said in the last one is over, until it is said again.
    pub(crate) fn session_up(&mut self) {
        self.draining = None;
        self.degraded = None;
        self.throttled = None;
    }

    pub(crate) fn session_down(&mut self, now: Instant) {
        self.down_since.get_or_insert(now);
    }

    /// It has answered a Seal.
    pub(crate) fn answered(&mut self) {
        self.down_since = None;
        self.others_say = None;
    }
}

impl Head {
    /// A member's server says something about itself.
    pub(crate) fn state_message(&mut self, server: ServerId, message: StateMessage) {
        let Some(index) = self.member_index(server) else { return };
        let now = self.now;
        let health = &mut self.members[index].health;
        match message {
            StateMessage::Superseded { epoch } => {
                if epoch > self.epoch {
                    self.superseded(epoch);
                }
            }
            StateMessage::Draining { deadline_ms, successor } => {
                let until = now + Duration::from_millis(deadline_ms);
                let successor = (!successor.is_nil()).then_some(successor);
                health.draining = Some(Draining { until, successor });
            }
            StateMessage::Degraded { reason } => health.degraded = Some(reason),
            StateMessage::Throttled { bytes_per_second } => {
                health.throttled = (bytes_per_second > 0).then_some(bytes_per_second);
            }
            StateMessage::Back => {
                health.draining = None;
                health.degraded = None;
            }
            // The head sees a filling's progress by itself; which servers could take a lost
            // member's place, and the size, are in the records.
            StateMessage::CatchingUp { .. }
            | StateMessage::InSync
            | StateMessage::FailoverServer { .. }
            | StateMessage::FailoverUnavailable { .. }
            | StateMessage::Resized { .. } => {}
        }
    }
}
