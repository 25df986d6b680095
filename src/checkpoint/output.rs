//! Writes a pruned checkpoint into a directory beside the output, which is renamed to the output
//! when complete. A directory with the output's name is always a complete checkpoint.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    iter::once,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{
    Cut, Cuts, Dtype, Error, Format, Pruned, Reader, TensorView,
    layout::{self, Content, VALUES},
    masks::{self, MASKS},
    owned::Owned,
    partial::Partial,
    place, quantised,
    reader::{INDEX, Shard, sizes},
};
use crate::files;

/// A checkpoint that is being written. If it is dropped before [`Output::finish`], only the saved
/// state of the run is left.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    staging: PathBuf,
    partial: Partial,
}

/// What to do with an existing output or saved state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Existing {
    /// Replace an existing checkpoint, and discard the saved state of an interrupted run.
    pub force: bool,
    /// Continue from the saved state of an interrupted run.
    pub resume: bool,
}

/// How the weights of an output are stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// The format of pruned matrices.
    pub format: Format,
    /// The number format of weights; `None` for the dense checkpoint's.
    pub dtype: Option<Dtype>,
    /// Whether the masks are written beside the weights.
    pub masks: bool,
}

/// Counts of a written checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Number of kept weights that differ from the dense ones.
    pub changed: usize,
    /// Number of values of biases that differ from the dense ones, or that are added and not zero.
    pub changed_biases: usize,
    /// Number of weights of all matrices, zeros included.
    pub weights: usize,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Bytes of all files except the card: shards, index and copied files.
    pub directory_bytes: u64,
    /// Number of compressed matrices.
    pub compressed: usize,
}

/// A tensor of an output's file, or one matrix of a stacked tensor.
struct Entry<'a> {
    /// Name in the file.
    name: String,
    dtype: safetensors::Dtype,
    /// Shape in the file; of a matrix of a stacked tensor, that of a stack of one.
    shape: Vec<usize>,
    /// The checkpoint's tensor that the entry is made from.
    view: TensorView<'a>,
    /// The format that the elements are converted to; `None` for the checkpoint's.
    to: Option<Dtype>,
    /// For a tensor of a compressed matrix: its name, and the function that computes its bytes.
    part: Option<(&'static str, Content)>,
    /// What is left of the tensor, if rows or columns are cut away.
    cut: Option<&'a Cut>,
}

impl Output {
    /// Checks, as far as possible without writing, that a run of `model` can write its result to
    /// `target`. `inputs` are files that the run reads, in addition to the model's; `bytes` is the
    /// least size of the result. Returns `target` with links resolved.
    ///
    /// # Errors
    /// If `target` exists and is not a directory, is a link to nothing, overlaps the model's
    /// directory, or holds an input or a file that no run wrote; if it cannot be written; if the
    /// directory beside it with the name of a run's directory is not a run's; or if a file to be
    /// copied cannot be read.
    pub fn check<'a>(
        target: &Path,
        model: &'a Reader,
        inputs: impl IntoIterator<Item = &'a Path>,
        bytes: u64,
    ) -> Result<PathBuf, Error> {
        let target = apart(target, model, inputs)?;
        possible(&target, model, bytes)?;
        Ok(target)
    }

    /// Prepares to write to `target`, before a long run, so that errors show early. Locks out other
    /// runs to `target`. `inputs` and `bytes` are as for [`check`](Self::check).
    ///
    /// # Errors
    /// As [`check`](Self::check); if `target`, or the saved state of an interrupted run, exists and
    /// `existing` does not say what to do with it; if `target` has changed since a run wrote it; or
    /// if another run writes there.
    pub fn create<'a>(
        target: &Path,
        existing: Existing,
        model: &'a Reader,
        inputs: impl IntoIterator<Item = &'a Path>,
        bytes: u64,
    ) -> Result<Self, Error> {
        let target = apart(target, model, inputs)?;
        // A resumed run may have renamed its result already.
        if target.exists() && !existing.force && !existing.resume {
            return Err(Error::Exists(target));
        }
        possible(&target, model, bytes)?;
        let parent = target.parent().unwrap_or(&target);
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        let partial = Partial::open(target.clone())?;
        let output = Self { staging: partial.checkpoint(), target, partial };
        output.look(existing)?;
        Ok(output)
    }

    /// The output to `target` that another process of this run writes.
    ///
    /// # Errors
    /// If this process does not see it.
    pub fn of_other(target: &Path) -> Result<Self, Error> {
        let target = place::resolved(target)?;
        let dir = Partial::beside(&target);
        let partial = Partial::of_other(target.clone()).ok_or(Error::NotShared { dir })?;
        Ok(Self { staging: partial.checkpoint(), target, partial })
    }

    /// Least bytes of the tensors of `model` in this format, of which `cuts` are left if the result is
    /// smaller. The size of compressed matrices is known only after pruning.
    pub fn least_bytes(
        model: &Reader,
        format: Format,
        dtype: Option<Dtype>,
        cuts: Option<&Cuts>,
    ) -> u64 {
        if !format.is_dense() {
            return 0;
        }
        let length = |view: TensorView<'_>| {
            let to = dtype.filter(|_| Dtype::of(view.dtype).is_some());
            let shape = match cuts {
                Some(cuts) if cuts.name(view.name).is_none() => return 0,
                Some(cuts) => cuts.shape(view.name, view.shape),
                None => view.shape.into(),
            };
            layout::length(to.map_or(view.dtype, Dtype::stored), &shape) as u64
        };
        model.names().filter_map(|name| model.tensor(name).ok()).map(length).sum()
    }

    /// Removes files that a finished run to `target` left beside it when it was interrupted.
    ///
    /// # Errors
    /// If they cannot be removed, or another run is writing there.
    pub fn tidy(target: &Path) -> Result<(), Error> {
        Partial::tidy(place::resolved(target)?)
    }

    /// Checks or clears an existing output and saved state.
    fn look(&self, existing: Existing) -> Result<(), Error> {
        let Self { target, partial, staging } = self;
        if existing.resume && self.is_complete() && !staging.is_dir() {
            return Ok(());
        }
        if target.exists() {
            if !existing.force {
                return Err(Error::Exists(target.clone()));
            }
            Owned::of(target)?.unchanged()?;
        }
        if !existing.resume {
            if !existing.force
                && let Some(label) = partial.left_over()?
            {
                return Err(Error::LeftOver { dir: partial.path().to_owned(), label });
            }
            partial.clear()?;
        }
        if !self.is_complete() {
            let io = |e| Error::io(staging, e);
            files::remove(staging).and_then(|()| files::create_dir(staging)).map_err(io)?;
        }
        Ok(())
    }

    /// The directory for scratch files and saved state, which is removed when the output is
    /// finished or dropped.
    pub fn scratch(&self) -> &Path {
        self.partial.path()
    }

    /// The saved state that would be left if the run ended now, in words; `None` if none would.
    ///
    /// # Errors
    /// If the state cannot be read.
    pub fn left_over(&self) -> Result<Option<String>, Error> {
        self.partial.left_over()
    }

    /// The final directory of the checkpoint.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The directory of the files until the checkpoint is finished.
    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// The current directory of the complete checkpoint.
    pub fn complete(&self) -> &Path {
        if self.staging.is_dir() { &self.staging } else { &self.target }
    }

    /// Whether an interrupted run had written all files, so that only the rename is left.
    pub fn is_complete(&self) -> bool {
        self.partial.is_finished()
    }

    /// Writes the weights of `reader` in the same shards: zeros for pruned weights, changed values
    /// for changed weights, and all others bit for bit unless `dtype` converts them. Pruned
    /// matrices are stored in `format` where that is smaller. With `cuts` the result is the smaller
    /// model, and files of which nothing is left are not written. Writes the masks if `form` asks for
    /// them. Copies the other files. Calls `written` after each tensor with its number of bytes, counted
    /// dense.
    ///
    /// # Errors
    /// If a file cannot be written, or a weight does not fit the format.
    pub fn write(
        &self,
        reader: &Reader,
        Form { format, dtype, masks }: Form,
        (pruned, cuts): (&Pruned, Option<&Cuts>),
        mut written: impl FnMut(u64),
    ) -> Result<Written, Error> {
        let mut names = BTreeSet::new();
        for path in reader.companions()? {
            let name = path.file_name().unwrap_or_default();
            let to = self.staging.join(name);
            files::copy(&path, &to).map_err(|e| Error::io(&to, e))?;
            names.insert(name.to_owned());
        }
        let entries = |shard| {
            let tensors = reader.in_shard(shard).into_iter();
            let mut entries: Vec<_> =
                tensors.flat_map(|view| Entry::of(view, format, dtype, pruned, cuts)).collect();
            // Tensors with the widest elements come first, so that all are aligned.
            entries.sort_by_key(|entry| Reverse(entry.dtype.bitsize()));
            entries
        };
        let mut shards: Vec<_> = (0..reader.shards().len()).map(entries).collect();
        let added = cuts.map_or_else(Vec::new, |cuts| added(reader, cuts));
        if let Some(entries) = shards.iter_mut().find(|entries| !entries.is_empty()) {
            let views = added.iter().map(|of| of.view(reader));
            entries.extend(views.flat_map(|view| Entry::of(view, format, dtype, pruned, cuts)));
            entries.sort_by_key(|entry| Reverse(entry.dtype.bitsize()));
        }
        let base = cuts.map_or(reader.config(), |cuts| &cuts.config);
        if let Some(config) = config(reader, base, format, dtype, shards.iter().flatten(), pruned) {
            self.add_file("config.json", pretty(&config).as_bytes())?;
        }
        let mut files = Map::new();
        let mut all = Written::default();
        let shards = reader.shards().iter().zip(&shards);
        for (shard, entries) in shards.filter(|(_, entries)| cuts.is_none() || !entries.is_empty())
        {
            let name = shard.path.file_name().unwrap_or_default();
            names.insert(name.to_owned());
            let path = self.staging.join(name);
            write_shard(&path, (shard, entries), pruned, &mut all, &mut written)?;
            for entry in entries {
                all.weight_bytes += entry.length() as u64;
                all.compressed += usize::from(entry.has_values());
                all.weights += entry.weights();
                files.insert(entry.name.clone(), name.to_string_lossy().into());
            }
        }
        if masks {
            masks::write(&self.staging.join(MASKS), reader, &pruned.masks)?;
            names.insert(MASKS.into());
        }
        // Some loaders take every safetensors file for weights, unless an index names those that are.
        if reader.is_indexed() || masks {
            let index =
                json!({ "metadata": { "total_size": all.weight_bytes }, "weight_map": files });
            self.add_file(INDEX, pretty(&index).as_bytes())?;
            names.insert(INDEX.into());
        }
        all.directory_bytes = sizes(names.iter().map(|name| self.staging.join(name)))?;
        Ok(all)
    }

    /// Adds a file, or replaces a copied one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn add_file(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let path = self.staging.join(name);
        files::write(&path, contents).map_err(|e| Error::io(&path, e))
    }

    /// Renames the checkpoint to its final name, replacing an existing one if `force` allowed it.
    ///
    /// # Errors
    /// If it cannot be renamed; the existing one then stays.
    pub fn finish(&self) -> Result<(), Error> {
        self.partial.finish()
    }
}

/// `target` with links resolved; an error if it overlaps files that the run reads.
fn apart<'a>(
    target: &Path,
    model: &'a Reader,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<PathBuf, Error> {
    let target = place::resolved(target)?;
    let dir = fs::canonicalize(model.path()).map_err(|e| Error::io(model.path(), e))?;
    let overlaps = |own: &Path| own.starts_with(&dir) || dir.starts_with(own);
    if overlaps(&target) || overlaps(&Partial::beside(&target)) {
        return Err(Error::Overlap { output: target, model: dir });
    }
    for input in model.weight_files().chain(inputs) {
        // A missing input is reported when it is read.
        if fs::canonicalize(input).is_ok_and(|input| input.starts_with(&target)) {
            return Err(Error::Holds { output: target, input: input.to_owned() });
        }
    }
    Ok(target)
}

/// Checks that `target` can be written, and that the files to be copied can be read.
fn possible(target: &Path, model: &Reader, bytes: u64) -> Result<(), Error> {
    // An interrupted run may have written some of the bytes already.
    let bytes = if Partial::beside(target).exists() { 0 } else { bytes };
    place::check(target, bytes)?;
    Partial::check(target)?;
    if target.exists() {
        Owned::of(target)?;
    }
    for path in model.companions()? {
        files::open(&path).map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}

/// The saved state that this process's run to `target` leaves if the process ends now: the
/// directory, and the saved place in words. Without a saved state, the directory is removed.
pub fn left_behind(target: &Path) -> Option<(PathBuf, String)> {
    Partial::left_behind(&place::resolved(target).ok()?)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The `config.json` of a dense checkpoint that is made of `reader`'s, with the sizes of `base` and
/// with weights in `dtype`, or in their own format: it is neither compressed nor quantised.
pub fn dense_config(reader: &Reader, base: &Value, dtype: Option<Dtype>) -> Value {
    let mut config = base.clone();
    let quantisation = reader.quantisation().ok().flatten();
    if let Some(dtype) = dtype.or(quantisation.map(|of| of.dtype)) {
        for key in ["torch_dtype", "dtype"] {
            if config.get(key).is_some() {
                config[key] = dtype.torch().into();
            }
        }
    }
    if let Some(config) = config.as_object_mut() {
        if !reader.format().is_dense() {
            config.shift_remove(layout::KEY);
        }
        if quantisation.is_some() {
            quantised::remove_section(config);
        }
    }
    config
}

/// The `config.json` of the output, made of `base`, if it differs from the dense checkpoint's.
fn config<'a>(
    reader: &Reader,
    base: &Value,
    format: Format,
    dtype: Option<Dtype>,
    entries: impl Iterator<Item = &'a Entry<'a>>,
    pruned: &Pruned,
) -> Option<Value> {
    let mut config = dense_config(reader, base, dtype);
    let compressed = entries.filter(|entry| entry.has_values());
    let modules: Vec<_> = compressed.filter_map(|entry| layout::module(entry.view.name)).collect();
    if !modules.is_empty() {
        let zeros: usize = pruned.masks.values().map(|of| of.dims().len() - of.kept()).sum();
        let tensors = reader.names().filter_map(|name| reader.tensor(name).ok());
        let weights: usize = tensors.map(|of| of.shape.iter().product::<usize>()).sum();
        config[layout::KEY] = layout::section(format, &modules, zeros as f64 / weights as f64);
    }
    (config != *reader.config()).then_some(config)
}

/// Writes a file of tensors; adds to the counts of values that differ from the dense ones.
fn write_shard(
    path: &Path,
    (shard, entries): (&Shard, &[Entry<'_>]),
    pruned: &Pruned,
    all: &mut Written,
    written: &mut impl FnMut(u64),
) -> Result<(), Error> {
    let io = |e| Error::io(path, e);
    let mut file = files::create(path).map_err(io)?;
    let header = header_of(shard, entries);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    for entry in entries {
        let (bytes, count) = entry.bytes(pruned)?;
        match entry.view.shape.len() {
            1 => all.changed_biases += count,
            _ => all.changed += count,
        }
        file.write_all(&bytes).map_err(io)?;
        if entry.part.is_none() || entry.has_values() {
            written(entry.view.length() as u64);
        }
    }
    file.finish().map_err(io)
}

/// The header of a shard with these entries, with the metadata of the checkpoint's.
fn header_of(shard: &Shard, entries: &[Entry<'_>]) -> Vec<u8> {
    let mut metadata = json!({ "format": "pt" });
    if let Some(given) = shard.header.metadata() {
        for (key, value) in given.iter().collect::<BTreeMap<_, _>>() {
            metadata[key] = value.as_str().into();
        }
    }
    let tensors = entries
        .iter()
        .map(|entry| (entry.name.as_str(), entry.dtype, &entry.shape[..], entry.length()));
    header(metadata, tensors)
}

/// The header of a safetensors file. A tensor has a name, a format, a shape and a number of bytes, and
/// several of one name are the parts of one tensor.
pub(super) fn header<'a>(
    metadata: Value,
    tensors: impl Iterator<Item = (&'a str, safetensors::Dtype, &'a [usize], usize)>,
) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), metadata);
    let mut end = 0;
    for (name, dtype, shape, length) in tensors {
        let start = end;
        end += length;
        let dtype = serde_json::to_value(dtype).unwrap_or_default();
        // The matrices of a stacked tensor follow each other.
        match header.get_mut(name) {
            Some(tensor) => {
                let count = tensor["shape"][0].as_u64().unwrap_or(0);
                tensor["shape"][0] = (count + 1).into();
                tensor["data_offsets"][1] = end.into();
            }
            None => {
                let offsets = [start, end];
                let tensor = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
                header.insert(name.into(), tensor);
            }
        }
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    // The tensors start at a multiple of eight bytes.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

/// A tensor of zeros that the dense checkpoint lacks.
struct Added<'a> {
    name: &'a str,
    shape: &'a [usize],
    dtype: Dtype,
    bytes: Vec<u8>,
}

/// The tensors that `cuts` adds, in the format of the weights that they belong to.
fn added<'a>(reader: &Reader, cuts: &'a Cuts) -> Vec<Added<'a>> {
    let of = |(name, shape): (&'a String, &'a Vec<usize>)| {
        let weight = name.strip_suffix(".bias").map(|module| format!("{module}.weight"));
        let dtype = weight.and_then(|weight| Dtype::of(reader.tensor(&weight).ok()?.dtype));
        let dtype = dtype.unwrap_or(Dtype::F32);
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
        Added { name, shape, dtype, bytes }
    };
    cuts.added.iter().map(of).collect()
}

impl Added<'_> {
    fn view<'a>(&'a self, reader: &'a Reader) -> TensorView<'a> {
        let dtype = self.dtype.stored();
        TensorView::dense(self.name, dtype, self.shape, reader.path(), &self.bytes)
    }
}

impl<'a> Entry<'a> {
    /// The entries for a tensor: the tensor itself, or the tensors of a compressed matrix; none if the
    /// smaller model has no such tensor.
    fn of(
        view: TensorView<'a>,
        format: Format,
        dtype: Option<Dtype>,
        pruned: &Pruned,
        cuts: Option<&'a Cuts>,
    ) -> Vec<Self> {
        // Only floating-point tensors are converted.
        let from = Dtype::of(view.dtype);
        let to = dtype.filter(|to| from.is_some_and(|from| from != *to));
        // Matrices that are stored in one tensor stay there.
        let mask = pruned.masks.get(view.name).filter(|_| view.stack.is_none());
        let mask = mask.zip(to.or(from));
        let parts = mask.and_then(|(mask, dtype)| format.parts(view.name, mask, dtype));
        let Some((module, parts)) = layout::module(view.name).zip(parts) else {
            let dtype = to.map_or(view.dtype, Dtype::stored);
            let cut = cuts.and_then(|cuts| cuts.tensors.get(view.name));
            let stored = view.stack.map_or(view.name, |stack| stack.name);
            let name = match cuts {
                Some(cuts) => cuts.name(view.name).and(cuts.name(stored)),
                None => Some(stored.into()),
            };
            let Some(name) = name.map(Cow::into_owned) else { return Vec::new() };
            let shape = match view.stack {
                Some(stack) => once(1).chain(stack.shape.iter().skip(1).copied()).collect(),
                None => cut.map_or_else(|| view.shape.to_vec(), |cut| cut.shape(view.shape)),
            };
            return vec![Self { name, dtype, shape, view, to, part: None, cut }];
        };
        let entry = |part: layout::Part| {
            let layout::Part { name, dtype, shape, content } = part;
            let tensor = layout::tensor(module, name);
            Self { name: tensor, dtype, shape, view, to, part: Some((name, content)), cut: None }
        };
        parts.into_iter().map(entry).collect()
    }

    /// Whether the entry has the values of a compressed matrix.
    fn has_values(&self) -> bool {
        self.part.is_some_and(|(name, _)| name == VALUES)
    }

    /// Number of weights of the matrix; 0 for other tensors.
    fn weights(&self) -> usize {
        match self.part {
            _ if self.view.shape.len() < 2 => 0,
            None => self.shape.iter().product(),
            Some((VALUES, _)) => self.view.shape.iter().product(),
            Some(_) => 0,
        }
    }

    /// Number of bytes.
    fn length(&self) -> usize {
        layout::length(self.dtype, &self.shape)
    }

    /// The bytes, and the number of kept weights in them that differ from the dense ones.
    fn bytes(&self, pruned: &Pruned) -> Result<(Cow<'a, [u8]>, usize), Error> {
        let mask = pruned.masks.get(self.view.name).zip(Dtype::of(self.view.dtype));
        let Some(((_, content), (mask, from))) = self.part.zip(mask) else {
            let (bytes, changed) = self.dense(pruned)?;
            let left = self.cut.map(|cut| cut.left(self.view.shape, &bytes));
            return Ok((self.view.as_stored(left.map_or(bytes, Cow::Owned)), changed));
        };
        Ok(match content {
            Content::Index(bytes) => (bytes(mask).into(), 0),
            Content::Values(gather) => {
                let (dense, changed) = self.dense(pruned)?;
                (gather(mask, &dense, self.to.unwrap_or(from).size()).into(), changed)
            }
        })
    }

    /// The bytes of the whole tensor, with zeros for pruned weights.
    fn dense(&self, pruned: &Pruned) -> Result<(Cow<'a, [u8]>, usize), Error> {
        let name = self.view.name;
        let stored = self.view.bytes()?;
        let Some(from) = Dtype::of(self.view.dtype) else { return Ok((stored, 0)) };
        let dense = match self.to {
            Some(to) => to.round(name, &from.decode(&stored))?.into(),
            None => stored,
        };
        let Some(mask) = pruned.masks.get(name) else { return Ok((dense, 0)) };
        let dtype = self.to.unwrap_or(from);
        let size = dtype.size();
        let changed = pruned.bytes(name)?.map(|(_, bytes)| bytes);
        let mut count = 0;
        if let Some(changed) = &changed {
            let pairs = changed.chunks_exact(size).zip(dense.chunks_exact(size));
            let differ = pairs.enumerate().filter(|(i, (new, old))| mask.get(*i) && new != old);
            count = differ.count();
        }
        let mut bytes = changed.unwrap_or_else(|| dense.into_owned());
        match dtype {
            Dtype::F64 => mask.apply_to_bytes::<8>(&mut bytes),
            Dtype::F32 => mask.apply_to_bytes::<4>(&mut bytes),
            Dtype::F16 | Dtype::Bf16 => mask.apply_to_bytes::<2>(&mut bytes),
        }
        Ok((bytes.into(), count))
    }
}
