//! Fuzz targets: one function each, from bytes to a run that must not panic and must hold what its
//! documentation says. `fuzz_targets/` hands them to libFuzzer, `tests/corpus.rs` runs them on the
//! kept inputs and on random changes of these with stable Rust.

mod bytes;
mod nvme_session_target;
mod nvme_target_target;
#[path = "../../nvme/tests/raw/mod.rs"]
mod raw;
mod recovery_target;
#[path = "../../store/tests/sim/mod.rs"]
mod sim;
mod structures_target;
mod texts_target;

pub use nvme_session_target::nvme_session;
pub use nvme_target_target::nvme_target;
pub use recovery_target::recovery;
pub use structures_target::structures;
pub use texts_target::texts;
pub use vhost_blk::fuzzing::{chains, messages};

/// A target.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 7] = [
    ("nvme_target", nvme_target),
    ("nvme_session", nvme_session),
    ("chains", chains),
    ("messages", messages),
    ("recovery", recovery),
    ("texts", texts),
    ("structures", structures),
];
