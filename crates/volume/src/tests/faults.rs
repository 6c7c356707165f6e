//! What goes wrong in a world.

use base::{CommandBody, ReplicaError, Seq};

use super::world::{Event, Server, World, index_of, server_id};
use crate::Input;

impl World {
    pub(super) fn injected(&mut self, server: usize, body: &CommandBody) -> Option<ReplicaError> {
        if self.settings.bad != Some(server) || !self.faults || !self.random.one_in(150) {
            return None;
        }
        match body {
            CommandBody::Append { .. } => {
                self.servers[server].model.broken = true;
                let errors = [ReplicaError::Invalid, ReplicaError::Disconnected];
                Some(errors[self.random.index(2)])
            }
            CommandBody::Read { .. } => {
                let errors = [
                    ReplicaError::Damaged,
                    ReplicaError::Behind { last: self.servers[server].model.last() },
                    ReplicaError::DeviceFailed,
                ];
                Some(errors[self.random.index(3)])
            }
            CommandBody::Flush => Some(ReplicaError::DeviceFailed),
            CommandBody::Scan { seq, .. } => {
                self.servers[server].model.doubtful.insert(*seq);
                Some(ReplicaError::Damaged)
            }
            CommandBody::Seal => Some(ReplicaError::NoReplica),
            CommandBody::Truncate { .. } => Some(ReplicaError::Disconnected),
            CommandBody::Grow { .. } => {
                // What reaches beyond its old end it refuses then, and what follows that.
                self.servers[server].model.broken = true;
                Some(ReplicaError::NotSealed)
            }
            CommandBody::Trim
            | CommandBody::Release
            | CommandBody::Renew
            | CommandBody::Hello { .. }
            | CommandBody::HealthOf { .. }
            | CommandBody::Install { .. }
            | CommandBody::List { .. }
            | CommandBody::Fetch { .. }
            | CommandBody::ScanRun { .. } => Some(ReplicaError::NotSealed),
        }
    }

    pub(super) fn disconnect(&mut self, head: usize, server: usize) {
        let Some(running) = &mut self.heads[head] else { return };
        let link = &mut running.links[server];
        if !link.connected {
            return;
        }
        link.connected = false;
        link.session += 1;
        self.servers[server].model.session_lost();
        self.input(head, Input::MemberDown { server: server_id(server) });
    }

    /// Kills a server; `power` loses what is not on media.
    pub(super) fn kill(&mut self, server: usize, power: bool) {
        if !self.servers[server].up {
            return;
        }
        self.count(if power { "power loss" } else { "server crash" });
        let state = &mut self.servers[server];
        state.up = false;
        let floor = if power { state.model.durable } else { state.model.written };
        let lost = state.model.last().seq.0 - floor.0;
        let keep = Seq(floor.0 + self.random.below(lost + 1));
        self.servers[server].model.crash(keep);
        self.servers[server].waiting.clear();
        if power {
            self.oracle.power_lost(&self.truth);
        }
        for head in 0..self.heads.len() {
            self.disconnect(head, server);
        }
    }

    pub(super) fn restart_after(&mut self, server: usize, after: u64) {
        self.schedule(after, Event::Restart { server });
    }

    pub(super) fn fault(&mut self) {
        if self.settings.deposes {
            return self.depose();
        }
        let server = self.random.index(self.servers.len());
        let downtime = self.random.below(200 * self.settings.delay);
        match self.random.below(17) {
            14 | 15 => self.strand(server),
            16 if self.settings.greedy_trims => {
                self.kill(server, false);
                self.restart_after(server, 6 * downtime);
            }
            0..=2 => {
                self.kill(server, false);
                self.restart_after(server, downtime);
            }
            3 if self.settings.power_losses => {
                self.kill(server, true);
                self.restart_after(server, downtime);
            }
            4 if self.settings.power_losses && self.random.one_in(3) => {
                for server in 0..self.servers.len() {
                    self.kill(server, true);
                    let downtime = self.random.below(600 * self.settings.delay);
                    self.restart_after(server, downtime);
                }
            }
            5..=7 => {
                let head = self.current();
                self.disconnect(head, server);
                self.count("disconnect");
                self.schedule(downtime / 4, Event::Connect { head, server });
            }
            8 => self.crash_head(downtime / 4),
            9 => {
                self.count("takeover");
                self.new_head();
            }
            10 => {
                let head = self.current();
                self.input(head, Input::Release);
            }
            11 | 12 => self.trim_one(server),
            13 if self.settings.spares.is_some() => self.lose_records(server),
            13 => self.damage_one(),
            _ => {}
        }
    }

    /// Leaves one member with records that no other has: the head reaches only that one for a
    /// while, then both go away, and the others go on without.
    fn strand(&mut self, server: usize) {
        self.count("strand");
        let current = self.current();
        for other in (0..self.servers.len()).filter(|other| *other != server) {
            self.disconnect(current, other);
        }
        let moment = self.random.below(6 * self.settings.delay);
        self.schedule(moment, Event::Strand { head: current, server });
    }

    pub(super) fn stranded(&mut self, head: usize, server: usize) {
        if self.settings.bad == Some(server) && self.random.one_in(2) {
            let last = self.servers[server].model.written;
            self.damage(server, last);
        }
        if self.random.one_in(2) {
            if head == self.current() {
                self.crash_head(1);
            }
        } else {
            // The old head still reaches that member, and a new one does not.
            self.new_head();
        }
        self.kill(server, false);
        let downtime = self.random.below(200 * self.settings.delay);
        if self.random.one_in(2) {
            self.schedule(downtime / 8, Event::Succeed { server });
        } else {
            self.restart_after(server, downtime);
        }
    }

    /// The member that was left behind is back for the next opening, instead of one that went on
    /// without it.
    pub(super) fn succeed(&mut self, server: usize) {
        self.count("succession");
        let absent = (server + 1 + self.random.index(self.servers.len())) % self.servers.len();
        if absent != server {
            self.kill(absent, false);
            let downtime = self.random.below(200 * self.settings.delay);
            self.restart_after(absent, downtime);
            if let Some(bad) = self.settings.bad.filter(|bad| *bad != server && *bad != absent) {
                self.damage_what_is_lacked(bad, server, absent);
            }
        }
        self.restart_after(server, 0);
        self.crash_head(1);
    }

    pub(super) fn crash_head(&mut self, downtime: u64) {
        let head = self.current();
        if self.heads[head].as_ref().is_none_or(|running| running.ended) {
            return;
        }
        self.count("head crash");
        self.note_interrupted(head);
        self.heads[head] = None;
        self.oracle.head_gone(head);
        self.schedule(downtime, Event::NewHead);
    }

    fn trim_one(&mut self, server: usize) {
        let limit = |server: &Server| server.model.commit.min(server.model.durable);
        let own = limit(&self.servers[server]);
        let members = self.record.0.members.iter();
        let everywhere = members.map(|member| limit(&self.servers[index_of(member.server)]));
        let everywhere = everywhere.min().expect("a member");
        let end = if self.settings.greedy_trims { own } else { own.min(everywhere) };
        let model = &mut self.servers[server].model;
        if end > model.trimmed {
            model.trimmed = Seq(model.trimmed.0 + 1 + self.random.below(end.0 - model.trimmed.0));
        }
    }

    /// A member loses the end of its log, durable or not, and says so. One at a time, and not the only
    /// one that counts: the others hold what was acknowledged.
    fn lose_records(&mut self, server: usize) {
        let members = self.record.0.in_sync().map(index_of);
        let others_are_well = members.clone().all(|other| {
            other == server || !self.servers[other].model.lost && !self.servers[other].model.filling
        });
        let counted = members.clone().any(|member| member == server);
        // What those that are left behind lack is nowhere else then.
        if self.settings.greedy_trims {
            return;
        }
        // The others may be about to leave.
        if self.heads.iter().flatten().any(|running| running.changing) {
            return;
        }
        if self.settings.power_losses || !counted || members.count() < 2 || !others_are_well {
            return;
        }
        self.kill(server, false);
        self.count("durable records lost");
        let model = &mut self.servers[server].model;
        let end = model.log.len();
        let left = end.saturating_sub(1 + self.random.index(20));
        model.log.truncate(left);
        let left = Seq(left as u64);
        (model.written, model.durable) = (left, left);
        (model.commit, model.trimmed) = (model.commit.min(left), model.trimmed.min(left));
        model.lost = true;
        let downtime = self.random.below(100 * self.settings.delay);
        self.restart_after(server, downtime);
    }

    /// Damages a record of which the member that was left behind lacks a copy, and the absent one alone
    /// can show the good one.
    fn damage_what_is_lacked(&mut self, bad: usize, behind: usize, absent: usize) {
        let models = [bad, behind, absent].map(|server| &self.servers[server].model);
        let lacked = |seq: &u64| {
            let [own, behind, absent] = models.map(|model| model.entry(Seq(*seq)));
            own != behind && own == absent && models[2].written >= Seq(*seq)
        };
        if let Some(seq) = (1..=models[0].written.0).rev().find(lacked) {
            self.damage(bad, Seq(seq));
        }
    }

    /// Damages one of the last records of the bad member.
    fn damage_one(&mut self) {
        let Some(bad) = self.settings.bad else { return };
        let written = self.servers[bad].model.written;
        if written > Seq::ZERO {
            let back = self.random.below(written.0.min(12));
            self.damage(bad, Seq(written.0 - back));
        }
    }

    /// Damages a record of the bad member that another holds as well, or that it alone has: so that it was
    /// not acknowledged.
    fn damage(&mut self, bad: usize, seq: Seq) {
        let Some(entry) = self.servers[bad].model.entry(seq).copied() else { return };
        let mut others = self.servers.iter().enumerate().filter(|(index, _)| *index != bad);
        let same = |server: &Server| server.model.entry(seq) == Some(&entry);
        let held = others.clone().any(|(_, server)| {
            server.model.written >= seq && server.model.trimmed < seq && same(server)
        });
        let lone = self.servers.len() > 2 && !others.any(|(_, server)| same(server));
        if self.settings.power_losses || !held && !lone {
            return;
        }
        self.count(if held { "damage" } else { "damage of a lone record" });
        self.servers[bad].model.damaged.insert(seq);
    }
}
