//! Why a cluster store did not do what was asked.

use std::error::Error;

use base::{PoolId, ServerId, VolumeId};

/// A failed operation of a cluster store: which store, and what happened.
#[derive(Debug, thiserror::Error)]
#[error("cluster store {store}: {kind}")]
pub struct StoreError {
    /// The store's address, as in `sqlite:/var/lib/holdfast/cluster.db`.
    pub store: String,
    /// What happened.
    #[source]
    pub kind: StoreErrorKind,
}

/// What happened to a store or in it.
#[derive(Debug, thiserror::Error)]
pub enum StoreErrorKind {
    /// There is none.
    #[error(
        "there is no such store; check the address, or make it with `holdfast pool format --store`"
    )]
    Missing,
    /// It is something else.
    #[error("not a Holdfast cluster store ({0}); check the address")]
    Foreign(String),
    /// It was written by a newer version of this program.
    #[error(
        "written by a newer version of Holdfast (schema {found}, this one knows up to \
         {supported}); nothing was changed: use the newer version"
    )]
    Newer {
        /// The store's schema.
        found: i64,
        /// The newest schema this program knows.
        supported: i64,
    },
    /// What it holds does not make sense.
    #[error("damaged: {0}; restore it from a backup, the volumes' data is not affected")]
    Damaged(String),
    /// Another store is now where this one was.
    #[error(
        "replaced by another one while in use; put the right one back, or stop every Holdfast \
         process that uses it before starting them on the new one"
    )]
    Replaced,
    /// It cannot be reached, or is busy for too long. Try again.
    #[error("unavailable: {0}")]
    Unavailable(#[source] Box<dyn Error + Send + Sync>),
    /// The compared versions are no longer the current ones: read again and decide again.
    #[error("changed by someone else in the meantime; try again")]
    Conflict,
    /// No such volume.
    #[error("there is no volume {0}")]
    NoVolume(VolumeId),
    /// Another volume has this name.
    #[error("there is a volume named '{0}' already; choose another name")]
    VolumeNameTaken(String),
    /// No such server.
    #[error("there is no server {0}; `holdfast server list` shows what there is")]
    NoServer(ServerId),
    /// Another server has this name or pool.
    #[error(
        "there is a server with the name '{0}' or its pool already; choose another name, or format \
         the pool again with --force"
    )]
    ServerTaken(String),
    /// The server is not registered, or with another pool.
    #[error(
        "server {server} with pool {pool} is not registered here; is this the right store, or was \
         the pool formatted anew?"
    )]
    NotRegistered {
        /// The server.
        server: ServerId,
        /// The pool it came with.
        pool: PoolId,
    },
}

impl StoreError {
    /// True if the compared versions were no longer current.
    pub fn is_conflict(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Conflict)
    }

    /// True if a change that failed so may have been made nevertheless, or may still be made.
    pub fn may_have_happened(&self) -> bool {
        match &self.kind {
            StoreErrorKind::Unavailable(_) => true,
            StoreErrorKind::Missing
            | StoreErrorKind::Foreign(_)
            | StoreErrorKind::Newer { .. }
            | StoreErrorKind::Damaged(_)
            | StoreErrorKind::Replaced
            | StoreErrorKind::Conflict
            | StoreErrorKind::NoVolume(_)
            | StoreErrorKind::NoServer(_)
            | StoreErrorKind::VolumeNameTaken(_)
            | StoreErrorKind::ServerTaken(_)
            | StoreErrorKind::NotRegistered { .. } => false,
        }
    }
}
