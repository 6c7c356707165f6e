//! A target and a host that is nothing but bytes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::VecDeque;
use std::net::IpAddr;

use base::checksum::crc32c;
use base::{BlockSize, BufferPool, Instant, ServerId, VolumeId};
use nvme::codec::command::{Command, Sgl, nvm};
use nvme::codec::fabrics::{CC, CC_ENABLE, CONTROLLER_ANY, Connect, property_set};
use nvme::codec::pdu::{Initialize, PduType, Transfer};
use nvme::target::{Input, Output, Target, TargetConfig, VolumeExport};
use nvme::{ConnectionId, Receive, Subsystem};

pub(crate) const SERVER: ServerId = ServerId::from_bytes([0x5e; 16]);
pub(crate) const VOLUME: VolumeId = VolumeId::from_bytes([0xb1; 16]);

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// A target and the bytes that a host exchanges with it.
pub(crate) struct Raw {
    pub(crate) target: Target,
    pub(crate) pool: BufferPool,
    pub(crate) receive: [Option<Receive>; 3],
    pub(crate) out: [VecDeque<u8>; 3],
    pub(crate) closed: [bool; 3],
    pub(crate) events: Vec<Output>,
    pub(crate) now: Instant,
}

impl Raw {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// A target with another configuration.
    pub(crate) fn with(configure: impl FnOnce(&mut TargetConfig)) -> Self {
        let pool = BufferPool::heap(64, 16);
        let mut config = TargetConfig::new(SERVER);
        config.require_header_digest = false;
        configure(&mut config);
        config.address = Some("192.0.2.1:4420".parse().unwrap());
        let mut raw = Self {
            target: Target::new(config, pool.clone()),
            pool,
            receive: [None, None, None],
            out: [VecDeque::new(), VecDeque::new(), VecDeque::new()],
            closed: [false; 3],
            events: Vec::new(),
            now: Instant::from_nanos(1),
        };
        let block_size = BlockSize::B4096;
        raw.input(Input::AddVolume(VolumeExport {
            volume: VOLUME,
            blocks: 1000,
            block_size,
            read_only: false,
        }));
        raw
    }

    pub(crate) fn input(&mut self, input: Input) {
        self.target.handle(self.now, input);
        while let Some(output) = self.target.poll_output() {
            match output {
                Output::Receive(receive) => {
                    let index = usize::try_from(receive.connection.0).unwrap();
                    self.receive[index] = Some(receive);
                }
                Output::Send { connection, part } => {
                    let index = usize::try_from(connection.0).unwrap();
                    self.out[index].extend(part.bytes());
                    let bytes = part.len();
                    self.target.handle(self.now, Input::Sent { connection, bytes });
                }
                Output::Close { connection } => {
                    let index = usize::try_from(connection.0).unwrap();
                    self.closed[index] = true;
                    self.receive[index] = None;
                    self.target.handle(self.now, Input::Closed { connection });
                }
                other => self.events.push(other),
            }
        }
    }

    pub(crate) fn accept(&mut self, index: usize) {
        self.accept_from(index, None);
    }

    pub(crate) fn accept_from(&mut self, index: usize, from: Option<IpAddr>) {
        self.input(Input::Accepted { connection: ConnectionId(index as u64), from });
    }

    /// Sends bytes, as long as the target takes them.
    pub(crate) fn send(&mut self, index: usize, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(mut receive) = self.receive[index].take() else { return };
            let region = receive.region.bytes(&mut receive.buffer);
            let count = region.len().min(rest.len());
            region[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            let Receive { connection, buffer, .. } = receive;
            self.input(Input::Received { connection, buffer, bytes: count });
        }
    }

    /// The next PDU from the target: its header and its data.
    pub(crate) fn pdu(&mut self, index: usize) -> Option<(PduType, Vec<u8>)> {
        let out = &mut self.out[index];
        if out.len() < 8 {
            return None;
        }
        let length: Vec<u8> = out.iter().skip(4).take(4).copied().collect();
        let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
        let bytes: Vec<u8> = out.drain(..length).collect();
        Some((PduType::from_code(bytes[0]).unwrap(), bytes))
    }

    pub(crate) fn initialize(&mut self, index: usize, header_digest: bool) {
        self.accept(index);
        self.send(index, &ic_req(0, 0, header_digest, false));
        assert_eq!(self.pdu(index).unwrap().0, PduType::IcResp);
    }

    /// A session with the volume: connection 0 is its admin queue, connection 1 its I/O queue.
    pub(crate) fn volume_session(&mut self) {
        self.initialize(0, false);
        self.send(0, &connect(0, CONTROLLER_ANY, Subsystem::Volume(VOLUME)));
        let (kind, response) = self.pdu(0).unwrap();
        assert_eq!((kind, response[22] >> 1), (PduType::CapsuleResp, 0));
        let controller = u16::from_le_bytes([response[8], response[9]]);
        self.send(0, &capsule(&property_set(CC, CC_ENABLE), &[]));
        self.pdu(0).unwrap();
        self.initialize(1, false);
        self.send(1, &connect(1, controller, Subsystem::Volume(VOLUME)));
        let (kind, response) = self.pdu(1).unwrap();
        assert_eq!((kind, response[22] >> 1), (PduType::CapsuleResp, 0));
    }

    pub(crate) fn replica_session(&mut self) {
        self.initialize(0, false);
        self.send(0, &connect(0, CONTROLLER_ANY, Subsystem::Replica(SERVER)));
        let (_, response) = self.pdu(0).unwrap();
        let controller = u16::from_le_bytes([response[8], response[9]]);
        self.send(0, &capsule(&property_set(CC, CC_ENABLE), &[]));
        self.pdu(0).unwrap();
        self.initialize(1, false);
        self.send(1, &connect(1, controller, Subsystem::Replica(SERVER)));
        let (kind, response) = self.pdu(1).unwrap();
        assert_eq!((kind, response[22] >> 1), (PduType::CapsuleResp, 0));
    }

    /// The connection was terminated with this FES and FEI.
    pub(crate) fn assert_terminated(
        &mut self,
        index: usize,
        name: &str,
        error: u16,
        information: u32,
    ) {
        let (kind, bytes) = self.pdu(index).unwrap_or_else(|| panic!("{name}: no answer"));
        assert_eq!(kind, PduType::C2hTermReq, "{name}");
        assert_eq!(u16::from_le_bytes([bytes[8], bytes[9]]), error, "{name}: FES");
        let found = u32::from_le_bytes(bytes[10..14].try_into().unwrap());
        if error != 3 {
            assert_eq!(found, information, "{name}: FEI");
        }
        assert!(self.closed[index], "{name}: closed");
        assert!(self.pdu(index).is_none(), "{name}: nothing more");
    }

    pub(crate) fn finish(mut self, name: &str) {
        self.input(Input::Stop);
        self.events.clear();
        self.receive = [None, None, None];
        assert_eq!(self.pool.available(), (64, 16), "{name}: buffers");
        assert_eq!(self.target.sessions(), 0);
    }
}

pub(crate) fn pdu(
    kind: u8,
    flags: u8,
    header_bytes: u8,
    offset: u8,
    body: &[u8],
    data: &[u8],
) -> Vec<u8> {
    let mut out = vec![kind, flags, header_bytes, offset, 0, 0, 0, 0];
    out.extend_from_slice(body);
    out.extend_from_slice(data);
    let length = u32::try_from(out.len()).unwrap();
    out[4..8].copy_from_slice(&length.to_le_bytes());
    out
}

pub(crate) fn ic_req(
    version: u16,
    alignment: u8,
    header_digest: bool,
    data_digest: bool,
) -> Vec<u8> {
    let request = Initialize { version, alignment, header_digest, data_digest, max: 0 };
    pdu(0, 0, 128, 0, &request.encode(), &[])
}

pub(crate) fn capsule(command: &Command, data: &[u8]) -> Vec<u8> {
    let offset = if data.is_empty() { 0 } else { 72 };
    pdu(4, 0, 72, offset, &command.encode(), data)
}

pub(crate) fn connect(queue_id: u16, controller_id: u16, subsystem: Subsystem) -> Vec<u8> {
    let connect = Connect {
        queue_id,
        queue_size: 31,
        no_flow_control: false,
        keep_alive_ms: 5000,
        host_id: [7; 16],
        controller_id,
        subsystem_nqn: subsystem.to_string(),
        host_nqn: "nqn.2014-08.org.nvmexpress:uuid:x".to_owned(),
    };
    capsule(&connect.command(), &connect.data())
}

pub(crate) fn write(id: u16, sgl: Sgl) -> Command {
    Command { id, sgl, ..Command::new(nvm::WRITE, 1) }
}

pub(crate) fn h2c(id: u16, tag: u16, offset: u32, length: u32, flags: u8, data: &[u8]) -> Vec<u8> {
    let transfer = Transfer { command_id: id, transfer_tag: tag, offset, length };
    pdu(6, flags, 24, 24, &transfer.encode(), data)
}

/// A PDU with both digests.
pub(crate) fn digested(kind: u8, flags: u8, body: &[u8], data: &[u8]) -> Vec<u8> {
    let header_bytes = u8::try_from(8 + body.len()).unwrap();
    let offset = if data.is_empty() { 0 } else { header_bytes + 4 };
    let data_flag = if data.is_empty() { 0 } else { 2 };
    let trailer = if data.is_empty() { 0 } else { 4 };
    let length = u32::from(header_bytes) + 4 + u32::try_from(data.len()).unwrap() + trailer;
    let mut out = vec![kind, flags | 1 | data_flag, header_bytes, offset];
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(body);
    let crc = crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    if !data.is_empty() {
        out.extend_from_slice(data);
        out.extend_from_slice(&crc32c(data).to_le_bytes());
    }
    out
}
