//! The crash campaign: the real daemon is killed (SIGKILL) at every step of its journal and at moments drawn at random, over all targets; after each kill the
//! next daemon has to have put everything right before it serves, and the same request has to give the right answer. Needs root, qemu-img, e2fsck, debugfs and
//! loop devices.
//!
//! `CLOUDLETD_CRASH_SEED` repeats a campaign; `CLOUDLETD_CRASH_KILLS` (default 200) or `CLOUDLETD_CRASH_MINUTES` make it longer (scripts/soak.sh).

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod judge;
mod rig;
mod rounds;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use cloudletd::failpoint::STEPS;
use rig::{Rig, Stop};
use rounds::{Kind, Outcome};

/// Kills of a run, at least.
const KILLS: u32 = 200;

/// A small generator (xorshift64*): what was drawn can be drawn again from the seed.
pub struct Random(u64);

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// What a campaign counts.
#[derive(Default)]
struct Figures {
    kills: u32,
    by_kind: BTreeMap<&'static str, u32>,
    by_step: BTreeMap<String, u32>,
    completed: u32,
    taken_back: u32,
    recoveries: Vec<Duration>,
}

impl Figures {
    fn add(&mut self, kind: Kind, stop: &Stop, outcome: Outcome) {
        self.kills += outcome.kills;
        *self.by_kind.entry(kind.name()).or_default() += outcome.kills;
        if outcome.reached {
            *self.by_step.entry(stop.step().to_owned()).or_default() += 1;
        }
        if let Some(step) = outcome.recovery_step {
            *self.by_step.entry(step.to_owned()).or_default() += 1;
        }
        if outcome.had_effect {
            self.completed += 1
        } else {
            self.taken_back += 1
        }
        self.recoveries.extend(outcome.recoveries);
    }

    fn print(&mut self, whose: &str, seed: u64, elapsed: Duration) {
        self.recoveries.sort();
        let at = |part: usize| {
            self.recoveries.get((self.recoveries.len() * part / 100).min(self.recoveries.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        println!("{whose}, seed {seed}: {} kills in {:.0} s", self.kills, elapsed.as_secs_f64());
        println!(
            "  operations that had taken effect when the daemon died, or were completed by the next: {}; taken back: {}",
            self.completed, self.taken_back
        );
        println!(
            "  from start to serving, with recovery: median {} ms, p99 {} ms, most {} ms",
            at(50).as_millis(),
            at(99).as_millis(),
            at(100).as_millis()
        );
        println!("  kills by operation: {:?}", self.by_kind);
        println!("  kills by step: {:?}", self.by_step);
    }
}

#[test]
fn two_hundred_kills_leave_volumes_complete_or_absent_and_every_retry_gives_the_right_answer() {
    campaign("a daemon that is root", Rig::new(), number("CLOUDLETD_CRASH_KILLS").map_or(KILLS, |kills| kills as u32));
}

#[test]
fn so_do_kills_at_every_step_of_a_daemon_without_privileges() {
    campaign("a daemon without privileges", Rig::kept(), 0);
}

/// Every step of every operation once, and then whatever comes, until there were so many kills and as much time as was asked for.
fn campaign(whose: &str, mut rig: Rig, kills: u32) {
    let lasts = Duration::from_secs(60 * number("CLOUDLETD_CRASH_MINUTES").unwrap_or(0));
    let seed = number("CLOUDLETD_CRASH_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        now.as_nanos() as u64 | 1
    });
    println!("{whose}: CLOUDLETD_CRASH_SEED={seed}");
    let (mut random, begun, mut figures) = (Random(seed), Instant::now(), Figures::default());
    rig.learn();
    let mut plan = Vec::new();
    for kind in Kind::ALL {
        plan.extend(kind.steps().iter().map(|(step, times)| (kind, Stop::At { step, times: *times })));
    }
    let systematic = plan.len();
    let mut round = 0usize;
    while round < systematic || figures.kills < kills || begun.elapsed() < lasts {
        let (kind, stop) = match plan.get(round) {
            Some((kind, stop)) => (*kind, stop.clone()),
            None => {
                let kind = Kind::ALL[random.below(Kind::ALL.len() as u64) as usize];
                (kind, Stop::After(Duration::from_micros(random.below(kind.lasts_us()))))
            }
        };
        // Every third start after a kill is killed itself.
        let recovery = (round.is_multiple_of(3)).then(|| ["recover-swept", "recover-settled", "recover-failed"][random.below(3) as usize]);
        let outcome = rounds::run(&mut rig, round, kind, &stop, recovery);
        if let Stop::At { step, times } = &stop {
            assert!(outcome.reached, "{} never came to {step} for the {times}. time (seed {seed})", kind.name());
        }
        figures.add(kind, &stop, outcome);
        round += 1;
    }
    figures.print(whose, seed, begun.elapsed());
    let reached: BTreeSet<&str> = figures.by_step.keys().map(String::as_str).collect();
    let missed: Vec<&&str> = STEPS.iter().filter(|step| !reached.contains(**step)).collect();
    assert!(missed.is_empty(), "no kill at these steps: {missed:?}");
    assert!(figures.kills >= kills);
    rig.finish();
}
