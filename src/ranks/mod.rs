//! The ranks of a run: processes that share its calibration samples, on one machine or several.
//!
//! Every rank runs the same steps on the same recipe and model. A pass takes only the rank's own
//! samples; what it sums is exchanged, so that all ranks have the same sums, and decide the same.
//! The samples are in chunks that do not depend on the number of ranks, and a sum adds the chunks in
//! their order: any number of ranks gives the same bytes, and so does one process.

mod chunks;
mod matrices;
#[cfg(feature = "mpi")]
mod mpi;
mod split;
mod sums;
#[cfg(test)]
pub(crate) mod threads;

use std::{cell::Cell, fmt, rc::Rc};

use serde::{Serialize, de::DeserializeOwned};

pub use self::split::{Sent, Split};
pub(crate) use self::{
    chunks::{Chunks, Turn},
    matrices::owners,
    sums::{Sums, add, share},
};

/// What carries data between ranks. All ranks call the same functions in the same order; if one
/// cannot go on, the carrier ends them all.
pub trait Link: fmt::Debug {
    /// Index of this rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Name of the machine that this rank runs on.
    fn host(&self) -> String;

    /// Sends the first `outgoing[0]` of `numbers` to rank 0, the next `outgoing[1]` to rank 1, and so
    /// on. Returns the `incoming` counts of numbers from each rank, in the ranks' order.
    fn exchange(&self, numbers: &[f32], outgoing: &[usize], incoming: &[usize]) -> Vec<f32>;

    /// The bytes of every rank, in the ranks' order.
    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>>;

    /// Ends all ranks with an exit status.
    fn abort(&self, status: i32) -> !;
}

/// The ranks of a run, seen from one of them.
#[derive(Clone, Debug)]
pub struct Ranks {
    linked: Option<Rc<Linked>>,
    /// Those on the machine, where these are not linked.
    neighbours: Neighbours,
}

/// The ranks on a machine, seen from one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// Index of this rank among them.
    pub own: usize,
    /// Their number.
    pub count: usize,
}

impl Default for Ranks {
    fn default() -> Self {
        Self::ONE
    }
}

#[derive(Debug)]
struct Linked {
    link: Box<dyn Link>,
    /// Bytes sent to other ranks so far.
    sent: Cell<u64>,
}

/// Rank of the process that writes, saves and reports.
const FIRST: usize = 0;

/// Why the ranks of a job cannot be found.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0} processes were started together, but this barber was built without MPI; build it with \
     `cargo build --release --features mpi`, or start one process"
)]
pub struct NoMpi(usize);

/// Variables that a process has from a launcher of MPI programs.
#[cfg(feature = "mpi")]
const LAUNCHED: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "PMI_RANK"];
/// Those with the number of processes.
#[cfg(not(feature = "mpi"))]
const COUNTS: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

impl Ranks {
    /// One process alone.
    pub const ONE: Self = Self { linked: None, neighbours: Neighbours { own: 0, count: 1 } };

    /// The ranks of the job that a launcher of MPI programs started this process in; one, if none
    /// did.
    ///
    /// # Errors
    /// If there are several, and this program was built without MPI.
    pub fn of_job() -> Result<Self, NoMpi> {
        #[cfg(feature = "mpi")]
        {
            let is_launched = LAUNCHED.iter().any(|name| std::env::var_os(name).is_some());
            Ok(is_launched.then(mpi::world).flatten().unwrap_or_default())
        }
        #[cfg(not(feature = "mpi"))]
        {
            let count = |name| std::env::var(name).ok()?.parse().ok();
            match COUNTS.into_iter().find_map(count) {
                Some(count) if count > 1 => Err(NoMpi(count)),
                _ => Ok(Self::ONE),
            }
        }
    }

    /// The ranks that a link connects.
    pub fn linked(link: impl Link + 'static) -> Self {
        let linked = Linked { link: Box::new(link), sent: Cell::new(0) };
        let linked = (linked.link.size() > 1).then(|| Rc::new(linked));
        Self { linked, ..Self::ONE }
    }

    /// This rank for a run of its own: no other has a part of it, but those on the same machine share
    /// its memory.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self { linked: None, neighbours: self.neighbours() }
    }

    /// Index of this rank.
    pub fn rank(&self) -> usize {
        self.linked.as_ref().map_or(FIRST, |of| of.link.rank())
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.linked.as_ref().map_or(1, |of| of.link.size())
    }

    /// Whether this rank writes, saves and reports.
    pub fn is_first(&self) -> bool {
        self.rank() == FIRST
    }

    /// Bytes that this rank has sent to others so far.
    pub fn sent(&self) -> u64 {
        self.linked.as_ref().map_or(0, |of| of.sent.get())
    }

    /// The ranks on this rank's machine.
    pub fn neighbours(&self) -> Neighbours {
        let Some(of) = &self.linked else { return self.neighbours };
        let host = of.link.host().into_bytes();
        let hosts = self.gather(&host);
        let among = |hosts: &[Vec<u8>]| hosts.iter().filter(|other| **other == host).count();
        Neighbours { own: among(&hosts[..self.rank()]), count: among(&hosts) }
    }

    /// Ends all ranks, this process included, with an exit status.
    pub fn abort(&self, status: i32) -> ! {
        match &self.linked {
            Some(of) => of.link.abort(status),
            None => std::process::exit(status),
        }
    }

    /// Waits until all ranks are here.
    pub(crate) fn wait(&self) {
        self.gather(&[]);
    }

    /// The bytes of every rank, in the ranks' order.
    pub(crate) fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let Some(of) = &self.linked else { return vec![own.to_vec()] };
        of.sent.update(|sent| sent + (own.len() * (of.link.size() - 1)) as u64);
        of.link.gather(own)
    }

    /// [`Link::exchange`].
    pub(crate) fn exchange(
        &self,
        numbers: &[f32],
        outgoing: &[usize],
        incoming: &[usize],
    ) -> Vec<f32> {
        let Some(of) = &self.linked else { return numbers.to_vec() };
        let others = numbers.len() - outgoing[of.link.rank()];
        of.sent.update(|sent| sent + (others * size_of::<f32>()) as u64);
        of.link.exchange(numbers, outgoing, incoming)
    }

    /// The values of every rank, in the ranks' order.
    pub(crate) fn gather_values<T: Serialize + DeserializeOwned>(&self, own: T) -> Vec<T> {
        if self.linked.is_none() {
            return vec![own];
        }
        // JSON has all that is gathered, and reads it again: names, texts, and numbers whose types take
        // one that is not finite. `alike` has checked that the ranks are the same program.
        let own = serde_json::to_vec(&own).unwrap_or_else(|e| unreachable!("{e}"));
        let value = |of: &Vec<u8>| {
            serde_json::from_slice(of).unwrap_or_else(|e| unreachable!("another rank's value: {e}"))
        };
        self.gather(&own).iter().map(value).collect()
    }

    /// What a rank has; the others' values are dropped.
    pub(crate) fn of_rank<T: Serialize + DeserializeOwned>(&self, rank: usize, own: T) -> T {
        if self.linked.is_none() {
            return own;
        }
        let own = (self.rank() == rank).then_some(own);
        let mut all = self.gather_values(own).into_iter().flatten();
        all.next().unwrap_or_else(|| unreachable!("the rank has sent its value"))
    }

    /// What the first rank has; the others' values are dropped.
    pub(crate) fn of_first<T: Serialize + DeserializeOwned>(&self, own: T) -> T {
        self.of_rank(FIRST, own)
    }

    /// The numbers that this rank has of some items, and those that others have of theirs, ordered by
    /// the items' indices.
    pub(crate) fn collect(&self, own: Vec<(usize, Vec<f64>)>) -> Vec<(usize, Vec<f64>)> {
        if self.linked.is_none() {
            return own;
        }
        let mut bytes = Vec::new();
        for (index, numbers) in &own {
            for head in [*index, numbers.len()] {
                bytes.extend((head as u64).to_le_bytes());
            }
            numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
        let mut all = Vec::new();
        for bytes in self.gather(&bytes) {
            let mut words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            while let (Some(index), Some(count)) = (words.next(), words.next()) {
                let numbers = words.by_ref().take(count as usize).map(f64::from_bits).collect();
                all.push((index as usize, numbers));
            }
        }
        all.sort_by_key(|(index, _)| *index);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_apart_is_alone_on_a_shared_machine() {
        for of in threads::run(3, |ranks| {
            let apart = ranks.apart();
            assert_eq!((apart.rank(), apart.size(), apart.is_first()), (0, 1, true));
            assert_eq!(apart.gather(b"own"), [b"own"]);
            let neighbours = Neighbours { own: ranks.rank(), count: 3 };
            assert_eq!([ranks.neighbours(), apart.neighbours()], [neighbours; 2]);
            (apart.apart().neighbours() == neighbours, apart.sent())
        }) {
            assert_eq!(of, (true, 0));
        }
        assert_eq!(Ranks::ONE.apart().neighbours(), Neighbours { own: 0, count: 1 });
    }
}
