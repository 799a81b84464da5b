//! What the host offers, and how fast its guests are.

mod kvm_support;

use kvm_support::*;
use lodge_accel::kvm;

#[test]
fn the_host_is_probed_and_measured() {
    if !kvm_is_here("the_host_is_probed_and_measured") {
        return;
    }
    let facts = kvm::probe().unwrap();
    assert_eq!(facts.api_version, 12);
    assert!(facts.max_vcpus >= 1 && facts.memory_slots >= 32, "{facts:?}");
    let speed = kvm::measure().unwrap();
    println!("{facts:?}\n{speed:?}");
    assert!(speed.instructions_per_second > 0);
    assert_eq!(speed.native, speed.instructions_per_second >= kvm::NATIVE_INSTRUCTIONS_PER_SECOND);
}
