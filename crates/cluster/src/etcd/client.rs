//! Talking to the members of an etcd: JSON over HTTP/1.1, the gateway that every member has.

use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wire::Pair;
use crate::error::StoreErrorKind;

/// How long an operation may take in all.
pub(super) const OPERATION: Duration = Duration::from_secs(5);
/// The same while no member can be connected to at all.
const NOBODY: Duration = Duration::from_secs(2);
/// How long one member may take to answer before the next one is asked.
const ATTEMPT: Duration = Duration::from_millis(1_500);
/// How long connecting to a member may take.
const CONNECT: Duration = Duration::from_millis(500);
/// The pauses after all members were asked in vain double from here,
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// to here.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// The longest answer: all volumes at once.
const REPLY_BYTES_MAX: u64 = 256 << 20;

/// A connection to each of an etcd's members, made when needed.
pub(super) struct Client {
    endpoints: Vec<String>,
    agent: ureq::Agent,
    /// Index of the member that answered last.
    preferred: AtomicUsize,
}

/// An answer, and whether an earlier attempt may have had its effect before.
pub(super) struct Answer {
    pub(super) body: Value,
    pub(super) repeated: bool,
}

/// What a watch told of a key.
pub(super) enum Told {
    /// Nothing, in all the time.
    Nothing,
    /// It was written; as it is.
    Is(Pair),
    /// It was deleted.
    Gone,
    /// The member watches no longer.
    Ended,
}

/// Why one member gave no answer.
struct Failure {
    text: String,
    /// It may have got the request.
    delivered: bool,
    /// Another member will say the same.
    final_: bool,
}

impl Client {
    pub(super) fn new(endpoints: Vec<String>) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_connect(Some(CONNECT))
            .build();
        Self { endpoints, agent: config.into(), preferred: AtomicUsize::new(0) }
    }

    /// Asks one member after the other until one answers, for up to [`OPERATION`].
    pub(super) fn call(&self, path: &str, body: &Value) -> Result<Answer, StoreErrorKind> {
        let start = Instant::now();
        let body = body.to_string();
        let first = self.preferred.load(Ordering::Relaxed);
        let (mut repeated, mut last) = (false, String::new());
        let (mut pause, mut patience) = (PAUSE_MIN, NOBODY);
        loop {
            for at in (first..).take(self.endpoints.len()) {
                let at = at % self.endpoints.len();
                let left = patience.saturating_sub(start.elapsed());
                if left.is_zero() {
                    return Err(self.diagnose(&last));
                }
                match self.post(&self.endpoints[at], path, &body, ATTEMPT.min(left)) {
                    Ok(body) => {
                        self.preferred.store(at, Ordering::Relaxed);
                        return Ok(Answer { body, repeated });
                    }
                    Err(failure) if failure.final_ => {
                        return Err(unavailable(format!("etcd refuses: {}", failure.text)));
                    }
                    Err(failure) => {
                        if failure.delivered {
                            (repeated, patience) = (true, OPERATION);
                        }
                        last = format!("{}: {}", self.endpoints[at], failure.text);
                    }
                }
            }
            std::thread::sleep(pause.min(patience.saturating_sub(start.elapsed())));
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    /// Asks one member.
    fn post(
        &self,
        endpoint: &str,
        path: &str,
        body: &str,
        wait: Duration,
    ) -> Result<Value, Failure> {
        let failure = |text: String, delivered| Failure { text, delivered, final_: false };
        let sent = self
            .agent
            .post(format!("http://{endpoint}{path}"))
            .config()
            .timeout_global(Some(wait))
            .build()
            .content_type("application/json")
            .send(body);
        let mut response = sent.map_err(|error| {
            let delivered = !is_unconnected(&error);
            failure(error.to_string(), delivered)
        })?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(REPLY_BYTES_MAX)
            .read_to_string()
            .map_err(|error| failure(error.to_string(), true))?;
        let value: Result<Value, _> = serde_json::from_str(&text);
        match value {
            Ok(value) if status.is_success() => Ok(value),
            Ok(value) => {
                let message = value["error"].as_str().unwrap_or("an error without a reason");
                let text = format!("{message} (HTTP {status})");
                // Mistakes of ours and refusals; what passes is 429 and 5xx.
                let final_ = status.is_client_error() && status != 429 && status != 408;
                Err(Failure { text, delivered: true, final_ })
            }
            Err(_) => Err(failure(format!("not an answer of etcd (HTTP {status})"), true)),
        }
    }

    /// Waits until a key changes, after `revision`, for up to `wait`. An error if the member that was
    /// asked does not tell (any more).
    pub(super) fn watch(&self, key: &str, revision: u64, wait: Duration) -> Result<Told, String> {
        let create = json!({"create_request": {
            "key": key,
            "start_revision": revision.saturating_add(1).to_string(),
        }});
        let at = self.preferred.load(Ordering::Relaxed) % self.endpoints.len();
        let start = Instant::now();
        let timed_out =
            |error: String| if start.elapsed() >= wait { Ok(Told::Nothing) } else { Err(error) };
        let sent = self
            .agent
            .post(format!("http://{}/v3/watch", self.endpoints[at]))
            // A member that lost its leader ends the watch.
            .header("Grpc-Metadata-hasleader", "true")
            .config()
            .timeout_global(Some(wait))
            .build()
            .content_type("application/json")
            .send(create.to_string());
        let response = match sent {
            Ok(response) if response.status().is_success() => response,
            Ok(response) => return Err(format!("HTTP {}", response.status())),
            Err(error) => return timed_out(error.to_string()),
        };
        // Closed after one event, so an answer that never ends is not read for ever.
        let reader = response.into_body().into_reader().take(1 << 20);
        for line in BufReader::new(reader).lines() {
            let line = match line {
                Ok(line) => line,
                Err(error) => return timed_out(error.to_string()),
            };
            let mut told: Value = serde_json::from_str(&line).map_err(|error| error.to_string())?;
            let result = &mut told["result"];
            if !result.is_object() {
                return Err(told["error"].to_string());
            }
            if let Some(last) = result["events"].as_array_mut().and_then(Vec::pop) {
                return told_of(last);
            }
            if result["canceled"].as_bool() == Some(true) {
                return Ok(Told::Ended);
            }
        }
        timed_out("the watch ended".to_owned())
    }

    /// Why nobody answers, in words that help; `last` is what went wrong last.
    fn diagnose(&self, last: &str) -> StoreErrorKind {
        let members: Vec<_> = std::thread::scope(|scope| {
            let ask = |endpoint: &String| {
                let endpoint = endpoint.clone();
                scope.spawn(move || self.post(&endpoint, "/v3/maintenance/status", "{}", CONNECT))
            };
            let asked: Vec<_> = self.endpoints.iter().map(ask).collect();
            asked.into_iter().map(|thread| thread.join().expect("asking does not panic")).collect()
        });
        let mut notes = Vec::new();
        let (mut answering, mut led) = (0, 0);
        for (endpoint, member) in self.endpoints.iter().zip(&members) {
            match member {
                Ok(status) => {
                    answering += 1;
                    if status["leader"].as_str().is_none_or(|leader| leader == "0") {
                        notes.push(format!("{endpoint}: has no leader"));
                    } else {
                        led += 1;
                    }
                }
                Err(failure) => notes.push(format!("{endpoint}: {}", failure.text)),
            }
        }
        let of = self.endpoints.len();
        let notes = notes.join("; ");
        unavailable(if answering == 0 {
            format!(
                "none of the {of} etcd endpoints answers ({notes}); start etcd, or correct the \
                 store's address"
            )
        } else if led == 0 || 2 * answering <= of {
            format!(
                "etcd has no quorum: {answering} of {of} endpoints answer ({notes}); start the \
                 other members, more than half of them must run"
            )
        } else {
            format!(
                "etcd did not do it in time, though {answering} of {of} endpoints answer ({last}); it \
                 may be electing a leader, or its disks may be slow or full: try again"
            )
        })
    }
}

/// What an event of a watch tells. Its type is left out if the key was written.
fn told_of(mut event: Value) -> Result<Told, String> {
    if event["type"].as_str() == Some("DELETE") {
        return Ok(Told::Gone);
    }
    Pair::parse(event["kv"].take()).map(Told::Is).map_err(|error| error.to_string())
}

/// Nothing can have been sent.
fn is_unconnected(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::BadUri(_)
        | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        _ => false,
    }
}

fn unavailable(text: String) -> StoreErrorKind {
    StoreErrorKind::Unavailable(text.into())
}
