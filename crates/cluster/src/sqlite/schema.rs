//! The file: opening, telling it from others, making it and bringing it up to date.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use base::ClusterId;
use rusqlite::{Connection, OpenFlags};

use super::{Kind, is_busy};
use crate::error::StoreErrorKind;
use crate::store::Create;

/// The schema this program writes, and the newest it reads.
pub const SCHEMA_VERSION: i64 = 2;

/// `HFCS`, in the file's header.
const APPLICATION_ID: i64 = 0x4846_4353;
/// How long a process waits for another one's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// What makes each schema of the one before it.
const STEPS: [&str; 2] = [TABLES, BOARD];

const TABLES: &str = "
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

const BOARD: &str = "
    CREATE TABLE statuses (
        volume TEXT PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE,
        epoch INTEGER NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        record TEXT NOT NULL
    ) STRICT;
";

pub(super) fn file_identity(path: &Path) -> Kind<(u64, u64)> {
    match fs::metadata(path) {
        Ok(metadata) => Ok((metadata.dev(), metadata.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(StoreErrorKind::Missing),
        Err(error) => Err(StoreErrorKind::Unavailable(Box::new(error))),
    }
}

/// Whether a commit waits until it would outlive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durable {
    Yes,
    No,
}

/// One more connection to a store that is known to be ours.
pub(super) fn connect(path: &Path, durable: Durable) -> Kind<Connection> {
    connect_with(path, durable, OpenFlags::empty())
}

fn connect_with(path: &Path, durable: Durable, more: OpenFlags) -> Kind<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    let synchronous = match durable {
        Durable::Yes => "FULL",
        // With write-ahead logging: consistent whatever happens, and no wait at a commit.
        Durable::No => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", synchronous)?;
    Ok(connection)
}

pub(super) fn open_file(path: &Path, create: Create) -> Kind<Connection> {
    if create == Create::Never {
        file_identity(path)?;
    }
    let may_create = match create {
        Create::IfMissing => OpenFlags::SQLITE_OPEN_CREATE,
        Create::Never => OpenFlags::empty(),
    };
    let mut connection = connect_with(path, Durable::Yes, may_create)?;
    // Nothing is written before it is known to be ours, or empty and ours to fill. One read
    // transaction: another process may be filling the file between two of its questions.
    let found = check_header(&*connection.unchecked_transaction()?, create)?;
    enter_wal(&connection)?;
    if found != Some(SCHEMA_VERSION) {
        migrate(&mut connection, create)?;
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(StoreErrorKind::Damaged(verdict));
    }
    Ok(connection)
}

/// The schema of a store of ours; `None` for an empty file that may become one.
fn check_header(connection: &Connection, create: Create) -> Kind<Option<i64>> {
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
        return Ok(Some(found));
    }
    if application != 0 || tables != 0 || found != 0 {
        return Err(StoreErrorKind::Foreign("a SQLite database of another program".to_owned()));
    }
    match create {
        Create::IfMissing => Ok(None),
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

/// Brings an older or empty store to this program's schema, at once or not at all. Programs of
/// the older schema that have it open go on: nothing that they use changes.
fn migrate(connection: &mut Connection, create: Create) -> Kind<()> {
    super::transact(connection, |transaction| {
        // Asked again under the write lock: another process may have been faster.
        let found = check_header(transaction, create)?.unwrap_or(0);
        let done = usize::try_from(found).expect("checked to be a version up to ours");
        for step in &STEPS[done..] {
            transaction.execute_batch(step)?;
        }
        if found == 0 {
            let id = ClusterId::from_bytes(crate::new_id());
            transaction.execute("INSERT INTO cluster VALUES (1, ?1, 1)", [id.to_string()])?;
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        }
        Ok(transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?)
    })
}

pub(super) fn read_cluster_id(connection: &Connection) -> Kind<ClusterId> {
    let text: String = connection.query_row("SELECT id FROM cluster", [], |row| row.get(0))?;
    text.parse().map_err(|error| StoreErrorKind::Damaged(format!("cluster id: {error}")))
}

/// A store as the first schema's programs left it, with a volume and a server.
#[cfg(test)]
pub(super) fn make_first(path: &Path) {
    let connection = Connection::open(path).unwrap();
    connection.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    connection.execute_batch(TABLES).unwrap();
    connection
        .execute_batch(
            r#"
            PRAGMA application_id = 1212564307;
            PRAGMA user_version = 1;
            INSERT INTO cluster VALUES (1, '5f7c2b52-3ad0-4d5a-9f6e-0f3f0d6f3f11', 9);
            INSERT INTO servers VALUES ('09090909-0909-0909-0909-090909090909', 's',
                '09090909-0909-0909-0909-090909090909', 3, 5,
                '{"id":"09090909-0909-0909-0909-090909090909","name":"s","pool":"09090909-0909-0909-0909-090909090909","addresses":["127.0.0.1:4420"],"labels":{"rack":"7"},"capacity_bytes":100,"free_bytes":50,"version":"0.1.0","stopped":false,"problems":[]}');
            INSERT INTO volumes VALUES ('01010101-0101-0101-0101-010101010101', 'old', 0, 4,
                '{"id":"01010101-0101-0101-0101-010101010101","name":"old","size_bytes":1048576,"block_size":4096,"policy":{"replicas":1,"durability":"flush","stall_deadline_ms":null,"read_only":false},"epoch":3,"holder":{"id":"02020202-0202-0202-0202-020202020202","name":"server s"}}');
            INSERT INTO shards VALUES ('01010101-0101-0101-0101-010101010101', 0, 4,
                '{"volume":"01010101-0101-0101-0101-010101010101","shard":0,"members":[{"server":"09090909-0909-0909-0909-090909090909","pool":"09090909-0909-0909-0909-090909090909","role":"in_sync"}]}');
            "#,
        )
        .unwrap();
    assert_eq!(APPLICATION_ID, 1_212_564_307);
}
