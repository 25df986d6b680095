//! Finds quantised matrices among the tensors of a checkpoint.

use std::collections::BTreeSet;

use barber_metric::Dims;
use safetensors::tensor::TensorInfo;

use super::{Place, Reader, Shard, Span};
use crate::checkpoint::{
    Error, layout,
    quantised::{Codes, Matrix, Names, Quantisation, Scale, block},
};

/// The name of the tensor with the rows and columns of a matrix of packed codes.
const WEIGHT_SHAPE: &str = "weight_shape";
/// Number of codes of eight bits in an integer of 32 bits.
const CODES_OF_WORD: usize = 4;
/// The name of the tensor with the groups of columns that are quantised in another order.
const ORDER: &str = "weight_g_idx";
impl Reader {
    /// Replaces the tensors of each quantised matrix by the matrix.
    pub(super) fn find_quantised(&mut self, of: &Quantisation) -> Result<(), Error> {
        let Names { packed, scales, zero_points, others } = of.names;
        let suffix = |name: &str| layout::tensor("", name);
        let packed = packed.map(suffix);
        let mut found = Vec::new();
        for (name, place) in &self.tensors {
            let Place::Stored(shard) = *place else { continue };
            let Some(info) = self.shards[shard].header.info(name) else { continue };
            if info.shape.len() > 2 && Codes::of(info.dtype).is_some() {
                let problem = "it has the matrices of several experts, and Barber reads quantised \
                               matrices one by one; give the model that it was quantised from";
                return Err(Error::quantised(&self.shards[shard].path, name, problem));
            }
            let module = packed.as_deref().and_then(|suffix| name.strip_suffix(suffix));
            let codes = match (module, layout::module(name)) {
                (Some(module), _) => Some((module, Codes::Offset)),
                (None, Some(module)) => Codes::of(info.dtype).map(|codes| (module, codes)),
                (None, None) => None,
            };
            if let Some((module, codes)) = codes {
                let matrix = layout::matrix(module);
                if *name != matrix && self.tensors.contains_key(&matrix) {
                    let problem = format!("there is `{name}`, too");
                    return Err(Error::quantised(&self.dir, &matrix, problem));
                }
                found.push((matrix, self.quantised(of, module, (shard, info), codes)?));
            }
        }
        let quantised: BTreeSet<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        let scales = suffix(scales);
        let modules = self.tensors.keys().filter_map(|name| name.strip_suffix(&scales));
        let alone = modules.map(layout::matrix).find(|name| !quantised.contains(&**name));
        if let Some(name) = alone {
            let problem = match self.tensors.get(&name) {
                None => format!("there are scales of it, `…{scales}`, but no weights"),
                Some(_) => {
                    format!(
                        "there are scales of it, `…{scales}`, but its values are not in E4M3 or int8"
                    )
                }
            };
            return Err(Error::quantised(&self.dir, &name, problem));
        }
        let parts = others.iter().chain(zero_points).map(|name| suffix(name));
        let parts: Vec<_> = parts.chain([scales]).chain(packed).collect();
        self.tensors.retain(|name, _| !parts.iter().any(|part| name.ends_with(part)));
        self.tensors.extend(found);
        Ok(())
    }

    /// The place and form of a quantised matrix, whose codes are in this tensor.
    fn quantised(
        &self,
        of: &Quantisation,
        module: &str,
        (shard, info): (usize, &TensorInfo),
        codes: Codes,
    ) -> Result<Place, Error> {
        let Shard { path, .. } = &self.shards[shard];
        let wrong = |problem: String| Error::quantised(path, &layout::matrix(module), problem);
        let find = |name: &str| {
            let name = layout::tensor(module, name);
            let Some(Place::Stored(shard)) = self.tensors.get(&name) else { return None };
            self.shards[*shard].header.info(&name).map(|info| (*shard, info))
        };
        let part = |name: &str| {
            let missing = || wrong(format!("there is no `{}`", layout::tensor(module, name)));
            find(name).ok_or_else(missing)
        };
        let &[rows, width] = &info.shape[..] else {
            return Err(wrong(format!("its codes have the shape {:?}", info.shape)));
        };
        let (shape, row) = match codes {
            Codes::E4m3 | Codes::Int8 => ([rows, width], width),
            Codes::Offset => {
                let (in_shard, of_shape) = part(WEIGHT_SHAPE)?;
                let bytes = self.shards[in_shard].bytes(of_shape.data_offsets);
                let fits = |[r, columns]: &[usize; 2]| {
                    *r == rows && columns.div_ceil(CODES_OF_WORD) == width
                };
                let shape = layout::shape(of_shape.dtype, bytes).filter(fits);
                let shape = shape.filter(|_| info.dtype == safetensors::Dtype::I32);
                let shape = shape.ok_or_else(|| {
                    let (dtype, found) = (info.dtype, &info.shape);
                    let name = layout::tensor(module, WEIGHT_SHAPE);
                    wrong(format!(
                        "its codes are {dtype:?} of shape {found:?}, which does not fit `{name}`"
                    ))
                })?;
                (shape, CODES_OF_WORD * width)
            }
        };
        let (in_shard, scales) = part(of.names.scales)?;
        let name = layout::tensor(module, of.names.scales);
        let scale = Scale::of(scales.dtype).ok_or_else(|| {
            let dtype = scales.dtype;
            wrong(format!("`{name}` is stored as {dtype:?}, which Barber does not read"))
        })?;
        let block = block(shape, &scales.shape, of.block).ok_or_else(|| {
            let blocks =
                of.block.map(|[height, width]| format!(" in blocks of {height} × {width}"));
            wrong(format!(
                "`{name}` has shape {:?}, which does not fit a matrix of shape {shape:?}{}",
                scales.shape,
                blocks.unwrap_or_default()
            ))
        })?;
        if let Some((in_shard, zeros)) = of.names.zero_points.and_then(find)
            && self.shards[in_shard].bytes(zeros.data_offsets).iter().any(|byte| *byte != 0)
        {
            return Err(wrong("its zero points are not zero: Barber reads symmetric codes".into()));
        }
        if find(ORDER).is_some() {
            let problem = "its groups are not consecutive (`weight_g_idx`); give the model that it \
                           was quantised from";
            return Err(wrong(problem.into()));
        }
        let parts = [Some(info), Some(scales), find(WEIGHT_SHAPE).map(|(_, of)| of)];
        let parts = parts.into_iter().flatten();
        let stored = parts.map(|info| info.data_offsets.1 - info.data_offsets.0).sum();
        let dims = Dims { rows: shape[0], columns: shape[1] };
        let matrix = Matrix { dims, codes, row, scale, block, dtype: of.dtype };
        let codes = Span(shard, info.data_offsets);
        Ok(Place::Quantised {
            matrix,
            shape,
            codes,
            scales: Span(in_shard, scales.data_offsets),
            stored,
        })
    }
}
