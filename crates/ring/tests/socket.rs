//! TCP and Unix sockets.
#![allow(clippy::unwrap_used, reason = "in a test, panicking is reporting")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use base::limits::HEADER_BYTES;
use ring::{
    Completion, Config, ConnectionHandle, ErrorKind, IoError, SEND_PARTS_MAX, SendError,
    SocketAddress, SocketOptions, Token,
};
use support::{Fixture, PATIENCE, config, pattern};

fn received(completion: &Completion) -> Option<Result<usize, IoError>> {
    match completion {
        Completion::Received { result, .. } => Some(*result),
        _ => None,
    }
}

fn accepted(completion: &Completion) -> Option<ConnectionHandle> {
    match completion {
        Completion::Accepted { connection, .. } => Some(*connection),
        _ => None,
    }
}

fn connected(completion: &Completion) -> Option<Result<ConnectionHandle, IoError>> {
    match completion {
        Completion::Connected { result, .. } => Some(*result),
        _ => None,
    }
}

fn closed(completion: &Completion) -> Option<ConnectionHandle> {
    match completion {
        Completion::Closed { connection } => Some(*connection),
        _ => None,
    }
}

fn any_port() -> SocketAddress {
    "127.0.0.1:0".parse().unwrap()
}

/// Echoes what it gets until the peer closes.
fn echo(mut stream: impl Read + Write) {
    let mut buffer = vec![0; 70_000];
    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..bytes]).is_err() {
            return;
        }
    }
}

/// Sends `total` bytes over `connection` and receives them again.
fn send_and_receive(fixture: &mut Fixture, connection: ConnectionHandle, total: usize) {
    let (mut sent, mut got) = (0, 0);
    // Held all the time: a peer that cannot send would not receive either.
    let mut aside = fixture.reactor.buffers().take(5000);
    while got < total {
        while sent < total {
            let length = (total - sent).min(if sent % 3 == 0 { 4096 } else { 3000 });
            let Some(mut buffer) = fixture.reactor.buffers().take(length) else { break };
            for (index, byte) in buffer.payload_mut()[..length].iter_mut().enumerate() {
                *byte = pattern(0, sent + index);
            }
            fixture.reactor.send(connection, buffer.freeze().payload(length)).unwrap();
            sent += length;
            if sent + 100 < total {
                let inline: Vec<u8> = (sent..sent + 100).map(|at| pattern(0, at)).collect();
                fixture.reactor.send_bytes(connection, &inline).unwrap();
                sent += 100;
            }
        }
        if let Some(buffer) = aside.take() {
            let from = HEADER_BYTES - 72;
            let min_bytes = (total - got).min(if got % 2 == 0 { 1 } else { 4096 });
            let bytes = min_bytes.max((total - got).min(5072));
            fixture.reactor.receive(connection, buffer, from..from + bytes, min_bytes);
        }
        if let (Completion::Received { mut buffer, .. }, result) = fixture.wait(received) {
            let bytes = result.unwrap();
            assert!(bytes > 0, "the peer does not close");
            let from = HEADER_BYTES - 72;
            for (index, byte) in buffer.slot_mut()[from..from + bytes].iter().enumerate() {
                assert_eq!(*byte, pattern(0, got + index), "at {}", got + index);
            }
            got += bytes;
            aside = Some(buffer);
        }
    }
}

#[test]
fn tcp_echo_of_megabytes() {
    let config = config();
    let mut fixture = Fixture::new();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = SocketAddress::Tcp(server.local_addr().unwrap());
    let thread = std::thread::spawn(move || echo(server.accept().unwrap().0));
    fixture.reactor.connect(&address, SocketOptions::default(), Token(5));
    let (_, connection) = fixture.wait(connected);
    let connection = connection.unwrap();
    assert_eq!(fixture.reactor.peer_address(connection), Some(address));
    send_and_receive(&mut fixture, connection, 8 << 20);
    fixture.reactor.close(connection);
    assert_eq!(fixture.wait(closed).1, connection);
    thread.join().unwrap();
    fixture.assert_buffers_are_back(&config);
}

#[test]
fn unix_echo_through_our_listener() {
    let config = config();
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = SocketAddress::Unix(path.clone());
    let listener = fixture.reactor.listen(&address, SocketOptions::default()).unwrap();
    assert_eq!(fixture.reactor.listener_address(listener), Some(&address));
    let error = fixture.reactor.listen(&address, SocketOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    // Looking whether somebody listens was a connection too.
    let (_, probe) = fixture.wait(accepted);
    fixture.reactor.close(probe);
    assert_eq!(fixture.wait(closed).1, probe);
    let client = UnixStream::connect(&path).unwrap();
    let thread = std::thread::spawn(move || echo(client));
    let (_, connection) = fixture.wait(accepted);
    send_and_receive(&mut fixture, connection, 2 << 20);
    fixture.reactor.close(connection);
    assert_eq!(fixture.wait(closed).1, connection);
    thread.join().unwrap();
    fixture.reactor.close_listener(listener);
    fixture.turn_until(|_| UnixStream::connect(&path).is_err());
    // What was left behind is replaced.
    assert!(path.exists());
    fixture.reactor.listen(&address, SocketOptions::default()).unwrap();
    UnixStream::connect(&path).unwrap();
    fixture.wait(accepted);
    fixture.assert_buffers_are_back(&config);
}

#[test]
fn connections_inherit_the_listeners_options() {
    let mut fixture = Fixture::new();
    let options = SocketOptions {
        user_timeout: Some(Duration::from_millis(4321)),
        ..SocketOptions::default()
    };
    let listener = fixture.reactor.listen(&any_port(), options).unwrap();
    let address = fixture.reactor.listener_address(listener).unwrap().clone();
    let SocketAddress::Tcp(address) = address else { panic!("a TCP address") };
    assert_ne!(address.port(), 0);
    let client = TcpStream::connect(address).unwrap();
    let (_, connection) = fixture.wait(accepted);
    let peer = SocketAddress::Tcp(client.local_addr().unwrap());
    assert_eq!(fixture.reactor.peer_address(connection), Some(peer));
    // The options are visible from outside as what `ss` reports of the accepted socket; here
    // through the descriptor, the only TCP socket of this process with that local port and peer.
    let socket = (3..1024).find_map(|descriptor| {
        // SAFETY: looks at descriptors that may be closed; every call checks.
        let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
        let peer = rustix::net::getpeername(descriptor).ok()??;
        let peer = std::net::SocketAddr::try_from(peer).ok()?;
        (peer == client.local_addr().unwrap()).then_some(descriptor)
    });
    let socket = socket.expect("the accepted socket is open");
    assert!(rustix::net::sockopt::tcp_nodelay(socket).unwrap());
    assert!(rustix::net::sockopt::socket_keepalive(socket).unwrap());
    assert_eq!(rustix::net::sockopt::tcp_user_timeout(socket).unwrap(), 4321);
}

#[test]
fn the_end_of_the_stream_is_told() {
    let mut fixture = Fixture::new();
    let (a, b) = fixture.pair();
    fixture.reactor.send_bytes(a, b"last words").unwrap();
    fixture.reactor.close_after_send(a);
    assert_eq!(fixture.reactor.send_bytes(a, b"more"), Err(SendError::Closed));
    let buffer = fixture.reactor.buffers().take(4096).unwrap();
    fixture.reactor.receive(b, buffer, HEADER_BYTES..HEADER_BYTES + 4096, 4096);
    let (completion, result) = fixture.wait(received);
    assert_eq!(result, Ok(10));
    let Completion::Received { buffer, .. } = completion else { unreachable!() };
    assert_eq!(&buffer.payload()[..10], b"last words");
    fixture.reactor.receive(b, buffer, 0..1, 1);
    assert_eq!(fixture.wait(received).1, Ok(0));
    assert_eq!(fixture.wait(closed).1, a);
    // Its handle means nothing any more.
    let buffer = fixture.reactor.buffers().take(4096).unwrap();
    fixture.reactor.receive(a, buffer, 0..1, 1);
    assert_eq!(fixture.wait(received).1, Err(IoError::Closed));
    assert_eq!(fixture.reactor.send_bytes(a, b"more"), Err(SendError::Closed));
    fixture.reactor.close(a);
    fixture.reactor.close(b);
    assert_eq!(fixture.wait(closed).1, b);
    fixture.assert_buffers_are_back(&config());
}

#[test]
fn a_closed_connections_buffer_comes_back_with_the_completion_not_before() {
    let mut fixture = Fixture::new();
    let config = config();
    let (a, b) = fixture.pair();
    let buffer = fixture.reactor.buffers().take(4096).unwrap();
    fixture.reactor.receive(a, buffer, 0..100, 1);
    let soon = ring::now() + Duration::from_millis(1);
    while ring::now() < soon {
        assert_eq!(fixture.reactor.turn(Some(soon), false).unwrap().completions, 0);
    }
    fixture.reactor.close(a);
    // The kernel has it still.
    assert_eq!(fixture.reactor.buffers().available().0, config.small_buffers - 1);
    assert!(fixture.reactor.next_completion().is_none());
    let (completion, result) = fixture.wait(received);
    assert_eq!(result, Err(IoError::Cancelled));
    assert_eq!(fixture.reactor.buffers().available().0, config.small_buffers - 1);
    drop(completion);
    fixture.assert_buffers_are_back(&config);
    assert_eq!(fixture.wait(closed).1, a);
    fixture.reactor.close(b);
    fixture.wait(closed);
}

/// The peer reads nothing: the queue fills, refuses, and says when it takes parts again.
#[test]
fn a_full_send_queue_refuses_and_recovers() {
    let mut fixture = Fixture::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = fixture.reactor.adopt(ours.into(), SocketOptions::default()).unwrap();
    let part = fixture.payload(4096, |at| pattern(3, at));
    let mut sent = 0;
    let refused = loop {
        match fixture.reactor.send(connection, part.clone()) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        fixture.reactor.turn(None, true).unwrap();
    };
    assert_eq!(refused, SendError::Full);
    assert!(sent >= SEND_PARTS_MAX, "{sent}");
    assert_eq!(fixture.reactor.send_space(connection), 0);
    let thread = std::thread::spawn(move || {
        let mut theirs = theirs;
        let mut block = [0; 4096];
        let mut count = 0;
        while theirs.read_exact(&mut block).is_ok() {
            assert!(block.iter().enumerate().all(|(at, byte)| *byte == pattern(3, at)));
            count += 1;
        }
        count
    });
    fixture.wait(|completion| matches!(completion, Completion::Writable { .. }).then_some(()));
    assert!(fixture.reactor.send_space(connection) >= SEND_PARTS_MAX / 2);
    fixture.reactor.send(connection, part).unwrap();
    fixture.reactor.close_after_send(connection);
    fixture.wait(closed);
    assert_eq!(thread.join().unwrap(), sent + 1);
    fixture.assert_buffers_are_back(&config());
}

#[test]
fn closing_with_a_stuck_send_gives_its_parts_back() {
    let mut fixture = Fixture::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = fixture.reactor.adopt(ours.into(), SocketOptions::default()).unwrap();
    let part = fixture.payload(131_072, |_| 1);
    for _ in 0..100 {
        fixture.reactor.send(connection, part.clone()).unwrap();
    }
    drop(part);
    fixture.reactor.turn(None, true).unwrap();
    fixture.reactor.close_after_send(connection);
    fixture.reactor.turn(None, true).unwrap();
    assert_eq!(fixture.reactor.buffers().available().1, config().large_buffers - 1);
    fixture.reactor.close(connection);
    fixture.wait(closed);
    fixture.assert_buffers_are_back(&config());
    drop(theirs);
}

#[test]
fn a_peer_that_goes_away_fails_the_send_once() {
    let mut fixture = Fixture::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = fixture.reactor.adopt(ours.into(), SocketOptions::default()).unwrap();
    drop(theirs);
    for _ in 0..10 {
        fixture.reactor.send_bytes(connection, &[1; 100]).unwrap();
    }
    let (completion, ()) = fixture
        .wait(|completion| matches!(completion, Completion::SendFailed { .. }).then_some(()));
    let Completion::SendFailed { error, .. } = completion else { unreachable!() };
    assert_eq!(error, IoError::Os(libc::EPIPE));
    assert_eq!(fixture.reactor.send_bytes(connection, &[1]), Err(SendError::Closed));
    assert_eq!(fixture.reactor.send_space(connection), 0);
    fixture.reactor.close(connection);
    assert!(matches!(fixture.next(), Completion::Closed { .. }));
}

#[test]
fn connects_fail_with_the_reason() {
    let mut fixture = Fixture::new();
    let closed_port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SocketAddress::Tcp(listener.local_addr().unwrap())
    };
    fixture.reactor.connect(&closed_port, SocketOptions::default(), Token(1));
    assert_eq!(fixture.wait(connected).1, Err(IoError::Os(libc::ECONNREFUSED)));
    let nowhere = SocketAddress::Unix("/nonexistent/socket".into());
    fixture.reactor.connect(&nowhere, SocketOptions::default(), Token(2));
    assert_eq!(fixture.wait(connected).1, Err(IoError::Os(libc::ENOENT)));
    let too_long = SocketAddress::Unix("x".repeat(200).into());
    fixture.reactor.connect(&too_long, SocketOptions::default(), Token(3));
    assert!(matches!(fixture.wait(connected).1, Err(IoError::Invalid(_))));
    assert!("localhost".parse::<SocketAddress>().is_err());
    assert_eq!("unix:/run/x".parse::<SocketAddress>().unwrap().to_string(), "unix:/run/x");
}

/// A listener whose backlog is full and that never accepts does not answer.
#[test]
fn a_connect_gives_up_after_its_timeout() {
    let mut fixture = Fixture::new();
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let address = rustix::net::getsockname(&socket).unwrap();
    let address = std::net::SocketAddr::try_from(address).unwrap();
    let options = SocketOptions {
        connect_timeout: Some(Duration::from_millis(50)),
        ..SocketOptions::default()
    };
    for token in 0..4 {
        fixture.reactor.connect(&SocketAddress::Tcp(address), options, Token(token));
    }
    let results: Vec<_> = (0..4).map(|_| fixture.wait(connected).1).collect();
    assert!(results.contains(&Err(IoError::TimedOut)), "{results:?}");
    assert!(results.iter().all(|r| r.is_ok() || *r == Err(IoError::TimedOut)), "{results:?}");
}

/// A connection flood past the descriptor limit is not tested here (the limit is the process's);
/// a burst past the backlog's batch is.
#[test]
fn a_burst_of_connections_is_accepted() {
    let mut fixture = Fixture::with(&Config { entries: 4, ..config() });
    let listener = fixture.reactor.listen(&any_port(), SocketOptions::default()).unwrap();
    let Some(SocketAddress::Tcp(address)) = fixture.reactor.listener_address(listener).cloned()
    else {
        panic!("a TCP address");
    };
    fixture.reactor.turn(None, true).unwrap();
    let clients: Vec<_> =
        (0..60).map(|_| TcpStream::connect_timeout(&address, PATIENCE).unwrap()).collect();
    let connections: Vec<_> = (0..60).map(|_| fixture.wait(accepted).1).collect();
    for connection in &connections {
        fixture.reactor.send_bytes(*connection, b"hello").unwrap();
    }
    fixture.reactor.turn(None, true).unwrap();
    for mut client in clients {
        fixture.reactor.turn(None, true).unwrap();
        let mut hello = [0; 5];
        client.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
    }
}
