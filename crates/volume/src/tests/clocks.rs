//! Clocks that run at different rates, and what members grant by theirs.

use base::limits::GRANT_MS;
use base::{Epoch, Instant, ReplicaError, ReplyBody};

use super::world::{Event, MS, Random, World};

/// How far clocks are off, in thousandths: a head's 150 ms must be shorter than a member's 200.
const DRIFT: u64 = 120;

/// A head's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    rate: u64,
    offset: u64,
}

impl Clock {
    pub(super) fn new(random: &mut Random, drifts: bool) -> Self {
        if !drifts {
            return Self { rate: 1000, offset: 0 };
        }
        Self { rate: rate(random), offset: random.below(1 << 40) }
    }

    /// What it shows at `now`.
    pub(super) fn at(self, now: u64) -> Instant {
        Instant::from_nanos(self.offset + now * self.rate / 1000)
    }

    /// When it shows `at`.
    pub(super) fn reaches(self, at: Instant) -> u64 {
        (at.nanos().saturating_sub(self.offset) * 1000).div_ceil(self.rate)
    }
}

fn rate(random: &mut Random) -> u64 {
    1000 - DRIFT + random.below(2 * DRIFT + 1)
}

/// What a member granted, by the world's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    lasts: u64,
    until: u64,
    pub(super) deposed_until: u64,
}

impl Grant {
    pub(super) fn new(random: &mut Random, drifts: bool) -> Self {
        let rate = if drifts { rate(random) } else { 1000 };
        Self { lasts: GRANT_MS * MS * 1000 / rate, until: 0, deposed_until: 0 }
    }

    /// Nobody remembers what was admitted before.
    pub(super) fn restarted(&mut self, now: u64) {
        self.until = now + self.lasts;
    }

    pub(super) fn admitted(&mut self, now: u64, deposes: bool, seals: bool, releases: bool) {
        if deposes {
            self.deposed_until = self.deposed_until.max(self.until);
            self.until = 0;
        } else if !seals {
            self.until = if releases { 0 } else { now + self.lasts };
        }
    }

    fn sealed(&mut self, now: u64) {
        self.until = self.until.max(now + self.lasts);
    }
}

impl World {
    /// Holds the answer to a Seal until what was granted before has run out.
    pub(super) fn hold_seal(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        epoch: Epoch,
    ) {
        let after = self.servers[server].grant.deposed_until.saturating_sub(self.now);
        if after > 0 {
            self.count("held seal");
        }
        self.schedule(after, Event::HeldSeal { head, server, session, tag, epoch });
    }

    /// The wait of a Seal's answer is over.
    pub(super) fn held_seal(
        &mut self,
        head: usize,
        server: usize,
        session: u64,
        tag: u64,
        epoch: Epoch,
    ) {
        if self.link(head, server, session).is_none() {
            return;
        }
        let now = self.now;
        let state = &mut self.servers[server];
        let sealed = state.model.sealed;
        let result = if sealed == epoch {
            state.grant.sealed(now);
            Ok(ReplyBody::Sealed(state.model.state()))
        } else {
            Err(ReplicaError::Superseded { sealed })
        };
        self.answer(head, server, session, tag, result);
    }

    /// Stops a head's process for a while.
    pub(super) fn stop(&mut self, head: usize, nanos: u64) {
        let Some(running) = &mut self.heads[head] else { return };
        if running.stopped.is_none() && !running.ended {
            running.stopped = Some(Vec::new());
            running.was_stopped = true;
            self.count("stopped");
            self.schedule(nanos, Event::Resume { head });
        }
    }

    pub(super) fn resume(&mut self, head: usize) {
        let Some(running) = &mut self.heads[head] else { return };
        for input in running.stopped.take().into_iter().flatten() {
            self.input(head, input);
        }
        for server in 0..self.settings.members {
            let after = self.delay();
            self.schedule(after, Event::Connect { head, server });
        }
    }

    /// Nothing gets through between a head and a server for a while.
    pub(super) fn stall_link(&mut self, head: usize, server: usize, nanos: u64) {
        let until = self.now + nanos;
        if let Some(running) = &mut self.heads[head] {
            let link = &mut running.links[server];
            link.stalled_until = link.stalled_until.max(until);
        }
    }

    /// Something by which a head is deposed without noticing.
    pub(super) fn depose(&mut self) {
        let head = self.current();
        let server = self.random.index(self.settings.members);
        let nanos = self.random.below(600 * MS);
        match self.random.below(8) {
            0..=2 => {
                self.count("cut off");
                for other in (0..self.settings.members).filter(|other| *other != server) {
                    self.stall_link(head, other, nanos);
                }
                self.apart = Some((server, self.now + nanos));
                self.schedule(nanos / 8, Event::NewHead);
            }
            3 => {
                let nanos = if self.random.one_in(4) { 10_000 * MS } else { nanos };
                self.stop(head, nanos);
                self.new_head();
            }
            4 => {
                self.stop(head, nanos / 4);
            }
            5 => {
                self.new_head();
            }
            6 => {
                self.kill(server, false);
                self.restart_after(server, nanos / 4);
            }
            _ => {
                self.disconnect(head, server);
                self.schedule(nanos / 8, Event::Connect { head, server });
            }
        }
    }
}
