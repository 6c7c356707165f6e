//! A target faces a raw host: every kind of malformed PDU gets the right Terminate Connection
//! Request, and garbage never makes it panic.

#![allow(clippy::unwrap_used, reason = "tests")]

mod raw;

use std::net::IpAddr;

use base::VolumeId;
use nvme::Subsystem;
use nvme::codec::command::{Command, Sgl, nvm};
use nvme::codec::fabrics::CONTROLLER_ANY;
use nvme::codec::pdu::PduType;
use nvme::target::{Output, Refusal};
use raw::{Random, Raw, VOLUME, capsule, connect, h2c, ic_req, write};

#[test]
fn malformed_pdus_before_connect() {
    let mut long = ic_req(0, 0, false, false);
    long.resize(200, 0);
    long[4] = 200;
    let with = |at: usize, value: u8| {
        let mut bytes = ic_req(0, 0, false, false);
        bytes[at] = value;
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, u16, u32)> = vec![
        ("unknown type", with(0, 0x55), 1, 0),
        ("a type that only controllers send", with(0, 5), 1, 0),
        ("header digest flag", with(1, 1), 1, 1),
        ("data digest flag", with(1, 2), 1, 1),
        ("HLEN", with(2, 127), 1, 2),
        ("PLEN too short", with(4, 64), 1, 4),
        ("data after ICReq", long, 1, 4),
        ("PFV", ic_req(1, 0, false, false), 6, 8),
        ("HPDA", ic_req(0, 32, false, false), 1, 10),
        ("a command first", capsule(&Command::new(0, 1), &[]), 2, 0),
        ("data first", h2c(1, 1, 0, 4, 4, &[0; 4]), 2, 0),
    ];
    for (name, bytes, error, information) in cases {
        let mut raw = Raw::new();
        raw.accept(0);
        raw.send(0, &bytes);
        raw.assert_terminated(0, name, error, information);
        raw.finish(name);
    }
}

#[test]
fn malformed_pdus_of_a_session() {
    let in_capsule = |length| Sgl::InCapsule { offset: 0, length };
    let mut near = capsule(&write(1, in_capsule(4096)), &[0; 4096]);
    near[3] = 70;
    let mut odd = capsule(&write(1, in_capsule(4096)), &[0; 4096]);
    odd[3] = 74;
    let mut huge = capsule(&write(1, in_capsule(4096)), &[0; 4096]);
    huge[4..8].copy_from_slice(&0x7fff_0000_u32.to_le_bytes());
    let r2t = |length| capsule(&write(9, Sgl::Transport { length }), &[]);
    // R2Ts are answered with slot 0: the tag.
    let with_r2t = |length, rest: &[Vec<u8>]| [vec![r2t(length)], rest.to_vec()].concat();
    let half = vec![0; 2048];
    let cases: Vec<(&str, Vec<Vec<u8>>, u16, u32)> = vec![
        ("second ICReq", vec![ic_req(0, 0, false, false)], 2, 0),
        ("PDO inside the header", vec![near], 1, 3),
        ("PDO not a dword", vec![odd], 1, 3),
        ("PLEN beyond any command", vec![huge], 1, 4),
        ("SGL and PLEN differ", vec![capsule(&write(1, in_capsule(4096)), &[0; 512])], 1, 4),
        ("SGL without data", vec![capsule(&write(1, in_capsule(4096)), &[])], 1, 4),
        (
            "command id in use",
            vec![capsule(&Command { id: 3, ..Command::new(nvm::FLUSH, 1) }, &[]); 2],
            1,
            10,
        ),
        ("TTAG of nothing", vec![h2c(9, 5, 0, 4, 4, &[0; 4])], 1, 10),
        ("TTAG far away", vec![h2c(9, 0xffff, 0, 4, 4, &[0; 4])], 1, 10),
        ("CCCID of another", with_r2t(4096, &[h2c(8, 0, 0, 2048, 0, &half)]), 1, 8),
        ("DATAL is not PLEN's", with_r2t(4096, &[h2c(9, 0, 0, 4096, 0, &half)]), 1, 16),
        ("DATAO ahead", with_r2t(4096, &[h2c(9, 0, 2048, 2048, 4, &half)]), 4, 12),
        (
            "DATAO again",
            with_r2t(4096, &[h2c(9, 0, 0, 2048, 0, &half), h2c(9, 0, 0, 2048, 4, &half)]),
            4,
            12,
        ),
        ("too much", with_r2t(4096, &[h2c(9, 0, 0, 8192, 4, &[0; 8192])]), 4, 12),
        ("LAST too early", with_r2t(4096, &[h2c(9, 0, 0, 2048, 4, &half)]), 1, 1),
        ("LAST missing", with_r2t(4096, &[h2c(9, 0, 0, 4096, 0, &[0; 4096])]), 1, 1),
    ];
    for (name, pdus, error, information) in cases {
        let mut raw = Raw::new();
        raw.volume_session();
        for bytes in pdus {
            raw.send(1, &bytes);
            if !raw.closed[1] {
                raw.out[1].clear();
            }
        }
        raw.assert_terminated(1, name, error, information);
        assert!(!raw.closed[0], "{name}: the admin queue stays");
        raw.accept(2);
        raw.send(2, &ic_req(0, 0, false, false));
        raw.pdu(2).unwrap();
        raw.send(2, &connect(1, 1, Subsystem::Volume(VOLUME)));
        let (_, response) = raw.pdu(2).unwrap();
        assert_eq!(response[22] >> 1, 0, "{name}: the queue can be connected again");
        raw.finish(name);
    }
}

#[test]
fn a_wrong_header_digest_and_an_overlong_admin_capsule() {
    let mut raw = Raw::new();
    raw.initialize(0, true);
    let mut bytes = capsule(&Command::new(0x7f, 1), &[0; 4]);
    bytes[1] = 1;
    raw.send(0, &bytes);
    raw.assert_terminated(0, "digest", 3, 0);
    raw.finish("digest");

    let mut raw = Raw::new();
    raw.initialize(0, false);
    let sgl = Sgl::InCapsule { offset: 0, length: 9000 };
    raw.send(0, &capsule(&Command { sgl, ..Command::new(0x7f, 1) }, &[0; 9000]));
    raw.assert_terminated(0, "admin data", 5, 4);
    raw.finish("admin data");
}

#[test]
fn data_on_a_replica_connection_is_out_of_sequence() {
    let mut raw = Raw::new();
    raw.replica_session();
    raw.send(1, &h2c(1, 0, 0, 4, 4, &[0; 4]));
    raw.assert_terminated(1, "data", 2, 0);
    assert!(raw.closed[0], "a replica session is over with its I/O queue");
    raw.finish("data");
}

#[test]
fn bad_commands_are_refused_and_the_session_goes_on() {
    let mut raw = Raw::new();
    raw.volume_session();
    let transport = |length| Sgl::Transport { length };
    let read = |nsid, lba: u64, sgl| {
        Command { id: 1, sgl, ..Command::new(nvm::READ, nsid) }.with_wide(0, lba)
    };
    let fused = Command { fuse: 1, ..read(1, 0, transport(4096)) };
    let cases: Vec<(&str, Command, Vec<u8>, u16)> = vec![
        ("unknown opcode", Command::new(0x55, 1), vec![], 0x01),
        ("fabrics on an I/O queue", Command::new(0x7f, 1), vec![], 0x01),
        ("namespace", read(2, 0, transport(4096)), vec![], 0x0b),
        ("LBA", read(1, 1000, transport(4096)), vec![], 0x80),
        ("LBA overflow", read(1, u64::MAX, transport(4096)), vec![], 0x80),
        ("SGL length", read(1, 0, transport(512)), vec![], 0x0f),
        ("SGL type", read(1, 0, Sgl::Other), vec![], 0x11),
        ("fused", fused, vec![], 0x02),
        ("SGL offset", write(1, Sgl::InCapsule { offset: 8, length: 4096 }), vec![0; 4096], 0x16),
    ];
    for (name, command, data, status) in cases {
        raw.send(1, &capsule(&command, &data));
        let (kind, bytes) = raw.pdu(1).unwrap();
        assert_eq!(kind, PduType::CapsuleResp, "{name}");
        let found = u16::from_le_bytes([bytes[22], bytes[23]]);
        assert_eq!((found >> 1) & 0x7ff, status, "{name}");
        assert!(!raw.closed[1], "{name}");
    }
    raw.finish("bad commands");
}

#[test]
fn sessions_need_the_right_connect() {
    let volume = Subsystem::Volume(VOLUME);
    let unknown = Subsystem::Volume(VolumeId::from_bytes([9; 16]));
    let mut before = Raw::new();
    before.initialize(0, false);
    // An I/O queue of a controller that is not there; a volume that is not there; an admin queue
    // that asks for a controller by id; a command that is not Connect.
    for bytes in [
        connect(1, 1, volume),
        connect(0, CONTROLLER_ANY, unknown),
        connect(0, 5, volume),
        capsule(&Command::new(0x06, 0), &[]),
    ] {
        before.send(0, &bytes);
        let (_, response) = before.pdu(0).unwrap();
        let status = (u16::from_le_bytes([response[22], response[23]]) >> 1) & 0x7ff;
        assert!(status == 0x182 || status == 0x0c, "{status:x}");
    }
    assert!(before.events.is_empty());
    before.finish("connect");
}

#[test]
fn garbage_never_panics() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let mut raw = Raw::new();
        if random.chance(2) {
            raw.volume_session();
        } else {
            raw.replica_session();
        }
        for _ in 0..40 {
            let mut bytes = match random.below(4) {
                0 => {
                    let mut command = Command::new(random.next().to_le_bytes()[0], 1);
                    command.id = u16::from(random.next().to_le_bytes()[0]);
                    command.cdw2 = random.below(4);
                    for word in &mut command.cdw10 {
                        *word = u32::from_le_bytes(
                            random.next().to_le_bytes()[..4].try_into().unwrap(),
                        );
                    }
                    let length = u32::try_from(8 * random.below(600)).unwrap();
                    let data = vec![1; length as usize];
                    let inside = random.chance(2);
                    command.sgl = if inside {
                        Sgl::InCapsule { offset: 0, length }
                    } else {
                        Sgl::Transport { length }
                    };
                    capsule(&command, if inside { &data } else { &[] })
                }
                1 => h2c(1, 0, 0, 64, 4, &[0; 64]),
                2 => (0..random.below(200)).map(|_| random.next().to_le_bytes()[0]).collect(),
                _ => {
                    let mut command = Command::new(random.next().to_le_bytes()[0] & 0x1f, 1);
                    for word in &mut command.cdw10 {
                        *word = u32::try_from(random.below(300)).unwrap();
                    }
                    command.sgl = Sgl::Transport { length: 4096 };
                    capsule(&command, &[])
                }
            };
            if random.chance(4) && !bytes.is_empty() {
                let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                bytes[at] ^= 1 << random.below(8);
            }
            raw.send(usize::from(random.chance(2)), &bytes);
        }
        raw.finish("garbage");
    }
}

fn refused(raw: &Raw) -> Vec<(Option<IpAddr>, Refusal)> {
    let refused = |event: &Output| match event {
        Output::Refused { from, refusal } => Some((*from, *refusal)),
        _ => None,
    };
    raw.events.iter().filter_map(refused).collect()
}

#[test]
fn a_peer_that_says_nothing_takes_no_place_but_its_own() {
    let address = |text: &str| Some(text.parse::<IpAddr>().unwrap());
    let (mute, other) = (address("192.0.2.7"), address("192.0.2.8"));
    let limited = || Raw::with(|config| config.handshakes_of_peer_max = 1);
    let mut raw = limited();
    raw.accept_from(0, mute);
    raw.send(0, &ic_req(0, 0, false, false));
    raw.pdu(0).unwrap();
    raw.accept_from(1, mute);
    assert!(raw.closed[1] && !raw.closed[0], "the newer one is refused");
    assert_eq!(refused(&raw), [(mute, Refusal::Peer)]);
    // IPv4 in IPv6 is the same peer; another address is not.
    raw.accept_from(1, address("::ffff:192.0.2.7"));
    assert_eq!(refused(&raw).len(), 2);
    raw.closed[1] = false;
    raw.accept_from(1, other);
    assert!(!raw.closed[1]);
    // It has said who it is, and may come again.
    raw.send(0, &connect(0, CONTROLLER_ANY, Subsystem::Volume(VOLUME)));
    assert_eq!(raw.pdu(0).unwrap().0, PduType::CapsuleResp);
    raw.accept_from(2, mute);
    assert!(!raw.closed[2]);
    raw.finish("mute");

    // A host with a network of its own is one peer; those whose address is not known are another.
    let mut raw = limited();
    raw.accept_from(0, address("2001:db8::1"));
    raw.accept_from(1, address("2001:db8::2"));
    assert!(raw.closed[1]);
    raw.closed[1] = false;
    raw.accept_from(1, None);
    raw.accept_from(2, address("2001:db8:0:1::1"));
    assert!(!raw.closed[1] && !raw.closed[2]);
    raw.finish("IPv6");

    // Everything is taken: nobody is let in, and whoever leaves makes room.
    let mut raw = Raw::with(|config| config.connections_max = 1);
    raw.accept_from(0, mute);
    raw.accept_from(1, other);
    assert_eq!(refused(&raw), [(other, Refusal::Full)]);
    raw.send(0, &[0x55; 8]);
    assert!(raw.closed[0]);
    raw.closed[1] = false;
    raw.accept_from(1, other);
    assert!(!raw.closed[1]);
    raw.finish("full");
}
