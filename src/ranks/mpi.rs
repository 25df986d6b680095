//! Ranks that `mpirun`, or another launcher of MPI programs, has started.

use std::{fmt, iter::once};

use mpi::{
    Count,
    datatype::{Partition, PartitionMut},
    environment::{Threading, Universe, initialize_with_threading, processor_name},
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use super::{Link, Ranks};

/// All processes of the launcher's job.
struct World {
    world: SimpleCommunicator,
    /// MPI, until it is dropped.
    _universe: Universe,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

/// The ranks of the launcher's job; `None` if this process has started MPI before.
pub(super) fn world() -> Option<Ranks> {
    // Only the main thread calls MPI.
    let (universe, _) = initialize_with_threading(Threading::Funneled)?;
    Some(Ranks::linked(World { world: universe.world(), _universe: universe }))
}

impl World {
    /// Counts as MPI has them, and the start of each part.
    fn parts(&self, counts: &[usize]) -> (Vec<Count>, Vec<Count>) {
        let ends = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end)
        });
        let starts: Vec<usize> = once(0).chain(ends).take(counts.len()).collect();
        let of = |numbers: &[usize]| -> Option<Vec<Count>> {
            numbers.iter().map(|number| Count::try_from(*number).ok()).collect()
        };
        of(counts).zip(of(&starts)).unwrap_or_else(|| {
            eprintln!(
                "a matrix is too large to be sent: MPI counts at most {} numbers",
                Count::MAX
            );
            self.world.abort(1)
        })
    }
}

impl Link for World {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn host(&self) -> String {
        processor_name().unwrap_or_default()
    }

    fn exchange(&self, numbers: &[f32], outgoing: &[usize], incoming: &[usize]) -> Vec<f32> {
        let mut found = vec![0.0; incoming.iter().sum()];
        let ((counts, starts), (of_each, places)) = (self.parts(outgoing), self.parts(incoming));
        let from = Partition::new(numbers, counts, starts);
        let mut to = PartitionMut::new(&mut found[..], of_each, places);
        self.world.all_to_all_varcount_into(&from, &mut to);
        found
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        // The address of no bytes may be one that means something else to MPI.
        let own = [own, &[0]].concat();
        let mut lengths = vec![0_u64; self.size()];
        self.world.all_gather_into(&(own.len() as u64), &mut lengths[..]);
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length as usize).collect();
        let mut all = vec![0; lengths.iter().sum()];
        let (counts, starts) = self.parts(&lengths);
        let mut to = PartitionMut::new(&mut all[..], counts, starts);
        self.world.all_gather_varcount_into(&own[..], &mut to);
        let mut rest = &all[..];
        let part = |length: usize| {
            let (own, others) = rest.split_at(length);
            rest = others;
            own[..length - 1].to_vec()
        };
        lengths.into_iter().map(part).collect()
    }

    fn abort(&self, status: i32) -> ! {
        self.world.abort(status)
    }
}
