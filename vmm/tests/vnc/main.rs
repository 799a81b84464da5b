//! The VNC server against clients: a small one of our own, hostile ones, and stock ones as judges.

mod client;
mod encodings;
mod extensions;
mod format;
mod host;
mod hostile;
mod pictures;
mod security;
mod stock;
