//! Where a cluster store is: `sqlite:/path/to/file`, or `etcd://host:port,host:port/prefix`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::StoreError;
use crate::etcd::EtcdStore;
use crate::sqlite::SqliteStore;
use crate::store::{ClusterStore, Create};

/// The prefix of an etcd's keys if the address names none.
const PREFIX_DEFAULT: &str = "holdfast";
/// Endpoints that an address may name.
const ENDPOINTS_MAX: usize = 9;

/// A cluster store's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreAddress {
    /// A SQLite file; for servers of one machine.
    Sqlite(PathBuf),
    /// An etcd; for servers of several machines.
    Etcd {
        /// Its members, as `host:port`.
        endpoints: Vec<String>,
        /// What our keys begin with.
        prefix: String,
    },
}

/// A text that is not a cluster store's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a cluster store's address: {reason}; write it as sqlite:/path/to/file or \
     etcd://host:port,host:port/prefix"
)]
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
            Some(("etcd", rest)) => parse_etcd(rest).map_err(invalid),
            Some(_) => Err(invalid("this kind of store is not supported")),
            None => Err(invalid("it does not say what kind of store it is")),
        }
    }
}

fn parse_etcd(rest: &str) -> Result<StoreAddress, &'static str> {
    let rest = rest.strip_prefix("//").ok_or("two slashes follow etcd:")?;
    let (endpoints, prefix) = rest.split_once('/').unwrap_or((rest, PREFIX_DEFAULT));
    let endpoints: Vec<_> = endpoints.split(',').map(str::to_owned).collect();
    if endpoints.len() > ENDPOINTS_MAX {
        return Err("it names more than nine endpoints");
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let (host, port) = endpoint.rsplit_once(':').ok_or("an endpoint lacks its port")?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let good = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-';
        let good_host = bracketed.map_or_else(
            || !host.is_empty() && host.bytes().all(good),
            |host| host.parse::<std::net::Ipv6Addr>().is_ok(),
        );
        if !good_host {
            return Err("an endpoint's host is missing or cannot be one");
        }
        if port.parse::<u16>().ok().is_none_or(|port| port == 0) {
            return Err("an endpoint's port is not a number from 1 to 65535");
        }
        if endpoints[..index].contains(endpoint) {
            return Err("it names an endpoint twice");
        }
    }
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let good_part = |part: &str| !part.is_empty() && part.bytes().all(good);
    if !prefix.split('/').all(good_part) {
        return Err("the prefix has other characters than letters, digits, '.', '_' and '-'");
    }
    Ok(StoreAddress::Etcd { endpoints, prefix: prefix.to_owned() })
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Etcd { endpoints, prefix } => {
                write!(f, "etcd://{}/{prefix}", endpoints.join(","))
            }
        }
    }
}

/// Opens a store.
pub fn open(address: &StoreAddress, create: Create) -> Result<Arc<dyn ClusterStore>, StoreError> {
    match address {
        StoreAddress::Sqlite(path) => Ok(Arc::new(SqliteStore::open(path, create)?)),
        StoreAddress::Etcd { endpoints, prefix } => {
            Ok(Arc::new(EtcdStore::open(endpoints, prefix, create)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in [
            "sqlite:/a/b.db",
            "etcd://127.0.0.1:2379/holdfast",
            "etcd://a.example:2379,[::1]:2380,b-1:1/team/x_1",
        ] {
            let address: StoreAddress = good.parse().unwrap();
            assert_eq!(address.to_string(), good);
        }
        let short: StoreAddress = "etcd://a:1,b:2".parse().unwrap();
        assert_eq!(short.to_string(), "etcd://a:1,b:2/holdfast");
        for bad in [
            "/a/b.db",
            "sqlite:",
            "etcd:http://x",
            "",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:70000",
            "etcd://:1",
            "etcd://a:1,",
            "etcd://a:1,a:1",
            "etcd://a b:1",
            "etcd://[::x]:1",
            "etcd://a:1/",
            "etcd://a:1//x",
            "etcd://a:1/x/",
            "etcd://u@a:1/x",
            "zookeeper://a:1",
        ] {
            let error = bad.parse::<StoreAddress>().unwrap_err().to_string();
            assert!(error.contains("sqlite:/path/to/file or etcd://"), "{error}");
        }
    }
}
