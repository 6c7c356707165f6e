//! The heads of this node, and who of them has something to say.

use std::collections::BTreeMap;

use base::{Epoch, Instant, ReplicaKey, ServerId, Slab, StateMessage, VolumeId};
use nvme::VolumeExport;
use volume::Head;

use crate::metrics::Counters;

pub(crate) struct HeadEntry {
    pub(crate) head: Head,
    pub(crate) epoch: Epoch,
    /// Of its replicas.
    pub(crate) key: ReplicaKey,
    /// The volume as front ends see it.
    pub(crate) export: VolumeExport,
    /// Servers of its remote members, with whether a peer was retained for each.
    pub(crate) remote: Vec<(ServerId, bool)>,
    /// One of its members is this node's own replica.
    pub(crate) local: Option<ServerId>,
    /// It serves: stock initiators may use the volume.
    pub(crate) opened: bool,
    /// It has ended; it goes when it holds no request any more.
    pub(crate) ended: bool,
    pub(crate) counters: Counters,
    dirty: bool,
}

pub(crate) struct Heads {
    heads: Slab<HeadEntry>,
    by_volume: BTreeMap<VolumeId, u64>,
    dirty: Vec<u64>,
    /// Scratch of `tick`.
    due: Vec<u64>,
}

impl Heads {
    pub(crate) fn new() -> Self {
        Self {
            heads: Slab::with_capacity(16),
            by_volume: BTreeMap::new(),
            dirty: Vec::with_capacity(16),
            due: Vec::with_capacity(16),
        }
    }

    pub(crate) fn insert(
        &mut self,
        head: Head,
        key: ReplicaKey,
        export: VolumeExport,
        local: Option<ServerId>,
        remote: Vec<(ServerId, bool)>,
    ) -> u64 {
        let entry = HeadEntry {
            epoch: head.epoch(),
            key,
            head,
            export,
            remote,
            local,
            opened: false,
            ended: false,
            counters: Counters::default(),
            dirty: false,
        };
        let tag = self.heads.insert_or_grow(entry);
        self.by_volume.insert(export.volume, tag);
        tag
    }

    pub(crate) fn remove(&mut self, tag: u64) -> Option<HeadEntry> {
        let entry = self.heads.remove(tag)?;
        if self.by_volume.get(&entry.export.volume) == Some(&tag) {
            self.by_volume.remove(&entry.export.volume);
        }
        Some(entry)
    }

    pub(crate) fn get(&self, tag: u64) -> Option<&HeadEntry> {
        self.heads.get(tag)
    }

    pub(crate) fn get_mut(&mut self, tag: u64) -> Option<&mut HeadEntry> {
        self.heads.get_mut(tag)
    }

    pub(crate) fn of_volume(&self, volume: VolumeId) -> Option<u64> {
        self.by_volume.get(&volume).copied()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &HeadEntry)> {
        self.heads.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.heads.len()
    }

    /// Hands `input` to a head; late news of a head that is gone is dropped.
    pub(crate) fn handle(&mut self, now: Instant, tag: u64, input: volume::Input) {
        let Some(entry) = self.heads.get_mut(tag) else { return };
        entry.head.handle(now, input);
        if !entry.dirty {
            entry.dirty = true;
            self.dirty.push(tag);
        }
    }

    /// Lets a caller talk to a head, which may have outputs afterwards; `None` if it is gone.
    pub(crate) fn with<T>(&mut self, tag: u64, talk: impl FnOnce(&mut Head) -> T) -> Option<T> {
        let entry = self.heads.get_mut(tag)?;
        let result = talk(&mut entry.head);
        if !entry.dirty {
            entry.dirty = true;
            self.dirty.push(tag);
        }
        Some(result)
    }

    /// The next output of any head that was handed something; `None` of a head once, when it has
    /// said everything.
    pub(crate) fn poll_output(&mut self) -> Option<(u64, Option<volume::Output>)> {
        while let Some(tag) = self.dirty.last().copied() {
            let Some(entry) = self.heads.get_mut(tag) else {
                self.dirty.pop();
                continue;
            };
            let output = entry.head.poll_output();
            if output.is_none() {
                entry.dirty = false;
                self.dirty.pop();
            }
            return Some((tag, output));
        }
        None
    }

    /// Tells every head with a member on `server` that the session there came or went.
    pub(crate) fn member_session(&mut self, now: Instant, server: ServerId, up: bool) {
        self.due.extend(
            self.heads
                .iter()
                .filter(|(_, entry)| entry.remote.iter().any(|(remote, _)| *remote == server))
                .map(|(tag, _)| tag),
        );
        while let Some(tag) = self.due.pop() {
            let input = if up {
                volume::Input::MemberUp { server }
            } else {
                volume::Input::MemberDown { server }
            };
            self.handle(now, tag, input);
        }
    }

    /// Tells heads with a member on a server what that says, or of one volume only the head.
    /// `local`: the member is in this process.
    pub(crate) fn tell_members(
        &mut self,
        now: Instant,
        (server, local): (ServerId, bool),
        key: Option<ReplicaKey>,
        message: StateMessage,
    ) {
        let concerned = |entry: &HeadEntry| {
            let member = if local {
                entry.local == Some(server)
            } else {
                entry.remote.iter().any(|(remote, _)| *remote == server)
            };
            member && key.is_none_or(|key| key.volume == entry.export.volume)
        };
        self.due.extend(self.heads.iter().filter(|(_, e)| concerned(e)).map(|(tag, _)| tag));
        while let Some(tag) = self.due.pop() {
            self.handle(now, tag, volume::Input::State { server, message });
        }
    }

    /// Lets every head whose time has come act.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.due.extend(
            self.heads
                .iter()
                .filter(|(_, entry)| entry.head.next_deadline().is_some_and(|at| at <= now))
                .map(|(tag, _)| tag),
        );
        while let Some(tag) = self.due.pop() {
            self.handle(now, tag, volume::Input::Tick);
        }
    }

    /// When some head wants to be called.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.heads.iter().filter_map(|(_, entry)| entry.head.next_deadline()).min()
    }
}
