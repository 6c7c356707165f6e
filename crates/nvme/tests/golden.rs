//! The bytes of PDUs, commands and structures, written out by hand from the specifications and
//! from `docs/protocol.md`.

#![allow(clippy::unwrap_used, reason = "tests")]

use base::{
    BlockCount, BlockSize, BufferPool, CommandBody, Epoch, HelloReason, Lba, Position, Record,
    RecordHeader, RecordKind, ReplicaCommand, ReplicaError, ReplicaKey, ReplicaState, Seq,
    ServerId, ShardIndex, VolumeId,
};
use nvme::codec::command::{Command, Completion, Sgl};
use nvme::codec::fabrics::{self, Connect};
use nvme::codec::identify::{Controller, NamespaceFacts};
use nvme::codec::log;
use nvme::codec::pdu::{FatalError, Initialize, PduType, Transfer, encode_terminate};
use nvme::codec::replica;
use nvme::codec::status::StatusCode;

/// Bytes from hexadecimal digits; spaces are ignored, `(xx*n)` repeats.
fn hex(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for word in text.split_whitespace() {
        if let Some((value, count)) =
            word.strip_prefix('(').and_then(|word| word.strip_suffix(')')?.split_once('*'))
        {
            let value = u8::from_str_radix(value, 16).unwrap();
            out.extend(std::iter::repeat_n(value, count.parse().unwrap()));
        } else {
            for at in (0..word.len()).step_by(2) {
                out.push(u8::from_str_radix(&word[at..at + 2], 16).unwrap());
            }
        }
    }
    out
}

#[test]
fn pdu_types_and_header_lengths() {
    let table = [
        (PduType::IcReq, 0x00, 128),
        (PduType::IcResp, 0x01, 128),
        (PduType::H2cTermReq, 0x02, 24),
        (PduType::C2hTermReq, 0x03, 24),
        (PduType::CapsuleCmd, 0x04, 72),
        (PduType::CapsuleResp, 0x05, 24),
        (PduType::H2cData, 0x06, 24),
        (PduType::C2hData, 0x07, 24),
        (PduType::R2t, 0x09, 24),
    ];
    assert_eq!(table.len(), PduType::ALL.len());
    for (kind, code, header_bytes) in table {
        assert_eq!((kind.code(), kind.header_bytes()), (code, header_bytes));
        assert_eq!(PduType::from_code(code), Some(kind));
    }
    assert_eq!(PduType::from_code(0x08), None);
}

#[test]
fn initialize_transfer_and_terminate() {
    let initialize = Initialize {
        version: 0,
        alignment: 3,
        header_digest: true,
        data_digest: false,
        max: 0x0002_0000,
    };
    let bytes = hex("0000 03 01 00000200 (00*112)");
    assert_eq!(initialize.encode()[..], bytes);
    assert_eq!(Initialize::decode(&[hex("0000 8000 80000000"), bytes].concat()), initialize);
    let transfer =
        Transfer { command_id: 0x0102, transfer_tag: 0x0304, offset: 0x1000, length: 0x200 };
    let bytes = hex("0201 0403 00100000 00020000 00000000");
    assert_eq!(transfer.encode()[..], bytes);
    assert_eq!(Transfer::decode(&[hex("06 04 18 18 18020000"), bytes].concat()), transfer);
    let bytes = encode_terminate(FatalError::DataOutOfRange, 12);
    assert_eq!(bytes[..], hex("0400 0c000000 (00*10)"));
}

#[test]
fn commands_and_completions() {
    let mut command = Command::new(0x02, 1).with_wide(0, 0x1_0000_0002);
    command.id = 0x1234;
    command.sgl = Sgl::Transport { length: 4096 };
    command.cdw10[2] = 7;
    let bytes = hex(
        "02 40 3412 01000000 (00*8) (00*8) 0000000000000000 00100000 0000005a 02000000 01000000 \
         07000000 (00*12)",
    );
    assert_eq!(command.encode()[..], bytes);
    assert_eq!(Command::decode(bytes.first_chunk().unwrap()), command);
    let sgl = Sgl::InCapsule { offset: 0, length: 512 };
    let bytes = Command { sgl, ..Command::new(0x01, 1) }.encode();
    assert_eq!(bytes[24..40], hex("0000000000000000 00020000 00000001"));
    let completion = Completion {
        result: 0x0807_0605_0403_0201,
        queue_head: 0x0a09,
        id: 0x1234,
        status: StatusCode::LBA_RANGE,
    };
    // SC 80h at bits 8:1, DNR at bit 15.
    let bytes = hex("0102030405060708 090a 0000 3412 0081");
    assert_eq!(completion.encode()[..], bytes);
    assert_eq!(Completion::decode(&bytes), completion);
}

#[test]
fn connect_and_capabilities() {
    let connect = Connect {
        queue_id: 1,
        queue_size: 127,
        no_flow_control: true,
        keep_alive_ms: 5000,
        host_id: [0xab; 16],
        controller_id: 0x0102,
        subsystem_nqn: "nqn.s".to_owned(),
        host_nqn: "nqn.h".to_owned(),
    };
    let command = connect.command();
    let bytes = command.encode();
    assert_eq!(bytes[..8], hex("7f 40 0000 01 000000"));
    assert_eq!(bytes[24..40], hex("0000000000000000 00040000 00000001"));
    assert_eq!(bytes[40..52], hex("0000 0100 7f00 04 00 88130000"));
    let data = connect.data();
    let expected = hex("(ab*16) 0201 (00*238) 6e716e2e73 (00*251) 6e716e2e68 (00*251) (00*256)");
    assert_eq!(data[..], expected);
    assert_eq!(Connect::decode(&command, &data), Some(connect));
    // MQES 1023, CQR, TO 15 s, CSS NVM.
    assert_eq!(fabrics::capabilities(1024), 0x0000_0020_1e01_03ff);
}

fn command(body: CommandBody) -> ReplicaCommand {
    let volume = VolumeId::from_bytes(*b"0123456789abcdef");
    let key = ReplicaKey { volume, shard: ShardIndex(3) };
    ReplicaCommand { key, epoch: Epoch(0x11), commit: Seq(0x22), body }
}

/// What all commands of `command` have in common, up to the SGL.
const COMMON: &str = "40 0000 05000000 1100000000000000 2200000000000000";

#[test]
fn replica_commands() {
    let pool = BufferPool::heap(2, 3);
    let key = command(CommandBody::Flush).key;
    let header = RecordHeader {
        key,
        position: Position::new(Epoch(0x11), Seq(0x33)),
        previous_epoch: Epoch(0x10),
        kind: RecordKind::Write,
        block_size: BlockSize::B4096,
        lba: Lba(0x44),
        blocks: BlockCount(1),
        fua: false,
    };
    let record = Record::encode(header, pool.take(4096).unwrap());
    let small = pool.take(4096).unwrap();
    let large = pool.take(128 * 1024).unwrap();
    let several = pool.take(128 * 1024).unwrap();
    let answer = "0000000000000000";
    let table = [
        (
            CommandBody::Seal,
            format!(
                "c2 {COMMON} {answer} 40000000 0000005a 30313233343536373839616263646566 03000000 00000000"
            ),
        ),
        (
            CommandBody::Append { record, media: true },
            format!(
                "c7 {COMMON} {answer} 54100000 00000001 4400000000000000 3300000000000000 00100000 01000000"
            ),
        ),
        (
            CommandBody::Read {
                lba: Lba(0x44),
                blocks: BlockCount(1),
                covers: Seq(0x33),
                buffer: small,
            },
            format!(
                "ca {COMMON} {answer} 00100000 0000005a 4400000000000000 3300000000000000 01000000 00000000"
            ),
        ),
        (CommandBody::Flush, format!("ce {COMMON} {answer} 10000000 0000005a (00*24)")),
        (
            CommandBody::Scan { seq: Seq(0x33), buffer: large },
            format!("d2 {COMMON} {answer} 00100200 0000005a (00*8) 3300000000000000 (00*8)"),
        ),
        (
            CommandBody::ScanRun { seq: Seq(0x33), records: 16, buffer: several },
            format!(
                "d2 {COMMON} {answer} 00000200 0000005a (00*8) 3300000000000000 10000000 00000000"
            ),
        ),
        (
            CommandBody::Truncate { keep: Seq(0x33) },
            format!("d6 {COMMON} {answer} 10000000 0000005a (00*8) 3300000000000000 (00*8)"),
        ),
        (CommandBody::Trim, format!("da {COMMON} {answer} 10000000 0000005a (00*24)")),
        (CommandBody::Release, format!("de {COMMON} {answer} 10000000 0000005a (00*24)")),
    ];
    check_commands(table);
}

#[test]
fn replica_commands_of_state_and_filling() {
    let pool = BufferPool::heap(0, 2);
    let (list, run) = (pool.take(128 * 1024).unwrap(), pool.take(128 * 1024).unwrap());
    let other = ServerId::from_bytes([7; 16]);
    let answer = "0000000000000000";
    check_commands([
        (CommandBody::Renew, format!("ee {COMMON} {answer} 10000000 0000005a (00*24)")),
        (
            CommandBody::Grow { blocks: 0x55 },
            format!("fa {COMMON} {answer} 10000000 0000005a 5500000000000000 (00*16)"),
        ),
        (
            CommandBody::Hello { reason: HelloReason::IoError, acknowledged: Seq(0x33) },
            format!(
                "ea {COMMON} {answer} 10000000 0000005a (00*8) 3300000000000000 (00*4) 03000000"
            ),
        ),
        (
            CommandBody::Hello { reason: HelloReason::Fill, acknowledged: Seq::ZERO },
            format!(
                "ea {COMMON} {answer} 10000000 0000005a 30313233343536373839616263646566 03000000 05000000"
            ),
        ),
        (
            CommandBody::HealthOf { server: other },
            format!(
                "f2 {COMMON} {answer} 10000000 0000005a 07070707070707070707070707070707 (00*8)"
            ),
        ),
        (
            CommandBody::Install { source: other, chunks: true, bytes_per_second: 1025 },
            format!(
                "e6 {COMMON} {answer} 20000000 0000005a 07070707070707070707070707070707 02000000 01000000"
            ),
        ),
        (
            CommandBody::List { unit: BlockCount(256), first: 9, buffer: list },
            format!("f6 {COMMON} {answer} 00000200 0000005a 00010000 09000000 (00*16)"),
        ),
        (
            CommandBody::Fetch { lba: Lba(0x44), end: Lba(0x55), buffer: run },
            format!(
                "e2 {COMMON} {answer} 00100200 0000005a 4400000000000000 5500000000000000 (00*8)"
            ),
        ),
    ]);
}

fn check_commands(table: impl IntoIterator<Item = (CommandBody, String)>) {
    let key = command(CommandBody::Flush).key;
    for (body, expected) in table {
        let name = body.name();
        let encoded = replica::encode(&command(body), 5);
        assert_eq!(encoded.encode()[..], hex(&expected), "{name}");
        let decoded = replica::decode(&encoded).unwrap();
        let shown = format!("{decoded:?}");
        assert!(shown.starts_with(name), "{shown}");
        if let replica::Request::Seal { key: found } = decoded {
            assert_eq!(found, key);
        }
    }
}

#[test]
fn replica_answers_and_errors() {
    let position = Position::new(Epoch(1), Seq(2));
    let state = ReplicaState {
        sealed: Epoch(7),
        last: position,
        durable: Seq(3),
        commit: Seq(4),
        trimmed: Seq(5),
        filling: true,
        damaged: true,
        blocks: 6,
    };
    let bytes = hex(
        "0700000000000000 0100000000000000 0200000000000000 0300000000000000 0400000000000000 \
         0500000000000000 0300000000000000 0600000000000000",
    );
    assert_eq!(replica::encode_state(&state)[..], bytes);
    assert_eq!(replica::decode_state(&bytes), state);
    let errors = [
        (ReplicaError::Superseded { sealed: Epoch(9) }, 0x47c0, 9, None),
        (ReplicaError::NotSealed, 0x47c1, 0, None),
        (ReplicaError::NoReplica, 0x47c2, 0, None),
        (ReplicaError::OutOfOrder { last: position }, 0x47c3, 0, Some(position)),
        (ReplicaError::Behind { last: position }, 0x07c4, 0, Some(position)),
        (ReplicaError::Trimmed { trimmed: Seq(8) }, 0x47c5, 8, None),
        (ReplicaError::Damaged, 0x47c6, 0, None),
        (ReplicaError::DeviceFailed, 0x47c7, 0, None),
        (ReplicaError::Invalid, 0x47c8, 0, None),
        (ReplicaError::Disconnected, 0x07c9, 0, None),
        (ReplicaError::Filling, 0x07ca, 0, None),
        (ReplicaError::NoSpace, 0x07cb, 0, None),
    ];
    for (error, status, result, detail) in errors {
        assert_eq!(replica::encode_error(error), (StatusCode(status), result, detail));
        assert_eq!(replica::decode_error(StatusCode(status), result, detail), Some(error));
    }
    assert_eq!(replica::decode_error(StatusCode(0x47c3), 0, None), None);
    let strange = StatusCode::INVALID_OPCODE;
    assert_eq!(replica::decode_error(strange, 0, None), Some(ReplicaError::Invalid));
}

#[test]
fn identify_structures() {
    let controller = Controller {
        serial: "S1",
        model: "Holdfast",
        firmware: "0.1.0",
        controller_id: 0x0102,
        discovery: false,
        transfer_pages_log2: 5,
        event_requests: 3,
        events: 0x900,
        entries: 1024,
        nqn: "nqn.x",
        in_capsule_bytes: 32 * 1024,
        namespaces: 1,
    }
    .encode();
    assert_eq!(controller[4..24], hex("5331 (20*18)"));
    assert_eq!(controller[64..72], *b"0.1.0   ");
    assert_eq!(controller[76..84], hex("0a 05 0201 00000200"));
    assert_eq!(controller[92..100], hex("00090000 41000000"));
    assert_eq!(controller[111], 1);
    assert_eq!(controller[256..262], hex("0000 03 03 03 06"));
    assert_eq!(controller[320..322], hex("0100"));
    assert_eq!(controller[342..352], hex("0a 07 01000000 01000000"));
    assert_eq!(controller[512..526], hex("66 44 0004 01000000 0c00 0000 00 07"));
    assert_eq!(controller[536..540], hex("01003000"));
    assert_eq!(controller[768..774], *b"nqn.x\0");
    // (64 + 32768) / 16 = 2052; responses of 16 bytes.
    assert_eq!(controller[1792..1804], hex("04080000 01000000 0000 00 01"));
    let facts = NamespaceFacts {
        volume: VolumeId::from_bytes([7; 16]),
        blocks: 0x1000,
        block_size: BlockSize::B512,
        read_only: true,
    };
    let namespace = facts.encode();
    let size = "0010000000000000";
    assert_eq!(namespace[..34], hex(&format!("{size} {size} {size} 10 00 00 (00*3) 01 00 00 09")));
    assert_eq!(namespace[64..72], hex("0700 0700 0700 0700"));
    assert_eq!(namespace[92..100], hex("01000000 000000 01"));
    assert_eq!(namespace[104..120], [7; 16]);
    assert_eq!(namespace[128..132], hex("0000 09 00"));
    let descriptors = facts.encode_descriptors();
    let expected = hex("02100000 (07*16) 03100000 (07*16) 04010000 00 000000");
    assert_eq!(descriptors[..48], expected);
}

#[test]
fn log_pages() {
    let access = log::access(5, log::ana::NON_OPTIMIZED, false);
    let expected =
        hex("0500000000000000 0100 (00*6) 01000000 01000000 0500000000000000 02 (00*15) 01000000");
    assert_eq!(access, expected);
    let address = Some("192.0.2.7:4420".parse().unwrap());
    let discovery = log::discovery(9, address, ["nqn.v"].into_iter());
    assert_eq!(discovery.len(), 2048);
    assert_eq!(discovery[..24], hex("0900000000000000 0100000000000000 0000 (00*6)"));
    assert_eq!(discovery[1024..1034], hex("03 01 02 06 0100 ffff 2000"));
    assert_eq!(discovery[1056..1061], *b"4420 ");
    assert_eq!(discovery[1280..1286], *b"nqn.v\0");
    assert_eq!(discovery[1536..1546], *b"192.0.2.7 ");
}
