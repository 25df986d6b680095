//! Attention on a GPU: scores of all heads at once, for as many rows as fit beside the samples.

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaSlice;
use dfdx::tensor::{Cuda, Tape};

use super::{
    super::{Attention, Heads, Sight},
    Factor, Gpu, Matrix, Place, Result, add_gradient, take,
};

/// Scores that are held at a time.
const SCORES: usize = 1 << 25;

/// Rows of one sequence whose scores are held together, and what they see.
struct Tile {
    heads: Heads,
    /// The sequence's first row.
    first: usize,
    rows: Range<usize>,
    keys: Range<usize>,
    /// Of each row two ranges of `keys`.
    seen: CudaSlice<u32>,
}

impl Tile {
    /// The tiles of a sequence whose first row is `first`.
    fn each(gpu: &Gpu, heads: Heads, sights: Option<&[Sight]>, first: usize) -> Result<Vec<Self>> {
        let length = heads.sequence_length;
        let rows = (SCORES / (heads.queries * length)).clamp(1, length);
        let of = |start: usize| {
            let rows = start..length.min(start + rows);
            let seen = |row: usize| {
                let sight = sights.map_or_else(Sight::default, |sights| sights[row].clone());
                sight.seen(row, heads.window)
            };
            let starts = rows.clone().flat_map(seen).filter(|seen| !seen.is_empty());
            let keys = starts.map(|seen| seen.start).min().unwrap_or(0)..rows.end;
            let number = |key: usize| key.saturating_sub(keys.start) as u32;
            let seen: Vec<u32> = rows
                .clone()
                .flat_map(seen)
                .flat_map(|seen| [number(seen.start), number(seen.end)])
                .collect();
            Ok(Self { heads, first, seen: gpu.upload(&seen)?, keys, rows })
        };
        (0..length).step_by(rows).map(of).collect()
    }

    /// The number of scores.
    fn count(&self) -> usize {
        self.heads.queries * self.rows.len() * self.keys.len()
    }

    /// The heads of queries that are first, second, … to share a key head.
    fn members(&self) -> Range<usize> {
        0..self.heads.queries / self.heads.keys
    }

    /// The rows of the query heads that are each key head's `member`.
    fn q(&self, member: usize) -> Place {
        let Heads { queries, keys, width, .. } = self.heads;
        let rows = Place::rows(queries * width, self.first + self.rows.start);
        Place { start: rows.start + member * width, next: queries / keys * width, ..rows }
    }

    /// The keys, or the values, of the key heads.
    fn k(&self) -> Place {
        let Heads { keys, width, .. } = self.heads;
        Place { next: width, ..Place::rows(keys * width, self.first + self.keys.start) }
    }

    /// The scores of the query heads that are each key head's `member`.
    fn scores(&self, member: usize) -> Place {
        let (head, stride) = (self.rows.len() * self.keys.len(), self.keys.len());
        Place { start: member * head, stride, next: self.members().len() * head }
    }

    /// `scale` a bᵀ of each head, for `a` that lies as queries do and `b` that lies as keys do.
    fn against(
        &self,
        gpu: &Gpu,
        a: &CudaSlice<f32>,
        b: &CudaSlice<f32>,
        scale: f32,
    ) -> Result<CudaSlice<f32>> {
        let mut scores = gpu.stale(self.count())?;
        for member in self.members() {
            gpu.product(
                (self.rows.len(), self.keys.len(), self.heads.width),
                (scale, 0.0),
                Factor::new(a, self.q(member)),
                Factor::new(b, self.k()).transposed(),
                (&mut scores, self.scores(member)),
                self.heads.keys,
            )?;
        }
        Ok(scores)
    }

    /// The probabilities, [heads, rows, keys], and the derivatives of capped scores.
    fn probabilities(
        &self,
        gpu: &Gpu,
        q: &CudaSlice<f32>,
        k: &CudaSlice<f32>,
    ) -> Result<[CudaSlice<f32>; 2]> {
        let mut p = self.against(gpu, q, k, self.heads.scale)?;
        let cap = self.heads.cap.unwrap_or(0.0);
        let mut slopes = gpu.stale(if cap > 0.0 { self.count() } else { 0 })?;
        let parameters = (self.keys.len(), &self.seen, cap, &mut p, &mut slopes);
        gpu.rows("probabilities", (self.rows.len(), self.heads.queries), parameters)?;
        Ok([p, slopes])
    }

    /// y = `scale` s b of each head, for scores `s` and `b` that lies as keys do; y lies as queries
    /// do.
    fn weigh(
        &self,
        gpu: &Gpu,
        s: &CudaSlice<f32>,
        b: &CudaSlice<f32>,
        scale: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<()> {
        self.members().try_for_each(|member| {
            gpu.product(
                (self.rows.len(), self.heads.width, self.keys.len()),
                (scale, 0.0),
                Factor::new(s, self.scores(member)),
                Factor::new(b, self.k()),
                (y, self.q(member)),
                self.heads.keys,
            )
        })
    }

    /// Adds `scale` sᵀ a of each head, for scores `s` and `a` that lies as queries do, to what lies
    /// as keys do.
    fn spread(
        &self,
        gpu: &Gpu,
        s: &CudaSlice<f32>,
        a: &CudaSlice<f32>,
        scale: f32,
        sum: &mut CudaSlice<f32>,
    ) -> Result<()> {
        self.members().try_for_each(|member| {
            gpu.product(
                (self.keys.len(), self.heads.width, self.rows.len()),
                (scale, 1.0),
                Factor::new(s, self.scores(member)).transposed(),
                Factor::new(a, self.q(member)),
                (sum, self.k()),
                self.heads.keys,
            )
        })
    }
}

impl Attention for Cuda {
    fn attention<T: Tape<f32, Self> + 'static>(
        q: Matrix<Self, T>,
        k: Matrix<Self, T>,
        v: Matrix<Self, T>,
        heads: Heads,
        sights: Option<&Arc<Vec<Sight>>>,
        known: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>> {
        let (q, q_tape) = q.split_tape();
        let (k, k_tape) = k.split_tape();
        let (v, v_tape) = v.split_tape();
        let mut tape = q_tape.merge(k_tape).merge(v_tape);
        let (gpu, sights) = (q.gpu().clone(), sights.cloned());
        let sequences = q.shape.0 / heads.sequence_length;
        let tiles = move |gpu: &Gpu, sequence: usize| {
            let sights = sights.as_ref().map(|sights| &sights[..]);
            Tile::each(gpu, heads, sights, sequence * heads.sequence_length)
        };
        let o = match known {
            Some(o) => o,
            None => {
                let mut o = gpu.stale(q.count())?;
                for sequence in 0..sequences {
                    for tile in tiles(&gpu, sequence)? {
                        let [p, _] = tile.probabilities(&gpu, q.numbers(), k.numbers())?;
                        tile.weigh(&gpu, &p, v.numbers(), 1.0, &mut o)?;
                    }
                }
                q.beside(o, q.shape)?
            }
        };

        let output = o.tensor.clone();
        tape.add_backward_op(move |gradients| {
            let g = take(gradients, &gpu, &output, q.count())?;
            let mut gq = gpu.stale(q.count())?;
            let (mut gk, mut gv) = (gpu.zeros(k.count())?, gpu.zeros(v.count())?);
            for sequence in 0..sequences {
                for tile in tiles(&gpu, sequence)? {
                    let [p, slopes] = tile.probabilities(&gpu, q.numbers(), k.numbers())?;
                    tile.spread(&gpu, &p, &g, 1.0, &mut gv)?;
                    let mut gs = tile.against(&gpu, &g, v.numbers(), 1.0)?;
                    let capped = i32::from(heads.cap.is_some());
                    let parameters = (tile.keys.len(), capped, &p, &slopes, &mut gs);
                    let blocks = (tile.rows.len(), heads.queries);
                    gpu.rows("probabilities_backward", blocks, parameters)?;
                    tile.weigh(&gpu, &gs, k.numbers(), heads.scale, &mut gq)?;
                    tile.spread(&gpu, &gs, q.numbers(), heads.scale, &mut gk)?;
                }
            }
            add_gradient(gradients, &gpu, &q.tensor, gq)?;
            add_gradient(gradients, &gpu, &k.tensor, gk)?;
            add_gradient(gradients, &gpu, &v.tensor, gv)
        });
        Ok(o.put_tape(tape))
    }
}
