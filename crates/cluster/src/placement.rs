//! Choosing servers: those that keep a new volume, and those that can take a lost member's place.

use std::collections::BTreeMap;
use std::fmt;

use base::{Member, Role, ServerId};

use crate::records::{ServerEntry, ServerRecord, VolumeEntry};

/// Failover servers of a volume, at most.
pub const FAILOVER_MAX: usize = 3;

/// Home space is given out in chunks of at most this many bytes.
const CHUNK_BYTES_MAX: u64 = 4 << 20;

/// Bytes of home that a volume of `size_bytes` may come to take.
pub(crate) fn home_bytes(size_bytes: u64) -> u64 {
    size_bytes.checked_next_multiple_of(CHUNK_BYTES_MAX).unwrap_or(u64::MAX)
}

/// Room of the servers' pools that volumes have been promised, deleted ones too until their
/// replicas are gone; and room that is kept for replacing what one lost server kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    promised: BTreeMap<ServerId, u64>,
    /// By failover server and member: what the first would be given if the second were lost.
    reserved: BTreeMap<(ServerId, ServerId), u64>,
}

impl Usage {
    /// What `volumes` take.
    pub fn of(volumes: &[VolumeEntry], servers: &[ServerEntry]) -> Self {
        let pools: BTreeMap<_, _> =
            servers.iter().map(|entry| (entry.server.id, entry.server.pool)).collect();
        let mut usage = Self::default();
        for entry in volumes {
            let bytes = home_bytes(entry.volume.size_bytes);
            for member in &entry.shard.members {
                if pools.get(&member.server) == Some(&member.pool) {
                    let promised = usage.promised.entry(member.server).or_default();
                    *promised = promised.saturating_add(bytes);
                }
            }
            for key in reservations(entry) {
                let reserved = usage.reserved.entry(key).or_default();
                *reserved = reserved.saturating_add(bytes);
            }
        }
        usage
    }

    /// Bytes promised by `server`.
    pub fn bytes(&self, server: ServerId) -> u64 {
        self.promised.get(&server).copied().unwrap_or(0)
    }

    /// Bytes that `server` keeps free as a failover server: enough for the loss of any one other
    /// server.
    pub fn reserved(&self, server: ServerId) -> u64 {
        self.reserved_but_for(server, None)
    }

    /// The same without what it keeps for the volume of `but`.
    fn reserved_but_for(&self, server: ServerId, but: Option<&VolumeEntry>) -> u64 {
        let own = |key: &(ServerId, ServerId)| {
            let entry = but.filter(|entry| reservations(entry).any(|own| own == *key));
            entry.map_or(0, |entry| home_bytes(entry.volume.size_bytes))
        };
        let lost_members = self.reserved.iter().filter(|((failover, _), _)| *failover == server);
        lost_members.map(|(key, bytes)| bytes.saturating_sub(own(key))).max().unwrap_or(0)
    }

    /// Promises room for one more replica of `entry`'s volume at `server`.
    pub(crate) fn promise(&mut self, server: ServerId, entry: &VolumeEntry) {
        let promised = self.promised.entry(server).or_default();
        *promised = promised.saturating_add(home_bytes(entry.volume.size_bytes));
    }
}

/// Which room is kept for a volume: at its first failover server, for the loss of each member. A
/// single copy that is lost cannot be made again, so nothing is kept for it.
fn reservations(entry: &VolumeEntry) -> impl Iterator<Item = (ServerId, ServerId)> {
    let wanted = !entry.deleted && entry.volume.policy.replicas > 1;
    let first = entry.shard.failover.first().copied().filter(|_| wanted);
    let members = entry.shard.members.iter().filter(|member| member.role != Role::Leaving);
    first.into_iter().flat_map(move |first| members.clone().map(move |lost| (first, lost.server)))
}

/// What a decision about places is made on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// All servers.
    pub servers: Vec<ServerEntry>,
    /// What is promised of their room.
    pub usage: Usage,
    /// The server of each member that is made or filled, of volumes that somebody holds.
    pub filling: Vec<ServerId>,
}

impl Picture {
    /// The picture that `volumes` and `servers` make.
    pub fn of(volumes: &[VolumeEntry], servers: Vec<ServerEntry>) -> Self {
        let held = volumes.iter().filter(|entry| !entry.deleted && entry.volume.holder.is_some());
        let members = held.flat_map(|entry| &entry.shard.members);
        let filling = members.filter(|member| match member.role {
            Role::Provisioning | Role::CatchingUp => true,
            Role::InSync | Role::Leaving => false,
        });
        let filling = filling.map(|member| member.server).collect();
        Self { usage: Usage::of(volumes, &servers), servers, filling }
    }

    /// How many members are made or filled at present. Those whose servers do not run only wait for
    /// them, and keep nobody else waiting.
    pub fn filling_now(&self, now_ms: u64) -> usize {
        let runs = |id: &&ServerId| self.server(**id).is_some_and(|entry| entry.is_alive(now_ms));
        self.filling.iter().filter(runs).count()
    }

    /// The server with this id.
    pub fn server(&self, id: ServerId) -> Option<&ServerEntry> {
        self.servers.iter().find(|entry| entry.server.id == id)
    }
}

/// How much of one failure domain two or more servers would have in common: replicas in the same
/// rack, then replicas in the same zone. Less is better. Servers without labels are domains of their
/// own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shared {
    racks: usize,
    zones: usize,
}

impl Shared {
    /// Of `server` with `others`.
    pub(crate) fn of<'a>(
        server: &ServerRecord,
        others: impl Iterator<Item = &'a ServerRecord>,
    ) -> Self {
        let label = |record: &ServerRecord, name: &str| record.labels.get(name).cloned();
        let (zone, rack) = (label(server, "zone"), label(server, "rack"));
        let mut shared = Self::default();
        for other in others {
            let same_zone = zone == label(other, "zone");
            shared.zones += usize::from(same_zone && zone.is_some());
            shared.racks +=
                usize::from(same_zone && rack.is_some() && rack == label(other, "rack"));
        }
        shared
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

/// Chooses members for a volume of `size_bytes`: distinct servers that are alive at `now_ms`, not
/// being drained, and have room; in distinct failure domains (label `zone`, then `rack`) as far as
/// there are any, then those with most room. Space is promised, not hoped for: what `usage` says
/// is taken is taken, even if nothing is written there yet.
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
        match room(entry, needed, usage, None, now_ms) {
            Ok(room) => suitable.push((room, entry)),
            Err(reason) => unsuitable.push((entry.server.name.clone(), reason)),
        }
    }
    if suitable.len() < replicas {
        let absent = servers.iter().filter(|entry| !entry.is_alive(now_ms)).count();
        let suitable = suitable.iter().map(|(_, entry)| entry.server.name.clone()).collect();
        return Err(PlacementError { needed: replicas, suitable, unsuitable, absent });
    }
    let mut chosen: Vec<&ServerEntry> = Vec::with_capacity(replicas);
    while chosen.len() < replicas {
        let (at, _) = suitable
            .iter()
            .enumerate()
            .min_by_key(|(_, (room, entry))| {
                let others = chosen.iter().map(|other| &other.server);
                (Shared::of(&entry.server, others), u64::MAX - room, entry.server.id)
            })
            .expect("there are at least as many as replicas");
        chosen.push(suitable.swap_remove(at).1);
    }
    let member = |entry: &ServerEntry| Member {
        server: entry.server.id,
        pool: entry.server.pool,
        role: Role::Provisioning,
    };
    Ok(chosen.into_iter().map(member).collect())
}

/// The server that had best be given a replica of `entry`'s volume beside those of `staying`: alive,
/// not being drained, without a replica of it, with room (kept for other volumes only if nothing else
/// is left); in other failure domains than `staying` as far as possible, then the first failover
/// server, then the one with most room. A server that an operator named for it comes before all that.
/// Else why no server qualifies.
pub(crate) fn spare<'a>(
    entry: &VolumeEntry,
    staying: &[ServerId],
    picture: &'a Picture,
    now_ms: u64,
) -> Result<&'a ServerEntry, String> {
    let staying: Vec<_> = staying.iter().filter_map(|id| picture.server(*id)).collect();
    let needed = home_bytes(entry.volume.size_bytes);
    let failover = |id: ServerId| {
        let at = entry.shard.failover.iter().position(|other| *other == id);
        at.unwrap_or(usize::MAX)
    };
    let mut reasons = Vec::new();
    for usage in [&picture.usage, &without_reservations(&picture.usage)] {
        let mut best = None;
        reasons.clear();
        for server in &picture.servers {
            let id = server.server.id;
            if entry.shard.members.iter().any(|member| member.server == id) {
                continue;
            }
            match room(server, needed, usage, Some(entry), now_ms) {
                Ok(room) => {
                    let others = staying.iter().map(|other| &other.server);
                    let shared = Shared::of(&server.server, others);
                    let key = (preference(entry, id), shared, failover(id), u64::MAX - room, id);
                    if best.is_none_or(|(other, _)| key < other) {
                        best = Some((key, server));
                    }
                }
                Err(reason) => reasons.push(format!("{}: {reason}", server.server.name)),
            }
        }
        if let Some((_, server)) = best {
            return Ok(server);
        }
    }
    if reasons.is_empty() {
        Err("every server is a member".to_owned())
    } else {
        Err(reasons.join("; "))
    }
}

/// Where an operator placed `id` among the failover servers that are to come first.
pub(crate) fn preference(entry: &VolumeEntry, id: ServerId) -> usize {
    let at = entry.shard.preferred_failover.iter().position(|other| *other == id);
    at.unwrap_or(usize::MAX)
}

fn without_reservations(usage: &Usage) -> Usage {
    Usage { promised: usage.promised.clone(), reserved: BTreeMap::new() }
}

/// Servers that can take the place of a lost member of `entry`'s volume, best first, at most
/// [`FAILOVER_MAX`]: alive, not being drained, with room, without a replica of it, in other failure
/// domains than the members and each other as far as possible. Those that an operator named come
/// first; what is there and still fits stays in front of others.
pub fn failover(entry: &VolumeEntry, picture: &Picture, now_ms: u64) -> Vec<ServerId> {
    let needed = home_bytes(entry.volume.size_bytes);
    let is_member = |id| entry.shard.members.iter().any(|member| member.server == id);
    let mut candidates: Vec<_> = picture
        .servers
        .iter()
        .filter(|server| !is_member(server.server.id))
        .filter_map(|server| {
            let room = room(server, needed, &picture.usage, Some(entry), now_ms).ok()?;
            Some((room, server))
        })
        .collect();
    let staying = entry.shard.members.iter().filter(|member| member.role != Role::Leaving);
    let mut others: Vec<_> = staying.filter_map(|member| picture.server(member.server)).collect();
    let mut chosen = Vec::new();
    while chosen.len() < FAILOVER_MAX {
        let best = candidates.iter().enumerate().min_by_key(|(_, (room, server))| {
            let id = server.server.id;
            let shared = Shared::of(&server.server, others.iter().map(|other| &other.server));
            let is_new = !entry.shard.failover.contains(&id);
            (preference(entry, id), shared, is_new, u64::MAX - room, id)
        });
        let Some((at, _)) = best else { break };
        let (_, server) = candidates.swap_remove(at);
        others.push(server);
        chosen.push(server.server.id);
    }
    chosen
}

/// True if `id` can go on being a failover server of `entry`'s volume, though it may be late.
pub(crate) fn may_stay_failover(
    entry: &VolumeEntry,
    id: ServerId,
    picture: &Picture,
    now_ms: u64,
) -> bool {
    /// How long a failover server may be silent: lists are not rewritten for every restart.
    const PATIENCE_MS: u64 = 60_000;
    let Some(server) = picture.server(id) else { return false };
    let free = server.server.capacity_bytes.saturating_sub(picture.usage.bytes(id));
    let is_member = entry.shard.members.iter().any(|member| member.server == id);
    !is_member
        && server.server.draining.is_none()
        && now_ms.saturating_sub(server.last_seen_ms) <= PATIENCE_MS
        && free >= home_bytes(entry.volume.size_bytes)
}

/// What keeps the members' servers from keeping `entry`'s volume when it has `size_bytes` bytes: one text
/// for each that has no room for what is added. A server that does not run just now will have to
/// keep it nevertheless; one that has lost its pool keeps nothing of it.
pub(crate) fn short_of_room(
    entry: &VolumeEntry,
    size_bytes: u64,
    picture: &Picture,
) -> Vec<String> {
    let added = home_bytes(size_bytes).saturating_sub(home_bytes(entry.volume.size_bytes));
    let staying = entry.shard.members.iter().filter(|member| member.role != Role::Leaving);
    let short = |member: &Member| {
        let server = &picture.server(member.server)?.server;
        let free = server.capacity_bytes.saturating_sub(picture.usage.bytes(server.id));
        let room = free.saturating_sub(picture.usage.reserved_but_for(server.id, Some(entry)));
        let lacks = server.pool == member.pool && room < added;
        lacks.then(|| format!("{} has {room} bytes of room, {added} more are needed", server.name))
    };
    staying.filter_map(short).collect()
}

/// Bytes that `entry` can still promise, if they are enough.
/// Room that is kept for the volume of `replaced` counts as free.
pub(crate) fn room(
    entry: &ServerEntry,
    needed: u64,
    usage: &Usage,
    replaced: Option<&VolumeEntry>,
    now_ms: u64,
) -> Result<u64, String> {
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
    if server.draining.is_some() {
        return Err("is being drained".to_owned());
    }
    let reserved = usage.reserved_but_for(server.id, replaced);
    let free = server.capacity_bytes.saturating_sub(usage.bytes(server.id));
    let room = free.saturating_sub(reserved);
    if room < needed {
        let kept = if reserved == 0 {
            String::new()
        } else {
            format!(" ({reserved} more are kept for failover)")
        };
        return Err(format!("{room} bytes of room{kept}, {needed} needed"));
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let promised = [(ServerId::from_bytes([1; 16]), 60 * CHUNK_BYTES_MAX)].into();
        let usage = Usage { promised, reserved: BTreeMap::new() };
        assert!(place(40 * CHUNK_BYTES_MAX + 1, 1, &servers, &usage, 10).is_err());
        assert!(place(40 * CHUNK_BYTES_MAX, 1, &servers, &usage, 10).is_ok());
    }
}
