//! Replica commands from an initiator to a target and back, against a model.

#![allow(clippy::unwrap_used, reason = "tests")]

mod commands;
mod net;

use std::collections::BTreeMap;
use std::time::Duration;

use base::{
    BlockCount, BlockSize, BufferPool, CommandBody, Epoch, HelloReason, Lba, Position, Record,
    RecordHeader, RecordKind, ReplicaCommand, ReplicaError, ReplicaKey, ReplicaState, ReplyBody,
    Seq,
};
use commands::{key, random_command, random_result, result_summary, summary};
use net::{Net, SERVER};
use nvme::initiator::{DownReason, Input, Output};
use nvme::state::StateMessage;
use nvme::{SessionId, Subsystem, Tag, target};

struct Run {
    net: Net,
    pool: BufferPool,
    session: Option<SessionId>,
    sent: std::collections::VecDeque<(Tag, String)>,
    expected: BTreeMap<Tag, String>,
    at_target: Vec<(SessionId, Tag, Tag, ReplicaCommand)>,
    answered: u64,
    last_tag: u64,
    sealed: std::collections::BTreeSet<ReplicaKey>,
    /// Sessions may be lost.
    lossy: bool,
    /// What arrives may differ from what was sent.
    noisy: bool,
    lost: u64,
}

impl Run {
    fn new(mut net: Net) -> Self {
        net.up();
        let mut run = Self::connecting(net);
        run.collect();
        run
    }

    fn connecting(net: Net) -> Self {
        Self {
            net,
            pool: BufferPool::heap(4096, 256),
            session: None,
            sent: std::collections::VecDeque::new(),
            expected: BTreeMap::new(),
            at_target: Vec::new(),
            answered: 0,
            last_tag: 0,
            sealed: std::collections::BTreeSet::new(),
            lossy: false,
            noisy: false,
            lost: 0,
        }
    }

    fn send(&mut self) {
        let Some(command) = random_command(&mut self.net.random, &self.pool) else { return };
        self.last_tag += 1;
        let tag = Tag(self.last_tag);
        if !self.net.initiator.is_up() {
            self.expected.insert(tag, "Err(Disconnected)".to_owned());
            self.net.at_initiator(Input::Command { tag, command });
            return;
        }
        if matches!(
            command.body,
            CommandBody::Seal | CommandBody::Hello { reason: HelloReason::Fill, .. }
        ) {
            self.sealed.insert(command.key);
        }
        if self.sealed.contains(&command.key) {
            self.sent.push_back((tag, summary(&command)));
        } else {
            self.expected.insert(tag, "Err(NotSealed)".to_owned());
        }
        self.net.at_initiator(Input::Command { tag, command });
    }

    fn collect(&mut self) {
        for event in self.net.target_events() {
            match event {
                target::Output::SessionOpened { session, subsystem, host } => {
                    assert!(subsystem == Subsystem::Replica(SERVER) || self.noisy);
                    assert!(host == net::HOST || self.noisy);
                    self.session = Some(session);
                    self.sent.clear();
                    self.at_target.clear();
                }
                target::Output::SessionClosed { .. } if self.lossy => {}
                target::Output::Replica { session, tag, command } if self.noisy => {
                    self.at_target.push((session, tag, Tag(0), command));
                }
                target::Output::Replica { session, tag, command } => {
                    assert_eq!(Some(session), self.session);
                    let command_summary = summary(&command);
                    let sent_tag = loop {
                        let (sent_tag, sent) = self.sent.pop_front().expect("it was sent");
                        if sent == command_summary {
                            break sent_tag;
                        }
                        // A command whose data was corrupted is refused, what follows is not.
                        assert!(self.lossy, "out of order: {command_summary}, not {sent}");
                    };
                    self.at_target.push((session, tag, sent_tag, command));
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        for event in self.net.initiator_events() {
            match event {
                Output::Up { namespace: None } => {}
                Output::Up { .. } | Output::State(_) if self.noisy => {}
                Output::Down { .. } if self.lossy => self.sealed.clear(),
                Output::Reply { result: Err(ReplicaError::Disconnected), .. } if self.lossy => {
                    self.answered += 1;
                    self.lost += 1;
                }
                Output::Reply { .. } if self.noisy => self.answered += 1,
                Output::Reply { tag, result } => {
                    let expected = self.expected.remove(&tag);
                    // A record that was damaged on the way is refused, or found damaged.
                    let damaged =
                        matches!(result, Err(ReplicaError::Invalid | ReplicaError::Damaged));
                    if !(self.lossy && damaged) {
                        assert_eq!(Some(result_summary(&result)), expected, "answered once");
                    }
                    self.answered += 1;
                    // The initiator forgets handles of replicas that are lost to it.
                    if let Err(ReplicaError::Superseded { .. } | ReplicaError::NoReplica) = result {
                        self.sealed.clear();
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    fn answer(&mut self) {
        if self.at_target.is_empty() {
            return;
        }
        let count = self.at_target.len() as u64;
        let index = usize::try_from(self.net.random.below(count)).unwrap();
        let (session, tag, sent_tag, command) = self.at_target.swap_remove(index);
        let mut result = random_result(&mut self.net.random, &self.pool, command);
        // Losing a handle is tested elsewhere: here it would make the model guess.
        if let Err(ReplicaError::Superseded { .. } | ReplicaError::NoReplica) = result {
            result = Err(ReplicaError::Damaged);
        }
        self.expected.insert(sent_tag, result_summary(&result));
        self.net.at_target(target::Input::ReplicaReply { session, tag, result });
    }

    /// Like settle, with sessions that may be lost on the way.
    fn finish_lossy(&mut self) {
        for _ in 0..10_000 {
            self.net.settle();
            self.collect();
            if self.net.initiator.outstanding() == 0 {
                return;
            }
            if self.at_target.is_empty() {
                self.net.pass(Duration::from_millis(20));
            }
            self.answer();
        }
        panic!("{} commands are never answered", self.net.initiator.outstanding());
    }

    fn settle(&mut self) {
        loop {
            self.net.settle();
            self.collect();
            if self.at_target.is_empty() && self.sent.is_empty() {
                break;
            }
            if self.at_target.is_empty() {
                self.net.pass(Duration::from_millis(3));
                continue;
            }
            self.answer();
        }
        self.net.settle();
        self.collect();
    }
}

fn random_commands(seed: u64, digests: (bool, bool), slots: (usize, usize), count: u64) {
    println!("seed {seed} digests {digests:?} slots {slots:?}");
    let net = Net::with(
        seed,
        Subsystem::Replica(SERVER),
        |target| target.require_header_digest = false,
        |initiator| {
            (initiator.header_digest, initiator.data_digest) = digests;
            initiator.queue_entries = 65;
        },
        slots,
    );
    let mut run = Run::new(net);
    while run.last_tag < count {
        match run.net.random.below(8) {
            0..2 => run.send(),
            2 => run.answer(),
            _ => {
                run.net.step();
            }
        }
        run.collect();
    }
    run.settle();
    assert_eq!(run.answered, run.last_tag);
    assert!(run.expected.is_empty());
    run.net.finish();
}

#[test]
fn thousands_of_random_commands() {
    for seed in 0..4 {
        random_commands(seed, (true, false), (256, 64), 600);
        random_commands(100 + seed, (true, true), (256, 64), 400);
        random_commands(200 + seed, (false, false), (256, 64), 400);
    }
}

#[test]
fn a_target_short_of_buffers_is_slow_but_right() {
    for seed in 0..3 {
        random_commands(300 + seed, (true, false), (6, 4), 300);
    }
}

#[test]
fn a_lost_connection_answers_everything_once_and_comes_back() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut run = Run::new(Net::new(seed, Subsystem::Replica(SERVER)));
        for _ in 0..40 {
            run.send();
            for _ in 0..run.net.random.below(4) {
                run.net.step();
            }
        }
        let before = run.net.initiator.outstanding() as u64;
        let answered: u64 = run
            .net
            .initiator_events()
            .iter()
            .filter(|event| matches!(event, Output::Reply { .. }))
            .count() as u64;
        assert_eq!(before + answered, run.last_tag);
        let links: Vec<u64> = run.net.links.keys().copied().collect();
        let victim = links[usize::try_from(run.net.random.below(2)).unwrap()];
        run.net.cut(victim);
        let events = run.net.initiator_events();
        let replies = events
            .iter()
            .filter(|event| {
                matches!(event, Output::Reply { result: Err(ReplicaError::Disconnected), .. })
            })
            .count() as u64;
        assert_eq!(replies, before);
        assert!(matches!(events.last(), Some(Output::Down { reason: DownReason::Closed })));
        assert_eq!(run.net.target.sessions(), 0);
        run.net.pass(Duration::from_secs(3));
        assert!(run.net.initiator.is_up());
        run.at_target.clear();
        run.net.finish();
    }
}

#[test]
fn silence_is_noticed_by_both_sides() {
    let mut net = Net::new(1, Subsystem::Replica(SERVER));
    net.up();
    net.pass(Duration::from_mins(1));
    assert!(net.initiator.is_up(), "keep-alive keeps an idle session");
    assert_eq!(net.target.sessions(), 1);
    net.initiator_events();
    net.frozen = true;
    net.pass(Duration::from_millis(5_100));
    assert_eq!(net.target.sessions(), 0);
    let events = net.initiator_events();
    assert!(
        events.iter().any(|event| matches!(event, Output::Down { reason: DownReason::Silent })),
        "{events:?}"
    );
    net.frozen = false;
    net.pass(Duration::from_secs(8));
    assert!(net.initiator.is_up());
    net.finish();
}

#[test]
fn attempts_are_spaced_out_and_capped() {
    let mut net = Net::new(7, Subsystem::Replica(SERVER));
    net.refuse = true;
    net.at_initiator(Input::Tick);
    net.pass(Duration::from_mins(1));
    let attempts = net.initiator_events().len();
    assert!((30..120).contains(&attempts), "{attempts} attempts in a minute");
    net.refuse = false;
    net.pass(Duration::from_secs(3));
    assert!(net.initiator.is_up());
    net.finish();
}

#[test]
fn a_head_that_comes_back_replaces_its_old_session() {
    let mut net = Net::new(3, Subsystem::Replica(SERVER));
    net.up();
    let old = match &net.target_events()[..] {
        [target::Output::SessionOpened { session, .. }] => *session,
        other => panic!("{other:?}"),
    };
    // The initiator loses a connection; the target does not notice.
    let id = *net.links.keys().next().unwrap();
    net.frozen = true;
    net.links.get_mut(&id).unwrap().to_initiator.receive = None;
    net.initiator.handle(net.now, Input::Closed { connection: nvme::ConnectionId(id) });
    // What the initiator closes of itself does not reach the target either.
    while let Some(output) = net.initiator.poll_output() {
        if let Output::Close { connection } = output {
            net.initiator.handle(net.now, Input::Closed { connection });
        }
    }
    for link in net.links.values_mut() {
        link.lose_initiator();
    }
    net.frozen = false;
    net.pass(Duration::from_secs(1));
    let events = net.target_events();
    assert!(
        matches!(&events[..], [
            target::Output::SessionClosed { session },
            target::Output::SessionOpened { .. },
        ] if *session == old),
        "{events:?}"
    );
    net.finish();
}

#[test]
fn state_messages_arrive_in_order() {
    let mut net = Net::new(5, Subsystem::Replica(SERVER));
    net.up();
    net.initiator_events();
    for percent in 0..100 {
        let message = StateMessage::CatchingUp { percent };
        let audience = target::Audience::Heads;
        net.at_target(target::Input::Publish { audience, key: Some(key(1)), message });
        if net.random.chance(3) {
            net.settle();
        }
    }
    net.settle();
    let numbers: Vec<u64> = net
        .initiator_events()
        .iter()
        .map(|event| match event {
            Output::State(entry) => {
                let percent = u8::try_from(entry.number - 1).unwrap();
                assert_eq!(entry.message, StateMessage::CatchingUp { percent });
                assert_eq!(entry.key, Some(key(1)));
                entry.number
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(numbers.is_sorted_by(|a, b| a < b));
    assert_eq!(numbers.last(), Some(&100));
    net.finish();
}

#[test]
fn handles_are_taken_back_from_heads_that_left() {
    let mut net = Net::new(6, Subsystem::Replica(SERVER));
    net.up();
    let mut tag = 0;
    let mut run = |net: &mut Net, number: u64, body: CommandBody, result| {
        tag += 1;
        let command = ReplicaCommand { key: key(number), epoch: Epoch(2), commit: Seq(0), body };
        net.at_initiator(Input::Command { tag: Tag(tag), command });
        net.settle();
        for event in net.target_events() {
            if let target::Output::Replica { session, tag, command } = event {
                assert_eq!(command.key, key(number));
                net.at_target(target::Input::ReplicaReply { session, tag, result });
                break;
            }
        }
        net.settle();
        net.initiator_events()
    };
    // More replicas than there are handles, one after the other.
    for number in 0..5000 {
        let sealed = Ok(ReplyBody::Sealed(ReplicaState::default()));
        run(&mut net, number, CommandBody::Seal, sealed);
        let events = if number % 2 == 0 {
            run(&mut net, number, CommandBody::Release, Ok(ReplyBody::Done))
        } else {
            let error = Err(ReplicaError::Superseded { sealed: Epoch(3) });
            run(&mut net, number, CommandBody::Flush, error)
        };
        assert_eq!(events.len(), 1);
        let events = run(&mut net, number, CommandBody::Renew, Ok(ReplyBody::Done));
        let [Output::Reply { result, .. }] = &events[..] else { panic!("{events:?}") };
        let goes_on = match result {
            Ok(ReplyBody::Done) => true,
            Err(ReplicaError::NotSealed) => false,
            other => panic!("{other:?}"),
        };
        // After Release it may have rested. Who was deposed has nothing more to say.
        assert_eq!(goes_on, number % 2 == 0);
        run(&mut net, number, CommandBody::Release, Ok(ReplyBody::Done));
    }
    // The first one's handle was needed: it seals again.
    let events = run(&mut net, 0, CommandBody::Renew, Ok(ReplyBody::Done));
    assert!(
        matches!(&events[..], [Output::Reply { result: Err(ReplicaError::NotSealed), .. }]),
        "{events:?}"
    );
    net.finish();
}

#[test]
fn a_deposed_heads_release_costs_the_next_one_no_handle() {
    let mut net = Net::new(6, Subsystem::Replica(SERVER));
    net.up();
    let mut tag = 0;
    let mut run = |net: &mut Net, number: u64, epoch: u64, body: CommandBody, result| {
        tag += 1;
        let (key, epoch) = (key(number), Epoch(epoch));
        let command = ReplicaCommand { key, epoch, commit: Seq(0), body };
        net.at_initiator(Input::Command { tag: Tag(tag), command });
        net.settle();
        for event in net.target_events() {
            if let target::Output::Replica { session, tag, .. } = event {
                net.at_target(target::Input::ReplicaReply { session, tag, result });
                break;
            }
        }
        net.settle();
        net.initiator_events()
    };
    let sealed = || Ok(ReplyBody::Sealed(ReplicaState::default()));
    run(&mut net, 0, 2, CommandBody::Seal, sealed());
    run(&mut net, 0, 1, CommandBody::Release, Err(ReplicaError::Superseded { sealed: Epoch(2) }));
    // Whoever has said Release makes room; the head of epoch 2 has not.
    for number in 1..5000 {
        run(&mut net, number, 2, CommandBody::Seal, sealed());
        run(&mut net, number, 2, CommandBody::Release, Ok(ReplyBody::Done));
    }
    let events = run(&mut net, 0, 2, CommandBody::Renew, Ok(ReplyBody::Done));
    assert!(
        matches!(&events[..], [Output::Reply { result: Ok(ReplyBody::Done), .. }]),
        "{events:?}"
    );
    net.finish();
}

#[test]
fn commands_before_up_are_answered_at_once() {
    let mut net = Net::new(8, Subsystem::Replica(SERVER));
    let body = CommandBody::Flush;
    let command = ReplicaCommand { key: key(1), epoch: Epoch(1), commit: Seq(0), body };
    net.at_initiator(Input::Command { tag: Tag(9), command });
    let events = net.initiator_events();
    assert!(
        matches!(
            &events[..],
            [Output::Reply { tag: Tag(9), result: Err(ReplicaError::Disconnected) }]
        ),
        "{events:?}"
    );
    net.finish();
}

/// A flipped bit anywhere loses the session at most: with data digests, and without, as between
/// our servers, where the data vouches for itself.
#[test]
fn corruption_is_detected_or_harmless() {
    let mut lost = 0;
    for seed in 0..150 {
        println!("seed {seed}");
        let mut net = Net::with(
            seed,
            Subsystem::Replica(SERVER),
            |_| {},
            |initiator| {
                initiator.data_digest = seed % 3 == 0;
                initiator.queue_entries = 33;
            },
            (256, 64),
        );
        // The first connections of the two sides (the last is used first).
        for _ in 0..2 {
            let towards_target = net.random.chance(2);
            let byte = match net.random.below(3) {
                0 => net.random.below(1500),
                1 => net.random.below(20_000),
                _ => net.random.below(400_000),
            };
            net.corrupt.push((towards_target, byte));
        }
        let mut run = Run::connecting(net);
        run.lossy = true;
        while run.last_tag < 120 {
            match run.net.random.below(8) {
                0..2 => run.send(),
                2 => run.answer(),
                _ => {
                    if !run.net.step() {
                        run.net.pass(Duration::from_millis(20));
                    }
                }
            }
            run.collect();
        }
        run.finish_lossy();
        lost += u64::from(run.lost > 0);
        assert_eq!(run.answered, run.last_tag);
        run.at_target.clear();
        run.net.finish();
    }
    assert!(lost > 20, "corruption was noticed in {lost} runs");
}

/// Without digests anything may arrive: nothing panics, every command is answered once, and the
/// buffers come back.
#[test]
fn noise_never_panics() {
    for seed in 0..25 {
        println!("seed {seed}");
        let mut net = Net::with(
            seed,
            Subsystem::Replica(SERVER),
            |target| target.require_header_digest = false,
            |initiator| {
                initiator.header_digest = false;
                initiator.queue_entries = 33;
            },
            (256, 64),
        );
        net.noise = Some(300 + 200 * seed);
        let mut run = Run::connecting(net);
        (run.lossy, run.noisy) = (true, true);
        for _ in 0..3000 {
            match run.net.random.below(8) {
                0 if run.net.initiator.is_up() => run.send(),
                1 => run.answer(),
                _ => {
                    if !run.net.step() {
                        run.net.pass(Duration::from_millis(20));
                    }
                }
            }
            run.collect();
        }
        run.net.noise = None;
        run.net.at_initiator(Input::Stop);
        run.collect();
        assert_eq!(run.answered, run.last_tag);
        run.at_target.clear();
        run.net.finish();
    }
}

/// A target gone mad sends well-framed PDUs that nobody asked for.
#[test]
fn a_mad_target_never_makes_the_initiator_panic() {
    for seed in 0..150 {
        println!("seed {seed}");
        let net = Net::with(
            seed,
            Subsystem::Replica(SERVER),
            |target| target.require_header_digest = false,
            |initiator| {
                initiator.header_digest = false;
                initiator.queue_entries = 9;
            },
            (256, 64),
        );
        let mut run = Run::new(net);
        (run.lossy, run.noisy) = (true, true);
        for _ in 0..12 {
            run.send();
        }
        for _ in 0..run.net.random.below(30) {
            run.net.step();
            run.collect();
            run.answer();
        }
        let ids: Vec<u64> = run.net.links.keys().copied().collect();
        let random = &mut run.net.random;
        let id = ids[usize::try_from(random.below(2)).unwrap()];
        // Command ids of first uses of slots, mostly.
        let command = u16::try_from(random.below(8) | ((1 + random.below(2)) << 10)).unwrap();
        let command = if random.chance(4) { command & 7 } else { command };
        let length = [16, 48, 80, 84, 512, 4096, 8192][usize::try_from(random.below(7)).unwrap()];
        let (kind, flags, mut body) = match random.below(3) {
            0 => {
                let mut body = vec![0; 16];
                body[12..14].copy_from_slice(&command.to_le_bytes());
                body[14..16].copy_from_slice(&random.next().to_le_bytes()[..2]);
                (5, 0, body)
            }
            1 => (7, [0, 4, 12][usize::try_from(random.below(3)).unwrap()], Vec::new()),
            _ => (9, 0, Vec::new()),
        };
        let data = if kind == 7 { vec![3; length] } else { Vec::new() };
        if body.is_empty() {
            let offset = if random.chance(3) { 512 } else { 0 };
            let length = u32::try_from(length).unwrap();
            let transfer =
                nvme::codec::pdu::Transfer { command_id: command, transfer_tag: 0, offset, length };
            body = transfer.encode().to_vec();
        }
        let mut pdu = vec![kind, flags, 24, 24, 0, 0, 0, 0];
        pdu.extend_from_slice(&body);
        pdu.extend_from_slice(&data);
        let stated = u32::try_from(pdu.len()).unwrap();
        pdu[4..8].copy_from_slice(&stated.to_le_bytes());
        // Only between PDUs: a pipe that is empty.
        run.net.settle();
        run.collect();
        run.net.inject(id, &pdu);
        run.net.settle();
        run.finish_lossy();
        assert_eq!(run.answered, run.last_tag);
        run.at_target.clear();
        run.net.finish();
    }
}

/// Large payloads are received into their place: the region offered is the rest of the payload.
#[test]
fn payloads_are_received_into_place_and_sent_from_it() {
    let mut run = Run::new(Net::new(9, Subsystem::Replica(SERVER)));
    run.net.piece_bytes_max = 20_000;
    let key = key(1);
    let seal = ReplicaCommand { key, epoch: Epoch(2), commit: Seq(0), body: CommandBody::Seal };
    run.net.at_initiator(Input::Command { tag: Tag(1), command: seal });
    let header = RecordHeader {
        key,
        position: Position::new(Epoch(2), Seq(1)),
        previous_epoch: Epoch(0),
        kind: RecordKind::Write,
        block_size: BlockSize::B4096,
        lba: Lba(0),
        blocks: BlockCount(32),
        fua: false,
    };
    let record = Record::encode(header, run.pool.take(128 * 1024).unwrap());
    let sent = record.payload().clone();
    let body = CommandBody::Append { record, media: false };
    let command = ReplicaCommand { key, epoch: Epoch(2), commit: Seq(0), body };
    // Not through the pipes: what the machine gives to send is the record's own memory.
    run.net.initiator.handle(run.net.now, Input::Command { tag: Tag(2), command });
    let mut bytes = Vec::new();
    let mut own = false;
    while let Some(output) = run.net.initiator.poll_output() {
        if let Output::Send { connection, part } = output {
            own |= std::ptr::eq(part.bytes(), sent.bytes());
            bytes.push((connection, part));
        }
    }
    assert!(own, "the payload is not copied");
    for (connection, part) in bytes {
        let link = run.net.links.get_mut(&connection.0).unwrap();
        link.to_target.bytes.extend(part.bytes());
    }
    run.net.settle();
    let longest = run.net.links.values().map(|link| link.to_target.region_bytes_max).max().unwrap();
    assert!(longest > 90_000, "the longest region was {longest} bytes");
    let append = run.net.target_events().pop();
    let Some(target::Output::Replica { command, .. }) = append else { panic!("{append:?}") };
    let CommandBody::Append { record, .. } = command.body else { panic!("an append") };
    assert_eq!(record.payload(), &sent);
    assert_eq!(record.payload().bytes().as_ptr().align_offset(4096), 0);
    drop(record);
    run.net.finish();
}
