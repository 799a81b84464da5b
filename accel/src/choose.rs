//! Which accelerator runs a machine, and why.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kvm::{self, GuestSpeed, Kvm};
use crate::soft::SoftVm;
use crate::vm::{Vm, VmSetup};

/// Which accelerator is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// KVM where it runs guest kernels natively, which is measured; the software CPU elsewhere.
    #[default]
    Auto,
    /// KVM, or an error that says what is missing.
    Kvm,
    /// The software CPU.
    Soft,
}

/// Makes a VM; gives it with a line that says what runs it and why.
///
/// # Errors
/// The accelerator that was asked for cannot be used here ([`Error::Unavailable`] says what to do), or the host refuses.
pub fn open(kind: Kind, setup: VmSetup) -> Result<(Arc<dyn Vm>, String)> {
    match kind {
        Kind::Soft => soft(setup, "as asked".into()),
        Kind::Kvm => {
            let vm = Kvm::open()?.new_vm(setup, kvm::Options::default())?;
            Ok((vm, "the accelerator is kvm, as asked".into()))
        }
        Kind::Auto => match verdict(kvm::measure()) {
            Ok(why) => {
                let vm = Kvm::open()?.new_vm(setup, kvm::Options::default())?;
                Ok((vm, format!("the accelerator is kvm: {why}")))
            }
            Err(why) => soft(setup, why),
        },
    }
}

fn soft(setup: VmSetup, why: String) -> Result<(Arc<dyn Vm>, String)> {
    Ok((SoftVm::new(setup)?, format!("the accelerator is the software CPU: {why}")))
}

/// Whether KVM is good enough, and the reason either way.
fn verdict(measured: Result<GuestSpeed>) -> std::result::Result<String, String> {
    match measured {
        Ok(GuestSpeed { instructions_per_second: n, native: true }) => {
            Ok(format!("guest kernels run natively ({} million instructions/s)", n / 1_000_000))
        }
        Ok(GuestSpeed { instructions_per_second: n, .. }) => Err(format!(
            "this host's KVM emulates guest kernels at {:.1} million instructions/s",
            n as f64 / 1e6
        )),
        Err(Error::Unavailable(why)) => Err(why),
        Err(error) => Err(format!("this host's KVM cannot run a test guest ({error})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_or_missing_kvm_is_not_chosen() {
        let speed = |n, native| Ok(GuestSpeed { instructions_per_second: n, native });
        assert!(verdict(speed(2_000_000_000, true)).unwrap().contains("2000 million"));
        assert!(verdict(speed(1_500_000, false)).unwrap_err().contains("1.5 million"));
        let missing = Err(Error::Unavailable("no /dev/kvm".into()));
        assert_eq!(verdict(missing).unwrap_err(), "no /dev/kvm");
        let odd = Err(Error::Invalid("odd".into()));
        assert!(verdict(odd).unwrap_err().contains("odd"));
    }
}
