//! How `holdfast attach` leaves to the next one, and takes over from one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use base::VolumeId;
use shell::Prepared;
use shell::control::DataPlane;
use shell::handover::Inherited;
use target_daemon::follow::{Follow, Leases};
use target_daemon::heads::{self, Heads};
use target_daemon::socket;
use target_daemon::upgrade::{self, Leaves, Next, Outcome, PassOn, UpgradeError};

use super::{Asked, Attached, Sockets, Teller, plane_config};
use crate::arguments::AttachArguments;
use crate::exit::{Exit, Failure};

const LOCK: &str = "lock";
const UPGRADES: &str = "upgrade";

/// What the two processes must agree on, by name.
fn agreed(volume: VolumeId, arguments: &AttachArguments) -> BTreeMap<String, String> {
    let AttachArguments { queues, read_only, standby, .. } = arguments;
    [
        ("volume", volume.to_string()),
        ("queues", queues.to_string()),
        ("read-only", read_only.to_string()),
        ("standby", standby.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// Makes the socket at which the next process can ask for everything. Guests matter more than
/// upgrades: without it the volume is served all the same.
pub(super) fn listen(path: &Path) -> Option<UnixListener> {
    let path = upgrade::socket_of(path);
    match socket::listen(&path) {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::warn!(
                socket = %path.display(), %error,
                "this process cannot be upgraded without a restart"
            );
            None
        }
    }
}

/// A process that may be asked to leave.
struct Leaving {
    plane: Arc<dyn DataPlane>,
    follow: Follow,
    about: BTreeMap<String, String>,
    standby: bool,
    lock: File,
    listener: UnixListener,
    /// Held while it leaves: nobody acts on what the next process does.
    changing: Arc<Mutex<()>>,
}

impl Leaves for Leaving {
    fn about(&self) -> BTreeMap<String, String> {
        self.about.clone()
    }

    fn leave(&self, pass_on: &mut PassOn<'_>) -> Result<Outcome, String> {
        let hand_over = self.plane.handing_over().ok_or("this data plane cannot be handed over")?;
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.follow.freeze();
        let named: [(&str, BorrowedFd<'_>); 2] =
            [(LOCK, self.lock.as_fd()), (UPGRADES, self.listener.as_fd())];
        let left = upgrade::leave_by(hand_over, &named, pass_on, |left| {
            self.follow.take_back(hand_over, left, &|_| self.standby);
        });
        if left != Ok(Outcome::Gone) {
            self.follow.thaw();
        }
        left
    }
}

/// The thread that answers at the upgrade socket. When this is dropped, it ends, and the socket with
/// it; unless another process has taken over, then it has ended this one.
pub(super) struct Upgrades {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl Upgrades {
    pub(super) fn start(
        attached: &Attached,
        arguments: &AttachArguments,
        listener: UnixListener,
        teller: Teller,
    ) -> io::Result<Self> {
        let leaving = Leaving {
            plane: Arc::clone(&attached.plane),
            follow: attached.follow.clone(),
            about: agreed(attached.entry.volume.id, arguments),
            standby: arguments.standby,
            lock: attached.lock.try_clone()?,
            listener,
            changing: Arc::clone(&attached.changing),
        };
        let stop = Arc::<AtomicBool>::default();
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("upgrade".to_owned()).spawn(move || {
            if upgrade::serve(&leaving.listener, &flag, &leaving) {
                teller.say("handed-over", None, None);
                // Where it stands: nothing here may be touched any more.
                std::process::exit(0);
            }
        })?;
        Ok(Self { stop, thread: Some(thread), path: upgrade::socket_of(&attached.path) })
    }
}

impl Drop for Upgrades {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that hands over to the next process had panicked");
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

/// Takes everything over from the process that serves the socket, and serves. With an error that one
/// goes on, and this process must end at once, touching nothing.
pub(super) fn take_over(asked: &Asked<'_>, stop: &AtomicBool) -> Result<(), Failure> {
    let mut next = Next::ask(&upgrade::socket_of(&asked.path))?;
    match take(asked, &mut next) {
        Ok((attached, sockets)) => {
            next.ready()?;
            if let Some(hand_over) = attached.plane.handing_over() {
                hand_over.go();
            }
            let served = attached.serve(asked, sockets, stop);
            attached.shut_down(served)
        }
        Err(failure) => {
            // Now: the running process ends this one as soon as it knows.
            tracing::error!(reason = failure.message, "not taken over; the running one goes on");
            next.fail(&failure.message);
            Err(failure)
        }
    }
}

fn take(asked: &Asked<'_>, next: &mut Next) -> Result<(Attached, Sockets), Failure> {
    for (key, ours) in agreed(asked.entry.volume.id, asked.arguments) {
        let theirs = next.about(&key).unwrap_or("unknown");
        if theirs != ours {
            let text = format!(
                "the {key} of the running process at '{}' is {theirs}, not {ours}; give the next \
                 one the same arguments",
                asked.path.display()
            );
            return Err(Failure::new(Exit::Usage, text));
        }
    }
    let prepared = Prepared::new(&plane_config(asked))?;
    let plane = prepared.start(Inherited::default())?;
    let heads = Heads::new(Arc::clone(&asked.store), Arc::clone(&plane), asked.me.clone());
    heads::address_book(asked.store.as_ref(), plane.as_ref())?;
    // Now nobody serves: whatever could be done before is done.
    let (left, mut named) = next.take()?;
    let mut named = |name: &'static str| -> Result<OwnedFd, Failure> {
        named.remove(name).ok_or_else(|| {
            UpgradeError::Refused(format!("the running process left no {name}")).into()
        })
    };
    let sockets = Sockets::Taken(UnixListener::from(named(UPGRADES)?));
    let attached = Attached::new(asked, plane, heads, File::from(named(LOCK)?))?;
    let hand_over = attached.plane.handing_over();
    let hand_over = hand_over.expect("a started data plane can be handed over");
    let standby = asked.arguments.standby;
    attached
        .follow
        .go_on(hand_over, left.exports, Leases::default(), &|_| standby)
        .map_err(|reason| Failure::new(Exit::NotReady, reason))?;
    Ok((attached, sockets))
}
