//! Patience with what a process that was killed just now still holds: the kernel gives its locks
//! and sockets back some milliseconds after its death, or when disks are busy, when what it had under
//! way there is done. Whoever is started in its place at once would find them taken.

use std::time::{Duration, Instant};

/// How long a dead process's locks and sockets may take to go.
pub const LINGER: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(5);

/// Attempts until it succeeds, fails in a way that does not pass, or [`LINGER`] is over.
pub fn while_lingering<T, E>(
    may_pass: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && start.elapsed() < LINGER => {
                std::thread::sleep(INTERVAL);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let mut left = 3;
        let counted = while_lingering(
            |left| *left > 0,
            || {
                left -= 1;
                if left == 0 { Ok("done") } else { Err(left) }
            },
        );
        assert_eq!(counted, Ok("done"));
        let mut tries = 0;
        let refused: Result<(), i32> = while_lingering(
            |_| false,
            || {
                tries += 1;
                Err(tries)
            },
        );
        assert_eq!(refused, Err(1));
    }
}
