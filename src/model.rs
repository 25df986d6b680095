//! A checkpoint seen as a decoder: the weights of one part at a time, on a device.

use std::collections::BTreeMap;

use crate::{
    checkpoint::{self, Pruned, Reader},
    executor::{
        Hidden, PartWeights, Positions, Vector,
        ops::{Matrix, Ops, Weight},
    },
    family::{self, Decoder, Linear, Part},
};

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its checkpoint is wrong.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// Its configuration is.
    #[error(transparent)]
    Family(#[from] family::Error),
    /// The device failed.
    #[error("{what}: {problem}")]
    Device {
        /// While doing what.
        what: String,
        /// What it says.
        problem: String,
    },
}

impl Error {
    /// Says what the device was doing when it failed.
    pub fn device<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Self {
        move |problem| Self::Device { what: what.to_string(), problem: problem.to_string() }
    }
}

/// A checkpoint, its decoder and the device that runs it.
#[derive(Debug)]
pub struct Model<'a, D: Ops> {
    /// The checkpoint.
    pub reader: &'a Reader,
    /// What it is.
    pub decoder: Decoder,
    /// What runs it.
    pub device: D,
}

impl<'a, D: Ops> Model<'a, D> {
    /// The model of a checkpoint; every tensor that it needs is checked to be there.
    ///
    /// # Errors
    /// If its family is unknown, or a tensor is missing or has the wrong shape or format.
    pub fn new(reader: &'a Reader, device: D) -> Result<Self, Error> {
        let decoder = family::decoder(reader.config())?;
        for (name, shape) in decoder.tensors() {
            reader.check(name, &shape)?;
        }
        Ok(Self { reader, decoder, device })
    }

    /// The dense values of a linear layer's weight, row-major.
    ///
    /// # Errors
    /// If a weight is not finite.
    pub fn values(&self, linear: &Linear) -> Result<Vec<f32>, Error> {
        Ok(self.reader.read(&linear.weight, &[linear.dims.rows, linear.dims.columns])?)
    }

    /// The weights of one part of a layer, dense.
    ///
    /// # Errors
    /// If they cannot be read, or the device has not enough memory.
    pub fn part(&self, layer: usize, part: Part) -> Result<PartWeights<D>, Error> {
        let layer = &self.decoder.layers[layer];
        let mut linears = Vec::new();
        for linear in layer.linears(part) {
            let bias = match &linear.bias {
                Some(bias) => Some(self.reader.read(bias, &[linear.dims.rows])?),
                None => None,
            };
            let dims = (linear.dims.rows, linear.dims.columns);
            let weight = Weight::frozen(&self.device, self.values(linear)?, dims, bias);
            linears.push(weight.map_err(Error::device(&linear.weight))?);
        }
        Ok(PartWeights {
            part,
            norm: self.vector(layer.norm(part))?,
            norm_epsilon: self.decoder.norm_epsilon,
            linears,
        })
    }

    /// A part as pruning left it.
    ///
    /// # Errors
    /// If changed weights cannot be read.
    pub fn pruned(
        &self,
        layer: usize,
        dense: &PartWeights<D>,
        pruned: &Pruned,
    ) -> Result<PartWeights<D>, Error> {
        let mut sparse = dense.clone();
        let linears = self.decoder.layers[layer].linears(dense.part);
        for (weight, linear) in sparse.linears.iter_mut().zip(linears) {
            if let Some(mask) = pruned.masks.get(&linear.weight) {
                let changed = pruned.values(&linear.weight)?;
                let mut values = changed.unwrap_or_else(|| weight.values().to_vec());
                mask.apply(&mut values);
                *weight = weight.with_values(values);
            }
        }
        Ok(sparse)
    }

    /// The weight of a norm.
    ///
    /// # Errors
    /// If it cannot be read, or the device has not enough memory.
    pub fn vector(&self, name: &str) -> Result<Vector<D>, Error> {
        let width = self.decoder.hidden_size;
        let values = self.reader.read(name, &[width])?;
        self.device.try_tensor_from_vec(values, (width,)).map_err(Error::device(name))
    }

    /// The hidden states before the first layer: the embeddings of each sample's tokens.
    ///
    /// # Errors
    /// If they cannot be read, or the device has not enough memory.
    pub fn embed(&self, samples: &[Vec<u32>]) -> Result<Vec<Hidden<D>>, Error> {
        let Decoder { embedding, vocab_size, hidden_size, .. } = &self.decoder;
        let mut positions: BTreeMap<usize, Positions> = BTreeMap::new();
        let mut hidden = Vec::with_capacity(samples.len());
        for ids in samples {
            let rows = ids.iter().map(|&id| id as usize);
            let states = self.reader.read_rows(embedding, [*vocab_size, *hidden_size], rows)?;
            let shape = (ids.len(), *hidden_size);
            hidden.push(Hidden {
                states: self
                    .device
                    .try_tensor_from_vec(states, shape)
                    .map_err(Error::device(embedding))?,
                positions: positions
                    .entry(ids.len())
                    .or_insert_with(|| Positions::new(&self.decoder, ids.len()))
                    .clone(),
            });
        }
        Ok(hidden)
    }

    /// Adds a part's outputs to the hidden states.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn add(&self, samples: &mut [Hidden<D>], outputs: Vec<Matrix<D>>) -> Result<(), Error> {
        use dfdx::tensor_ops::TryAdd;
        for (sample, output) in samples.iter_mut().zip(outputs) {
            let sum = sample.states.clone().try_add(output);
            sample.states = sum.map_err(Error::device("adding the residual"))?;
        }
        Ok(())
    }
}
