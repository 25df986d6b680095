//! Attention on a GPU: scores of all heads at once, for as many rows as fit beside the samples.

use std::{ops::Range, sync::Arc};

use cudarc::driver::DeviceSlice;
use dfdx::tensor::Cuda;

use crate::executor::ops::{
    Attention, AttentionMask, Heads, Matrix,
    gpu::{Factor, Gpu, Grid, Numbers, Place, Result, Slice, kernels},
};

kernels! {
    /// Scores become probabilities over what each row sees: two ranges of keys, as four numbers;
    /// the others get 0. Where scores are capped, `slopes` gets the derivatives of the capped ones.
    /// `sunk` heads have sinks. A block has a row of a head's scores, [heads, rows, keys].
    fn probabilities(
        keys: usize, seen: &Slice<u32>, cap: f32, sunk: i32, sinks: &Slice, scores: &mut Slice,
        slopes: &mut Slice
    ) "
    index_t row = blockIdx.y * (index_t)gridDim.x + blockIdx.x;
    float *p = scores + row * keys;
    seen += 4 * blockIdx.x;
    float largest = LOWEST, sum = 0.0f;
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) {
        if (cap > 0.0f) {
            float t = tanhf(p[i] / cap);
            p[i] = t * cap;
            slopes[row * keys + i] = 1.0f - t * t;
        }
        bool sees = (i >= seen[0] && i < seen[1]) || (i >= seen[2] && i < seen[3]);
        if (sees) largest = fmaxf(largest, p[i]);
    }
    largest = block_max(largest);
    if (sunk) largest = fmaxf(largest, sinks[blockIdx.y]);
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) {
        bool sees = (i >= seen[0] && i < seen[1]) || (i >= seen[2] && i < seen[3]);
        p[i] = sees ? expf(p[i] - largest) : 0.0f;
        sum += p[i];
    }
    sum = block_sum(sum);
    if (sunk) sum += expf(sinks[blockIdx.y] - largest);
    float scale = 1.0f / sum;
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) p[i] *= scale;
"

    /// The gradient of the probabilities becomes that of the scores.
    fn probabilities_backward(keys: usize, capped: i32, p: &Slice, slopes: &Slice, g: &mut Slice) "
    index_t row = blockIdx.y * (index_t)gridDim.x + blockIdx.x;
    p += row * keys;
    g += row * keys;
    float sum = 0.0f;
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) sum += p[i] * g[i];
    sum = block_sum(sum);
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x)
        g[i] = p[i] * (g[i] - sum) * (capped ? slopes[row * keys + i] : 1.0f);
"
}

/// Scores that are held at a time.
const SCORES: usize = 1 << 25;

/// The heads, their sinks, and the tiles of each sequence.
#[derive(Debug)]
pub struct Plan {
    heads: Heads,
    /// Empty without sinks.
    sinks: Slice,
    tiles: Vec<Tile>,
}

/// Rows of a sequence whose scores are held together, and what they see.
#[derive(Debug)]
struct Tile {
    heads: Heads,
    rows: Range<usize>,
    keys: Range<usize>,
    /// Two ranges of `keys` per row.
    seen: Slice<u32>,
}

/// The layout of the matrices of a tile's heads in memory.
#[derive(Clone, Copy)]
enum Layout {
    /// [rows, width], the heads side by side, among all tokens.
    Queries,
    /// [rows, values], likewise.
    Outputs,
    /// [keys, width], likewise.
    Keys,
    /// [keys, values], likewise.
    Values,
    /// [rows, keys], one head after the other.
    Scores,
}

/// A factor of each head's product: its numbers, how they are laid out, and whether they are
/// transposed.
type Operand<'a> = (&'a Slice, Layout, bool);

impl Tile {
    /// The tiles of each sequence.
    fn all(gpu: &Gpu, heads: Heads, masks: Option<&[AttentionMask]>) -> Result<Vec<Self>> {
        let length = heads.sequence_length;
        let rows = (SCORES / (heads.queries * length)).clamp(1, length);
        let of = |start: usize| {
            let rows = start..length.min(start + rows);
            let seen = |row: usize| {
                let mask = masks.map_or_else(AttentionMask::default, |masks| masks[row].clone());
                mask.seen(row, heads.window)
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
    fn shape(&self, layout: Layout) -> (usize, usize) {
        match layout {
            Layout::Queries => (self.rows.len(), self.heads.width),
            Layout::Outputs => (self.rows.len(), self.heads.values),
            Layout::Keys => (self.keys.len(), self.heads.width),
            Layout::Values => (self.keys.len(), self.heads.values),
            Layout::Scores => (self.rows.len(), self.keys.len()),
        }
    }

    /// The place of the matrices of each key head's query head number `member`, in the sequence
    /// whose first token is `first`.
    fn place(&self, layout: Layout, first: usize, member: usize) -> Place {
        let Heads { queries, keys, .. } = self.heads;
        let (_, width) = self.shape(layout);
        match layout {
            Layout::Queries | Layout::Outputs => {
                let rows = Place::rows(queries * width, first + self.rows.start);
                Place { start: rows.start + member * width, next: queries / keys * width, ..rows }
            }
            Layout::Keys | Layout::Values => {
                Place { next: width, ..Place::rows(keys * width, first + self.keys.start) }
            }
            Layout::Scores => {
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
        (c, layout): (&mut Slice, Layout),
    ) -> Result<()> {
        let (rows, columns) = self.shape(layout);
        let (_, a_layout, turned) = a;
        let (a_rows, a_columns) = self.shape(a_layout);
        let depth = if turned { a_rows } else { a_columns };
        // Heads that share a key head take turns, as their gradients add up.
        (0..self.heads.queries / self.heads.keys).try_for_each(|member| {
            let [a, b] = [a, b].map(|(numbers, layout, turned)| {
                let factor = Factor::new(numbers, self.place(layout, first, member));
                if turned { factor.transposed() } else { factor }
            });
            let at = self.place(layout, first, member);
            let shape = (rows, columns, depth);
            gpu.product(shape, (scale, keep), a, b, (&mut *c, at), self.heads.keys)
        })
    }

    /// The probabilities, [heads, rows, keys], and the derivatives of capped scores.
    fn probabilities(
        &self,
        gpu: &Arc<Gpu>,
        first: usize,
        sinks: &Slice,
        [q, k]: [&Slice; 2],
    ) -> Result<[Numbers; 2]> {
        let mut p = gpu.stale(self.count())?;
        let factors = ((q, Layout::Queries, false), (k, Layout::Keys, true));
        self.product(gpu, first, (self.heads.scale, 0.0), factors, (&mut p, Layout::Scores))?;
        let cap = self.heads.cap.unwrap_or(0.0);
        let mut slopes = gpu.stale(if cap > 0.0 { self.count() } else { 0 })?;
        let (keys, sunk) = (self.keys.len(), i32::from(sinks.len() > 0));
        let (grid, seen) = (self.grid(), &self.seen);
        probabilities(gpu, grid, keys, seen, cap, sunk, sinks, &mut p, &mut slopes)?;
        Ok([p, slopes])
    }

    /// A block for each row of each head.
    fn grid(&self) -> Grid {
        Grid::rows(self.rows.len(), self.heads.queries)
    }
}

impl Attention for Cuda {
    type Plan = Plan;

    fn plan(
        q: &Matrix<Self>,
        heads: Heads,
        masks: Option<&Arc<Vec<AttentionMask>>>,
        sinks: Option<&Arc<Vec<f32>>>,
    ) -> Result<Plan> {
        let (gpu, masks) = (q.gpu(), masks.map(|masks| &masks[..]));
        let sinks = gpu.upload(sinks.map_or(&[][..], |sinks| sinks))?;
        Ok(Plan { heads, sinks, tiles: Tile::all(gpu, heads, masks)? })
    }

    fn attention_forward([q, k, v]: [&Matrix<Self>; 3], plan: &Plan) -> Result<Numbers> {
        let gpu = q.gpu();
        let mut o = gpu.stale(q.shape().0 * plan.heads.o_width())?;
        for first in (0..q.shape().0).step_by(plan.heads.sequence_length) {
            for tile in &plan.tiles {
                let [p, _] = tile.probabilities(gpu, first, &plan.sinks, [&q.values, &k.values])?;
                let factors = ((&*p, Layout::Scores, false), (&**v.values, Layout::Values, false));
                tile.product(gpu, first, (1.0, 0.0), factors, (&mut o, Layout::Outputs))?;
            }
        }
        Ok(o)
    }

    fn attention_backward(
        [q, k, v]: [&Matrix<Self>; 3],
        plan: &Plan,
        g: Numbers,
    ) -> Result<[Numbers; 3]> {
        let (gpu, Heads { scale, cap, .. }) = (q.gpu(), plan.heads);
        let mut gq = gpu.stale(q.count())?;
        let (mut gk, mut gv) = (gpu.zeros(k.count())?, gpu.zeros(v.count())?);
        let [q_values, k_values, v_values] = [q, k, v].map(|x| &**x.values);
        for first in (0..q.shape().0).step_by(plan.heads.sequence_length) {
            for tile in &plan.tiles {
                let [p, slopes] =
                    tile.probabilities(gpu, first, &plan.sinks, [q_values, k_values])?;
                let factors = ((&*p, Layout::Scores, true), (&*g, Layout::Outputs, false));
                tile.product(gpu, first, (1.0, 1.0), factors, (&mut gv, Layout::Values))?;
                let mut gs = gpu.stale(tile.count())?;
                let factors = ((&*g, Layout::Outputs, false), (v_values, Layout::Values, true));
                tile.product(gpu, first, (1.0, 0.0), factors, (&mut gs, Layout::Scores))?;
                let (keys, capped) = (tile.keys.len(), i32::from(cap.is_some()));
                probabilities_backward(gpu, tile.grid(), keys, capped, &p, &slopes, &mut gs)?;
                let factors = ((&*gs, Layout::Scores, false), (k_values, Layout::Keys, false));
                tile.product(gpu, first, (scale, 0.0), factors, (&mut gq, Layout::Queries))?;
                let factors = ((&*gs, Layout::Scores, true), (q_values, Layout::Queries, false));
                tile.product(gpu, first, (scale, 1.0), factors, (&mut gk, Layout::Keys))?;
            }
        }
        Ok([gq, gk, gv])
    }
}
