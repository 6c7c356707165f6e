//! The receiving half of one connection: finds PDUs in the byte stream, checks what can be
//! checked without knowing commands, and puts data where the machine says.
//!
//! Headers arrive in a staging buffer, many PDUs to a receive. Data that has arrived with them
//! is copied to its place; when a page or more of it is still to come, the shell is given the
//! data's own buffer to receive the rest into.

use core::ops::Range;

use base::checksum::{crc32c, crc32c_append};
use base::limits::{PAGE_BYTES, PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES_MAX, SMALL_PAYLOAD_BYTES};
use base::planted::{self, Bug};
use base::{BufferMut, BufferPool};

use crate::codec::pdu::{
    COMMON_BYTES, DIGEST_BYTES, FLAG_DATA_DIGEST, FLAG_HEADER_DIGEST, FatalError, HEADER_BYTES_MAX,
    PduType,
};
use crate::codec::u32_at;
use crate::io::{ConnectionId, Receive, ReceiveRegion};

/// Data that a [`Sink::Small`] takes, at most.
pub(crate) const SMALL_DATA_BYTES: usize = 64;
/// Bytes asked for at once into staging: bounds what is copied of a large payload.
const STAGING_RECEIVE_BYTES_MAX: usize = 32 * 1024;
/// Data of a PDU, at most, before its command is looked at.
const DATA_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + RECORD_HEADER_BYTES_MAX;
/// Staging grows only while more large buffers than this are free.
const SPARE_BUFFERS: usize = 4;
/// No header with digest and padding is longer.
const HEADER_AREA_BYTES_MAX: usize = 255;

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Controller,
    Host,
}

impl Role {
    /// True if the other end may send PDUs of this kind.
    fn may_receive(self, kind: PduType) -> bool {
        match kind {
            PduType::IcReq | PduType::H2cTermReq | PduType::CapsuleCmd | PduType::H2cData => {
                self == Self::Controller
            }
            PduType::IcResp
            | PduType::C2hTermReq
            | PduType::CapsuleResp
            | PduType::C2hData
            | PduType::R2t => self == Self::Host,
        }
    }
}

/// A PDU whose header is complete and checked.
#[derive(Clone, Copy)]
pub(crate) struct Pdu {
    pub(crate) kind: PduType,
    pub(crate) flags: u8,
    /// The header; the first [`PduType::header_bytes`] are valid.
    pub(crate) header: [u8; HEADER_BYTES_MAX],
    /// Bytes of data that follow.
    pub(crate) data_bytes: usize,
    consumed: usize,
    data_digest: bool,
}

/// The connection cannot go on.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) error: FatalError,
    /// FEI: the offset of the field, or the digest.
    pub(crate) information: u32,
    /// The start of the PDU, for the Terminate Connection Request.
    pub(crate) header: Vec<u8>,
}

impl Violation {
    pub(crate) fn of(pdu: &Pdu, error: FatalError, information: u32) -> Self {
        Self::raw(&pdu.header[..pdu.kind.header_bytes()], error, information)
    }

    fn raw(bytes: &[u8], error: FatalError, information: u32) -> Self {
        let header = bytes[..bytes.len().min(HEADER_BYTES_MAX)].to_vec();
        Self { error, information, header }
    }
}

/// Where a PDU's data goes.
pub(crate) enum Sink {
    /// First `header` of the header page, then `payload` of the payload.
    Buffer { buffer: BufferMut, header: Range<usize>, payload: Range<usize> },
    /// Kept in the link: at most [`SMALL_DATA_BYTES`].
    Small,
    /// Nowhere.
    Discard,
}

/// Data that has arrived.
pub(crate) enum Arrived {
    Buffer(BufferMut),
    Small([u8; SMALL_DATA_BYTES], usize),
    Discarded,
}

/// What [`Link::poll`] found.
pub(crate) enum Step {
    /// Not enough bytes.
    Idle,
    /// A PDU. Call [`Link::accept`] to go on; without it the next poll finds the same PDU.
    Pdu(Pdu),
    /// The data of the accepted PDU, and whether its digest (if any) is right.
    Data { arrived: Arrived, intact: bool },
}

enum Place {
    Buffer { buffer: Option<BufferMut>, header: Range<usize>, payload: Range<usize> },
    Small([u8; SMALL_DATA_BYTES]),
    Discard,
}

enum State {
    Header,
    Data { place: Place, filled: usize, length: usize, digest: bool },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lent {
    Nothing,
    Staging,
    Direct,
}

/// What [`Link::arm`] wants.
pub(crate) enum Arm {
    /// Nothing: a receive is outstanding, or closed.
    Nothing,
    /// This receive.
    Receive(Receive),
    /// There is no buffer.
    Starved,
}

/// See the module.
pub(crate) struct Link {
    role: Role,
    staging: Option<BufferMut>,
    start: usize,
    end: usize,
    lent: Lent,
    lent_bytes: usize,
    state: State,
    /// Digests that the peer's PDUs carry.
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
    /// Payload bytes of the staging buffer to have: more for an I/O connection.
    pub(crate) staging_bytes: usize,
}

impl Link {
    pub(crate) fn new(role: Role) -> Self {
        Self {
            role,
            staging: None,
            start: 0,
            end: 0,
            lent: Lent::Nothing,
            lent_bytes: 0,
            state: State::Header,
            header_digest: false,
            data_digest: false,
            staging_bytes: 1,
        }
    }

    /// Takes back the buffer of a receive.
    pub(crate) fn received(&mut self, buffer: BufferMut, bytes: usize) {
        assert!(bytes <= self.lent_bytes, "the shell received more than the region holds");
        match core::mem::replace(&mut self.lent, Lent::Nothing) {
            Lent::Staging => {
                self.staging = Some(buffer);
                self.end += bytes;
            }
            Lent::Direct => {
                if let State::Data { place: Place::Buffer { buffer: home, .. }, filled, .. } =
                    &mut self.state
                {
                    *home = Some(buffer);
                    *filled += bytes;
                }
            }
            Lent::Nothing => unreachable!("the shell gave back a buffer that it was not lent"),
        }
    }

    /// Looks for the next PDU or the end of its data.
    pub(crate) fn poll(&mut self) -> Result<Step, Violation> {
        match &mut self.state {
            State::Header => self.poll_header(),
            State::Data { .. } => Ok(self.poll_data()),
        }
    }

    fn poll_header(&mut self) -> Result<Step, Violation> {
        let Some(staging) = &self.staging else { return Ok(Step::Idle) };
        let bytes = &staging.payload()[self.start..self.end];
        let Some(common) = bytes.first_chunk::<COMMON_BYTES>() else { return Ok(Step::Idle) };
        let field =
            |offset: u32| Err(Violation::raw(bytes, FatalError::InvalidHeaderField, offset));
        let Some(kind) = PduType::from_code(common[0]) else { return field(0) };
        if !self.role.may_receive(kind) {
            return field(0);
        }
        let flags = common[1];
        let header_bytes = kind.header_bytes();
        if usize::from(common[2]) != header_bytes {
            return field(2);
        }
        let header_digest = self.header_digest && kind.is_digested();
        if (flags & FLAG_HEADER_DIGEST != 0) != header_digest {
            return field(1);
        }
        let header_end = header_bytes + if header_digest { DIGEST_BYTES } else { 0 };
        let pdu_bytes = usize::try_from(u32_at(common, 4)).unwrap_or(usize::MAX);
        if pdu_bytes < header_end || (pdu_bytes > header_end && !kind.may_carry_data()) {
            return field(4);
        }
        let has_data = pdu_bytes > header_end;
        let data_digest = self.data_digest && kind.is_digested() && has_data;
        if (flags & FLAG_DATA_DIGEST != 0) != data_digest {
            return field(1);
        }
        let trailer = if data_digest { DIGEST_BYTES } else { 0 };
        let data_offset = match (has_data, kind.is_digested()) {
            (true, true) => usize::from(common[3]),
            (true, false) | (false, _) => header_end,
        };
        if data_offset < header_end || !data_offset.is_multiple_of(4) {
            return field(3);
        }
        // With data there is at least one byte of it.
        if has_data && pdu_bytes <= data_offset + trailer {
            return field(4);
        }
        let data_bytes = if has_data { pdu_bytes - data_offset - trailer } else { 0 };
        if data_bytes > DATA_BYTES_MAX {
            return field(4);
        }
        if bytes.len() < data_offset {
            return Ok(Step::Idle);
        }
        if header_digest {
            let stated = u32_at(bytes, header_bytes);
            if crc32c(&bytes[..header_bytes]) != stated && !planted::is(Bug::HeaderUnverified) {
                let header = &bytes[..header_bytes];
                return Err(Violation::raw(header, FatalError::HeaderDigest, stated));
            }
        }
        let mut header = [0; HEADER_BYTES_MAX];
        header[..header_bytes].copy_from_slice(&bytes[..header_bytes]);
        Ok(Step::Pdu(Pdu { kind, flags, header, data_bytes, consumed: data_offset, data_digest }))
    }

    /// Goes on after `pdu`, which the last poll found. A PDU without data needs no sink, and no
    /// [`Step::Data`] follows it.
    pub(crate) fn accept(&mut self, pdu: &Pdu, sink: Sink) {
        self.start += pdu.consumed;
        if pdu.data_bytes == 0 {
            return;
        }
        let place = match sink {
            Sink::Buffer { buffer, header, payload } => {
                assert_eq!(header.len() + payload.len(), pdu.data_bytes, "the sink fits the data");
                Place::Buffer { buffer: Some(buffer), header, payload }
            }
            Sink::Small => {
                assert!(pdu.data_bytes <= SMALL_DATA_BYTES, "the sink fits the data");
                Place::Small([0; SMALL_DATA_BYTES])
            }
            Sink::Discard => Place::Discard,
        };
        let digest = pdu.data_digest;
        self.state = State::Data { place, filled: 0, length: pdu.data_bytes, digest };
    }

    fn poll_data(&mut self) -> Step {
        let State::Data { place, filled, length, digest } = &mut self.state else {
            return Step::Idle;
        };
        if let Some(staging) = &self.staging {
            let bytes = &staging.payload()[self.start..self.end];
            let count = bytes.len().min(*length - *filled);
            place.fill(*filled, &bytes[..count]);
            *filled += count;
            self.start += count;
        }
        if *filled < *length {
            return Step::Idle;
        }
        let mut intact = true;
        if *digest {
            let Some(staging) = &self.staging else { return Step::Idle };
            let bytes = &staging.payload()[self.start..self.end];
            let Some(stated) = bytes.first_chunk::<DIGEST_BYTES>() else { return Step::Idle };
            intact = place.digest(*length).is_none_or(|crc| crc.to_le_bytes() == *stated);
            self.start += DIGEST_BYTES;
        }
        let length = *length;
        let State::Data { place, .. } = core::mem::replace(&mut self.state, State::Header) else {
            return Step::Idle;
        };
        let arrived = match place {
            Place::Buffer { buffer: Some(buffer), .. } => Arrived::Buffer(buffer),
            Place::Buffer { buffer: None, .. } => {
                unreachable!("data is complete only when its buffer is back")
            }
            Place::Small(bytes) => Arrived::Small(bytes, length),
            Place::Discard => Arrived::Discarded,
        };
        Step::Data { arrived, intact }
    }

    /// The receive to have outstanding now.
    pub(crate) fn arm(&mut self, connection: ConnectionId, pool: &BufferPool) -> Arm {
        if self.lent != Lent::Nothing {
            return Arm::Nothing;
        }
        if let Some((buffer, range)) = self.direct() {
            self.lent = Lent::Direct;
            self.lent_bytes = range.len();
            let min_bytes = range.len();
            let region = ReceiveRegion::Payload(range);
            return Arm::Receive(Receive { connection, buffer, region, min_bytes });
        }
        self.make_room(pool);
        let Some(staging) = self.staging.take() else { return Arm::Starved };
        let room = (staging.capacity() - self.end).min(STAGING_RECEIVE_BYTES_MAX);
        debug_assert!(room > 0, "a header and its data's start always leave room");
        self.lent = Lent::Staging;
        self.lent_bytes = room;
        let region = ReceiveRegion::Payload(self.end..self.end + room);
        Arm::Receive(Receive { connection, buffer: staging, region, min_bytes: 1 })
    }

    /// The rest of the payload, if there is enough of it to receive it into place.
    fn direct(&mut self) -> Option<(BufferMut, Range<usize>)> {
        let State::Data {
            place: Place::Buffer { buffer, header, payload }, filled, length, ..
        } = &mut self.state
        else {
            return None;
        };
        if self.start != self.end || *filled < header.len() || *length - *filled < PAGE_BYTES {
            return None;
        }
        let range = payload.start + (*filled - header.len())..payload.end;
        Some((buffer.take()?, range))
    }

    fn make_room(&mut self, pool: &BufferPool) {
        let wanted = self.staging_bytes;
        let have = self.staging.as_ref().map_or(0, BufferMut::capacity);
        // A larger staging buffer saves system calls, but never takes one that data may need.
        let spare = pool.available().1 > SPARE_BUFFERS;
        let wanted = if spare { wanted } else { wanted.min(SMALL_PAYLOAD_BYTES) };
        if have < wanted
            && let Some(mut larger) = pool.take(wanted)
        {
            if let Some(old) = &self.staging {
                let count = self.end - self.start;
                let target = &mut larger.payload_mut()[..count];
                target.copy_from_slice(&old.payload()[self.start..self.end]);
            }
            (self.start, self.end) = (0, self.end - self.start);
            self.staging = Some(larger);
        }
        let Some(staging) = &mut self.staging else { return };
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if staging.capacity() - self.end < HEADER_AREA_BYTES_MAX {
            staging.payload_mut().copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }
}

impl Place {
    /// Puts `bytes` at offset `filled` of the data.
    fn fill(&mut self, filled: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Buffer { buffer: Some(buffer), header, payload } => {
                let (page, area) = buffer.split_mut();
                let first = bytes.len().min(header.len().saturating_sub(filled));
                if first > 0 {
                    let at = header.start + filled;
                    page[at..at + first].copy_from_slice(&bytes[..first]);
                }
                let rest = &bytes[first..];
                if rest.is_empty() {
                    return;
                }
                let at = payload.start + (filled + first - header.len());
                area[at..at + rest.len()].copy_from_slice(rest);
            }
            Self::Buffer { buffer: None, .. } => {
                unreachable!("no bytes are in staging while the buffer is with the shell")
            }
            Self::Small(small) => small[filled..filled + bytes.len()].copy_from_slice(bytes),
            Self::Discard => {}
        }
    }

    /// CRC32C of the data; `None` if it was not kept.
    fn digest(&mut self, length: usize) -> Option<u32> {
        match self {
            Self::Buffer { buffer, header, payload } => {
                let (page, area) = buffer.as_mut()?.split_mut();
                Some(crc32c_append(crc32c(&page[header.clone()]), &area[payload.clone()]))
            }
            Self::Small(small) => Some(crc32c(&small[..length])),
            Self::Discard => None,
        }
    }
}
