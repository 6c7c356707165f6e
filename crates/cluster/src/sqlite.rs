//! A cluster store in a SQLite file, for servers of one machine; several processes share it.
//!
//! Write-ahead logging with `synchronous = FULL`: a change that was answered outlives a power
//! cut, so an epoch that was handed out is not handed out again. Records are JSON in rows that
//! carry their version. The file is told from others by its application id and schema version.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use rusqlite::{Connection, ErrorCode, Row, Transaction, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{StoreError, StoreErrorKind};
use crate::events::Event;
use crate::records::{
    Draining, Heartbeat, ServerEntry, ServerRecord, Versions, VolumeEntry, unix_ms,
};
use crate::status::VolumeStatus;
use crate::store::{ClusterStore, Create, Swapped};

mod board;
mod schema;

pub use schema::SCHEMA_VERSION;

/// How often a waiting process looks at the revision.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

const SELECT_VOLUME: &str = "
    SELECT v.id, v.name, v.deleted, v.version, v.record, s.version, s.record
    FROM volumes v LEFT JOIN shards s ON s.volume = v.id AND s.shard = 0";

/// A cluster store in a SQLite file.
pub struct SqliteStore {
    path: PathBuf,
    cluster: ClusterId,
    /// Device and inode of the file that the connection has open.
    identity: (u64, u64),
    connection: Mutex<Connection>,
    /// For what need not outlive a power cut: its commits do not wait for the disk.
    board: Mutex<Connection>,
}

type Kind<T> = Result<T, StoreErrorKind>;

impl SqliteStore {
    /// Opens the store at `path`, or makes it if that is allowed and nothing is there.
    pub fn open(path: &Path, create: Create) -> Result<Self, StoreError> {
        let opened = schema::open_file(path, create).and_then(|connection| {
            Ok(Self {
                path: path.to_owned(),
                cluster: schema::read_cluster_id(&connection)?,
                identity: schema::file_identity(path)?,
                connection: Mutex::new(connection),
                board: Mutex::new(schema::connect(path, schema::Durable::No)?),
            })
        });
        opened.map_err(|kind| StoreError { store: address_of(path), kind })
    }

    fn run<T>(&self, action: impl FnOnce(&mut Connection) -> Kind<T>) -> Result<T, StoreError> {
        self.run_on(&self.connection, action)
    }

    fn run_on<T>(
        &self,
        connection: &Mutex<Connection>,
        action: impl FnOnce(&mut Connection) -> Kind<T>,
    ) -> Result<T, StoreError> {
        // A poisoned lock means that a caller panicked; its transaction was rolled back.
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_file()
            .and_then(|()| action(&mut connection))
            .map_err(|kind| StoreError { store: address_of(&self.path), kind })
    }

    /// Runs `action` in a transaction that holds the write lock from its start.
    fn write<T>(&self, action: impl FnOnce(&Transaction<'_>) -> Kind<T>) -> Result<T, StoreError> {
        self.run(|connection| transact(connection, action))
    }

    /// The same for what need not be durable.
    fn note<T>(&self, action: impl FnOnce(&Transaction<'_>) -> Kind<T>) -> Result<T, StoreError> {
        self.run_on(&self.board, |connection| transact(connection, action))
    }

    /// Replaces a volume's records; `revision`: only if it is still this one.
    fn replace_volume(
        &self,
        entry: &VolumeEntry,
        revision: Option<u64>,
    ) -> Result<Swapped, StoreError> {
        assert_eq!(entry.volume.id, entry.shard.volume, "the shard is the volume's");
        let id = entry.volume.id;
        self.write(|transaction| {
            let current = read_volume(transaction, id)?.ok_or(StoreErrorKind::NoVolume(id))?;
            let going_back =
                entry.volume.epoch < current.volume.epoch || (current.deleted && !entry.deleted);
            let elsewhere = match revision {
                Some(revision) => read_revision(transaction)? != revision,
                None => false,
            };
            if current.versions != entry.versions || going_back || elsewhere {
                return Ok(Swapped::Refused(Box::new(current)));
            }
            let next =
                Versions { volume: entry.versions.volume + 1, shard: entry.versions.shard + 1 };
            transaction
                .execute(
                    "UPDATE volumes SET name = ?2, deleted = ?3, version = ?4, record = ?5
                     WHERE id = ?1",
                    params![
                        id.to_string(),
                        entry.volume.name,
                        entry.deleted,
                        next.volume.cast_signed(),
                        encode(&entry.volume),
                    ],
                )
                .map_err(|error| {
                    or_taken(error, || StoreErrorKind::VolumeNameTaken(entry.volume.name.clone()))
                })?;
            transaction.execute(
                "UPDATE shards SET version = ?2, record = ?3 WHERE volume = ?1 AND shard = 0",
                params![id.to_string(), next.shard.cast_signed(), encode(&entry.shard)],
            )?;
            bump_revision(transaction)?;
            Ok(Swapped::Written(next))
        })
    }

    /// Notices that the file was removed or replaced: the connection would go on writing to a
    /// file that nobody else sees. It is not opened again here: the write-ahead log beside it
    /// may still belong to the former file.
    fn check_file(&self) -> Kind<()> {
        if schema::file_identity(&self.path)? == self.identity {
            Ok(())
        } else {
            Err(StoreErrorKind::Replaced)
        }
    }
}

impl ClusterStore for SqliteStore {
    fn address(&self) -> String {
        address_of(&self.path)
    }

    fn cluster_id(&self) -> Result<ClusterId, StoreError> {
        Ok(self.cluster)
    }

    fn revision(&self) -> Result<u64, StoreError> {
        self.run(|connection| read_revision(connection))
    }

    fn wait_for_change(&self, seen: u64, wait: Duration) -> Result<u64, StoreError> {
        let start = Instant::now();
        loop {
            let revision = self.revision()?;
            let left = wait.saturating_sub(start.elapsed());
            if revision != seen || left.is_zero() {
                return Ok(revision);
            }
            std::thread::sleep(POLL_INTERVAL.min(left));
        }
    }

    fn volumes(&self) -> Result<Vec<VolumeEntry>, StoreError> {
        self.run(|connection| {
            let mut query =
                connection.prepare_cached(&format!("{SELECT_VOLUME} ORDER BY v.name, v.id"))?;
            let mut rows = query.query([])?;
            let mut volumes = Vec::new();
            while let Some(row) = rows.next()? {
                volumes.push(volume_entry(row)?);
            }
            Ok(volumes)
        })
    }

    fn volume(&self, id: VolumeId) -> Result<Option<VolumeEntry>, StoreError> {
        self.run(|connection| read_volume(connection, id))
    }

    fn watch_volume(
        &self,
        id: VolumeId,
        seen: Option<Versions>,
        wait: Duration,
    ) -> Result<Option<VolumeEntry>, StoreError> {
        let start = Instant::now();
        loop {
            let entry = self.run(|connection| {
                read_volume(connection, id)?.ok_or(StoreErrorKind::NoVolume(id))
            })?;
            if seen != Some(entry.versions) {
                return Ok(Some(entry));
            }
            let left = wait.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            std::thread::sleep(POLL_INTERVAL.min(left));
        }
    }

    fn volume_named(&self, name: &str) -> Result<Option<VolumeEntry>, StoreError> {
        self.run(|connection| {
            let mut query = connection
                .prepare_cached(&format!("{SELECT_VOLUME} WHERE v.name = ?1 AND v.deleted = 0"))?;
            let mut rows = query.query([name])?;
            rows.next()?.map(volume_entry).transpose()
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
        self.write(|transaction| {
            if read_revision(transaction)? != revision {
                return Err(StoreErrorKind::Conflict);
            }
            transaction
                .execute(
                    "INSERT INTO volumes (id, name, deleted, version, record)
                     VALUES (?1, ?2, 0, 1, ?3)",
                    params![volume.id.to_string(), volume.name, encode(volume)],
                )
                .map_err(|error| {
                    or_taken(error, || StoreErrorKind::VolumeNameTaken(volume.name.clone()))
                })?;
            transaction.execute(
                "INSERT INTO shards (volume, shard, version, record) VALUES (?1, 0, 1, ?2)",
                params![volume.id.to_string(), encode(shard)],
            )?;
            bump_revision(transaction)?;
            Ok(VolumeEntry {
                volume: volume.clone(),
                shard: shard.clone(),
                deleted: false,
                versions: Versions { volume: 1, shard: 1 },
            })
        })
    }

    fn swap_volume(&self, entry: &VolumeEntry) -> Result<Swapped, StoreError> {
        self.replace_volume(entry, None)
    }

    fn update_volume_at(&self, entry: &VolumeEntry, revision: u64) -> Result<Versions, StoreError> {
        let swapped = self.replace_volume(entry, Some(revision))?.or_conflict();
        self.run(|_| swapped)
    }

    fn purge_volume(&self, id: VolumeId, versions: Versions) -> Result<(), StoreError> {
        self.write(|transaction| {
            let current = read_volume(transaction, id)?.ok_or(StoreErrorKind::NoVolume(id))?;
            let empty = current.deleted && current.shard.members.is_empty();
            if current.versions != versions || !empty {
                return Err(StoreErrorKind::Conflict);
            }
            transaction.execute("DELETE FROM shards WHERE volume = ?1", [id.to_string()])?;
            transaction.execute("DELETE FROM volumes WHERE id = ?1", [id.to_string()])?;
            bump_revision(transaction)
        })
    }

    fn servers(&self) -> Result<Vec<ServerEntry>, StoreError> {
        self.run(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT id, record, last_seen_ms, version FROM servers ORDER BY name",
            )?;
            let mut rows = query.query([])?;
            let mut servers = Vec::new();
            while let Some(row) = rows.next()? {
                servers.push(server_entry(row)?);
            }
            Ok(servers)
        })
    }

    fn insert_server(&self, server: &ServerRecord) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction
                .execute(
                    "INSERT INTO servers (id, name, pool, version, last_seen_ms, record)
                     VALUES (?1, ?2, ?3, 1, 0, ?4)",
                    params![
                        server.id.to_string(),
                        server.name,
                        server.pool.to_string(),
                        encode(server)
                    ],
                )
                .map_err(|error| {
                    or_taken(error, || StoreErrorKind::ServerTaken(server.name.clone()))
                })?;
            bump_revision(transaction)
        })
    }

    fn update_server(&self, server: &ServerRecord, version: u64) -> Result<(), StoreError> {
        self.write(|transaction| {
            let changed = transaction
                .execute(
                    "UPDATE servers SET name = ?3, pool = ?4, record = ?5, last_seen_ms = 0,
                            version = version + 1
                     WHERE id = ?1 AND version = ?2",
                    params![
                        server.id.to_string(),
                        version.cast_signed(),
                        server.name,
                        server.pool.to_string(),
                        encode(server)
                    ],
                )
                .map_err(|error| {
                    or_taken(error, || StoreErrorKind::ServerTaken(server.name.clone()))
                })?;
            if changed == 0 {
                return Err(StoreErrorKind::Conflict);
            }
            bump_revision(transaction)
        })
    }

    fn set_draining(
        &self,
        id: ServerId,
        draining: Option<Draining>,
        revision: u64,
    ) -> Result<(), StoreError> {
        self.write(|transaction| {
            if read_revision(transaction)? != revision {
                return Err(StoreErrorKind::Conflict);
            }
            let entry = read_server(transaction, id)?.ok_or(StoreErrorKind::NoServer(id))?;
            let next = ServerRecord { draining, ..entry.server };
            transaction.execute(
                "UPDATE servers SET record = ?2, version = version + 1 WHERE id = ?1",
                params![id.to_string(), encode(&next)],
            )?;
            bump_revision(transaction)
        })
    }

    fn heartbeat(&self, beat: &Heartbeat) -> Result<(), StoreError> {
        self.write(|transaction| {
            let current = read_server(transaction, beat.server)?
                .filter(|entry| entry.server.pool == beat.pool)
                .ok_or(StoreErrorKind::NotRegistered { server: beat.server, pool: beat.pool })?;
            let next = beat.applied_to(&current.server);
            transaction.execute(
                "UPDATE servers SET last_seen_ms = ?2, record = ?3 WHERE id = ?1",
                params![beat.server.to_string(), unix_ms().cast_signed(), encode(&next)],
            )?;
            let only_room = ServerRecord { free_bytes: next.free_bytes, ..current.server } == next;
            if only_room { Ok(()) } else { bump_revision(transaction) }
        })
    }

    fn remove_server(&self, id: ServerId) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.execute("DELETE FROM servers WHERE id = ?1", [id.to_string()])?;
            bump_revision(transaction)
        })
    }

    fn put_statuses(&self, statuses: &[VolumeStatus]) -> Result<(), StoreError> {
        if statuses.is_empty() {
            return Ok(());
        }
        self.note(|transaction| board::put_statuses(transaction, statuses))
    }

    fn statuses(&self) -> Result<Vec<VolumeStatus>, StoreError> {
        self.run_on(&self.board, |connection| board::statuses(connection))
    }

    fn append_event(&self, event: &Event) -> Result<u64, StoreError> {
        self.note(|transaction| board::append_event(transaction, event))
    }

    fn events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        self.run_on(&self.board, |connection| board::events(connection, after, limit))
    }

    fn last_event(&self) -> Result<u64, StoreError> {
        self.run_on(&self.board, |connection| board::last_event(connection))
    }
}

/// Runs `action` in a transaction that holds the write lock from its start.
fn transact<T>(
    connection: &mut Connection,
    action: impl FnOnce(&Transaction<'_>) -> Kind<T>,
) -> Kind<T> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let result = action(&transaction)?;
    transaction.commit()?;
    Ok(result)
}

fn address_of(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

fn read_revision(connection: &Connection) -> Kind<u64> {
    let mut query = connection.prepare_cached("SELECT revision FROM cluster")?;
    Ok(query.query_row([], |row| row.get::<_, i64>(0))?.cast_unsigned())
}

fn bump_revision(transaction: &Transaction<'_>) -> Kind<()> {
    transaction.execute("UPDATE cluster SET revision = revision + 1", [])?;
    Ok(())
}

fn read_volume(connection: &Connection, id: VolumeId) -> Kind<Option<VolumeEntry>> {
    let mut query = connection.prepare_cached(&format!("{SELECT_VOLUME} WHERE v.id = ?1"))?;
    let mut rows = query.query([id.to_string()])?;
    rows.next()?.map(volume_entry).transpose()
}

fn volume_entry(row: &Row<'_>) -> Kind<VolumeEntry> {
    let (id, name): (String, String) = (row.get(0)?, row.get(1)?);
    let what = format!("volume {id}");
    let shard_version: Option<i64> = row.get(5)?;
    let shard_record: Option<String> = row.get(6)?;
    let (Some(shard_version), Some(shard_record)) = (shard_version, shard_record) else {
        return Err(StoreErrorKind::Damaged(format!("{what} has no shard record")));
    };
    let entry = VolumeEntry {
        volume: decode::<VolumeRecord>(&row.get::<_, String>(4)?, &what)?,
        shard: decode::<ShardRecord>(&shard_record, &what)?,
        deleted: row.get(2)?,
        versions: Versions {
            volume: row.get::<_, i64>(3)?.cast_unsigned(),
            shard: shard_version.cast_unsigned(),
        },
    };
    let named = entry.volume.id.to_string() == id
        && entry.volume.name == name
        && entry.shard.volume == entry.volume.id
        && entry.shard.shard.0 == 0;
    if named { Ok(entry) } else { Err(StoreErrorKind::Damaged(format!("{what} names another"))) }
}

fn read_server(connection: &Connection, id: ServerId) -> Kind<Option<ServerEntry>> {
    let mut query = connection
        .prepare_cached("SELECT id, record, last_seen_ms, version FROM servers WHERE id = ?1")?;
    let mut rows = query.query([id.to_string()])?;
    rows.next()?.map(server_entry).transpose()
}

fn server_entry(row: &Row<'_>) -> Kind<ServerEntry> {
    let id: String = row.get(0)?;
    let what = format!("server {id}");
    let server: ServerRecord = decode(&row.get::<_, String>(1)?, &what)?;
    if server.id.to_string() != id {
        return Err(StoreErrorKind::Damaged(format!("{what} names another")));
    }
    Ok(ServerEntry {
        server,
        last_seen_ms: row.get::<_, i64>(2)?.cast_unsigned(),
        version: row.get::<_, i64>(3)?.cast_unsigned(),
    })
}

fn encode<T: Serialize>(record: &T) -> String {
    serde_json::to_string(record).expect("records are plain data with text keys")
}

fn decode<T: DeserializeOwned>(text: &str, what: &str) -> Kind<T> {
    serde_json::from_str(text)
        .map_err(|error| StoreErrorKind::Damaged(format!("the record of {what}: {error}")))
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// `taken` for a broken uniqueness constraint, else what `error` is.
fn or_taken(error: rusqlite::Error, taken: impl FnOnce() -> StoreErrorKind) -> StoreErrorKind {
    if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) {
        taken()
    } else {
        error.into()
    }
}

impl From<rusqlite::Error> for StoreErrorKind {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::Foreign("not a SQLite database".to_owned()),
            Some(ErrorCode::DatabaseCorrupt) => Self::Damaged(error.to_string()),
            _ => Self::Unavailable(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::conformance;

    fn temporary() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.db");
        (directory, path)
    }

    fn open_error(path: &Path, create: Create) -> String {
        SqliteStore::open(path, create).err().expect("opening fails").to_string()
    }

    #[test]
    fn conforms() {
        conformance::run(|| {
            let (directory, path) = temporary();
            let one = SqliteStore::open(&path, Create::IfMissing).unwrap();
            let two = SqliteStore::open(&path, Create::Never).unwrap();
            (Box::new(one), Box::new(two), Box::new(directory))
        });
    }

    #[test]
    fn a_missing_store_is_not_made_by_surprise() {
        let (_directory, path) = temporary();
        assert!(open_error(&path, Create::Never).contains("no such store"));
        assert!(!path.exists());
    }

    #[test]
    fn a_store_of_the_first_schema_is_brought_up_to_date() {
        let (_directory, path) = temporary();
        schema::make_first(&path);
        let store = SqliteStore::open(&path, Create::Never).unwrap();
        let found = store.volumes().unwrap();
        assert_eq!((found.len(), found[0].volume.name.as_str()), (1, "old"));
        assert_eq!(store.servers().unwrap()[0].server.draining, None);
        assert_eq!(store.last_event().unwrap(), 0);
        conformance::tells_and_remembers(&store, &found[0]);
        // Twice is once, and the first schema's programs find all that they know.
        drop(store);
        drop(SqliteStore::open(&path, Create::Never).unwrap());
        let other = Connection::open(&path).unwrap();
        let version: i64 =
            other.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        assert_eq!(version, SCHEMA_VERSION);
        for query in ["SELECT id, name, deleted, version, record FROM volumes", SELECT_VOLUME] {
            assert!(other.prepare(query).unwrap().exists([]).unwrap());
        }
    }

    #[test]
    fn old_events_are_dropped() {
        let (_directory, path) = temporary();
        let store = SqliteStore::open(&path, Create::IfMissing).unwrap();
        let event = Event {
            at_ms: 1,
            kind: crate::EventKind::Opened,
            volume: None,
            server: None,
            text: "e".to_owned(),
            cause: String::new(),
        };
        for number in 1..=crate::EVENTS_MAX + 3 {
            assert_eq!(store.append_event(&event).unwrap(), number);
        }
        let kept = store.events(0, usize::MAX).unwrap();
        assert_eq!(kept.len() as u64, crate::EVENTS_MAX);
        assert_eq!((kept[0].0, store.last_event().unwrap()), (4, crate::EVENTS_MAX + 3));
    }

    #[test]
    fn a_newer_store_is_refused_and_left_alone() {
        let (_directory, path) = temporary();
        drop(SqliteStore::open(&path, Create::IfMissing).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 7).unwrap();
        let before = fs::read(&path).unwrap();
        let text = open_error(&path, Create::IfMissing);
        assert!(text.contains("newer version") && text.contains("schema 7"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), before);
    }

    #[test]
    fn foreign_files_are_refused_and_left_alone() {
        let (_directory, path) = temporary();
        fs::write(&path, vec![b'x'; 8192]).unwrap();
        assert!(open_error(&path, Create::IfMissing).contains("not a SQLite database"));
        assert_eq!(fs::read(&path).unwrap(), vec![b'x'; 8192]);
        fs::remove_file(&path).unwrap();
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE t (a)").unwrap();
        assert!(open_error(&path, Create::IfMissing).contains("another program"));
        fs::write(&path, b"").unwrap();
        assert!(open_error(&path, Create::Never).contains("empty"));
    }

    #[test]
    fn a_damaged_record_is_an_error_not_an_absence() {
        let (_directory, path) = temporary();
        let store = SqliteStore::open(&path, Create::IfMissing).unwrap();
        let volume = conformance::volume(1, "v");
        store.insert_volume(&volume, &conformance::shard(1), store.revision().unwrap()).unwrap();
        let other = Connection::open(&path).unwrap();
        other.execute("UPDATE volumes SET record = '{}'", []).unwrap();
        let text = store.volumes().unwrap_err().to_string();
        assert!(text.contains("damaged") && text.contains(&volume.id.to_string()), "{text}");
        assert!(store.volume(volume.id).is_err());
    }

    #[test]
    fn a_store_that_vanishes_or_is_replaced_is_an_error_until_it_is_back() {
        let (directory, path) = temporary();
        let store = SqliteStore::open(&path, Create::IfMissing).unwrap();
        let away = directory.path().join("away.db");
        fs::rename(&path, &away).unwrap();
        assert!(matches!(store.volumes().unwrap_err().kind, StoreErrorKind::Missing));
        fs::write(&path, b"another file").unwrap();
        assert!(matches!(store.volumes().unwrap_err().kind, StoreErrorKind::Replaced));
        fs::rename(&away, &path).unwrap();
        assert!(store.volumes().is_ok());
    }
}
