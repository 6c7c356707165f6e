//! Where a cluster store is: `sqlite:/path/to/file`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::StoreError;
use crate::sqlite::SqliteStore;
use crate::store::{ClusterStore, Create};

/// A cluster store's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreAddress {
    /// A SQLite file; for servers of one machine.
    Sqlite(PathBuf),
}

/// A text that is not a cluster store's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a cluster store's address: {reason}; write it as sqlite:/path/to/file")]
pub struct InvalidStoreAddress {
    text: String,
    reason: &'static str,
}

impl FromStr for StoreAddress {
    type Err = InvalidStoreAddress;

    fn from_str(text: &str) -> Result<Self, InvalidStoreAddress> {
        let invalid = |reason| InvalidStoreAddress { text: text.to_owned(), reason };
        match text.split_once(':') {
            Some(("sqlite", "")) => Err(invalid("the path is missing")),
            Some(("sqlite", path)) => Ok(Self::Sqlite(PathBuf::from(path))),
            Some(_) => Err(invalid("this kind of store is not supported")),
            None => Err(invalid("it does not say what kind of store it is")),
        }
    }
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
        }
    }
}

/// Opens a store.
pub fn open(address: &StoreAddress, create: Create) -> Result<Arc<dyn ClusterStore>, StoreError> {
    match address {
        StoreAddress::Sqlite(path) => Ok(Arc::new(SqliteStore::open(path, create)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let address: StoreAddress = "sqlite:/a/b.db".parse().unwrap();
        assert_eq!(address.to_string(), "sqlite:/a/b.db");
        for bad in ["/a/b.db", "sqlite:", "etcd:http://x", ""] {
            let error = bad.parse::<StoreAddress>().unwrap_err().to_string();
            assert!(error.contains("sqlite:/path/to/file"), "{error}");
        }
    }
}
