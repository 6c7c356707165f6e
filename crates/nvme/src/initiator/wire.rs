//! One connection of an initiator.

use super::Output;
use crate::codec::command::Command;
use crate::codec::pdu::{Initialize, PduType, encode_terminate};
use crate::io::ConnectionId;
use crate::link::{Link, Role, Violation};
use crate::outbox::{Data, Framing, Outbox};

/// See the module.
pub(super) struct Wire {
    pub(super) id: ConnectionId,
    pub(super) link: Link,
    pub(super) framing: Framing,
    /// MAXH2CDATA of the peer.
    pub(super) data_bytes_max: usize,
    /// The connection is made and ICReq was sent.
    pub(super) open: bool,
    /// ICResp has come.
    pub(super) initialized: bool,
    /// Digests to ask for.
    header_digest: bool,
    data_digest: bool,
}

impl Wire {
    pub(super) fn new(id: ConnectionId, header_digest: bool, data_digest: bool) -> Self {
        Self {
            id,
            header_digest,
            data_digest,
            link: Link::new(Role::Host),
            framing: Framing::default(),
            data_bytes_max: 0,
            open: false,
            initialized: false,
        }
    }

    /// Sends ICReq.
    pub(super) fn initialize(&mut self, outbox: &mut Outbox<Output>) {
        self.open = true;
        let request = Initialize {
            version: 0,
            alignment: 0,
            header_digest: self.header_digest,
            data_digest: self.data_digest,
            max: 0,
        };
        let body = request.encode();
        outbox.pdu(self.id, Framing::default(), PduType::IcReq, 0, &body, Data::None);
    }

    /// Takes ICResp in; an error says what the peer cannot do.
    pub(super) fn on_initialized(&mut self, header: &[u8]) -> Result<(), &'static str> {
        let response = Initialize::decode(header);
        if response.version != 0 {
            return Err("this version of NVMe/TCP PDUs");
        }
        if response.header_digest != self.header_digest {
            return Err("header digests as asked for");
        }
        if response.data_digest != self.data_digest {
            return Err("data digests as asked for");
        }
        if response.alignment > 31 || response.max < 4096 {
            return Err("valid parameters in ICResp");
        }
        self.framing = Framing {
            header_digest: response.header_digest,
            data_digest: response.data_digest,
            alignment: response.alignment,
        };
        self.link.header_digest = response.header_digest;
        self.link.data_digest = response.data_digest;
        self.data_bytes_max = usize::try_from(response.max).unwrap_or(usize::MAX) & !3;
        self.initialized = true;
        Ok(())
    }

    pub(super) fn send(&self, outbox: &mut Outbox<Output>, command: &Command, data: Data<'_>) {
        outbox.pdu(self.id, self.framing, PduType::CapsuleCmd, 0, &command.encode(), data);
    }

    pub(super) fn terminate(&self, outbox: &mut Outbox<Output>, violation: &Violation) {
        let body = encode_terminate(violation.error, violation.information);
        let data = Data::Inline(&violation.header);
        outbox.pdu(self.id, self.framing, PduType::H2cTermReq, 0, &body, data);
    }
}
