//! Transactions as etcd's JSON gateway reads and answers them: keys and values in base64, 64-bit
//! numbers as text, members with default values left out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::StoreErrorKind;

pub(super) fn encoded(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// The key has not changed since it had this revision; 0: it is not there.
pub(super) fn unchanged(key: &str, mod_revision: u64) -> Value {
    json!({
        "key": encoded(key), "target": "MOD", "result": "EQUAL",
        "mod_revision": mod_revision.to_string(),
    })
}

/// The key is there.
pub(super) fn exists(key: &str) -> Value {
    json!({"key": encoded(key), "target": "CREATE", "result": "GREATER", "create_revision": "0"})
}

/// The key has this value.
pub(super) fn has_value(key: &str, value: &str) -> Value {
    json!({"key": encoded(key), "target": "VALUE", "result": "EQUAL", "value": encoded(value)})
}

pub(super) fn put(key: &str, value: &str) -> Value {
    json!({"request_put": {"key": encoded(key), "value": encoded(value)}})
}

pub(super) fn delete(key: &str) -> Value {
    json!({"request_delete_range": {"key": encoded(key)}})
}

/// One key.
pub(super) fn get(key: &str) -> Value {
    json!({"request_range": {"key": encoded(key)}})
}

/// Up to `limit` keys from `first` on that begin with `prefix`, in order; 0: all.
pub(super) fn range(prefix: &str, first: &str, limit: u64) -> Value {
    // Prefixes end in a slash: what follows all that begin so begins with the next character.
    let end = format!("{}0", prefix.strip_suffix('/').expect("prefixes end in a slash"));
    json!({"request_range": {
        "key": encoded(first), "range_end": encoded(end), "limit": limit.to_string(),
    }})
}

pub(super) fn list(prefix: &str) -> Value {
    range(prefix, prefix, 0)
}

/// The answer to a transaction.
pub(super) struct Reply {
    /// Of the store as a whole, after it.
    pub(super) revision: u64,
    pub(super) succeeded: bool,
    /// What each read of the chosen branch found, in order.
    pub(super) found: Vec<Vec<Pair>>,
}

/// A key and its value.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) mod_revision: u64,
}

#[derive(Deserialize)]
struct RawReply {
    header: RawHeader,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<RawResponse>,
}

#[derive(Deserialize)]
struct RawHeader {
    revision: String,
}

#[derive(Deserialize)]
struct RawResponse {
    response_range: Option<RawRange>,
}

#[derive(Deserialize)]
struct RawRange {
    #[serde(default)]
    kvs: Vec<RawPair>,
}

#[derive(Deserialize)]
struct RawPair {
    key: String,
    #[serde(default)]
    value: String,
    mod_revision: String,
}

fn damaged(what: &str) -> StoreErrorKind {
    StoreErrorKind::Unavailable(format!("etcd's answer makes no sense: {what}").into())
}

fn number(text: &str) -> Result<u64, StoreErrorKind> {
    text.parse::<u64>().map_err(|_| damaged("not a revision"))
}

impl Pair {
    pub(super) fn parse(value: Value) -> Result<Self, StoreErrorKind> {
        let raw: RawPair =
            serde_json::from_value(value).map_err(|error| damaged(&error.to_string()))?;
        Self::decoded(&raw)
    }

    fn decoded(raw: &RawPair) -> Result<Self, StoreErrorKind> {
        let bytes = |text: &str| STANDARD.decode(text).map_err(|_| damaged("not base64"));
        let key = String::from_utf8(bytes(&raw.key)?).map_err(|_| damaged("not a key"))?;
        Ok(Self { key, value: bytes(&raw.value)?, mod_revision: number(&raw.mod_revision)? })
    }
}

impl Reply {
    pub(super) fn parse(body: Value) -> Result<Self, StoreErrorKind> {
        let raw: RawReply =
            serde_json::from_value(body).map_err(|error| damaged(&error.to_string()))?;
        let found = raw.responses.into_iter().filter_map(|response| response.response_range);
        let found = found.map(|range| range.kvs.iter().map(Pair::decoded).collect());
        Ok(Self {
            revision: number(&raw.header.revision)?,
            succeeded: raw.succeeded,
            found: found.collect::<Result<_, StoreErrorKind>>()?,
        })
    }
}
