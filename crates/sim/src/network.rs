//! Connections between processes: two byte pipes each, delivered in random pieces.

use std::collections::{BTreeMap, VecDeque};

use base::BufferMut;
use node::ConnectionId;
use nvme::ReceiveRegion;

use crate::random::Random;

/// One end of a connection: the process and its name for the connection.
pub(crate) type End = (usize, ConnectionId);

/// A receive that a process has under way.
struct Pending {
    buffer: BufferMut,
    region: ReceiveRegion,
}

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    receive: Option<Pending>,
    /// The writer has closed; the reader learns of it after the bytes.
    ended: bool,
}

/// What a delivery gave.
pub(crate) struct Delivery {
    pub(crate) buffer: BufferMut,
    pub(crate) bytes: usize,
}

/// All connections. A pipe is named by the end that reads it.
#[derive(Default)]
pub(crate) struct Network {
    pipes: BTreeMap<End, Pipe>,
    peers: BTreeMap<End, End>,
}

impl Network {
    /// Joins two ends.
    pub(crate) fn join(&mut self, a: End, b: End) {
        self.peers.insert(a, b);
        self.peers.insert(b, a);
        self.pipes.insert(a, Pipe::default());
        self.pipes.insert(b, Pipe::default());
    }

    /// The other end.
    pub(crate) fn peer(&self, end: End) -> Option<End> {
        self.peers.get(&end).copied()
    }

    /// Writes bytes at one end; they arrive at the other.
    pub(crate) fn send(&mut self, from: End, bytes: &[u8]) {
        if let Some(peer) = self.peers.get(&from)
            && let Some(pipe) = self.pipes.get_mut(peer)
        {
            pipe.bytes.extend(bytes);
        }
    }

    /// Starts a receive. The buffer is dropped if the connection is gone.
    pub(crate) fn receive(&mut self, at: End, buffer: BufferMut, region: ReceiveRegion) {
        if let Some(pipe) = self.pipes.get_mut(&at) {
            assert!(pipe.receive.is_none(), "one receive at a time");
            pipe.receive = Some(Pending { buffer, region });
        }
    }

    /// Delivers some of the bytes that wait at an end, if a receive is under way there.
    pub(crate) fn deliver(&mut self, at: End, random: &mut Random) -> Option<Delivery> {
        let pipe = self.pipes.get_mut(&at)?;
        if pipe.receive.is_none() || (pipe.bytes.is_empty() && !pipe.ended) {
            return None;
        }
        let mut pending = pipe.receive.take().expect("it was there just now");
        let most = pipe.bytes.len().min(pending.region.len());
        let bytes = match random.below(4) {
            0 if most > 0 => usize::try_from(random.between(1, most as u64)).expect("fits"),
            _ => most,
        };
        let out = &mut pending.region.bytes(&mut pending.buffer)[..bytes];
        for (to, from) in out.iter_mut().zip(pipe.bytes.drain(..bytes)) {
            *to = from;
        }
        Some(Delivery { buffer: pending.buffer, bytes })
    }

    /// One end closes in good order. The other reads what was sent and then the end.
    pub(crate) fn shut(&mut self, end: End) -> Option<End> {
        self.pipes.remove(&end);
        let peer = self.peers.remove(&end)?;
        if let Some(pipe) = self.pipes.get_mut(&peer) {
            pipe.ended = true;
        }
        Some(peer)
    }

    /// Every connection of a process breaks; gives the other ends.
    pub(crate) fn break_all(&mut self, process: usize) -> Vec<End> {
        let ends: Vec<End> = self.pipes.keys().filter(|end| end.0 == process).copied().collect();
        ends.into_iter().filter_map(|end| self.shut(end)).collect()
    }

    /// One random connection of a process, if it has any.
    pub(crate) fn any_of(&self, process: usize, random: &mut Random) -> Option<End> {
        let ends: Vec<End> = self.pipes.keys().filter(|end| end.0 == process).copied().collect();
        if ends.is_empty() { None } else { Some(ends[random.index(ends.len())]) }
    }
}
