//! Exit codes, and which error ends with which.

use cluster::drain::{DrainError, RemoveError};
use cluster::lease::{AcquireError, ReleaseError};
use cluster::named_failover::NamedError;
use cluster::resize::ResizeError;
use cluster::servers::RegisterError;
use cluster::volumes::{CreateError, DeleteError, FindError};
use cluster::{StoreError, StoreErrorKind};
use shell::control::{ControlError, StartError};
use target_daemon::heads::HeadError;
use target_daemon::upgrade::UpgradeError;

/// The meaning of an exit status above 0. Documented in [`HELP`]; never renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Anything else.
    Failed,
    /// Arguments or values that cannot be right.
    Usage,
    /// A volume, server or export that is not there.
    NotFound,
    /// Something is in the way: held elsewhere, in use, a name that is taken, data on a device.
    Conflict,
    /// Not possible now: too few servers, not ready in time.
    NotReady,
    /// The cluster store or the daemon is away, or not usable.
    Unavailable,
    /// The volume was taken over by another holder.
    Superseded,
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Exit status:
  0  done
  1  failed for another reason than these
  2  wrong arguments, or a value that cannot be right
  3  no such volume, server or export
  4  something is in the way: attached elsewhere, in use, a name that is taken, a device with data
  5  not possible now: too few servers, or not ready in time
  6  the cluster store or the daemon is away, or cannot be used
  7  attach: another holder took the volume over

With --json, results go to standard output and errors to standard error, as JSON.";

impl Exit {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::NotReady => 5,
            Self::Unavailable => 6,
            Self::Superseded => 7,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::NotReady => "not_ready",
            Self::Unavailable => "unavailable",
            Self::Superseded => "superseded",
        }
    }
}

/// A command that failed: what to tell, and how to exit.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let exit = match &error.kind {
            StoreErrorKind::Missing
            | StoreErrorKind::Foreign(_)
            | StoreErrorKind::Newer { .. }
            | StoreErrorKind::Damaged(_)
            | StoreErrorKind::Replaced
            | StoreErrorKind::Unavailable(_) => Exit::Unavailable,
            StoreErrorKind::Conflict
            | StoreErrorKind::VolumeNameTaken(_)
            | StoreErrorKind::ServerTaken(_) => Exit::Conflict,
            StoreErrorKind::NoVolume(_)
            | StoreErrorKind::NoServer(_)
            | StoreErrorKind::NotRegistered { .. } => Exit::NotFound,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<CreateError> for Failure {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::Name(_)
            | CreateError::SizeNotMultiple { .. }
            | CreateError::SizeOutOfRange { .. }
            | CreateError::Replicas(_) => Self::new(Exit::Usage, error.to_string()),
            CreateError::Placement(_) => Self::new(Exit::NotReady, error.to_string()),
            CreateError::Failover(error) => error.into(),
            CreateError::Store(error) => error.into(),
        }
    }
}

impl From<NamedError> for Failure {
    fn from(error: NamedError) -> Self {
        match error {
            NamedError::NotFound(_) => Self::new(Exit::NotFound, error.to_string()),
            NamedError::Twice(_) | NamedError::TooMany(_) => {
                Self::new(Exit::Usage, error.to_string())
            }
            NamedError::Member(_) => Self::new(Exit::Conflict, error.to_string()),
            NamedError::Unsuitable { .. } => Self::new(Exit::NotReady, error.to_string()),
            NamedError::Store(error) => error.into(),
        }
    }
}

impl From<UpgradeError> for Failure {
    fn from(error: UpgradeError) -> Self {
        let exit = match &error {
            UpgradeError::Nobody { .. } => Exit::NotFound,
            UpgradeError::Refused(_) => Exit::NotReady,
            UpgradeError::Wire(_) | UpgradeError::OutOfTurn(_) => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<ResizeError> for Failure {
    fn from(error: ResizeError) -> Self {
        match error {
            ResizeError::Shrinks { .. }
            | ResizeError::SizeNotMultiple { .. }
            | ResizeError::SizeOutOfRange(_) => Self::new(Exit::Usage, error.to_string()),
            ResizeError::NoRoom { .. } => Self::new(Exit::NotReady, error.to_string()),
            ResizeError::Store(error) => error.into(),
        }
    }
}

impl From<FindError> for Failure {
    fn from(error: FindError) -> Self {
        match error {
            FindError::NotFound(_) => Self::new(Exit::NotFound, error.to_string()),
            FindError::Store(error) => error.into(),
        }
    }
}

impl From<DeleteError> for Failure {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::Held { .. } => Self::new(Exit::Conflict, error.to_string()),
            DeleteError::Store(error) => error.into(),
        }
    }
}

impl From<ReleaseError> for Failure {
    fn from(error: ReleaseError) -> Self {
        match error {
            ReleaseError::Held { .. } => Self::new(Exit::Conflict, error.to_string()),
            ReleaseError::Store(error) => error.into(),
        }
    }
}

impl From<RegisterError> for Failure {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Name(_) => Self::new(Exit::Usage, error.to_string()),
            RegisterError::Exists { .. } | RegisterError::Running { .. } => {
                Self::new(Exit::Conflict, error.to_string())
            }
            RegisterError::Store(error) => error.into(),
        }
    }
}

impl From<DrainError> for Failure {
    fn from(error: DrainError) -> Self {
        match error {
            DrainError::NotFound(_) => Self::new(Exit::NotFound, error.to_string()),
            DrainError::Stuck { .. } => Self::new(Exit::NotReady, error.to_string()),
            DrainError::Store(error) => error.into(),
        }
    }
}

impl From<RemoveError> for Failure {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::NotFound(_) => Self::new(Exit::NotFound, error.to_string()),
            RemoveError::Running(_) | RemoveError::InUse { .. } => {
                Self::new(Exit::Conflict, error.to_string())
            }
            RemoveError::BelowFloor { .. } => Self::new(Exit::NotReady, error.to_string()),
            RemoveError::Store(error) => error.into(),
        }
    }
}

impl From<AcquireError> for Failure {
    fn from(error: AcquireError) -> Self {
        match error {
            AcquireError::Held { .. } => Self::new(Exit::Conflict, error.to_string()),
            AcquireError::Provisioning { .. } => Self::new(Exit::NotReady, error.to_string()),
            AcquireError::Deleted { .. } => Self::new(Exit::NotFound, error.to_string()),
            AcquireError::Store(error) => error.into(),
        }
    }
}

impl From<HeadError> for Failure {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Acquire(error) => error.into(),
            HeadError::Store(error) => error.into(),
            HeadError::Superseded { .. } => Self::new(Exit::Superseded, error.to_string()),
            HeadError::Open { .. } | HeadError::NotClosed { .. } => {
                Self::new(Exit::Failed, error.to_string())
            }
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let exit = match &error {
            ControlError::Socket { .. } => Exit::Conflict,
            ControlError::Deadline { .. }
            | ControlError::Stopped
            | ControlError::HandedOver
            | ControlError::NoPool
            | ControlError::PoolFailed { .. }
            | ControlError::NoSpace { .. }
            | ControlError::ReplicaMismatch { .. }
            | ControlError::NoHead(_)
            | ControlError::HeadExists { .. }
            | ControlError::Limit { .. } => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::new(Exit::Failed, error.to_string())
    }
}
