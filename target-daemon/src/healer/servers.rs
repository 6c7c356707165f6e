//! Servers that come and go, for the cluster's log of events.
//!
//! Every daemon sees it; the one with the lowest id of those that run says it, so that it is said once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base::ServerId;
use cluster::{Event, EventKind, ServerEntry};

use super::watch::event;

/// A server must have been quiet for so long beyond what counts as alive: when the cluster store was
/// away, everybody's last word is old for a moment.
const QUIET: Duration = Duration::from_secs(3);

/// The servers as they were told.
pub(super) struct Servers {
    own: ServerId,
    /// True: it ran.
    known: BTreeMap<ServerId, bool>,
    /// Since when they are seen otherwise.
    changed: BTreeMap<ServerId, Instant>,
}

impl Servers {
    pub(super) fn new(own: ServerId) -> Self {
        Self { own, known: BTreeMap::new(), changed: BTreeMap::new() }
    }

    /// What is new, at `now`, of what the store says at `now_ms`.
    pub(super) fn news(
        &mut self,
        servers: &[ServerEntry],
        now: Instant,
        now_ms: u64,
    ) -> Vec<Event> {
        let alive = |id: ServerId| {
            servers.iter().any(|entry| entry.server.id == id && entry.is_alive(now_ms))
        };
        if !alive(self.own) {
            return Vec::new(); // who is not heard does not hear
        }
        let first = servers.iter().filter(|entry| entry.is_alive(now_ms));
        let says = first.map(|entry| entry.server.id).min() == Some(self.own);
        self.known.retain(|id, _| servers.iter().any(|entry| entry.server.id == *id));
        let mut events = Vec::new();
        for entry in servers {
            let id = entry.server.id;
            let up = entry.is_alive(now_ms);
            let Some(known) = self.known.get(&id).copied() else {
                self.known.insert(id, up);
                if id == self.own && says {
                    events.push(told(entry, up));
                }
                continue;
            };
            if known == up {
                self.changed.remove(&id);
                continue;
            }
            let since = *self.changed.entry(id).or_insert(now);
            if up || entry.server.stopped || now.duration_since(since) >= QUIET {
                self.known.insert(id, up);
                self.changed.remove(&id);
                if says {
                    events.push(told(entry, up));
                }
            }
        }
        events
    }
}

fn told(entry: &ServerEntry, up: bool) -> Event {
    let name = &entry.server.name;
    let (kind, text, cause) = match (up, entry.server.stopped) {
        (true, _) => (EventKind::ServerUp, format!("server {name} runs"), ""),
        (false, true) => (EventKind::ServerDown, format!("server {name} was stopped"), ""),
        (false, false) => {
            let cause = "it tells the cluster store nothing any more";
            (EventKind::ServerDown, format!("server {name} is not heard of"), cause)
        }
    };
    event(kind, None, Some(entry.server.id), text, cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::PoolId;
    use cluster::ServerRecord;

    fn entry(number: u8, last_seen_ms: u64, stopped: bool) -> ServerEntry {
        let server = ServerRecord {
            id: ServerId::from_bytes([number; 16]),
            name: format!("s{number}"),
            pool: PoolId::from_bytes([number; 16]),
            addresses: Vec::new(),
            labels: BTreeMap::new(),
            capacity_bytes: 0,
            free_bytes: 0,
            version: String::new(),
            stopped,
            problems: Vec::new(),
            draining: None,
        };
        ServerEntry { server, version: 1, last_seen_ms }
    }

    fn texts(events: &[Event]) -> Vec<&str> {
        events.iter().map(|event| event.text.as_str()).collect()
    }

    #[test]
    fn servers_that_come_and_go_are_told_once() {
        let start = Instant::now();
        let at = |seconds: u64| (start + Duration::from_secs(seconds), 1_000_000 + seconds * 1000);
        let seen = |seconds: u64| 1_000_000 + seconds * 1000;
        let mut one = Servers::new(ServerId::from_bytes([1; 16]));
        let mut two = Servers::new(ServerId::from_bytes([2; 16]));
        let all = |a: u64, b: u64, c: u64| {
            vec![entry(1, seen(a), false), entry(2, seen(b), false), entry(3, seen(c), false)]
        };
        let look = |who: &mut Servers, servers: &[ServerEntry], seconds: u64| {
            let (now, now_ms) = at(seconds);
            who.news(servers, now, now_ms)
        };
        assert_eq!(texts(&look(&mut one, &all(0, 0, 0), 0)), ["server s1 runs"]);
        assert!(look(&mut two, &all(0, 0, 0), 0).is_empty());
        // The store was away: all last words are old, and soon are not.
        assert!(look(&mut one, &all(60, 0, 0), 60).is_empty());
        assert!(look(&mut one, &all(62, 61, 62), 62).is_empty());
        assert!(look(&mut two, &all(62, 61, 62), 62).is_empty());
        // The third one dies.
        assert!(look(&mut one, &all(80, 80, 62), 80).is_empty());
        assert_eq!(texts(&look(&mut one, &all(84, 84, 62), 84)), ["server s3 is not heard of"]);
        assert!(look(&mut one, &all(88, 88, 62), 88).is_empty(), "once");
        assert!(look(&mut two, &all(80, 80, 62), 80).is_empty());
        assert!(look(&mut two, &all(84, 84, 62), 84).is_empty(), "the first one says it");
        // The first one is stopped: the second one says that, and what happens from then on.
        let mut servers = all(90, 90, 62);
        servers[0] = entry(1, seen(90), true);
        assert_eq!(texts(&look(&mut two, &servers, 90)), ["server s1 was stopped"]);
        servers[2] = entry(3, seen(91), false);
        assert_eq!(texts(&look(&mut two, &servers, 91)), ["server s3 runs"]);
    }
}
