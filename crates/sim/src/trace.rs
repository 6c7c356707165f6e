//! What happened, as a digest that two runs of a seed must share, and for people.

use base::Instant;

/// Takes in everything that happens.
pub(crate) struct Trace {
    digest: u64,
    readable: bool,
}

impl Trace {
    pub(crate) fn new(readable: bool) -> Self {
        Self { digest: 0xcbf2_9ce4_8422_2325, readable }
    }

    /// An event is about to happen.
    pub(crate) fn event(&mut self, now: Instant, kind: u8, who: u64, detail: u64) {
        for word in [now.nanos(), u64::from(kind), who, detail] {
            self.digest = (self.digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }

    /// Something that a reader wants to know.
    pub(crate) fn say(&mut self, now: Instant, what: impl FnOnce() -> String) {
        if self.readable {
            let what = what();
            println!("{now} {what}");
        }
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }
}
