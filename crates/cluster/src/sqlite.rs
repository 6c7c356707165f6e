//! A cluster store in a SQLite file, for servers of one machine; several processes share it.
//!
//! Write-ahead logging with `synchronous = FULL`: a change that was answered outlives a power
//! cut, so an epoch that was handed out is not handed out again. Records are JSON in rows that
//! carry their version. The file is told from others by its application id and schema version.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base::{ClusterId, ServerId, ShardRecord, VolumeId, VolumeRecord};
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, Transaction, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{StoreError, StoreErrorKind};
use crate::records::{Heartbeat, ServerEntry, ServerRecord, Versions, VolumeEntry, unix_ms};
use crate::store::{ClusterStore, Create};

/// The schema this program writes, and the newest it reads.
pub const SCHEMA_VERSION: i64 = 1;

/// `HFCS`, in the file's header.
const APPLICATION_ID: i64 = 0x4846_4353;
/// How long a process waits for another one's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a waiting process looks at the revision.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

const SCHEMA: &str = "
    CREATE TABLE cluster (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        id TEXT NOT NULL,
        revision INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE volumes (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        deleted INTEGER NOT NULL CHECK (deleted IN (0, 1)),
        version INTEGER NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX volumes_by_name ON volumes (name) WHERE deleted = 0;
    CREATE TABLE shards (
        volume TEXT NOT NULL REFERENCES volumes (id),
        shard INTEGER NOT NULL,
        version INTEGER NOT NULL,
        record TEXT NOT NULL,
        PRIMARY KEY (volume, shard)
    ) STRICT;
    CREATE TABLE servers (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        pool TEXT NOT NULL UNIQUE,
        version INTEGER NOT NULL,
        last_seen_ms INTEGER NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
";

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
}

type Kind<T> = Result<T, StoreErrorKind>;

impl SqliteStore {
    /// Opens the store at `path`, or makes it if that is allowed and nothing is there.
    pub fn open(path: &Path, create: Create) -> Result<Self, StoreError> {
        let opened = open_file(path, create).and_then(|connection| {
            Ok(Self {
                path: path.to_owned(),
                cluster: read_cluster_id(&connection)?,
                identity: file_identity(path)?,
                connection: Mutex::new(connection),
            })
        });
        opened.map_err(|kind| StoreError { store: address_of(path), kind })
    }

    fn run<T>(&self, action: impl FnOnce(&mut Connection) -> Kind<T>) -> Result<T, StoreError> {
        // A poisoned lock means that a caller panicked; its transaction was rolled back.
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_file()
            .and_then(|()| action(&mut connection))
            .map_err(|kind| StoreError { store: address_of(&self.path), kind })
    }

    /// Runs `action` in a transaction that holds the write lock from its start.
    fn write<T>(&self, action: impl FnOnce(&Transaction<'_>) -> Kind<T>) -> Result<T, StoreError> {
        self.run(|connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let result = action(&transaction)?;
            transaction.commit()?;
            Ok(result)
        })
    }

    /// Notices that the file was removed or replaced: the connection would go on writing to a
    /// file that nobody else sees. It is not opened again here: the write-ahead log beside it
    /// may still belong to the former file.
    fn check_file(&self) -> Kind<()> {
        if file_identity(&self.path)? == self.identity {
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

    fn update_volume(&self, entry: &VolumeEntry) -> Result<Versions, StoreError> {
        assert_eq!(entry.volume.id, entry.shard.volume, "the shard is the volume's");
        let id = entry.volume.id;
        self.write(|transaction| {
            let current = read_volume(transaction, id)?.ok_or(StoreErrorKind::NoVolume(id))?;
            let going_back =
                entry.volume.epoch < current.volume.epoch || (current.deleted && !entry.deleted);
            if current.versions != entry.versions || going_back {
                return Err(StoreErrorKind::Conflict);
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
            Ok(next)
        })
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
}

fn address_of(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

fn file_identity(path: &Path) -> Kind<(u64, u64)> {
    match fs::metadata(path) {
        Ok(metadata) => Ok((metadata.dev(), metadata.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(StoreErrorKind::Missing),
        Err(error) => Err(StoreErrorKind::Unavailable(Box::new(error))),
    }
}

fn open_file(path: &Path, create: Create) -> Kind<Connection> {
    if create == Create::Never {
        file_identity(path)?;
    }
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if create == Create::IfMissing {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // Nothing is written before it is known to be ours, or empty and ours to fill.
    let ready = check_header(&connection, create)?;
    enter_wal(&connection)?;
    if !ready {
        make_schema(&mut connection, create)?;
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(StoreErrorKind::Damaged(verdict));
    }
    Ok(connection)
}

/// True for a store of ours, false for an empty file that may become one.
fn check_header(connection: &Connection, create: Create) -> Kind<bool> {
    let number =
        |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let (application, found) = (number("application_id")?, number("user_version")?);
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if application == APPLICATION_ID {
        if found > SCHEMA_VERSION {
            return Err(StoreErrorKind::Newer { found, supported: SCHEMA_VERSION });
        }
        if found < 1 {
            return Err(StoreErrorKind::Damaged(format!("its schema version is {found}")));
        }
        return Ok(true);
    }
    if application != 0 || tables != 0 || found != 0 {
        return Err(StoreErrorKind::Foreign("a SQLite database of another program".to_owned()));
    }
    match create {
        Create::IfMissing => Ok(false),
        Create::Never => Err(StoreErrorKind::Foreign("the file is empty".to_owned())),
    }
}

/// Switches to write-ahead logging. SQLite does not apply its busy timeout to the switch, so two
/// processes that open a new store at once need this loop.
fn enter_wal(connection: &Connection) -> Kind<()> {
    let start = Instant::now();
    loop {
        let switched =
            connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0));
        match switched {
            Ok(mode) if mode.eq_ignore_ascii_case("wal") => return Ok(()),
            Ok(mode) => {
                let reason = format!("write-ahead logging is not possible here (mode is {mode})");
                return Err(StoreErrorKind::Unavailable(reason.into()));
            }
            Err(error) if is_busy(&error) && start.elapsed() < BUSY_TIMEOUT => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn make_schema(connection: &mut Connection, create: Create) -> Kind<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have been faster.
    if !check_header(&transaction, create)? {
        transaction.execute_batch(SCHEMA)?;
        let id = ClusterId::from_bytes(crate::new_id());
        transaction.execute("INSERT INTO cluster VALUES (1, ?1, 1)", [id.to_string()])?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    Ok(transaction.commit()?)
}

fn read_cluster_id(connection: &Connection) -> Kind<ClusterId> {
    let text: String = connection.query_row("SELECT id FROM cluster", [], |row| row.get(0))?;
    text.parse().map_err(|error| StoreErrorKind::Damaged(format!("cluster id: {error}")))
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
