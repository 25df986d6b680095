//! Causal attention with grouped key and value heads (arXiv 2305.13245):
//! o = P v, P = softmax(a q kᵀ) over the positions up to the token's own, or those of them within a
//! window; a is 1 / √d in most models.
//!
//! With G = ∂L/∂o: ∂L/∂v = Pᵀ G; ∂L/∂P = G vᵀ; ∂L/∂S = P · (∂L/∂P − rowsum(P · ∂L/∂P));
//! ∂L/∂q = a ∂L/∂S k; ∂L/∂k = a ∂L/∂Sᵀ q. A soft cap c multiplies ∂L/∂S by 1 − tanh²(S / c).
//!
//! A sink adds e^s to the denominator of the softmax, as would a key without a value (arXiv
//! 2309.17453); the gradients above stay the same.
//!
//! The probabilities are computed a tile of rows at a time, and again in the backward pass: no
//! matrix of sequence × sequence is ever held.

use std::{ops::Range, sync::Arc};

use dfdx::tensor::{Cpu, CpuError, Tape};
use rayon::prelude::*;

use super::{
    Buffer, Computed, Hold, Matrix,
    cpu::{self, exp},
    gemm::{View, gemm},
    tape::record,
};
use crate::{
    buffer::{recycle, stale, zeros},
    simd::simd,
};

#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod last;

/// The heads of an attention layer and the sequences that it sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Number of query heads.
    pub queries: usize,
    /// Number of key and value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    /// Number of channels of a query or a key.
    pub width: usize,
    /// Number of channels of a value.
    pub values: usize,
    /// Number of tokens of a sequence; a token sees those before it in its own sequence.
    pub sequence_length: usize,
    /// Factor of the scores, such as 1 / √width.
    pub scale: f32,
    /// Maximum number of tokens that a token sees, itself included (arXiv 2004.05150).
    pub window: Option<usize>,
    /// Soft cap c: scores s become c · tanh(s / c) (arXiv 2408.00118).
    pub cap: Option<f32>,
}

/// The rows that a row sees: those of its root, and those of its branch up to itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionMask {
    /// The root, before the branch.
    pub root: Range<usize>,
    /// The branch's first row.
    pub branch: usize,
}

impl AttentionMask {
    /// The row's position in its sequence, which begins with the root.
    pub fn position(&self, row: usize) -> usize {
        self.root.len() + row - self.branch
    }

    /// The rows of root and branch that `row` sees, with a window.
    pub(super) fn seen(&self, row: usize, window: Option<usize>) -> [Range<usize>; 2] {
        let first = window.map_or(0, |window| (self.position(row) + 1).saturating_sub(window));
        let forgotten = first.saturating_sub(self.root.len());
        [
            self.root.start + first.min(self.root.len())..self.root.end,
            self.branch + forgotten..row + 1,
        ]
    }
}

/// o = softmax(a q kᵀ) v.
pub trait Attention: Hold {
    /// Heads and masks as the device's kernels take them.
    type Plan: 'static;

    /// The plan for the matrices on the device of `q`.
    fn plan(
        q: &Matrix<Self>,
        heads: Heads,
        masks: Option<&Arc<Vec<AttentionMask>>>,
        sinks: Option<&Arc<Vec<f32>>>,
    ) -> Result<Self::Plan, Self::Err>;

    /// o, for q, k and v.
    fn attention_forward(inputs: [&Matrix<Self>; 3], plan: &Self::Plan) -> Computed<Self>;

    /// ∂L/∂q, ∂L/∂k and ∂L/∂v, for ∂L/∂o in `g`.
    fn attention_backward(
        inputs: [&Matrix<Self>; 3],
        plan: &Self::Plan,
        g: Self::Numbers,
    ) -> Result<[Self::Numbers; 3], Self::Err>;

    /// The heads' outputs, [tokens, queries · values], for `q` of [tokens, queries · width], `k` of
    /// [tokens, keys · width] and `v` of [tokens, keys · values]. `masks` has the rows that each row
    /// of a sequence sees; without
    /// masks, a row sees all rows before it. `sinks` has a score of each query head. `known` outputs
    /// are not computed again.
    fn attention<T: Tape<f32, Self>>(
        q: Matrix<Self, T>,
        k: Matrix<Self, T>,
        v: Matrix<Self, T>,
        heads: Heads,
        masks: Option<&Arc<Vec<AttentionMask>>>,
        sinks: Option<&Arc<Vec<f32>>>,
        known: Option<Matrix<Self>>,
    ) -> Result<Matrix<Self, T>, Self::Err> {
        let (q, q_tape) = q.split_tape();
        let (k, k_tape) = k.split_tape();
        let (v, v_tape) = v.split_tape();
        let plan = Self::plan(&q, heads, masks, sinks)?;
        let o = match known {
            Some(o) => o,
            None => {
                let shape = (q.shape().0, heads.o_width());
                q.beside(Self::attention_forward([&q, &k, &v], &plan)?, shape)?
            }
        };
        let inputs = [q.name(), k.name(), v.name()];
        Ok(record(q_tape.merge(k_tape).merge(v_tape), inputs, o, move |g| {
            Self::attention_backward([&q, &k, &v], &plan, g)
        }))
    }
}

/// Heads and their sinks, and the rows that each row of a sequence sees.
#[derive(Debug)]
pub struct Plan {
    heads: Heads,
    masks: Option<Arc<Vec<AttentionMask>>>,
    sinks: Option<Arc<Vec<f32>>>,
}

/// One head's view of q, k and v for one sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    masks: Option<&'a [AttentionMask]>,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    heads: Heads,
    sink: Option<f32>,
}

impl<'a> Head<'a> {
    fn new([q, k, v]: [&'a [f32]; 3], plan: &'a Plan, index: usize) -> Self {
        let heads = plan.heads;
        let (sequence, head) = (index / heads.queries, index % heads.queries);
        let (first, key) = (sequence * heads.sequence_length, head / heads.per_key());
        let q = &q[first * heads.q_width() + head * heads.width..];
        let k = &k[first * heads.k_width() + key * heads.width..];
        let v = &v[first * heads.v_width() + key * heads.values..];
        let masks = plan.masks.as_ref().map(|masks| &masks[..]);
        let sink = plan.sinks.as_ref().map(|sinks| sinks[head]);
        Self { masks, q, k, v, heads, sink }
    }

    fn q(self, rows: Range<usize>) -> View<'a> {
        let stride = self.heads.q_width();
        View::strided(&self.q[rows.start * stride..], rows.len(), self.heads.width, stride)
    }

    fn k(self, keys: Range<usize>) -> View<'a> {
        let stride = self.heads.k_width();
        View::strided(&self.k[keys.start * stride..], keys.len(), self.heads.width, stride)
    }

    fn v(self, keys: Range<usize>) -> View<'a> {
        let stride = self.heads.v_width();
        View::strided(&self.v[keys.start * stride..], keys.len(), self.heads.values, stride)
    }

    /// The rows of its root and of its branch that `row` sees.
    fn seen(self, row: usize) -> [Range<usize>; 2] {
        match self.masks {
            Some(masks) => masks[row].seen(row, self.heads.window),
            None => AttentionMask::default().seen(row, self.heads.window),
        }
    }

    /// The keys from the first to the last that any of `rows` sees.
    fn keys(self, rows: Range<usize>) -> Range<usize> {
        let first = |row| self.seen(row).into_iter().filter(|seen| !seen.is_empty());
        let first = rows.clone().flat_map(first).map(|seen| seen.start).min();
        first.unwrap_or(0)..rows.end
    }

    /// The probabilities of a tile of rows over its `keys`, [rows, keys]. Where scores are capped,
    /// `slopes` gets the derivatives of the capped ones.
    fn probabilities(
        self,
        rows: Range<usize>,
        keys: Range<usize>,
        p: &mut [f32],
        slopes: Option<&mut [f32]>,
    ) {
        let (q, k) = (self.q(rows.clone()), self.k(keys.clone()));
        gemm(p, keys.len(), 0.0, self.heads.scale, q, k.t());
        if let Some(cap) = self.heads.cap {
            p.iter_mut().for_each(|s| *s = (*s / cap).tanh());
            if let Some(slopes) = slopes {
                slopes.iter_mut().zip(&*p).for_each(|(slope, t)| *slope = 1.0 - t * t);
            }
            p.iter_mut().for_each(|t| *t *= cap);
        }
        for (row, p) in rows.zip(p.chunks_exact_mut(keys.len())) {
            // An empty root may lie before the first key.
            let seen = self.seen(row).map(|seen| {
                seen.start.saturating_sub(keys.start)..seen.end.saturating_sub(keys.start)
            });
            let seen = if seen[0].is_empty() { [0..0, seen[1].clone()] } else { seen };
            simd!(softmax(p, &seen, self.sink));
            let [root, branch] = seen;
            p[..root.start].fill(0.0);
            p[root.end..branch.start].fill(0.0);
            p[branch.end..].fill(0.0);
        }
    }
}

/// Makes probabilities of the scores in two ranges, together with that of a sink.
#[inline(always)]
fn softmax(p: &mut [f32], ranges: &[Range<usize>; 2], sink: Option<f32>) {
    let largest = |range: &Range<usize>| {
        let (chunks, rest) = p[range.clone()].as_chunks::<{ cpu::LANES }>();
        let mut lanes = [f32::NEG_INFINITY; cpu::LANES];
        for chunk in chunks {
            for (lane, p) in lanes.iter_mut().zip(chunk) {
                *lane = lane.max(*p);
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    };
    let max = largest(&ranges[0]).max(largest(&ranges[1]));
    let max = sink.map_or(max, |sink| max.max(sink));
    let mut total = sink.map_or(0.0, |sink| exp(sink - max));
    for range in ranges {
        let p = &mut p[range.clone()];
        p.iter_mut().for_each(|p| *p = exp(*p - max));
        total += cpu::sum(p, p, |p, _| p);
    }
    let scale = 1.0 / total;
    for range in ranges {
        p[range.clone()].iter_mut().for_each(|p| *p *= scale);
    }
}

impl Heads {
    fn q_width(self) -> usize {
        self.queries * self.width
    }

    fn k_width(self) -> usize {
        self.keys * self.width
    }

    fn v_width(self) -> usize {
        self.keys * self.values
    }

    fn o_width(self) -> usize {
        self.queries * self.values
    }

    /// Some rows of the output of the head of this index, among those of all sequences.
    fn output(self, o: &[f32], index: usize, rows: Range<usize>) -> View<'_> {
        let (sequence, head) = (index / self.queries, index % self.queries);
        let first = (sequence * self.sequence_length + rows.start) * self.o_width();
        let o = &o[first + head * self.values..];
        View::strided(o, rows.len(), self.values, self.o_width())
    }

    /// Number of heads of all sequences in this number of tokens.
    fn count(self, tokens: usize) -> usize {
        tokens / self.sequence_length * self.queries
    }

    /// Number of query heads that share a key head.
    fn per_key(self) -> usize {
        self.queries / self.keys
    }

    /// Number of query rows whose probabilities are held at a time. Long sequences have larger
    /// tiles, as keys and values are read again for each tile; but a tile computes scores that no
    /// row sees.
    fn tile(self) -> usize {
        (self.sequence_length / 8).clamp(64, 256).min(self.sequence_length)
    }

    fn tiles(self) -> impl Iterator<Item = Range<usize>> {
        let (length, tile) = (self.sequence_length, self.tile());
        (0..length).step_by(tile).map(move |start| start..length.min(start + tile))
    }

    /// Joins the matrices [sequence_length, `width`] of all heads side by side; `each` consecutive
    /// heads are summed.
    fn join(self, heads: &[&[f32]], width: usize, row_heads: usize, each: usize) -> Vec<f32> {
        let (row, length) = (row_heads * width, self.sequence_length);
        let sequences = heads.len() / (row_heads * each);
        let mut all = stale(sequences * length * row);
        all.par_chunks_mut(row).with_min_len(16).enumerate().for_each(|(i, out)| {
            let (sequence, token) = (i / length, i % length);
            let places = out.chunks_exact_mut(width).enumerate();
            for (place, out) in places {
                let first = (sequence * row_heads + place) * each;
                let of = |head: usize| &heads[head][token * width..(token + 1) * width];
                out.copy_from_slice(of(first));
                for head in first + 1..first + each {
                    out.iter_mut().zip(of(head)).for_each(|(out, x)| *out += x);
                }
            }
        });
        all
    }
}

impl Attention for Cpu {
    type Plan = Plan;

    fn plan(
        _: &Matrix<Self>,
        heads: Heads,
        masks: Option<&Arc<Vec<AttentionMask>>>,
        sinks: Option<&Arc<Vec<f32>>>,
    ) -> Result<Plan, CpuError> {
        Ok(Plan { heads, masks: masks.cloned(), sinks: sinks.cloned() })
    }

    fn attention_forward([q, k, v]: [&Matrix<Self>; 3], plan: &Plan) -> Result<Buffer, CpuError> {
        let heads = plan.heads;
        let head = |index| Head::new([&q.values, &k.values, &v.values], plan, index);
        let all = (0..heads.count(q.shape().0)).into_par_iter();
        let outputs: Vec<Buffer> = all.map(|index| head(index).forward()).collect();
        let outputs: Vec<&[f32]> = outputs.iter().map(|output| &**output).collect();
        Ok(heads.join(&outputs, heads.values, heads.queries, 1).into())
    }

    fn attention_backward(
        [q, k, v]: [&Matrix<Self>; 3],
        plan: &Plan,
        g: Buffer,
    ) -> Result<[Buffer; 3], CpuError> {
        let heads = plan.heads;
        let head = |index| Head::new([&q.values, &k.values, &v.values], plan, index);
        let all = (0..heads.count(q.shape().0)).into_par_iter();
        let found: Vec<[Buffer; 3]> =
            all.map(|index| head(index).backward(|rows| heads.output(&g, index, rows))).collect();
        let [gq, gk, gv] = [0, 1, 2]
            .map(|i| -> Vec<&[f32]> { found.iter().map(|gradients| &*gradients[i]).collect() });
        let of_keys =
            |gradients: &[_], width| heads.join(gradients, width, heads.keys, heads.per_key());
        let gq = heads.join(&gq, heads.width, heads.queries, 1);
        Ok([gq, of_keys(&gk, heads.width), of_keys(&gv, heads.values)].map(Buffer::from))
    }
}

/// Number of scores that a head computes for a sequence of `length` tokens with a window. Tiles are
/// computed as a whole, including scores of tokens that do not see each other.
pub(crate) fn scores(length: usize, window: Option<usize>) -> usize {
    let heads = Heads {
        queries: 1,
        keys: 1,
        width: 1,
        values: 1,
        sequence_length: length,
        scale: 1.0,
        window,
        cap: None,
    };
    let head = Head { masks: None, q: &[], k: &[], v: &[], heads, sink: None };
    heads.tiles().map(|rows| rows.len() * head.keys(rows).len()).sum()
}

impl Head<'_> {
    /// This head's output.
    fn forward(self) -> Buffer {
        let Heads { values, sequence_length: length, .. } = self.heads;
        let mut p = stale(self.heads.tile() * length);
        let mut o = stale(length * values);
        for rows in self.heads.tiles() {
            let (n, keys) = (rows.len(), self.keys(rows.clone()));
            let p = &mut p[..n * keys.len()];
            self.probabilities(rows.clone(), keys.clone(), p, None);
            let p = View::new(p, n, keys.len());
            gemm(&mut o[rows.start * values..], values, 0.0, 1.0, p, self.v(keys));
        }
        recycle(p);
        Buffer::from(o)
    }

    /// The gradients of this head's q, k and v; `g` gives some rows of the gradient of its output.
    fn backward<'a>(self, g: impl Fn(Range<usize>) -> View<'a>) -> [Buffer; 3] {
        let Heads { width, values, sequence_length: length, .. } = self.heads;
        let mut gq = stale(length * width);
        let [mut gk, mut gv] = [width, values].map(|width| zeros(length * width));
        let tile = self.heads.tile() * length;
        let (mut p, mut gp) = (stale(tile), stale(tile));
        let mut slopes = stale(if self.heads.cap.is_some() { tile } else { 0 });
        for rows in self.heads.tiles() {
            let (n, keys) = (rows.len(), self.keys(rows.clone()));
            let seen = keys.len();
            let kept = slopes.get_mut(..n * seen);
            self.probabilities(rows.clone(), keys.clone(), &mut p[..n * seen], kept);
            let (go, at) = (g(rows.clone()), keys.start * values);
            gemm(&mut gv[at..], values, 1.0, 1.0, View::new(&p, n, seen).t(), go);
            gemm(&mut gp, seen, 0.0, 1.0, go, self.v(keys.clone()).t());
            for (p, gp) in p.chunks_exact(seen).zip(gp.chunks_exact_mut(seen)).take(n) {
                simd!({
                    let sum = cpu::sum(p, gp, |p, g| p * g);
                    gp.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - sum));
                });
            }
            gp.iter_mut().zip(&slopes).for_each(|(g, slope)| *g *= slope);
            let (gs, scale) = (View::new(&gp, n, seen), self.heads.scale);
            let (row, start) = (rows.start * width, keys.start * width);
            gemm(&mut gq[row..], width, 0.0, scale, gs, self.k(keys));
            gemm(&mut gk[start..], width, 1.0, scale, gs.t(), self.q(rows));
        }
        [p, gp, slopes].into_iter().for_each(recycle);
        [gq, gk, gv].map(Buffer::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ops::testing::{assert_agrees, check, matrix, noise, outcome};

    fn mask(root: Range<usize>, branch: usize) -> AttentionMask {
        AttentionMask { root, branch }
    }

    #[test]
    fn branches_are_as_if_alone() {
        // Two trees of different shapes; each branch after its root, as a sequence of its own.
        let rows = 2 * 64;
        let whole = Heads {
            queries: 2,
            keys: 1,
            width: 4,
            values: 4,
            sequence_length: rows,
            scale: 0.7,
            window: None,
            cap: None,
        };
        let [q, k, v] =
            [(1, 8), (2, 4), (3, 4)].map(|(seed, width)| (noise(rows * width, seed), width));
        let tensor = |(x, width): &(Vec<f32>, usize), picked: &[usize]| {
            let rows = picked.iter().flat_map(|row| &x[row * width..(row + 1) * width]);
            matrix(rows.copied().collect(), (picked.len(), *width))
        };
        let trees = [(0..5, vec![5..40, 40..41]), (41..110, vec![110..112, 112..rows])];
        let mut masks = vec![AttentionMask::default(); rows];
        for (root, branches) in &trees {
            root.clone().for_each(|row| masks[row] = mask(root.start..root.start, root.start));
            for branch in branches {
                branch.clone().for_each(|row| masks[row] = mask(root.clone(), branch.start));
            }
        }
        let masks = Arc::new(masks);
        let all: Vec<usize> = (0..rows).collect();
        for window in [None, Some(3), Some(50)] {
            let whole = Heads { window, ..whole };
            let [a, b, c] = [&q, &k, &v].map(|x| tensor(x, &all));
            let found = Cpu::attention(a, b, c, whole, Some(&masks), None, None).unwrap().to_vec();
            for (root, branches) in &trees {
                for branch in branches {
                    let picked: Vec<usize> = root.clone().chain(branch.clone()).collect();
                    let heads = Heads { sequence_length: picked.len(), ..whole };
                    let [a, b, c] = [&q, &k, &v].map(|x| tensor(x, &picked));
                    let alone = Cpu::attention(a, b, c, heads, None, None, None).unwrap().to_vec();
                    for (row, alone) in picked.iter().zip(alone.chunks(8)) {
                        for (found, alone) in found[row * 8..].iter().zip(alone) {
                            assert!((found - alone).abs() < 1e-5, "row {row}: {found} {alone}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        // Two sequences of three tokens, four query heads on two key heads.
        let plain = Heads {
            queries: 4,
            keys: 2,
            width: 3,
            values: 3,
            sequence_length: 3,
            scale: 0.6,
            window: None,
            cap: None,
        };
        // A root of one row, and two branches.
        let branched = Arc::new(vec![mask(0..0, 0), mask(0..1, 1), mask(0..1, 2)]);
        let capped = Heads { window: Some(2), cap: Some(0.5), ..plain };
        let sunk = Arc::new(vec![0.3, -1.0, 0.0, 2.0]);
        for (heads, sinks) in [
            (plain, None),
            (capped, Some(&sunk)),
            (Heads { queries: 2, ..plain }, Some(&sunk)),
            (Heads { values: 2, ..capped }, None),
        ] {
            let shapes = [(6, 3 * heads.queries), (6, 6), (6, 2 * heads.values)];
            for masks in [None, Some(&branched)] {
                check!(|device: D| shapes, |[q, k, v]| D::attention(
                    q, k, v, heads, masks, sinks, None
                ));
            }
        }
    }

    #[test]
    fn outputs_are_means_by_probability() {
        // The second row's scores are 0 and ln 3: it sees a quarter of the first value, and three
        // of the second; both query heads have the same keys.
        let heads = Heads {
            queries: 2,
            keys: 1,
            width: 1,
            values: 1,
            sequence_length: 2,
            scale: 0.5,
            window: None,
            cap: None,
        };
        let q = matrix(vec![1.0, 1.0, 2.0, 0.0], (2, 2));
        let [k, v] = [vec![0.0, 3f32.ln()], vec![4.0, 8.0]].map(|values| matrix(values, (2, 1)));
        let of = |sinks: Option<&Arc<Vec<f32>>>| {
            let [q, k, v] = [&q, &k, &v].map(Clone::clone);
            Cpu::attention(q, k, v, heads, None, sinks, None).unwrap().to_vec()
        };
        let close = |found: Vec<f32>, expected: [f32; 4]| {
            for (x, expected) in found.iter().zip(expected) {
                assert!((x - expected).abs() < 1e-5, "{found:?}");
            }
        };
        close(of(None), [4.0, 4.0, 7.0, 6.0]);
        // A sink with score 0 takes half of the first row, and a fifth or a third of the second.
        close(of(Some(&Arc::new(vec![0.0; 2]))), [2.0, 2.0, 28.0 / 5.0, 4.0]);
    }

    #[test]
    fn tiles_join_without_a_seam() {
        // With all scores equal each token's output is the mean of v so far, or of the window.
        let length = 2 * 64 + 5;
        let one = Heads {
            queries: 1,
            keys: 1,
            width: 1,
            values: 1,
            sequence_length: length,
            scale: 1.0,
            window: None,
            cap: None,
        };
        let zeros = matrix(vec![0.0; length], (length, 1));
        let v = matrix((0..length).map(|i| i as f32).collect(), (length, 1));
        for window in [None, Some(64 + 3)] {
            let heads = Heads { window, ..one };
            let o =
                Cpu::attention(zeros.clone(), zeros.clone(), v.clone(), heads, None, None, None)
                    .unwrap();
            for (i, o) in o.to_vec().iter().enumerate() {
                let first = window.map_or(0, |window| (i + 1).saturating_sub(window));
                let mean = (first + i) as f32 / 2.0;
                assert!((o - mean).abs() < 1e-3, "position {i}: {o}");
            }
        }
        // More rows than a tile has, on a CPU; more keys than a block of threads, on a GPU.
        let long = Heads { queries: 4, keys: 2, width: 3, values: 2, sequence_length: 300, ..one };
        let long = Heads { scale: 0.6, window: Some(270), ..long };
        let sinks = Arc::new(noise(4, 5));
        assert_agrees!(|device: D| {
            let shapes = [(300, 12), (300, 6), (300, 4)];
            outcome(device, shapes, |[q, k, v]| {
                D::attention(q, k, v, long, None, Some(&sinks), None)
            })
            .0
        });
    }
}
