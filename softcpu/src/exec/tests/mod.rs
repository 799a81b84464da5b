//! Tests of whole instructions in small guests (see [`super::testing`]). What ordinary code may execute is compared
//! with the host's processor elsewhere; here is what needs privilege, modes or faults.

mod control;
mod integer;
mod long;
mod memory;
mod protected;
mod real;
mod strings;
mod tasks;
mod v86;
mod vectors;
