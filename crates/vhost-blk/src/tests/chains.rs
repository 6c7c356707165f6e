//! Descriptor chains, good and hostile, against a second parser that knows nothing of the first.

use base::Status;

use crate::DeviceConfig;
use crate::chain::{BlockRange, Body, Kind, Verdict};
use crate::ring::Descriptor;
use crate::testing::{
    BASE, DATA, F_INDIRECT, F_NEXT, F_WRITE, FEATURES, Guest, MEMORY_BYTES, Random, Rig, config,
    eventfd_count, print_seed, seeds,
};

/// What the reference parser makes of a chain.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    verdict: Verdict,
    status_gpa: Option<u64>,
    /// The guest address of every data byte, of requests that run.
    data: Vec<u64>,
    range: Option<BlockRange>,
    ranges: Vec<BlockRange>,
}

fn read_descriptor(guest: &Guest, at: u64) -> Option<Descriptor> {
    let mut raw = [0_u8; 16];
    guest.memory.read(at, &mut raw).then(|| Descriptor::decode(raw))
}

/// The chain as a flat list, or nothing if the ring's rules are broken anywhere.
fn flatten(guest: &Guest, head: u16, indirect: bool) -> Option<Vec<Descriptor>> {
    let ring = Guest::ring_gpa(0);
    let mut list = Vec::new();
    let mut table = (ring, u64::from(guest.size), false);
    let mut index = u64::from(head);
    let mut steps = 0;
    loop {
        let (gpa, entries, inside) = table;
        if index >= entries || steps >= entries {
            return None;
        }
        steps += 1;
        let descriptor = read_descriptor(guest, gpa.checked_add(16 * index)?)?;
        if descriptor.flags & F_INDIRECT != 0 {
            let bytes = u64::from(descriptor.bytes);
            if inside
                || !indirect
                || descriptor.flags & F_NEXT != 0
                || bytes == 0
                || !bytes.is_multiple_of(16)
            {
                return None;
            }
            table = (descriptor.gpa, bytes / 16, true);
            index = 0;
            steps = 0;
            continue;
        }
        list.push(descriptor);
        if descriptor.flags & F_NEXT == 0 {
            return Some(list);
        }
        index = u64::from(descriptor.next);
    }
}

impl Expected {
    fn reject(status: Status, status_gpa: Option<u64>) -> Self {
        let verdict = Verdict::Reject(status);
        Self { verdict, status_gpa, data: Vec::new(), range: None, ranges: Vec::new() }
    }
}

/// True if the virtio-blk rules for the chain as a whole hold.
fn is_sound(list: &[Descriptor], config: &DeviceConfig) -> bool {
    let in_memory = |descriptor: &Descriptor| {
        let end = descriptor.gpa.checked_add(u64::from(descriptor.bytes));
        descriptor.gpa >= BASE && end.is_some_and(|end| end <= BASE + MEMORY_BYTES)
    };
    list.iter().all(|descriptor| descriptor.bytes > 0 && in_memory(descriptor))
        && list.is_sorted_by_key(|descriptor| descriptor.flags & F_WRITE)
        && list.len() <= config.seg_max as usize + 8
}

fn reference(guest: &Guest, head: u16, indirect: bool, config: &DeviceConfig) -> Expected {
    let list = flatten(guest, head, indirect).filter(|list| is_sound(list, config));
    let Some(list) = list else { return Expected::reject(Status::IoError, None) };
    let bytes = |flag: u16| -> Vec<u64> {
        list.iter()
            .filter(|piece| piece.flags & F_WRITE == flag)
            .flat_map(|piece| piece.gpa..piece.gpa + u64::from(piece.bytes))
            .collect()
    };
    let (out, mut into) = (bytes(0), bytes(F_WRITE));
    let status_gpa = into.pop();
    if status_gpa.is_none() || out.len() < 16 {
        return Expected::reject(Status::IoError, status_gpa);
    }
    let get = |addresses: &[u64]| -> Vec<u8> {
        addresses.iter().map(|gpa| guest.read(*gpa, 1)[0]).collect()
    };
    let (header, out) = out.split_at(16);
    let header = get(header);
    let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
    let transfer = |kind, data: &[u64]| {
        let count = data.len() as u64 / 512;
        let fits = sector.checked_add(count).is_some_and(|end| end <= config.blocks);
        if data.is_empty() || !data.len().is_multiple_of(512) || !fits {
            return Expected::reject(Status::InvalidRange, status_gpa);
        }
        let range = Some(BlockRange { lba: sector, blocks: count });
        let verdict = Verdict::Run(kind);
        Expected { verdict, status_gpa, data: data.to_vec(), range, ranges: Vec::new() }
    };
    let verdict = match kind {
        0 if out.is_empty() => return transfer(Kind::Read, &into),
        1 if into.is_empty() => return transfer(Kind::Write, out),
        11 | 13 if into.is_empty() => return reference_ranges(kind, &get(out), status_gpa, config),
        4 => Verdict::Run(Kind::Flush),
        8 => Verdict::Id,
        0 | 1 | 11 | 13 => Verdict::Reject(Status::IoError),
        _ => Verdict::Reject(Status::Unsupported),
    };
    Expected { verdict, ..Expected::reject(Status::Ok, status_gpa) }
}

fn reference_ranges(
    kind: u32,
    data: &[u8],
    status_gpa: Option<u64>,
    config: &DeviceConfig,
) -> Expected {
    if data.is_empty() || !data.len().is_multiple_of(16) || data.len() / 16 > 16 {
        return Expected::reject(Status::IoError, status_gpa);
    }
    let mut ranges = Vec::new();
    for raw in data.chunks(16) {
        let sector = u64::from_le_bytes(raw[..8].try_into().unwrap());
        let count = u32::from_le_bytes(raw[8..12].try_into().unwrap());
        let flags = u32::from_le_bytes(raw[12..].try_into().unwrap());
        if flags > u32::from(kind == 13) {
            return Expected::reject(Status::Unsupported, status_gpa);
        }
        let end = sector.checked_add(u64::from(count));
        if count > 65536 || end.is_none_or(|end| end > config.blocks) {
            return Expected::reject(Status::InvalidRange, status_gpa);
        }
        if count > 0 {
            ranges.push(BlockRange { lba: sector, blocks: count.into() });
        }
    }
    if ranges.is_empty() {
        return Expected::reject(Status::Ok, status_gpa);
    }
    let verdict = Verdict::Run(if kind == 11 { Kind::Discard } else { Kind::WriteZeroes });
    Expected { verdict, ranges, ..Expected::reject(Status::Ok, status_gpa) }
}

/// Splits `bytes` bytes at `gpa` into up to four pieces.
fn split(random: &mut Random, gpa: u64, bytes: u32, flags: u16, pieces: &mut Vec<Descriptor>) {
    let mut gpa = gpa;
    let mut left = bytes;
    for _ in 0..random.below(3) {
        if left > 1 {
            let now = 1 + u32::try_from(random.below(u64::from(left - 1))).unwrap();
            pieces.push(Descriptor { gpa, bytes: now, flags, next: 0 });
            gpa += u64::from(now);
            left -= now;
        }
    }
    pieces.push(Descriptor { gpa, bytes: left, flags, next: 0 });
}

/// Writes a request somewhere, mostly sound, sometimes spoilt; returns its head.
fn build(random: &mut Random, guest: &Guest) -> u16 {
    let kind = random.pick(&[0, 1, 0, 1, 4, 8, 11, 13, 2, 7]);
    let place = |random: &mut Random| DATA + random.below(MEMORY_BYTES - 0x1_0000 - 0x1_0000);
    let header = place(random);
    let sector = random.below(2048);
    let sector = random.pick(&[sector, 2047, 2048, u64::MAX]);
    let sector = if random.one_in(3) { sector } else { random.below(2040) };
    guest.header(header, kind, sector);
    let mut pieces = Vec::new();
    split(random, header, 16, 0, &mut pieces);
    let data = place(random);
    let blocks = 1 + random.below32(8);
    match kind {
        0 => split(random, data, 512 * blocks, F_WRITE, &mut pieces),
        1 => split(random, data, 512 * blocks, 0, &mut pieces),
        8 => {
            let bytes = random.pick(&[20, 19, 64]);
            split(random, data, bytes, F_WRITE, &mut pieces);
        }
        11 | 13 => {
            let many = if random.one_in(8) { 20 } else { 4 };
            let ranges = 1 + random.below32(many);
            for n in 0..u64::from(ranges) {
                let sector = if random.one_in(9) { 2047 } else { random.below(1000) };
                guest.write(data + 16 * n, &sector.to_le_bytes());
                let most = if random.one_in(9) { 99_999 } else { 900 };
                guest.write(data + 16 * n + 8, &random.below32(most).to_le_bytes());
                let flags = if random.one_in(9) { random.below32(4) } else { 0 };
                guest.write(data + 16 * n + 12, &flags.to_le_bytes());
            }
            split(random, data, 16 * ranges, 0, &mut pieces);
        }
        _ => {}
    }
    let status = place(random);
    pieces.push(Descriptor { gpa: status, bytes: 1, flags: F_WRITE, next: 0 });
    if random.one_in(2) {
        spoil(random, &mut pieces);
    }
    lay_out(random, guest, &pieces)
}

/// Breaks something in a list of buffers.
fn spoil(random: &mut Random, pieces: &mut Vec<Descriptor>) {
    let at = usize::try_from(random.below(pieces.len() as u64)).unwrap();
    match random.below(8) {
        0 => pieces[at].bytes = 0,
        1 => {
            let end = BASE + MEMORY_BYTES - 1;
            pieces[at].gpa = random.pick(&[0, u64::MAX - 3, BASE - 1, end]);
        }
        2 => pieces[at].flags ^= F_WRITE,
        3 => pieces[at].bytes = random.pick(&[u32::MAX, 511, 17, 3]),
        4 => drop(pieces.pop()),
        5 => drop(pieces.remove(0)),
        6 => pieces.truncate(at + 1),
        _ => {
            let piece = pieces[at];
            pieces.insert(at, piece);
        }
    }
    if pieces.is_empty() {
        pieces.push(Descriptor { gpa: DATA, bytes: 1, flags: F_WRITE, next: 0 });
    }
}

/// Puts the buffers into descriptors, some in an indirect table; links them, not always well.
fn lay_out(random: &mut Random, guest: &Guest, pieces: &[Descriptor]) -> u16 {
    let size = guest.size;
    let start = u16::try_from(random.below(size.into())).unwrap();
    let stride = 1 + 2 * u16::try_from(random.below(4)).unwrap();
    let slot = |n: usize| (start + stride * u16::try_from(n).unwrap()) % size;
    let direct = if random.one_in(2) {
        pieces.len()
    } else {
        usize::try_from(random.below(pieces.len() as u64)).unwrap()
    };
    let ring = Guest::ring_gpa(0);
    let in_table = pieces.len() - direct;
    let wild = |random: &mut Random, next: u16| {
        if random.one_in(40) { u16::try_from(random.below(40)).unwrap() } else { next }
    };
    let wild_flags = |random: &mut Random, flags: u16| {
        if random.one_in(60) { flags ^ (1 << random.below(3)) } else { flags }
    };
    for (n, piece) in pieces[..direct].iter().enumerate() {
        let more = n + 1 < direct || in_table > 0;
        let flags = wild_flags(random, piece.flags | if more { F_NEXT } else { 0 });
        let next = wild(random, slot(n + 1));
        guest
            .write_descriptor(ring + 16 * u64::from(slot(n)), Descriptor { flags, next, ..*piece });
    }
    if in_table > 0 {
        let table = BASE + MEMORY_BYTES - 0x4000 + random.below(64) * 16;
        for (n, piece) in pieces[direct..].iter().enumerate() {
            let more = n + 1 < in_table;
            let flags = wild_flags(random, piece.flags | if more { F_NEXT } else { 0 });
            let next = wild(random, u16::try_from(n + 1).unwrap());
            guest.write_descriptor(table + 16 * n as u64, Descriptor { flags, next, ..*piece });
        }
        let bytes = 16 * u32::try_from(in_table).unwrap() + u32::from(random.one_in(30));
        let flags = wild_flags(random, F_INDIRECT);
        let entry = Descriptor { gpa: table, bytes, flags, next: slot(direct + 1) };
        guest.write_descriptor(ring + 16 * u64::from(slot(direct)), entry);
    }
    start
}

#[test]
fn any_chain_parses_as_the_reference_does() {
    for seed in seeds(3) {
        print_seed("any_chain_parses_as_the_reference_does", seed);
        let mut random = Random::new(seed);
        let guest = Guest::new(1, 32);
        let ring = guest.ring(0);
        let mut config = config(1);
        // So that some chains are too long.
        config.seg_max = 4;
        let mut body = Body::default();
        let mut ran = 0;
        for round in 0..6000 {
            let head = build(&mut random, &guest);
            let indirect = !random.one_in(10);
            let expected = reference(&guest, head, indirect, &config);
            let verdict = body.parse(&ring, &guest.memory, head, indirect, &config);
            let runs = matches!(verdict, Verdict::Run(Kind::Read | Kind::Write));
            let got = Expected {
                verdict,
                status_gpa: body.status_gpa,
                data: if runs { body.data_addresses() } else { Vec::new() },
                range: body.range,
                ranges: if matches!(verdict, Verdict::Run(_)) {
                    body.ranges.clone()
                } else {
                    Vec::new()
                },
            };
            assert_eq!(got, expected, "seed {seed} round {round} head {head}");
            ran += usize::from(matches!(verdict, Verdict::Run(_)));
        }
        assert!(ran > 1000, "only {ran} chains were sound: the test tests too little");
    }
}

/// Rejected chains go back to the guest, with a status where there is a place for one.
#[test]
fn hostile_chains_are_answered_and_the_queue_lives_on() {
    type Spoil = fn(&Guest);
    let header = DATA + 0x1000;
    let cases: [(&str, Spoil, u32, Option<u8>); 14] = [
        ("loop", |guest| guest.descriptor(0, 2, DATA, 1, F_NEXT | F_WRITE, 0), 0, None),
        ("self loop", |guest| guest.descriptor(0, 0, DATA, 16, F_NEXT, 0), 0, None),
        ("next out of range", |guest| guest.descriptor(0, 1, DATA, 512, F_NEXT, 16), 0, None),
        ("unmapped", |guest| guest.descriptor(0, 1, 0x1000, 512, F_NEXT, 2), 0, None),
        ("wraps", |guest| guest.descriptor(0, 1, u64::MAX - 5, 512, F_NEXT, 2), 0, None),
        ("empty", |guest| guest.descriptor(0, 1, DATA, 0, F_NEXT, 2), 0, None),
        ("no status", |guest| guest.descriptor(0, 1, DATA, 512, 0, 2), 0, None),
        (
            "readable after writable",
            |guest| {
                guest.descriptor(0, 0, DATA + 0x1000, 16, F_NEXT | F_WRITE, 1);
            },
            0,
            None,
        ),
        (
            "wrong direction",
            |guest| {
                guest.descriptor(0, 1, DATA, 512, F_NEXT | F_WRITE, 2);
            },
            1,
            Some(1),
        ),
        ("short header", |guest| guest.descriptor(0, 0, DATA + 0x1000, 15, F_NEXT, 2), 1, Some(1)),
        ("odd length", |guest| guest.descriptor(0, 1, DATA, 513, F_NEXT, 2), 1, Some(1)),
        ("beyond the disk", |guest| guest.header(DATA + 0x1000, 1, 2048), 1, Some(1)),
        ("wrapping sector", |guest| guest.header(DATA + 0x1000, 1, u64::MAX), 1, Some(1)),
        ("unknown type", |guest| guest.header(DATA + 0x1000, 99, 0), 1, Some(2)),
    ];
    let mut guest = Guest::new(1, 16);
    let mut rig = Rig::new(config(1));
    rig.connect(&guest, FEATURES, None, &[0]);
    let mut disk = vec![0; 1 << 20];
    for (what, spoil, used_bytes, status) in cases {
        guest.request(0, 0, header, 1, 7, (DATA, 512));
        spoil(&guest);
        guest.offer(0, 0);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [(0, used_bytes)], "{what}");
        assert_eq!(guest.status(header), status.unwrap_or(0xff), "{what}");
        // A sound request right after it.
        guest.request(0, 4, header, 1, 3, (DATA, 512));
        guest.offer(0, 4);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [(4, 1)], "{what}");
        assert_eq!(guest.status(header), 0, "{what}");
    }
    assert_eq!(rig.device.busy(), 0);
    assert_eq!(rig.buffers.available(), (32, 4));
}

#[test]
fn a_broken_ring_stops_that_queue_only_and_restarts_clean() {
    let header = DATA + 0x1000;
    type Spoil = fn(&mut Guest);
    let cases: [(&str, Spoil); 3] = [
        ("head out of range", |guest| guest.offer(0, 16)),
        ("head offered twice", |guest| {
            guest.request(0, 0, DATA + 0x1000, 1, 0, (DATA, 512));
            guest.offer(0, 0);
            guest.offer(0, 0);
        }),
        ("index too far", |guest| {
            let gpa = Guest::ring_gpa(0) + 0x1002;
            let index = guest.read_u16(gpa).wrapping_add(17);
            guest.write(gpa, &index.to_le_bytes());
        }),
    ];
    for (what, spoil) in cases {
        let mut guest = Guest::new(2, 16);
        let mut rig = Rig::new(config(2));
        rig.connect(&guest, FEATURES, None, &[0, 0]);
        let mut disk = vec![0; 1 << 20];
        spoil(&mut guest);
        rig.poll(64);
        assert_eq!(eventfd_count(&rig.errors[0]), 1, "{what}: the error eventfd");
        // What was taken before is answered; nothing more is taken.
        rig.run(&mut disk);
        let answered = guest.reap(0).len();
        guest.request(0, 4, header, 1, 0, (DATA, 512));
        guest.offer(0, 4);
        guest.request(1, 0, header, 1, 0, (DATA, 512));
        guest.offer(1, 0);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [], "{what}");
        assert_eq!(guest.reap(1), [(0, 1)], "{what}: the other queue goes on");
        assert_eq!(rig.device.busy(), 0, "{what}");
        // A reset of the device gets the queue back.
        let queue = 0;
        let answer = rig.ask(crate::control::Request::RingStop { queue }).unwrap();
        assert_eq!(answer.unwrap(), u16::try_from(answered).unwrap(), "{what}");
        let index = guest.used_index(0);
        guest.start_at(0, index);
        rig.set_up_ring(&guest, 0, index);
        guest.request(0, 4, header, 1, 0, (DATA, 512));
        guest.offer(0, 4);
        rig.run(&mut disk);
        assert_eq!(guest.reap(0), [(4, 1)], "{what}: after a restart");
    }
}

#[test]
fn random_rings_never_panic_nor_leak() {
    for seed in seeds(4) {
        print_seed("random_rings_never_panic_nor_leak", seed);
        let mut random = Random::new(seed);
        let mut guest = Guest::new(1, 32);
        let mut rig = Rig::new(config(1));
        rig.connect(&guest, FEATURES, None, &[0]);
        let mut disk = vec![0; 1 << 20];
        let mut breaks = 0;
        for _ in 0..3000 {
            let head = build(&mut random, &guest);
            guest.offer(0, if random.one_in(100) { 77 } else { head });
            if random.one_in(3) {
                rig.run(&mut disk);
            }
            if eventfd_count(&rig.errors[0]) > 0 {
                breaks += 1;
                rig.run(&mut disk);
                rig.ask(crate::control::Request::RingStop { queue: 0 }).unwrap().unwrap();
                guest.start_at(0, 0);
                rig.set_up_ring(&guest, 0, 0);
            }
        }
        rig.run(&mut disk);
        assert!(breaks > 10);
        assert_eq!(rig.device.busy(), 0);
        assert_eq!(rig.buffers.available(), (32, 4));
    }
}
