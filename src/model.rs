//! A checkpoint as a decoder: loads the weights of one part at a time onto a device.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use bytesize::ByteSize;

use crate::{
    buffer::recycle,
    checkpoint::{self, Cut, Cuts, Mapped, Pruned, Reader, readable_config},
    dtype::Dtype,
    executor::{
        self, Executor, HELD_EXPERTS, PartWeights, Positions, Stream, available_memory,
        ops::{self, InputGradient, Ops, Values, Weight},
    },
    family::{self, Decoder, Inner, Norm, NormKind, Part, PositionLimit, Projection},
    mask::Mask,
    ranks::Ranks,
    structure::bias_name,
};

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint is wrong.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The configuration is wrong.
    #[error(transparent)]
    Family(#[from] family::Error),
    /// A sequence is longer than the model's position code.
    #[error(
        "a sequence of {found} tokens, but the model has positions for {longest}; \
         lower the sequence_length"
    )]
    TooLong {
        /// Number of tokens of the sequence.
        found: usize,
        /// Number of positions of the model.
        longest: usize,
    },
    /// A tensor is larger than memory.
    #[error(
        "tensor `{name}` takes {needed} of memory, and {available} are free; a smaller model fits, \
         or this one on a larger machine"
    )]
    Memory {
        /// Name of the tensor.
        name: String,
        /// Bytes of the tensor as f32.
        needed: ByteSize,
        /// Bytes of free memory.
        available: ByteSize,
    },
    /// The executor failed.
    #[error("{what}: {problem}")]
    Executor {
        /// Step that failed.
        what: String,
        /// The executor's error.
        problem: executor::Error,
    },
}

impl From<executor::Error> for Error {
    fn from(error: executor::Error) -> Self {
        Self::executor("hidden states")(error)
    }
}

impl Error {
    /// Adds to an error what the executor was doing.
    pub fn executor(what: impl std::fmt::Display) -> impl FnOnce(executor::Error) -> Self {
        move |problem| Self::Executor { what: what.to_string(), problem }
    }

    /// Adds to an error what the device was doing.
    pub(crate) fn device<E: std::fmt::Display>(
        what: impl std::fmt::Display,
    ) -> impl FnOnce(E) -> Self {
        move |problem| Self::executor(what)(executor::Error::device(problem))
    }
}

/// The other prefixes that checkpoints have in tensor names, as [`Decoder::renamed`] takes them: the
/// decoder without its head, and the text model of a model with several, as transformers names it
/// in memory.
const PREFIXES: &[&[(&str, &str)]] = &[
    &[("model.", ""), ("gpt_neox.", "")],
    &[("language_model.model.", "model.language_model."), ("language_model.", "")],
];

/// The decoder with the tensor names of a checkpoint.
fn named_as_in(reader: &Reader, mut decoder: Decoder) -> Decoder {
    let has = |name: &str| reader.tensor(name).is_ok();
    let first = |decoder: &Decoder| has(&decoder.layers[0].attention.projections[0].weight);
    if !first(&decoder) {
        let mut renamed = PREFIXES.iter().map(|prefixes| decoder.clone().renamed(prefixes));
        if let Some(found) = renamed.find(first) {
            decoder = found;
        }
    }
    let of_experts = |decoder: &Decoder| {
        let mut all = decoder.projections().filter(|of| of.expert.is_some());
        all.next().map(|of| of.weight.clone())
    };
    if of_experts(&decoder).is_some_and(|name| !has(&name)) {
        let stacked = decoder.clone().stacked();
        if of_experts(&stacked).is_some_and(|name| has(&name)) {
            decoder = stacked;
        }
    }
    // As in transformers, a file may have a tied head, the embedding, or both.
    let (embedding, own_head) = (&mut decoder.embedding.weight, &decoder.own_head);
    if decoder.head == *embedding && has(own_head) {
        if !has(embedding) {
            *embedding = own_head.clone();
            decoder.head = own_head.clone();
        } else if !same(reader, embedding, own_head) {
            tracing::warn!(
                "config.json ties the output head to the embedding, but the checkpoint's \
                 `{own_head}` differs from its `{embedding}`; the stored head is used, as in \
                 transformers 5; set `tie_word_embeddings` to false to silence this warning"
            );
            decoder.head = own_head.clone();
        }
    }
    decoder
}

/// Checks that the `config.json` of a directory, whose weights may be missing, is that of a model that
/// Barber reads.
///
/// # Errors
/// If it cannot be read, the family is unknown, the configuration is not valid for it, or the weights
/// are quantised in a way that Barber does not read.
pub fn check_config(dir: &Path) -> Result<(), Error> {
    family::decoder(&readable_config(dir)?)?;
    Ok(())
}

/// The decoder of a checkpoint, with the checkpoint's tensor names.
///
/// # Errors
/// If the family is unknown, or the configuration is not valid for it.
pub fn decoder(reader: &Reader) -> Result<Decoder, family::Error> {
    Ok(named_as_in(reader, family::decoder(reader.config())?))
}

/// Whether two tensors of a checkpoint have the same format, shape and bytes.
fn same(reader: &Reader, one: &str, other: &str) -> bool {
    let bytes = |name: &str| {
        let view = reader.tensor(name).ok()?;
        Some((view.dtype, view.shape, view.bytes().ok()?))
    };
    bytes(one) == bytes(other)
}

/// A checkpoint, its decoder and an executor.
#[derive(Debug)]
pub struct Model<'a, D: Ops> {
    /// The checkpoint.
    pub reader: &'a Reader,
    /// The checkpoint's decoder.
    pub decoder: Decoder,
    /// The executor that runs the model.
    pub executor: Executor<D>,
    /// The format that weights are rounded to when they are read; `None` for the checkpoint's.
    dtype: Option<Dtype>,
    /// Maximum bytes of the experts of a part that are in memory together.
    held_experts: usize,
    /// What is left of the checkpoint, if the model is a smaller one that is made of it.
    cuts: Option<&'a Cuts>,
}

/// The values of an expert's matrix that stays in the checkpoint.
#[derive(Debug)]
struct ReadAgain {
    tensor: Mapped,
    mask: Option<Mask>,
}

impl Values for ReadAgain {
    fn read(&self) -> Vec<f32> {
        let mut values = self.tensor.values();
        if let Some(mask) = &self.mask {
            mask.apply(&mut values);
        }
        values
    }
}

impl<'a, D: Ops> Model<'a, D> {
    /// The model of a checkpoint. Checks that all tensors exist.
    ///
    /// # Errors
    /// If the family is unknown, the weights are quantised in a way that Barber does not read, or a
    /// tensor is missing, has the wrong shape or format, or is larger than the free memory.
    pub fn new(reader: &'a Reader, executor: impl Into<Executor<D>>) -> Result<Self, Error> {
        reader.quantisation()?;
        let decoder = decoder(reader)?;
        let available = available_memory();
        for (name, shape) in decoder.tensors() {
            reader.check(name, &shape)?;
            // At most four times the bytes of the file, so there is no overflow.
            let needed = (shape.iter().product::<usize>() * Dtype::F32.size()) as u64;
            if needed > available {
                let (needed, available) = (ByteSize(needed), ByteSize(available));
                return Err(Error::Memory { name: name.into(), needed, available });
            }
        }
        let held_experts = HELD_EXPERTS;
        let (executor, dtype, cuts) = (executor.into(), None, None);
        Ok(Self { reader, decoder, executor, dtype, held_experts, cuts })
    }

    /// The smaller model that is left of this one.
    ///
    /// # Errors
    /// If its configuration is not valid for the family.
    pub fn smaller<'b>(&'b self, cuts: &'b Cuts) -> Result<Model<'b, D>, Error> {
        let decoder = named_as_in(self.reader, family::decoder(&cuts.config)?);
        Ok(Model { decoder, executor: self.executor.clone(), cuts: Some(cuts), ..*self })
    }

    /// The model with its weights read by another reader of the same checkpoint.
    #[must_use]
    pub fn read_by<'b>(&self, reader: &'b Reader) -> Model<'b, D>
    where
        'a: 'b,
    {
        let Self { decoder, executor, dtype, held_experts, cuts, .. } = self;
        let (decoder, executor) = (decoder.clone(), executor.clone());
        Model { reader, decoder, executor, dtype: *dtype, held_experts: *held_experts, cuts: *cuts }
    }

    /// The checkpoint's name of a tensor.
    fn stored_name<'b>(&self, name: &'b str) -> Cow<'b, str> {
        let dense = self.cuts.and_then(|cuts| cuts.dense_name(name));
        dense.unwrap_or(Cow::Borrowed(name))
    }

    /// What is left of a tensor, by the checkpoint's name; `None` if it is left as it is.
    fn cut(&self, stored_name: &str) -> Option<&'a Cut> {
        self.cuts?.tensors.get(stored_name)
    }

    /// The model with at most this many bytes of the experts of a part in memory together; more are
    /// read by each product.
    #[must_use]
    pub fn with_held_experts(self, bytes: usize) -> Self {
        Self { held_experts: bytes, ..self }
    }

    /// The model as loaded from a checkpoint in this format: weights are rounded to it, and stored
    /// hidden states are not rounded.
    #[must_use]
    pub fn written(&self, dtype: Option<Dtype>) -> Self {
        let Executor { device, storage, ranks } = self.executor.clone();
        let executor = Executor { device, storage: storage.exact(), ranks };
        Self { decoder: self.decoder.clone(), executor, dtype, ..*self }
    }

    /// The model on this rank alone: it runs all samples itself.
    #[must_use]
    pub fn alone(&self) -> Self {
        let executor = Executor { ranks: Ranks::ONE, ..self.executor.clone() };
        Self { decoder: self.decoder.clone(), executor, ..*self }
    }

    /// A tensor's values, row-major.
    ///
    /// # Errors
    /// As [`Reader::read`], and if a value does not fit the format that weights are rounded to.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, checkpoint::Error> {
        let name = &self.stored_name(name);
        let values = match self.cut(name) {
            Some(cut) => {
                let dense = self.reader.tensor(name)?.shape;
                cut.left(dense, &self.reader.read(name, dense)?)
            }
            None => self.reader.read(name, shape)?,
        };
        match self.dtype {
            Some(dtype) => dtype.rounded(name, values),
            None => Ok(values),
        }
    }

    /// Some rows of a matrix.
    fn read_rows(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<f32>, checkpoint::Error> {
        let values = self.reader.read_rows(name, shape, rows)?;
        match self.dtype {
            Some(dtype) => dtype.rounded(name, values),
            None => Ok(values),
        }
    }

    /// Checks that all tensors are finite, except those in `read_later`, which are checked when
    /// they are read. For tensors that the decoder does not use, a failure is only a warning.
    ///
    /// # Errors
    /// If a tensor of the decoder has a value that is NaN or infinite.
    pub fn check_finite(&self, read_later: &BTreeSet<&str>) -> Result<(), Error> {
        let own: BTreeSet<&str> = self.decoder.tensors().map(|(name, _)| name).collect();
        for name in self.reader.names().filter(|name| !read_later.contains(name)) {
            match self.reader.check_finite(name) {
                Err(error) if !own.contains(name) => {
                    tracing::warn!("{error}; the model does not use it, and it is copied as it is");
                }
                found => found?,
            }
        }
        Ok(())
    }

    /// The dense values of a linear layer's weight, row-major.
    ///
    /// # Errors
    /// If a weight is not finite.
    pub fn values(&self, linear: &Projection) -> Result<Vec<f32>, Error> {
        Ok(self.read(&linear.weight, &[linear.dims.rows, linear.dims.columns])?)
    }

    /// The pruned weights of one part of a layer.
    ///
    /// # Errors
    /// If they cannot be read, or the device runs out of memory.
    pub fn part(&self, layer: usize, part: Part, pruned: &Pruned) -> Result<PartWeights<D>, Error> {
        let layer = &self.decoder.layers[layer];
        let mut linears = Vec::new();
        let experts = layer.projections(part).iter().filter(|of| of.expert.is_some());
        let bytes: usize = experts.map(|of| of.dims.len() * Dtype::F32.size()).sum();
        for linear in layer.projections(part) {
            let name = &self.stored_name(&linear.weight);
            let changes = pruned.format(name).is_some() || self.dtype.is_some();
            if linear.expert.is_some()
                && bytes > self.held_experts
                && !changes
                && let Some(weight) = self.read_again(linear, pruned)?
            {
                linears.push(weight);
                continue;
            }
            // What a mask leaves of a smaller model has no zeros.
            let mask = pruned.masks.get(&**name).filter(|_| self.cuts.is_none());
            let values = match (pruned.values(name)?, self.cut(name)) {
                (Some(changed), Some(cut)) => cut.left(self.reader.tensor(name)?.shape, &changed),
                (Some(changed), None) => changed,
                (None, _) => self.values(linear)?,
            };
            linears.push(self.weight(linear, values, mask, pruned)?);
        }
        let of = layer.part(part);
        let router = of.router.as_ref().map(|router| {
            let weight = self.linear(&router.projection)?;
            let experts = router.projection.dims.rows;
            let correction = router.correction.as_ref().map(|name| self.read(name, &[experts]));
            let correction = correction.transpose()?;
            let gate = router.shared_gate.as_ref().map(|gate| self.linear(gate));
            let shared_gate = gate.transpose()?;
            Ok::<_, Error>(executor::Router { weight, correction, shared_gate, of: router.clone() })
        });
        let norm = |norm: &Option<Norm>| norm.as_ref().map(|norm| self.norm(norm)).transpose();
        Ok(PartWeights {
            part,
            projections: of.projections.clone(),
            input_norm: norm(&of.input_norm)?,
            linears,
            inner: match &of.inner {
                Inner::Attention(attention) => {
                    let head_norms = match attention.head_norms.as_deref() {
                        Some([q, k]) => Some([self.norm(q)?, self.norm(k)?]),
                        None => None,
                    };
                    let sinks = attention.sinks.as_ref();
                    let sinks = sinks.map(|name| self.read(name, &[attention.heads]));
                    let sinks = sinks.transpose()?.map(Arc::new);
                    let latents = match attention.latents.as_deref() {
                        Some(of) => Some((norm(&of.queries)?, self.norm(&of.keys_and_values)?)),
                        None => None,
                    };
                    let of = attention.clone();
                    let weights = executor::AttentionWeights { of, head_norms, sinks, latents };
                    executor::Inner::Attention(Box::new(weights))
                }
                Inner::Gated(gating) => executor::Inner::Gated(*gating),
                Inner::Plain(activation) => executor::Inner::Plain(*activation),
            },
            router: router.transpose()?,
            output_norm: norm(&of.output_norm)?,
            residual_norm: norm(&of.residual_norm)?,
            parallel: layer.parallel,
        })
    }

    /// A linear layer whose weight is read by each product; `None` if the checkpoint has it
    /// compressed.
    fn read_again(&self, linear: &Projection, pruned: &Pruned) -> Result<Option<Weight<D>>, Error> {
        let dims = (linear.dims.rows, linear.dims.columns);
        let name = &self.stored_name(&linear.weight);
        let Some(tensor) = self.reader.mapped(name, &[dims.0, dims.1])? else {
            return Ok(None);
        };
        let mask = pruned.masks.get(&**name).filter(|_| self.cuts.is_none()).cloned();
        let (values, device) = (Arc::new(ReadAgain { tensor, mask }), &self.executor.device);
        let weight = Weight::read(device, values, dims, self.bias(linear, pruned)?);
        Ok(Some(weight.map_err(Error::device(&linear.weight))?))
    }

    /// The bias of a linear layer, if it has one: a changed one, or the checkpoint's.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn bias(&self, linear: &Projection, pruned: &Pruned) -> Result<Option<Vec<f32>>, Error> {
        let name = bias_name(linear);
        let stored = self.stored_name(&name);
        if let Some(changed) = pruned.values(&stored)? {
            return Ok(Some(changed));
        }
        if let Some(shape) = self.cuts.and_then(|cuts| cuts.added.get(&*stored)) {
            return Ok(Some(vec![0.0; shape.iter().product()]));
        }
        let has = linear.bias.is_some();
        Ok(has.then(|| self.read(&name, &[linear.dims.rows])).transpose()?)
    }

    /// A norm.
    ///
    /// # Errors
    /// If it cannot be read, or the device runs out of memory.
    pub fn norm(&self, norm: &Norm) -> Result<ops::Norm<D>, Error> {
        let read = |name: &String| self.read(name, &[norm.width]);
        let hold = |values| {
            let vector = self.executor.device.hold(values, (1, norm.width));
            vector.map_err(Error::device("norm"))
        };
        let mut weight = match &norm.weight {
            Some(name) => read(name)?,
            None => vec![1.0; norm.width],
        };
        if matches!(norm.kind, NormKind::RmsOnePlus | NormKind::LayerOnePlus) {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        let mut bias = norm.bias.as_ref().map(read).transpose()?;
        let numbers = weight.iter_mut().chain(bias.iter_mut().flatten());
        numbers.for_each(|number| *number *= norm.scale);
        Ok(ops::Norm {
            weight: hold(weight)?,
            bias: bias.map(hold).transpose()?,
            epsilon: norm.epsilon,
            centred: matches!(norm.kind, NormKind::Layer | NormKind::LayerOnePlus),
        })
    }

    /// A linear layer outside the decoder layers, such as the output head.
    ///
    /// # Errors
    /// If it cannot be read, or the device runs out of memory.
    pub fn linear(&self, linear: &Projection) -> Result<Weight<D>, Error> {
        self.weight(linear, self.values(linear)?, None, &Pruned::dense())
    }

    /// A linear layer with these values of its weight, row-major, masked by `mask`, and with its bias as
    /// `pruned` says.
    ///
    /// # Errors
    /// If its bias cannot be read, or the device runs out of memory.
    pub fn weight(
        &self,
        linear: &Projection,
        mut values: Vec<f32>,
        mask: Option<&Mask>,
        pruned: &Pruned,
    ) -> Result<Weight<D>, Error> {
        if let Some(mask) = mask {
            mask.apply(&mut values);
        }
        let bias = self.bias(linear, pruned)?;
        let dims = (linear.dims.rows, linear.dims.columns);
        let weight = Weight::new(&self.executor.device, &values, dims, bias);
        recycle(values);
        weight.map_err(Error::device(&linear.weight))
    }

    /// The hidden states before the first layer: the embeddings of each sample's tokens. Statistics
    /// exclude the last `held_out` samples.
    ///
    /// # Errors
    /// If they cannot be read, a sample is longer than the model's positions, or the device runs
    /// out of memory.
    pub fn embed(&self, samples: &[Vec<u32>], held_out: usize) -> Result<Stream<D>, Error> {
        self.embed_at(self.positioned(samples), held_out)
    }

    /// The hidden states of samples before a later layer; `states` gives those of a sample, by its index,
    /// [tokens, channels], row-major: it is called for this rank's samples, in order.
    ///
    /// # Errors
    /// Whatever `states` returns, or if the device runs out of memory.
    pub fn stream(
        &self,
        samples: &[Vec<u32>],
        held_out: usize,
        states: impl FnMut(usize) -> Result<Vec<f32>, Error>,
    ) -> Result<Stream<D>, Error> {
        let positions = self.positioned(samples).map(|(_, positions)| positions);
        self.executor.stream(positions, held_out, states)
    }

    /// Samples with the positions of their tokens.
    fn positioned<'s>(
        &'s self,
        samples: &'s [Vec<u32>],
    ) -> impl ExactSizeIterator<Item = (&'s [u32], Positions)> {
        let mut positions: BTreeMap<usize, Positions> = BTreeMap::new();
        samples.iter().map(move |ids| {
            let new = || Positions::new(&self.decoder, ids.len());
            (&ids[..], positions.entry(ids.len()).or_insert_with(new).clone())
        })
    }

    /// The hidden states before the first layer, for tokens with their positions.
    ///
    /// # Errors
    /// As [`Model::embed`].
    pub fn embed_at<'s>(
        &self,
        samples: impl ExactSizeIterator<Item = (&'s [u32], Positions)>,
        held_out: usize,
    ) -> Result<Stream<D>, Error> {
        let embedding = &self.decoder.embedding;
        let project =
            embedding.project_in.as_ref().map(|linear| self.linear(linear)).transpose()?;
        let samples: Vec<_> = samples.collect();
        let positions = samples.iter().map(|(_, positions)| positions.clone());
        self.executor.stream(positions, held_out, |i| {
            let (ids, positions) = &samples[i];
            self.embed_one(ids, positions, project.as_ref())
        })
    }

    fn embed_one(
        &self,
        ids: &[u32],
        positions: &Positions,
        project: Option<&Weight<D>>,
    ) -> Result<Vec<f32>, Error> {
        let Decoder { embedding, vocab_size, hidden_size, .. } = &self.decoder;
        let rows = ids.iter().map(|&id| id as usize);
        let shape = [*vocab_size, embedding.width];
        let mut states = self.read_rows(&embedding.weight, shape, rows)?;
        states.iter_mut().for_each(|x| *x *= embedding.scale);
        if let Some(project) = project {
            let projected = self.executor.device.hold(states, (ids.len(), embedding.width));
            let projected =
                projected.and_then(|x| D::linear(x, project, InputGradient::Skipped, None));
            let projected = projected.and_then(|x| x.on_host());
            states = projected.map_err(Error::device(&embedding.weight))?;
        }
        if let Some(learned) = &embedding.positions {
            let rows = positions.of_rows();
            let found = rows.iter().max().map_or(0, |last| last + 1);
            if found > learned.count {
                return Err(Error::TooLong { found, longest: learned.count });
            }
            let shape = [learned.offset + learned.count, *hidden_size];
            let rows = rows.into_iter().map(|row| learned.offset + row);
            let code = self.read_rows(&learned.weight, shape, rows)?;
            states.iter_mut().zip(&code).for_each(|(x, code)| *x += code);
        }
        Ok(states)
    }

    /// The tokens that end a text.
    pub fn last_tokens(&self) -> Vec<u32> {
        let Some(value) = self.reader.config().get("eos_token_id") else { return Vec::new() };
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    }

    /// Warns if a sequence of `found` tokens is longer than the model's positions. `what` is a
    /// sequence of the text, `key` the key that sets its length.
    ///
    /// # Errors
    /// If the model cannot run longer sequences.
    pub fn within(&self, what: &str, found: usize, key: &str) -> Result<(), Error> {
        let PositionLimit { tokens: longest, hard } = self.decoder.positions();
        if found > longest && hard {
            return Err(Error::TooLong { found, longest });
        }
        if found > longest {
            tracing::warn!(
                "{what} of {found} tokens, but the model is made for {longest} positions: its \
                 predictions beyond them are unreliable. Set {key} to {longest} or less"
            );
        }
        Ok(())
    }

    /// The token to put before a text without context, if the model has one.
    pub fn first_token(&self) -> Option<u32> {
        let token = |key: &str| {
            let value = self.reader.config().get(key)?;
            let id = value.as_u64().or_else(|| value.get(0)?.as_u64())?;
            u32::try_from(id).ok().filter(|id| (*id as usize) < self.decoder.vocab_size)
        };
        token("bos_token_id").or_else(|| token("eos_token_id"))
    }
}
