//! Measures time and memory of a run's phases.

use std::{
    collections::BTreeMap,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Time and memory of each phase so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Phases {
    /// Seconds of each phase.
    pub(crate) seconds: BTreeMap<String, f64>,
    /// Peak memory of the process in each phase, in bytes, without pages of the mapped checkpoint
    /// and without a GPU's memory. Empty if the system does not tell.
    pub(crate) memory: BTreeMap<String, u64>,
}

impl Phases {
    /// Runs a phase, or continues it, and adds its time and memory.
    pub(crate) fn run<T, E>(
        &mut self,
        phase: &str,
        run: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let started = Instant::now();
        let (result, peak) = watched(run);
        let result = result?;
        *self.seconds.entry(phase.into()).or_default() += started.elapsed().as_secs_f64();
        if let Some(peak) = peak {
            let highest = self.memory.entry(phase.into()).or_default();
            *highest = peak.max(*highest);
        }
        Ok(result)
    }
}

/// Calls a function; returns its result and the peak memory meanwhile, in bytes.
fn watched<T>(run: impl FnOnce() -> T) -> (T, Option<u64>) {
    /// Time between two looks at the memory.
    const PAUSE: Duration = Duration::from_millis(20);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak = own_memory();
            while peak.is_some() && !done.load(Ordering::Relaxed) {
                thread::park_timeout(PAUSE);
                peak = peak.max(own_memory());
            }
            peak
        });
        let result = run();
        done.store(true, Ordering::Relaxed);
        watch.thread().unpark();
        (result, watch.join().ok().flatten())
    })
}

/// Memory of the process without pages of files, in bytes; `None` if not on Linux.
fn own_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn phases_add_up_and_remember_their_peak() {
        let mut phases = Phases::default();
        let mut take = |bytes: usize| {
            phases.run("one", || {
                let held = black_box(vec![1_u8; bytes]);
                thread::sleep(Duration::from_millis(60));
                Ok::<_, ()>(held.len())
            })
        };
        assert_eq!((take(64 << 20), take(1)), (Ok(64 << 20), Ok(1)));
        assert!(phases.seconds["one"] > 0.12);
        if own_memory().is_some() {
            assert!(phases.memory["one"] >= 64 << 20);
        }
        assert_eq!(phases.run("two", || Err::<(), _>("failed")), Err("failed"));
        assert!(!phases.seconds.contains_key("two"));
    }
}
