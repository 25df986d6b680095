//! Writing a pruned checkpoint: everything goes to a directory beside the output's place, which is
//! renamed to it when complete. What is under the output's name is always a whole checkpoint.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{Dtype, Error, Pruned, Reader, partial::Partial, reader::Shard};
use crate::files;

/// A checkpoint in the making. Dropped before [`Output::finish`], it leaves nothing behind but what
/// a run can go on from.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    staging: PathBuf,
    partial: Partial,
}

/// What to do about what is there already.
#[derive(Clone, Copy, Debug, Default)]
pub struct Existing {
    /// Replace a checkpoint that has the output's name, and start anew where a run was cut off.
    pub force: bool,
    /// Go on from where a run was cut off.
    pub resume: bool,
}

/// The form in which a tensor is written.
struct Stored<'a> {
    name: &'a str,
    bytes: &'a [u8],
    shape: &'a [usize],
    from: safetensors::Dtype,
    to: Option<Dtype>,
}

impl Output {
    /// Prepares to write to `target`, and fails early if it could not be finished: to be called
    /// before a long run. No other run can write there meanwhile. `inputs` are files that the run
    /// reads, besides those of the model.
    ///
    /// # Errors
    /// If `target`, or the state of a run that was cut off, is there and `existing` does not say
    /// what to do about it, if `target` overlaps the model's directory or holds an input, if another
    /// run writes there, or if nothing can be written there.
    pub fn create<'a>(
        target: &Path,
        existing: Existing,
        model: &'a Reader,
        inputs: impl IntoIterator<Item = &'a Path>,
    ) -> Result<Self, Error> {
        let given = std::path::absolute(target).map_err(|e| Error::io(target, e))?;
        let parent = given.parent().unwrap_or(&given);
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        let target = resolved(&given).map_err(|e| Error::io(&given, e))?;
        let dir = fs::canonicalize(model.path()).map_err(|e| Error::io(model.path(), e))?;
        let overlaps = |own: &Path| own.starts_with(&dir) || dir.starts_with(own);
        if overlaps(&target) || overlaps(&Partial::beside(&target)) {
            return Err(Error::Overlap { output: target, model: dir });
        }
        for input in model.weight_files().chain(inputs) {
            // What is not there is missed where it is read.
            if fs::canonicalize(input).is_ok_and(|input| input.starts_with(&target)) {
                return Err(Error::Holds { output: target, input: input.to_owned() });
            }
        }
        let partial = Partial::open(target.clone())?;
        let output = Self { staging: partial.checkpoint(), target, partial };
        output.look(existing)?;
        Ok(output)
    }

    /// Sees to what is there already.
    fn look(&self, existing: Existing) -> Result<(), Error> {
        let Self { target, partial, staging } = self;
        if existing.resume && self.is_complete() && !staging.is_dir() {
            return Ok(());
        }
        if target.exists() {
            if !existing.force {
                return Err(Error::Exists(target.clone()));
            }
            let empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
            if !target.join("config.json").is_file() && !empty() {
                return Err(Error::NotReplaceable(target.clone()));
            }
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

    /// A directory for scratch files and the run's state, which goes when the output is finished or
    /// given up.
    pub fn scratch(&self) -> &Path {
        self.partial.path()
    }

    /// What would be left to go on from if the run ended now, in words.
    ///
    /// # Errors
    /// If the state cannot be read.
    pub fn left_over(&self) -> Result<Option<String>, Error> {
        self.partial.left_over()
    }

    /// Where the checkpoint will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where its files are until then.
    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// The directory that the complete checkpoint has now.
    pub fn complete(&self) -> &Path {
        if self.staging.is_dir() { &self.staging } else { &self.target }
    }

    /// Whether a run that was cut off had written all of it: nothing is left but to finish.
    pub fn is_complete(&self) -> bool {
        self.partial.is_finished()
    }

    /// Writes the weights of `reader`, in the same shards: zeros where masks prune, the changed
    /// weights where there are such, every other weight bit for bit unless `dtype` asks for another
    /// format. Calls `written` with the number of bytes after each tensor. The files that come
    /// along are copied. Returns how many kept weights are not the dense ones.
    ///
    /// # Errors
    /// If a file cannot be written, or a weight does not fit the format.
    pub fn write(
        &self,
        reader: &Reader,
        dtype: Option<Dtype>,
        pruned: &Pruned,
        mut written: impl FnMut(u64),
    ) -> Result<usize, Error> {
        for path in reader.companions()? {
            let to = self.staging.join(path.file_name().unwrap_or_default());
            files::copy(&path, &to).map_err(|e| Error::io(&to, e))?;
        }
        if let Some(dtype) = dtype {
            let mut config = reader.config().clone();
            for key in ["torch_dtype", "dtype"] {
                if config.get(key).is_some() {
                    config[key] = dtype.torch().into();
                }
            }
            self.add_file("config.json", pretty(&config).as_bytes())?;
        }
        let mut files = Map::new();
        let (mut total, mut changed) = (0, 0);
        for shard in reader.shards() {
            let tensors = stored(reader, shard, dtype)?;
            let name = shard.path.file_name().unwrap_or_default();
            let path = self.staging.join(name);
            let counts = self.write_shard(&path, shard, &tensors, pruned, &mut written)?;
            total += counts.0;
            changed += counts.1;
            for tensor in tensors {
                files.insert(tensor.name.into(), name.to_string_lossy().into());
            }
        }
        if reader.is_indexed() {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": files });
            self.add_file("model.safetensors.index.json", pretty(&index).as_bytes())?;
        }
        Ok(changed)
    }

    fn write_shard(
        &self,
        path: &Path,
        shard: &Shard,
        tensors: &[Stored<'_>],
        pruned: &Pruned,
        written: &mut impl FnMut(u64),
    ) -> Result<(usize, usize), Error> {
        let io = |e| Error::io(path, e);
        let mut file = files::create(path).map_err(io)?;
        let (header, total) = header(shard, tensors);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&header).map_err(io)?;
        let mut changed = 0;
        for tensor in tensors {
            let (bytes, count) = tensor.bytes(pruned)?;
            changed += count;
            file.write_all(&bytes).map_err(io)?;
            written(bytes.len() as u64);
        }
        file.finish().map_err(io)?;
        Ok((total, changed))
    }

    /// Adds a file, or replaces one that came along.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add_file(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let path = self.staging.join(name);
        files::write(&path, contents).map_err(|e| Error::io(&path, e))
    }

    /// Gives the checkpoint its name, replacing what `force` allowed to be replaced.
    ///
    /// # Errors
    /// If it cannot be renamed; what was there before is then there still.
    pub fn finish(&self) -> Result<(), Error> {
        self.partial.finish()
    }
}

/// Where a path leads to; its last part need not be there.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    let parent = path.parent().unwrap_or(path);
    fs::canonicalize(path)
        .or_else(|_| Ok(fs::canonicalize(parent)?.join(path.file_name().unwrap_or_default())))
}

/// What this process's run to the output `target` leaves to go on from, if the process ends now: the
/// directory, and where the run is, in words. If it is nothing, no directory is left.
pub fn left_behind(target: &Path) -> Option<(PathBuf, String)> {
    let target = std::path::absolute(target).and_then(|target| resolved(&target)).ok()?;
    Partial::left_behind(&target)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The shard's tensors in the order of their bytes.
fn stored<'a>(
    reader: &'a Reader,
    shard: &'a Shard,
    dtype: Option<Dtype>,
) -> Result<Vec<Stored<'a>>, Error> {
    let mut infos: Vec<_> = shard.header.tensors().into_iter().collect();
    infos.sort_by(|(a, x), (b, y)| x.data_offsets.cmp(&y.data_offsets).then(a.cmp(b)));
    let names =
        infos.into_iter().filter_map(|(name, _)| reader.names().find(|known| *known == name));
    names
        .map(|name| {
            let view = reader.tensor(name)?;
            // Only floating-point tensors change their format.
            let to = dtype.filter(|to| Dtype::of(view.dtype).is_some_and(|from| from != *to));
            Ok(Stored { name, bytes: view.bytes, shape: view.shape, from: view.dtype, to })
        })
        .collect()
}

/// The header of a safetensors file, and the size of the tensors that it describes.
fn header(shard: &Shard, tensors: &[Stored<'_>]) -> (Vec<u8>, usize) {
    let mut header = Map::new();
    let mut metadata = json!({ "format": "pt" });
    if let Some(given) = shard.header.metadata() {
        for (key, value) in given.iter().collect::<BTreeMap<_, _>>() {
            metadata[key] = value.as_str().into();
        }
    }
    header.insert("__metadata__".into(), metadata);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += match tensor.to {
            Some(to) => tensor.shape.iter().product::<usize>() * to.size(),
            None => tensor.bytes.len(),
        };
        let dtype = tensor.to.map_or_else(
            || serde_json::to_value(tensor.from).unwrap_or_default(),
            |to| to.name().into(),
        );
        header.insert(
            tensor.name.into(),
            json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end] }),
        );
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    // The tensors begin at a multiple of eight.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    (bytes, end)
}

impl Stored<'_> {
    /// The bytes to write, and how many of the kept weights are not the dense ones.
    fn bytes(&self, pruned: &Pruned) -> Result<(Cow<'_, [u8]>, usize), Error> {
        let mask = pruned.masks.get(self.name);
        let Some(from) = Dtype::of(self.from) else { return Ok((self.bytes.into(), 0)) };
        let dense: Cow<'_, [u8]> = match self.to {
            Some(to) => to.round(self.name, &from.decode(self.bytes))?.into(),
            None => self.bytes.into(),
        };
        let Some(mask) = mask else { return Ok((dense, 0)) };
        let size = self.to.unwrap_or(from).size();
        let changed = pruned.bytes(self.name)?.map(|(_, bytes)| bytes);
        let mut count = 0;
        if let Some(changed) = &changed {
            let pairs = changed.chunks_exact(size).zip(dense.chunks_exact(size));
            let differ = pairs.enumerate().filter(|(i, (new, old))| mask.get(*i) && new != old);
            count = differ.count();
        }
        let mut bytes = changed.unwrap_or_else(|| dense.into_owned());
        mask.apply_to_bytes(&mut bytes, size);
        Ok((bytes.into(), count))
    }
}
