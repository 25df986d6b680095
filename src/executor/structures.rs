//! Statistics of whole structures: what a layer changes of the hidden states, and what experts
//! contribute to them.

use std::{collections::BTreeMap, iter::zip};

use barber_metric::Needs;
use dfdx::tensor::NoneTape;

use super::{
    Error, Executor, PartWeights, Stream,
    forward::{Hook, Hooks},
    ops::{Matrix, Ops, Route},
    pass::forward_parts,
};

/// Statistics of a layer and of its experts, over the calibration tokens; `None` if not requested.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StructureStatistics {
    /// One minus the mean cosine between the hidden states before and after the layer (ShortGPT,
    /// arXiv 2403.03853, section 2.2).
    pub influence: Option<f32>,
    /// For each expert of the layer, the mean over the tokens that it sees of its weight times the norm
    /// of its output (REAP, arXiv 2510.13999, section 4). 0 without such tokens.
    pub contribution: Option<Vec<f32>>,
}

impl<D: Ops> Executor<D> {
    /// The statistics of a layer's structures, by a forward pass through all of its parts.
    ///
    /// # Errors
    /// If the device runs out of memory, or the scratch space fails.
    pub fn structure_statistics(
        &self,
        parts: &[PartWeights<D>],
        stream: &Stream<D>,
        needs: Needs,
    ) -> Result<StructureStatistics, Error> {
        let routers = parts.iter().filter_map(|part| part.router.as_ref());
        let experts = routers.map(|router| router.of.projection.dims.rows).sum();
        let mut found = Vec::new();
        for run in stream.calibration_runs().filter(|run| stream.chunks.has(*run)) {
            let mut contributions =
                Contributions { sums: vec![[0.0; 2]; experts], ..Contributions::default() };
            let mut similarity = [0.0; 2];
            let batch = self.batch(stream, run)?;
            let mut hooks = Hooks::default();
            if needs.contribution {
                hooks.hooks.push(&mut contributions);
            }
            let after = forward_parts(parts, &batch, NoneTape, &mut hooks, true);
            drop(hooks);
            let Some(after) = after.map_err(Error::device)? else { continue };
            batch.check_states(parts, &after)?;
            if needs.influence {
                let width = after.shape().1;
                let on_host = |states: &Matrix<D>| states.on_host().map_err(Error::device);
                let (before, after) = (on_host(&batch.states)?, on_host(&after)?);
                for (before, after) in zip(before.chunks(width), after.chunks(width)) {
                    similarity[0] += cosine(before, after);
                    similarity[1] += 1.0;
                }
            }
            found.push((run, [&[similarity], &contributions.sums[..]].concat().concat()));
        }
        // Sums and numbers of tokens: first of the layer, then of each expert.
        let mut sums = vec![[0.0; 2]; 1 + experts];
        for (_, of_run) in self.ranks.collect(found) {
            let all = sums.as_flattened_mut().iter_mut().zip(of_run);
            all.for_each(|(sum, of_run)| *sum += of_run);
        }
        let mean = |[sum, tokens]: [f64; 2]| sum / tokens.max(1.0);
        let influence = needs.influence.then(|| (1.0 - mean(sums[0])) as f32);
        let contribution =
            needs.contribution.then(|| sums[1..].iter().map(|of| mean(*of) as f32).collect());
        Ok(StructureStatistics { influence, contribution })
    }
}

/// The cosine of the angle between two vectors; 0 if one of them is zero.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        zip(a, b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// Adds up what experts contribute.
#[derive(Default)]
struct Contributions {
    /// The norms of the outputs of experts in this run, one for each token.
    norms: BTreeMap<usize, Vec<f64>>,
    /// For each expert, the sum of its tokens' contributions, and their number.
    sums: Vec<[f64; 2]>,
}

impl<D: Ops> Hook<D> for Contributions {
    fn expert(&mut self, expert: usize, y: &Matrix<D>) -> Result<(), D::Err> {
        let norm = |row: &[f32]| row.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
        let norms = y.on_host()?.chunks(y.shape().1).map(norm).collect();
        self.norms.insert(expert, norms);
        Ok(())
    }

    fn routes(&mut self, routes: &[Route]) {
        for Route { expert, weights, .. } in routes {
            let [sum, tokens] = &mut self.sums[*expert];
            let norms = self.norms.remove(expert).unwrap_or_default();
            *sum +=
                zip(norms, weights).map(|(norm, weight)| norm * f64::from(*weight)).sum::<f64>();
            *tokens += weights.len() as f64;
        }
    }
}
