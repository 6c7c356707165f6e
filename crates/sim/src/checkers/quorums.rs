//! No disjoint quorums: a change of members lets at most one member into the in-sync set and one out, so
//! that every quorum before it meets every quorum after it as far as the head took care, and somebody
//! is always in sync.

use base::ShardRecord;

pub(crate) fn look(old: &ShardRecord, new: &ShardRecord) -> Result<(), String> {
    let entered = new.in_sync().filter(|server| old.in_sync().all(|other| other != *server));
    let left = old.in_sync().filter(|server| new.in_sync().all(|other| other != *server));
    if entered.count() > 1 || left.count() > 1 {
        return Err(format!("disjoint quorums: {old:?} became {new:?}"));
    }
    if new.in_sync().count() == 0 {
        return Err(format!("nobody is in sync in {new:?}"));
    }
    Ok(())
}
