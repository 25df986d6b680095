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

/// Rows of a sequence whose scores are held together, and what they see.
struct Tile {
    heads: Heads,
    rows: Range<usize>,
    keys: Range<usize>,
    /// Of each row two ranges of `keys`.
    seen: CudaSlice<u32>,
}

/// How the matrices of a tile's heads lie in some numbers.
#[derive(Clone, Copy)]
enum Lie {
    /// [rows, width], the heads side by side, among all tokens.
    Queries,
    /// [keys, width], likewise.
    Keys,
    /// [rows, keys], one head after the other.
    Scores,
}

/// A factor of each head's product: its numbers, how they lie, and whether they are transposed.
type Operand<'a> = (&'a CudaSlice<f32>, Lie, bool);

impl Tile {
    /// The tiles of each sequence.
    fn all(gpu: &Gpu, heads: Heads, sights: Option<&[Sight]>) -> Result<Vec<Self>> {
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
            Ok(Self { heads, seen: gpu.upload(&seen)?, keys, rows })
        };
        (0..length).step_by(rows).map(of).collect()
    }

    /// The number of scores.
    fn count(&self) -> usize {
        self.heads.queries * self.rows.len() * self.keys.len()
    }

    /// Rows and columns of a head's matrix.
    fn shape(&self, lie: Lie) -> (usize, usize) {
        match lie {
            Lie::Queries => (self.rows.len(), self.heads.width),
            Lie::Keys => (self.keys.len(), self.heads.width),
            Lie::Scores => (self.rows.len(), self.keys.len()),
        }
    }

    /// Where the matrices lie of those heads that are the `member` of each key head's, in the
    /// sequence whose first token is `first`.
    fn place(&self, lie: Lie, first: usize, member: usize) -> Place {
        let Heads { queries, keys, width, .. } = self.heads;
        match lie {
            Lie::Queries => {
                let rows = Place::rows(queries * width, first + self.rows.start);
                Place { start: rows.start + member * width, next: queries / keys * width, ..rows }
            }
            Lie::Keys => {
                Place { next: width, ..Place::rows(keys * width, first + self.keys.start) }
            }
            Lie::Scores => {
                let (head, stride) = (self.rows.len() * self.keys.len(), self.keys.len());
                Place { start: member * head, stride, next: queries / keys * head }
            }
        }
    }

    /// C = `scale` A B + `keep` C for each head.
    fn product(
        &self,
        gpu: &Gpu,
        first: usize,
        (scale, keep): (f32, f32),
        (a, b): (Operand<'_>, Operand<'_>),
        (c, lie): (&mut CudaSlice<f32>, Lie),
    ) -> Result<()> {
        let (rows, columns) = self.shape(lie);
        let (_, a_lie, turned) = a;
        let (a_rows, a_columns) = self.shape(a_lie);
        let depth = if turned { a_rows } else { a_columns };
        // Heads that share a key head take turns: some add to what is the key head's.
        (0..self.heads.queries / self.heads.keys).try_for_each(|member| {
            let [a, b] = [a, b].map(|(numbers, lie, turned)| {
                let factor = Factor::new(numbers, self.place(lie, first, member));
                if turned { factor.transposed() } else { factor }
            });
            let at = self.place(lie, first, member);
            let shape = (rows, columns, depth);
            gpu.product(shape, (scale, keep), a, b, (&mut *c, at), self.heads.keys)
        })
    }

    /// The probabilities, [heads, rows, keys], and the derivatives of capped scores.
    fn probabilities(
        &self,
        gpu: &Gpu,
        first: usize,
        q: &CudaSlice<f32>,
        k: &CudaSlice<f32>,
    ) -> Result<[CudaSlice<f32>; 2]> {
        let mut p = gpu.stale(self.count())?;
        let factors = ((q, Lie::Queries, false), (k, Lie::Keys, true));
        self.product(gpu, first, (self.heads.scale, 0.0), factors, (&mut p, Lie::Scores))?;
        let cap = self.heads.cap.unwrap_or(0.0);
        let mut slopes = gpu.stale(if cap > 0.0 { self.count() } else { 0 })?;
        let parameters = (self.keys.len(), &self.seen, cap, &mut p, &mut slopes);
        gpu.rows("probabilities", (self.rows.len(), self.heads.queries), parameters)?;
        Ok([p, slopes])
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
        let gpu = q.gpu().clone();
        let tiles = Tile::all(&gpu, heads, sights.map(|sights| &sights[..]))?;
        let tokens = q.shape.0;
        let o = match known {
            Some(o) => o,
            None => {
                let mut o = gpu.stale(q.count())?;
                for first in (0..tokens).step_by(heads.sequence_length) {
                    for tile in &tiles {
                        let [p, _] = tile.probabilities(&gpu, first, q.numbers(), k.numbers())?;
                        let factors = ((&p, Lie::Scores, false), (v.numbers(), Lie::Keys, false));
                        tile.product(&gpu, first, (1.0, 0.0), factors, (&mut o, Lie::Queries))?;
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
            for first in (0..tokens).step_by(heads.sequence_length) {
                for tile in &tiles {
                    let [p, slopes] = tile.probabilities(&gpu, first, q.numbers(), k.numbers())?;
                    let factors = ((&p, Lie::Scores, true), (&g, Lie::Queries, false));
                    tile.product(&gpu, first, (1.0, 1.0), factors, (&mut gv, Lie::Keys))?;
                    let mut gs = gpu.stale(tile.count())?;
                    let factors = ((&g, Lie::Queries, false), (v.numbers(), Lie::Keys, true));
                    tile.product(&gpu, first, (1.0, 0.0), factors, (&mut gs, Lie::Scores))?;
                    let capped = i32::from(heads.cap.is_some());
                    let parameters = (tile.keys.len(), capped, &p, &slopes, &mut gs);
                    let blocks = (tile.rows.len(), heads.queries);
                    gpu.rows("probabilities_backward", blocks, parameters)?;
                    let factors = ((&gs, Lie::Scores, false), (k.numbers(), Lie::Keys, false));
                    let scale = heads.scale;
                    tile.product(&gpu, first, (scale, 0.0), factors, (&mut gq, Lie::Queries))?;
                    let factors = ((&gs, Lie::Scores, true), (q.numbers(), Lie::Queries, false));
                    tile.product(&gpu, first, (scale, 1.0), factors, (&mut gk, Lie::Keys))?;
                }
            }
            add_gradient(gradients, &gpu, &q.tensor, gq)?;
            add_gradient(gradients, &gpu, &k.tensor, gk)?;
            add_gradient(gradients, &gpu, &v.tensor, gv)
        });
        Ok(o.put_tape(tape))
    }
}
