//! Descriptors that outlive an exec: handed to the program that this process becomes, and taken from the one
//! that it was.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Says of each descriptor whether it outlives an exec. Everything that this program opens does not, unless
/// it is told so here.
pub fn set_inheritable<'a>(
    descriptors: impl IntoIterator<Item = BorrowedFd<'a>>,
    inheritable: bool,
) -> Result<()> {
    let flags = match inheritable {
        true => FdFlag::empty(),
        false => FdFlag::FD_CLOEXEC,
    };
    for descriptor in descriptors {
        fcntl(descriptor, FcntlArg::F_SETFD(flags))
            .context("failed to set whether a descriptor is inherited")?;
    }
    Ok(())
}

/// Takes a descriptor that this process was executed with, once.
pub fn take(number: RawFd) -> Result<OwnedFd> {
    ensure!(number > 2, "descriptor {number} is not for taking");
    // SAFETY: only asked for its flags; a number that is not open is refused by the kernel.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl(descriptor, FcntlArg::F_GETFD)
        .with_context(|| format!("descriptor {number} was not handed over"))?;
    ensure!(
        !FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC),
        "descriptor {number} was not handed over, or was taken before"
    );
    set_inheritable([descriptor], false)?;
    // SAFETY: what this program opens is marked to be closed at exec, and so is what was taken before. This
    // one was not, so it came with the exec and nobody owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    #[test]
    fn what_was_made_inheritable_can_be_taken_once() {
        let (reader, _writer) = std::io::pipe().unwrap();
        set_inheritable([reader.as_fd()], true).unwrap();
        let number = reader.into_raw_fd();
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take(number).is_err(), "it has an owner now");
    }

    #[test]
    fn what_this_program_opened_is_not_for_taking() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(take(reader.as_raw_fd()).is_err());
        assert!(take(2).is_err());
        assert!(take(RawFd::MAX).is_err());
    }
}
