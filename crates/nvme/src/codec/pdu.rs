//! NVMe/TCP PDUs (TCP 1.0, 3.6.2).

use super::{put, u16_at, u32_at};

/// Longest PDU header in bytes: that of ICReq and ICResp.
pub const HEADER_BYTES_MAX: usize = 128;
/// Bytes of the header that all PDUs begin with.
pub const COMMON_BYTES: usize = 8;
/// Bytes of a header or data digest.
pub const DIGEST_BYTES: usize = 4;

/// PDU flag: a header digest follows the header.
pub const FLAG_HEADER_DIGEST: u8 = 1 << 0;
/// PDU flag: a data digest follows the data.
pub const FLAG_DATA_DIGEST: u8 = 1 << 1;
/// PDU flag of data PDUs: the last one of a transfer.
pub const FLAG_LAST: u8 = 1 << 2;
/// PDU flag of C2HData: the command succeeded, no response capsule follows.
pub const FLAG_SUCCESS: u8 = 1 << 3;

/// The kinds of PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PduType {
    /// Initialize Connection Request.
    IcReq,
    /// Initialize Connection Response.
    IcResp,
    /// Host to Controller Terminate Connection Request.
    H2cTermReq,
    /// Controller to Host Terminate Connection Request.
    C2hTermReq,
    /// Command Capsule.
    CapsuleCmd,
    /// Response Capsule.
    CapsuleResp,
    /// Host to Controller Data.
    H2cData,
    /// Controller to Host Data.
    C2hData,
    /// Ready to Transfer.
    R2t,
}

impl PduType {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::IcReq,
        Self::IcResp,
        Self::H2cTermReq,
        Self::C2hTermReq,
        Self::CapsuleCmd,
        Self::CapsuleResp,
        Self::H2cData,
        Self::C2hData,
        Self::R2t,
    ];

    /// Its code on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::IcReq => 0x00,
            Self::IcResp => 0x01,
            Self::H2cTermReq => 0x02,
            Self::C2hTermReq => 0x03,
            Self::CapsuleCmd => 0x04,
            Self::CapsuleResp => 0x05,
            Self::H2cData => 0x06,
            Self::C2hData => 0x07,
            Self::R2t => 0x09,
        }
    }

    /// The kind with this code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// HLEN: bytes of its header, without digest.
    pub const fn header_bytes(self) -> usize {
        match self {
            Self::IcReq | Self::IcResp => HEADER_BYTES_MAX,
            Self::CapsuleCmd => 72,
            Self::H2cTermReq
            | Self::C2hTermReq
            | Self::CapsuleResp
            | Self::H2cData
            | Self::C2hData
            | Self::R2t => 24,
        }
    }

    /// True if it has digests once they are negotiated.
    pub const fn is_digested(self) -> bool {
        match self {
            Self::IcReq | Self::IcResp | Self::H2cTermReq | Self::C2hTermReq => false,
            Self::CapsuleCmd | Self::CapsuleResp | Self::H2cData | Self::C2hData | Self::R2t => {
                true
            }
        }
    }

    /// True if data may follow its header.
    pub const fn may_carry_data(self) -> bool {
        match self {
            Self::IcReq | Self::IcResp | Self::CapsuleResp | Self::R2t => false,
            Self::H2cTermReq
            | Self::C2hTermReq
            | Self::CapsuleCmd
            | Self::H2cData
            | Self::C2hData => true,
        }
    }
}

/// Why a connection is terminated: the Fatal Error Status of a Terminate Connection Request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FatalError {
    /// A field of a PDU header is invalid.
    InvalidHeaderField,
    /// A PDU that may not come at this point.
    Sequence,
    /// The header digest does not match.
    HeaderDigest,
    /// Data outside the transfer that was asked for.
    DataOutOfRange,
    /// More data than allowed (to a host: more R2Ts than allowed).
    LimitExceeded,
    /// A parameter of ICReq or ICResp is not supported.
    UnsupportedParameter,
}

impl FatalError {
    /// FES on the wire.
    pub const fn code(self) -> u16 {
        match self {
            Self::InvalidHeaderField => 1,
            Self::Sequence => 2,
            Self::HeaderDigest => 3,
            Self::DataOutOfRange => 4,
            Self::LimitExceeded => 5,
            Self::UnsupportedParameter => 6,
        }
    }
}

/// What both sides say first: ICReq (`max` is MAXR2T, 0-based) and ICResp (`max` is MAXH2CDATA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initialize {
    /// PDU format version, 0.
    pub version: u16,
    /// HPDA or CPDA: required alignment of data in PDUs to this side, in dwords, 0-based.
    pub alignment: u8,
    /// Header digests wanted (ICReq) or used (ICResp).
    pub header_digest: bool,
    /// Data digests wanted (ICReq) or used (ICResp).
    pub data_digest: bool,
    /// MAXR2T or MAXH2CDATA.
    pub max: u32,
}

impl Initialize {
    /// The bytes after the common header.
    pub fn encode(&self) -> [u8; HEADER_BYTES_MAX - COMMON_BYTES] {
        let mut out = [0; HEADER_BYTES_MAX - COMMON_BYTES];
        put(&mut out, 0, &self.version.to_le_bytes());
        out[2] = self.alignment;
        out[3] = u8::from(self.header_digest) | (u8::from(self.data_digest) << 1);
        put(&mut out, 4, &self.max.to_le_bytes());
        out
    }

    /// From a whole header.
    pub fn decode(header: &[u8]) -> Self {
        Self {
            version: u16_at(header, 8),
            alignment: header[10],
            header_digest: header[11] & 1 != 0,
            data_digest: header[11] & 2 != 0,
            max: u32_at(header, 12),
        }
    }
}

/// H2CData, C2HData and R2T after their common header: which part of which command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// CCCID: the command's id.
    pub command_id: u16,
    /// TTAG; 0 in C2HData.
    pub transfer_tag: u16,
    /// Offset in the command's data, in bytes.
    pub offset: u32,
    /// Length in bytes.
    pub length: u32,
}

impl Transfer {
    /// The bytes after the common header.
    pub fn encode(&self) -> [u8; 16] {
        let mut out = [0; 16];
        put(&mut out, 0, &self.command_id.to_le_bytes());
        put(&mut out, 2, &self.transfer_tag.to_le_bytes());
        put(&mut out, 4, &self.offset.to_le_bytes());
        put(&mut out, 8, &self.length.to_le_bytes());
        out
    }

    /// From a whole header.
    pub fn decode(header: &[u8]) -> Self {
        Self {
            command_id: u16_at(header, 8),
            transfer_tag: u16_at(header, 10),
            offset: u32_at(header, 12),
            length: u32_at(header, 16),
        }
    }
}

/// A Terminate Connection Request after its common header: FES, FEI.
pub fn encode_terminate(error: FatalError, information: u32) -> [u8; 16] {
    let mut out = [0; 16];
    put(&mut out, 0, &error.code().to_le_bytes());
    put(&mut out, 2, &information.to_le_bytes());
    out
}
