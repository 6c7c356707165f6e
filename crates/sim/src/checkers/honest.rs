//! I4, seen from a server whose disks do what they say: nothing in its pool is damaged. What came
//! damaged over the network, or half from a crash, has been found out before.

use super::Seen;

pub(super) fn look(seen: &Seen<'_>) -> Result<(), String> {
    let Some(store) = seen.node.store().filter(|_| seen.honest) else { return Ok(()) };
    let damaged = store.usage().damaged_answers;
    if damaged > 0 {
        return Err(format!("I4: server {} has honest disks and damaged data", seen.process));
    }
    match store.replicas().next() {
        Some((_, info)) if info.damaged => {
            Err(format!("I1: server {} has honest disks and lost records", seen.process))
        }
        Some(_) | None => Ok(()),
    }
}
