//! Choosing one of several endpoints. Pure; any thread.
//!
//! Trap: rendezvous hashing must agree between processes and versions, so its arithmetic is part of the contract: never
//! change it, and never let it see the order of a table.

/// The index of the id that `key` belongs to. When an id leaves, only its keys move; when one comes, it takes its share
/// from all.
pub fn rendezvous<'a>(key: u64, ids: impl IntoIterator<Item = &'a str>) -> Option<usize> {
    let scored = ids.into_iter().enumerate().map(|(index, id)| (score(key, id_hash(id)), id, index));
    // Equal scores of two ids are settled by the ids, not by their places.
    scored.max_by_key(|(score, id, _)| (*score, *id)).map(|(_, _, index)| index)
}

/// What [`rendezvous`] makes of an id; whoever asks per connection keeps it beside the endpoint.
pub fn id_hash(id: &str) -> u64 {
    // FNV-1a, 64 bits.
    id.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The rank of an id for a key: the highest wins.
pub fn score(key: u64, id_hash: u64) -> u64 {
    // splitmix64, which spreads also keys that count up.
    let mut z = (key ^ id_hash).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn winner(key: u64, ids: &[String]) -> &str {
        &ids[rendezvous(key, ids.iter().map(String::as_str)).unwrap()]
    }

    #[test]
    fn arithmetic_is_pinned() {
        // Computed apart from this code.
        assert_eq!(id_hash("s-1"), 0x817cda195c3fbf24);
        assert_eq!(score(0x0123_4567_89ab_cdef, id_hash("s-1")), 0x4e75dc9173a56c84);
        assert_eq!(rendezvous(1, []), None);
    }

    #[test]
    fn shares_are_even_within_a_few_percent() {
        for count in [2usize, 3, 5, 10] {
            let ids: Vec<String> = (1..=count).map(|n| format!("s-{n}")).collect();
            let keys = 100_000u64;
            let mut shares = vec![0u64; count];
            for key in 0..keys {
                shares[rendezvous(key, ids.iter().map(String::as_str)).unwrap()] += 1;
            }
            let fair = keys as f64 / count as f64;
            for share in shares {
                assert!((share as f64 / fair - 1.0).abs() < 0.04, "{share} of {fair} among {count}");
            }
        }
    }

    proptest! {
        #[test]
        fn order_of_the_table_does_not_matter(key: u64, ids in ids(), turn in 0usize..20) {
            let mut turned = ids.clone();
            turned.rotate_left(turn % ids.len());
            prop_assert_eq!(winner(key, &ids), winner(key, &turned));
        }

        #[test]
        fn only_the_keys_of_who_leaves_move(keys in proptest::collection::vec(any::<u64>(), 100), ids in ids(), gone: prop::sample::Index) {
            prop_assume!(ids.len() > 1);
            let gone = ids[gone.index(ids.len())].clone();
            let left: Vec<String> = ids.iter().filter(|id| **id != gone).cloned().collect();
            for key in keys {
                let before = winner(key, &ids);
                prop_assert!(before == gone || before == winner(key, &left));
            }
        }
    }

    fn ids() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::btree_set("[a-z]{1,3}-[0-9]{1,3}", 1..20)
            .prop_map(|ids: BTreeSet<String>| ids.into_iter().collect())
    }
}
