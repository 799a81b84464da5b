//! What the devices are called.

/// Firmware revision: 8 characters.
pub(super) const FIRMWARE: &str = "1.0";
/// A disk's model: 40 characters.
pub(super) const DISK: &str = "LODGE HARDDISK";
/// A drive's model.
pub(super) const CD_ROM: &str = "LODGE CD-ROM";
