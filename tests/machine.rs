//! The black-box tests that measure or change what belongs to the whole machine, or bring it under load: a program of its
//! own, in which each says whether others may run beside it (`harness::turns`). All others are in `main.rs`.

mod harness;

mod adoption;
mod chaos;
mod deaf;
mod flooded;
mod gather;
mod held_back;
mod long_links;
mod lost_events;
mod memory_pressure;
mod outlive;
mod pressure;
mod short_streams;
mod steering;
mod worker_total;
