//! What this server tells the heads that have sessions here, before an I/O would: that it goes away,
//! and how the failover servers of their volumes are.

use std::collections::BTreeMap;
use std::sync::Arc;

use base::{Health, ReplicaKey, ServerId, StateMessage, VolumeId};
use cluster::{ServerEntry, VolumeEntry};
use shell::control::{ControlError, DataPlane, StateNotice};

/// How long a server that is being drained stays before its operator may stop it anyway, as far
/// as heads are told. It stays until nothing is left on it.
const DRAIN_DEADLINE_MS: u64 = 600_000;

/// Publishes state messages when what they say has changed.
pub(crate) struct Announcer {
    plane: Arc<dyn DataPlane>,
    server: ServerId,
    /// The heads were told that this server goes away.
    drain_told: bool,
    /// The failover servers of each volume that has a member here, as they were told.
    failover: BTreeMap<VolumeId, Vec<(ServerId, Health)>>,
}

impl Announcer {
    pub(crate) fn new(plane: Arc<dyn DataPlane>, server: ServerId) -> Self {
        Self { plane, server, drain_told: false, failover: BTreeMap::new() }
    }

    /// Tells what is new. What could not be told is tried again with the next call.
    pub(crate) fn tell(&mut self, volumes: &[VolumeEntry], servers: &[ServerEntry], now_ms: u64) {
        let own = servers.iter().find(|entry| entry.server.id == self.server);
        let draining = own.is_some_and(|entry| entry.server.draining.is_some());
        let is_here = |entry: &&VolumeEntry| {
            let mut members = entry.shard.members.iter();
            !entry.deleted
                && members.any(|member| member.server == self.server && member.role.is_served())
        };
        let here: Vec<&VolumeEntry> = volumes.iter().filter(is_here).collect();
        let told = self.tell_drain(draining, &here).and_then(|()| {
            self.failover.retain(|volume, _| here.iter().any(|entry| entry.volume.id == *volume));
            here.iter().try_for_each(|entry| self.tell_failover(entry, servers, now_ms))
        });
        if let Err(error) = told {
            tracing::warn!(%error, "heads are not told what is new; tried again");
        }
    }

    fn tell_drain(&mut self, draining: bool, here: &[&VolumeEntry]) -> Result<(), ControlError> {
        if draining == self.drain_told {
            return Ok(());
        }
        if !draining {
            tracing::info!("this server stays: heads are told");
            self.plane.publish(&StateNotice { key: None, message: StateMessage::Back })?;
            self.drain_told = false;
            return Ok(());
        }
        tracing::info!(replicas = here.len(), "this server is being drained: heads are told");
        let nobody_yet = ServerId::from_bytes([0; 16]);
        let draining = |key, successor| {
            let message = StateMessage::Draining { deadline_ms: DRAIN_DEADLINE_MS, successor };
            self.plane.publish(&StateNotice { key, message })
        };
        // Heads that come later are told this, too.
        draining(None, nobody_yet)?;
        for entry in here {
            if let Some(successor) = entry.shard.failover.first() {
                draining(Some(key_of(entry)), *successor)?;
            }
        }
        self.drain_told = true;
        Ok(())
    }

    fn tell_failover(
        &mut self,
        entry: &VolumeEntry,
        servers: &[ServerEntry],
        now_ms: u64,
    ) -> Result<(), ControlError> {
        let set: Vec<(ServerId, Health)> = entry
            .shard
            .failover
            .iter()
            .map(|server| (*server, health(*server, servers, now_ms)))
            .collect();
        let id = entry.volume.id;
        let known = self.failover.get(&id).map_or(&[][..], Vec::as_slice);
        if known == set {
            return Ok(());
        }
        let publish =
            |message| self.plane.publish(&StateNotice { key: Some(key_of(entry)), message });
        let same_servers =
            known.len() == set.len() && known.iter().zip(&set).all(|(a, b)| a.0 == b.0);
        if !same_servers {
            let count = u8::try_from(set.len()).unwrap_or(u8::MAX);
            for (index, (server, health)) in (0..count).zip(&set) {
                let (server, health) = (*server, *health);
                publish(StateMessage::FailoverServer { server, health, index, count })?;
            }
        }
        for (server, health) in &set {
            let was_usable = same_servers && known.contains(&(*server, Health::Healthy));
            if was_usable && *health == Health::Silent {
                publish(StateMessage::FailoverUnavailable { server: *server })?;
            }
        }
        self.failover.insert(id, set);
        Ok(())
    }
}

fn health(server: ServerId, servers: &[ServerEntry], now_ms: u64) -> Health {
    match servers.iter().find(|entry| entry.server.id == server) {
        Some(entry) if !entry.is_alive(now_ms) => Health::Silent,
        Some(entry) if entry.server.draining.is_some() => Health::Degraded,
        Some(_) => Health::Healthy,
        None => Health::Silent,
    }
}

fn key_of(entry: &VolumeEntry) -> ReplicaKey {
    ReplicaKey { volume: entry.shard.volume, shard: entry.shard.shard }
}
