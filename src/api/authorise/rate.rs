//! Calls per second of an owner: a token bucket (GCRA) that all callers with the same owner share.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    api::{authorise::Grants, status::ERROR_DOMAIN},
    config::{Access, CallerLimits},
};

/// Owners remembered under one pair of limits before those who have been quiet are forgotten. Owners may be as many as certificates.
const OWNERS_MAX: usize = 4096;

/// Calls a second, and at once.
type Rate = (NonZeroU32, NonZeroU32);

/// The buckets of a configuration: one set for each pair of rate and burst.
#[derive(Clone, Default)]
pub struct Rates {
    limiters: Arc<Vec<(Rate, DefaultKeyedRateLimiter<String>)>>,
    clock: DefaultClock,
}

fn rate_of(limits: &CallerLimits) -> Option<Rate> {
    limits.calls_per_second.map(|rate| (rate, limits.burst.unwrap_or(rate)))
}

impl Rates {
    /// For the limits of these entries.
    pub fn new(entries: &[Access]) -> Rates {
        let mut rates: Vec<_> = entries.iter().filter_map(|entry| rate_of(&entry.limits)).collect();
        rates.sort_unstable();
        rates.dedup();
        let limiter = |(rate, burst)| ((rate, burst), RateLimiter::keyed(Quota::per_second(rate).allow_burst(burst)));
        Rates { limiters: Arc::new(rates.into_iter().map(limiter).collect()), clock: DefaultClock::default() }
    }

    /// Counts a call. `RESOURCE_EXHAUSTED` (`QUOTA_CALLS`) with the time to wait when there are too many.
    pub fn check(&self, grants: &Grants) -> Result<(), Status> {
        let Some((rate, burst)) = rate_of(&grants.limits) else { return Ok(()) };
        let Some((_, limiter)) = self.limiters.iter().find(|(key, _)| *key == (rate, burst)) else { return Ok(()) };
        if limiter.len() > OWNERS_MAX {
            limiter.retain_recent();
        }
        limiter.check_key(&grants.owner).map_err(|until| refused(&grants.owner, rate, burst, until.wait_time_from(self.clock.now())))
    }
}

fn refused(owner: &str, rate: NonZeroU32, burst: NonZeroU32, wait: Duration) -> Status {
    let message = format!("{owner} makes more than {rate} calls a second ({burst} at once)");
    let mut details = ErrorDetails::new();
    details.set_error_info("QUOTA_CALLS", ERROR_DOMAIN, std::collections::HashMap::<String, String>::new());
    details.add_quota_failure_violation(owner, &message);
    details.set_retry_info(Some(wait));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    #[test]
    fn calls_beyond_the_burst_wait_and_owners_do_not_share() {
        let limits = CallerLimits { calls_per_second: NonZeroU32::new(1), burst: NonZeroU32::new(3), ..CallerLimits::default() };
        let rates = Rates::new(&[Access { limits, ..Access::new(Role::Read) }]);
        let grants = |owner: &str, limits| Grants {
            owner: owner.into(),
            everywhere: None,
            pools: Default::default(),
            platforms: None,
            image_hosts: None,
            limits,
        };
        for _ in 0..3 {
            rates.check(&grants("one", limits)).expect("within the burst");
        }
        let status = rates.check(&grants("one", limits)).expect_err("the fourth");
        assert_eq!(status.code(), Code::ResourceExhausted);
        let details = status.get_error_details();
        let wait = details.retry_info().and_then(|info| info.retry_delay).expect("a time to wait");
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(details.quota_failure().expect("whose quota").violations[0].subject, "one");
        rates.check(&grants("other", limits)).expect("a bucket of its own");
        for _ in 0..100 {
            rates.check(&grants("one", CallerLimits::default())).expect("no limit");
        }
    }
}
