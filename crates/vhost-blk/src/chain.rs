//! From a head descriptor to a validated block request (virtio 1.3, 2.7.5 and 5.2.6).
//!
//! Every descriptor is copied out of guest memory once and the copy is checked. Loops, indices
//! out of range, wrong directions, indirect tables inside indirect tables, empty buffers, memory
//! that is not the guest's: all end in an error for that chain, none in a panic or a long walk.

use core::ops::Range;

use base::Status;

use crate::DeviceConfig;
use crate::config::SECTOR_BYTES;
use crate::dirty::DirtyLog;
use crate::memory::GuestMemory;
use crate::ring::{Descriptor, Ring};

/// Descriptors in a chain, at most, those in an indirect table included: what SEG_MAX allows, and
/// some that carry header and status. It bounds the memory that a hostile guest can make us use.
fn descriptors_max(config: &DeviceConfig) -> usize {
    usize::try_from(config.seg_max).unwrap_or(usize::MAX).saturating_add(8)
}

const HEADER_BYTES: u64 = 16;
const DESCRIPTOR_BYTES: u32 = 16;
const RANGE_BYTES: u64 = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const RANGE_F_UNMAP: u32 = 1;

/// The status byte for a status; `None` if the guest gets no answer yet, because nothing was
/// decided: the request is kept and sent again.
pub(crate) fn status_byte(status: Status) -> Option<u8> {
    match status {
        Status::Ok => Some(S_OK),
        Status::ReadOnly | Status::InvalidRange | Status::IoError => Some(S_IOERR),
        Status::Unsupported => Some(S_UNSUPP),
        Status::Superseded => None,
    }
}

/// A piece of guest memory in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) gpa: u64,
    pub(crate) bytes: u32,
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// What becomes of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ask the head.
    Run(Kind),
    /// Answer with the serial.
    Id,
    /// Answer at once.
    Reject(Status),
}

/// A block range of a discard or write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockRange {
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
}

/// A parsed chain. Its vectors keep their memory from one use to the next.
#[derive(Debug, Default)]
pub(crate) struct Body {
    segments: Vec<Segment>,
    /// The data among the segments: what the guest writes, or what it reads.
    data: Range<usize>,
    /// Where the status byte goes, if the chain has a place for it.
    pub(crate) status_gpa: Option<u64>,
    /// Bytes that the device may write, the status byte included.
    pub(crate) writable_bytes: u32,
    /// Of a read or write.
    pub(crate) range: Option<BlockRange>,
    /// Of a discard or write-zeroes.
    pub(crate) ranges: Vec<BlockRange>,
}

/// Where a copy from the guest stands.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    segment: usize,
    offset: u32,
}

impl Body {
    /// Walks the chain at `head` and parses it.
    pub(crate) fn parse(
        &mut self,
        ring: &Ring,
        memory: &GuestMemory,
        head: u16,
        indirect: bool,
        config: &DeviceConfig,
    ) -> Verdict {
        self.segments.clear();
        self.ranges.clear();
        self.data = 0..0;
        self.status_gpa = None;
        self.writable_bytes = 0;
        self.range = None;
        let mut walk = Walk {
            memory,
            segments: &mut self.segments,
            segments_max: descriptors_max(config),
            readable: 0,
            writable: false,
        };
        match walk.chain(ring, head, indirect) {
            Ok(()) => {
                let readable = walk.readable;
                self.interpret(memory, readable, config)
            }
            Err(reason) => {
                tracing::debug!(head, reason, "malformed descriptor chain");
                Verdict::Reject(Status::IoError)
            }
        }
    }

    fn interpret(
        &mut self,
        memory: &GuestMemory,
        readable: usize,
        config: &DeviceConfig,
    ) -> Verdict {
        let total = |segments: &[Segment]| -> u64 {
            segments.iter().map(|segment| u64::from(segment.bytes)).sum()
        };
        let from_guest = total(&self.segments[..readable]);
        let to_guest = total(&self.segments[readable..]);
        // The used ring's length field has 32 bits, and no request needs more.
        let (Ok(writable_bytes), Ok(_)) = (u32::try_from(to_guest), u32::try_from(from_guest))
        else {
            return Verdict::Reject(Status::IoError);
        };
        if writable_bytes == 0 {
            return Verdict::Reject(Status::IoError);
        }
        self.writable_bytes = writable_bytes;
        let last = self.segments.len() - 1;
        self.segments[last].bytes -= 1;
        self.status_gpa =
            Some(self.segments[last].gpa.wrapping_add(u64::from(self.segments[last].bytes)));
        if from_guest < HEADER_BYTES {
            return Verdict::Reject(Status::IoError);
        }
        let mut header = [0; 16];
        let mut cursor = Cursor::default();
        self.data = 0..readable;
        if !self.read_data(memory, &mut cursor, &mut header) {
            return Verdict::Reject(Status::IoError);
        }
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let request = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let out_bytes = from_guest - HEADER_BYTES;
        let in_bytes = to_guest - 1;
        let refuse_write = config.read_only.then_some(Verdict::Reject(Status::ReadOnly));
        match request {
            T_IN if out_bytes > 0 => Verdict::Reject(Status::IoError),
            T_IN => {
                self.data = readable..self.segments.len();
                self.transfer(Kind::Read, sector, in_bytes, config)
            }
            T_OUT | T_DISCARD | T_WRITE_ZEROES if in_bytes > 0 => Verdict::Reject(Status::IoError),
            T_OUT => refuse_write.unwrap_or_else(|| {
                self.data_after(readable, cursor);
                self.transfer(Kind::Write, sector, out_bytes, config)
            }),
            T_FLUSH => Verdict::Run(Kind::Flush),
            T_GET_ID => {
                self.data = readable..self.segments.len();
                Verdict::Id
            }
            T_DISCARD => refuse_write.unwrap_or_else(|| {
                self.data_after(readable, cursor);
                self.block_ranges(memory, Kind::Discard, out_bytes, config)
            }),
            T_WRITE_ZEROES => refuse_write.unwrap_or_else(|| {
                self.data_after(readable, cursor);
                self.block_ranges(memory, Kind::WriteZeroes, out_bytes, config)
            }),
            _ => Verdict::Reject(Status::Unsupported),
        }
    }

    /// Makes the data what follows `cursor` in the first `readable` segments.
    fn data_after(&mut self, readable: usize, cursor: Cursor) {
        if let Some(segment) = self.segments[..readable].get_mut(cursor.segment) {
            segment.gpa = segment.gpa.wrapping_add(u64::from(cursor.offset));
            segment.bytes -= cursor.offset;
        }
        self.data = cursor.segment..readable;
    }

    fn transfer(&mut self, kind: Kind, sector: u64, bytes: u64, config: &DeviceConfig) -> Verdict {
        match block_range(sector, bytes, config) {
            Some(range) if range.blocks > 0 => {
                self.range = Some(range);
                Verdict::Run(kind)
            }
            _ => Verdict::Reject(Status::InvalidRange),
        }
    }

    fn block_ranges(
        &mut self,
        memory: &GuestMemory,
        kind: Kind,
        bytes: u64,
        config: &DeviceConfig,
    ) -> Verdict {
        let zeroes = kind == Kind::WriteZeroes;
        let (segments_max, sectors_max) = if zeroes {
            (config.max_write_zeroes_seg, config.max_write_zeroes_sectors)
        } else {
            (config.max_discard_seg, config.max_discard_sectors)
        };
        let count = bytes / RANGE_BYTES;
        if !bytes.is_multiple_of(RANGE_BYTES) || count == 0 || count > u64::from(segments_max) {
            return Verdict::Reject(Status::IoError);
        }
        let flags_known = if zeroes { RANGE_F_UNMAP } else { 0 };
        let mut cursor = Cursor::default();
        for _ in 0..count {
            let mut raw = [0; 16];
            if !self.read_data(memory, &mut cursor, &mut raw) {
                return Verdict::Reject(Status::IoError);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if u32::from_le_bytes([f0, f1, f2, f3]) & !flags_known != 0 {
                return Verdict::Reject(Status::Unsupported);
            }
            let range = block_range(sector, u64::from(sectors) * SECTOR_BYTES, config);
            match range {
                Some(range) if sectors <= sectors_max => self.ranges.push(range),
                _ => return Verdict::Reject(Status::InvalidRange),
            }
        }
        self.ranges.retain(|range| range.blocks > 0);
        if self.ranges.is_empty() { Verdict::Reject(Status::Ok) } else { Verdict::Run(kind) }
    }

    /// Copies the data's next bytes, from `cursor` on, out of guest memory into `to`; false if
    /// there are not as many, or they are not mapped.
    #[must_use]
    pub(crate) fn read_data(
        &self,
        memory: &GuestMemory,
        cursor: &mut Cursor,
        to: &mut [u8],
    ) -> bool {
        let segments = &self.segments[self.data.clone()];
        let mut to = to;
        while !to.is_empty() {
            let Some(segment) = segments.get(cursor.segment) else { return false };
            let left = segment.bytes - cursor.offset;
            let bytes = to.len().min(left as usize);
            let (now, later) = to.split_at_mut(bytes);
            if !memory.read(segment.gpa.wrapping_add(u64::from(cursor.offset)), now) {
                return false;
            }
            to = later;
            advance(cursor, segment.bytes, bytes);
        }
        true
    }

    /// Copies `from` to the data at byte `offset`, in guest memory; false if there is not as much
    /// room, or it is not mapped.
    #[must_use]
    pub(crate) fn write_data(
        &self,
        memory: &GuestMemory,
        offset: u64,
        from: &[u8],
        log: Option<&DirtyLog>,
    ) -> bool {
        let mut skip = offset;
        let mut from = from;
        for segment in &self.segments[self.data.clone()] {
            if from.is_empty() {
                break;
            }
            let bytes = u64::from(segment.bytes);
            if skip >= bytes {
                skip -= bytes;
                continue;
            }
            let room = usize::try_from(bytes - skip).unwrap_or(usize::MAX);
            let (now, later) = from.split_at(from.len().min(room));
            if !memory.write(segment.gpa.wrapping_add(skip), now, log) {
                return false;
            }
            from = later;
            skip = 0;
        }
        from.is_empty()
    }

    /// Bytes of the data.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.segments[self.data.clone()].iter().map(|segment| u64::from(segment.bytes)).sum()
    }
}

fn advance(cursor: &mut Cursor, segment_bytes: u32, bytes: usize) {
    let moved = u32::try_from(bytes).expect("no more than the segment's bytes, a u32");
    cursor.offset += moved;
    if cursor.offset == segment_bytes {
        *cursor = Cursor { segment: cursor.segment + 1, offset: 0 };
    }
}

/// Sectors in blocks, if they are whole blocks of the volume.
fn block_range(sector: u64, bytes: u64, config: &DeviceConfig) -> Option<BlockRange> {
    let start = sector.checked_mul(SECTOR_BYTES)?;
    let lba = config.block_size.blocks(start)?;
    let blocks = config.block_size.blocks(bytes)?;
    if lba.checked_add(blocks)? > config.blocks {
        return None;
    }
    Some(BlockRange { lba, blocks })
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    segments: &'a mut Vec<Segment>,
    segments_max: usize,
    readable: usize,
    writable: bool,
}

impl Walk<'_> {
    fn chain(&mut self, ring: &Ring, head: u16, indirect: bool) -> Result<(), &'static str> {
        let mut index = head;
        // A chain visits each descriptor at most once, so more steps are a loop.
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index).ok_or("descriptor index out of range")?;
            if descriptor.is_indirect() {
                if !indirect {
                    return Err("indirect descriptor without the feature");
                }
                if descriptor.has_next() {
                    return Err("indirect descriptor with a next one");
                }
                return self.indirect(descriptor);
            }
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err("loop of descriptors")
    }

    fn indirect(&mut self, table: Descriptor) -> Result<(), &'static str> {
        if table.bytes == 0 || !table.bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err("indirect table of a wrong length");
        }
        let entries = table.bytes / DESCRIPTOR_BYTES;
        let mut index = 0_u32;
        for _ in 0..entries {
            if index >= entries {
                return Err("index out of the indirect table's range");
            }
            let at = table.gpa.checked_add(u64::from(index * DESCRIPTOR_BYTES));
            let mut raw = [0; DESCRIPTOR_BYTES as usize];
            if !at.is_some_and(|at| self.memory.read(at, &mut raw)) {
                return Err("indirect table outside of guest memory");
            }
            let descriptor = Descriptor::decode(raw);
            if descriptor.is_indirect() {
                return Err("indirect descriptor in an indirect table");
            }
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next);
        }
        Err("loop in an indirect table")
    }

    fn push(&mut self, descriptor: Descriptor) -> Result<(), &'static str> {
        if descriptor.bytes == 0 {
            return Err("empty buffer");
        }
        if self.segments.len() >= self.segments_max {
            return Err("too many descriptors");
        }
        if self.writable && !descriptor.is_writable() {
            return Err("readable buffer after a writable one");
        }
        if !self.memory.contains(descriptor.gpa, u64::from(descriptor.bytes)) {
            return Err("buffer outside of guest memory");
        }
        if descriptor.is_writable() {
            self.writable = true;
        } else {
            self.readable += 1;
        }
        self.segments.push(Segment { gpa: descriptor.gpa, bytes: descriptor.bytes });
        Ok(())
    }
}

#[cfg(test)]
impl Body {
    /// The guest address of every data byte.
    pub(crate) fn data_addresses(&self) -> Vec<u64> {
        let segments = &self.segments[self.data.clone()];
        segments.iter().flat_map(|piece| piece.gpa..piece.gpa + u64::from(piece.bytes)).collect()
    }
}
