//! What one owner's renders may take together. A render that waits or runs holds what it will make, so that two do not both count on the last volume of a
//! quota; what it has published already counts twice until it ends: near the limit this refuses a little early, never too late.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    config::CallerLimits,
    error::{Error, Kind, Result, Stage},
    render::{Engine, devices::content, resolve::Resolved},
    store::catalog::owners::Usage,
    target::{Preallocation, VolumeFormat, VolumeOptions},
    units::Bytes,
};

/// Who asks for a job, and under which limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What the volumes will belong to.
    pub owner: String,
    /// What the owner may have.
    pub limits: CallerLimits,
}

/// What jobs hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Demand {
    /// Jobs.
    pub renders: u32,
    /// What they will make.
    pub made: Usage,
}

/// What the jobs of all owners hold.
#[derive(Debug, Default)]
pub struct Quotas {
    held: Mutex<HashMap<String, Demand>>,
}

/// A job's part of its owner's quota; given back when dropped.
#[derive(Debug)]
pub struct Hold {
    quotas: Arc<Quotas>,
    owner: String,
    demand: Demand,
}

impl Quotas {
    /// What an owner's jobs hold.
    pub fn held(&self, owner: &str) -> Demand {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).get(owner).copied().unwrap_or_default()
    }

    /// Holds `demand` beside what the owner `has`. `Kind::Busy` (`QUOTA_RENDERS`) when too many renders go on, `Kind::NoSpace` (`QUOTA_VOLUMES`,
    /// `QUOTA_VIRTUAL_SIZE`, `QUOTA_ALLOCATED_SIZE`) when the owner would have too much.
    pub fn hold(self: &Arc<Self>, claim: &Claim, has: Usage, demand: Demand) -> Result<Hold> {
        let mut all = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.get(&claim.owner).copied().unwrap_or_default();
        check(claim, has, held, demand)?;
        all.insert(claim.owner.clone(), plus(held, demand));
        Ok(Hold { quotas: Arc::clone(self), owner: claim.owner.clone(), demand })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut all = self.quotas.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.get(&self.owner).copied().unwrap_or_default();
        let left = minus(held, self.demand);
        // Owners who have nothing going on take no memory.
        if left == Demand::default() {
            all.remove(&self.owner)
        } else {
            all.insert(self.owner.clone(), left)
        };
    }
}

fn combine(one: Demand, other: Demand, numbers: fn(u64, u64) -> u64, jobs: fn(u32, u32) -> u32) -> Demand {
    Demand {
        renders: jobs(one.renders, other.renders),
        made: Usage {
            volumes: numbers(one.made.volumes, other.made.volumes),
            virtual_bytes: numbers(one.made.virtual_bytes, other.made.virtual_bytes),
            allocated_bytes: numbers(one.made.allocated_bytes, other.made.allocated_bytes),
        },
    }
}

fn plus(one: Demand, other: Demand) -> Demand {
    combine(one, other, u64::saturating_add, u32::saturating_add)
}

fn minus(one: Demand, other: Demand) -> Demand {
    combine(one, other, u64::saturating_sub, u32::saturating_sub)
}

fn check(claim: &Claim, has: Usage, held: Demand, demand: Demand) -> Result<()> {
    let Claim { owner, limits } = claim;
    let renders = u64::from(held.renders) + u64::from(demand.renders);
    if let Some(limit) = limits.concurrent_renders.filter(|limit| renders > u64::from(*limit)) {
        let why = format!("{} of the owner's renders wait or run, the limit is {limit}", held.renders);
        return Err(Error::new(Kind::Busy, Stage::Request, owner, why).with_reason("QUOTA_RENDERS").with_hint("try again when one has ended"));
    }
    let refused = |what: &str, reason, has: String, wanted: String, limit: String| {
        let why = format!("the owner has or is making {what} {has}, this one takes {wanted} more, and the limit is {limit}");
        Err(Error::new(Kind::NoSpace, Stage::Request, owner, why).with_reason(reason).with_hint("delete volumes that are not needed"))
    };
    let (made, wanted) = (plus(held, Demand { renders: 0, made: has }).made, demand.made);
    let exceeds = |has: u64, wanted: u64, limit: u64| wanted > 0 && has.saturating_add(wanted) > limit;
    if let Some(limit) = limits.volumes.filter(|limit| exceeds(made.volumes, wanted.volumes, *limit)) {
        return refused("volumes:", "QUOTA_VOLUMES", made.volumes.to_string(), wanted.volumes.to_string(), limit.to_string());
    }
    let bytes = |bytes: u64| Bytes(bytes).to_string();
    if let Some(limit) = limits.virtual_size.filter(|limit| exceeds(made.virtual_bytes, wanted.virtual_bytes, limit.0)) {
        return refused("virtual sizes of", "QUOTA_VIRTUAL_SIZE", bytes(made.virtual_bytes), bytes(wanted.virtual_bytes), limit.to_string());
    }
    if let Some(limit) = limits.allocated_size.filter(|limit| exceeds(made.allocated_bytes, wanted.allocated_bytes, limit.0)) {
        return refused("allocations of", "QUOTA_ALLOCATED_SIZE", bytes(made.allocated_bytes), bytes(wanted.allocated_bytes), limit.to_string());
    }
    Ok(())
}

/// What one new volume adds. A file that is not preallocated allocates what is copied into it, `data` bytes; a block device is its owner's as a whole.
fn of_volume(format: VolumeFormat, options: &VolumeOptions, size_bytes: u64, data: u64, replaced: Option<u64>) -> Usage {
    let whole = format == VolumeFormat::Block || matches!(options.preallocation, Some(Preallocation::Falloc | Preallocation::Full));
    let allocated_bytes = match format {
        _ if whole => size_bytes,
        VolumeFormat::Qcow2Overlay => 0,
        _ => data.min(size_bytes),
    };
    Usage {
        volumes: u64::from(replaced.is_none()),
        virtual_bytes: size_bytes.saturating_sub(replaced.unwrap_or(0)),
        allocated_bytes: if replaced.is_some() { 0 } else { allocated_bytes },
    }
}

impl Engine {
    /// Holds what a job will take of its owner's quota. Blocking.
    pub(super) fn claim(&self, claim: &Claim, resolved: &Resolved) -> Result<Hold> {
        let mut demand = Demand { renders: 1, made: Usage::default() };
        if let Some(render) = &resolved.render {
            // As long as the golden image is not built, nobody knows what it allocates.
            let golden = resolved.golden.complete().map(|spec| self.store.catalog.golden(spec.key())).transpose()?.flatten();
            let data = golden.map_or(0, |golden| golden.allocated);
            let size = render.spec.size_bytes.unwrap_or(resolved.golden.size_bytes());
            let replaced = render.replaces.as_ref().map(|record| record.volume.virtual_size_bytes);
            let mut add = |made| demand = plus(demand, Demand { renders: 0, made });
            add(of_volume(render.format, &render.spec.options, size, data, replaced));
            for device in render.devices.iter().filter(|device| device.kept().is_none()) {
                let replaced = device.replaced().map(|record| record.volume.virtual_size_bytes);
                add(of_volume(device.format, &device.options, content::size_of(device)?, 0, replaced));
            }
        }
        self.quotas.hold(claim, self.store.catalog.usage(&claim.owner)?, demand)
    }

    /// What an owner has, and what the owner's jobs hold. Blocking.
    pub fn usage(&self, owner: &str) -> Result<(Usage, Demand)> {
        Ok((self.store.catalog.usage(owner)?, self.quotas.held(owner)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(limits: CallerLimits) -> Claim {
        Claim { owner: "one".into(), limits }
    }

    fn of(volumes: u64, virtual_bytes: u64, allocated_bytes: u64) -> Demand {
        Demand { renders: 1, made: Usage { volumes, virtual_bytes, allocated_bytes } }
    }

    #[test]
    fn each_limit_refuses_by_its_own_name_and_at_its_own_number() {
        let has = Usage { volumes: 1, virtual_bytes: 100, allocated_bytes: 10 };
        for (limits, reason) in [
            (CallerLimits { volumes: Some(2), ..CallerLimits::default() }, "QUOTA_VOLUMES"),
            (CallerLimits { virtual_size: Some(Bytes(200)), ..CallerLimits::default() }, "QUOTA_VIRTUAL_SIZE"),
            (CallerLimits { allocated_size: Some(Bytes(20)), ..CallerLimits::default() }, "QUOTA_ALLOCATED_SIZE"),
            (CallerLimits { concurrent_renders: Some(1), ..CallerLimits::default() }, "QUOTA_RENDERS"),
        ] {
            let quotas = Arc::new(Quotas::default());
            let first = quotas.hold(&claim(limits), has, of(1, 100, 10)).expect("just as much as there may be");
            let error = quotas.hold(&claim(limits), has, of(1, 1, 1)).expect_err(reason);
            assert_eq!(error.reason(), reason);
            assert_eq!(error.is_retryable(), reason == "QUOTA_RENDERS");
            let other = Claim { owner: "other".into(), ..claim(limits) };
            assert!(quotas.hold(&other, has, of(1, 100, 10)).is_ok(), "owners do not share");
            drop(first);
            assert!(quotas.hold(&claim(limits), has, of(1, 100, 10)).is_ok());
            assert!(quotas.held.lock().expect("whole").is_empty(), "what nobody holds takes no memory");
        }
        // Whoever is over a limit already may still do what adds nothing.
        let over = Usage { volumes: 9, ..has };
        let limits = CallerLimits { volumes: Some(2), ..CallerLimits::default() };
        assert!(Arc::new(Quotas::default()).hold(&claim(limits), over, of(0, 0, 0)).is_ok());
    }

    #[test]
    fn a_volume_counts_by_how_it_is_stored() {
        let plain = VolumeOptions::default();
        let full = VolumeOptions { preallocation: Some(Preallocation::Full), ..VolumeOptions::default() };
        for (format, options, replaced, want) in [
            (VolumeFormat::Raw, &plain, None, (1, 1000, 30)),
            (VolumeFormat::Raw, &full, None, (1, 1000, 1000)),
            (VolumeFormat::Qcow2Overlay, &plain, None, (1, 1000, 0)),
            (VolumeFormat::Block, &plain, None, (1, 1000, 1000)),
            (VolumeFormat::Raw, &plain, Some(400), (0, 600, 0)),
            (VolumeFormat::Raw, &plain, Some(4000), (0, 0, 0)),
        ] {
            let made = of_volume(format, options, 1000, 30, replaced);
            assert_eq!((made.volumes, made.virtual_bytes, made.allocated_bytes), want, "{format:?} {replaced:?}");
        }
    }

    proptest! {
        #[test]
        fn holds_never_exceed_the_limit_and_end_at_nothing(steps in proptest::collection::vec((any::<bool>(), 0_u64..40), 1..60)) {
            let quotas = Arc::new(Quotas::default());
            let claim = claim(CallerLimits { virtual_size: Some(Bytes(100)), ..CallerLimits::default() });
            let mut holds = Vec::new();
            for (take, bytes) in steps {
                if take {
                    holds.extend(quotas.hold(&claim, Usage::default(), of(0, bytes, 0)));
                } else {
                    holds.pop();
                }
                prop_assert!(quotas.held("one").made.virtual_bytes <= 100);
            }
            drop(holds);
            prop_assert_eq!(quotas.held("one"), Demand::default());
        }
    }
}
