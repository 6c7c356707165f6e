//! What a fill has to copy: the source's list of chunks against the replica's own, page by page.

use base::Seq;
use base::chunks::{ListEntry, NO_MORE, UNKNOWN};
use base::planted::{self, Bug};

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The source's list is needed from this chunk on.
    Source(u32),
    /// The own list is needed from this chunk on.
    Own(u32),
    /// The source has a newer version of this chunk, or the only one.
    Copy(ListEntry),
    /// The source does not have this chunk.
    Free(u32),
    /// Nothing is left.
    End,
}

/// One of the two lists, as far as it has come.
#[derive(Debug, Default)]
struct Side {
    entries: Vec<ListEntry>,
    at: usize,
    /// The first chunk that no page said anything about.
    next: u32,
}

impl Side {
    /// Takes the page that begins with chunk `first`; false if it cannot be that.
    fn page(
        &mut self,
        first: u32,
        next: u32,
        chunks: u32,
        entries: impl Iterator<Item = ListEntry>,
    ) -> bool {
        self.entries.clear();
        self.entries.extend(entries);
        self.at = 0;
        let within = |entry: &ListEntry| entry.chunk >= first && entry.chunk < chunks;
        let good = next > first && self.entries.iter().all(within);
        self.next = next;
        good
    }
}

/// The comparison of one pass.
#[derive(Debug)]
pub(super) struct Comparison {
    /// Chunks of the replica.
    chunks: u32,
    source: Side,
    own: Side,
}

impl Comparison {
    pub(super) fn new(chunks: u32) -> Self {
        Self { chunks, source: Side::default(), own: Side::default() }
    }

    /// A page of the source's list, which was asked for; false if it is not one.
    pub(super) fn source_page(
        &mut self,
        next: u32,
        entries: impl Iterator<Item = ListEntry>,
    ) -> bool {
        self.source.page(self.source.next, next, self.chunks, entries)
    }

    /// A page of the own list, which was asked for; false if it is not one.
    pub(super) fn own_page(&mut self, next: u32, entries: impl Iterator<Item = ListEntry>) -> bool {
        self.own.page(self.own.next, next, self.chunks, entries)
    }

    /// What comes next. Differences are taken out.
    pub(super) fn next(&mut self) -> Next {
        loop {
            let (next, source, own) = self.look(self.source.at, self.own.at);
            (self.source.at, self.own.at) = (source, own);
            if let Some(next) = next {
                return next;
            }
        }
    }

    /// Chunks to copy, as far as the pages at hand tell.
    pub(super) fn copies(&self) -> u64 {
        let (mut source, mut own, mut copies) = (self.source.at, self.own.at, 0);
        loop {
            let next;
            (next, source, own) = self.look(source, own);
            match next {
                None | Some(Next::Free(_)) => {}
                Some(Next::Copy(_)) => copies += 1,
                Some(Next::Source(_) | Next::Own(_) | Next::End) => return copies,
            }
        }
    }

    /// What is found at these places of the two pages, and the places after it.
    fn look(&self, source: usize, own: usize) -> (Option<Next>, usize, usize) {
        let at = |side: &Side, at: usize| side.entries.get(at).copied();
        let (theirs, ours) = match (at(&self.source, source), at(&self.own, own)) {
            (None, _) if self.source.next != NO_MORE => {
                return (Some(Next::Source(self.source.next)), source, own);
            }
            (_, None) if self.own.next != NO_MORE => {
                return (Some(Next::Own(self.own.next)), source, own);
            }
            (None, None) => return (Some(Next::End), source, own),
            (Some(_), None) if planted::is(Bug::FillSkipsChunk) => return (None, source + 1, own),
            (Some(theirs), None) => return (Some(Next::Copy(theirs)), source + 1, own),
            (None, Some(ours)) => return (free(ours), source, own + 1),
            (Some(theirs), Some(ours)) => (theirs, ours),
        };
        match theirs.chunk.cmp(&ours.chunk) {
            core::cmp::Ordering::Less => (Some(Next::Copy(theirs)), source + 1, own),
            core::cmp::Ordering::Greater => (free(ours), source, own + 1),
            core::cmp::Ordering::Equal => {
                let good = is_as_good(ours.newest, theirs.newest);
                ((!good).then_some(Next::Copy(theirs)), source + 1, own + 1)
            }
        }
    }
}

/// A chunk that only the replica has.
fn free(ours: ListEntry) -> Option<Next> {
    (!planted::is(Bug::FillKeepsDiscarded)).then_some(Next::Free(ours.chunk))
}

/// Whether what is here of a chunk is what the source has. Zero here: not known.
fn is_as_good(ours: Seq, theirs: Seq) -> bool {
    let newer = ours >= theirs || planted::is(Bug::FillTrustsOldChunk);
    ours != Seq::ZERO && theirs != UNKNOWN && newer
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a comparison over lists that are given in pages of `size` entries.
    fn differences(source: &[(u32, u64)], own: &[(u32, u64)], size: usize) -> Vec<Next> {
        let page = |list: &[(u32, u64)], first: u32| {
            let entries: Vec<_> = list
                .iter()
                .filter(|(chunk, _)| *chunk >= first)
                .map(|&(chunk, newest)| ListEntry { chunk, newest: Seq(newest) })
                .collect();
            let next = entries.get(size).map_or(NO_MORE, |entry| entry.chunk);
            (next, entries.into_iter().take(size).collect::<Vec<_>>())
        };
        let mut comparison = Comparison::new(100);
        let mut found = Vec::new();
        let mut promised = 0;
        loop {
            match comparison.next() {
                Next::Source(first) => {
                    let (next, entries) = page(source, first);
                    assert!(comparison.source_page(next, entries.into_iter()));
                    promised = comparison.copies();
                }
                Next::Own(first) => {
                    let (next, entries) = page(own, first);
                    assert!(comparison.own_page(next, entries.into_iter()));
                    promised = comparison.copies();
                }
                Next::End => return found,
                copy @ Next::Copy(_) => {
                    promised -= 1;
                    assert_eq!(promised, comparison.copies());
                    found.push(copy);
                }
                free @ Next::Free(_) => found.push(free),
            }
        }
    }

    #[test]
    fn only_what_differs_is_copied_whatever_the_pages() {
        let unknown = UNKNOWN.0;
        let source = [(0, 5), (2, 9), (3, 9), (5, unknown), (7, 4), (9, 1), (99, 3)];
        let own = [(1, 7), (2, 9), (3, 8), (4, 1), (5, 60), (7, 0), (9, 2)];
        let copy = |chunk, newest| Next::Copy(ListEntry { chunk, newest: Seq(newest) });
        let expected = [
            copy(0, 5),
            Next::Free(1),
            copy(3, 9),
            Next::Free(4),
            copy(5, unknown),
            copy(7, 4),
            copy(99, 3),
        ];
        for size in 1..10 {
            assert_eq!(differences(&source, &own, size), expected, "pages of {size}");
        }
        assert_eq!(differences(&[], &[], 1), []);
        assert_eq!(differences(&[], &[(3, 1)], 1), [Next::Free(3)]);
    }

    #[test]
    fn pages_that_make_no_sense_are_refused() {
        let entry = |chunk| core::iter::once(ListEntry { chunk, newest: Seq(1) });
        let mut comparison = Comparison::new(10);
        assert!(comparison.source_page(4, entry(3)));
        assert!(!comparison.source_page(4, core::iter::empty()), "no progress");
        let mut comparison = Comparison::new(10);
        assert!(!comparison.source_page(NO_MORE, entry(10)), "past the end");
        let mut comparison = Comparison::new(10);
        assert!(comparison.own_page(4, core::iter::empty()));
        assert!(!comparison.own_page(NO_MORE, entry(3)), "before what was asked for");
    }
}
