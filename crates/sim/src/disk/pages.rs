//! What pages hold. Most are blocks as the guest wrote them, and two numbers say all of such a page: its four
//! kilobytes are looked at, and go nowhere. Of headers, which end in zeroes, the beginning is kept. The others are
//! kept once for all disks of a thread, since the members of a volume write the same within microseconds. To keep
//! three copies of each took more time than anything else.
//!
//! Pages are told apart by all of their bytes, and are copied before they change: nothing of this can be
//! seen from outside.

use std::cell::RefCell;
use std::rc::Rc;

use base::limits::PAGE_BYTES;

use crate::content::Content;

/// So much of a page that ends in zeroes.
const HEAD_BYTES: usize = 512;

type Bytes = Rc<[u8; PAGE_BYTES]>;
type Head = Rc<[u8; HEAD_BYTES]>;

/// What a page holds.
#[derive(Clone, Debug)]
pub(super) enum Page {
    /// A block, all of it as a write of the guest left it.
    Block(Content),
    /// This, and zeroes.
    Head(Head),
    /// Anything else; disks may share it.
    Bytes(Bytes),
}

impl Page {
    pub(super) fn copy_to(&self, out: &mut [u8; PAGE_BYTES]) {
        match self {
            Self::Block(content) => content.put(out),
            Self::Head(head) => {
                let (start, rest) = out.split_at_mut(HEAD_BYTES);
                start.copy_from_slice(&head[..]);
                rest.fill(0);
            }
            Self::Bytes(bytes) => out.copy_from_slice(&bytes[..]),
        }
    }

    /// False if it is a block: no structure of a pool begins like one.
    pub(super) fn may_be_structure(&self) -> bool {
        match self {
            Self::Block(_) => false,
            Self::Head(_) | Self::Bytes(_) => true,
        }
    }

    pub(super) fn flip(&mut self, byte: usize, mask: u8) {
        let mut bytes = [0; PAGE_BYTES];
        self.copy_to(&mut bytes);
        bytes[byte] ^= mask;
        *self = Self::Bytes(Rc::new(bytes));
    }
}

/// Pages that may be written again soon: about as many as there are writes under way.
const RECENT: usize = 128;
/// Memory that is kept for pages, in pages.
const FREE: usize = 8192;

/// The pages of this thread's disks.
struct Pages {
    /// Written just now, each where its bytes say.
    recent: Vec<Option<Bytes>>,
    /// Nobody's.
    free: Vec<Bytes>,
    free_heads: Vec<Head>,
}

thread_local! {
    static PAGES: RefCell<Pages> =
        RefCell::new(Pages { recent: vec![None; RECENT], free: Vec::new(), free_heads: Vec::new() });
}

/// Where to look for a page of these bytes: records' payloads, headers and metadata differ at the
/// beginning, if they do.
fn place(bytes: &[u8; PAGE_BYTES]) -> usize {
    let (words, _) = bytes.as_chunks::<8>();
    let [one, two] = [0, 1].map(|index| u64::from_le_bytes(words[index]));
    let mixed = (one ^ two.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    usize::try_from(mixed >> 32).expect("half a word") % RECENT
}

impl Pages {
    fn keep(&mut self, page: Bytes) {
        if Rc::strong_count(&page) == 1 && self.free.len() < FREE {
            self.free.push(page);
        }
    }

    fn keep_head(&mut self, head: Head) {
        if Rc::strong_count(&head) == 1 && self.free_heads.len() < FREE {
            self.free_heads.push(head);
        }
    }

    fn head(&mut self, bytes: &[u8; HEAD_BYTES]) -> Head {
        let Some(mut head) = self.free_heads.pop() else { return Rc::new(*bytes) };
        Rc::get_mut(&mut head).expect("nobody's").copy_from_slice(bytes);
        head
    }

    fn fresh(&mut self, bytes: &[u8; PAGE_BYTES]) -> Bytes {
        let Some(mut page) = self.free.pop() else { return Rc::new(*bytes) };
        Rc::get_mut(&mut page).expect("nobody's").copy_from_slice(bytes);
        page
    }

    fn holding(&mut self, bytes: &[u8; PAGE_BYTES]) -> Bytes {
        let place = place(bytes);
        if let Some(page) = self.recent[place].as_ref().filter(|page| ***page == *bytes) {
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
pub(super) fn holding(bytes: &[u8; PAGE_BYTES]) -> Page {
    if let Some(content) = Content::of(bytes) {
        return Page::Block(content);
    }
    PAGES.with_borrow_mut(|pages| match head_of(bytes) {
        Some(head) => Page::Head(pages.head(head)),
        None => Page::Bytes(pages.holding(bytes)),
    })
}

/// The beginning of a page, if the rest is zero.
fn head_of(bytes: &[u8; PAGE_BYTES]) -> Option<&[u8; HEAD_BYTES]> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let (words, _) = rest.as_chunks::<8>();
    let is_zero = rest[rest.len() - 1] == 0
        && words.iter().fold(0, |all, word| all | u64::from_le_bytes(*word)) == 0;
    is_zero.then_some(head)
}

/// A disk needs these no longer.
pub(super) fn give_back(old: impl Iterator<Item = Page>) {
    // A world may end after the thread's other values.
    let _ = PAGES.try_with(|pages| {
        let mut pages = pages.borrow_mut();
        for page in old {
            match page {
                Page::Block(_) => {}
                Page::Head(head) => pages.keep_head(head),
                Page::Bytes(bytes) => pages.keep(bytes),
            }
        }
    });
}
