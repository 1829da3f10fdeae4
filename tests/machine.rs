//! The black-box tests that measure or change what belongs to the whole machine, and what looks alike: a program of its
//! own, in which each says whether others may run beside it (`harness::turns`). All others are in `main.rs`.

mod harness;

mod held_back;
mod lost_events;
mod memory_pressure;
mod pressure;
mod steering;
mod worker_total;
