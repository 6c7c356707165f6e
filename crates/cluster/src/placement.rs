//! Choosing the servers that keep a new volume.

use std::collections::BTreeMap;
use std::fmt;

use base::{Member, Role, ServerId};

use crate::records::{ServerEntry, VolumeEntry};

/// Home space is given out in chunks of at most this many bytes.
const CHUNK_BYTES_MAX: u64 = 4 << 20;

/// Bytes of home that a volume of `size_bytes` may come to take.
fn home_bytes(size_bytes: u64) -> u64 {
    size_bytes.checked_next_multiple_of(CHUNK_BYTES_MAX).unwrap_or(u64::MAX)
}

/// Bytes of each server's home space that volumes have been promised, deleted ones too until
/// their replicas are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage(BTreeMap<ServerId, u64>);

impl Usage {
    /// What `volumes` take.
    pub fn of(volumes: &[VolumeEntry], servers: &[ServerEntry]) -> Self {
        let pools: BTreeMap<_, _> =
            servers.iter().map(|entry| (entry.server.id, entry.server.pool)).collect();
        let mut usage = Self::default();
        for entry in volumes {
            for member in &entry.shard.members {
                if pools.get(&member.server) == Some(&member.pool) {
                    let bytes = usage.0.entry(member.server).or_default();
                    *bytes = bytes.saturating_add(home_bytes(entry.volume.size_bytes));
                }
            }
        }
        usage
    }

    /// Bytes promised by `server`.
    pub fn bytes(&self, server: ServerId) -> u64 {
        self.0.get(&server).copied().unwrap_or(0)
    }
}

/// Too few servers can keep a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementError {
    /// Servers needed: one per replica.
    pub needed: usize,
    /// Names of the servers that qualify.
    pub suitable: Vec<String>,
    /// Names of those that do not, and why.
    pub unsuitable: Vec<(String, String)>,
    /// How many of those only have to be started: they are registered and do not run.
    pub absent: usize,
}

impl PlacementError {
    /// True if starting servers that are registered would do.
    pub fn may_pass(&self) -> bool {
        self.suitable.len() + self.absent >= self.needed
    }
}

impl fmt::Display for PlacementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.needed == 1 { "" } else { "s" };
        write!(f, "too few servers: {} replica{plural} need as many servers, ", self.needed)?;
        match self.suitable.as_slice() {
            [] => f.write_str("none is ready")?,
            names => write!(f, "{} ready ({})", names.len(), names.join(", "))?,
        }
        for (name, reason) in &self.unsuitable {
            write!(f, "; {name}: {reason}")?;
        }
        f.write_str("; start or add servers, or ask for fewer replicas")
    }
}

impl std::error::Error for PlacementError {}

/// Chooses members for a volume of `size_bytes`: distinct servers that are alive at `now_ms` and
/// have room, those with most room first. Space is promised, not hoped for: what `usage` says is
/// taken is taken, even if nothing is written there yet.
pub fn place(
    size_bytes: u64,
    replicas: usize,
    servers: &[ServerEntry],
    usage: &Usage,
    now_ms: u64,
) -> Result<Vec<Member>, PlacementError> {
    let needed = home_bytes(size_bytes);
    let mut suitable = Vec::new();
    let mut unsuitable = Vec::new();
    for entry in servers {
        match room(entry, needed, usage, now_ms) {
            Ok(room) => suitable.push((room, entry)),
            Err(reason) => unsuitable.push((entry.server.name.clone(), reason)),
        }
    }
    if suitable.len() < replicas {
        let absent = servers.iter().filter(|entry| !entry.is_alive(now_ms)).count();
        let suitable = suitable.iter().map(|(_, entry)| entry.server.name.clone()).collect();
        return Err(PlacementError { needed: replicas, suitable, unsuitable, absent });
    }
    suitable.sort_by_key(|(room, entry)| (u64::MAX - room, entry.server.id));
    let member = |entry: &ServerEntry| Member {
        server: entry.server.id,
        pool: entry.server.pool,
        role: Role::Provisioning,
    };
    Ok(suitable.iter().take(replicas).map(|(_, entry)| member(entry)).collect())
}

/// Bytes that `entry` can still promise, if they are enough.
fn room(entry: &ServerEntry, needed: u64, usage: &Usage, now_ms: u64) -> Result<u64, String> {
    let server = &entry.server;
    if entry.last_seen_ms == 0 {
        return Err("has not run yet".to_owned());
    }
    if server.stopped {
        return Err("was stopped".to_owned());
    }
    if !entry.is_alive(now_ms) {
        let seconds = now_ms.saturating_sub(entry.last_seen_ms) / 1000;
        return Err(format!("not heard of for {seconds} s"));
    }
    let promised = usage.bytes(server.id);
    let room = server.capacity_bytes.saturating_sub(promised);
    if room < needed {
        return Err(format!("{room} bytes of room, {needed} needed"));
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::ServerRecord;
    use base::PoolId;

    fn server(number: u8, chunks: u64, last_seen_ms: u64) -> ServerEntry {
        let capacity_bytes = chunks * CHUNK_BYTES_MAX;
        ServerEntry {
            server: ServerRecord {
                id: ServerId::from_bytes([number; 16]),
                name: format!("s{number}"),
                pool: PoolId::from_bytes([number; 16]),
                addresses: Vec::new(),
                labels: BTreeMap::new(),
                capacity_bytes,
                free_bytes: capacity_bytes,
                version: String::new(),
                stopped: false,
                problems: Vec::new(),
                draining: None,
            },
            last_seen_ms,
            version: 1,
        }
    }

    #[test]
    fn most_room_first_and_distinct() {
        let servers = [server(1, 100, 5), server(2, 300, 5), server(3, 200, 5)];
        let members = place(50 * CHUNK_BYTES_MAX - 5, 2, &servers, &Usage::default(), 10).unwrap();
        let ids: Vec<_> = members.iter().map(|member| member.server).collect();
        assert_eq!(ids, [ServerId::from_bytes([2; 16]), ServerId::from_bytes([3; 16])]);
        assert!(members.iter().all(|member| member.role == Role::Provisioning));
    }

    #[test]
    fn the_error_counts_and_says_why() {
        let mut stopped = server(4, 100, 5);
        stopped.server.stopped = true;
        let servers = [server(1, 100, 90_000), server(2, 49, 90_000), server(3, 100, 1), stopped];
        let error =
            place(50 * CHUNK_BYTES_MAX - 5, 3, &servers, &Usage::default(), 90_001).unwrap_err();
        assert_eq!(error.needed, 3);
        assert_eq!(error.suitable, ["s1"]);
        assert!(error.absent == 2 && error.may_pass());
        let text = error.to_string();
        for part in [
            "3 replicas",
            "1 ready (s1)",
            "s2: 205520896 bytes of room, 209715200 needed",
            "s3: not heard of for 90 s",
            "s4: was stopped",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn promised_space_is_taken() {
        let servers = [server(1, 100, 5)];
        let usage = Usage([(ServerId::from_bytes([1; 16]), 60 * CHUNK_BYTES_MAX)].into());
        assert!(place(40 * CHUNK_BYTES_MAX + 1, 1, &servers, &usage, 10).is_err());
        assert!(place(40 * CHUNK_BYTES_MAX, 1, &servers, &usage, 10).is_ok());
    }
}
