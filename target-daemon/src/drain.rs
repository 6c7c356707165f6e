//! Emptying a server: what is still on it, and why.

use base::{ServerId, VolumeId};
use cluster::{Problem, VolumeEntry};
use shell::control::{ExportStatus, Status};

/// True if no volume has a replica on `server` any more.
pub(crate) fn is_empty(volumes: &[VolumeEntry], server: ServerId) -> bool {
    replicas(volumes, server).next().is_none()
}

/// The volumes that have a replica on `server`, deleted ones too until it is gone.
pub(crate) fn replicas(
    volumes: &[VolumeEntry],
    server: ServerId,
) -> impl Iterator<Item = &VolumeEntry> {
    let is_here = move |entry: &&VolumeEntry| {
        entry.shard.members.iter().any(|member| member.server == server)
    };
    volumes.iter().filter(is_here)
}

/// What keeps heads on a server: guests that only their owners can move.
pub(crate) fn guests(status: &Status) -> impl Iterator<Item = Problem> {
    let connected = status.exports.iter().filter(|export| export.connected);
    connected.map(|export| Problem { volume: export.spec.volume, reason: guest(export) })
}

fn guest(export: &ExportStatus) -> String {
    let socket = export.spec.socket.display();
    format!("a guest uses it at {socket}; migrate the guest or stop it")
}

/// True if a front end is connected to an export of `volume`.
pub(crate) fn has_guest(status: &Status, volume: VolumeId) -> bool {
    status.exports.iter().any(|export| export.spec.volume == volume && export.connected)
}
