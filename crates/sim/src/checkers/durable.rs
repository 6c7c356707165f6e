//! I1, seen from a server: what it said is on media and settled is there after every crash, or it
//! says that it has lost something.
//!
//! What is settled is so by the word of a quorum. A server whose disk lied, or whose log rotted at its
//! end where nothing tells that from writes that a crash cut off, may forget its part without a word; then
//! an opening without the others may not know of it, and *they* have to truncate it. So from the moment on
//! at which such a server is back with less than it had, nobody promises more than it has now.

use base::Seq;
use store::BatchFacts;

use super::Seen;

pub(super) struct Durable {
    /// Of each server, the highest seq that was both on media and settled.
    kept: Vec<Seq>,
    /// Of each server, through which seq it says it has things on media, settled or not: others settle by that word.
    durable: Vec<Seq>,
    /// Of each server whose disk may have rotted since it was last looked at, the batches that are whole.
    rotten: Vec<Option<Vec<BatchFacts>>>,
    /// Of each server, through which seq it said it had things on media before its disk turned out to lie.
    lied: Vec<Option<Seq>>,
    /// Of each server, whether its replica is filled with chunks, which drops its log, and whether that is over.
    filled: Vec<(bool, bool)>,
}

impl Durable {
    pub(super) fn new(servers: usize) -> Self {
        Self {
            kept: vec![Seq::ZERO; servers],
            durable: vec![Seq::ZERO; servers],
            rotten: vec![None; servers],
            lied: vec![None; servers],
            filled: vec![(false, false); servers],
        }
    }

    /// A fill that drops the log begins, or is over. A short one may pass between two looks.
    pub(super) fn filled(&mut self, process: usize, is_over: bool) {
        let (filled, over) = &mut self.filled[process];
        (*filled, *over) = (*filled || !is_over, is_over);
    }

    /// Its log's device has lost what it said was on media.
    pub(super) fn log_lost(&mut self, process: usize) {
        if let Some(kept) = self.kept.get_mut(process) {
            *kept = Seq::ZERO;
            let said = core::mem::replace(&mut self.durable[process], Seq::ZERO);
            self.lied[process] = self.lied[process].max(Some(said));
        }
    }

    pub(super) fn forget(&mut self, process: usize) {
        if let Some(kept) = self.kept.get_mut(process) {
            *kept = Seq::ZERO;
        }
    }

    /// Rot in batches that none of the whole ones vouches for cannot be told from writes that were cut
    /// off: so much may go. They are several where batches were written at the same time.
    pub(super) fn rotted(&mut self, process: usize, whole: Vec<BatchFacts>) {
        self.rotten[process] = Some(whole);
    }

    pub(super) fn look(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        let Some((_, info)) = seen.node.store().and_then(|store| store.replicas().next()) else {
            // Deleted, or never made: nothing is promised any more.
            self.forget(seen.process);
            return Ok(());
        };
        let kept = &mut self.kept[seen.process];
        let state = info.state;
        let (filled, is_over) = self.filled[seen.process];
        self.filled[seen.process] = (filled && !is_over, false);
        let refilled = filled && state.last.seq < *kept;
        if info.damaged || state.damaged || state.filling || refilled {
            // What it had is lost and it says so.
            *kept = Seq::ZERO;
            return Ok(());
        }
        let rotten = std::mem::take(&mut self.rotten[seen.process]);
        let lied = self.lied[seen.process].take();
        self.durable[seen.process] = state.durable;
        let mut forgot = lied.is_some_and(|had| state.last.seq < had);
        if rotten.is_some_and(|whole| vouched(&whole, *kept) <= state.last.seq)
            && state.last.seq < *kept
        {
            *kept = state.last.seq;
            forgot = true;
        }
        if forgot {
            for kept in &mut self.kept {
                *kept = (*kept).min(state.last.seq);
            }
        }
        let kept = &mut self.kept[seen.process];
        if state.last.seq < *kept {
            return Err(format!(
                "I1: server {} had settled records through {kept} on media, now its log ends at {}",
                seen.process, state.last
            ));
        }
        if state.trimmed > state.last.seq {
            return Err(format!("I1: server {} trimmed what it does not have", seen.process));
        }
        *kept = (*kept).max(state.commit.min(state.durable));
        Ok(())
    }
}

/// What the log's batches say was on media. Those beyond `kept` may be of a log that was cut since, and so are
/// those that a later segment has again.
fn vouched(whole: &[BatchFacts], kept: Seq) -> Seq {
    let again = |batch: &BatchFacts| {
        whole.iter().any(|other| other.ordinal > batch.ordinal && other.first <= batch.last)
    };
    let counts = whole.iter().filter(|batch| batch.last <= kept && !again(batch));
    counts.map(|batch| batch.durable).max().unwrap_or(Seq::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rot_costs_what_nothing_vouches_for_and_no_more() {
        let batch = |ordinal, first, last, durable| BatchFacts {
            pages: 1,
            first: Seq(first),
            last: Seq(last),
            durable: Seq(durable),
            ordinal,
        };
        // Three were written at the same time; the first and the last of them rotted.
        let whole = [batch(1, 160, 168, 159), batch(1, 201, 232, 168)];
        assert_eq!(vouched(&whole, Seq(237)), Seq(168));
        let whole = [batch(1, 160, 168, 159), batch(1, 233, 237, 200)];
        assert_eq!(vouched(&whole, Seq(237)), Seq(200));
        assert_eq!(vouched(&whole, Seq(236)), Seq(159), "it is of a log that was cut");
        // A fill has dropped the log and brought another.
        let whole = [batch(1, 233, 237, 200), batch(2, 1, 8, 0), batch(2, 17, 240, 0)];
        assert_eq!(vouched(&whole, Seq(240)), Seq(0));
        assert_eq!(vouched(&[], Seq(1)), Seq::ZERO);
    }
}
