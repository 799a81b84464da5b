//! What virtualization needs of the host: the CPU, KVM, its speed, the IOMMU.

use std::fs;
use std::path::Path;

use lodge_accel::kvm::{self, HostCpu};

use super::Finding;

pub fn findings() -> Vec<Finding> {
    let cpu = HostCpu::read();
    let mut findings = kvm();
    let usable = findings.iter().any(|finding| finding.name == SPEED);
    findings.insert(0, virtualization(&cpu, usable));
    findings.push(iommu(Path::new("/sys/class/iommu"), &cpu));
    findings
}

/// What the CPU shows; some hosts' KVM does without (`kvm_usable`).
fn virtualization(cpu: &HostCpu, kvm_usable: bool) -> Finding {
    const NAME: &str = "virtualization";
    match (cpu.vmx, cpu.svm, cpu.guest) {
        (true, _, _) => Finding::ok(NAME, format!("Intel VT-x ({})", cpu.model)),
        (_, true, _) => Finding::ok(NAME, format!("AMD-V ({})", cpu.model)),
        _ if kvm_usable => Finding::warning(
            NAME,
            format!("the CPU shows neither VT-x nor AMD-V ({}), KVM does without", cpu.model),
            "nothing to do where the KVM speed below is fine",
        ),
        (false, false, true) => Finding::missing(
            NAME,
            format!("the CPU shows neither VT-x nor AMD-V ({}, a virtual machine)", cpu.model),
            "switch nested virtualization on for this machine on the host above it; until then \
             the software CPU runs guests, slower",
        ),
        (false, false, false) => Finding::missing(
            NAME,
            format!("the CPU shows neither VT-x nor AMD-V ({})", cpu.model),
            "switch on \"Virtualization Technology\" or \"SVM mode\" in the firmware's settings; \
             until then the software CPU runs guests, slower",
        ),
    }
}

/// Whether KVM can be used, and if so, how fast it runs a guest's kernel.
fn kvm() -> Vec<Finding> {
    const NAME: &str = "KVM";
    let probe = match kvm::probe() {
        Ok(probe) => probe,
        Err(error) => {
            // The message names what is missing and the way out, behind a colon.
            let message = error.to_string();
            let (found, help) = message.split_once(": ").unwrap_or((&message, ""));
            return vec![Finding::missing(NAME, found, help)];
        }
    };
    let module = match probe.module.as_str() {
        "" => String::new(),
        module => format!(", {module}"),
    };
    let found = format!(
        "{} can be used (API {}{module}, up to {} vCPUs)",
        probe.path.display(),
        probe.api_version,
        probe.max_vcpus
    );
    vec![Finding::ok(NAME, found), speed()]
}

const SPEED: &str = "KVM speed";

fn speed() -> Finding {
    const NAME: &str = SPEED;
    match kvm::measure() {
        Ok(speed) => {
            let rate = millions(speed.instructions_per_second);
            let found = format!("{rate} guest kernel instructions a second");
            if speed.native {
                Finding::ok(NAME, found)
            } else {
                Finding::warning(
                    NAME,
                    format!("{found}: this KVM emulates guest kernels"),
                    "nothing to do here: --accel auto takes the software CPU, which is faster",
                )
            }
        }
        Err(error) => Finding::missing(
            NAME,
            format!("the self-test failed: {}", crate::failure::chain(&error)),
            "--accel auto takes the software CPU; look at the kernel's log (dmesg) for KVM",
        ),
    }
}

/// `1.5 million`, `2300 million`.
fn millions(count: u64) -> String {
    if count < 10_000_000 {
        format!("{}.{} million", count / 1_000_000, count % 1_000_000 / 100_000)
    } else {
        format!("{} million", count / 1_000_000)
    }
}

fn iommu(class: &Path, cpu: &HostCpu) -> Finding {
    const NAME: &str = "IOMMU";
    let units = fs::read_dir(class).map(|entries| entries.count()).unwrap_or(0);
    if units > 0 {
        return Finding::ok(NAME, format!("{units} units: host devices can be given to guests"));
    }
    let flag = if cpu.vendor.contains("AMD") { "amd_iommu=on" } else { "intel_iommu=on" };
    Finding::warning(
        NAME,
        "none: host devices cannot be given to guests (all else works)",
        format!("switch on VT-d or AMD-Vi in the firmware's settings, and start Linux with {flag}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn cpus() {
        let cpu = |vmx, svm, guest| HostCpu { vmx, svm, guest, ..HostCpu::default() };
        assert_eq!(virtualization(&cpu(true, false, false), true).status, Status::Ok);
        assert_eq!(virtualization(&cpu(false, true, true), true).status, Status::Ok);
        let nested = virtualization(&cpu(false, false, true), false);
        assert_eq!(nested.status, Status::Missing);
        assert!(nested.help.contains("nested"));
        let off = virtualization(&cpu(false, false, false), false);
        assert!(off.help.contains("firmware"), "{off:?}");
        assert_eq!(virtualization(&cpu(false, false, true), true).status, Status::Warning);
    }

    #[test]
    fn rates() {
        assert_eq!(millions(1_549_999), "1.5 million");
        assert_eq!(millions(2_300_000_000), "2300 million");
    }

    #[test]
    fn iommus() {
        let folder = tempfile::tempdir().unwrap();
        let cpu = HostCpu::default();
        assert_eq!(iommu(folder.path(), &cpu).status, Status::Warning);
        fs::create_dir(folder.path().join("dmar0")).unwrap();
        assert_eq!(iommu(folder.path(), &cpu).status, Status::Ok);
        assert_eq!(iommu(&folder.path().join("no"), &cpu).status, Status::Warning);
    }
}
