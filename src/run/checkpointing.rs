//! Saves the state of a run in a journal, layer by layer, and reads it again: masks and changed
//! weights of the finished layers, and the hidden states before the next layer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use barber_metric::Dims;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    checkpoint::{self, Pruned},
    dtype::Dtype,
    executor::{Stream, ops::Ops},
    journal::{self, Entries, Identity, Journal, Record},
    mask::Mask,
    model::{self, Model},
    plan::Plan,
    prune::{Error, Pass, Sampled, SavedStage, StageState},
    ranks::Ranks,
    structure::bias_name,
};

/// A pass through the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// The pass that makes the initial masks.
    InitialMasks,
    /// The pass that runs the stages; it also makes the initial masks if it is the only pass.
    Refinement,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InitialMasks => "initial masks",
            Self::Refinement => "refinement",
        })
    }
}

/// A place in a run: a pass and a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The pass.
    pub(crate) phase: Phase,
    /// Number of finished layers.
    pub(crate) layers: usize,
}

/// A place within the stages that work on the whole model.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct InStage {
    /// Index of the stage.
    pub(crate) stage: usize,
    /// Number of finished steps.
    pub(crate) step: usize,
}

/// The first entry of a save.
#[derive(Serialize, Deserialize)]
struct Head<N> {
    place: Place,
    /// The stage whose state is at the end.
    in_stage: Option<InStage>,
    /// Number of samples of each stream.
    streams: Vec<usize>,
    identity: Identity,
    notes: N,
}

/// A matrix in a save.
#[derive(Serialize, Deserialize)]
struct Matrix {
    name: String,
    rows: usize,
    columns: usize,
    /// The number format of changed weights; `None` if the weights are the dense ones.
    changed: Option<safetensors::Dtype>,
}

#[derive(Serialize, Deserialize)]
struct Matrices {
    matrices: Vec<Matrix>,
}

/// A saved state, from which a run continues.
pub(crate) struct Saved<D: Ops, N> {
    /// The place at which the run was saved.
    pub(crate) place: Place,
    /// The state of the pass at that place.
    pub(crate) pass: Pass<D>,
    /// The index of the stage within which the run was saved, and its state.
    pub(crate) stage: Option<(usize, Entries)>,
    /// Notes of the run.
    pub(crate) notes: N,
}

/// Saves the state of one run.
pub(crate) struct Checkpointing {
    /// The journal, to which the first rank writes.
    journal: Journal,
    ranks: Ranks,
    identity: Identity,
    /// Minimum time between two saves; `None` for no saves.
    every: Option<Duration>,
    /// The layers whose matrices changed since they were saved.
    unsaved: BTreeSet<usize>,
    /// When the last save ended, and how long it took.
    last: (Instant, Duration),
}

/// Minimum time between saves, as a multiple of the time that a save takes.
const COST_RATIO: u32 = 50;

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        checkpoint::Error::from(error).into()
    }
}

impl Checkpointing {
    /// Opens the journal of the run that `identity` describes in the directory `dir`; ranks beyond the
    /// first only read it. The run is
    /// saved when the time since the last save is at least `every` and at least fifty times what a
    /// save takes: after each layer if `every` is zero, never if it is `None`.
    ///
    /// # Errors
    /// If the saved state cannot be read, is incomplete, or is that of another run or version.
    pub(crate) fn open(
        dir: &Path,
        identity: Identity,
        every: Option<Duration>,
        ranks: &Ranks,
    ) -> Result<Self, journal::Error> {
        let journal = if ranks.is_first() { Journal::open(dir)? } else { Journal::read(dir)? };
        if let Some(mut state) = journal.state()? {
            let head: Head<toml::Table> = state.next_toml()?;
            head.identity.check(&identity, dir)?;
        }
        let (unsaved, last) = (BTreeSet::new(), (Instant::now(), Duration::ZERO));
        Ok(Self { journal, ranks: ranks.clone(), identity, every, unsaved, last })
    }

    /// Digests of the files that the run reads.
    pub(crate) fn inputs(&self) -> &BTreeMap<PathBuf, String> {
        &self.identity.inputs
    }

    /// The saved state, if there is one. Changed weights go to a file in `scratch`.
    ///
    /// # Errors
    /// If it is damaged.
    pub(crate) fn saved<D: Ops, N: DeserializeOwned>(
        &self,
        model: &Model<'_, D>,
        samples: Sampled<'_>,
        scratch: &Path,
    ) -> Result<Option<Saved<D, N>>, Error> {
        let Some(mut state) = self.journal.state()? else {
            return Ok(None);
        };
        let mut pruned = Pruned::default();
        for entries in self.journal.kept() {
            read_matrices(entries?, &mut pruned, scratch)?;
        }
        let Head::<N> { place, in_stage, streams: counts, notes, .. } = state.next_toml()?;
        let mut streams = Vec::new();
        for count in counts {
            let held_out = if count == samples.ids.len() { samples.held_out } else { 0 };
            let ids = samples.ids.get(..count);
            let ids = ids.ok_or_else(|| state.damaged("there are fewer samples"))?;
            streams.push(read_stream(&mut state, model, ids, held_out)?);
        }
        let stage = match in_stage {
            Some(InStage { stage, .. }) => Some((stage, state)),
            None => {
                state.end()?;
                None
            }
        };
        let pass = Pass { layer: place.layers, pruned, streams };
        Ok(Some(Saved { place, pass, stage, notes }))
    }

    /// Saves the state of the run at `place` if it is time, or if the work on masks `ends` here.
    ///
    /// # Errors
    /// If the state cannot be written.
    pub(crate) fn reached<D: Ops, N: Serialize>(
        &mut self,
        (model, plan): (&Model<'_, D>, &Plan),
        place: Place,
        (pruned, streams): (&Pruned, &[&Stream<D>]),
        ends: bool,
        notes: impl FnOnce() -> N,
    ) -> Result<(), Error> {
        self.unsaved.extend(place.layers.checked_sub(1));
        if self.is_due() || ends && self.every.is_some() {
            self.save((model, plan), place, (pruned, streams), None, &notes())?;
        }
        Ok(())
    }

    /// Saves the state of the run within a stage that works on the whole model, if it is time.
    ///
    /// # Errors
    /// If the state cannot be written.
    pub(crate) fn stepped<D: Ops, N: Serialize>(
        &mut self,
        (model, plan): (&Model<'_, D>, &Plan),
        (phase, place): (Phase, InStage),
        (pruned, state): (&Pruned, &dyn StageState),
        notes: impl FnOnce() -> N,
    ) -> Result<(), Error> {
        if self.is_due() {
            let layers = Place { phase, layers: plan.layers.len() };
            let stage = Some((place, state));
            self.save((model, plan), layers, (pruned, &[]), stage, &notes())?;
        }
        Ok(())
    }

    /// Has the next save cover all layers, whose masks changed together.
    pub(crate) fn changed(&mut self, plan: &Plan) {
        self.unsaved.extend(0..plan.layers.len());
    }

    fn is_due(&self) -> bool {
        let (ended, took) = self.last;
        let long =
            |every: Duration| every.is_zero() || ended.elapsed() >= every.max(took * COST_RATIO);
        // The first rank's clock counts.
        self.every.is_some() && self.ranks.of_first(self.every.is_some_and(long))
    }

    fn save<D: Ops, N: Serialize>(
        &mut self,
        (model, plan): (&Model<'_, D>, &Plan),
        place: Place,
        (pruned, streams): (&Pruned, &[&Stream<D>]),
        stage: Option<(InStage, &dyn StageState)>,
        notes: &N,
    ) -> Result<(), Error> {
        let started = Instant::now();
        if !self.ranks.is_first() {
            for stream in streams {
                model.executor.each_sample_at_first(stream, |_| Ok::<_, model::Error>(()))?;
            }
            // Ranks have parts of the state, too.
            let state = stage.map(|(_, state)| state.write(pruned, &mut |_| Ok(())));
            state.transpose()?;
            return Ok(());
        }
        let layers = self.unsaved.iter();
        let names: Vec<String> = layers
            .flat_map(|layer| plan.matrices(&model.decoder, *layer))
            .flat_map(|(_, linear)| [linear.weight.clone(), bias_name(linear)])
            .collect();
        let counts = streams.iter().map(|stream| stream.len()).collect();
        let in_stage = stage.map(|(in_stage, _)| in_stage);
        let identity = self.identity.clone();
        let head = Head { place, in_stage, streams: counts, identity, notes };
        let label = match in_stage {
            Some(InStage { step, .. }) => format!("end to end, step {step}"),
            None => format!("{}, {} of {} layers", place.phase, place.layers, plan.layers.len()),
        };
        self.journal.save::<Error>(
            &label,
            |record| Ok(write_matrices(record, pruned, &names)?),
            |record| {
                record.add_toml(&head)?;
                streams.iter().try_for_each(|stream| write_stream(record, model, stream))?;
                let Some((_, state)) = stage else { return Ok(()) };
                state.write(pruned, &mut |entry| Ok(record.add(entry)?))
            },
        )?;
        self.unsaved.clear();
        self.last = (Instant::now(), started.elapsed());
        Ok(())
    }
}

impl SavedStage for Entries {
    fn next(&mut self) -> Result<Vec<u8>, Error> {
        Ok(self.next()?)
    }

    fn damaged(&self) -> Error {
        self.damaged("it is not the state of this stage").into()
    }

    fn end(&mut self) -> Result<(), Error> {
        Ok(self.end()?)
    }
}

fn write_matrices(
    record: &mut Record,
    pruned: &Pruned,
    names: &[String],
) -> Result<(), checkpoint::Error> {
    let mut matrices = Vec::new();
    let named = || names.iter().filter_map(|name| Some((&**name, pruned.masks.get(name)?)));
    for (name, mask) in named() {
        let Dims { rows, columns } = mask.dims();
        let changed = pruned.format(name).map(Dtype::stored);
        matrices.push(Matrix { name: name.into(), rows, columns, changed });
    }
    record.add_toml(&Matrices { matrices })?;
    for (name, mask) in named() {
        record.add(&mask.to_bytes())?;
        if let Some((_, bytes)) = pruned.bytes(name)? {
            record.add(&bytes)?;
        }
    }
    Ok(())
}

fn read_matrices(
    mut entries: Entries,
    pruned: &mut Pruned,
    scratch: &Path,
) -> Result<(), checkpoint::Error> {
    let Matrices { matrices } = entries.next_toml()?;
    for Matrix { name, rows, columns, changed } in matrices {
        let mask = Mask::from_bytes(Dims { rows, columns }, &entries.next()?);
        let mask = mask.ok_or_else(|| entries.damaged(format!("no mask of `{name}`")))?;
        match changed.and_then(Dtype::of) {
            Some(dtype) => {
                let bytes = entries.next()?;
                if bytes.len() != mask.dims().len() * dtype.size() {
                    return Err(entries.damaged(format!("no weights of `{name}`")).into());
                }
                pruned.store(&name, dtype, &bytes, scratch)?;
            }
            None => drop(pruned.restore(&name)),
        }
        pruned.masks.insert(name, mask);
    }
    Ok(entries.end()?)
}

/// Adds each sample's hidden states, in their storage format.
fn write_stream<D: Ops>(
    record: &mut Record,
    model: &Model<'_, D>,
    stream: &Stream<D>,
) -> Result<(), model::Error> {
    let dtype = model.executor.storage.dtype();
    model.executor.each_sample_at_first(stream, |states| {
        Ok(record.add(&dtype.encode(states)).map_err(checkpoint::Error::from)?)
    })
}

fn read_stream<D: Ops>(
    entries: &mut Entries,
    model: &Model<'_, D>,
    samples: &[Vec<u32>],
    held_out: usize,
) -> Result<Stream<D>, model::Error> {
    let dtype = model.executor.storage.dtype();
    let mut samples_left = samples.iter().enumerate();
    // Other ranks' samples are read, too: the entries are in order, and have one digest.
    let mut read = |wanted: usize| {
        let mut states = Vec::new();
        for (i, ids) in samples_left.by_ref() {
            states = entries.next().map_err(checkpoint::Error::from)?;
            if states.len() != ids.len() * model.decoder.hidden_size * dtype.size() {
                return Err(checkpoint::Error::from(entries.damaged("no hidden states")).into());
            }
            if i == wanted {
                break;
            }
        }
        Ok::<_, model::Error>(dtype.decode(&states))
    };
    let stream = model.stream(samples, held_out, &mut read)?;
    read(samples.len())?;
    Ok(stream)
}
