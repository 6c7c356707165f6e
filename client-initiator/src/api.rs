//! `holdfast status` and `holdfast export …`: a daemon's HTTP API.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use target_daemon::api::{
    ErrorReply, ExportReply, ExportRequest, ExportState, HeadReply, StatusReply,
};
use target_daemon::size::format_size;

use crate::arguments::{ApiArgument, ExportCommand};
use crate::exit::{Exit, Failure};
use crate::output::{Output, table};

/// Longer than the longest wait that the API offers.
const TIMEOUT: Duration = Duration::from_secs(90);
/// The longest answer that is read, in bytes.
const REPLY_BYTES_MAX: u64 = 64 << 20;

/// A daemon's answer.
struct Reply {
    status: u16,
    body: Vec<u8>,
}

/// One HTTP/1.1 request on a connection of its own (RFC 9112; `Connection: close`, so the body
/// ends with the connection).
fn request(socket: &Path, method: &str, target: &str, body: &[u8]) -> Result<Reply, Failure> {
    let away = |error: io::Error| {
        let text = format!(
            "no daemon answers at '{}': {error}; is it running, and is this the `api` socket of its configuration?",
            socket.display()
        );
        Failure::new(Exit::Unavailable, text)
    };
    let mut stream = UnixStream::connect(socket).map_err(away)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(away)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(away)?;
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: holdfastd\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).map_err(away)?;
    stream.write_all(body).map_err(away)?;
    let mut bytes = Vec::new();
    stream.take(REPLY_BYTES_MAX).read_to_end(&mut bytes).map_err(away)?;
    parse_reply(&bytes).ok_or_else(|| {
        let text = format!("'{}' does not speak HTTP as holdfastd does", socket.display());
        Failure::new(Exit::Unavailable, text)
    })
}

/// The status and body of a whole answer with a `Content-Length`, or without a body.
fn parse_reply(bytes: &[u8]) -> Option<Reply> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let length = lines.filter_map(|line| line.split_once(':')).find_map(|(name, value)| {
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())
    });
    let body = &bytes[end + 4..];
    match length {
        Some(length) if length? == body.len() => {}
        None if body.is_empty() => {}
        Some(_) | None => return None,
    }
    Some(Reply { status, body: body.to_vec() })
}

fn call<T: DeserializeOwned>(
    api: &ApiArgument,
    method: &str,
    target: &str,
    body: &[u8],
) -> Result<T, Failure> {
    let reply = expect_success(request(&api.socket, method, target, body)?)?;
    serde_json::from_slice(&reply.body).map_err(|error| {
        let text =
            format!("the daemon's answer is not understood ({error}); is it of another version?");
        Failure::new(Exit::Unavailable, text)
    })
}

fn expect_success(reply: Reply) -> Result<Reply, Failure> {
    if (200..300).contains(&reply.status) {
        return Ok(reply);
    }
    let error = serde_json::from_slice::<ErrorReply>(&reply.body).unwrap_or_else(|_| ErrorReply {
        code: String::new(),
        error: format!("the daemon answered with HTTP status {}", reply.status),
    });
    let exit = match (error.code.as_str(), reply.status) {
        ("provisioning", _) => Exit::NotReady,
        (_, 400) => Exit::Usage,
        (_, 404) => Exit::NotFound,
        (_, 409) => Exit::Conflict,
        (_, 503 | 504) => Exit::Unavailable,
        (_, _) => Exit::Failed,
    };
    Err(Failure::new(exit, error.error))
}

pub(crate) fn export(command: ExportCommand, output: &Output) -> Result<(), Failure> {
    match command {
        ExportCommand::Add { api, volume, socket, queues, read_only, standby, wait } => {
            let socket = std::path::absolute(&socket).map_err(|error| {
                Failure::new(Exit::Usage, format!("socket '{}': {error}", socket.display()))
            })?;
            let request = ExportRequest {
                volume,
                socket: text_of(&socket)?,
                queues: Some(queues),
                read_only,
                standby,
                wait_ms: Some(wait * 1000),
            };
            let body = serde_json::to_vec(&request).expect("a request is plain data");
            let export: ExportReply = call(&api, "POST", "/v1/exports", &body)?;
            output.print(&export, || {
                let reason =
                    export.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
                format!(
                    "volume {} at {}: {}{reason}",
                    export.volume,
                    export.socket,
                    name(export.state)
                )
            });
            Ok(())
        }
        ExportCommand::List { api } => {
            let exports: Vec<ExportReply> = call(&api, "GET", "/v1/exports", &[])?;
            output.print(&exports, || export_table(&exports));
            Ok(())
        }
        ExportCommand::Remove { api, socket } => {
            let socket = text_of(&std::path::absolute(&socket).unwrap_or(socket))?;
            let target = format!("/v1/exports?socket={}", percent_encode(&socket));
            expect_success(request(&api.socket, "DELETE", &target, &[])?)?;
            let removed = serde_json::json!({ "socket": socket, "state": "removed" });
            output.print(&removed, || format!("removed the export at {socket}"));
            Ok(())
        }
    }
}

pub(crate) fn status(api: &ApiArgument, output: &Output) -> Result<(), Failure> {
    let status: StatusReply = call(api, "GET", "/v1/status", &[])?;
    output.print(&status, || status_text(&status));
    Ok(())
}

fn text_of(path: &Path) -> Result<String, Failure> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("socket '{}' is not UTF-8", path.display()))
    })
}

/// For a query's value (RFC 3986, 2.1).
fn percent_encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

fn name(state: ExportState) -> &'static str {
    match state {
        ExportState::Waiting => "waiting",
        ExportState::Standby => "standby",
        ExportState::Yielded => "yielded",
        ExportState::Opening => "opening",
        ExportState::Open => "open",
        ExportState::Stalled => "stalled",
        ExportState::Stopping => "stopping",
    }
}

fn export_table(exports: &[ExportReply]) -> String {
    let row = |export: &ExportReply| {
        vec![
            export.volume.clone(),
            export.socket.clone(),
            name(export.state).to_owned(),
            if export.connected { "yes" } else { "no" }.to_owned(),
            export.reason.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = exports.iter().map(row).collect();
    table(&["VOLUME", "SOCKET", "STATE", "GUEST", "REASON"], &rows)
}

fn status_text(status: &StatusReply) -> String {
    let server = &status.server;
    let listen = server.listen.as_deref().unwrap_or("nowhere");
    let mut lines = vec![
        format!(
            "server    {} ({}), version {}, up {} s",
            server.name, server.id, server.version, server.uptime_s
        ),
        format!("listening {listen}"),
        match &status.store.error {
            None => format!("store     {}", status.store.address),
            Some(error) => format!("store     away: {error}"),
        },
    ];
    if let Some(pool) = &status.pool {
        lines.push(format!(
            "pool      {}: log {} of {} in use, home {} of {} free",
            pool.id,
            format_size(pool.log_used_bytes),
            format_size(pool.log_bytes),
            format_size(pool.home_free_bytes),
            format_size(pool.home_bytes),
        ));
        if let Some(failed) = &pool.failed {
            lines.push(format!("          FAILED: {failed}"));
        }
    }
    lines.push(format!("replicas  {}", status.replicas.len()));
    lines.extend(status.heads.iter().flat_map(head_lines));
    if !status.exports.is_empty() {
        lines.push(String::new());
        lines.push(export_table(&status.exports));
    }
    lines.join("\n")
}

fn head_lines(head: &HeadReply) -> Vec<String> {
    let volume = head.volume.as_ref().unwrap_or(&head.volume_id);
    let reason = head.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    let stalled = head.stalled_ms.map_or(String::new(), |ms| format!(" for {ms} ms"));
    let mut lines = vec![format!(
        "head      {volume} epoch {}, {}{stalled}{reason}; seq {} ({} acknowledged), {} in flight",
        head.epoch, head.phase, head.last_seq, head.commit_seq, head.in_flight
    )];
    for member in &head.members {
        let server = member.server.as_ref().unwrap_or(&member.server_id);
        let place = if member.local { "local" } else { "remote" };
        let reach = if member.reachable { "reachable" } else { "away" };
        let note = member.note.as_ref().map_or(String::new(), |note| format!(" ({note})"));
        lines.push(format!(
            "  member  {server}: {}, {place}, {reach}, seq {}{note}",
            member.role, member.last_seq
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_whole_and_broken() {
        let whole = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}";
        let reply = parse_reply(whole).unwrap();
        assert_eq!((reply.status, reply.body.as_slice()), (201, b"{}".as_slice()));
        assert_eq!(parse_reply(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().status, 204);
        for broken in [
            &whole[..whole.len() - 1],
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
            b"HTTP/1.1 2",
            b"SSH-2.0-OpenSSH\r\n\r\n",
            b"",
        ] {
            assert!(parse_reply(broken).is_none());
        }
    }

    #[test]
    fn query_values() {
        assert_eq!(percent_encode("/run/a b&c%ü"), "/run/a%20b%26c%25%C3%BC");
    }
}
