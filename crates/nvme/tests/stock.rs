//! What a stock host does: discovery, identification, features, events, flow control, digests
//! and aligned data. The host is raw bytes, so that nothing of our initiator is taken for granted.

#![allow(clippy::unwrap_used, reason = "tests")]

mod raw;

use std::time::Duration;

use base::checksum::crc32c;
use base::{BlockReply, BlockSize, Instant, Operation, Status, VolumeId};
use nvme::Subsystem;
use nvme::codec::command::{Command, Sgl, admin, nvm};
use nvme::codec::fabrics::{CAP, CC, CC_ENABLE, CONTROLLER_ANY, CSTS, property_get, property_set};
use nvme::codec::pdu::{PduType, Transfer};
use nvme::target::{Access, Input, Output, VolumeExport};
use raw::{Raw, VOLUME, capsule, connect, digested, ic_req};

/// The completion in a CapsuleResp: result, queue head, command id, SCT and SC.
fn completion(bytes: &[u8]) -> (u64, u16, u16, u16) {
    let at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let result = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (result, at(16), at(20), (at(22) >> 1) & 0x7ff)
}

impl Raw {
    fn command(&mut self, command: &Command) -> (u64, u16) {
        self.send(0, &capsule(command, &[]));
        let (kind, bytes) = self.pdu(0).unwrap();
        assert_eq!(kind, PduType::CapsuleResp, "{command:?}");
        let (result, _, id, status) = completion(&bytes);
        assert_eq!(id, command.id);
        (result, status)
    }

    /// A command whose answer is data, which comes in one PDU and a completion.
    fn read(&mut self, command: &Command, bytes: u32) -> Vec<u8> {
        let command = Command { sgl: Sgl::Transport { length: bytes }, ..*command };
        self.send(0, &capsule(&command, &[]));
        let (kind, data) = self.pdu(0).unwrap();
        assert_eq!(kind, PduType::C2hData, "{command:?}: {:x?}", &data[8..]);
        let transfer = Transfer::decode(&data);
        assert_eq!((transfer.command_id, transfer.offset), (command.id, 0));
        assert_eq!(data[1], 4, "LAST, not SUCCESS: queue heads are wanted");
        let (kind, bytes) = self.pdu(0).unwrap();
        assert_eq!((kind, completion(&bytes).3), (PduType::CapsuleResp, 0));
        data[usize::from(data[3])..].to_vec()
    }

    fn admin_session(&mut self, subsystem: Subsystem) {
        self.initialize(0, false);
        self.send(0, &connect(0, CONTROLLER_ANY, subsystem));
        assert_eq!(completion(&self.pdu(0).unwrap().1).3, 0);
        let (capabilities, status) = self.command(&property_get(CAP, true));
        assert_eq!((capabilities & 0xffff, status), (1023, 0));
        assert_eq!(self.command(&property_set(CC, CC_ENABLE)), (0, 0));
        assert_eq!(self.command(&property_get(CSTS, false)), (1, 0));
    }
}

fn identify(structure: u32, nsid: u32) -> Command {
    let mut command = Command::new(admin::IDENTIFY, nsid);
    command.cdw10[0] = structure;
    command
}

fn log_page(page: u32, bytes: u32, offset: u64) -> Command {
    let mut command = Command::new(admin::GET_LOG_PAGE, 0xffff_ffff).with_wide(1, offset);
    command.cdw10[0] = page | ((bytes / 4 - 1) << 16);
    command
}

fn feature(opcode: u8, identifier: u32, value: u32) -> Command {
    let mut command = Command::new(opcode, 0);
    command.cdw10[0] = identifier;
    command.cdw10[1] = value;
    command
}

fn another_volume() -> VolumeExport {
    VolumeExport {
        volume: VolumeId::from_bytes([0xb2; 16]),
        blocks: 8,
        block_size: BlockSize::B512,
        read_only: false,
    }
}

#[test]
fn discovery_lists_volumes_and_tells_of_new_ones() {
    let mut raw = Raw::new();
    raw.admin_session(Subsystem::Discovery);
    assert_eq!(raw.read(&identify(1, 0), 4096)[111], 2);
    let page = raw.read(&log_page(0x70, 2048, 0), 2048);
    assert_eq!(page[8], 1);
    let nqn = Subsystem::Volume(VOLUME).to_string();
    assert_eq!(page[1024 + 256..][..nqn.len()], *nqn.as_bytes());
    assert_eq!(raw.command(&feature(admin::SET_FEATURES, 0x0b, 1 << 31)).1, 0);
    let event = Command { id: 7, ..Command::new(admin::ASYNC_EVENT, 0) };
    raw.send(0, &capsule(&event, &[]));
    assert!(raw.pdu(0).is_none(), "parked");
    raw.input(Input::AddVolume(another_volume()));
    let (result, _, id, status) = completion(&raw.pdu(0).unwrap().1);
    assert_eq!((result, id, status), (0x0070_f002, 7, 0));
    assert_eq!(raw.read(&log_page(0x70, 1024, 0), 1024)[8], 2);
    let second = raw.read(&log_page(0x70, 1024, 2048), 1024);
    assert_eq!(second[0], 3, "TCP");
    raw.finish("discovery");
}

#[test]
fn a_volume_is_identified() {
    let mut raw = Raw::new();
    raw.admin_session(Subsystem::Volume(VOLUME));
    let controller = raw.read(&identify(1, 0), 4096);
    assert_eq!((controller[111], controller[516]), (1, 1));
    assert_eq!(raw.read(&identify(2, 0), 4096)[..5], [1, 0, 0, 0, 0]);
    assert_eq!(raw.read(&identify(2, 1), 4096)[0], 0, "none after namespace 1");
    let namespace = raw.read(&identify(0, 1), 4096);
    assert_eq!(namespace[..8], 1000_u64.to_le_bytes());
    assert_eq!(namespace[130], 12);
    assert_eq!(raw.read(&identify(3, 1), 4096)[4..20], VOLUME.bytes());
    for structure in [5, 6, 7, 8, 0x1c] {
        let nsid = u32::from(structure != 7);
        raw.read(&identify(structure, nsid), 4096);
    }
    assert_eq!(raw.command(&identify(0, 2)).1, 0x0b);
    assert_eq!(raw.command(&identify(0x55, 1)).1, 0x02);
    for (page, bytes) in [(0, 1024), (1, 64), (2, 512), (3, 512), (4, 4096), (5, 4096), (0xc, 52)] {
        raw.read(&log_page(page, bytes, 0), bytes);
    }
    let unknown = Command { sgl: Sgl::Transport { length: 512 }, ..log_page(0x33, 512, 0) };
    assert_eq!(raw.command(&unknown).1, 0x109);
    let replicas_only = Command { sgl: Sgl::Transport { length: 4096 }, ..log_page(0xc0, 4096, 0) };
    assert_eq!(raw.command(&replicas_only).1, 0x109);
    raw.finish("identify");
}

#[test]
fn features_events_and_abort() {
    let mut raw = Raw::new();
    raw.admin_session(Subsystem::Volume(VOLUME));
    assert_eq!(raw.command(&feature(admin::SET_FEATURES, 7, 0x0003_0003)), (0x000f_000f, 0));
    assert_eq!(raw.command(&feature(admin::GET_FEATURES, 6, 0)), (1, 0));
    assert_eq!(raw.command(&feature(admin::SET_FEATURES, 6, 0)), (0, 0));
    assert_eq!(raw.command(&feature(admin::GET_FEATURES, 6, 0)), (0, 0));
    assert_eq!(raw.command(&feature(admin::GET_FEATURES, 0x0f, 0)), (5000, 0));
    assert_eq!(raw.command(&feature(admin::GET_FEATURES, 0x7e, 0)).1, 0x02);
    assert_eq!(raw.command(&feature(admin::SET_FEATURES, 0x0b, 0x900)).1, 0);
    for id in 10..14 {
        raw.send(0, &capsule(&Command { id, ..Command::new(admin::ASYNC_EVENT, 0) }, &[]));
    }
    let fifth = Command { id: 14, ..Command::new(admin::ASYNC_EVENT, 0) };
    assert_eq!(raw.command(&fifth).1, 0x105);
    // Abort of a parked request: it ends as aborted, before the Abort.
    let mut abort = Command { id: 20, ..Command::new(admin::ABORT, 0) };
    abort.cdw10[0] = 11 << 16;
    raw.send(0, &capsule(&abort, &[]));
    assert_eq!(completion(&raw.pdu(0).unwrap().1), (0, 17, 11, 0x07));
    assert_eq!(completion(&raw.pdu(0).unwrap().1).0, 0);
    assert_eq!(raw.command(&abort).0, 1, "it is no longer there");
    raw.input(Input::SetAccess { volume: VOLUME, access: Access::NonOptimized });
    let (result, _, id, _) = completion(&raw.pdu(0).unwrap().1);
    assert_eq!((result, id), (0x000c_0302, 10));
    // Masked until the page is read.
    raw.input(Input::SetAccess { volume: VOLUME, access: Access::Inaccessible });
    assert!(raw.pdu(0).is_none());
    assert_eq!(raw.read(&log_page(0x0c, 52, 0), 52)[32], 3);
    let (result, _, id, _) = completion(&raw.pdu(0).unwrap().1);
    assert_eq!((result, id), (0x000c_0302, 12));
    raw.finish("features");
}

#[test]
fn a_silent_host_is_given_up_after_its_keep_alive_time() {
    let mut raw = Raw::new();
    raw.admin_session(Subsystem::Volume(VOLUME));
    for second in 1..20 {
        raw.now = Instant::ZERO + Duration::from_secs(second);
        assert_eq!(raw.command(&Command::new(admin::KEEP_ALIVE, 0)).1, 0);
    }
    raw.now = Instant::ZERO + Duration::from_secs(23);
    raw.input(Input::Tick);
    assert!(!raw.closed[0]);
    raw.now = Instant::ZERO + Duration::from_millis(25_100);
    raw.input(Input::Tick);
    assert!(raw.closed[0]);
    raw.finish("keep-alive");
}

#[test]
fn connections_that_say_nothing_are_closed() {
    let mut raw = Raw::new();
    raw.accept(0);
    raw.accept(1);
    raw.send(1, &ic_req(0, 0, false, false));
    raw.now = Instant::ZERO + Duration::from_secs(11);
    raw.input(Input::Tick);
    assert!(raw.closed[0] && raw.closed[1]);
    raw.finish("silent connections");
}

/// Digests, data aligned to 32 bytes, a write of 128 KiB in three data PDUs, queue heads.
#[test]
fn a_long_write_and_a_read_with_digests_and_alignment() {
    let mut raw = Raw::new();
    raw.volume_session();
    raw.accept(2);
    raw.send(2, &ic_req(0, 7, true, true));
    let (kind, response) = raw.pdu(2).unwrap();
    assert_eq!((kind, response[11]), (PduType::IcResp, 3));
    let connect = connect(2, 1, Subsystem::Volume(VOLUME));
    raw.send(2, &digested(4, 0, &connect[8..72], &connect[72..]));
    let (_, response) = raw.pdu(2).unwrap();
    assert_eq!(completion(&response), (1, 1, 0, 0));

    let data: Vec<u8> = (0..131_072_u32).map(|at| at.to_le_bytes()[1]).collect();
    let mut write = Command::new(nvm::WRITE, 1).with_wide(0, 100);
    write.id = 77;
    write.cdw10[2] = 31;
    write.sgl = Sgl::Transport { length: 131_072 };
    raw.send(2, &digested(4, 0, &write.encode(), &[]));
    let (kind, bytes) = raw.pdu(2).unwrap();
    assert_eq!(kind, PduType::R2t);
    let ready = Transfer::decode(&bytes);
    assert_eq!((ready.command_id, ready.offset, ready.length), (77, 0, 131_072));
    for (offset, end) in [(0_u32, 50_000), (50_000, 50_004), (50_004, 131_072)] {
        let part = Transfer { offset, length: end - offset, ..ready };
        let flags = if end == 131_072 { 4 } else { 0 };
        let data = &data[offset as usize..end as usize];
        raw.send(2, &digested(6, flags, &part.encode(), data));
    }
    let block = raw.events.pop();
    let Some(Output::Block { session, volume, request }) = block else { panic!("{block:?}") };
    assert_eq!((volume, request.lba.0, request.blocks.0), (VOLUME, 100, 32));
    let Operation::Write { buffer, fua: false } = request.operation else { panic!() };
    assert!(buffer.payload()[..131_072] == data[..]);
    drop(buffer);
    let reply = BlockReply { id: request.id, status: Status::Ok, data: None };
    raw.input(Input::BlockReply { session, reply });
    assert_eq!(completion(&raw.pdu(2).unwrap().1), (0, 2, 77, 0));

    let mut read = Command::new(nvm::READ, 1).with_wide(0, 5);
    read.sgl = Sgl::Transport { length: 4096 };
    raw.send(2, &digested(4, 0, &read.encode(), &[]));
    let block = raw.events.pop();
    let Some(Output::Block { session, request, .. }) = block else { panic!("{block:?}") };
    let Operation::Read { mut buffer } = request.operation else { panic!() };
    buffer.payload_mut()[..4096].fill(9);
    let data = Some(buffer.freeze().payload(4096));
    let reply = BlockReply { id: request.id, status: Status::Ok, data };
    raw.input(Input::BlockReply { session, reply });
    let (kind, bytes) = raw.pdu(2).unwrap();
    assert_eq!((kind, bytes[1] & 0xf, bytes[3]), (PduType::C2hData, 1 | 2 | 4, 32));
    assert_eq!(bytes.len(), 32 + 4096 + 4);
    assert_eq!(bytes[32..32 + 4096], [9; 4096]);
    assert_eq!(bytes[32 + 4096..], crc32c(&[9; 4096]).to_le_bytes());
    assert_eq!(completion(&raw.pdu(2).unwrap().1), (0, 3, 0, 0));

    // A wrong data digest fails the command, not the connection.
    let sgl = Sgl::InCapsule { offset: 0, length: 4096 };
    let small = Command { id: 5, sgl, ..Command::new(nvm::WRITE, 1) };
    let mut bytes = digested(4, 0, &small.encode(), &[1; 4096]);
    *bytes.last_mut().unwrap() ^= 1;
    raw.send(2, &bytes);
    assert_eq!(completion(&raw.pdu(2).unwrap().1), (0, 4, 5, 0x22));
    assert!(raw.events.iter().all(|event| !matches!(event, Output::Block { .. })));
    raw.finish("long write");
}
