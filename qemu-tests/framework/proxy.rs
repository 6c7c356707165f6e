//! A slow or broken network in front of one server: a TCP relay that delays, holds or resets.
//!
//! Others reach the server at the relay's address, so that to them it answers late, or not at
//! all, while it and its connections are real. Data is never lost or reordered within a
//! connection, as TCP promises: what is held arrives when the relay lets go.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Chunks under way in one direction of one connection, at most; more stay with the sender.
const CHUNKS_MAX: usize = 256;

/// A running relay. Dropping it closes every connection through it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How long each byte is under way, in each direction.
    delay: Duration,
    /// Nothing passes.
    held: bool,
    closed: bool,
    connections: Vec<TcpStream>,
}

struct Chunk {
    read_at: Instant,
    bytes: Vec<u8>,
}

impl Proxy {
    /// Relays what connects to `listen` to `target`, which need not be there yet.
    pub fn start(listen: SocketAddr, target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(listen)
            .with_context(|| format!("a relay cannot listen at {listen}"))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { target, state: Mutex::default(), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || accepting.accept(&listener))?;
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on every byte takes this long in each direction.
    pub fn delay(&self, each_way: Duration) {
        self.shared.change(|state| state.delay = each_way);
    }

    /// From now on nothing passes, and nothing is closed: new connections are taken and silent.
    pub fn hold(&self) {
        self.shared.change(|state| state.held = true);
    }

    /// The end of [`Proxy::hold`]: what was held arrives.
    pub fn release(&self) {
        self.shared.change(|state| state.held = false);
    }

    /// Breaks every connection; new ones are taken.
    pub fn reset(&self) {
        self.shared.change(State::break_connections);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.closed = true;
            state.break_connections();
        });
        // Wakes the thread that accepts; it sees that it is to end.
        drop(TcpStream::connect(self.address));
    }
}

impl State {
    fn break_connections(&mut self) {
        for connection in self.connections.drain(..) {
            // It may be gone already.
            drop(connection.shutdown(Shutdown::Both));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for incoming in listener.incoming() {
            if self.lock().closed {
                return;
            }
            // A client that went away, or a server that is not there: the client sees it close.
            let Ok(incoming) = incoming else { continue };
            drop(self.relay(incoming));
        }
    }

    fn relay(self: &Arc<Self>, incoming: TcpStream) -> io::Result<()> {
        let outgoing = TcpStream::connect(self.target)?;
        incoming.set_nodelay(true)?;
        outgoing.set_nodelay(true)?;
        {
            let mut state = self.lock();
            state.connections.push(incoming.try_clone()?);
            state.connections.push(outgoing.try_clone()?);
        }
        self.pump(incoming.try_clone()?, outgoing.try_clone()?)?;
        self.pump(outgoing, incoming)
    }

    /// Starts moving bytes from one socket to the other.
    fn pump(self: &Arc<Self>, from: TcpStream, to: TcpStream) -> io::Result<()> {
        let (sender, receiver) = sync_channel(CHUNKS_MAX);
        thread::Builder::new().name("relay in".to_owned()).spawn(move || read(from, &sender))?;
        let shared = Arc::clone(self);
        thread::Builder::new().name("relay out".to_owned()).spawn(move || {
            // Whatever ends one direction ends the connection.
            drop(shared.write(&to, &receiver));
            drop(to.shutdown(Shutdown::Both));
        })?;
        Ok(())
    }

    fn write(&self, mut to: &TcpStream, chunks: &Receiver<Chunk>) -> io::Result<()> {
        while let Ok(chunk) = chunks.recv() {
            if !self.wait_for_turn(chunk.read_at) {
                return Ok(());
            }
            to.write_all(&chunk.bytes)?;
        }
        Ok(())
    }

    /// Waits until what was read then may go on; false if the relay has ended.
    fn wait_for_turn(&self, read_at: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.closed {
                return false;
            }
            let left = state.delay.saturating_sub(read_at.elapsed());
            if !state.held && left.is_zero() {
                return true;
            }
            let wait = if state.held { Duration::from_secs(1) } else { left };
            let woken = self.changed.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn read(mut from: TcpStream, chunks: &SyncSender<Chunk>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                let chunk = Chunk { read_at: Instant::now(), bytes: buffer[..length].to_vec() };
                if chunks.send(chunk).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                thread::spawn(move || {
                    let mut bytes = [0; 16];
                    while let Ok(length @ 1..) = connection.read(&mut bytes) {
                        connection.write_all(&bytes[..length]).unwrap();
                    }
                });
            }
        });
        address
    }

    fn round_trip(connection: &mut TcpStream) -> Duration {
        let start = Instant::now();
        connection.write_all(b"x").unwrap();
        connection.read_exact(&mut [0]).unwrap();
        start.elapsed()
    }

    #[test]
    fn it_delays_holds_and_resets() {
        let proxy = Proxy::start("127.0.0.1:0".parse().unwrap(), echo()).unwrap();
        let mut connection = TcpStream::connect(proxy.address()).unwrap();
        round_trip(&mut connection);
        proxy.delay(Duration::from_millis(20));
        assert!(round_trip(&mut connection) >= Duration::from_millis(40));
        proxy.delay(Duration::ZERO);

        proxy.hold();
        connection.write_all(b"y").unwrap();
        connection.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let held = connection.read(&mut [0]).unwrap_err();
        assert!(matches!(held.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
        connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        proxy.release();
        let mut late = [0];
        connection.read_exact(&mut late).unwrap();
        assert_eq!(&late, b"y");

        proxy.reset();
        assert!(matches!(connection.read(&mut [0]), Ok(0) | Err(_)));
        round_trip(&mut TcpStream::connect(proxy.address()).unwrap());
    }
}
