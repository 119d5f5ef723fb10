//! Whether a Pull leaves something to be pulled, and where what there is begins. Pure.
//!
//! Trap: messages may be missing anywhere, and whoever pulls until there is no more must neither miss one nor go round in circles.

/// `has_more` and `first` of a Pull's answer. Where the store read nothing but damaged messages and more lies above, the answer
/// counts the damaged ones among what is not kept any more: whoever asks knows of the gap then, and goes on behind it. Backwards
/// no field can say so: there the answer ends the walk.
pub fn rest(last: Option<u64>, reverse: bool, (first, head): (u64, u64), read_to: u64) -> (bool, u64) {
    if last.is_none() && !reverse && (1..head).contains(&read_to) {
        return (true, first.max(read_to + 1));
    }
    (has_more(last, reverse, first, head), first)
}

/// Whether another Pull from the last message on may bring more. Messages that are cut (below `first`) or damaged are missing
/// in between and at the ends, so this may be true once too often, and then the next answer is empty and ends it; an answer
/// without messages never has more, or whoever asks would go round in circles.
pub fn has_more(last: Option<u64>, reverse: bool, first: u64, head: u64) -> bool {
    match last {
        Some(last) if reverse => last > first.max(1),
        Some(last) => last < head,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Pulls page after page until there is no more: everything that is readable comes, in order, whatever is cut or
        /// damaged, and it ends. Backwards only while no page is damaged as a whole.
        #[test]
        fn pulling_until_there_is_no_more_brings_everything(
            damaged in proptest::collection::vec(any::<bool>(), 0..40),
            cut in 0u64..45,
            limit in 1usize..6,
            reverse: bool,
        ) {
            let head = damaged.len() as u64;
            let first = (cut + 1).min(head + 1);
            let readable = |seq: &u64| *seq >= first && !damaged[*seq as usize - 1];
            let mut pulled: Vec<u64> = Vec::new();
            let mut cursor = if reverse { head + 1 } else { 0 };
            for _ in 0..=damaged.len() {
                // As a store does it: so many of those that are kept, without those that are damaged.
                let mut read_to = 0;
                let kept = (first..=head).filter(|seq| if reverse { *seq < cursor } else { *seq > cursor });
                let kept: Vec<u64> = if reverse { kept.rev().collect() } else { kept.collect() };
                let page: Vec<u64> = if reverse {
                    kept.into_iter().filter(readable).take(limit).collect()
                } else {
                    let read: Vec<u64> = kept.into_iter().take(limit).collect();
                    read_to = read.last().copied().unwrap_or(0);
                    read.into_iter().filter(readable).collect()
                };
                pulled.extend(&page);
                let last = page.last().copied();
                let (has_more, told) = rest(last, reverse, (first, head), read_to);
                if !has_more {
                    break;
                }
                let next = last.unwrap_or(told - 1);
                prop_assert!(if reverse { next < cursor } else { next > cursor }, "no way forward");
                cursor = next;
            }
            let mut wanted: Vec<u64> = (1..=head).filter(readable).collect();
            if reverse {
                wanted.reverse();
            }
            prop_assert_eq!(pulled, wanted);
        }
    }
}
