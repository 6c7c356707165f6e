//! Completion status (base 2.0, 4.2.3 and figures 91 to 95).

use core::fmt;

/// Status Code Type and Status Code, and the Do Not Retry bit. The layout is the status field's
/// without the phase bit: SC in bits 7:0, SCT in 10:8, DNR in bit 14.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StatusCode(pub u16);

const DNR: u16 = 1 << 14;

const fn generic(code: u16) -> StatusCode {
    StatusCode(code | DNR)
}

const fn specific(code: u16) -> StatusCode {
    StatusCode(0x100 | code | DNR)
}

impl StatusCode {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Self = generic(0x01);
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Self = generic(0x02);
    /// Command ID Conflict.
    pub const COMMAND_ID_CONFLICT: Self = generic(0x03);
    /// Data Transfer Error; may be retried.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);
    /// Internal Error; may be retried.
    pub const INTERNAL: Self = Self(0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Self = Self(0x07);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Self = generic(0x0b);
    /// Command Sequence Error.
    pub const SEQUENCE_ERROR: Self = generic(0x0c);
    /// SGL Descriptor Type Invalid.
    pub const SGL_TYPE_INVALID: Self = generic(0x11);
    /// Data SGL Length Invalid.
    pub const SGL_LENGTH_INVALID: Self = generic(0x0f);
    /// SGL Offset Invalid.
    pub const SGL_OFFSET_INVALID: Self = generic(0x16);
    /// Host Identifier Inconsistent Format.
    pub const HOST_ID_INCONSISTENT: Self = generic(0x18);
    /// Keep Alive Timer Invalid (the value is not supported).
    pub const KEEP_ALIVE_INVALID: Self = generic(0x1a);
    /// Namespace is Write Protected.
    pub const WRITE_PROTECTED: Self = generic(0x20);
    /// Transient Transport Error; may be retried.
    pub const TRANSIENT_TRANSPORT: Self = Self(0x22);
    /// LBA Out of Range.
    pub const LBA_RANGE: Self = generic(0x80);
    /// Namespace Not Ready; may be retried.
    pub const NAMESPACE_NOT_READY: Self = Self(0x82);
    /// Asynchronous Event Request Limit Exceeded.
    pub const EVENT_LIMIT: Self = specific(0x05);
    /// Invalid Log Page.
    pub const INVALID_LOG_PAGE: Self = specific(0x09);
    /// Feature Identifier Not Saveable.
    pub const FEATURE_NOT_SAVEABLE: Self = specific(0x0d);
    /// Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Self = specific(0x0e);
    /// Connect Incompatible Format.
    pub const CONNECT_FORMAT: Self = specific(0x80);
    /// Connect Controller Busy; may be retried.
    pub const CONNECT_BUSY: Self = Self(0x181);
    /// Connect Invalid Parameters.
    pub const CONNECT_INVALID: Self = specific(0x82);
    /// Connect Invalid Host.
    pub const CONNECT_HOST: Self = specific(0x84);
    /// Unrecovered Read Error.
    pub const UNRECOVERED_READ: Self = Self(0x281);
    /// Internal Path Error: this controller cannot serve the command now, another one may.
    pub const PATH_INTERNAL: Self = Self(0x300);
    /// Asymmetric Access Inaccessible.
    pub const PATH_INACCESSIBLE: Self = Self(0x302);

    /// A vendor-specific status (SCT 7h).
    pub const fn vendor(code: u8, retry: bool) -> Self {
        Self(0x700 | code as u16 | if retry { 0 } else { DNR })
    }

    /// The status field of a completion: bits 15:1, phase bit zero.
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// From the status field of a completion.
    pub const fn from_wire(field: u16) -> Self {
        Self((field >> 1) & 0x7fff)
    }

    /// SCT and SC, without hints.
    pub const fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// True for success.
    pub const fn is_success(self) -> bool {
        self.code() == 0
    }

    /// The status of a block request for a stock initiator.
    pub const fn of_block(status: base::Status) -> Self {
        match status {
            base::Status::Ok => Self::SUCCESS,
            base::Status::ReadOnly => Self::WRITE_PROTECTED,
            base::Status::InvalidRange => Self::LBA_RANGE,
            base::Status::Unsupported => Self::INVALID_OPCODE,
            base::Status::IoError => Self::UNRECOVERED_READ,
            base::Status::Superseded => Self::PATH_INTERNAL,
        }
    }

    /// The same in reverse, as an initiator reports it.
    pub const fn to_block(self) -> base::Status {
        let code = self.code();
        if code == 0 {
            base::Status::Ok
        } else if code == Self::WRITE_PROTECTED.code() {
            base::Status::ReadOnly
        } else if code == Self::LBA_RANGE.code() {
            base::Status::InvalidRange
        } else if code == Self::INVALID_OPCODE.code() {
            base::Status::Unsupported
        } else if code == Self::PATH_INTERNAL.code() {
            base::Status::Superseded
        } else {
            base::Status::IoError
        }
    }
}

impl fmt::Debug for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SCT {:x}h SC {:02x}h", (self.0 >> 8) & 7, self.0 & 0xff)
    }
}
