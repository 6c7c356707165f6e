//! What pages hold, once for all disks of a thread: the members of a volume write the same payload within
//! microseconds, and three copies of that took more time than anything else.
//!
//! Pages are told apart by all of their bytes, and are copied before they change: nothing of this can be
//! seen from outside.

use std::cell::RefCell;
use std::rc::Rc;

use base::limits::PAGE_BYTES;

/// What a page holds; disks may share it.
pub(super) type Page = Rc<[u8; PAGE_BYTES]>;

/// Pages that may be written again soon: about as many as there are writes under way.
const RECENT: usize = 128;
/// Memory that is kept for pages, in pages.
const FREE: usize = 8192;

/// The pages of this thread's disks.
struct Pages {
    /// Written just now, each where its bytes say.
    recent: Vec<Option<Page>>,
    /// Nobody's.
    free: Vec<Page>,
}

thread_local! {
    static PAGES: RefCell<Pages> =
        RefCell::new(Pages { recent: vec![None; RECENT], free: Vec::new() });
}

/// Where to look for a page of these bytes: records' payloads, headers and metadata differ at the
/// beginning, if they do.
fn place(bytes: &[u8]) -> usize {
    let word = |at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of a page"))
    };
    let mixed = (word(0) ^ word(8).rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    usize::try_from(mixed >> 32).expect("half a word") % RECENT
}

impl Pages {
    fn keep(&mut self, page: Page) {
        if Rc::strong_count(&page) == 1 && self.free.len() < FREE {
            self.free.push(page);
        }
    }

    fn fresh(&mut self, bytes: &[u8]) -> Page {
        let Some(mut page) = self.free.pop() else {
            return Page::try_from(Rc::<[u8]>::from(bytes)).expect("a page of bytes");
        };
        Rc::get_mut(&mut page).expect("nobody's").copy_from_slice(bytes);
        page
    }

    fn holding(&mut self, bytes: &[u8]) -> Page {
        let place = place(bytes);
        if let Some(page) = self.recent[place].as_ref().filter(|page| page[..] == *bytes) {
            return Rc::clone(page);
        }
        let page = self.fresh(bytes);
        if let Some(old) = self.recent[place].replace(Rc::clone(&page)) {
            self.keep(old);
        }
        page
    }
}

/// A page that holds these bytes.
pub(super) fn holding(bytes: &[u8]) -> Page {
    PAGES.with_borrow_mut(|pages| pages.holding(bytes))
}

/// A disk needs these no longer.
pub(super) fn give_back(old: impl Iterator<Item = Page>) {
    // A world may end after the thread's other values.
    let _ = PAGES.try_with(|pages| {
        let mut pages = pages.borrow_mut();
        old.for_each(|page| pages.keep(page));
    });
}
