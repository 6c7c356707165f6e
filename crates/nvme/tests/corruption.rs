//! Bits that flip on the way, where no data digest looks: answers that are not records, and the
//! state messages.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "other tests use the rest of the shared modules")]

mod commands;
mod net;

use base::{
    CommandBody, Epoch, Position, ReplicaCommand, ReplicaError, ReplicaState, ReplyBody, Seq,
};
use commands::{key, result_summary};
use net::{Net, Random, SERVER};
use nvme::initiator::{Input, Output};
use nvme::state::StateMessage;
use nvme::{Subsystem, Tag, target};

fn position(random: &mut Random) -> Position {
    Position::new(Epoch(random.next()), Seq(random.next()))
}

/// What a replica may answer, other than records.
fn answer(random: &mut Random) -> (CommandBody, Result<ReplyBody, ReplicaError>) {
    let truncate = CommandBody::Truncate { keep: Seq(1) };
    match random.below(4) {
        0 | 1 => {
            let state = ReplicaState {
                sealed: Epoch(random.next()),
                last: position(random),
                durable: Seq(random.next()),
                commit: Seq(random.next()),
                trimmed: Seq(random.next()),
                ..ReplicaState::default()
            };
            (CommandBody::Seal, Ok(ReplyBody::Sealed(state)))
        }
        2 => (truncate, Ok(ReplyBody::Truncated { last: position(random) })),
        _ => (truncate, Err(ReplicaError::Behind { last: position(random) })),
    }
}

/// Asks, and answers; at this many bytes after the last one, a bit of what comes back is flipped.
fn ask(
    net: &mut Net,
    body: CommandBody,
    result: Result<ReplyBody, ReplicaError>,
    corrupt: Option<u64>,
) -> Vec<Output> {
    let command = ReplicaCommand { key: key(1), epoch: Epoch(2), commit: Seq(0), body };
    net.at_initiator(Input::Command { tag: Tag(1), command });
    net.settle();
    let link = net.links.values_mut().last().unwrap();
    link.to_initiator.corrupt = corrupt.map(|byte| link.to_initiator.total + byte);
    for event in net.target_events() {
        if let target::Output::Replica { session, tag, .. } = event {
            net.at_target(target::Input::ReplicaReply { session, tag, result });
            break;
        }
    }
    net.settle();
    net.initiator_events()
}

#[test]
fn an_answer_arrives_as_it_was_given_or_not_at_all() {
    let mut lost = 0;
    for seed in 0..500 {
        let mut net = Net::new(seed, Subsystem::Replica(SERVER));
        net.up();
        net.initiator_events();
        ask(&mut net, CommandBody::Seal, Ok(ReplyBody::Sealed(ReplicaState::default())), None);
        let (body, result) = answer(&mut net.random);
        let given = result_summary(&result);
        // Data PDU, its digest, the data, the completion.
        let byte = net.random.below(24 + 4 + 64 + 24 + 4);
        let events = ask(&mut net, body, result, Some(byte));
        let replies = events.iter().filter_map(|event| match event {
            Output::Reply { result, .. } => Some(result),
            _ => None,
        });
        let replies: Vec<_> = replies.collect();
        assert_eq!(replies.len(), 1, "seed {seed}");
        if matches!(replies[0], Err(ReplicaError::Disconnected)) {
            lost += 1;
        } else {
            assert_eq!(result_summary(replies[0]), given, "seed {seed}, byte {byte}");
        }
        net.target_events();
        net.finish();
    }
    assert!(lost > 250, "noticed {lost} times");
}

#[test]
fn a_state_message_arrives_as_it_was_sent_or_not_at_all() {
    let mut lost = 0;
    for seed in 0..150 {
        let mut net = Net::new(seed, Subsystem::Replica(SERVER));
        net.up();
        net.initiator_events();
        let byte = net.random.below(200);
        let link = net.links.values_mut().next().unwrap();
        link.to_initiator.corrupt = Some(link.to_initiator.total + byte);
        let message = StateMessage::Superseded { epoch: Epoch(2) };
        let audience = target::Audience::Heads;
        net.at_target(target::Input::Publish { audience, key: Some(key(1)), message });
        net.settle();
        for event in net.initiator_events() {
            match event {
                Output::State(entry) => {
                    assert_eq!(entry.message, message, "seed {seed}, byte {byte}");
                    assert_eq!(entry.key, Some(key(1)), "seed {seed}, byte {byte}");
                }
                Output::Down { .. } => lost += 1,
                _ => {}
            }
        }
        net.target_events();
        net.finish();
    }
    assert!(lost > 80, "noticed {lost} times");
}
