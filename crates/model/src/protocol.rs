//! The steps of the protocol and what must hold after each.

use base::membership::{seal_quorum, write_quorum};
use stateright::{Model, Property};

use crate::state::{HEADS, Head, MEMBERS, Member, Phase, Record, START, Set, State, Store, bit};

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Epochs that are given out.
    pub epochs: u8,
    /// Writes that guests begin.
    pub writes: u8,
    /// Changes of the in-sync set.
    pub changes: u8,
    /// The in-sync set at the start.
    pub in_sync: u8,
    /// Read grants are given and run out. They change nothing about writes, so the two are
    /// checked apart.
    pub grants: bool,
}

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// While a change is open, only the new set is counted in.
    ForgetOldSet,
    /// While a change is open, only the old set is counted in.
    ForgetNewSet,
    /// A member may turn in sync without the commit position.
    AdmitBehind,
    /// The change counts before the store has it.
    AdoptEarly,
    /// A write is acknowledged one member early.
    AckEarly,
    /// An opening is content with one answer less.
    SealEarly,
    /// An opening takes the shortest log.
    WrongTail,
    /// The longest log is taken, whatever its epoch.
    LongestTail,
    /// Members take appends of heads whose epoch is below the sealed one.
    NoFence,
    /// It serves before its EpochStart is at a write quorum.
    ServeEarly,
    /// Members that are not in sync count.
    CountOthers,
    /// A Seal's answer does not wait for the grant.
    IgnoreGrant,
    /// A head goes on trusting a grant that has run out.
    TrustForEver,
    /// The new set is written whatever the epoch of the record.
    UnconditionalChange,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The head (which may have died before) wins the next epoch.
    Acquire(usize),
    /// A member seals the head's epoch, durably; the answer may have to wait.
    Seal(usize, usize),
    /// The member's answer to the Seal arrives.
    Sealed(usize, usize),
    /// The head chooses the tail.
    Choose(usize),
    /// The member truncates what is not the head's.
    Match(usize, usize),
    /// The member appends the next record.
    Append(usize, usize),
    /// The member's answers arrive.
    Acknowledge(usize, usize),
    /// A guest writes.
    Write(usize),
    /// The member grants reads, and the head knows it.
    Grant(usize, usize),
    /// The head no longer counts on the grant.
    Distrust(usize, usize),
    /// The grant runs out at the member: never before it does at the head.
    Expire(usize),
    /// The head begins to change the in-sync set.
    Change(usize, u8),
    /// The store's compare-and-swap.
    Swap(usize),
    /// The store's answer arrives.
    Swapped(usize),
    /// The head leaves in good order.
    Release(usize),
}

/// The protocol, whole or with a rule left out.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// How much may happen.
    pub bounds: Bounds,
    /// What is left out.
    pub mutant: Option<Mutant>,
}

impl Protocol {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// True if `those` are a write quorum of every set that the head counts in.
    fn is_write_quorum(&self, head: &Head, those: Set) -> bool {
        let counts = |set: Set| {
            let those = if self.is(Mutant::CountOthers) { those } else { those & set };
            let needed = write_quorum(set.count_ones() as usize);
            let needed = if self.is(Mutant::AckEarly) { (needed - 1).max(1) } else { needed };
            those.count_ones() as usize >= needed
        };
        match head.wanted {
            None => counts(head.in_sync),
            Some(wanted) if self.is(Mutant::ForgetOldSet) => counts(wanted),
            Some(_) if self.is(Mutant::ForgetNewSet) => counts(head.in_sync),
            Some(wanted) => counts(head.in_sync) && counts(wanted),
        }
    }

    fn is_seal_quorum(&self, head: &Head) -> bool {
        let needed = seal_quorum(head.in_sync.count_ones() as usize);
        let needed = if self.is(Mutant::SealEarly) { needed - 1 } else { needed };
        (head.answered & head.in_sync).count_ones() as usize >= needed.max(1)
    }

    /// True if `log` is to be preferred to `best`.
    fn is_better(&self, log: &[Record], best: &[Record]) -> bool {
        let rank = |log: &[Record]| (log.last().map_or(0, |record| record.epoch), log.len());
        if self.is(Mutant::WrongTail) {
            rank(log) < rank(best)
        } else if self.is(Mutant::LongestTail) {
            log.len() > best.len()
        } else {
            rank(log) > rank(best)
        }
    }

    /// The member obeys the head.
    fn obeys(&self, member: &Member, head: &Head) -> bool {
        member.sealed == head.epoch || self.is(Mutant::NoFence)
    }

    /// Settles what has reached a write quorum, and acknowledges the head's own writes among it.
    fn settle(&self, state: &mut State, index: usize) {
        let head = &state.heads[index];
        let mut commit = head.commit;
        while usize::from(commit) < head.log.len() {
            let holders = (0..MEMBERS).filter(|member| head.acked[*member] > commit);
            let holders = holders.fold(0, |set, member| set | bit(member));
            if !self.is_write_quorum(head, holders) {
                break;
            }
            commit += 1;
        }
        let epoch = head.epoch;
        let head = &mut state.heads[index];
        head.commit = commit;
        if head.serves() {
            for record in &head.log[..usize::from(commit)] {
                if record.epoch == epoch && record.value != START {
                    state.acknowledged |= 1 << record.value;
                }
            }
        }
    }

    /// Records that a guest may have seen: none before the head serves.
    fn settled(&self, head: &Head) -> u8 {
        if head.serves() || self.is(Mutant::ServeEarly) { head.commit } else { 0 }
    }

    fn has(log: &[Record], value: u8) -> bool {
        log.iter().any(|record| record.value == value)
    }

    fn head_actions(&self, state: &State, index: usize, actions: &mut Vec<Action>) {
        let head = &state.heads[index];
        if state.store.epoch < self.bounds.epochs {
            actions.push(Action::Acquire(index));
        }
        if head.phase == Phase::Idle {
            return;
        }
        for member in 0..MEMBERS {
            self.member_actions(state, index, member, actions);
        }
        if head.phase == Phase::Sealing {
            if self.is_seal_quorum(head) {
                actions.push(Action::Choose(index));
            }
            return;
        }
        let serves = head.serves() || self.is(Mutant::ServeEarly);
        if !serves {
            return;
        }
        if state.begun < self.bounds.writes {
            actions.push(Action::Write(index));
        }
        match head.wanted {
            None if state.changes < self.bounds.changes => {
                let others = (0..MEMBERS).map(|member| head.in_sync ^ bit(member));
                actions.extend(
                    others
                        .filter(|set| *set != 0 && self.may_change(head, *set))
                        .map(|set| Action::Change(index, set)),
                );
            }
            None => {}
            Some(wanted) => {
                let done = state.store.in_sync == wanted;
                actions.push(if done { Action::Swapped(index) } else { Action::Swap(index) });
            }
        }
        if head.wanted.is_none() && usize::from(head.commit) == head.log.len() {
            actions.push(Action::Release(index));
        }
    }

    /// Every member of the new set has the head's commit position.
    fn may_change(&self, head: &Head, set: Set) -> bool {
        self.is(Mutant::AdmitBehind)
            || (0..MEMBERS)
                .filter(|member| set & bit(*member) != 0)
                .all(|member| head.follows & bit(member) != 0 && head.acked[member] >= head.commit)
    }

    fn member_actions(&self, state: &State, index: usize, at: usize, actions: &mut Vec<Action>) {
        let (head, member) = (&state.heads[index], &state.members[at]);
        if member.sealed < head.epoch {
            actions.push(Action::Seal(index, at));
        }
        let granted = member.granted != 0 && member.granted != head.epoch;
        if member.sealed == head.epoch
            && head.answered & bit(at) == 0
            && (!granted || self.is(Mutant::IgnoreGrant))
        {
            actions.push(Action::Sealed(index, at));
        }
        if head.phase != Phase::Running || head.answered & bit(at) == 0 {
            return;
        }
        let obeys = self.obeys(member, head);
        if head.follows & bit(at) == 0 {
            if obeys {
                actions.push(Action::Match(index, at));
            }
            return;
        }
        if obeys && usize::from(head.answering[at]) < head.log.len() {
            actions.push(Action::Append(index, at));
        }
        if head.acked[at] < head.answering[at] {
            actions.push(Action::Acknowledge(index, at));
        }
        if self.bounds.grants {
            if member.sealed == head.epoch && head.trusted & bit(at) == 0 {
                actions.push(Action::Grant(index, at));
            }
            if head.trusted & bit(at) != 0 && !self.is(Mutant::TrustForEver) {
                actions.push(Action::Distrust(index, at));
            }
        }
    }

    fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Acquire(index) => {
                state.store.epoch += 1;
                let Store { epoch, in_sync } = state.store;
                state.heads[index] =
                    Head { phase: Phase::Sealing, epoch, in_sync, ..Head::default() };
            }
            Action::Seal(index, at) => state.members[at].sealed = state.heads[index].epoch,
            Action::Sealed(index, at) => {
                let (head, member) = (&mut state.heads[index], &state.members[at]);
                let first = head.answered & head.in_sync == 0;
                head.answered |= bit(at);
                if head.phase == Phase::Sealing
                    && head.in_sync & bit(at) != 0
                    && (first || self.is_better(&member.log, &head.log))
                {
                    head.log.clone_from(&member.log);
                }
            }
            Action::Choose(index) => {
                let head = &mut state.heads[index];
                head.phase = Phase::Running;
                head.log.push(Record { epoch: head.epoch, value: START });
                head.start = u8::try_from(head.log.len()).expect("a short log");
            }
            Action::Match(..) | Action::Append(..) | Action::Acknowledge(..) | Action::Write(_) => {
                self.apply_to_log(state, action);
            }
            Action::Change(..) | Action::Swap(_) | Action::Swapped(_) => {
                self.apply_to_set(state, action);
            }
            Action::Grant(index, at) => {
                state.members[at].granted = state.heads[index].epoch;
                state.heads[index].trusted |= bit(at);
            }
            Action::Distrust(index, at) => state.heads[index].trusted &= !bit(at),
            Action::Expire(at) => state.members[at].granted = 0,
            Action::Release(index) => {
                let epoch = state.heads[index].epoch;
                state.heads[index] = Head::default();
                for member in &mut state.members {
                    if member.granted == epoch {
                        member.granted = 0;
                    }
                }
            }
        }
    }

    fn apply_to_log(&self, state: &mut State, action: Action) {
        match action {
            Action::Match(index, at) => {
                let (head, member) = (&mut state.heads[index], &mut state.members[at]);
                let same = head.log.iter().zip(&member.log).take_while(|(a, b)| a == b).count();
                member.log.truncate(same);
                head.follows |= bit(at);
                head.acked[at] = u8::try_from(same).expect("a short log");
                head.answering[at] = head.acked[at];
                self.settle(state, index);
            }
            Action::Append(index, at) => {
                let (head, member) = (&mut state.heads[index], &mut state.members[at]);
                member.log.truncate(usize::from(head.answering[at]));
                member.log.push(head.log[usize::from(head.answering[at])]);
                head.answering[at] += 1;
            }
            Action::Acknowledge(index, at) => {
                let head = &mut state.heads[index];
                head.acked[at] = head.answering[at];
                self.settle(state, index);
            }
            Action::Write(index) => {
                state.begun += 1;
                let head = &mut state.heads[index];
                head.log.push(Record { epoch: head.epoch, value: state.begun });
            }
            other => unreachable!("{other:?} is not about a log"),
        }
    }

    fn apply_to_set(&self, state: &mut State, action: Action) {
        match action {
            Action::Change(index, set) => {
                state.changes += 1;
                state.heads[index].wanted = Some(set);
                if self.is(Mutant::AdoptEarly) {
                    state.heads[index].in_sync = set;
                }
                self.settle(state, index);
            }
            Action::Swap(index) => {
                let head = &mut state.heads[index];
                if head.epoch == state.store.epoch || self.is(Mutant::UnconditionalChange) {
                    state.store.in_sync = head.wanted.expect("a change is open");
                } else {
                    *head = Head::default(); // told that it is deposed
                }
            }
            Action::Swapped(index) => {
                let head = &mut state.heads[index];
                if head.epoch == state.store.epoch {
                    head.in_sync = head.wanted.take().expect("a change is open");
                    self.settle(state, index);
                } else {
                    *head = Head::default();
                }
            }
            other => unreachable!("{other:?} is not about the in-sync set"),
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            store: Store { epoch: 0, in_sync: self.bounds.in_sync },
            members: Default::default(),
            heads: Default::default(),
            begun: 0,
            acknowledged: 0,
            changes: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for index in 0..HEADS {
            self.head_actions(state, index, actions);
        }
        for at in 0..MEMBERS {
            let granted = state.members[at].granted;
            let trusted =
                state.heads.iter().any(|head| head.epoch == granted && head.trusted & bit(at) != 0);
            if granted != 0 && (!trusted || self.is(Mutant::TrustForEver)) {
                actions.push(Action::Expire(at));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action);
        Some(state.canonical())
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("acknowledged writes survive", |_, state: &State| {
                let newest = |head: &&Head| head.epoch == state.store.epoch && head.serves();
                let Some(newest) = state.heads.iter().find(newest) else { return true };
                let acknowledged = (1..8).filter(|value| state.acknowledged & (1 << value) != 0);
                acknowledged.into_iter().all(|value| Self::has(&newest.log, value))
            }),
            Property::always("reads are current", |protocol, state: &State| {
                let current = |head: &Head| {
                    let settled = &head.log[..usize::from(head.commit)];
                    (1..8)
                        .filter(|value| state.acknowledged & (1 << value) != 0)
                        .all(|value| Self::has(settled, value))
                };
                let reads =
                    |head: &&Head| head.serves() && protocol.is_write_quorum(head, head.trusted);
                state.heads.iter().filter(reads).all(current)
            }),
            Property::always("settled logs agree", |protocol, state: &State| {
                let [a, b] = &state.heads;
                let settled = usize::from(protocol.settled(a).min(protocol.settled(b)));
                a.log[..settled] == b.log[..settled]
            }),
            Property::always("one writer an epoch", |_, state: &State| {
                let [a, b] = &state.heads;
                a.phase == Phase::Idle || b.phase == Phase::Idle || a.epoch != b.epoch
            }),
            Property::sometimes("everything is written", |protocol: &Self, state: &State| {
                state.acknowledged.count_ones() == u32::from(protocol.bounds.writes)
            }),
            Property::sometimes(
                "a second head serves with the first one's writes",
                |_, state: &State| {
                    state.heads.iter().any(|head| {
                        head.serves()
                            && head.epoch > 1
                            && state.acknowledged != 0
                            && head.log.iter().any(|r| r.epoch == 1 && r.value != START)
                    })
                },
            ),
            Property::sometimes("a change is done", |protocol: &Self, state: &State| {
                protocol.bounds.changes == 0
                    || (state.store.in_sync != protocol.bounds.in_sync
                        && state
                            .heads
                            .iter()
                            .any(|head| head.serves() && head.in_sync == state.store.in_sync))
            }),
        ]
    }
}
