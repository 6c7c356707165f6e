//! The messages between a process that leaves and the one that takes over, on a Unix socket.
//!
//! A frame is a header, a JSON document, and descriptors (`SCM_RIGHTS`), little-endian:
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic: `HFUPGRDE` |
//! | 8 | version of the frame: u16, 1 |
//! | 10 | 0: u16 |
//! | 12 | bytes of the document: u32 |
//! | 16 | descriptors: u32 |
//! | 20 | the document, then one byte for each 253 descriptors or part of that, which carries them |
//!
//! ```text
//! next: Hello{versions}         leaving: Welcome{version} | Refused{reason}
//! next: Take                    leaving: State + descriptors | Failed{reason}
//! next: Ready | Failed{reason}  leaving: Go
//! ```
//!
//! The two agree on the highest version of the *state* that both know; a release knows its own and
//! the one before, so releases that follow each other understand each other in both directions.
//! Fields that a version does not have are absent; fields that a reader does not know are an
//! error, since a state that is understood in part must not be gone on with.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use base::{Epoch, Position, ReplicaKey, Seq, ShardIndex, VolumeId};
use node::{Legacy, ReplicaGrant};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use store::{CleanSegment, LogLeft, ReplicaLog};
use vhost_blk::handover::{FdIndex, Handover, ListenerState};

use crate::control::ExportSpec;
use crate::handover::{Left, LeftExport};

/// The versions of the state that this program reads and writes. 2: front ends' back-end channels,
/// and read grants. 3: where the log is.
pub const VERSIONS: RangeInclusive<u16> = 1..=3;

const MAGIC: [u8; 8] = *b"HFUPGRDE";
const FRAME_VERSION: u16 = 1;
const HEADER_BYTES: usize = 20;
/// A document has at most so many bytes: some hundred for each of the queues of 1024 exports.
const DOCUMENT_BYTES_MAX: usize = 64 << 20;
/// Descriptors of a frame, at most.
const FDS_MAX: usize = 256 * 1024;
/// Descriptors that the kernel takes with one message (`SCM_MAX_FD`).
const FDS_PER_BYTE: usize = 253;

/// A message.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Frame {
    /// The next process is there.
    Hello {
        /// The lowest and the highest version of the state that it knows.
        versions: (u16, u16),
        /// What it is, for people.
        program: String,
    },
    /// The process that leaves would do so.
    Welcome {
        /// The version of the state that it will send.
        version: u16,
        /// What it is, for people.
        program: String,
        /// Whose data plane it is, so that the next one can prepare itself.
        about: BTreeMap<String, String>,
    },
    /// It would not.
    Refused {
        /// Why.
        reason: String,
    },
    /// The next process is prepared: now.
    Take,
    /// Everything, with its descriptors.
    State(State),
    /// It could not, and goes on as if nothing had been; or the next process cannot.
    Failed {
        /// Why.
        reason: String,
    },
    /// The next process serves.
    Ready,
    /// The process that leaves is gone for good.
    Go,
}

/// What the next process goes on with.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The replica service's listening socket.
    pub replicas: Option<FdIndex>,
    /// The exports.
    pub exports: Vec<ExportState>,
    /// Other descriptors, by what they are.
    pub named: BTreeMap<String, FdIndex>,
    /// What there is to say of the pool. Absent in version 1 of the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grants: Option<GrantsState>,
}

/// What heads may still count on at the pool's replicas, and where its log is.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantsState {
    /// The generation of the pool's metadata.
    pub generation: u64,
    /// Volume, shard, epoch, and the time that is left in nanoseconds.
    pub replicas: Vec<(VolumeId, u32, Epoch, u64)>,
    /// Absent in version 2 of the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogState>,
}

/// Where the pool's log is.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// Segments that must be looked at.
    pub segments: Vec<u32>,
    /// What each replica has of it.
    pub replicas: Vec<ReplicaLogState>,
}

/// The log of a replica.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaLogState {
    /// Its volume.
    pub volume: VolumeId,
    /// Its shard.
    pub shard: u32,
    /// Which of the replicas that had this key.
    pub incarnation: u32,
    /// Where it ends, if that is known.
    pub end: Option<Position>,
    /// Segments of which everything is home: number in the pool and in the log, first seq, epoch
    /// before.
    pub clean: Vec<(u32, u64, Seq, Epoch)>,
}

impl From<&LogLeft> for LogState {
    fn from(left: &LogLeft) -> Self {
        let clean = |clean: &CleanSegment| {
            (clean.segment, clean.ordinal, clean.first_seq, clean.previous_epoch)
        };
        let replica = |log: &ReplicaLog| ReplicaLogState {
            volume: log.key.volume,
            shard: log.key.shard.0,
            incarnation: log.incarnation,
            end: log.end,
            clean: log.clean.iter().map(clean).collect(),
        };
        Self {
            segments: left.segments.clone(),
            replicas: left.replicas.iter().map(replica).collect(),
        }
    }
}

impl From<LogState> for LogLeft {
    fn from(state: LogState) -> Self {
        let clean = |(segment, ordinal, first_seq, previous_epoch)| CleanSegment {
            segment,
            ordinal,
            first_seq,
            previous_epoch,
        };
        let replica = |log: ReplicaLogState| ReplicaLog {
            key: ReplicaKey { volume: log.volume, shard: ShardIndex(log.shard) },
            incarnation: log.incarnation,
            end: log.end,
            clean: log.clean.into_iter().map(clean).collect(),
        };
        Self {
            segments: state.segments,
            replicas: state.replicas.into_iter().map(replica).collect(),
        }
    }
}

impl GrantsState {
    fn of(legacy: &Legacy, version: u16) -> Self {
        let replica = |grant: &ReplicaGrant| {
            let left = u64::try_from(grant.left.as_nanos()).unwrap_or(u64::MAX);
            (grant.key.volume, grant.key.shard.0, grant.epoch, left)
        };
        let log = legacy.log.as_ref().filter(|_| version >= 3).map(LogState::from);
        let replicas = legacy.grants.iter().map(replica).collect();
        Self { generation: legacy.generation, replicas, log }
    }
}

impl From<GrantsState> for Legacy {
    fn from(state: GrantsState) -> Self {
        let replica = |(volume, shard, epoch, left)| ReplicaGrant {
            key: ReplicaKey { volume, shard: ShardIndex(shard) },
            epoch,
            left: Duration::from_nanos(left),
        };
        let grants = state.replicas.into_iter().map(replica).collect();
        Self { generation: state.generation, grants, log: state.log.map(LogLeft::from) }
    }
}

/// One export of a [`State`].
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportState {
    /// What it is.
    pub spec: ExportSpec,
    /// Its sockets and its front end; descriptors are counted from `first`.
    pub front_end: ListenerState,
    /// Its first descriptor.
    pub first: u32,
    /// How many it has.
    pub count: u32,
}

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other process is gone.
    #[error("the other process has ended")]
    Closed,
    /// It says nothing.
    #[error("no answer in {} ms", .0.as_millis())]
    Late(Duration),
    /// What came is no such message, or a damaged one.
    #[error("not understood: {0}")]
    Malformed(String),
    /// The system's error.
    #[error("{0}")]
    Io(io::Error),
}

fn malformed(what: impl core::fmt::Display) -> WireError {
    WireError::Malformed(format!("{what}"))
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Self::Closed,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late(Duration::ZERO),
            _ => Self::Io(error),
        }
    }
}

/// The version of the state that both sides know, the higher the better.
pub fn agree(ours: &RangeInclusive<u16>, theirs: (u16, u16)) -> Result<u16, String> {
    let highest = theirs.1.min(*ours.end());
    if theirs.0 <= theirs.1 && highest >= theirs.0 && ours.contains(&highest) {
        return Ok(highest);
    }
    Err(format!(
        "the new program knows versions {} to {} of the state to hand over, the running one {} to \
         {}; upgrade in smaller steps",
        theirs.0,
        theirs.1,
        ours.start(),
        ours.end()
    ))
}

/// One end of the connection.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Talks on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a frame, in at most `wait`.
    pub fn send(
        &mut self,
        frame: &Frame,
        fds: &[BorrowedFd<'_>],
        wait: Duration,
    ) -> Result<(), WireError> {
        let document = serde_json::to_vec(frame).map_err(malformed)?;
        assert!(document.len() <= DOCUMENT_BYTES_MAX && fds.len() <= FDS_MAX, "a state has limits");
        let length = |value: usize| u32::try_from(value).expect("below the limits").to_le_bytes();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + document.len());
        bytes.extend(MAGIC);
        bytes.extend(FRAME_VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(length(document.len()));
        bytes.extend(length(fds.len()));
        assert_eq!(bytes.len(), HEADER_BYTES);
        bytes.extend(document);
        self.stream.set_write_timeout(Some(wait.max(Duration::from_millis(1))))?;
        self.stream.write_all(&bytes)?;
        for part in fds.chunks(FDS_PER_BYTE) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_BYTE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(part)), "it has the room");
            sendmsg(&self.stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
                .map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// The next frame, within `wait`.
    pub fn receive(&mut self, wait: Duration) -> Result<(Frame, Vec<OwnedFd>), WireError> {
        let deadline = Instant::now() + wait;
        let late = |error: WireError| match error {
            WireError::Late(_) => WireError::Late(wait),
            other => other,
        };
        let mut header = [0; HEADER_BYTES];
        self.read(&mut header, deadline).map_err(late)?;
        let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, _, _, l0, l1, l2, l3, f0, f1, f2, f3] = header;
        if [m0, m1, m2, m3, m4, m5, m6, m7] != MAGIC {
            return Err(malformed("it does not begin as a hand-over message does"));
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != FRAME_VERSION {
            return Err(malformed(format!("frames of version {version}, not {FRAME_VERSION}")));
        }
        let size = |bytes| usize::try_from(u32::from_le_bytes(bytes)).expect("32 bits fit");
        let (length, count) = (size([l0, l1, l2, l3]), size([f0, f1, f2, f3]));
        if length > DOCUMENT_BYTES_MAX || count > FDS_MAX {
            return Err(malformed(format!("{length} bytes and {count} descriptors are too many")));
        }
        // Grows with what comes, not with what is announced.
        let mut document = Vec::new();
        let mut part = [0; 8 * 1024];
        while document.len() < length {
            let some = part.len().min(length - document.len());
            self.read(&mut part[..some], deadline).map_err(late)?;
            document.extend_from_slice(&part[..some]);
        }
        let mut fds = Vec::new();
        while fds.len() < count {
            let wanted = FDS_PER_BYTE.min(count - fds.len());
            let before = fds.len();
            self.receive_fds(&mut fds, deadline).map_err(late)?;
            if fds.len() - before != wanted {
                let got = fds.len() - before;
                return Err(malformed(format!("{got} descriptors came, not {wanted}")));
            }
        }
        let frame = serde_json::from_slice(&document).map_err(malformed)?;
        Ok((frame, fds))
    }

    fn set_deadline(&self, deadline: Instant) -> Result<(), WireError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        Ok(())
    }

    fn read(&mut self, to: &mut [u8], deadline: Instant) -> Result<(), WireError> {
        let mut filled = 0;
        while filled < to.len() {
            self.set_deadline(deadline)?;
            match self.stream.read(&mut to[filled..]) {
                Ok(0) => return Err(WireError::Closed),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn receive_fds(&mut self, fds: &mut Vec<OwnedFd>, deadline: Instant) -> Result<(), WireError> {
        self.set_deadline(deadline)?;
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_BYTE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(io::Error::from)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(WireError::Closed);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(malformed("descriptors were lost: the limit of open files is too low"));
        }
        Ok(())
    }
}

impl State {
    /// What there is to send of `left` to a process that reads this version, and its descriptors.
    pub fn pack<'a>(
        version: u16,
        left: &'a Left,
        named: &[(&str, BorrowedFd<'a>)],
    ) -> (Self, Vec<BorrowedFd<'a>>) {
        let mut fds: Vec<BorrowedFd<'a>> = Vec::new();
        let index = |fds: &Vec<BorrowedFd<'a>>| u32::try_from(fds.len()).expect("there are fewer");
        let replicas = left.listener.as_ref().map(|listener| {
            fds.push(listener.as_fd());
            FdIndex(index(&fds) - 1)
        });
        let named = named
            .iter()
            .map(|(name, fd)| {
                fds.push(*fd);
                ((*name).to_owned(), FdIndex(index(&fds) - 1))
            })
            .collect();
        let mut exports = Vec::new();
        for export in &left.exports {
            let first = index(&fds);
            fds.extend(export.front_end.fds().iter().map(AsFd::as_fd));
            let mut front_end = export.front_end.state().clone();
            if version < 2
                && let Some(connection) = &mut front_end.connection
            {
                connection.channel = None;
            }
            exports.push(ExportState {
                spec: export.spec.clone(),
                front_end,
                first,
                count: index(&fds) - first,
            });
        }
        let legacy = left.legacy.as_ref().filter(|_| version >= 2);
        let grants = legacy.map(|legacy| GrantsState::of(legacy, version));
        (Self { replicas, exports, named, grants }, fds)
    }

    /// What was received: what is left, and the named descriptors.
    pub fn unpack(self, fds: Vec<OwnedFd>) -> Result<(Left, BTreeMap<String, OwnedFd>), WireError> {
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let mut take = |index: u32| {
            let slot = usize::try_from(index).ok().and_then(|at| fds.get_mut(at));
            slot.and_then(Option::take).ok_or_else(|| {
                malformed(format!("descriptor {index} did not come, or is named twice"))
            })
        };
        let listener = self.replicas.map(|index| take(index.0)).transpose()?;
        let mut named = BTreeMap::new();
        for (name, index) in self.named {
            named.insert(name, take(index.0)?);
        }
        let mut exports = Vec::new();
        for export in self.exports {
            let end = export.first.checked_add(export.count).ok_or_else(|| malformed("a range"))?;
            let own: Result<Vec<OwnedFd>, WireError> = (export.first..end).map(&mut take).collect();
            let front_end = Handover::new(export.front_end, own?);
            exports.push(LeftExport { spec: export.spec, front_end });
        }
        Ok((Left { listener, exports, legacy: self.grants.map(Legacy::from) }, named))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, Channel) {
        let (one, other) = UnixStream::pair().unwrap();
        (Channel::new(one), Channel::new(other))
    }

    fn file(text: &str) -> OwnedFd {
        use std::io::Seek;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    }

    #[test]
    fn frames_and_more_descriptors_than_fit_one_message_arrive() {
        let (mut one, mut other) = pair();
        let files: Vec<OwnedFd> = (0..600).map(|n| file(&n.to_string())).collect();
        let frame = Frame::Failed { reason: "x".repeat(100_000) };
        let sender = std::thread::spawn(move || {
            let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
            one.send(&frame, &fds, WAIT).unwrap();
            one.send(&Frame::Go, &[], WAIT).unwrap();
        });
        let (frame, fds) = other.receive(WAIT).unwrap();
        assert_eq!(frame, Frame::Failed { reason: "x".repeat(100_000) });
        assert_eq!(fds.len(), 600);
        for (n, fd) in fds.into_iter().enumerate() {
            let mut text = String::new();
            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
            assert_eq!(text, n.to_string());
        }
        assert_eq!(other.receive(WAIT).unwrap().0, Frame::Go);
        sender.join().unwrap();
        assert!(matches!(other.receive(WAIT), Err(WireError::Closed)));
    }

    #[test]
    fn every_truncation_and_every_changed_header_byte_is_an_error() {
        let mut whole = Vec::new();
        {
            let (mut one, other) = pair();
            one.send(&Frame::Refused { reason: "no".to_owned() }, &[], WAIT).unwrap();
            drop(one);
            (&other.stream).read_to_end(&mut whole).unwrap();
        }
        for length in 0..whole.len() {
            let (one, mut other) = pair();
            (&one.stream).write_all(&whole[..length]).unwrap();
            drop(one);
            assert!(matches!(other.receive(WAIT), Err(WireError::Closed)), "{length} bytes");
        }
        for at in (0..10).chain(12..whole.len()) {
            for flip in [0x01, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let (one, mut other) = pair();
                (&one.stream).write_all(&bytes).unwrap();
                drop(one);
                // A changed letter within the reason is still a reason.
                let received = other.receive(WAIT);
                let letter =
                    matches!(&received, Ok((Frame::Refused { reason }, _)) if reason != "no");
                assert!(received.is_err() || letter, "byte {at}");
            }
        }
        let (_silent, mut other) = pair();
        let late = other.receive(Duration::from_millis(20));
        assert!(matches!(late, Err(WireError::Late(_))), "{late:?}");
    }

    #[test]
    fn announced_descriptors_that_do_not_come_are_an_error() {
        let (one, mut other) = pair();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend([1, 0, 0, 0, 6, 0, 0, 0, 3, 0, 0, 0]);
        bytes.extend(b"\"Take\"");
        bytes.push(0);
        (&one.stream).write_all(&bytes).unwrap();
        let error = other.receive(WAIT).unwrap_err();
        assert!(error.to_string().contains("0 descriptors came, not 3"), "{error}");
        let (one, mut other) = pair();
        bytes[12..20].copy_from_slice(&[0xff; 8]);
        (&one.stream).write_all(&bytes).unwrap();
        assert!(matches!(other.receive(WAIT), Err(WireError::Malformed(_))));
    }

    #[test]
    fn states_name_each_descriptor_once_and_no_unknown_field() {
        let state = |replicas, lock| State {
            replicas: Some(FdIndex(replicas)),
            exports: Vec::new(),
            named: BTreeMap::from([("lock".to_owned(), FdIndex(lock))]),
            grants: None,
        };
        let fds = || vec![file("a"), file("b")];
        let (left, named) = state(1, 0).unpack(fds()).unwrap();
        assert!(left.listener.is_some() && named.contains_key("lock"));
        assert!(state(0, 0).unpack(fds()).is_err());
        assert!(state(0, 2).unpack(fds()).is_err());
        let text = serde_json::to_string(&Frame::State(state(0, 1))).unwrap();
        assert_eq!(serde_json::from_str::<Frame>(&text).unwrap(), Frame::State(state(0, 1)));
        let more = text.replace("\"exports\"", "\"surprise\":1,\"exports\"");
        assert!(serde_json::from_str::<Frame>(&more).is_err());
    }

    #[test]
    fn the_version_before_gets_what_it_can_read() {
        use vhost_blk::handover::{ChannelState, ConnectionState};
        let channel = ChannelState { socket: FdIndex(2), known_blocks: Some(7) };
        let connection = ConnectionState {
            stream: FdIndex(1),
            features: Some(1),
            protocol_features: None,
            memory: Vec::new(),
            inflight: None,
            log: None,
            rings: Vec::new(),
            channel: Some(channel),
        };
        let state = ListenerState {
            path: "/disk".into(),
            file: (1, 2),
            socket: FdIndex(0),
            connection: Some(connection),
        };
        let spec = ExportSpec {
            volume: base::VolumeId::from_bytes([1; 16]),
            blocks: 7,
            block_size: base::BlockSize::B512,
            socket: "/disk".into(),
            queues: 1,
            read_only: false,
        };
        let front_end = Handover::new(state, vec![file("a"), file("b"), file("c")]);
        let key = ReplicaKey { volume: spec.volume, shard: ShardIndex(3) };
        let grant = ReplicaGrant { key, epoch: Epoch(4), left: Duration::from_millis(5) };
        let clean =
            CleanSegment { segment: 5, ordinal: 2, first_seq: Seq(3), previous_epoch: Epoch(1) };
        let end = Some(Position::new(Epoch(4), Seq(9)));
        let log = ReplicaLog { key, incarnation: 8, end, clean: vec![clean] };
        let log = LogLeft { segments: vec![2, 6], replicas: vec![log] };
        let legacy = Legacy { generation: 6, grants: vec![grant], log: Some(log) };
        let exports = vec![LeftExport { spec, front_end }];
        let left = Left { listener: None, exports, legacy: Some(legacy.clone()) };
        let packed = |version| {
            let (state, fds) = State::pack(version, &left, &[]);
            let text = serde_json::to_string(&Frame::State(state)).unwrap();
            let fds: Vec<OwnedFd> = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            let Frame::State(state) = serde_json::from_str(&text).unwrap() else { panic!() };
            let (left, _) = state.unpack(fds).unwrap();
            let connection = left.exports[0].front_end.state().connection.clone().unwrap();
            (text, connection, left.legacy)
        };
        let (text, before, none) = packed(1);
        assert!(!text.contains("channel") && before.channel.is_none());
        assert!(!text.contains("grants") && none.is_none());
        assert_eq!(before.features, Some(1));
        let (text, now, second) = packed(2);
        assert!(now.channel.is_some() && !text.contains("log\":{"));
        assert_eq!(second, Some(Legacy { log: None, ..legacy.clone() }));
        assert_eq!(packed(3).2, Some(legacy));
    }

    #[test]
    fn neighbouring_versions_agree_and_others_are_told_why_not() {
        for (ours, theirs, agreed) in [
            (1..=1, (1, 1), Some(1)),
            (1..=2, (1, 1), Some(1)),
            (1..=1, (1, 2), Some(1)),
            (1..=2, (2, 3), Some(2)),
            (2..=3, (1, 2), Some(2)),
            (1..=2, (1, 2), Some(2)),
            (2..=3, (1, 1), None),
            (1..=1, (2, 3), None),
            (1..=1, (2, 1), None),
        ] {
            assert_eq!(agree(&ours, theirs).ok(), agreed, "{ours:?} and {theirs:?}");
        }
        assert!(agree(&(1..=1), (2, 3)).unwrap_err().contains("smaller steps"));
    }
}
