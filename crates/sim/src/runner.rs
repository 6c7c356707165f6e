//! Runs of many seeds: a violation in one is caught, cut down to the faults that it takes, and told
//! so that it can be repeated.

use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::time::{Duration, Instant};

use crate::faults::Fault;
use crate::{Report, World, WorldConfig};

thread_local! {
    /// Events of the last world that was dropped.
    static EVENTS: Cell<u64> = const { Cell::new(0) };
    /// What the last panic of this thread said, and where.
    static LAST: RefCell<Option<Violation>> = const { RefCell::new(None) };
}

/// What a run violated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What was said, on as many lines as it took.
    pub what: String,
    /// Where in the source.
    pub place: String,
    /// After how many events.
    pub events: u64,
}

impl Violation {
    /// True if `other` is likely the same fault of the same code.
    fn is_like(&self, other: &Self) -> bool {
        let kind = |text: &str| -> String {
            let line = text.lines().next().unwrap_or_default();
            line.chars().filter(|letter| letter.is_alphabetic()).take(24).collect()
        };
        self.place == other.place && kind(&self.what) == kind(&other.what)
    }
}

pub(crate) fn note_events(events: u64) {
    EVENTS.with(|noted| noted.set(events));
}

/// Panics of simulated worlds are kept for whoever runs them instead of being printed.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        panic::set_hook(Box::new(|info| {
            let payload = info.payload();
            let what = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a panic without words".to_owned());
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            LAST.with(|last| *last.borrow_mut() = Some(Violation { what, place, events: 0 }));
        }));
    });
}

/// Runs one world.
pub fn run(config: WorldConfig) -> Result<Report, Violation> {
    keep_panics();
    panic::catch_unwind(AssertUnwindSafe(|| World::new(config).run())).map_err(|_| {
        let last = LAST.with(|last| last.borrow_mut().take());
        let violation = last.expect("a panic was noted");
        Violation { events: EVENTS.with(Cell::get), ..violation }
    })
}

/// Cuts the faults of a run that violates something down to a list that still violates the same.
/// Every fault of the result is needed, unless the time ran out before that was known.
pub fn minimise(config: &WorldConfig, violation: &Violation, time: Duration) -> Vec<Fault> {
    let end = Instant::now() + time;
    let mut faults = config.faults.clone();
    let fails = |faults: &[Fault]| {
        let config = WorldConfig {
            faults: faults.to_vec(),
            trace: false,
            trace_block: None,
            ..config.clone()
        };
        run(config).is_err_and(|found| found.is_like(violation))
    };
    let mut piece = faults.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        let mut progress = false;
        while start < faults.len() && Instant::now() < end {
            let mut fewer = faults.clone();
            fewer.drain(start..(start + piece).min(fewer.len()));
            if fails(&fewer) {
                faults = fewer;
                progress = true;
            } else {
                start += piece;
            }
        }
        if (piece == 1 && !progress) || Instant::now() >= end {
            return faults;
        }
        piece = (piece / 2).max(1);
    }
}
