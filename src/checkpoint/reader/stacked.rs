//! Finds the matrices of experts that are stored stacked, in one tensor.

use safetensors::tensor::TensorInfo;

use super::{Place, Reader};
use crate::{
    checkpoint::{Dtype, Error},
    limits::EXPERTS,
};

/// The ending of the name of a stacked tensor, and the end of its matrices' names.
type Stacked = (&'static str, &'static str);
/// The tensors that have one matrix of each expert, that of the hidden states first: as transformers
/// 5 has them in memory, and as Granite stores them.
const STACKED: &[[Stacked; 2]] = &[
    [(".experts.gate_up_proj", "gate_up_proj.weight"), (".experts.down_proj", "down_proj.weight")],
    [
        (".input_linear.weight", "input_linear.weight"),
        (".output_linear.weight", "output_linear.weight"),
    ],
];
/// The tensors that have one bias of each expert.
const STACKED_BIASES: &[Stacked] = &[
    (".experts.gate_up_proj_bias", "gate_up_proj.bias"),
    (".experts.down_proj_bias", "down_proj.bias"),
];
impl Reader {
    /// Replaces each tensor that has one matrix or one bias of each expert, such as
    /// `….experts.down_proj`, by these, `….experts.0.down_proj.weight` and so on.
    pub(super) fn find_stacked(&mut self) -> Result<(), Error> {
        let all = STACKED.iter().flatten().chain(STACKED_BIASES);
        let (mut found, mut left) = (Vec::new(), all.clone().count() * EXPERTS);
        for (name, place) in &self.tensors {
            let Place::Stored(shard) = *place else { continue };
            let parts = all.clone().find_map(|(stack, of)| Some((name.strip_suffix(stack)?, of)));
            let (Some((part, of)), Some(info)) = (parts, self.shards[shard].header.info(name))
            else {
                continue;
            };
            let dimensions = if of.ends_with(".bias") { 2 } else { 3 };
            if info.shape.len() == dimensions
                && let Some(count) = info.shape.first().copied()
            {
                // A few bytes of a header name any number of empty matrices.
                left = left.checked_sub(count).ok_or_else(|| {
                    let path = self.shards[shard].path.clone();
                    let problem = format!("more than {EXPERTS} experts, with `{name}`");
                    Error::Header { path, problem }
                })?;
                let names = (0..count).map(|i| format!("{part}.experts.{i}.{of}"));
                let turned = self.turned(part, info);
                found.push((name.clone(), shard, turned, names.collect::<Vec<_>>()));
            }
        }
        for (stack, shard, turned, names) in found {
            self.tensors.remove(&stack);
            for (index, name) in names.into_iter().enumerate() {
                let place = Place::Stacked { stack: stack.clone(), shard, index, turned };
                if self.tensors.insert(name.clone(), place).is_some() {
                    let path = self.shards[shard].path.clone();
                    let problem = format!("it has `{name}` and, with it, `{stack}`");
                    return Err(Error::Header { path, problem });
                }
            }
        }
        Ok(())
    }

    /// The shape of a matrix in the stacked tensor `info` of the module `part`, if it is stored
    /// transposed. The shapes of both tensors of a part say so: the gate and up projections have
    /// twice as many outputs as the down projection has inputs.
    fn turned(&self, part: &str, info: &TensorInfo) -> Option<[usize; 2]> {
        let shape = |(ending, _): Stacked| {
            let name = format!("{part}{ending}");
            let Some(Place::Stored(shard)) = self.tensors.get(&name) else { return None };
            let [_, rows, columns] = self.shards[*shard].header.info(&name)?.shape[..] else {
                return None;
            };
            Some([rows, columns])
        };
        let is_turned = STACKED.iter().any(|[gate_up, down]| {
            let (Some([a, b]), Some([c, d])) = (shape(*gate_up), shape(*down)) else {
                return false;
            };
            Some(b) == c.checked_mul(2) && a == d
        });
        match info.shape[..] {
            [_, columns, rows] if is_turned && Dtype::of(info.dtype).is_some() => {
                Some([rows, columns])
            }
            _ => None,
        }
    }
}
