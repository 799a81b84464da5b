//! Hardware addresses for cards that were given none.

/// A hardware address that is always the same for one card of one machine: locally administered, for one
/// receiver (IEEE 802, bits 1 and 0 of the first byte). `machine` is the machine's name or identity, `card` counts its cards.
///
/// Two of 1000 cards on a network share an address with a probability of about one in 10 million.
pub fn mac_address(machine: &str, card: u32) -> [u8; 6] {
    // FNV-1a, 64 bits: written out, since the answer must not change with a library.
    let bytes = machine.bytes().chain([0]).chain(card.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // The low bits of such a hash are weaker than the high ones: fold them.
    let [a, b, c, d, e, f, g, h] = (hash ^ (hash >> 32)).to_le_bytes();
    [(a & 0xfc) | 0x02, b ^ g, c ^ h, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn addresses_are_stable_local_and_different() {
        assert_eq!(mac_address("web", 0), mac_address("web", 0));
        let all: HashSet<_> = (0..200)
            .flat_map(|m| (0..8).map(move |card| mac_address(&format!("machine-{m}"), card)))
            .collect();
        assert_eq!(all.len(), 1600);
        assert!(all.iter().all(|mac| mac[0] & 3 == 2));
        // A change here changes the cards of machines that exist.
        assert_eq!(mac_address("web", 1), [58, 35, 67, 228, 155, 179]);
    }
}
