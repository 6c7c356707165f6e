//! Where the programs are: Debian's, and the ones under test.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where Debian puts programs, whatever the caller's PATH leaves out.
const SYSTEM_DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];

/// A program of the system.
pub fn system_binary(name: &str) -> Result<PathBuf> {
    let directories = SYSTEM_DIRECTORIES.iter().map(PathBuf::from);
    directories
        .map(|directory| directory.join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed: run scripts/install"))
}

/// `holdfastd` or `holdfast`, from the build that this harness is part of.
pub fn holdfast_binary(name: &str) -> Result<PathBuf> {
    let directory = match env::var_os("HOLDFAST_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => profile_directory()?,
    };
    let path = directory.join(name);
    if !path.exists() {
        bail!("{} is not built: cargo build --workspace (or use scripts/test)", path.display());
    }
    Ok(path)
}

/// Where this run may put data: in the target directory, which is on a disk, as pools need
/// direct I/O.
pub(crate) fn work_directory() -> Result<PathBuf> {
    let target = profile_directory()?.parent().map(Path::to_owned);
    Ok(target.context("the profile's directory has a parent")?.join("tmp"))
}

/// The kernel, the initramfs and what was found out about this machine.
pub fn cache_directory() -> Result<PathBuf> {
    if let Some(directory) = env::var_os("HOLDFAST_CACHE") {
        return Ok(PathBuf::from(directory));
    }
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(directory) => PathBuf::from(directory),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("holdfast"))
}

/// `target/debug` or `target/release`: tests run from its `deps`, programs from itself.
fn profile_directory() -> Result<PathBuf> {
    let executable = env::current_exe()?;
    let directory = executable.parent().context("an executable is in a directory")?;
    let in_deps = directory.ends_with("deps") || directory.ends_with("examples");
    let profile = if in_deps { directory.parent() } else { Some(directory) };
    Ok(profile.context("deps is in a directory")?.to_owned())
}
