//! Memory that several processes, or this process and the kernel, read and write at the same time.
//!
//! Owns the mapping; never the meaning of what is in it.

use std::ffi::CStr;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;

/// Types that may lie in shared memory.
///
/// # Safety
/// The type must be `repr(C)`, consist only of atomics (so that a shared reference is all that is ever
/// needed), and be valid when all its bytes are zero and for whatever the other side stores.
pub unsafe trait Shareable: Sync {}

/// A shared mapping of `len` values of `T`; dereferences to a slice. Survives `fork` in both processes.
pub struct Shared<T: Shareable> {
    start: NonNull<T>,
    len: usize,
    mapped_bytes: NonZeroUsize,
    owns: PhantomData<T>,
}

// SAFETY: the mapping is plain memory; `T: Sync` and only shared references to it are handed out.
unsafe impl<T: Shareable> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for Shared<T> {}

impl<T: Shareable> Shared<T> {
    /// Maps `len` zeroed values, shared with all processes forked afterwards. Pages that are never
    /// touched take no memory.
    pub fn anonymous(len: usize) -> Result<Shared<T>> {
        let bytes = Self::bytes(len)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE,
            )
        }
        .with_context(|| format!("failed to map {bytes} bytes of shared memory"))?;
        Ok(Shared {
            start: start.cast(),
            len,
            mapped_bytes: bytes,
            owns: PhantomData,
        })
    }

    /// As [`Shared::anonymous`], in a memory file that another program can map (memfd_create(2)): the memory
    /// lives as long as its descriptor or a mapping. `name` is for people, who see it in /proc.
    pub fn in_file(name: &CStr, len: usize) -> Result<(Shared<T>, OwnedFd)> {
        let bytes = Self::bytes(len)?;
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).context("failed to create a memory file")?;
        ftruncate(&file, bytes.get() as i64)
            .with_context(|| format!("failed to make a memory file of {bytes} bytes"))?;
        Ok((Self::of_fd(file.as_fd(), len)?, file))
    }

    /// Maps `len` values of a BPF array map created with `BPF_F_MMAPABLE` (or of a memory file).
    pub fn of_fd(fd: BorrowedFd<'_>, len: usize) -> Result<Shared<T>> {
        let bytes = Self::bytes(len)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory; the
        // kernel refuses a length beyond the object (array_map_mmap, mm/mmap.c).
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )
        }
        .with_context(|| format!("failed to map {bytes} bytes of a shared descriptor"))?;
        Ok(Shared {
            start: start.cast(),
            len,
            mapped_bytes: bytes,
            owns: PhantomData,
        })
    }

    fn bytes(len: usize) -> Result<NonZeroUsize> {
        ensure!(
            align_of::<T>() <= 4096,
            "a type with more than page alignment cannot be shared"
        );
        len.checked_mul(size_of::<T>())
            .and_then(NonZeroUsize::new)
            .with_context(|| format!("cannot share {len} values of {} bytes", size_of::<T>()))
    }
}

impl<T: Shareable> Deref for Shared<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `len` values for as long as `self` lives, aligned to a page, and
        // `Shareable` says that any content is valid and that concurrent access goes through atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Shareable> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: start and length are those of the mapping made at construction; no reference into
        // it outlives `self`. A failure leaves the mapping in place, which harms nobody.
        let _ = unsafe { munmap(self.start.cast(), self.mapped_bytes.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    #[repr(C)]
    struct Cell(AtomicU64);
    // SAFETY: one atomic; zero is valid.
    unsafe impl Shareable for Cell {}

    #[test]
    fn a_new_mapping_is_zeroed_and_keeps_what_is_stored() {
        let cells = Shared::<Cell>::anonymous(1000).unwrap();
        assert_eq!(cells.len(), 1000);
        assert!(cells.iter().all(|cell| cell.0.load(Relaxed) == 0));
        cells[999].0.store(7, Relaxed);
        assert_eq!(cells[999].0.load(Relaxed), 7);
    }

    #[test]
    fn an_empty_mapping_is_refused() {
        assert!(Shared::<Cell>::anonymous(0).is_err());
    }
}
