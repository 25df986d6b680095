//! Attention of a sequence's last token, whose keys and values before it are kept on the host.

use super::{Heads, softmax};
use crate::{
    buffer::{recycle, stale},
    executor::ops::gemm::{View, gemm},
    simd::simd,
};

impl Heads {
    /// The heads' outputs for the last token, [queries · values], for its `q`, [queries · width], and
    /// `keys`, [tokens, keys · width], and `values`, [tokens, keys · values], of all tokens up to it.
    pub(in crate::executor) fn of_last(
        self,
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        sinks: Option<&[f32]>,
    ) -> Vec<f32> {
        let tokens = keys.len() / self.k_width();
        let first = self.window.map_or(0, |window| tokens.saturating_sub(window));
        let (seen, each) = (tokens - first, self.per_key());
        let (mut p, mut o) = (stale(each * seen), stale(self.o_width()));
        for head in 0..self.keys {
            let queries = head * each..(head + 1) * each;
            let q = View::new(&q[queries.start * self.width..], each, self.width);
            let k = &keys[first * self.k_width() + head * self.width..];
            let k = View::strided(k, seen, self.width, self.k_width());
            gemm(&mut p, seen, 0.0, self.scale, q, k.t());
            if let Some(cap) = self.cap {
                p.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            for (query, p) in queries.clone().zip(p.chunks_exact_mut(seen)) {
                simd!(softmax(p, &[0..0, 0..seen], sinks.map(|sinks| sinks[query])));
            }
            let v = &values[first * self.v_width() + head * self.values..];
            let v = View::strided(v, seen, self.values, self.v_width());
            let o = &mut o[queries.start * self.values..];
            gemm(o, self.values, 0.0, 1.0, View::new(&p, each, seen), v);
        }
        recycle(p);
        o
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::executor::ops::{
        Attention,
        testing::{matrix, noise},
    };

    #[test]
    fn the_last_token_sees_what_it_sees_in_its_sequence() {
        let tokens = 7;
        let plain = Heads {
            queries: 4,
            keys: 2,
            width: 3,
            values: 5,
            sequence_length: tokens,
            scale: 0.6,
            window: None,
            cap: None,
        };
        let widths = [plain.q_width(), plain.k_width(), plain.v_width()];
        let [q, k, v] = [0, 1, 2].map(|i| noise(tokens * widths[i], i as u64 + 1));
        let sinks = Arc::new(vec![0.3, -1.0, 0.0, 2.0]);
        for heads in [plain, Heads { window: Some(3), cap: Some(0.5), ..plain }] {
            for sinks in [None, Some(&sinks)] {
                let [a, b, c] = [(&q, 0), (&k, 1), (&v, 2)]
                    .map(|(x, i)| matrix(x.clone(), (tokens, widths[i])));
                let all = Cpu::attention(a, b, c, heads, None, sinks, None).unwrap().to_vec();
                let last = &q[(tokens - 1) * widths[0]..];
                let found = heads.of_last(last, &k, &v, sinks.map(|sinks| &sinks[..]));
                for (found, all) in found.iter().zip(&all[(tokens - 1) * heads.o_width()..]) {
                    assert!((found - all).abs() < 1e-5, "{found} {all}");
                }
            }
        }
    }
}
