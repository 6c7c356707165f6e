//! Connections between processes, as TCP keeps them: bytes arrive in order or not at all, late, in
//! random pieces; a connection stalls or breaks, and the other end may not hear of that for long.

use std::collections::{BTreeMap, VecDeque};

use base::{Buffer, BufferMut, Instant};
use core::time::Duration;
use node::ConnectionId;
use nvme::ReceiveRegion;

use crate::random::Random;

/// One end of a connection: the process, which life of it, and its name for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct End {
    pub(crate) process: usize,
    pub(crate) life: u64,
    pub(crate) connection: ConnectionId,
}

/// An end's number; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Socket(u32);

impl Socket {
    pub(crate) fn number(self) -> u64 {
        self.0.into()
    }
}

/// Bytes that may wait at a reader, or be on the way to it; a writer's further bytes wait with it.
const WINDOW_BYTES: usize = 4 << 20;
/// What is written in one go leaves in segments of so many bytes at most.
const SEGMENT_BYTES: usize = 64 << 10;
/// So much of a segment is likely a header.
const HEADER_BYTES: usize = 72;
/// TCP's first retransmission time-out.
const RETRANSMIT_NANOS: u64 = 200_000_000;
/// A silent partition's backlog comes at the latest so long after its end.
const BACKOFF_NANOS_MAX: u64 = 2_000_000_000;

/// What the network wants done later.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Later {
    /// Bytes, or the end of them, may have arrived.
    Deliver(Socket),
    /// Bytes of a writer that waited for room have left.
    Sent(Socket, usize),
    /// The connection is gone.
    Closed(Socket),
    /// An end whose other end is gone tries to say something again.
    Retransmit(Socket),
}

/// A receive that a process has under way.
struct Pending {
    buffer: BufferMut,
    region: ReceiveRegion,
}

/// Bytes on the way.
#[derive(Clone, Copy)]
struct Segment {
    sent: Instant,
    arrives: Instant,
    bytes: usize,
}

/// One end and the pipe that it reads.
struct SocketState {
    end: End,
    peer: Socket,
    open: bool,
    bytes: VecDeque<u8>,
    /// How many of the bytes have arrived.
    arrived: usize,
    segments: VecDeque<Segment>,
    last_arrival: Instant,
    receive: Option<Pending>,
    /// The writer has closed; the reader learns of it after the bytes, not before this time.
    ended: Option<Instant>,
    /// What this end has to send and the window has no room for.
    unsent: VecDeque<Buffer>,
}

/// The way from one process to another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    /// Nothing arrives before.
    pub(crate) blocked_until: Instant,
    /// How long it was blocked in one go, for the backoff.
    blocked_nanos: u64,
    /// Segments are lost, and so late, once in so many times.
    pub(crate) loss: Option<(u64, Instant)>,
    /// Segments have a bit flipped once in so many times.
    pub(crate) corruption: Option<(u64, Instant)>,
    /// Half of them at a segment's beginning, where headers are.
    pub(crate) corrupts_headers: bool,
    /// Everything takes up to so many nanoseconds longer.
    pub(crate) extra: Option<(u64, Instant)>,
    /// A byte takes so many nanoseconds.
    pub(crate) byte_nanos: Option<(u64, Instant)>,
    busy_until: Instant,
}

impl Link {
    fn is_sound(&self, now: Instant) -> bool {
        let over = |until: Option<Instant>| until.is_none_or(|until| until <= now);
        self.blocked_until <= now
            && over(self.loss.map(|(_, until)| until))
            && over(self.corruption.map(|(_, until)| until))
            && over(self.extra.map(|(_, until)| until))
            && over(self.byte_nanos.map(|(_, until)| until))
    }
}

/// What a delivery gave.
pub(crate) struct Delivery {
    pub(crate) end: End,
    pub(crate) buffer: BufferMut,
    pub(crate) bytes: usize,
}

/// All connections.
pub(crate) struct Network {
    sockets: Vec<SocketState>,
    by_end: BTreeMap<End, Socket>,
    processes: usize,
    links: Vec<Link>,
    random: Random,
    /// Now and then something takes a hundred times longer.
    hiccups: bool,
    later: Vec<(Instant, Later)>,
    /// Segments whose bits were flipped, lost segments.
    pub(crate) corrupted: u64,
    pub(crate) lost: u64,
}

impl Network {
    pub(crate) fn new(processes: usize, seed: u64, hiccups: bool) -> Self {
        Self {
            sockets: Vec::new(),
            by_end: BTreeMap::new(),
            processes,
            links: vec![Link::default(); processes * processes],
            random: Random::of(seed, "network"),
            hiccups,
            later: Vec::new(),
            corrupted: 0,
            lost: 0,
        }
    }

    /// What is to be done later, once.
    pub(crate) fn take_later(&mut self) -> Option<(Instant, Later)> {
        self.later.pop()
    }

    pub(crate) fn link(&mut self, from: usize, to: usize) -> &mut Link {
        &mut self.links[from * self.processes + to]
    }

    /// Nothing passes from one process to another until then; nobody is told. What is on its way is
    /// lost, too, half of the times: it comes when it is sent again.
    pub(crate) fn block(&mut self, now: Instant, from: usize, to: usize, until: Instant) {
        let link = self.link(from, to);
        if until > link.blocked_until {
            link.blocked_until = until;
            link.blocked_nanos = u64::try_from(until.since(now).as_nanos()).expect("seconds");
        }
        if from != to && self.random.one_in(2) {
            self.lose_segments(now, from, to);
        }
    }

    /// What is on its way from one process to another is lost: it comes after the link is open again.
    fn lose_segments(&mut self, now: Instant, from: usize, to: usize) {
        let Link { blocked_until, blocked_nanos, .. } = *self.link(from, to);
        let backoff = blocked_nanos.clamp(1, BACKOFF_NANOS_MAX);
        for number in 0..self.sockets.len() {
            let socket = &self.sockets[number];
            let peer = self.sockets[socket.peer.0 as usize].end.process;
            let late = !socket.open || socket.last_arrival <= now || socket.end.process != to;
            if late || peer != from {
                continue;
            }
            let again = blocked_until + Duration::from_nanos(self.random.below(backoff));
            let socket = &mut self.sockets[number];
            for segment in socket.segments.iter_mut().filter(|segment| segment.arrives > now) {
                segment.arrives = segment.arrives.max(again);
            }
            socket.last_arrival = socket.last_arrival.max(again);
            socket.ended = socket.ended.map(|at| if at > now { at.max(again) } else { at });
            let number = Socket(u32::try_from(number).expect("few connections"));
            self.later.push((again, Later::Deliver(number)));
            self.lost += 1;
        }
    }

    pub(crate) fn is_open(&self, now: Instant, from: usize, to: usize) -> bool {
        self.links[from * self.processes + to].blocked_until <= now
    }

    /// All faults of the network end.
    pub(crate) fn heal(&mut self, now: Instant) {
        for link in &mut self.links {
            *link = Link { busy_until: now, ..Link::default() };
        }
        for number in 0..self.sockets.len() {
            let socket = &mut self.sockets[number];
            if !socket.open || socket.segments.is_empty() && socket.ended.is_none() {
                continue;
            }
            let at = now + Duration::from_nanos(self.random.below(RETRANSMIT_NANOS));
            for segment in &mut socket.segments {
                segment.arrives = segment.arrives.min(at);
            }
            socket.last_arrival = socket.last_arrival.min(at);
            socket.ended = socket.ended.map(|ended| ended.min(at));
            let number = Socket(u32::try_from(number).expect("few connections"));
            self.later.push((at, Later::Deliver(number)));
        }
    }

    /// When what is sent now arrives.
    fn arrival(&mut self, now: Instant, from: usize, to: usize, bytes: usize) -> Instant {
        let hiccup = self.hiccups && self.random.one_in(500);
        let mut nanos = if hiccup {
            self.random.between(1_000_000, 30_000_000)
        } else {
            self.random.between(5_000, 60_000)
        };
        let index = from * self.processes + to;
        let link = self.links[index];
        if let Some((most, until)) = link.extra
            && now < until
        {
            nanos += self.random.below(most);
        }
        if let Some((times, until)) = link.loss
            && now < until
            && self.random.one_in(times)
        {
            self.lost += 1;
            nanos += RETRANSMIT_NANOS << self.random.below(3);
        }
        let byte_nanos = match link.byte_nanos {
            Some((byte_nanos, until)) if now < until => byte_nanos,
            Some(_) | None => 1,
        };
        let start = link.busy_until.max(now);
        let done = start + Duration::from_nanos(byte_nanos * bytes as u64);
        self.links[index].busy_until = done;
        let mut at = done + Duration::from_nanos(nanos);
        if at < link.blocked_until {
            let backoff = link.blocked_nanos.clamp(1, BACKOFF_NANOS_MAX);
            at = link.blocked_until + Duration::from_nanos(self.random.below(backoff));
        }
        at
    }

    /// Joins two ends.
    pub(crate) fn join(&mut self, a: End, b: End) {
        let first = u32::try_from(self.sockets.len()).expect("few connections");
        for (end, number, peer) in [(a, first, first + 1), (b, first + 1, first)] {
            self.by_end.insert(end, Socket(number));
            self.sockets.push(SocketState {
                end,
                peer: Socket(peer),
                open: true,
                bytes: VecDeque::new(),
                arrived: 0,
                segments: VecDeque::new(),
                last_arrival: Instant::ZERO,
                receive: None,
                ended: None,
                unsent: VecDeque::new(),
            });
        }
    }

    fn state(&mut self, socket: Socket) -> &mut SocketState {
        &mut self.sockets[socket.0 as usize]
    }

    /// The end that a socket is, while it is open.
    pub(crate) fn end(&self, socket: Socket) -> Option<End> {
        let state = &self.sockets[socket.0 as usize];
        state.open.then_some(state.end)
    }

    /// Writes at one end; gives how many bytes left at once.
    pub(crate) fn send(&mut self, now: Instant, from: End, part: Buffer) -> usize {
        let Some(socket) = self.by_end.get(&from).copied() else { return 0 };
        let peer = self.state(socket).peer;
        if !self.state(peer).open {
            let at = now + Duration::from_nanos(self.random.between(20_000, 200_000));
            self.later.push((at, Later::Retransmit(socket)));
            return part.len();
        }
        if self.state(peer).bytes.len() >= WINDOW_BYTES || !self.state(socket).unsent.is_empty() {
            self.state(socket).unsent.push_back(part);
            return 0;
        }
        self.transmit(now, peer, from.process, &part);
        part.len()
    }

    fn transmit(&mut self, now: Instant, to: Socket, from: usize, part: &Buffer) {
        let process = self.state(to).end.process;
        let bytes = part.bytes();
        if self.join_segment(now, to, from, bytes) {
            return;
        }
        let at = self.arrival(now, from, process, bytes.len());
        let corrupt = self.link(from, process).corruption.is_some_and(|(_, until)| now < until);
        let times = self.link(from, process).corruption.map_or(1, |(times, _)| times);
        let headers = self.link(from, process).corrupts_headers;
        let flip = (corrupt && self.random.one_in(times)).then(|| {
            let at_start = headers && self.random.one_in(2);
            let most = if at_start { bytes.len().min(HEADER_BYTES) } else { bytes.len() };
            (self.random.index(most), self.random.below(8))
        });
        let state = self.state(to);
        let start = state.bytes.len();
        state.bytes.extend(bytes);
        if let Some((index, bit)) = flip {
            state.bytes[start + index] ^= 1 << bit;
        }
        let at = at.max(state.last_arrival);
        state.last_arrival = at;
        state.segments.push_back(Segment { sent: now, arrives: at, bytes: bytes.len() });
        self.corrupted += u64::from(flip.is_some());
        self.later.push((at, Later::Deliver(to)));
    }

    /// Parts that are written at the same moment leave in one segment, if there is nothing wrong with the
    /// link; else each fares on its own.
    fn join_segment(&mut self, now: Instant, to: Socket, from: usize, bytes: &[u8]) -> bool {
        let process = self.state(to).end.process;
        let sound = self.link(from, process).is_sound(now);
        let state = &mut self.sockets[to.0 as usize];
        let Some(segment) = state.segments.back_mut().filter(|_| sound) else { return false };
        if segment.sent != now || segment.bytes + bytes.len() > SEGMENT_BYTES {
            return false;
        }
        segment.bytes += bytes.len();
        state.bytes.extend(bytes);
        true
    }

    /// Starts a receive. The buffer is dropped if the connection is gone.
    pub(crate) fn receive(
        &mut self,
        now: Instant,
        at: End,
        buffer: BufferMut,
        region: ReceiveRegion,
    ) {
        let Some(socket) = self.by_end.get(&at).copied() else { return };
        let state = self.state(socket);
        assert!(state.receive.is_none(), "one receive at a time");
        state.receive = Some(Pending { buffer, region });
        if state.arrived > 0
            || state.segments.front().is_some_and(|segment| segment.arrives <= now)
            || state.ended.is_some()
        {
            let at = now + Duration::from_nanos(self.random.between(1_000, 8_000));
            self.later.push((at, Later::Deliver(socket)));
        }
    }

    /// Delivers some of the bytes that wait at an end, if a receive is under way there.
    pub(crate) fn deliver(&mut self, now: Instant, socket: Socket) -> Option<Delivery> {
        let piece = self.random.bits();
        let state = self.state(socket);
        while let Some(segment) = state.segments.front().copied()
            && segment.arrives <= now
        {
            state.arrived += segment.bytes;
            state.segments.pop_front();
        }
        let over = state.segments.is_empty() && state.ended.is_some_and(|at| at <= now);
        if !state.open || state.receive.is_none() || (state.arrived == 0 && !over) {
            return None;
        }
        let mut pending = state.receive.take().expect("it was there just now");
        let most = state.arrived.min(pending.region.len());
        let bytes = match piece % 4 {
            0 if most > 0 => usize::try_from(1 + (piece >> 2) % most as u64).expect("fits"),
            _ => most,
        };
        let out = &mut pending.region.bytes(&mut pending.buffer)[..bytes];
        let (front, back) = state.bytes.as_slices();
        let split = front.len().min(bytes);
        out[..split].copy_from_slice(&front[..split]);
        out[split..].copy_from_slice(&back[..bytes - split]);
        state.bytes.drain(..bytes);
        state.arrived -= bytes;
        let end = state.end;
        self.refill(now, socket);
        Some(Delivery { end, buffer: pending.buffer, bytes })
    }

    /// The reader has made room: the writer's bytes that waited go out.
    fn refill(&mut self, now: Instant, reader: Socket) {
        let writer = self.state(reader).peer;
        let mut sent = 0;
        while self.state(reader).bytes.len() < WINDOW_BYTES
            && let Some(part) = self.state(writer).unsent.pop_front()
        {
            sent += part.len();
            let from = self.state(writer).end.process;
            self.transmit(now, reader, from, &part);
        }
        if sent > 0 && self.state(writer).open {
            let at = now + Duration::from_nanos(self.random.between(10_000, 100_000));
            self.later.push((at, Later::Sent(writer, sent)));
        }
    }

    /// One end closes after what it had to send. The other reads that and then the end, unless it
    /// is not to be told.
    pub(crate) fn shut(&mut self, now: Instant, end: End, silently: bool) -> bool {
        let Some(socket) = self.by_end.remove(&end) else { return false };
        let peer = self.state(socket).peer;
        let unsent = std::mem::take(&mut self.state(socket).unsent);
        if self.state(peer).open && !silently {
            for part in unsent {
                self.transmit(now, peer, end.process, &part);
            }
            let process = self.state(peer).end.process;
            let at = self.arrival(now, end.process, process, 0).max(self.state(peer).last_arrival);
            self.state(peer).ended = Some(at);
            self.later.push((at, Later::Deliver(peer)));
        }
        let state = self.state(socket);
        state.open = false;
        state.receive = None;
        state.bytes = VecDeque::new();
        state.segments = VecDeque::new();
        true
    }

    /// The connection breaks: both ends are told, each as soon as the network lets it know.
    pub(crate) fn reset(&mut self, now: Instant, end: End) {
        let Some(socket) = self.by_end.get(&end).copied() else { return };
        let peer = self.state(socket).peer;
        for (to, from) in [(socket, peer), (peer, socket)] {
            let (to_process, from_process) =
                (self.state(to).end.process, self.state(from).end.process);
            let at = self.arrival(now, from_process, to_process, 0);
            self.later.push((at, Later::Closed(to)));
        }
    }

    /// An end speaks to nobody: it is told so if the network lets it know, else tries again.
    /// Gives the end if the connection is gone.
    pub(crate) fn retransmit(
        &mut self,
        now: Instant,
        socket: Socket,
        is_up: impl Fn(usize) -> bool,
    ) -> Option<End> {
        let end = self.end(socket)?;
        let peer = self.state(socket).peer;
        let other = self.state(peer).end.process;
        if is_up(other)
            && self.is_open(now, end.process, other)
            && self.is_open(now, other, end.process)
        {
            return self.gone(socket);
        }
        let nanos = RETRANSMIT_NANOS + self.random.below(RETRANSMIT_NANOS);
        self.later.push((now + Duration::from_nanos(nanos), Later::Retransmit(socket)));
        None
    }

    /// The kernel ends a connection of which it learnt that it is broken; gives the end that has to
    /// be told.
    pub(crate) fn gone(&mut self, socket: Socket) -> Option<End> {
        let end = self.end(socket)?;
        self.by_end.remove(&end);
        let state = self.state(socket);
        state.open = false;
        state.receive = None;
        state.unsent.clear();
        state.bytes = VecDeque::new();
        state.segments = VecDeque::new();
        Some(end)
    }

    /// A process is gone, and all its ends with it.
    pub(crate) fn break_all(&mut self, now: Instant, process: usize, silently: bool) {
        let ends: Vec<End> =
            self.by_end.keys().filter(|end| end.process == process).copied().collect();
        for end in ends {
            self.shut(now, end, silently);
        }
    }

    /// Bytes that a process has given to be sent and that have no room on their way.
    pub(crate) fn unsent_bytes(&self, process: usize) -> usize {
        let ends = self.by_end.iter().filter(|(end, _)| end.process == process);
        let unsent = ends.flat_map(|(_, socket)| &self.sockets[socket.0 as usize].unsent);
        unsent.map(Buffer::len).sum()
    }

    /// Some connection of a process, if it has any.
    pub(crate) fn any_of(&self, process: usize, random: &mut Random) -> Option<End> {
        let ends: Vec<End> =
            self.by_end.keys().filter(|end| end.process == process).copied().collect();
        if ends.is_empty() { None } else { Some(random.choose(&ends)) }
    }
}
