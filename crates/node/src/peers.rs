//! The servers that heads of this node have members on: one initiator each, shared by all heads.

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use base::{BufferPool, Health, HolderId, Instant, ReplicaCommand, ServerId, Slab, StateMessage};
use nvme::{Initiator, InitiatorConfig, Subsystem, Tag};

use crate::fills::Step;

/// Servers that are watched only because a head asked how they are, at most.
const PROBES_MAX: usize = 64;
/// How long a server is watched after a head has asked.
const PROBE_FOR: Duration = Duration::from_secs(30);
/// A server with a session that has not been heard of for this long is silent. Keep Alives come
/// more often.
const SILENT_AFTER: Duration = Duration::from_millis(2500);
/// How long a session stays that nobody uses any more: what was said last arrives, and who comes back
/// finds it.
const LINGER_FOR: Duration = Duration::from_secs(1);
/// A server that was never reached counts as silent after this long.
const UNREACHED_AFTER: Duration = Duration::from_secs(1);

/// A command that a peer has not answered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outgoing {
    /// Of a head, with its tag.
    Head { head: u64, tag: u64 },
    /// Of a fill, with what it waits for.
    Fill { fill: u64, step: Step },
}

/// What a server has said of itself in this session, for heads that come later.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    degraded: Option<StateMessage>,
    draining: Option<(Instant, ServerId)>,
}

pub(crate) struct Peer {
    pub(crate) server: ServerId,
    pub(crate) initiator: Initiator,
    pub(crate) up: bool,
    created: Instant,
    said: Said,
    /// Heads with a member there, fills from there, and a probe. At zero the peer is stopped after
    /// a while.
    users: u32,
    /// Its outputs have to be taken.
    dirty: bool,
    stopped: bool,
}

/// All peers, and who of them has something to say.
pub(crate) struct Peers {
    host: HolderId,
    buffers: BufferPool,
    jitter_seed: u64,
    addresses: BTreeMap<ServerId, SocketAddr>,
    peers: Slab<Peer>,
    by_server: BTreeMap<ServerId, u64>,
    /// Servers that a head asked about, with when to stop watching them.
    probes: BTreeMap<ServerId, Instant>,
    /// Servers with which sessions are kept for heads that may come; true: it is counted as a user.
    kept: BTreeMap<ServerId, bool>,
    /// Servers whose sessions nobody uses, with when to end them.
    lingering: BTreeMap<ServerId, Instant>,
    dirty: Vec<u64>,
    /// Scratch of `tick`.
    due: Vec<u64>,
    /// Commands that were handed to initiators.
    pub(crate) outgoing: Slab<Outgoing>,
}

impl Peers {
    pub(crate) fn new(host: HolderId, buffers: BufferPool, jitter_seed: u64) -> Self {
        Self {
            host,
            buffers,
            jitter_seed,
            addresses: BTreeMap::new(),
            peers: Slab::with_capacity(16),
            by_server: BTreeMap::new(),
            probes: BTreeMap::new(),
            kept: BTreeMap::new(),
            lingering: BTreeMap::new(),
            dirty: Vec::with_capacity(16),
            due: Vec::with_capacity(16),
            outgoing: Slab::with_capacity(4096),
        }
    }

    /// Replaces the address book. Peers whose address changed connect there at their next attempt,
    /// peers that were waiting for an address start.
    pub(crate) fn set_addresses(
        &mut self,
        now: Instant,
        addresses: impl Iterator<Item = (ServerId, SocketAddr)>,
    ) {
        let old = std::mem::replace(&mut self.addresses, addresses.collect());
        let changed: Vec<_> = self
            .addresses
            .iter()
            .filter(|(server, address)| old.get(server) != Some(address))
            .map(|(server, address)| (*server, *address))
            .collect();
        for (server, address) in changed {
            if let Some(tag) = self.by_server.get(&server).copied() {
                self.handle(now, tag, nvme::initiator::Input::SetAddress(address));
            }
        }
        self.retain_kept(now);
    }

    /// Keeps sessions with these servers, and no longer with those that were kept before. One without
    /// an address is connected when it has one.
    pub(crate) fn keep(&mut self, now: Instant, servers: BTreeSet<ServerId>) {
        let before = std::mem::take(&mut self.kept);
        self.kept = servers
            .into_iter()
            .map(|server| (server, before.get(&server).copied().unwrap_or(false)))
            .collect();
        self.retain_kept(now);
        for (server, counted) in before {
            if counted && !self.kept.contains_key(&server) {
                self.release(now, server);
            }
        }
    }

    fn retain_kept(&mut self, now: Instant) {
        let waits = |(server, counted): (&ServerId, &bool)| (!counted).then_some(*server);
        let waiting: Vec<ServerId> = self.kept.iter().filter_map(waits).collect();
        for server in waiting {
            if self.is_addressable(server) {
                self.retain(now, server);
                self.kept.insert(server, true);
            }
        }
    }

    /// True if the address of `server` is known.
    pub(crate) fn is_addressable(&self, server: ServerId) -> bool {
        self.addresses.contains_key(&server)
    }

    /// One more user of a session with `server`; true if it is up. Without a known
    /// address nothing is connected: call again when there is one.
    pub(crate) fn retain(&mut self, now: Instant, server: ServerId) -> bool {
        if let Some(tag) = self.by_server.get(&server).copied() {
            let peer = self.peers.get_mut(tag).expect("by_server names live peers");
            peer.users += 1;
            self.lingering.remove(&server);
            return peer.up;
        }
        let Some(address) = self.addresses.get(&server).copied() else {
            return false;
        };
        self.jitter_seed = self.jitter_seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let subsystem = Subsystem::Replica(server);
        let config = InitiatorConfig::new(self.host, address, subsystem, self.jitter_seed);
        let initiator = Initiator::new(config, self.buffers.clone());
        let peer = Peer {
            server,
            initiator,
            up: false,
            created: now,
            said: Said::default(),
            users: 1,
            dirty: false,
            stopped: false,
        };
        let tag = self.peers.insert_or_grow(peer);
        self.by_server.insert(server, tag);
        self.handle(now, tag, nvme::initiator::Input::Tick);
        false
    }

    /// One user less of a session with `server`.
    pub(crate) fn release(&mut self, now: Instant, server: ServerId) {
        let Some(tag) = self.by_server.get(&server).copied() else { return };
        let peer = self.peers.get_mut(tag).expect("by_server names live peers");
        peer.users -= 1;
        if peer.users == 0 {
            self.lingering.insert(server, now + LINGER_FOR);
        }
    }

    /// How a server is, as seen from here; it is watched from now on for a while.
    pub(crate) fn health(&mut self, now: Instant, server: ServerId) -> Health {
        if let Some(until) = self.probes.get_mut(&server) {
            *until = now + PROBE_FOR;
        } else if self.probes.len() < PROBES_MAX && self.is_addressable(server) {
            self.probes.insert(server, now + PROBE_FOR);
            self.retain(now, server);
        }
        let peer = self.by_server.get(&server).and_then(|tag| self.peers.get(*tag));
        match peer {
            None => Health::Unknown,
            Some(peer) if peer.up => {
                let silent = now.since(peer.initiator.last_heard()) >= SILENT_AFTER;
                match peer.said.degraded {
                    _ if silent => Health::Silent,
                    Some(_) => Health::Degraded,
                    None => Health::Healthy,
                }
            }
            Some(peer) if now.since(peer.created) < UNREACHED_AFTER => Health::Unknown,
            Some(_) => Health::Silent,
        }
    }

    fn stop(&mut self, now: Instant, tag: u64) {
        let peer = self.peers.get_mut(tag).expect("callers name live peers");
        peer.stopped = true;
        self.by_server.remove(&peer.server);
        self.handle(now, tag, nvme::initiator::Input::Stop);
    }

    /// Ends every session; no peer connects any more.
    pub(crate) fn stop_all(&mut self, now: Instant) {
        for tag in std::mem::take(&mut self.by_server).into_values() {
            if self.peers.get(tag).is_some() {
                self.stop(now, tag);
            }
        }
        self.probes.clear();
        self.kept.clear();
        self.lingering.clear();
        self.addresses.clear();
    }

    /// Gives `command` to the peer for `server`; false if there is none.
    pub(crate) fn command(
        &mut self,
        now: Instant,
        server: ServerId,
        from: Outgoing,
        command: ReplicaCommand,
    ) -> bool {
        let Some(peer) = self.by_server.get(&server).copied() else { return false };
        let tag = Tag(self.outgoing.insert_or_grow(from));
        self.handle(now, peer, nvme::initiator::Input::Command { tag, command });
        true
    }

    /// Hands `input` to a peer's initiator; late news of a peer that is gone is dropped.
    pub(crate) fn handle(&mut self, now: Instant, tag: u64, input: nvme::initiator::Input) {
        let Some(peer) = self.peers.get_mut(tag) else { return };
        peer.initiator.handle(now, input);
        if !peer.dirty {
            peer.dirty = true;
            self.dirty.push(tag);
        }
    }

    /// The next output of any peer that was handed something.
    pub(crate) fn poll_output(&mut self) -> Option<(u64, ServerId, nvme::initiator::Output)> {
        while let Some(tag) = self.dirty.last().copied() {
            let Some(peer) = self.peers.get_mut(tag) else {
                self.dirty.pop();
                continue;
            };
            if let Some(output) = peer.initiator.poll_output() {
                return Some((tag, peer.server, output));
            }
            peer.dirty = false;
            let done = peer.stopped;
            self.dirty.pop();
            if done {
                self.peers.remove(tag);
            }
        }
        None
    }

    /// Notes that the session of a peer came or went; true if that is news.
    pub(crate) fn set_up(&mut self, tag: u64, up: bool) -> bool {
        self.peers.get_mut(tag).is_some_and(|peer| {
            if !up {
                peer.said = Said::default();
            }
            std::mem::replace(&mut peer.up, up) != up
        })
    }

    /// Notes what a server says of itself as a whole.
    pub(crate) fn said(&mut self, now: Instant, server: ServerId, message: StateMessage) {
        let peer = self.by_server.get(&server).and_then(|tag| self.peers.get_mut(*tag));
        let Some(peer) = peer else { return };
        match message {
            StateMessage::Draining { deadline_ms, successor } => {
                let until = now + Duration::from_millis(deadline_ms);
                peer.said.draining = Some((until, successor));
            }
            StateMessage::Degraded { .. } => peer.said.degraded = Some(message),
            StateMessage::Back => peer.said = Said::default(),
            StateMessage::Superseded { .. }
            | StateMessage::CatchingUp { .. }
            | StateMessage::InSync
            | StateMessage::FailoverServer { .. }
            | StateMessage::FailoverUnavailable { .. }
            | StateMessage::Throttled { .. }
            | StateMessage::Resized { .. }
            | StateMessage::DamagedBlocks { .. } => {}
        }
    }

    /// What a server has said of itself and not taken back.
    pub(crate) fn has_said(
        &self,
        now: Instant,
        server: ServerId,
    ) -> impl Iterator<Item = StateMessage> + use<> {
        let peer = self.by_server.get(&server).and_then(|tag| self.peers.get(*tag));
        let said = peer.map_or_else(Said::default, |peer| peer.said);
        let draining = said.draining.map(|(until, successor)| {
            let deadline_ms = u64::try_from(until.since(now).as_millis()).unwrap_or(u64::MAX);
            StateMessage::Draining { deadline_ms, successor }
        });
        [said.degraded, draining].into_iter().flatten()
    }

    /// True if there is a session with `server`.
    pub(crate) fn is_up(&self, server: ServerId) -> bool {
        self.by_server.get(&server).and_then(|tag| self.peers.get(*tag)).is_some_and(|peer| peer.up)
    }

    /// Lets every initiator whose time has come act.
    pub(crate) fn tick(&mut self, now: Instant) {
        while let Some(server) = self.probes.iter().find(|(_, at)| **at <= now).map(|(s, _)| *s) {
            self.probes.remove(&server);
            self.release(now, server);
        }
        let due = |until: &BTreeMap<ServerId, Instant>| {
            until.iter().find(|(_, at)| **at <= now).map(|(server, _)| *server)
        };
        while let Some(server) = due(&self.lingering) {
            self.lingering.remove(&server);
            if let Some(tag) = self.by_server.get(&server).copied() {
                self.stop(now, tag);
            }
        }
        self.due.extend(
            self.peers
                .iter()
                .filter(|(_, peer)| peer.initiator.next_deadline().is_some_and(|at| at <= now))
                .map(|(tag, _)| tag),
        );
        while let Some(tag) = self.due.pop() {
            self.handle(now, tag, nvme::initiator::Input::Tick);
        }
    }

    /// When some initiator wants to be called.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let peers = self.peers.iter().filter_map(|(_, peer)| peer.initiator.next_deadline()).min();
        let watched = self.probes.values().chain(self.lingering.values()).min().copied();
        base::time::earliest(peers, watched)
    }
}
