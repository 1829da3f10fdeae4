//! Listening unix sockets. There is one for each path, which all workers accept from: SO_REUSEPORT knows no unix
//! sockets. The file goes when the socket does, unless another one stands at its path by then.

use std::fs::{Metadata, remove_file, symlink_metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::sys::stat::{Mode, umask};

/// Everybody may connect (nginx: the same).
pub const DEFAULT_MODE: u32 = 0o666;

/// A listening socket and its file.
#[derive(Debug)]
pub struct UnixSocket {
    fd: OwnedFd,
    path: PathBuf,
    /// Which file it is: the device and the inode.
    file: Option<(u64, u64)>,
}

impl UnixSocket {
    /// Binds a path. A socket file that nobody answers on was left by a program that died, and is removed.
    ///
    /// # Errors
    /// Something else stands there, or a program answers.
    pub fn bind(path: &Path, mode: u32, give_up: Instant) -> Result<UnixSocket> {
        loop {
            match open(path, mode) {
                Ok(fd) => return Ok(UnixSocket::of(fd, path.to_owned())),
                Err(Errno::EADDRINUSE) => {}
                Err(errno) => return Err(refused(path, errno)),
            }
            match who_is_at(path) {
                Found::Nothing => {}
                Found::Stale => match remove_file(path) {
                    Ok(()) => log::info!("removed {}, a socket that nobody answered on", path.display()),
                    Err(error) => {
                        return Err(anyhow!(
                            "failed to remove {}, a socket that nobody answers on: {error}",
                            path.display()
                        ));
                    }
                },
                Found::Another if Instant::now() < give_up => sleep(Duration::from_millis(20)),
                Found::Another => return Err(refused(path, Errno::EADDRINUSE)),
                Found::NoSocket => {
                    return Err(anyhow!(
                        "failed to bind unix:{0}: {0} is there and is no socket: remove it or choose another path",
                        path.display()
                    ));
                }
            }
        }
    }

    /// One that another binary has bound.
    pub fn of(fd: OwnedFd, path: PathBuf) -> UnixSocket {
        let file = symlink_metadata(&path).ok().as_ref().map(identity);
        UnixSocket { fd, path, file }
    }

    /// The socket.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Sets who may connect.
    pub fn allow(&self, mode: u32) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&self.path, mode)
            .map_err(|error| anyhow!("failed to set the mode of {}: {error}", self.path.display()))
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let present = symlink_metadata(&self.path).ok().as_ref().map(identity);
        if present.is_some()
            && present == self.file
            && let Err(error) = remove_file(&self.path)
        {
            log::warn!("failed to remove {}: {error}", self.path.display());
        }
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// What stands at a path that cannot be bound.
enum Found {
    Nothing,
    NoSocket,
    /// A socket that nobody listens on.
    Stale,
    /// A socket of a program that is alive.
    Another,
}

fn who_is_at(path: &Path) -> Found {
    match symlink_metadata(path) {
        Err(_) => return Found::Nothing,
        Ok(file) if !file.file_type().is_socket() => return Found::NoSocket,
        Ok(_) => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asked = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|socket| connect(socket.as_raw_fd(), &UnixAddr::new(path)?));
    match asked {
        Err(Errno::ECONNREFUSED) => Found::Stale,
        Err(Errno::ENOENT) => Found::Nothing,
        // Anything else, a full queue too, does not say that nobody is there.
        _ => Found::Another,
    }
}

fn open(path: &Path, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file has its permissions from its birth. The master has one thread, so nobody else makes files meanwhile.
    let before = umask(Mode::from_bits_truncate(!mode & 0o777));
    let bound = bind(socket.as_raw_fd(), &UnixAddr::new(path)?);
    umask(before);
    bound.map(|()| socket)
}

fn refused(path: &Path, errno: Errno) -> anyhow::Error {
    let remedy = match errno {
        Errno::EADDRINUSE => {
            ": another program answers there (ss -lxp shows which), stop that or choose another path"
        }
        Errno::ENOENT => ": make the directory first",
        Errno::EACCES => {
            ": the directory has to be writable for the user of the master, as whom root has no right to pass over \
             permissions here"
        }
        Errno::EROFS => ": the directory is mounted read-only",
        _ => "",
    };
    let reason = errno.desc().to_lowercase();
    anyhow!("failed to bind unix:{}: {reason}{remedy}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::os::unix::net::UnixListener;

    /// A path that nothing stands at, and goes with what stands there.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            Place(std::env::temp_dir().join(format!("culvert-unix-{}-{name}", std::process::id())))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = remove_file(&self.0);
        }
    }

    fn bound(path: &Path) -> Result<UnixSocket> {
        UnixSocket::bind(path, 0o640, Instant::now())
    }

    #[test]
    fn a_socket_that_nobody_answers_on_is_replaced_and_one_that_is_answered_is_not() {
        let place = Place::new("stale");
        drop(UnixListener::bind(&place.0).unwrap());
        assert!(place.0.exists(), "std leaves the file");
        let socket = bound(&place.0).unwrap();
        listen(socket.fd(), Backlog::new(1).unwrap()).unwrap();
        let mode = symlink_metadata(&place.0).unwrap().mode();
        assert_eq!(mode & 0o777, 0o640);
        let error = bound(&place.0).unwrap_err().to_string();
        assert!(error.contains("address already in use"), "{error}");
        drop(socket);
        assert!(!place.0.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let place = Place::new("file");
        std::fs::write(&place.0, "precious").unwrap();
        let error = bound(&place.0).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&place.0).unwrap(), "precious");
    }

    #[test]
    fn the_file_of_another_socket_at_the_same_path_stays() {
        let place = Place::new("other");
        let ours = bound(&place.0).unwrap();
        remove_file(&place.0).unwrap();
        let _theirs = UnixListener::bind(&place.0).unwrap();
        drop(ours);
        assert!(place.0.exists());
    }
}
