//! A next process takes everything over from a running one, or dies and the running one takes it back:
//! what `shell::handover` and the daemons' `upgrade` do (`docs/decisions/0018-upgrade-by-hand-over.md`), as
//! far as the cluster sees it. The front ends' part is not here: requests that were not answered in time are
//! as lost as in a crash.

use core::time::Duration;

use base::Instant;
use node::{Input, Legacy};

use super::{Event, World};
use crate::clock::Clock;
use crate::places::Place;

/// For requests under way to be answered, and for a head to be released.
const DRAIN: Duration = Duration::from_millis(500);
/// For disk operations under way.
const CLOSE: Duration = Duration::from_secs(5);
/// A next process that does not serve by then is killed.
const READINESS: Duration = Duration::from_secs(10);
/// How often somebody looks.
const TURN_NANOS: u64 = 200_000;

/// How far a process is with handing over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving {
    step: Step,
    until: Instant,
    /// The next process dies so long after it has begun.
    dies_after: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Requests under way are answered.
    Drain,
    /// The head releases its members.
    Release,
    /// Connections are closed; what disks were asked to do ends.
    Close,
}

impl Leaving {
    pub(crate) fn has_let_go(self) -> bool {
        self.step == Step::Close
    }
}

/// What a process begins with that takes over, or takes back.
#[derive(Clone, Debug)]
pub(crate) struct Successor {
    /// What the one before has said. Who takes back does not know what happened meanwhile.
    pub(crate) legacy: Option<Legacy>,
    /// The machine's.
    pub(crate) clock: Clock,
    dies_after: Option<Duration>,
    takes_back: bool,
}

impl World {
    pub(super) fn upgrade(&mut self, process: usize, dies_after: Option<Duration>) -> bool {
        let state = &mut self.processes[process];
        let runs = state.open && state.paused_until <= self.now && state.leaving.is_none();
        if !runs || state.node.is_none() || self.provisioned < self.config.servers {
            return false;
        }
        state.leaving = Some(Leaving { step: Step::Drain, until: self.now + DRAIN, dies_after });
        self.hand_over(process, false);
        true
    }

    /// The process goes on handing over, as far as that goes now; or the next one dies.
    pub(super) fn hand_over(&mut self, process: usize, dies: bool) {
        if dies {
            return self.next_dies(process);
        }
        while let Some(leaving) = self.processes[process].leaving {
            let late = self.now >= leaving.until;
            let state = &self.processes[process];
            let (is_done, next) = match leaving.step {
                Step::Drain => {
                    let mut requests = self.requests.values();
                    let done = requests.all(|guest| guest.process != process);
                    (done || late, (Step::Release, DRAIN))
                }
                Step::Release => (state.head.is_none() || late, (Step::Close, CLOSE)),
                Step::Close if state.operations.iter().next().is_none() => {
                    return self.leave(process, leaving, !late);
                }
                // Devices stay locked until then.
                Step::Close => (false, (Step::Close, CLOSE)),
            };
            if !is_done {
                let life = state.life;
                return self.after(TURN_NANOS, Event::HandOver { process, life, dies: false });
            }
            let (step, wait) = next;
            self.begin_step(process, Leaving { step, until: self.now + wait, ..leaving });
        }
    }

    fn begin_step(&mut self, process: usize, leaving: Leaving) {
        let state = &self.processes[process];
        let (life, head) = (state.life, state.head);
        match leaving.step {
            Step::Drain => unreachable!("it is the first one"),
            Step::Release => {
                if let Some(head) = head {
                    self.input(process, life, Input::ReleaseHead(head.handle));
                }
            }
            Step::Close => {
                self.check_invariants(process);
                self.input(process, life, Input::StopConnections);
                let state = &mut self.processes[process];
                (state.open, state.listens) = (false, true);
            }
        }
        // Unless that was its end.
        if self.processes[process].life == life {
            self.processes[process].leaving = Some(leaving);
        }
    }

    /// Nothing is under way any more. Not `in_time`: it takes everything back itself, and is told nothing.
    fn leave(&mut self, process: usize, leaving: Leaving, in_time: bool) {
        let state = &self.processes[process];
        let (clock, local) = (state.clock, state.clock.local(self.now));
        let node = state.node.as_ref().expect("it is running");
        let legacy = node.legacy(local).filter(|_| in_time);
        self.trace.say(self.now, || format!("process {process} hands over {legacy:?}"));
        self.end_process(process, false);
        let dies_after = leaving.dies_after;
        let successor = Successor { legacy, clock, dies_after, takes_back: !in_time };
        self.start_next(process, successor);
    }

    fn start_next(&mut self, process: usize, successor: Successor) {
        self.processes[process].successor = Some(successor);
        self.processes[process].listens = true;
        let nanos = self.random.between(100_000, 5_000_000);
        self.after(nanos, Event::Start { process });
    }

    /// A process has started; it may have taken over from another one.
    pub(super) fn succeed(&mut self, process: usize, successor: Option<Successor>) {
        let Some(Successor { legacy, dies_after, takes_back, .. }) = successor else { return };
        let mut granted = legacy.iter().flat_map(|legacy| &legacy.grants);
        if granted.any(|grant| !grant.left.is_zero()) {
            self.report.places.reach(Place::GrantHandedOver);
        }
        let mut logs = legacy.iter().filter_map(|legacy| legacy.log.as_ref());
        if logs.any(|log| !log.segments.is_empty()) {
            self.report.places.reach(Place::LogHandedOver);
        }
        if takes_back {
            return self.report.places.reach(Place::UpgradeTakenBack);
        }
        self.report.places.reach(Place::Upgraded);
        let life = self.processes[process].life;
        let at = self.now + dies_after.unwrap_or(READINESS);
        self.queue.push(at, Event::HandOver { process, life, dies: true });
        self.processes[process].doomed = dies_after.is_some();
    }

    /// The next process dies, or is killed since it is late, and the one before takes everything back.
    fn next_dies(&mut self, process: usize) {
        let state = &self.processes[process];
        let late = !state.open && state.leaving.is_none();
        if late || state.doomed && self.faults_on {
            self.trace.say(self.now, || format!("process {process} dies, taken back"));
            let clock = state.clock;
            self.end_process(process, false);
            let successor = Successor { legacy: None, clock, dies_after: None, takes_back: true };
            self.start_next(process, successor);
        }
    }
}
