//! The io_uring itself: set-up, submission that never loses an entry, reaping.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue, types};

use crate::error::{Error, ErrorKind};

/// The user data of requests whose completion nobody waits for (cancellations).
pub(crate) const UNWATCHED: u64 = u64::MAX;

/// Completion ring entries for each submission ring entry. More completions than fit wait in
/// the kernel.
const COMPLETIONS_PER_ENTRY: u32 = 4;

const KERNEL_MIN: (u32, u32) = (6, 1);

/// One completion as the kernel reported it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reaped {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
    /// A multishot request goes on.
    pub(crate) more: bool,
}

/// Whether to wait for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    AtMost(Duration),
    Forever,
}

pub(crate) struct Uring {
    ring: IoUring,
    /// Entries that found the submission ring full, oldest first.
    backlog: VecDeque<squeue::Entry>,
}

impl Uring {
    pub(crate) fn new(entries: u32) -> Result<Self, Error> {
        check_kernel(rustix::system::uname().release().to_str().unwrap_or(""))?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY))
            .setup_clamp()
            .dontfork()
            .build(entries)
            .map_err(setup_error)?;
        Ok(Self { ring, backlog: VecDeque::with_capacity(entries as usize) })
    }

    pub(crate) fn submitter(&self) -> io_uring::Submitter<'_> {
        self.ring.submitter()
    }

    /// Queues an entry for the next [`Uring::enter`].
    ///
    /// # Safety
    /// The memory that `entry` names stays valid, and is used by nobody else in a way that
    /// conflicts, until its (last) completion has been reaped.
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: the caller's promise is the one `push` asks for.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Moves entries from the backlog to the ring.
    fn refill(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut submission = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: whoever queued the entry promised it to `Uring::push`.
            if unsafe { submission.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// True if a completion can be reaped, now or after an [`Uring::enter`] that does not wait.
    pub(crate) fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.needs_kernel()
    }

    /// Submits everything queued, and waits as told until there is a completion or a signal.
    pub(crate) fn enter(&mut self, wait: Wait) -> Result<(), Error> {
        loop {
            self.refill();
            let rest = !self.backlog.is_empty();
            let result = match wait {
                Wait::AtMost(timeout) if !rest => self.submit_and_wait(timeout),
                Wait::Forever if !rest => self.ring.submitter().submit_and_wait(1),
                Wait::No | Wait::AtMost(_) | Wait::Forever => {
                    if !rest && self.ring.submission().is_empty() && !self.needs_kernel() {
                        return Ok(());
                    }
                    self.ring.submitter().submit()
                }
            };
            match result {
                Ok(_) if !rest => return Ok(()),
                Ok(0) => return Ok(()), // the kernel takes no more now: reap first
                Ok(_) => {}
                Err(error) => {
                    return match error.raw_os_error() {
                        // Nothing is lost: what was not taken is still in the ring.
                        Some(
                            libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::EBADR,
                        ) => Ok(()),
                        _ => Err(Error::os(ErrorKind::Os, "io_uring_enter", error)),
                    };
                }
            }
        }
    }

    /// True if completions wait in the kernel for an enter.
    fn needs_kernel(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    fn submit_and_wait(&mut self, timeout: Duration) -> io::Result<usize> {
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        self.ring.submitter().submit_with_args(1, &args)
    }

    /// The next completion in the ring.
    pub(crate) fn reap(&mut self) -> Option<Reaped> {
        let entry = self.ring.completion().next()?;
        Some(Reaped {
            user_data: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        })
    }
}

fn check_kernel(release: &str) -> Result<(), Error> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    if let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next())
        && (major, minor) >= KERNEL_MIN
    {
        return Ok(());
    }
    Err(Error::new(ErrorKind::KernelTooOld, format!("kernel {release}")))
}

fn setup_error(error: io::Error) -> Error {
    let kind = match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => ErrorKind::IoUringDenied,
        Some(libc::ENOMEM) => ErrorKind::LockedMemory,
        Some(libc::EMFILE | libc::ENFILE) => ErrorKind::FileDescriptors,
        Some(libc::EINVAL) => ErrorKind::InvalidConfig,
        _ => ErrorKind::Os,
    };
    Error::os(kind, "setting up io_uring", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_6_1_are_refused() {
        for good in ["6.1.0-25-cloud-amd64", "6.18.44-fc-v657", "7.0", "6.1", "10.2+"] {
            assert!(check_kernel(good).is_ok(), "{good}");
        }
        for bad in ["6.0.19", "5.15.0-generic", "4.19", "", "six.one"] {
            assert_eq!(check_kernel(bad).unwrap_err().kind(), ErrorKind::KernelTooOld, "{bad}");
        }
    }
}
