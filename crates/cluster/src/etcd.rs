//! A cluster store in etcd, for servers of several machines.
//!
//! Below a prefix: `cluster` (the id), `revision` (written with everything that is news, its
//! revision in etcd is the store's), `volumes/ID` (both records and the tombstone), `names/NAME`,
//! `servers/ID` (what was registered), `server-names/NAME`, `pools/ID`, `beats/ID` (what a server said
//! last), `statuses/ID`, `events/last` and `events/log/NUMBER`.
//!
//! Every change is one transaction, conditional on the revisions in etcd of what it was decided on,
//! and on the cluster's id: another store that took this one's place is noticed. A version is such a
//! revision. What changes a record carries a random mark, so that an attempt whose answer was lost
//! is told from another's: the next one is refused, and what is there has our mark. A backup that was
//! put back gives out its revisions once more; so a volume's versions are revision and mark, and a change
//! of a volume compares all of its value.
//!
//! All reads are linearizable: they need a quorum, as changes do.

mod board;
mod client;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::limits::VOLUMES_MAX;
use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{StoreError, StoreErrorKind};
use crate::events::Event;
use crate::records::{
    Draining, Heartbeat, ServerEntry, ServerRecord, Versions, VolumeEntry, unix_ms,
};
use crate::status::VolumeStatus;
use crate::store::{ClusterStore, Create, Swapped};
use crate::volumes::ATTEMPTS;
use client::{Client, Told};
use wire::{Pair, Reply, delete, encoded, get, has_value, list, put, unchanged};

/// The newest layout of keys and values that this program knows.
const LAYOUT: i64 = 1;
/// The longest single watch of the revision: a member that tells nothing is not relied on for longer.
const WATCH: Duration = Duration::from_secs(3);
/// The pause after a watch that failed.
const WATCH_PAUSE: Duration = Duration::from_millis(200);

type Kind<T> = Result<T, StoreErrorKind>;

/// A cluster store in etcd.
pub struct EtcdStore {
    address: String,
    /// Begins and ends in a slash.
    prefix: String,
    client: Client,
    /// The value of the key `cluster`.
    identity: String,
    cluster: ClusterId,
    /// Volumes as they were read or written last, which saves reading them once more before they are
    /// written: a lease is taken while a guest waits.
    known: Mutex<BTreeMap<VolumeId, Known>>,
}

/// A volume with its value in etcd.
#[derive(Clone)]
struct Known {
    entry: VolumeEntry,
    value: String,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    cluster: ClusterId,
    layout: i64,
}

#[derive(Serialize, Deserialize)]
struct StoredVolume {
    mark: String,
    deleted: bool,
    volume: VolumeRecord,
    shard: ShardRecord,
}

#[derive(Serialize, Deserialize)]
struct StoredServer {
    mark: String,
    server: ServerRecord,
}

/// What a server said last, put into its record as it was then.
#[derive(Serialize, Deserialize)]
struct StoredBeat {
    last_seen_ms: u64,
    server: ServerRecord,
}

/// What every value with a mark has.
#[derive(Deserialize)]
struct Marked {
    mark: String,
}

/// A change under preparation.
struct Commit<'a> {
    compare: Vec<Value>,
    write: Vec<Value>,
    /// What tells afterwards that it was made.
    witness: Witness<'a>,
}

/// What tells that a change was made by an attempt whose answer was lost.
enum Witness<'a> {
    /// The key has this mark.
    Mark(&'a str, &'a str),
    /// The key is gone.
    Gone(&'a str),
    /// It is made anew: twice is once.
    None,
}

impl EtcdStore {
    /// Opens the store below `prefix` of the etcd with these endpoints (`host:port`), or makes it if
    /// that is allowed and nothing is there.
    pub fn open(endpoints: &[String], prefix: &str, create: Create) -> Result<Self, StoreError> {
        let address = format!("etcd://{}/{prefix}", endpoints.join(","));
        let prefix = format!("/{prefix}/");
        let client = Client::new(endpoints.to_vec());
        match identify(&client, &prefix, create) {
            Ok((identity, cluster)) => {
                let known = Mutex::default();
                Ok(Self { address, prefix, client, identity, cluster, known })
            }
            Err(kind) => Err(StoreError { store: address, kind }),
        }
    }

    fn key(&self, rest: impl std::fmt::Display) -> String {
        format!("{}{rest}", self.prefix)
    }

    fn run<T>(&self, action: impl FnOnce() -> Kind<T>) -> Result<T, StoreError> {
        action().map_err(|kind| StoreError { store: self.address.clone(), kind })
    }

    /// What each of `reads` finds, all at once.
    fn read(&self, reads: Vec<Value>) -> Kind<Vec<Vec<Pair>>> {
        Ok(self.read_at(reads)?.0)
    }

    /// The same, and the revision in etcd at which it was so.
    fn read_at(&self, reads: Vec<Value>) -> Kind<(Vec<Vec<Pair>>, u64)> {
        let cluster = self.key("cluster");
        let reads: Vec<_> = std::iter::once(get(&cluster)).chain(reads).collect();
        let answer = self.client.call("/v3/kv/txn", &json!({ "success": reads }))?;
        let Reply { mut found, revision, .. } = Reply::parse(answer.body)?;
        if found.len() != reads.len() {
            let text = "etcd's answer makes no sense: it leaves reads out";
            return Err(StoreErrorKind::Unavailable(text.into()));
        }
        let same = found.remove(0).iter().any(|pair| pair.value == self.identity.as_bytes());
        if same { Ok((found, revision)) } else { Err(StoreErrorKind::Replaced) }
    }

    fn read_one(&self, key: &str) -> Kind<Option<Pair>> {
        Ok(self.read(vec![get(key)])?.remove(0).pop())
    }

    /// Makes a change if its conditions hold. The revision in etcd that what it wrote has then;
    /// `None` if they do not.
    fn commit(&self, commit: Commit<'_>) -> Kind<Option<u64>> {
        self.commit_or_read(commit, None).map(Result::ok)
    }

    /// The same, but what is at `key` instead if the conditions do not hold.
    fn commit_or_read(
        &self,
        commit: Commit<'_>,
        key: Option<&str>,
    ) -> Kind<Result<u64, Option<Pair>>> {
        let Commit { mut compare, write, witness } = commit;
        compare.push(has_value(&self.key("cluster"), &self.identity));
        let cluster = self.key("cluster");
        let refused: Vec<_> = std::iter::once(cluster.as_str()).chain(key).map(get).collect();
        let body = json!({ "compare": compare, "success": write, "failure": refused });
        let answer = self.client.call("/v3/kv/txn", &body)?;
        let mut reply = Reply::parse(answer.body)?;
        if reply.succeeded {
            return Ok(Ok(reply.revision));
        }
        let identity = reply.found.first().and_then(|found| found.first());
        if identity.is_none_or(|pair| pair.value != self.identity.as_bytes()) {
            return Err(StoreErrorKind::Replaced);
        }
        let found = reply.found.get_mut(1).and_then(Vec::pop);
        if !answer.repeated {
            return Ok(Err(found));
        }
        // An attempt before, whose answer was lost, may have come true.
        let ours = match witness {
            Witness::Mark(key, mark) => {
                let ours = |pair: &Pair| {
                    let marked = serde_json::from_slice::<Marked>(&pair.value);
                    marked.is_ok_and(|found| found.mark == mark)
                };
                self.read_one(key)?.filter(ours).map(|pair| pair.mod_revision)
            }
            Witness::Gone(key) if self.read_one(key)?.is_none() => Some(reply.revision),
            Witness::Gone(_) | Witness::None => None,
        };
        Ok(ours.ok_or(found))
    }

    /// Part of a change that is news.
    fn news(&self) -> Value {
        put(&self.key("revision"), "")
    }

    fn read_revision(&self) -> Kind<u64> {
        Ok(self.read_revision_at()?.0)
    }

    /// The revision, and etcd's own at which it was so.
    fn read_revision_at(&self) -> Kind<(u64, u64)> {
        let (mut found, at) = self.read_at(vec![get(&self.key("revision"))])?;
        let missing = || StoreErrorKind::Damaged("it has no revision".to_owned());
        Ok((found.remove(0).pop().ok_or_else(missing)?.mod_revision, at))
    }

    fn volume_key(&self, id: VolumeId) -> String {
        self.key(format_args!("volumes/{id}"))
    }

    fn read_volume(&self, id: VolumeId) -> Kind<Option<VolumeEntry>> {
        Ok(self.read_known(id)?.map(|known| known.entry))
    }

    /// Reads a volume and keeps it in mind.
    fn read_known(&self, id: VolumeId) -> Kind<Option<Known>> {
        let found = self.read_one(&self.volume_key(id))?;
        found.map(|pair| self.heard(&pair)).transpose()
    }

    /// Keeps in mind what was heard of a volume.
    fn heard(&self, pair: &Pair) -> Kind<Known> {
        let entry = self.volume_entry(pair)?;
        // It was JSON, so it is text.
        let value = String::from_utf8_lossy(&pair.value).into_owned();
        let known = Known { entry, value };
        self.note(&known);
        Ok(known)
    }

    /// As [`ClusterStore::watch_volume`].
    fn try_watch(
        &self,
        id: VolumeId,
        seen: Option<Versions>,
        wait: Duration,
    ) -> Kind<Option<VolumeEntry>> {
        let key = self.volume_key(id);
        let (mut found, at) = self.read_at(vec![get(&key)])?;
        let pair = found.remove(0).pop().ok_or(StoreErrorKind::NoVolume(id))?;
        let now = self.heard(&pair)?.entry;
        if seen != Some(now.versions) {
            return Ok(Some(now));
        }
        // From what was read on, which no compaction can have dropped long ago.
        match self.client.watch(&encoded(&key), at, wait) {
            Ok(Told::Nothing) => Ok(None),
            Ok(Told::Is(pair)) => Ok(Some(self.heard(&pair)?.entry)),
            Ok(Told::Gone) => Err(StoreErrorKind::NoVolume(id)),
            Ok(Told::Ended) => Err(StoreErrorKind::Unavailable("etcd ended the watch".into())),
            Err(text) => Err(StoreErrorKind::Unavailable(text.into())),
        }
    }

    fn volume_entry(&self, pair: &Pair) -> Kind<VolumeEntry> {
        let stored: StoredVolume = decode(pair)?;
        let (volume, shard) = (stored.volume, stored.shard);
        let named = pair.key == self.key(format_args!("volumes/{}", volume.id))
            && shard.volume == volume.id
            && shard.shard.0 == 0;
        if !named {
            return Err(StoreErrorKind::Damaged(format!("{} names another", pair.key)));
        }
        let versions = versions(pair.mod_revision, &stored.mark);
        Ok(VolumeEntry { volume, shard, deleted: stored.deleted, versions })
    }

    /// A server and when it was last heard of, from what was registered and what it said.
    fn server_entry(&self, pair: &Pair, beat: Option<&Pair>) -> Kind<ServerEntry> {
        let registered = decode::<StoredServer>(pair)?.server;
        if pair.key != self.key(format_args!("servers/{}", registered.id)) {
            return Err(StoreErrorKind::Damaged(format!("{} names another", pair.key)));
        }
        let beat: Option<StoredBeat> = beat.map(decode).transpose()?;
        let (server, last_seen_ms) = match beat {
            Some(beat) if beat.server.pool == registered.pool => {
                let ServerRecord { id, name, pool, draining, .. } = registered;
                (ServerRecord { id, name, pool, draining, ..beat.server }, beat.last_seen_ms)
            }
            Some(_) | None => (registered, 0),
        };
        Ok(ServerEntry { server, last_seen_ms, version: pair.mod_revision })
    }

    fn read_server(&self, id: ServerId) -> Kind<Option<ServerEntry>> {
        let keys = ["servers", "beats"].map(|part| self.key(format_args!("{part}/{id}")));
        let mut found = self.read(keys.iter().map(|key| get(key)).collect())?;
        let (beat, server) = (found.remove(1).pop(), found.remove(0).pop());
        server.map(|pair| self.server_entry(&pair, beat.as_ref())).transpose()
    }

    /// The keys that make a server's name and pool its own.
    fn claims(&self, server: &ServerRecord) -> [String; 2] {
        [
            self.key(format_args!("server-names/{}", server.name)),
            self.key(format_args!("pools/{}", server.pool)),
        ]
    }

    fn try_heartbeat(&self, beat: &Heartbeat) -> Kind<Option<u64>> {
        let id = beat.server;
        let current = self
            .read_server(id)?
            .filter(|entry| entry.server.pool == beat.pool)
            .ok_or(StoreErrorKind::NotRegistered { server: id, pool: beat.pool })?;
        let next = beat.applied_to(&current.server);
        let only_room =
            ServerRecord { free_bytes: next.free_bytes, ..current.server.clone() } == next;
        let stored = StoredBeat { last_seen_ms: unix_ms(), server: next };
        let mut write = vec![put(&self.key(format_args!("beats/{id}")), &encode(&stored))];
        if !only_room {
            write.push(self.news());
        }
        let server = self.key(format_args!("servers/{id}"));
        let compare = vec![unchanged(&server, current.version)];
        self.commit(Commit { compare, write, witness: Witness::None })
    }

    fn try_remove_server(&self, id: ServerId) -> Kind<Option<u64>> {
        let Some(entry) = self.read_server(id)? else { return Ok(Some(0)) };
        let key = self.key(format_args!("servers/{id}"));
        let compare = vec![unchanged(&key, entry.version)];
        let mut write = vec![delete(&key), delete(&self.key(format_args!("beats/{id}")))];
        write.extend(self.claims(&entry.server).iter().map(|key| delete(key)));
        write.push(self.news());
        self.commit(Commit { compare, write, witness: Witness::None })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Known>> {
        // Whoever panicked had inserted or not.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, new: &Known) {
        let mut known = self.known();
        if known.len() >= VOLUMES_MAX {
            known.clear();
        }
        known.insert(new.entry.volume.id, new.clone());
    }

    fn replace_volume(
        &self,
        entry: &VolumeEntry,
        revision: Option<u64>,
    ) -> Result<Swapped, StoreError> {
        assert_eq!(entry.volume.id, entry.shard.volume, "the shard is the volume's");
        let id = entry.volume.id;
        self.run(|| {
            // Of the same version, so the same; and if it is not the newest one nothing is written.
            let known = self.known().remove(&id);
            let current = match known.filter(|known| known.entry.versions == entry.versions) {
                Some(known) => known,
                None => self.read_known(id)?.ok_or(StoreErrorKind::NoVolume(id))?,
            };
            let was = &current.entry;
            let going_back =
                entry.volume.epoch < was.volume.epoch || (was.deleted && !entry.deleted);
            if was.versions != entry.versions || going_back {
                return Ok(Swapped::Refused(Box::new(current.entry)));
            }
            let now = match self.write_volume(entry, &current, revision)? {
                Ok(versions) => return Ok(Swapped::Written(versions)),
                Err(now) => now.ok_or(StoreErrorKind::NoVolume(id))?,
            };
            let now = self.heard(&now)?.entry;
            let elsewhere = match revision {
                Some(revision) => self.read_revision()? != revision,
                None => false,
            };
            if now.versions == was.versions && !elsewhere {
                return Err(StoreErrorKind::VolumeNameTaken(entry.volume.name.clone()));
            }
            Ok(Swapped::Refused(Box::new(now)))
        })
    }

    /// The new versions, or what is there instead of `current`.
    fn write_volume(
        &self,
        entry: &VolumeEntry,
        current: &Known,
        revision: Option<u64>,
    ) -> Kind<Result<Versions, Option<Pair>>> {
        let Known { entry: current, value: was } = current;
        let mark = new_mark();
        let key = self.volume_key(entry.volume.id);
        let name = |entry: &VolumeEntry| self.key(format_args!("names/{}", entry.volume.name));
        let mut compare = vec![unchanged(&key, current.versions.volume), has_value(&key, was)];
        compare.extend(revision.map(|revision| unchanged(&self.key("revision"), revision)));
        let value = encode(&stored_volume(entry, &mark));
        let mut write = vec![put(&key, &value)];
        let renamed = entry.volume.name != current.volume.name;
        if !current.deleted && (renamed || entry.deleted) {
            write.push(delete(&name(current)));
        }
        if !entry.deleted && renamed {
            compare.push(unchanged(&name(entry), 0));
            write.push(put(&name(entry), &entry.volume.id.to_string()));
        }
        write.push(self.news());
        let commit = Commit { compare, write, witness: Witness::Mark(&key, &mark) };
        let written = self.commit_or_read(commit, Some(&key))?;
        Ok(written.map(|at| {
            let versions = versions(at, &mark);
            self.note(&Known { entry: VolumeEntry { versions, ..entry.clone() }, value });
            versions
        }))
    }
}

impl ClusterStore for EtcdStore {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn cluster_id(&self) -> Result<ClusterId, StoreError> {
        Ok(self.cluster)
    }

    fn revision(&self) -> Result<u64, StoreError> {
        self.run(|| self.read_revision())
    }

    fn wait_for_change(&self, seen: u64, wait: Duration) -> Result<u64, StoreError> {
        let start = Instant::now();
        let key = encoded(self.key("revision"));
        loop {
            // From what was read on: what is older than that may have been compacted, and is no news.
            let (revision, at) = self.run(|| self.read_revision_at())?;
            let left = wait.saturating_sub(start.elapsed());
            if revision != seen || left.is_zero() {
                return Ok(revision);
            }
            match self.client.watch(&key, at, WATCH.min(left)) {
                Ok(Told::Nothing | Told::Is(_) | Told::Gone) => {}
                Ok(Told::Ended) | Err(_) => std::thread::sleep(WATCH_PAUSE.min(left)),
            }
        }
    }

    fn volumes(&self) -> Result<Vec<VolumeEntry>, StoreError> {
        self.run(|| {
            let found = self.read(vec![list(&self.key("volumes/"))])?.remove(0);
            let mut volumes =
                found.iter().map(|pair| self.volume_entry(pair)).collect::<Kind<Vec<_>>>()?;
            volumes.sort_by(|one, two| {
                (&one.volume.name, one.volume.id).cmp(&(&two.volume.name, two.volume.id))
            });
            Ok(volumes)
        })
    }

    fn volume(&self, id: VolumeId) -> Result<Option<VolumeEntry>, StoreError> {
        self.run(|| self.read_volume(id))
    }

    fn watch_volume(
        &self,
        id: VolumeId,
        seen: Option<Versions>,
        wait: Duration,
    ) -> Result<Option<VolumeEntry>, StoreError> {
        self.run(|| self.try_watch(id, seen, wait))
    }

    fn volume_named(&self, name: &str) -> Result<Option<VolumeEntry>, StoreError> {
        self.run(|| {
            let Some(pair) = self.read_one(&self.key(format_args!("names/{name}")))? else {
                return Ok(None);
            };
            let damaged = || StoreErrorKind::Damaged(format!("{} names no volume", pair.key));
            let text = String::from_utf8_lossy(&pair.value);
            let found = self.read_volume(text.parse().map_err(|_| damaged())?)?;
            // It may have been renamed or deleted in between.
            Ok(found.filter(|entry| !entry.deleted && entry.volume.name == name))
        })
    }

    fn insert_volume(
        &self,
        volume: &VolumeRecord,
        shard: &ShardRecord,
        revision: u64,
    ) -> Result<VolumeEntry, StoreError> {
        assert_eq!(volume.id, shard.volume, "the shard is the volume's");
        assert_eq!(shard.shard.0, 0, "a volume is one shard");
        self.run(|| {
            let mark = new_mark();
            let key = self.volume_key(volume.id);
            let name = self.key(format_args!("names/{}", volume.name));
            let entry = |at| VolumeEntry {
                volume: volume.clone(),
                shard: shard.clone(),
                deleted: false,
                versions: versions(at, &mark),
            };
            let compare = vec![
                unchanged(&self.key("revision"), revision),
                unchanged(&key, 0),
                unchanged(&name, 0),
            ];
            let write = vec![
                put(&key, &encode(&stored_volume(&entry(0), &mark))),
                put(&name, &volume.id.to_string()),
                self.news(),
            ];
            let done =
                self.commit(Commit { compare, write, witness: Witness::Mark(&key, &mark) })?;
            match done {
                Some(at) => Ok(entry(at)),
                None if self.read_revision()? != revision => Err(StoreErrorKind::Conflict),
                None => Err(StoreErrorKind::VolumeNameTaken(volume.name.clone())),
            }
        })
    }

    fn swap_volume(&self, entry: &VolumeEntry) -> Result<Swapped, StoreError> {
        self.replace_volume(entry, None)
    }

    fn update_volume_at(&self, entry: &VolumeEntry, revision: u64) -> Result<Versions, StoreError> {
        let swapped = self.replace_volume(entry, Some(revision))?.or_conflict();
        self.run(|| swapped)
    }

    fn purge_volume(&self, id: VolumeId, versions: Versions) -> Result<(), StoreError> {
        self.run(|| {
            let current = self.read_volume(id)?.ok_or(StoreErrorKind::NoVolume(id))?;
            let empty = current.deleted && current.shard.members.is_empty();
            if current.versions != versions || !empty {
                return Err(StoreErrorKind::Conflict);
            }
            let key = self.volume_key(id);
            let compare = vec![unchanged(&key, versions.volume)];
            let status = self.key(format_args!("statuses/{id}"));
            let write = vec![delete(&key), delete(&status), self.news()];
            match self.commit(Commit { compare, write, witness: Witness::Gone(&key) })? {
                Some(_) => Ok(()),
                None if self.read_volume(id)?.is_none() => Err(StoreErrorKind::NoVolume(id)),
                None => Err(StoreErrorKind::Conflict),
            }
        })
    }

    fn servers(&self) -> Result<Vec<ServerEntry>, StoreError> {
        self.run(|| {
            let prefixes = ["servers/", "beats/"].map(|part| self.key(part));
            let mut found = self.read(prefixes.iter().map(|prefix| list(prefix)).collect())?;
            let (beats, servers) = (found.remove(1), found.remove(0));
            let id = |pair: &Pair, prefix: &str| {
                pair.key.strip_prefix(prefix).unwrap_or_default().to_owned()
            };
            let entry = |pair: &Pair| {
                let own = id(pair, &prefixes[0]);
                let beat = beats.iter().find(|beat| id(beat, &prefixes[1]) == own);
                self.server_entry(pair, beat)
            };
            let mut servers = servers.iter().map(entry).collect::<Kind<Vec<_>>>()?;
            servers.sort_by(|one, two| one.server.name.cmp(&two.server.name));
            Ok(servers)
        })
    }

    fn insert_server(&self, server: &ServerRecord) -> Result<(), StoreError> {
        self.run(|| {
            let mark = new_mark();
            let key = self.key(format_args!("servers/{}", server.id));
            let claims = self.claims(server);
            let mut compare = vec![unchanged(&key, 0)];
            compare.extend(claims.iter().map(|key| unchanged(key, 0)));
            let stored = StoredServer { mark, server: server.clone() };
            let mut write = vec![put(&key, &encode(&stored)), self.news()];
            write.extend(claims.iter().map(|key| put(key, &server.id.to_string())));
            let witness = Witness::Mark(&key, &stored.mark);
            match self.commit(Commit { compare, write, witness })? {
                Some(_) => Ok(()),
                None => Err(StoreErrorKind::ServerTaken(server.name.clone())),
            }
        })
    }

    fn update_server(&self, server: &ServerRecord, version: u64) -> Result<(), StoreError> {
        self.run(|| {
            let current = self.read_server(server.id)?;
            let current = current.filter(|entry| entry.version == version);
            let current = current.ok_or(StoreErrorKind::Conflict)?;
            let mark = new_mark();
            let key = self.key(format_args!("servers/{}", server.id));
            let (old, new) = (self.claims(&current.server), self.claims(server));
            let mut compare = vec![unchanged(&key, version)];
            let stored = StoredServer { mark, server: server.clone() };
            let beat = self.key(format_args!("beats/{}", server.id));
            let mut write = vec![put(&key, &encode(&stored)), delete(&beat), self.news()];
            for (old, new) in old.iter().zip(&new).filter(|(old, new)| old != new) {
                compare.push(unchanged(new, 0));
                write.push(delete(old));
                write.push(put(new, &server.id.to_string()));
            }
            let witness = Witness::Mark(&key, &stored.mark);
            if self.commit(Commit { compare, write, witness })?.is_some() {
                return Ok(());
            }
            let now = self.read_server(server.id)?;
            let same = now.is_some_and(|entry| entry.version == version);
            let taken = || StoreErrorKind::ServerTaken(server.name.clone());
            Err(if same { taken() } else { StoreErrorKind::Conflict })
        })
    }

    fn set_draining(
        &self,
        id: ServerId,
        draining: Option<Draining>,
        revision: u64,
    ) -> Result<(), StoreError> {
        self.run(|| {
            let news = self.key("revision");
            let key = self.key(format_args!("servers/{id}"));
            let mut found = self.read(vec![get(&key), get(&news)])?;
            let (now, pair) = (found.remove(1).pop(), found.remove(0).pop());
            if now.is_none_or(|pair| pair.mod_revision != revision) {
                return Err(StoreErrorKind::Conflict);
            }
            let pair = pair.ok_or(StoreErrorKind::NoServer(id))?;
            let server = ServerRecord { draining, ..decode::<StoredServer>(&pair)?.server };
            let stored = StoredServer { mark: new_mark(), server };
            let compare = vec![unchanged(&news, revision), unchanged(&key, pair.mod_revision)];
            let write = vec![put(&key, &encode(&stored)), self.news()];
            let witness = Witness::Mark(&key, &stored.mark);
            match self.commit(Commit { compare, write, witness })? {
                Some(_) => Ok(()),
                None => Err(StoreErrorKind::Conflict),
            }
        })
    }

    fn heartbeat(&self, beat: &Heartbeat) -> Result<(), StoreError> {
        self.run(|| until_done(|| self.try_heartbeat(beat)))
    }

    fn remove_server(&self, id: ServerId) -> Result<(), StoreError> {
        self.run(|| until_done(|| self.try_remove_server(id)))
    }

    fn put_statuses(&self, statuses: &[VolumeStatus]) -> Result<(), StoreError> {
        self.run(|| self.write_statuses(statuses))
    }

    fn statuses(&self) -> Result<Vec<VolumeStatus>, StoreError> {
        self.run(|| self.read_statuses())
    }

    fn append_event(&self, event: &Event) -> Result<u64, StoreError> {
        self.run(|| self.write_event(event))
    }

    fn events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        self.run(|| self.read_events(after, limit))
    }

    fn last_event(&self) -> Result<u64, StoreError> {
        self.run(|| Ok(self.read_last_event()?.0))
    }
}

/// Repeats a change that is decided anew each time, until nobody else was faster.
fn until_done(attempt: impl Fn() -> Kind<Option<u64>>) -> Kind<()> {
    for _ in 0..ATTEMPTS {
        if attempt()?.is_some() {
            return Ok(());
        }
    }
    Err(StoreErrorKind::Conflict)
}

/// Reads whose store this is, or makes it.
fn identify(client: &Client, prefix: &str, create: Create) -> Kind<(String, ClusterId)> {
    let key = format!("{prefix}cluster");
    loop {
        let reads = json!({ "success": [get(&key), wire::range(prefix, prefix, 1)] });
        let reply = Reply::parse(client.call("/v3/kv/txn", &reads)?.body)?;
        if let Some(pair) = reply.found.first().and_then(|found| found.first()) {
            let identity: Identity = decode(pair)?;
            if identity.layout > LAYOUT {
                let (found, supported) = (identity.layout, LAYOUT);
                return Err(StoreErrorKind::Newer { found, supported });
            }
            let text = String::from_utf8_lossy(&pair.value).into_owned();
            return Ok((text, identity.cluster));
        }
        if reply.found.get(1).is_some_and(|found| !found.is_empty()) {
            let text = format!("{prefix} has keys in etcd, but {key} is not there");
            return Err(StoreErrorKind::Foreign(text));
        }
        match create {
            Create::Never => return Err(StoreErrorKind::Missing),
            Create::IfMissing => {}
        }
        let cluster = ClusterId::from_bytes(crate::new_id());
        let identity = encode(&Identity { cluster, layout: LAYOUT });
        let body = json!({
            "compare": [unchanged(&key, 0)],
            "success": [put(&key, &identity), put(&format!("{prefix}revision"), "")],
        });
        // Whoever made it: the next look finds it.
        client.call("/v3/kv/txn", &body)?;
    }
}

fn stored_volume(entry: &VolumeEntry, mark: &str) -> StoredVolume {
    StoredVolume {
        mark: mark.to_owned(),
        deleted: entry.deleted,
        volume: entry.volume.clone(),
        shard: entry.shard.clone(),
    }
}

/// The versions of a volume that was written at this revision in etcd, with this mark.
fn versions(mod_revision: u64, mark: &str) -> Versions {
    let mut shard = [0; 8];
    shard.copy_from_slice(&crate::named_id(mark.as_bytes())[..8]);
    Versions { volume: mod_revision, shard: u64::from_le_bytes(shard) }
}

fn new_mark() -> String {
    encoded(crate::new_id())
}

fn encode<T: Serialize>(record: &T) -> String {
    serde_json::to_string(record).expect("records are plain data with text keys")
}

fn decode<T: DeserializeOwned>(pair: &Pair) -> Kind<T> {
    serde_json::from_slice(&pair.value)
        .map_err(|error| StoreErrorKind::Damaged(format!("{} in etcd: {error}", pair.key)))
}
