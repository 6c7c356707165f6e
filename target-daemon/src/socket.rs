//! Unix sockets by path: checked before use, and no other process's socket taken away.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The longest path that a Unix socket may have, in bytes (`unix`(7), without the final zero).
const PATH_BYTES_MAX: usize = 107;

/// Checks that a socket could have this path: absolute and short enough. Says what is wrong.
pub fn check_path(path: &Path) -> Result<(), String> {
    let shown = path.display();
    if !path.is_absolute() {
        return Err(format!("'{shown}' is not an absolute path"));
    }
    let bytes = path.as_os_str().len();
    if bytes > PATH_BYTES_MAX {
        return Err(format!("'{shown}' has {bytes} bytes; a socket's path has at most 107"));
    }
    if path.file_name().is_none() {
        return Err(format!("'{shown}' names no file"));
    }
    Ok(())
}

/// Why a socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error("another process listens on '{}'; choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else: what is wrong and what to do.
    #[error("{0}")]
    Unfit(String),
}

impl From<SocketError> for io::Error {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::InUse(_) => Self::new(io::ErrorKind::AddrInUse, error),
            SocketError::Unfit(_) => Self::other(error),
        }
    }
}

/// Checks that a socket can be made at `path` now: its directory is there, and what has the path
/// is nothing or a socket that nobody listens on.
pub fn check_free(path: &Path) -> Result<(), SocketError> {
    let looked = look(path).map_err(SocketError::Unfit)?;
    if looked { Ok(()) } else { Err(SocketError::InUse(path.to_owned())) }
}

/// False if somebody listens at `path`; an error if no socket can be made there for another
/// reason.
fn look(path: &Path) -> Result<bool, String> {
    check_path(path)?;
    let shown = path.display();
    let parent = path.parent().unwrap_or(Path::new("/"));
    match fs::metadata(parent) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(format!("'{}' is not a directory", parent.display())),
        Err(error) => {
            return Err(format!("directory '{}': {error}; make it first", parent.display()));
        }
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(format!("'{shown}': {error}")),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(format!("'{shown}' is there and is no socket; remove it or choose another path"))
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
            Err(error) => Err(format!("'{shown}': {error}")),
            Ok(_) => Ok(false),
        },
    }
}

/// Listens at `path`, for its owner only. A socket that nobody listens on is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    check_free(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_the_living_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let first = listen(&path).unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("another process listens"));
        drop(first);
        drop(listen(&path).unwrap());
        let file = directory.path().join("file");
        fs::write(&file, b"precious").unwrap();
        assert!(listen(&file).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        assert!(
            check_free(&directory.path().join("no/x"))
                .unwrap_err()
                .to_string()
                .contains("make it first")
        );
    }

    #[test]
    fn paths_that_cannot_be() {
        assert!(check_path(Path::new("x.sock")).is_err());
        assert!(check_path(Path::new(&format!("/{}", "x".repeat(107)))).is_err());
        assert!(check_path(Path::new(&format!("/{}", "x".repeat(106)))).is_ok());
    }
}
