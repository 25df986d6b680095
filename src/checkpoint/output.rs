//! Writing a pruned checkpoint: everything goes to a directory beside the output's place, which is
//! renamed to it when complete. What is under the output's name is always a whole checkpoint.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{Dtype, Error, Pruned, Reader, reader::Shard};

/// A checkpoint in the making. Dropped before [`Output::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    staging: PathBuf,
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
    /// before a long run.
    ///
    /// # Errors
    /// If `target` exists and `force` is not given or would not help, if it overlaps the model's
    /// directory, or if nothing can be written there.
    pub fn create(target: &Path, force: bool, model: &Path) -> Result<Self, Error> {
        let given = std::path::absolute(target).map_err(|e| Error::io(target, e))?;
        let parent = given.parent().unwrap_or(&given);
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        let target = fs::canonicalize(&given)
            .or_else(|_| Ok(fs::canonicalize(parent)?.join(given.file_name().unwrap_or_default())));
        let target = target.map_err(|e| Error::io(&given, e))?;
        let model = fs::canonicalize(model).map_err(|e| Error::io(model, e))?;
        if target.starts_with(&model) || model.starts_with(&target) {
            return Err(Error::Overlap { output: target, model });
        }
        if target.exists() {
            if !force {
                return Err(Error::Exists(target));
            }
            let empty = || fs::read_dir(&target).is_ok_and(|mut entries| entries.next().is_none());
            if !target.join("config.json").is_file() && !empty() {
                return Err(Error::NotReplaceable(target));
            }
        }
        let staging = sibling(&target, "partial");
        fs::create_dir(&staging).map_err(|e| Error::io(&staging, e))?;
        Ok(Self { target, staging })
    }

    /// A directory for scratch files, which goes when the output is finished or given up.
    pub fn scratch(&self) -> &Path {
        &self.staging
    }

    /// Where the checkpoint will be.
    pub fn target(&self) -> &Path {
        &self.target
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
            fs::copy(&path, &to).map_err(|e| Error::io(&path, e))?;
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
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
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
        file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
        Ok((total, changed))
    }

    /// Adds a file, or replaces one that came along.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add_file(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let path = self.staging.join(name);
        let write = || {
            // A copied file keeps its permissions, which may forbid writing.
            if path.exists() {
                fs::remove_file(&path)?;
            }
            let mut file = File::create(&path)?;
            file.write_all(contents)?;
            file.sync_all()
        };
        write().map_err(|e| Error::io(&path, e))
    }

    /// Gives the checkpoint its name, replacing what `force` allowed to be replaced.
    ///
    /// # Errors
    /// If it cannot be renamed; what was there before is then there still.
    pub fn finish(self) -> Result<(), Error> {
        let io = |e| Error::io(&self.target, e);
        sync_dir(&self.staging).map_err(io)?;
        if self.target.exists() {
            let old = sibling(&self.target, "replaced");
            fs::rename(&self.target, &old).map_err(io)?;
            if let Err(error) = fs::rename(&self.staging, &self.target) {
                // Nothing is lost: the old one gets its name back.
                let _ = fs::rename(&old, &self.target);
                return Err(io(error));
            }
            fs::remove_dir_all(&old).map_err(|e| Error::io(&old, e))?;
        } else {
            fs::rename(&self.staging, &self.target).map_err(io)?;
        }
        if let Some(parent) = self.target.parent() {
            sync_dir(parent).map_err(io)?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // After `finish` it is not there any more.
        let _ = fs::remove_dir_all(&self.staging);
    }
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A hidden name beside `target` that no other run uses.
fn sibling(target: &Path, what: &str) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
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
