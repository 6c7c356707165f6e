//! Deadlines, and waiting for a condition instead of sleeping.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A moment after which waiting is a failure.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// The moment `seconds` from now.
    pub fn seconds(seconds: u64) -> Self {
        Self::after(Duration::from_secs(seconds))
    }

    /// The earlier of the two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }

    /// What is left, `None` when it has passed.
    pub fn remaining(self) -> Option<Duration> {
        self.0.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Whether it has passed.
    pub fn has_passed(self) -> bool {
        self.remaining().is_none()
    }
}

/// Looks at `condition` until it gives a value. An error from it, or the deadline, ends the wait.
pub fn wait_until<T>(
    what: &str,
    deadline: Deadline,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if deadline.has_passed() {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_fails_with_its_name() {
        let deadline = Deadline::after(Duration::from_millis(1));
        let outcome: Result<()> = wait_until("a miracle", deadline, || Ok(None));
        assert!(outcome.unwrap_err().to_string().contains("a miracle"));
    }

    #[test]
    fn an_error_ends_the_wait_at_once() {
        let outcome: Result<()> =
            wait_until("nothing", Deadline::seconds(3600), || bail!("process died"));
        assert_eq!(outcome.unwrap_err().to_string(), "process died");
    }
}
