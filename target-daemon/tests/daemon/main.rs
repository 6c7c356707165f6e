//! A whole daemon on a data plane that is not there.

#![allow(clippy::unwrap_used, reason = "tests and their helpers")]

mod bench;
mod fake;
mod flaky;
mod healing;
mod life;
mod moving;
