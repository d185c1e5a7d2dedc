//! Garbage collection, the part that decides: which goldens and blobs go, and why the others stay. Pure; what goes is removed by `render::collect`.
//!
//! The longest unused goes first, until enough is free. Nothing goes that a volume is backed by, that a render wants, that somebody holds a lease on, that the
//! configuration keeps, that is open in another process, that is the only copy of an uploaded root filesystem, or that was used a moment ago.

use crate::names::Digest;

/// What is collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kept {
    /// A root filesystem's tarball. It can be fetched again.
    Blob,
    /// A golden disk. It can be built again.
    Golden,
}

impl Kept {
    /// The name in logs and the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Kept::Blob => "blob",
            Kept::Golden => "golden",
        }
    }
}

/// Why something stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// This many volumes of the catalogue are backed by it.
    Volumes(u32),
    /// A file of a pool, which the catalogue does not know, is backed by it.
    Overlay(String),
    /// A render waits or runs that may want it.
    Running,
    /// Somebody holds it.
    Lease {
        /// Who.
        owner: String,
        /// Why.
        reason: String,
    },
    /// `gc.keep` names it.
    Configured,
    /// An image needs it and says no URL to fetch it from.
    OnlyCopy(String),
    /// It is locked or open in another process.
    InUse(String),
    /// It was used this many seconds ago, which is less than `gc.min_age_secs`.
    Young(i64),
    /// Enough is free without it.
    Enough,
}

impl Keep {
    /// A stable word for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Keep::Volumes(_) => "BACKS_VOLUMES",
            Keep::Overlay(_) => "BACKS_FILE",
            Keep::Running => "WANTED",
            Keep::Lease { .. } => "LEASED",
            Keep::Configured => "CONFIGURED",
            Keep::OnlyCopy(_) => "ONLY_COPY",
            Keep::InUse(_) => "IN_USE",
            Keep::Young(_) => "RECENTLY_USED",
            Keep::Enough => "ENOUGH_FREE",
        }
    }
}

impl std::fmt::Display for Keep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Keep::Volumes(count) => write!(f, "{count} volumes are backed by it"),
            Keep::Overlay(path) => write!(f, "{path}, which the catalogue does not know, is backed by it"),
            Keep::Running => f.write_str("a render that waits or runs may want it"),
            Keep::Lease { owner, reason } => write!(f, "{owner} holds a lease: {reason}"),
            Keep::Configured => f.write_str("gc.keep names it"),
            Keep::OnlyCopy(image) => write!(f, "image {image} needs it and names no URL to fetch it from"),
            Keep::InUse(why) => f.write_str(why),
            Keep::Young(secs) => write!(f, "it was used {secs} s ago"),
            Keep::Enough => f.write_str("enough is free without it"),
        }
    }
}

/// A golden or blob with what is known about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Which kind.
    pub kind: Kept,
    /// Golden key or blob digest.
    pub object: Digest,
    /// Bytes that its removal frees.
    pub bytes: u64,
    /// Seconds since 1970.
    pub last_used: i64,
    /// Why it stays; none when it goes.
    pub keep: Option<Keep>,
}

/// Bytes to be freed when `used` of a budget of `max` bytes are in use: nothing below the high water mark, else down to the low one. Percent of `max`; a budget
/// of 0 is none.
pub fn over_budget(used: u64, max: u64, high_percent: u8, low_percent: u8) -> u64 {
    let mark = |percent: u8| (u128::from(max) * u128::from(percent) / 100) as u64;
    if max == 0 || used <= mark(high_percent) { 0 } else { used - mark(low_percent) }
}

/// Chooses among the items that nothing keeps so far: the longest unused first (of the same second, blobs before goldens), until `bytes` are freed. The others
/// are kept as [`Keep::Enough`]. Leaves the items in that order and gives the bytes that go.
pub fn choose(items: &mut [Item], bytes: u64) -> u64 {
    items.sort_by_key(|item| (item.last_used, item.kind, *item.object.as_bytes()));
    let mut freed = 0u64;
    for item in items.iter_mut().filter(|item| item.keep.is_none()) {
        if freed >= bytes {
            item.keep = Some(Keep::Enough);
        } else {
            freed = freed.saturating_add(item.bytes);
        }
    }
    freed
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(name: u8, bytes: u64, last_used: i64, keep: Option<Keep>) -> Item {
        Item { kind: if name.is_multiple_of(2) { Kept::Blob } else { Kept::Golden }, object: Digest::of(&[name]), bytes, last_used, keep }
    }

    #[test]
    fn water_marks_bound_when_it_begins_and_where_it_ends() {
        assert_eq!(over_budget(95, 100, 95, 80), 0);
        assert_eq!(over_budget(96, 100, 95, 80), 16);
        assert_eq!(over_budget(u64::MAX, 0, 95, 80), 0, "no budget");
        assert_eq!(over_budget(u64::MAX, u64::MAX, 90, 50), u64::MAX - u64::MAX / 2);
    }

    #[test]
    fn the_longest_unused_goes_first_and_what_is_kept_stays() {
        let mut items =
            vec![item(1, 10, 30, None), item(2, 10, 10, Some(Keep::Volumes(1))), item(3, 10, 20, None), item(4, 10, 20, None), item(5, 10, 40, None)];
        assert_eq!(choose(&mut items, 15), 20);
        let gone: Vec<Digest> = items.iter().filter(|item| item.keep.is_none()).map(|item| item.object).collect();
        assert_eq!(gone, [Digest::of(&[4]), Digest::of(&[3])], "the blob first, its golden can't be made from nothing but it can be fetched");
        assert_eq!(items.iter().filter(|item| item.keep == Some(Keep::Enough)).count(), 2);
        assert_eq!(choose(&mut [item(1, 10, 1, None)], 0), 0);
    }

    proptest! {
        #[test]
        fn it_frees_what_is_asked_or_everything_that_may_go_and_never_one_too_many(
            sizes in proptest::collection::vec((1u64..1000, 0i64..50, any::<bool>()), 0..40), wanted in 0u64..20_000
        ) {
            let mut items: Vec<Item> = sizes
                .iter()
                .enumerate()
                .map(|(index, (bytes, used, held))| item(index as u8, *bytes, *used, held.then_some(Keep::Running)))
                .collect();
            let free: u64 = items.iter().filter(|item| item.keep.is_none()).map(|item| item.bytes).sum();
            let freed = choose(&mut items, wanted);
            prop_assert_eq!(items.iter().filter(|item| item.keep.is_none()).map(|item| item.bytes).sum::<u64>(), freed);
            prop_assert!(freed >= wanted.min(free));
            let last = items.iter().rev().find(|item| item.keep.is_none()).map_or(0, |item| item.bytes);
            prop_assert!(freed.saturating_sub(last) < wanted || freed == 0);
        }
    }
}
