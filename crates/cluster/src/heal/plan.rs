//! The planner.

use base::limits::MEMBERS_MAX;
use base::membership::{in_sync_floor, write_quorum};
use base::{Role, ServerId};

use super::view::{Trouble, View};
use super::{Blocked, HealPolicy, Plan, Stage, Step, VolumeFacts};
use crate::placement::{
    FAILOVER_MAX, Picture, Shared, failover, may_stay_failover, preference, spare,
};
use crate::records::VolumeEntry;

/// The next step for the volume of `entry`, of which its head knows `facts`; or why there is none.
///
/// Deterministic. Returns no step while a change is open.
pub fn plan(
    entry: &VolumeEntry,
    facts: &VolumeFacts,
    picture: &Picture,
    policy: &HealPolicy,
    now_ms: u64,
) -> Plan {
    if entry.deleted || facts.changing {
        return Plan::default();
    }
    let views = View::of_all(entry, facts, picture, policy, now_ms);
    let planner = Planner { entry, views, picture, policy, now_ms };
    let found = match facts.stage {
        // An opening that one more member would let go on takes one that holds its log.
        Stage::Opening if planner.has_quorum() => None,
        Stage::Opening => planner.unblock().or_else(|| planner.swap_in(true)),
        Stage::Open => planner
            .forget()
            .or_else(|| planner.demote())
            .or_else(|| planner.unblock())
            .or_else(|| planner.drop_gone())
            .or_else(|| planner.drop_surplus())
            .or_else(|| planner.swap_in(false))
            .or_else(|| planner.add())
            .or_else(|| planner.update_failover()),
    };
    match found {
        Some(Decision::Do(step, cause)) => Plan { step: Some(step), cause, blocked: None },
        Some(Decision::Leave(blocked, cause)) => {
            // What the lost member's place waits for does not keep the list from being renewed.
            let renewed = planner.update_failover().filter(|_| facts.stage == Stage::Open);
            let step = match renewed {
                Some(Decision::Do(step, _)) => Some(step),
                Some(Decision::Leave(..)) | None => None,
            };
            Plan { step, cause, blocked: Some(blocked) }
        }
        None => Plan::default(),
    }
}

enum Decision {
    Do(Step, String),
    Leave(Blocked, String),
}

struct Planner<'a> {
    entry: &'a VolumeEntry,
    views: Vec<View>,
    picture: &'a Picture,
    policy: &'a HealPolicy,
    now_ms: u64,
}

impl Planner<'_> {
    fn act(&self, step: Step, on: &View) -> Decision {
        Decision::Do(step, on.cause(self.picture))
    }

    fn replicas(&self) -> usize {
        usize::from(self.entry.volume.policy.replicas)
    }

    fn floor(&self) -> usize {
        in_sync_floor(self.entry.volume.policy.replicas)
    }

    fn in_sync(&self) -> impl Iterator<Item = &View> + Clone {
        self.views.iter().filter(|view| view.is(Role::InSync))
    }

    /// Members in sync that nothing is known to be wrong with.
    fn well(&self) -> usize {
        self.in_sync().filter(|view| view.trouble.is_none()).count()
    }

    /// Members of the in-sync set, but for `without`, that hold all that is acknowledged.
    fn holders(&self, without: Option<&View>) -> usize {
        let without = without.map(|view| view.member.server);
        let left = self.in_sync().filter(|view| Some(view.member.server) != without);
        left.filter(|view| view.holds()).count()
    }

    /// Whether the in-sync set without `without` is enough.
    fn may_lose(&self, without: &View) -> bool {
        let left = self.in_sync().count() - 1;
        left >= self.floor() && self.holders(Some(without)) >= write_quorum(left)
    }

    /// Whether the in-sync set with one more that holds all is.
    fn may_gain(&self) -> bool {
        self.holders(None) + 1 >= write_quorum(self.in_sync().count() + 1)
    }

    /// Whether the in-sync set with one that holds all in the place of `leaves` is.
    fn may_replace(&self, leaves: &View) -> bool {
        self.holders(Some(leaves)) + 1 >= write_quorum(self.in_sync().count())
    }

    /// Leaving members whose pool is gone: nobody else takes them out.
    fn forget(&self) -> Option<Decision> {
        let gone = |view: &&View| view.is(Role::Leaving) && view.trouble == Some(Trouble::Gone);
        let view = self.views.iter().find(gone)?;
        let (server, pool) = (view.member.server, view.member.pool);
        Some(self.act(Step::Forget { server, pool }, view))
    }

    /// A member that can follow again only after a filling must not count meanwhile.
    fn demote(&self) -> Option<Decision> {
        let fill = |view: &&View| view.trouble == Some(Trouble::NeedsFill) && self.may_lose(view);
        let view = self.in_sync().find(fill)?;
        Some(self.act(Step::Demote { server: view.member.server }, view))
    }

    fn has_quorum(&self) -> bool {
        self.holders(None) >= write_quorum(self.in_sync().count())
    }

    /// Without quorum, a lost member is taken out of the set if the others are a quorum then.
    fn unblock(&self) -> Option<Decision> {
        if self.has_quorum() {
            return None;
        }
        let lost = self.in_sync().find(|view| view.is_lost())?;
        let helps = |view: &&View| view.is_lost() && self.may_lose(view);
        let Some(view) = self.in_sync().find(helps) else {
            let below = self.in_sync().count() <= self.floor();
            let blocked =
                if below { Blocked::Floor { floor: self.floor() } } else { Blocked::NoQuorum };
            // One more member that holds all may still make a quorum.
            let hopeless = !self.may_gain() && !self.may_replace(lost);
            return hopeless.then(|| Decision::Leave(blocked, lost.cause(self.picture)));
        };
        let server = view.member.server;
        let step = match view.trouble {
            Some(Trouble::Gone) => Step::Remove { server },
            _ => Step::Demote { server },
        };
        Some(self.act(step, view))
    }

    /// Members that can never come back, or never came to be.
    fn drop_gone(&self) -> Option<Decision> {
        let useless = |view: &&View| match (&view.trouble, view.member.role) {
            (Some(Trouble::Gone), Role::InSync) => self.may_lose(view),
            (Some(Trouble::Gone), Role::CatchingUp | Role::Provisioning)
            | (Some(Trouble::Silent(_) | Trouble::CannotMake(_)), Role::Provisioning) => true,
            _ => false,
        };
        let view = self.views.iter().find(useless)?;
        Some(self.act(Step::Remove { server: view.member.server }, view))
    }

    /// What is more than the volume's policy asks for: others first that do not count yet, then those
    /// with troubles, then those that share most of a failure domain with others.
    fn drop_surplus(&self) -> Option<Decision> {
        let good = |view: &&View| view.trouble.is_none() && view.holds();
        let holders = self.in_sync().filter(good).count();
        if holders < self.replicas() {
            return None;
        }
        let uncounted = |view: &&View| view.is(Role::CatchingUp) || view.is(Role::Provisioning);
        let troubled = |view: &&View| view.trouble.is_some() && self.may_lose(view);
        let found = self
            .views
            .iter()
            .find(uncounted)
            .or_else(|| self.in_sync().find(troubled))
            .or_else(|| self.most_shared().filter(|_| holders > self.replicas()))?;
        Some(self.act(Step::Remove { server: found.member.server }, found))
    }

    fn most_shared(&self) -> Option<&View> {
        let shared = |view: &View| {
            let others = self.in_sync().filter(|other| other.member.server != view.member.server);
            self.shared(view.member.server, others)
        };
        self.in_sync().max_by_key(|view| shared(view)).filter(|view| self.may_lose(view))
    }

    fn shared<'a>(&self, server: ServerId, others: impl Iterator<Item = &'a View>) -> Shared {
        let others = others.filter_map(|other| self.picture.server(other.member.server));
        let server = self.picture.server(server);
        server.map_or_else(Shared::default, |server| {
            Shared::of(&server.server, others.map(|other| &other.server))
        })
    }

    /// A member that has caught up begins to count, in the place of one that is to go if there are
    /// enough otherwise. What an opening waits for may be one that is to go, but still works: better than
    /// a volume that stays closed.
    fn swap_in(&self, opening: bool) -> Option<Decision> {
        if self.well() >= self.replicas() {
            return None;
        }
        let ready = |view: &&View| {
            view.is(Role::CatchingUp) && view.holds() && (opening || view.trouble.is_none())
        };
        let staying = || self.in_sync().filter(|view| view.trouble.is_none());
        let spare = self.views.iter().filter(ready).min_by_key(|view| {
            (view.trouble.is_some(), self.shared(view.member.server, staying()))
        })?;
        let counts = spare.member.server;
        let full = self.in_sync().count() >= self.replicas();
        if !full && self.may_gain() {
            return Some(self.act(Step::Promote { server: counts }, spare));
        }
        // Those that are lost before those that still work.
        let replaceable = |view: &&View| view.trouble.is_some() && self.may_replace(view);
        match self.in_sync().filter(replaceable).min_by_key(|view| !view.is_lost()) {
            Some(view) => {
                Some(self.act(Step::Replace { leaves: view.member.server, counts }, view))
            }
            None => Some(Decision::Leave(Blocked::NoQuorum, spare.cause(self.picture))),
        }
    }

    /// One more member, if there are too few that are well and none is on its way.
    fn add(&self) -> Option<Decision> {
        if self.well() >= self.replicas() || self.views.iter().any(View::is_coming) {
            return None;
        }
        let counted = |view: &&View| !view.is(Role::Leaving) && view.trouble.is_some();
        // The one for whose sake it is done: one that is lost before one that still works.
        let replaced = self
            .views
            .iter()
            .filter(counted)
            .min_by_key(|view| (!view.is_lost(), !view.is(Role::InSync)));
        let cause = replaced.map_or_else(
            || format!("{} of {} replicas", self.well(), self.replicas()),
            |view| view.cause(self.picture),
        );
        let trouble = replaced.and_then(|view| view.trouble.as_ref());
        let ordered = matches!(trouble, Some(Trouble::Draining));
        let served = self.views.iter().filter(|view| !view.is(Role::Leaving)).count();
        if served >= MEMBERS_MAX {
            // One that does not count and has troubles of its own gives its place up.
            let troubled = |view: &&View| view.is(Role::CatchingUp) && view.trouble.is_some();
            return Some(match self.views.iter().find(troubled) {
                Some(view) => self.act(Step::Remove { server: view.member.server }, view),
                None => Decision::Leave(Blocked::Full, cause),
            });
        }
        if let Some(blocked) = self.too_soon(trouble, ordered) {
            return Some(Decision::Leave(blocked, cause));
        }
        let staying =
            self.views.iter().filter(|view| !view.is(Role::Leaving) && view.trouble.is_none());
        let staying: Vec<_> = staying.map(|view| view.member.server).collect();
        let spare = match spare(self.entry, &staying, self.picture, self.now_ms) {
            Ok(spare) => &spare.server,
            Err(reasons) => {
                return Some(Decision::Leave(Blocked::NoSpare { reasons }, cause));
            }
        };
        if let Some(forgotten) = self.room_in_record() {
            return Some(forgotten);
        }
        let (server, pool, at_ms) = (spare.id, spare.pool, self.now_ms);
        Some(Decision::Do(Step::AddSpare { server, pool, at_ms, counts: !ordered }, cause))
    }

    /// A record does not grow without bound: of members that are leaving and whose servers do not
    /// run, the first is forgotten. Its server keeps the replica when it is back, and says so.
    fn room_in_record(&self) -> Option<Decision> {
        if self.views.len() < 2 * MEMBERS_MAX {
            return None;
        }
        let absent = |view: &&View| view.is(Role::Leaving) && view.is_lost();
        Some(match self.views.iter().find(absent) {
            Some(view) => {
                let (server, pool) = (view.member.server, view.member.pool);
                self.act(Step::Forget { server, pool }, view)
            }
            None => Decision::Leave(Blocked::Full, String::new()),
        })
    }

    fn too_soon(&self, trouble: Option<&Trouble>, ordered: bool) -> Option<Blocked> {
        let policy = self.policy;
        let filling = self.picture.filling_now(self.now_ms);
        if filling >= policy.filling_max {
            return Some(Blocked::Busy { filling });
        }
        if ordered {
            return None;
        }
        let since = self.now_ms.saturating_sub(policy.moves_window_ms);
        let recent = self.entry.shard.moves.iter().filter(|moved| moved.at_ms > since);
        let moves = recent.clone().count();
        if moves >= policy.moves_max {
            let oldest = recent.clone().map(|moved| moved.at_ms).min().unwrap_or(0);
            let until_ms = oldest.saturating_add(policy.moves_window_ms);
            return Some(Blocked::TooManyMoves { moves, until_ms });
        }
        let jitter = self.jitter(moves);
        if let Some(last) = recent.map(|moved| moved.at_ms).max() {
            let doublings = u32::try_from(moves - 1).unwrap_or(u32::MAX).min(16);
            let pause = policy.backoff_ms.saturating_mul(1 << doublings);
            let until_ms = last.saturating_add(pause).saturating_add(jitter);
            if self.now_ms < until_ms {
                return Some(Blocked::Backoff { until_ms });
            }
        }
        match trouble {
            Some(Trouble::Silent(for_ms)) if *for_ms < policy.silence_ms.saturating_add(jitter) => {
                let left = policy.silence_ms.saturating_add(jitter) - for_ms;
                Some(Blocked::Backoff { until_ms: self.now_ms.saturating_add(left) })
            }
            Some(_) | None => None,
        }
    }

    /// The same whoever asks; another one for other volumes, and after another move (FNV-1a).
    fn jitter(&self, moves: usize) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let moves = u8::try_from(moves).unwrap_or(u8::MAX);
        for byte in self.entry.volume.id.bytes().into_iter().chain([moves]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        (hash >> 16) % self.policy.jitter_ms.saturating_add(1)
    }

    fn update_failover(&self) -> Option<Decision> {
        let old = &self.entry.shard.failover;
        let new = failover(self.entry, self.picture, self.now_ms);
        let fits = |id: &ServerId| may_stay_failover(self.entry, *id, self.picture, self.now_ms);
        let not_leaving = || self.views.iter().filter(|view| !view.is(Role::Leaving));
        let shared = |list: &[ServerId]| list.first().map(|id| self.shared(*id, not_leaving()));
        let preference = |id: &ServerId| preference(self.entry, *id);
        let named = |id: &&ServerId| preference(id) != usize::MAX;
        let stays = old.iter().all(fits)
            && old.len() >= new.len()
            && old.is_sorted_by_key(preference)
            && new.iter().filter(named).all(|id| old.contains(id))
            && (old.is_empty() || new.is_empty() || shared(old) <= shared(&new));
        if stays {
            return None;
        }
        // Servers that are merely late keep their places if there is nobody better.
        let kept = old.iter().filter(|id| fits(id) && !new.contains(id)).copied();
        let mut failover: Vec<_> = new.iter().copied().chain(kept).collect();
        failover.sort_by_key(preference);
        failover.truncate(FAILOVER_MAX);
        (failover != *old).then(|| Decision::Do(Step::UpdateFailover { failover }, String::new()))
    }
}
