//! Ranks that are threads of one process, for tests.

use std::{
    fmt,
    sync::{Arc, Barrier, Mutex},
    thread,
};

use super::{Link, Ranks};

/// The place where threads leave what they send.
struct Board {
    barrier: Barrier,
    numbers: Mutex<Vec<Vec<Vec<f32>>>>,
    bytes: Mutex<Vec<Vec<u8>>>,
}

struct Thread {
    rank: usize,
    size: usize,
    board: Arc<Board>,
}

impl fmt::Debug for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} of {}", self.rank, self.size)
    }
}

impl Link for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn host(&self) -> String {
        "here".into()
    }

    fn exchange(&self, numbers: &[f32], outgoing: &[usize], incoming: &[usize]) -> Vec<f32> {
        let mut rest = numbers;
        let sent = outgoing.iter().map(|count| {
            let (own, others) = rest.split_at(*count);
            rest = others;
            own.to_vec()
        });
        self.board.numbers.lock().unwrap()[self.rank] = sent.collect();
        self.board.barrier.wait();
        let found: Vec<Vec<f32>> =
            self.board.numbers.lock().unwrap().iter().map(|of| of[self.rank].clone()).collect();
        self.board.barrier.wait();
        assert!(found.iter().map(Vec::len).eq(incoming.iter().copied()));
        found.concat()
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        self.board.bytes.lock().unwrap()[self.rank] = own.to_vec();
        self.board.barrier.wait();
        let found = self.board.bytes.lock().unwrap().clone();
        self.board.barrier.wait();
        found
    }

    fn abort(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}

/// The results of a function on each of some ranks.
pub(crate) fn run<T: Send>(size: usize, of: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let (numbers, bytes) = (Mutex::new(vec![Vec::new(); size]), Mutex::new(vec![Vec::new(); size]));
    let board = Arc::new(Board { barrier: Barrier::new(size), numbers, bytes });
    thread::scope(|scope| {
        let start = |rank| {
            let (board, of) = (board.clone(), &of);
            scope.spawn(move || of(Ranks::linked(Thread { rank, size, board })))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
