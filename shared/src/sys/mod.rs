//! The unsafe fence: what the safe crates need and `nix` has no safe call for.

pub mod fdpass;
pub mod inherit;
pub mod local_time;
pub mod process;
pub mod repair;
pub mod shm;
pub mod signals;
pub mod socket;
