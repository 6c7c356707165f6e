//! KVM where it works, QEMU's own emulation (TCG) where it does not.
//!
//! That `/dev/kvm` opens says little: on some machines guests hang in early boot. So a guest is
//! booted, once for every boot of this machine, and what happened is remembered.

use std::env;
use std::fs::{self, File};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::binaries::cache_directory;
use crate::guest::{Guest, GuestOptions};
use crate::lab::Lab;

/// How long a guest under a KVM that works takes at most. It needs about one second.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel's.
    Kvm,
    /// QEMU's emulation, some twenty times slower.
    Tcg,
}

impl Accelerator {
    /// The best that works here. `HOLDFAST_ACCEL` overrides.
    pub fn detect() -> Result<Self> {
        if let Some(wanted) = env::var_os("HOLDFAST_ACCEL") {
            return match wanted.to_str() {
                Some("kvm") => Ok(Self::Kvm),
                Some("tcg") => Ok(Self::Tcg),
                _ => bail!("HOLDFAST_ACCEL is {}: kvm or tcg", wanted.display()),
            };
        }
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let cache = cache_directory()?;
        let lock = File::create(cache.join("accelerator.lock"))?;
        lock.lock()?;
        let remembered = cache.join("accelerator");
        let known = fs::read_to_string(&remembered).unwrap_or_default();
        match known.strip_suffix(&boot_id) {
            Some("kvm ") => return Ok(Self::Kvm),
            Some("tcg ") => return Ok(Self::Tcg),
            _ => {}
        }
        let found = if boots_under_kvm()? { Self::Kvm } else { Self::Tcg };
        let word = if found == Self::Kvm { "kvm" } else { "tcg" };
        fs::write(&remembered, format!("{word} {boot_id}"))?;
        Ok(found)
    }

    /// QEMU's arguments.
    pub(crate) fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg", "-cpu", "qemu64"],
        }
    }
}

fn boots_under_kvm() -> Result<bool> {
    let lab = Lab::for_probe("kvm-probe")?;
    let options = GuestOptions { limit: PROBE_LIMIT, ..GuestOptions::new("probe") };
    match Guest::boot_with(&lab, &options, Accelerator::Kvm) {
        Ok(_guest) => Ok(true),
        Err(error) => {
            let reason = error.root_cause().to_string();
            let reason = reason.lines().next().unwrap_or_default();
            eprintln!("guests run under TCG: KVM booted none in {PROBE_LIMIT:?} ({reason})");
            Ok(false)
        }
    }
}
