//! Sources that lie, stores that fail: a fill ends with the reason, and with nothing under way.

use base::chunks::{self, ListEntry, ListHeader, NO_MORE};
use base::packed;
use base::{
    BlockCount, BlockSize, Buffer, CommandBody, Epoch, FillPhase, Lba, Position, Record,
    RecordHeader, RecordKind, ShardIndex, VolumeId,
};

use super::*;

const KEY: ReplicaKey = ReplicaKey { volume: VolumeId::from_bytes([1; 16]), shard: ShardIndex(0) };
const SOURCE: ServerId = ServerId::from_bytes([2; 16]);
const RATE: u64 = 1 << 30;

type Answer = Result<ReplyBody, ReplicaError>;

fn order() -> Order {
    Order { epoch: Epoch(5), source: SOURCE, chunks: true }
}

fn shape() -> Shape {
    let (unit, block_size) = (BlockCount(16), BlockSize::B4096);
    Shape { unit, blocks: 64, block_size, last: Position::ZERO }
}

fn list(trimmed: u64, next: u32, entries: &[u32]) -> ReplyBody {
    sized_list(trimmed, next, entries, 64)
}

fn sized_list(trimmed: u64, next: u32, entries: &[u32], blocks: u64) -> ReplyBody {
    let trimmed = Position::new(Epoch(1), Seq(trimmed));
    let header = ListHeader { trimmed, commit: trimmed.seq, next, blocks };
    let entry = |chunk: &u32| ListEntry { chunk: *chunk, newest: Seq(3) };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    let mut bytes = [0; 256];
    let used = chunks::encode(&header, &entries, &mut bytes);
    ReplyBody::Chunks(Buffer::copied_from(&bytes[..used]))
}

fn record(position: (u64, u64), previous: u64, lba: u64, blocks: u32) -> ReplyBody {
    let buffer = BufferPool::heap(0, 1).take(4096).expect("a fresh pool");
    let header = RecordHeader {
        key: KEY,
        position: Position::new(Epoch(position.0), Seq(position.1)),
        previous_epoch: Epoch(previous),
        kind: RecordKind::Write,
        block_size: BlockSize::B4096,
        lba: Lba(lba),
        blocks: BlockCount(blocks),
        fua: false,
    };
    ReplyBody::Record(Record::encode(header, buffer))
}

/// Records of one block each, one after the other; record 11 follows epoch 1, the others their own.
fn packed_run(positions: &[(u64, u64)]) -> ReplyBody {
    let mut bytes = vec![0; 128 * 1024];
    let mut end = 0;
    for position in positions {
        let previous = if position.1 == 11 { 1 } else { 5 };
        let ReplyBody::Record(record) = record(*position, previous, 0, 1) else { unreachable!() };
        let (header, payload) = (record.header_bytes().bytes(), record.payload().bytes());
        end = packed::pack(header, payload, &mut bytes, end).unwrap().expect("there is room");
    }
    ReplyBody::Records(Buffer::copied_from(&bytes[..end]))
}

/// An honest source of one chunk with one block, as of seq 10, and a log of one more record.
fn honest(body: &CommandBody) -> Answer {
    match body {
        CommandBody::List { first: 0, .. } => Ok(list(10, NO_MORE, &[1])),
        CommandBody::List { .. } => Ok(list(10, NO_MORE, &[])),
        CommandBody::Fetch { lba: Lba(16), .. } => Ok(record((5, 10), 5, 20, 1)),
        CommandBody::ScanRun { seq: Seq(11), .. } => Ok(packed_run(&[(5, 11)])),
        CommandBody::ScanRun { .. } | CommandBody::Scan { .. } => {
            Err(ReplicaError::Behind { last: Position::ZERO })
        }
        _ => Ok(ReplyBody::Done),
    }
}

/// Runs a fill to its end; `source` and `store` answer.
fn run(
    mut source: impl FnMut(&CommandBody) -> Answer,
    mut store: impl FnMut(Step) -> Answer,
) -> (FillProgress, Vec<FillEvent>) {
    let mut now = Instant::ZERO + Duration::from_secs(1);
    let mut fills = Fills::new();
    fills.install(now, KEY, order(), shape(), RATE);
    let mut events = Vec::new();
    loop {
        let Some(output) = fills.poll_output() else {
            // The rate is high: nothing takes long.
            let Some(at) = fills.next_deadline().filter(|at| at.since(now).as_secs() < 1) else {
                break;
            };
            now = now.max(at);
            fills.tick(now);
            continue;
        };
        match output {
            FillOutput::Retain { fill, source } => fills.retained(now, fill, source, true),
            FillOutput::Peer { fill, step, command, .. } => {
                let answer = source(&command.body);
                fills.answer(now, fill, step, answer);
            }
            FillOutput::Store { fill, step, .. } => {
                let answer = store(step);
                fills.answer(now, fill, step, answer);
            }
            FillOutput::Own { fill, .. } => {
                fills.own_chunks(now, fill, NO_MORE, core::iter::empty());
            }
            FillOutput::Event { event, .. } => events.push(event),
            FillOutput::Release { .. } | FillOutput::Progress { .. } => {}
        }
        fills.check();
    }
    let progress = fills.install(now, KEY, order(), shape(), RATE);
    (progress, events)
}

/// A store that does everything.
const DONE: fn(Step) -> Answer = |_| Ok(ReplyBody::Done);

#[test]
fn an_honest_source_is_believed() {
    let (progress, events) = run(honest, DONE);
    assert_eq!(progress.phase, FillPhase::Done);
    assert_eq!(progress.copied_bytes, 2 * 4096);
    assert_eq!(events.last(), Some(&FillEvent::Done { bytes: 2 * 4096 }));
}

#[test]
fn a_source_that_lies_is_not_believed() {
    type Lie = fn(&CommandBody) -> Option<Answer>;
    let lies: [(&str, Lie); 12] = [
        ("a list that is none", |body| {
            matches!(body, CommandBody::List { .. })
                .then(|| Ok(ReplyBody::Chunks(Buffer::copied_from(b"nothing"))))
        }),
        ("a chunk past the end", |body| {
            matches!(body, CommandBody::List { .. }).then(|| Ok(list(10, NO_MORE, &[4])))
        }),
        ("a list that does not end", |body| {
            matches!(body, CommandBody::List { .. }).then(|| Ok(list(10, 0, &[])))
        }),
        ("a position at the end of all numbers", |body| {
            matches!(body, CommandBody::List { .. }).then(|| Ok(list(u64::MAX, NO_MORE, &[])))
        }),
        ("blocks of another chunk", |body| {
            matches!(body, CommandBody::Fetch { .. }).then(|| Ok(record((5, 10), 5, 31, 2)))
        }),
        ("blocks of a later epoch", |body| {
            matches!(body, CommandBody::Fetch { .. }).then(|| Ok(record((6, 10), 5, 20, 1)))
        }),
        ("a record of another seq", |body| {
            matches!(body, CommandBody::ScanRun { .. }).then(|| Ok(packed_run(&[(5, 12)])))
        }),
        ("a record after a gap", |body| {
            matches!(body, CommandBody::ScanRun { .. }).then(|| Ok(packed_run(&[(5, 11), (5, 13)])))
        }),
        ("more records than were asked for", |body| {
            let many: [(u64, u64); 6] = core::array::from_fn(|at| (5, 11 + at as u64));
            matches!(body, CommandBody::ScanRun { seq: Seq(11), .. })
                .then(|| Ok(packed_run(&many.repeat(3))))
        }),
        ("one record where several were asked for", |body| {
            matches!(body, CommandBody::ScanRun { .. }).then(|| Ok(record((5, 12), 5, 0, 1)))
        }),
        ("blocks newer than its log", |body| {
            matches!(body, CommandBody::Fetch { lba: Lba(16), .. })
                .then(|| Ok(record((5, 100), 5, 20, 1)))
        }),
        ("something else", |body| {
            let other = matches!(body, CommandBody::ScanRun { .. } | CommandBody::Fetch { .. });
            other.then(|| Ok(ReplyBody::Flushed { durable: Seq(1) }))
        }),
    ];
    for (name, lie) in lies {
        let (progress, events) = run(|body| lie(body).unwrap_or_else(|| honest(body)), DONE);
        assert_eq!(progress.phase, FillPhase::Failed, "{name}");
        let expected = FillEvent::Failed { failure: FillFailure::Mismatch };
        assert_eq!(events.last(), Some(&expected), "{name}");
    }
}

#[test]
fn nothing_is_left_out_of_a_larger_replica() {
    let larger = |body: &CommandBody| match body {
        CommandBody::List { .. } => Ok(sized_list(10, NO_MORE, &[1], 65)),
        other => honest(other),
    };
    let (progress, events) = run(larger, DONE);
    assert_eq!(progress.phase, FillPhase::Failed);
    assert_eq!(events.last(), Some(&FillEvent::Failed { failure: FillFailure::Larger }));
}

#[test]
fn a_failure_names_its_place() {
    let scan_damaged = |body: &CommandBody| match body {
        CommandBody::ScanRun { .. } => Err(ReplicaError::Damaged),
        other => honest(other),
    };
    let (progress, events) = run(scan_damaged, DONE);
    assert_eq!(progress.phase, FillPhase::Failed);
    let failure = FillFailure::Source(ReplicaError::Damaged);
    assert_eq!(events.last(), Some(&FillEvent::Failed { failure }));
    for failing in [Step::Begin, Step::Chunk { slot: 0 }, Step::Commit { slot: 0 }, Step::End] {
        let store = |step| if step == failing { Err(ReplicaError::NoSpace) } else { DONE(step) };
        let (progress, events) = run(honest, store);
        assert_eq!(progress.phase, FillPhase::Failed, "{failing:?}");
        let failure = FillFailure::Here(ReplicaError::NoSpace);
        assert_eq!(events.last(), Some(&FillEvent::Failed { failure }), "{failing:?}");
    }
}

#[test]
fn four_work_and_the_others_wait() {
    let now = Instant::ZERO + Duration::from_secs(1);
    let mut fills = Fills::new();
    let key = |shard| ReplicaKey { shard: ShardIndex(shard), ..KEY };
    for shard in 0..6 {
        fills.install(now, key(shard), order(), shape(), RATE);
        fills.check();
    }
    let retained = |fills: &mut Fills| {
        let outputs: Vec<_> = std::iter::from_fn(|| fills.poll_output()).collect();
        outputs.iter().filter(|output| matches!(output, FillOutput::Retain { .. })).count()
    };
    assert_eq!(retained(&mut fills), ACTIVE_MAX);
    fills.abort(now, key(1));
    assert_eq!(retained(&mut fills), 1, "its place is taken");
    // A Seal of the same epoch lets chunks be copied on, one of a higher epoch does not.
    fills.sealed(now, key(0), Epoch(5));
    assert_eq!(fills.progress().count(), 5);
    fills.sealed(now, key(0), Epoch(6));
    assert_eq!(fills.progress().count(), 4);
    fills.stop(now);
    assert_eq!(fills.progress().count(), 0);
}

#[test]
fn a_log_comes_in_runs_and_what_does_not_fit_by_itself() {
    const LAST: u64 = 100;
    let mut alone = 0;
    let source = |body: &CommandBody| match body {
        CommandBody::ScanRun { seq, .. } | CommandBody::Scan { seq, .. } if seq.0 > LAST => {
            Err(ReplicaError::Behind { last: Position::ZERO })
        }
        CommandBody::ScanRun { seq, records, .. } => {
            assert!(*records >= 1);
            // At most three at a time, and one in ten does not fit with others.
            let end = (seq.0 + u64::from(*records).min(3)).min(LAST + 1);
            let end = (seq.0..end).find(|seq| seq % 10 == 0).unwrap_or(end);
            let run: Vec<_> = (seq.0..end).map(|seq| (5, seq)).collect();
            if run.is_empty() {
                return Ok(ReplyBody::Records(Buffer::copied_from(&[])));
            }
            Ok(packed_run(&run))
        }
        CommandBody::Scan { seq, .. } => {
            alone += 1;
            Ok(record((5, seq.0), if seq.0 == 11 { 1 } else { 5 }, 0, 1))
        }
        other => honest(other),
    };
    let (progress, events) = run(source, DONE);
    assert_eq!(progress.phase, FillPhase::Done, "{events:?}");
    assert_eq!(progress.copied_bytes, (1 + LAST - 10) * 4096);
    assert_eq!(alone, 9, "20 to 100");
}
