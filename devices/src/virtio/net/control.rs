//! The control queue: what the driver asks of the card itself (VIRTIO 1.2, section 5.1.6.5).
//!
//! ```text
//!   readable: class u8, command u8, data | writable: ack u8
//! ```

use lodge_memory::GuestMemory;

use super::super::Chain;
use super::Shared;

const OK: u8 = 0;
const ERROR: u8 = 1;
/// Classes, and commands of each.
const RX: u8 = 0;
const RX_LAST: u8 = 5;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDRESS_SET: u8 = 1;
const MULTI_QUEUE: u8 = 4;
const PAIRS_SET: u8 = 0;

/// Does what the chain asks; returns how many bytes were written.
pub(super) fn execute(memory: &GuestMemory, chain: &Chain, shared: &Shared) -> u32 {
    let mut head = [0; 2];
    let known = chain.read(memory, 0, &mut head) == 2
        && match head {
            // Receive modes only narrow what the guest sees; more frames than asked for are allowed.
            [RX, 0..=RX_LAST] => data::<1>(memory, chain).is_some(),
            [MAC, MAC_TABLE_SET] => is_mac_table(memory, chain),
            [MAC, MAC_ADDRESS_SET] => set_mac(memory, chain, shared),
            [MULTI_QUEUE, PAIRS_SET] => data(memory, chain)
                .is_some_and(|pairs| shared.set_active(u16::from_le_bytes(pairs))),
            _ => false,
        };
    chain.write(memory, 0, &[if known { OK } else { ERROR }]) as u32
}

/// The command's data, if it is exactly this long.
fn data<const N: usize>(memory: &GuestMemory, chain: &Chain) -> Option<[u8; N]> {
    let mut data = [0; N];
    let whole = chain.readable_len() == 2 + N as u64 && chain.read(memory, 2, &mut data) == N;
    whole.then_some(data)
}

fn set_mac(memory: &GuestMemory, chain: &Chain, shared: &Shared) -> bool {
    match data(memory, chain) {
        // A group address is nobody's own.
        Some(mac) if mac[0] & 1 == 0 => {
            *shared.mac() = mac;
            true
        }
        _ => false,
    }
}

/// Two tables (unicast, multicast), each a count and so many addresses.
fn is_mac_table(memory: &GuestMemory, chain: &Chain) -> bool {
    let mut at = 2;
    for _ in 0..2 {
        let mut count = [0; 4];
        if chain.read(memory, at, &mut count) < 4 {
            return false;
        }
        at += 4 + 6 * u64::from(u32::from_le_bytes(count));
    }
    at == chain.readable_len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Segment;
    use lodge_memory::{RamLayout, allocate};
    use std::sync::atomic::Ordering;
    use std::sync::{Mutex, OnceLock};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    fn card() -> Shared {
        Shared {
            mac: Mutex::new([2, 0, 0, 0, 0, 1]),
            link: true.into(),
            active: 1.into(),
            update: (0..4).map(|_| EventFd::new(0).unwrap()).collect(),
            notifier: OnceLock::new(),
        }
    }

    fn ask(shared: &Shared, command: &[u8]) -> u8 {
        let memory = allocate(&RamLayout::new(1 << 16).unwrap()).unwrap();
        memory.write_slice(command, GuestAddress(0x1000)).unwrap();
        let readable = vec![Segment { gpa: 0x1000, len: command.len() as u32 }];
        let chain = Chain { head: 0, readable, writable: vec![Segment { gpa: 0x2000, len: 1 }] };
        assert_eq!(execute(&memory, &chain, shared), 1);
        memory.read_obj(GuestAddress(0x2000)).unwrap()
    }

    #[test]
    fn commands_are_checked_and_answered() {
        let card = card();
        assert_eq!(ask(&card, &[4, 0, 4, 0]), OK);
        assert_eq!(card.active.load(Ordering::SeqCst), 4);
        for bad in [&[4, 0, 5, 0][..], &[4, 0, 0, 0], &[4, 0, 1], &[4, 1, 1, 0], &[9, 0], &[4]] {
            assert_eq!(ask(&card, bad), ERROR, "{bad:?}");
        }
        assert_eq!(ask(&card, &[1, 1, 2, 0, 0, 0, 0, 7]), OK);
        assert_eq!(*card.mac(), [2, 0, 0, 0, 0, 7]);
        assert_eq!(ask(&card, &[1, 1, 3, 0, 0, 0, 0, 7]), ERROR);
        assert_eq!(ask(&card, &[0, 0, 1]), OK);
        assert_eq!(ask(&card, &[0, 6, 1]), ERROR);
        let table = [&[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9][..], &[0, 0, 0, 0]].concat();
        assert_eq!(ask(&card, &table), OK);
        assert_eq!(ask(&card, &table[..15]), ERROR);
        assert_eq!(ask(&card, &[1, 0, 0xff, 0xff, 0xff, 0xff]), ERROR);
    }
}
