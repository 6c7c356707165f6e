//! Outputs in order, with the small PDUs of a turn built side by side in one pool buffer.

use std::collections::VecDeque;

use base::checksum::{crc32c, crc32c_append};
use base::limits::SMALL_PAYLOAD_BYTES;
use base::{Buffer, BufferMut, BufferPool};

use crate::codec::pdu::{
    COMMON_BYTES, DIGEST_BYTES, FLAG_DATA_DIGEST, FLAG_HEADER_DIGEST, HEADER_BYTES_MAX, PduType,
};
use crate::io::ConnectionId;

/// An output type that has a variant for sending.
pub(crate) trait SendOutput {
    fn send(connection: ConnectionId, part: Buffer) -> Self;
}

/// How PDUs to one peer are framed, as negotiated by ICReq and ICResp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Framing {
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
    /// The peer's HPDA or CPDA: data starts at a multiple of (this + 1) × 4 bytes.
    pub(crate) alignment: u8,
}

/// The data of a PDU.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    None,
    /// Copied next to the header.
    Inline(&'a [u8]),
    /// Sent as they are.
    Parts(&'a [&'a Buffer]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Inline(bytes) => bytes.len(),
            Self::Parts(parts) => parts.iter().map(|part| part.len()).sum(),
        }
    }

    fn digest(&self) -> u32 {
        match self {
            Self::None => 0,
            Self::Inline(bytes) => crc32c(bytes),
            Self::Parts(parts) => {
                parts.iter().fold(0, |crc, part| crc32c_append(crc, part.bytes()))
            }
        }
    }
}

enum Item<O> {
    /// Bytes of the open page.
    Page {
        connection: ConnectionId,
        start: usize,
        end: usize,
    },
    Ready(O),
}

/// Longest piece built at once: header, digest, padding, inline data, digest.
const PIECE_BYTES_MAX: usize = 1024;
const _: () = assert!(PIECE_BYTES_MAX <= SMALL_PAYLOAD_BYTES);

/// The queue of outputs of a machine.
pub(crate) struct Outbox<O> {
    items: VecDeque<Item<O>>,
    page: Option<BufferMut>,
    used: usize,
    pool: BufferPool,
}

impl<O: SendOutput> Outbox<O> {
    pub(crate) fn new(pool: BufferPool) -> Self {
        Self { items: VecDeque::with_capacity(1024), page: None, used: 0, pool }
    }

    pub(crate) fn push(&mut self, output: O) {
        self.items.push_back(Item::Ready(output));
    }

    pub(crate) fn pop(&mut self) -> Option<O> {
        if let Some(Item::Page { .. }) = self.items.front() {
            self.freeze();
        }
        match self.items.pop_front()? {
            Item::Ready(output) => Some(output),
            Item::Page { .. } => unreachable!("freezing has made all of them ready"),
        }
    }

    /// Queues a PDU: `body` is its header after the common part. Gives its length in bytes.
    pub(crate) fn pdu(
        &mut self,
        connection: ConnectionId,
        framing: Framing,
        kind: PduType,
        flags: u8,
        body: &[u8],
        data: Data<'_>,
    ) -> usize {
        debug_assert_eq!(COMMON_BYTES + body.len(), kind.header_bytes());
        let header_bytes = COMMON_BYTES + body.len();
        let data_bytes = data.len();
        let header_digest = framing.header_digest && kind.is_digested();
        let data_digest = framing.data_digest && kind.is_digested() && data_bytes > 0;
        let digest_bytes = |on: bool| if on { DIGEST_BYTES } else { 0 };
        let mut data_offset = header_bytes + digest_bytes(header_digest);
        if data_bytes > 0 && kind.is_digested() {
            data_offset = data_offset.next_multiple_of((usize::from(framing.alignment) + 1) * 4);
        }
        let pdu_bytes = data_offset + data_bytes + digest_bytes(data_digest);

        let mut piece = [0; PIECE_BYTES_MAX];
        piece[0] = kind.code();
        piece[1] = flags
            | if header_digest { FLAG_HEADER_DIGEST } else { 0 }
            | if data_digest { FLAG_DATA_DIGEST } else { 0 };
        piece[2] = u8::try_from(header_bytes).expect("headers have at most 128 bytes");
        if data_bytes > 0 && kind.is_digested() {
            piece[3] = u8::try_from(data_offset).expect("at most 72 + 4, aligned to 128");
        }
        let stated = u32::try_from(pdu_bytes).expect("data is bounded by limits");
        piece[4..8].copy_from_slice(&stated.to_le_bytes());
        piece[COMMON_BYTES..header_bytes].copy_from_slice(body);
        if header_digest {
            let crc = crc32c(&piece[..header_bytes]);
            piece[header_bytes..header_bytes + DIGEST_BYTES].copy_from_slice(&crc.to_le_bytes());
        }
        let trailer = data.digest_if(data_digest);
        match data {
            Data::None => self.write(connection, &piece[..data_offset]),
            Data::Inline(bytes) => {
                piece[data_offset..data_offset + data_bytes].copy_from_slice(bytes);
                if let Some(trailer) = trailer {
                    piece[pdu_bytes - DIGEST_BYTES..pdu_bytes].copy_from_slice(&trailer);
                }
                self.write(connection, &piece[..pdu_bytes]);
            }
            Data::Parts(parts) => {
                self.write(connection, &piece[..data_offset]);
                for part in parts.iter().filter(|part| !part.is_empty()) {
                    self.push(O::send(connection, (*part).clone()));
                }
                if let Some(trailer) = trailer {
                    self.write(connection, &trailer);
                }
            }
        }
        pdu_bytes
    }

    fn write(&mut self, connection: ConnectionId, bytes: &[u8]) {
        if self.page.as_ref().is_some_and(|page| page.capacity() - self.used < bytes.len()) {
            self.freeze();
        }
        if self.page.is_none() {
            self.page = self.pool.take(SMALL_PAYLOAD_BYTES);
            self.used = 0;
        }
        let Some(page) = &mut self.page else {
            // No buffer is free. What has to be said here frees buffers at the other end or at
            // this one, so it must not wait; its amount is bounded by the commands outstanding.
            self.push(O::send(connection, Buffer::copied_from(bytes)));
            return;
        };
        let (start, end) = (self.used, self.used + bytes.len());
        page.payload_mut()[start..end].copy_from_slice(bytes);
        self.used = end;
        match self.items.back_mut() {
            Some(Item::Page { connection: last, start: _, end: last_end })
                if *last == connection && *last_end == start =>
            {
                *last_end = end;
            }
            _ => self.items.push_back(Item::Page { connection, start, end }),
        }
    }

    /// Makes all bytes of the open page ready to send.
    fn freeze(&mut self) {
        let Some(page) = self.page.take() else { return };
        let bytes = page.freeze().payload(self.used);
        self.used = 0;
        for item in &mut self.items {
            if let Item::Page { connection, start, end } = item {
                *item = Item::Ready(O::send(*connection, bytes.slice(*start..*end)));
            }
        }
    }
}

impl Data<'_> {
    fn digest_if(&self, on: bool) -> Option<[u8; DIGEST_BYTES]> {
        on.then(|| self.digest().to_le_bytes())
    }
}

const _: () = assert!(HEADER_BYTES_MAX + 128 + DIGEST_BYTES + 512 <= PIECE_BYTES_MAX);
